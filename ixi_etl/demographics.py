"""Age and sex from `IXI.xls`, one entry per person: its duplicate rows must not duplicate subjects."""

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
MAX_AGE = 130.0  # years; more is a code for "unknown", or a year of birth
EXCEL = (b"\xd0\xcf\x11\xe0", b"PK\x03\x04")  # how .xls and .xlsx files begin
SHOWN = 5  # examples in a message

_ID = re.compile(r"((?P<prefix>[A-Za-z]+)[-_ ]?)?(?P<number>\d+)(\.0*)?(?P<rest>-.*)?")
_SEX = {"1": "m", "m": "m", "male": "m", "man": "m", "2": "f", "f": "f", "female": "f", "woman": "f"}


@dataclass(frozen=True)
class Demographics:
    """A table of people.

    Attributes:
        people: person as of `canonical_person` -> {"age": years, "sex": "m" or "f"}, without what is not known.
        rows: person -> how many rows there are.
        unread: the ids, as they are written, that are no id of a person.
    """

    people: dict[str, dict[str, float | str]]
    rows: dict[str, int]
    unread: list[str]

    def match(self, persons: Collection[str]) -> tuple[int, int, str]:
        """How many persons there are, how many of them the table has, and in words what matched and what did not."""
        wanted = {canonical_person(person) for person in persons}
        both, others = wanted & set(self.people), sorted(set(self.people) - wanted)
        rows = sum(self.rows[person] for person in both)
        said = f"{rows} of {sum(self.rows.values()) + len(self.unread)} rows are of {len(both)}"
        said += f" of the {len(wanted)} persons in the archives"
        if others:
            said += f"; not in the archives: {_some(others)}"
        if self.unread:
            said += f"; ids that were not understood: {_some(self.unread)}"
        return len(wanted), len(both), said


def canonical_person(text: str) -> str:
    """One spelling of a person's id: `IXI002` for 2, `002`, `2.0`, `ixi2`, `IXI002` and `IXI002-Guys-0828`.

    Other prefixes stay apart (`P7` is `P7`). What is no id ("2.5", 0, "x") stays as it is.
    """
    found = _ID.fullmatch(text.strip())
    if found is None or not 1 <= int(found["number"]) <= MAX_ID or (found["rest"] and not found["prefix"]):
        return text.strip()
    prefix = (found["prefix"] or "").upper()
    return f"IXI{int(found['number']):03d}" if prefix in ("", "IXI") else f"{prefix}{int(found['number'])}"


def read_demographics(path: Path, data: bytes | None = None) -> Demographics:
    """The people of `IXI.xls`, or of another table (.xls, .xlsx, or text with commas, semicolons or tabs).

    `data` is what the file holds, where it has been read already.

    Where several rows share an IXI_ID, a value counts only if all of them that have one agree: 26 ids of the published
    file have two or more rows, and some of those contradict each other.

    Raises:
        DatasetError: not a table with one column each of IXI_ID, SEX_ID and AGE.
    """
    try:
        table = _read_table(path.read_bytes() if data is None else data)
    except Exception as error:  # each reader raises its own kinds on damaged files
        said = " ".join(str(error).split())
        raise DatasetError(f"{path} cannot be read as IXI.xls ({said}); give an .xls, .xlsx or .csv file") from error
    table.columns = table.columns.astype(str).str.split().str[0].str.upper()  # published: `SEX_ID (1=m, 2=f)`
    missing = set(COLUMNS) - set(table.columns)
    if missing:
        raise DatasetError(f"{path} has no column {', '.join(sorted(missing))}; is it IXI.xls?")
    twice = set(COLUMNS) & set(table.columns[table.columns.duplicated()])
    if twice:
        raise DatasetError(f"{path} has more than one column {', '.join(sorted(twice))}; leave one of each")
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
    rows_of = {str(name): int(n) for name, n in persons[is_person].value_counts().items()}
    return Demographics(people, rows_of, table.loc[~is_person, "IXI_ID"].tolist())


def _read_table(data: bytes) -> pd.DataFrame:
    """All cells as text, whatever the file's name says that it is."""
    if data.startswith(EXCEL):
        return pd.read_excel(io.BytesIO(data), engine="calamine", dtype="str", keep_default_na=False)
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")  # what older spreadsheets write
    header = text.splitlines()[0] if text.strip() else ""
    # The separator that makes most columns of the header; in the published one, a comma stands within quotes.
    separator = max(",;\t", key=lambda by: len(next(csv.reader([header], delimiter=by), [])))
    return pd.read_csv(io.StringIO(text), sep=separator, dtype="str", keep_default_na=False)


def _some(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(map(repr, names[:SHOWN]))}{', ...' if len(names) > SHOWN else ''})"
