"""Age and sex from `IXI.xls`, one entry per person: its duplicate rows must not duplicate subjects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from ixi_etl.errors import DatasetError

MAX_ID = 99_999  # the published ids have three digits; what no id is belongs to nobody
_SEX = {1: "m", 2: "f"}


def read_demographics(path: Path) -> dict[str, dict[str, float | str]]:
    """Person (`IXI002`) -> {"age": years, "sex": "m" or "f"}, without what is not known.

    Where several rows share an IXI_ID, a value counts only if all of them that have one agree: 26 ids of the published
    file have two or more rows, and some of those contradict each other.

    Raises:
        DatasetError: not a table with one column each of IXI_ID, SEX_ID and AGE.
    """
    try:
        table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_excel(path, engine="calamine")
    except Exception as error:  # each reader raises its own kinds on damaged files
        said = " ".join(str(error).split())
        raise DatasetError(f"{path} cannot be read as IXI.xls ({said}); give an .xls or .csv file") from error
    table.columns = table.columns.astype(str).str.split().str[0]  # the published header is `SEX_ID (1=m, 2=f)`
    missing = {"IXI_ID", "SEX_ID", "AGE"} - set(table.columns)
    if missing:
        raise DatasetError(f"{path} has no column {', '.join(sorted(missing))}; is it IXI.xls?")
    twice = {"IXI_ID", "SEX_ID", "AGE"} & set(table.columns[table.columns.duplicated()])
    if twice:
        raise DatasetError(f"{path} has more than one column {', '.join(sorted(twice))}; leave one of each")
    numbers = table[["IXI_ID", "SEX_ID", "AGE"]].apply(pd.to_numeric, errors="coerce")
    people: dict[str, dict[str, float | str]] = {}
    for number, rows in numbers[numbers["IXI_ID"].between(1, MAX_ID)].groupby("IXI_ID"):
        ages = rows["AGE"][(rows["AGE"] > 0) & (rows["AGE"] < np.inf)].unique()
        sexes = rows["SEX_ID"].map(_SEX).dropna().unique()
        person = people.setdefault(f"IXI{int(float(str(number))):03d}", {})
        if len(ages) == 1:
            person["age"] = round(float(ages[0]), 2)
        if len(sexes) == 1:
            person["sex"] = str(sexes[0])
    return people
