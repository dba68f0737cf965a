"""Read age and sex of each person from `IXI.xls` or a similar table, which may have several rows per person."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ixi_etl.errors import DatasetError

COLUMNS = ("IXI_ID", "SEX_ID", "AGE")
MAX_ID = 99_999  # the published ids have three digits
MAX_AGE = 130.0  # years; larger values are codes for "unknown" or years of birth
EXCEL = (b"\xd0\xcf\x11\xe0", b"PK\x03\x04")  # first bytes of .xls and .xlsx files
MAX_EXAMPLES = 5  # in a message

_ID = re.compile(r"((?P<prefix>[A-Za-z]+)[-_ ]?)?(?P<number>\d+)(\.0*)?(?P<rest>-.*)?")
_SEX = {"1": "m", "m": "m", "male": "m", "man": "m", "2": "f", "f": "f", "female": "f", "woman": "f"}


@dataclass(frozen=True)
class Demographics:
    """Age and sex of people.

    Attributes:
        people: id (`canonical_person`) -> {"age": years, "sex": "m" or "f"}; unknown values are left out.
        rows: id -> number of rows.
        unread: ids that were not understood, as written.
    """

    people: dict[str, dict[str, float | str]]
    rows: dict[str, int]
    unread: list[str]

    def match(self, persons: Collection[str]) -> tuple[int, int, str]:
        """Number of persons, number of those in the table, and a message about what matched and what did not."""
        wanted = {canonical_person(person) for person in persons}
        both, others = wanted & set(self.people), sorted(set(self.people) - wanted)
        rows = sum(self.rows[person] for person in both)
        message = f"{rows} of {sum(self.rows.values()) + len(self.unread)} rows match {len(both)}"
        message += f" of the {len(wanted)} persons in the archives"
        if others:
            message += f"; not in the archives: {_examples(others)}"
        if self.unread:
            message += f"; ids that were not understood: {_examples(self.unread)}"
        return len(wanted), len(both), message


def canonical_person(text: str) -> str:
    """The canonical id of a person: `IXI002` for 2, `002`, `2.0`, `ixi2`, `IXI002` and `IXI002-Guys-0828`.

    Other prefixes are kept (`P7` is `P7`). Text that is not an id ("2.5", 0, "x") is returned unchanged.
    """
    match = _ID.fullmatch(text.strip())
    if match is None or not 1 <= int(match["number"]) <= MAX_ID or (match["rest"] and not match["prefix"]):
        return text.strip()
    prefix = (match["prefix"] or "").upper()
    return f"IXI{int(match['number']):03d}" if prefix in ("", "IXI") else f"{prefix}{int(match['number'])}"


def read_demographics(path: Path, data: bytes | None = None) -> Demographics:
    """Read `IXI.xls` or another table (.xls, .xlsx, or text with commas, semicolons or tabs).

    Where several rows share an IXI_ID, a value is used only if all rows that have one agree: 26 ids of the published
    file have two or more rows, and some of those contradict each other.

    Args:
        path: of the file, for messages; read if `data` is None.
        data: the content of the file, if it has been read already.

    Raises:
        DatasetError: the file is not a table with exactly one column each of IXI_ID, SEX_ID and AGE.
    """
    try:
        table = _read_table(path.read_bytes() if data is None else data)
    except Exception as error:  # each reader raises its own exceptions on damaged files
        message = " ".join(str(error).split())
        raise DatasetError(f"{path} cannot be read as IXI.xls ({message}); give an .xls, .xlsx or .csv file") from error
    table.columns = table.columns.astype(str).str.split().str[0].str.upper()  # published: `SEX_ID (1=m, 2=f)`
    missing = set(COLUMNS) - set(table.columns)
    if missing:
        raise DatasetError(f"{path} has no column {', '.join(sorted(missing))}; is it IXI.xls?")
    duplicates = set(COLUMNS) & set(table.columns[table.columns.duplicated()])
    if duplicates:
        raise DatasetError(f"{path} has more than one column {', '.join(sorted(duplicates))}; keep one of each")
    table = table[list(COLUMNS)].astype("str").apply(lambda column: column.str.strip())
    table = table[(table != "").any(axis=1)]  # spreadsheets end in empty rows
    persons = table["IXI_ID"].map(canonical_person)
    is_person = persons.str.fullmatch(r"[A-Za-z].*\d.*")
    ages = pd.to_numeric(table["AGE"].str.replace(",", ".", regex=False), errors="coerce")
    sexes = table["SEX_ID"].str.lower().str.replace(r"\.0*$", "", regex=True).map(_SEX)
    people: dict[str, dict[str, float | str]] = {}
    for name, rows in table[is_person].groupby(persons[is_person]):
        age = ages[rows.index]
        age = age[(age > 0) & (age < MAX_AGE)].unique()
        sex = sexes[rows.index].dropna().unique()
        person = people.setdefault(str(name), {})
        if len(age) == 1:
            person["age"] = round(float(age[0]), 2)
        if len(sex) == 1:
            person["sex"] = str(sex[0])
    row_counts = {str(name): int(n) for name, n in persons[is_person].value_counts().items()}
    return Demographics(people, row_counts, table.loc[~is_person, "IXI_ID"].tolist())


def _read_table(data: bytes) -> pd.DataFrame:
    """All cells as text. The content decides the format, not the file's name."""
    if data.startswith(EXCEL):
        return pd.read_excel(io.BytesIO(data), engine="calamine", dtype="str", keep_default_na=False)
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")  # written by older spreadsheets
    header = text.splitlines()[0] if text.strip() else ""
    # The separator that gives the most columns in the header. The published header has a comma within quotes.
    separator = max(",;\t", key=lambda delimiter: len(next(csv.reader([header], delimiter=delimiter), [])))
    return _parse_rows(text, separator)


def _parse_rows(text: str, separator: str) -> pd.DataFrame:
    """The cells of a text table. Empty cells at the end of a row may be left out.

    `pandas.read_csv` also accepts rows whose length differs from the header's, and then puts values into the wrong
    columns. For example, an unquoted header `SEX_ID (1=m, 2=f)` counts as two columns.

    Raises:
        ValueError: all rows are shorter than the header, or one is longer.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    header = next(reader, [])
    rows, is_short = [], True
    for row in reader:
        if not any(cell.strip() for cell in row):
            continue
        if any(cell.strip() for cell in row[len(header) :]):
            raise ValueError(f"line {reader.line_num} has {len(row)} cells and the header {len(header)}")
        is_short &= len(row) < len(header)
        rows.append([*row, *[""] * len(header)][: len(header)])
    if rows and is_short:
        raise ValueError(f"the header has {len(header)} cells, more than any row; put names with a separator in quotes")
    return pd.DataFrame(rows, columns=header, dtype="str")


def _examples(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(map(repr, names[:MAX_EXAMPLES]))}{', ...' if len(names) > MAX_EXAMPLES else ''})"
