"""Age and sex of each person are read from many forms of the table and joined by id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from survey_tables import pair, table_of

from ixi_etl.config import DatasetConfig
from ixi_etl.dataset import manifest, selection
from ixi_etl.errors import DatasetError
from ixi_etl.scans.demographics import Demographics, read_demographics


def write_xls(path: Path, rows: list[list[Any]]) -> Path:
    import xlwt

    book = xlwt.Workbook()
    sheet = book.add_sheet("Table")
    for r, row in enumerate([["IXI_ID", "SEX_ID (1=m, 2=f)", "HEIGHT", "AGE"], *rows]):
        for c, value in enumerate(row):
            if value is not None:
                sheet.write(r, c, value)
    book.save(str(path))
    return path


def test_joining_demographics_does_not_duplicate_subjects(tmp_path: Path) -> None:
    path = write_xls(
        tmp_path / "IXI.xls",
        [
            [1, 1, 180, 35.8],
            [2, 2, 0, None],
            [3, 1, 0, 41.5],
            [3, 1, 0, 41.5],
            [4, 1, 0, 20],
            [4, 2, 0, 60],
            [5, 7, 0, 0],
        ],
    )
    people = read_demographics(path).people
    assert people["IXI001"] == {"age": 35.8, "sex": "m"}
    assert people["IXI002"] == {"sex": "f"}
    assert people["IXI003"] == {"age": 41.5, "sex": "m"}
    assert people["IXI004"] == {}  # its rows contradict each other
    assert people["IXI005"] == {}
    table = table_of([*pair("IXI003-HH-1"), *pair("IXI003-HH-2"), *pair("IXI009-HH-1")])
    selected = selection.screen_headers(table, DatasetConfig(), people)
    assert selected["subject_id"].tolist() == ["IXI003-HH-1", "IXI003-HH-2", "IXI009-HH-1"]
    assert selected["sex"].tolist() == ["m", "m", ""]
    assert selected["age"].tolist()[:2] == [41.5, 41.5]
    assert selected["age"].isna().tolist() == [False, False, True]


HEADER = "IXI_ID,SEX_ID,AGE\n"


def test_invalid_ids_and_ages_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "people.csv"
    ids = ("inf", "-inf", "1e22", "1e300", "-3", "0", "100000", "x", "")
    path.write_text(HEADER + "".join(f"{n},1,30\n" for n in ids) + "12,1,inf\n13,2,50.5\n14,2,-inf\n")
    people = read_demographics(path).people
    assert people == {"IXI012": {"sex": "m"}, "IXI013": {"age": 50.5, "sex": "f"}, "IXI014": {"sex": "f"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("IXI_ID,SEX_ID a,SEX_ID b,AGE\n1,1,2,30\n", "has more than one column SEX_ID; keep one of each"),
        ("IXI_ID,IXI_ID x,SEX_ID,AGE,AGE y\n1,2,1,30,3\n", "has more than one column AGE, IXI_ID; keep one of each"),
        ("IXI_ID,SEX_ID,AGE,AGE\n1,2,30,3\n", "has more than one column AGE; keep one of each"),
        (HEADER + "1,1,2\n1,2,3,4,5,6\n", "cannot be read as IXI.xls .*line 3 has 6 cells and the header 3"),
        (HEADER + "1,1,2,9\n2,2,3,9\n", "line 2 has 4 cells and the header 3"),
        ("IXI_ID,SEX_ID (1=m, 2=f),AGE\n1,1,30\n2,2,40\n", "the header has 4 cells, more than any row"),
        ("IXI_ID,SEX_ID (1=m, 2=f),AGE,WEIGHT\n1,1,30,70\n", "the header has 5 cells, more than any row"),
    ],
)
def test_a_malformed_table_is_a_one_line_error(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "people.csv"
    path.write_text(text)
    with pytest.raises(DatasetError, match=message) as caught:
        read_demographics(path)
    assert "\n" not in str(caught.value)


def test_empty_cells_at_the_end_of_a_row_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "people.csv"
    path.write_text(HEADER + "1,1\n\n2,2,40,,\n,,\n3\n")
    assert read_demographics(path).people == {"IXI001": {"sex": "m"}, "IXI002": {"age": 40.0, "sex": "f"}, "IXI003": {}}


@pytest.mark.parametrize("content", [b"not an xls", b""])
def test_a_damaged_file_is_a_one_line_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "IXI.xls"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"IXI\.xls (cannot be read|has no column)"):
        read_demographics(path)


def test_missing_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "people.csv"
    path.write_text("id,years\n1,2\n")
    with pytest.raises(DatasetError, match="has no column AGE, IXI_ID, SEX_ID"):
        read_demographics(path)


IDS = ["IXI012", "ixi12", "IXI-012", "012", "12", "12.0", " 12 ", "IXI012-Guys-0700", "IXI0012"]


@pytest.mark.parametrize("spelling", IDS)
def test_every_spelling_of_an_id_is_read(spelling: str, tmp_path: Path) -> None:
    path = tmp_path / "people.CSV"
    path.write_text(HEADER + f"{spelling},2,30.5\n")
    demographics = read_demographics(path)
    assert (demographics.people, demographics.unread) == ({"IXI012": {"age": 30.5, "sex": "f"}}, [])
    (row,) = manifest.to_records(
        selection.screen_headers(table_of(pair("IXI012-HH-1")), DatasetConfig(), demographics.people)
    )
    assert (row["age"], row["sex"]) == (30.5, "f")


@pytest.mark.parametrize("invalid", ["2.5", "2,5", "-2", "0", "2 3", "2/3", "2-Jan", "two", "100000", "1e1", "n/a"])
def test_an_invalid_id_is_ignored_and_listed(invalid: str, tmp_path: Path) -> None:
    path = tmp_path / "people.csv"
    path.write_text(HEADER + f'2,1,40\n"{invalid}",2,30.5\n')
    demographics = read_demographics(path)
    assert (demographics.people, demographics.unread) == ({"IXI002": {"age": 40.0, "sex": "m"}}, [invalid])


def test_ids_with_other_prefixes_are_joined_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "people.csv"
    path.write_text(HEADER + "P7,m,30\npat7,F,31\nIXI7_b,f,32\n")
    people = read_demographics(path).people
    rows = [*pair("P07-HH-1"), *pair("PAT007-HH-1"), *pair("IXI7_b-HH-1"), *pair("IXI007-HH-1")]
    selected = selection.screen_headers(table_of(rows), DatasetConfig(), people).set_index("subject_id")
    assert selected["age"].fillna(0).to_dict() == {
        "IXI007-HH-1": 0,
        "IXI7_b-HH-1": 32,
        "P07-HH-1": 30,
        "PAT007-HH-1": 31,
    }


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbfIXI_ID,SEX_ID,AGE\n2,1,35.8\n",
        b'IXI_ID;"SEX_ID (1=m, 2=f)";AGE\r\nIXI002;1;35,8\r\n;;\r\n',
        b"ixi_id\tSex_ID\tage\tNAME\n002\tMale\t35.8\tJ\xf6rg\n",
        "IXI_ID\tSEX_ID\tAGE\r\n2\tm\t35.8\r\n".encode("utf-16"),
        b"AGE,SEX_ID,IXI_ID\n35.8,1.0,2.0\n999,,2\n,1,\n",
    ],
    ids=["BOM", "semicolons", "tabs", "UTF-16", "unknown age"],
)
def test_tables_written_by_many_programs_are_read(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "people.txt"
    path.write_bytes(data)
    assert read_demographics(path).people == {"IXI002": {"age": 35.8, "sex": "m"}}


def test_a_spreadsheet_is_recognised_by_its_content(tmp_path: Path) -> None:
    path = write_xls(tmp_path / "a.xls", [[2, "m", 0, 35.8], ["IXI003", 2, 0, "41"], [2.5, 1, 0, 20], ["", "", "", ""]])
    path = path.rename(tmp_path / "PEOPLE.XLS")
    demographics = read_demographics(path)
    assert demographics.people == {"IXI002": {"age": 35.8, "sex": "m"}, "IXI003": {"age": 41.0, "sex": "f"}}
    assert demographics.unread == ["2.5"]


def test_the_message_counts_matched_and_lists_unmatched_ids() -> None:
    demographics = Demographics(
        {"IXI001": {}, "IXI002": {}, "IXI009": {}}, {"IXI001": 2, "IXI002": 1, "IXI009": 1}, ["2.5"]
    )
    wanted, matched, message = demographics.match(["IXI1", "IXI002", "IXI003"])
    assert (wanted, matched) == (3, 2)
    assert message == (
        "3 of 5 rows match 2 of the 3 persons in the archives; not in the archives: 1 ('IXI009'); "
        "ids that were not understood: 1 ('2.5')"
    )
