"""Nobody is lost: every subject of the union has a row, and whoever is out has a reason."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from profiles import examples

from ixi_etl import dataset, manifest
from ixi_etl.config import SPLITS, DatasetConfig
from ixi_etl.demographics import Demographics, read_demographics
from ixi_etl.errors import DatasetError
from ixi_etl.files import write_atomic
from ixi_etl.manifest import REASONS
from ixi_etl.nifti import SCANNER, Form
from ixi_etl.phantom import grid_affine
from ixi_etl.publish import Refreshed
from ixi_etl.schema import IXI
from ixi_etl.survey import COLUMNS, modal_depths

CUT = {"t1_sha256": "0" * 64, "t2_sha256": "a" * 64, "t1_p_low": 0, "t1_p_high": 9, "t2_p_low": 0, "t2_p_high": 9}
CUT |= {"t2_window_start": 55, "t2_window_stop": 75}
CUT |= {"t1_scale": 1.0, "t1_offset": 0.0, "t2_scale": 0.01, "t2_offset": -3.5}

HEADER_REASONS = ["", "", "", "unreadable", "not_3d", "unsupported_dtype", "bad_affine"]


def volume(
    subject: str, modality: str, depth: int = 130, plane: int = 256, mm: float = 1.25, **more: Any
) -> dict[str, Any]:
    shape, spacing = (plane, plane, depth), (0.9375, 0.9375, mm)
    affine = more.pop("affine", grid_affine(shape, spacing, "LAS"))
    form = Form(affine, spacing, more.get("orientation", "LAS"))
    return dict.fromkeys(COLUMNS, "") | {
        "subject_id": subject,
        "site": subject.split("-")[1],
        "modality": modality,
        "member": f"{subject}-{modality}.nii.gz",
        "shape": json.dumps(shape),
        "depth": depth,
        "spacing_mm": json.dumps(spacing),
        "orientation": "LAS",
        "affine": json.dumps(affine.tolist()),
        "forms": json.dumps({SCANNER: form.to_record()}),
        "readable": True,
        **more,
    }


def table_of(rows: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=COLUMNS)


def pair(subject: str, **t2: Any) -> list[dict[str, Any]]:
    return [volume(subject, "T1", 150), volume(subject, "T2", **t2)]


@st.composite
def surveys(draw: st.DrawFn) -> pd.DataFrame:
    rows = []
    for number in range(draw(st.integers(1, 12))):
        subject = f"IXI{number:03d}-{draw(st.sampled_from(['Guys', 'HH', 'IOP']))}-0700"
        for modality in draw(st.sampled_from([["T1"], ["T2"], ["T1", "T2"], ["T1", "T2"], ["T1", "T2", "T2"]])):
            reason = draw(st.sampled_from(HEADER_REASONS))
            depth, plane = draw(st.sampled_from([28, 130, 130, 150])), draw(st.sampled_from([256, 256, 192]))
            mm = draw(st.sampled_from([1.25, 1.25, 1.2, 4.98]))
            rows.append(
                volume(
                    subject, modality, depth, plane, mm, reason=reason, problem=reason, readable=reason != "unreadable"
                )
            )
    return table_of(rows)


@settings(max_examples=examples(20))
@given(surveys(), st.sampled_from(["anatomical", "index"]), st.randoms())
def test_selection_loses_nobody_and_gives_the_first_reason(table: pd.DataFrame, pairing: str, random: Any) -> None:
    config = DatasetConfig(pairing=pairing)
    shuffled = table.iloc[random.sample(range(len(table)), len(table))].reset_index(drop=True)
    selected = manifest.select(shuffled, config)
    assert selected["subject_id"].tolist() == sorted(table["subject_id"].unique())
    modal, order = modal_depths(table), list(REASONS)
    for row in selected.itertuples():
        members = table[table["subject_id"] == row.subject_id]
        expected = [f"missing_{m.lower()}" for m in ("T1", "T2") if m not in set(members["modality"])]
        expected += ["duplicate_member"] * bool(members.duplicated("modality").any())
        # only the first of several equally named members is looked at further
        for member in shuffled[shuffled["subject_id"] == row.subject_id].drop_duplicates("modality").itertuples():
            expected += [member.reason] if member.reason else []
            if not member.reason and member.depth != modal[member.modality]:
                expected.append("depth_not_modal")
        first = min(expected, key=order.index, default="")
        if first:
            assert (row.status, row.reason) == ("excluded", first)
            assert row.detail
        else:
            assert row.reason in ("", "grid_not_modal")
            assert row.status == ("excluded" if row.reason else "candidate")


@settings(max_examples=examples(10))
@given(surveys(), st.data())
def test_settled_manifests_keep_the_contract_and_survive_the_csv(table: pd.DataFrame, data: st.DataObject) -> None:
    config = DatasetConfig(pairing="index")
    selected = manifest.select(table, config)
    found: dict[str, Any] = {}
    for subject in selected.loc[selected["status"] == "candidate", "subject_id"]:
        if data.draw(st.booleans()):
            low = data.draw(st.floats(-1e4, 1e4))
            found[subject] = CUT | {"t1_p_low": low, "t1_p_high": low + abs(low) + 1, "affines": [], "flags": 'a, "b"'}
        else:
            found[subject] = {"reason": "corrupt_voxels", "detail": "T1: cut short,\nor so"}
    settled = manifest.settle(selected, {s: found.get(s, {"t1_sha256": "0"}) for s in selected["subject_id"]}, config)
    used = manifest.used(settled)
    assert used["store_row"].tolist() == list(range(len(used)))
    assert used["subject_id"].is_monotonic_increasing
    assert set(used["subject_id"]) == {s for s, r in found.items() if "reason" not in r}
    assert list(settled.columns) == IXI.columns
    again = IXI.from_csv(IXI.to_csv(settled), "m.csv")
    pd.testing.assert_frame_equal(again, settled)
    funnel = manifest.funnel(settled)["all"]
    assert funnel.is_monotonic_decreasing
    assert (funnel.iloc[0], funnel.iloc[-1]) == (len(settled), len(used))
    assert manifest.exclusions(settled)["all"].sum() == len(settled) - len(used)


@pytest.mark.parametrize("odd", ["a\rb/", "a\r\nb/", 'a"b,c/', "=1+1/"])
def test_an_odd_folder_in_an_archive_survives_the_csv(odd: str, published: Refreshed, tmp_path: Path) -> None:
    settled = dataset.read_manifest(published.folder)
    settled["t1_member"] = odd + settled["t1_member"]
    write_atomic(tmp_path / dataset.MANIFEST, IXI.to_csv(settled))
    write_atomic(tmp_path / dataset.FACTS, (published.folder / dataset.FACTS).read_bytes())
    pd.testing.assert_frame_equal(dataset.read_manifest(tmp_path), settled)


NAMES = [
    '=HYPERLINK("http://x")/a',
    "+1",
    "-1",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "'=1",
    "''@x",
    "＝1",
    "'quoted'",
    "a=1",
    "'",
]


def test_no_cell_of_the_csv_is_a_formula_and_no_name_is_lost(published: Refreshed) -> None:
    table = dataset.read_manifest(published.folder)
    assert len(table) >= len(NAMES)
    names = pd.Series(NAMES)[np.arange(len(table)) % len(NAMES)].to_numpy()
    table = table.assign(t1_member=names, detail=np.roll(names, 1))
    table = table.assign(status="excluded", reason="unreadable", split="", store_row=pd.NA)
    table = IXI.typed(table)
    text = IXI.to_csv(table)
    cells = pd.read_csv(io.StringIO(text), dtype="str", keep_default_na=False, lineterminator="\n")
    for column in (name for name, dtype in IXI.dtypes.items() if dtype == "str"):
        assert not cells[column].str.match("[=+@\t\r＝-]").any()
    pd.testing.assert_frame_equal(IXI.from_csv(text, "it"), table)


def test_columns_are_in_the_order_of_the_contract() -> None:
    of_volume = "{m}_member {m}_sha256 {m}_depth {m}_shape {m}_spacing_mm {m}_orientation"
    of_volume += " {m}_window_start {m}_window_stop {m}_p_low {m}_p_high "
    contract = "subject_id site status reason detail split store_row age sex "
    contract += of_volume.format(m="t1") + of_volume.format(m="t2")
    contract += "t2_to_t1_ras_mm motion_mm motion_deg nmi_before nmi_after flags "
    contract += "t1_gzip_crc32 t2_gzip_crc32 t1_scale t1_offset t2_scale t2_offset"
    assert " ".join(IXI.columns) == contract


@pytest.fixture(scope="module")
def two_used() -> pd.DataFrame:
    """A manifest that is read as it is; tests make others of it."""
    table = table_of([*pair("IXI001-HH-1"), *pair("IXI002-HH-1")])
    found = {"IXI001-HH-1": CUT, "IXI002-HH-1": CUT}
    settled = manifest.settle(manifest.select(table, DatasetConfig()), found, DatasetConfig())
    assert IXI.from_csv(settled.to_csv(index=False), "m.csv").equals(settled)
    return settled


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.assign(status="maybe"), "status"),
        (lambda t: t.assign(reason="because"), "reason"),
        (lambda t: t.assign(store_row=pd.array([1, 0], "Int64")), "dense"),
        (lambda t: t.assign(split=""), "split"),
        (lambda t: t.assign(reason="not_3d"), "reason"),
        (lambda t: t.iloc[::-1], "dense"),
        (lambda t: t.drop(columns="flags"), "flags"),
        (lambda t: t.assign(more=1), "more"),
        (lambda t: pd.concat([t, t.iloc[:1]]), "duplicate"),
        (lambda t: t.assign(t1_depth="many"), "many"),
        (lambda t: t.assign(detail="a used row has none"), "detail"),
        (lambda t: t.assign(t1_sha256=""), "complete"),
        (lambda t: t.assign(t2_member=""), "complete"),
        (lambda t: t.assign(t2_p_high=-1.0), "complete"),
        (lambda t: t.assign(t1_p_high=t["t1_p_low"]), "complete"),
        (lambda t: t.assign(t2_scale=0.0), "complete"),
        (lambda t: t.assign(t1_scale=float("inf")), "complete"),
        (lambda t: t.assign(t1_offset=float("nan")), "complete"),
        (lambda t: t.assign(t1_p_low=float("nan")), "complete"),
        (lambda t: t.assign(t2_window_stop=""), "complete"),
        (lambda t: t.assign(t2_to_t1_ras_mm="hello"), "complete"),
        (lambda t: t.assign(t2_to_t1_ras_mm="[1, 2]"), "complete"),
        (lambda t: t.assign(nmi_after=-7), "in_range"),
        (lambda t: t.assign(subject_id=["../../a", "IXI002-HH-1"]), "leads_nowhere"),
        (lambda t: t.assign(subject_id=["/etc/a", "IXI002-HH-1"]), "leads_nowhere"),
    ],
)
def test_a_manifest_that_was_edited_is_refused(change: Any, said: str, two_used: pd.DataFrame) -> None:
    text = change(two_used).to_csv(index=False)
    with pytest.raises(DatasetError, match=rf"m\.csv is not a manifest.*{said}"):
        IXI.from_csv(text, "m.csv")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: pd.concat([t, t[["age"]]], axis=1),
        lambda t: t.drop(columns="age"),
        lambda t: t[["site", *t.columns.drop("site")]],
        lambda t: t.astype({"store_row": "Float64"}),
        lambda t: t.assign(site=pd.Series([None, "HH"], dtype="str")),
    ],
    ids=["doubled", "missing", "in another order", "of another type", "with a missing text"],
)
def test_a_table_with_other_columns_is_not_written(change: Any, two_used: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match=r"columns|text_is_never_missing"):
        IXI.to_csv(change(two_used))


@pytest.mark.parametrize(
    ("t2", "reason"),
    [
        ({"plane": 192}, "grid_not_modal"),
        ({"mm": 4.98}, "grid_not_modal"),
        ({"mm": 1.2}, ""),
        ({"depth": 28}, "depth_not_modal"),
        (
            {
                "orientation": "RAS",
                "affine": grid_affine((256, 256, 130), (0.9375, 0.9375, 1.25), "RAS"),
            },
            "",
        ),
        # a coronal stack of the modal depth: its axial slices are others
        (
            {
                "orientation": "RSA",
                "affine": grid_affine((256, 256, 130), (0.9375, 0.9375, 1.25), "RSA"),
            },
            "grid_not_modal",
        ),
    ],
)
def test_anatomical_pairs_need_the_t2_s_modal_grid(t2: dict[str, Any], reason: str) -> None:
    rows = [row for n in range(3) for row in pair(f"IXI{n:03d}-HH-1")] + pair("IXI900-HH-1", **t2)
    selected = manifest.select(table_of(rows), DatasetConfig()).set_index("subject_id")
    assert selected.loc["IXI900-HH-1", "reason"] == reason


def test_a_window_that_does_not_fit_is_said_of_each_subject() -> None:
    selected = manifest.select(table_of(pair("IXI001-HH-1")), DatasetConfig(window=(120, 140)))
    assert selected["detail"].tolist() == ["T2 has 130 slices: [120, 140) cannot be cut"]


def test_index_pairs_need_slices_of_one_shape() -> None:
    rows = [volume("IXI001-HH-1", "T1", 150, plane=320), volume("IXI001-HH-1", "T2")]
    (reason,) = manifest.select(table_of(rows), DatasetConfig(pairing="index"))["reason"]
    assert reason == "grid_not_modal"
    assert manifest.select(table_of(rows), DatasetConfig())["reason"].tolist() == [""]


@settings(max_examples=examples(8))
@given(st.integers(0, 10**6), st.integers(0, 999))
def test_the_split_belongs_to_the_person_and_the_seed(seed: int, number: int) -> None:
    config = DatasetConfig(split_seed=seed)
    table = table_of([*pair(f"IXI{number:03d}-HH-0001"), *pair(f"IXI{number:03d}-HH-0002"), *pair("IXI000-A-1")])
    assume(number != 0)
    settled = manifest.settle(manifest.select(table, config), {s: {} for s in table["subject_id"]}, config)
    splits = settled.set_index("subject_id")["split"]
    assert (
        splits[f"IXI{number:03d}-HH-0001"] == splits[f"IXI{number:03d}-HH-0002"] == config.split_of(f"IXI{number:03d}")
    )


def test_split_shares_are_as_configured() -> None:
    found = pd.Series([DatasetConfig(split_seed=7).split_of(f"IXI{n:03d}") for n in range(5000)]).value_counts(
        normalize=True
    )
    np.testing.assert_allclose(found[["train", "val", "test"]], [0.8, 0.1, 0.1], atol=0.02)


def test_a_known_split_never_moves() -> None:
    """Pins the hash: another one would move subjects from test to train in everybody's next refresh."""
    assert [DatasetConfig().split_of(f"IXI{n:03d}") for n in (2, 12, 13, 14, 15, 16)] == PINNED


PINNED = ["train", "train", "test", "test", "train", "val"]


# -- demographics -----------------------------------------------------------------------------------------------------


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


def test_demographics_join_without_duplicating_anybody(tmp_path: Path) -> None:
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
    selected = manifest.select(table, DatasetConfig(), people)
    assert selected["subject_id"].tolist() == ["IXI003-HH-1", "IXI003-HH-2", "IXI009-HH-1"]
    assert selected["sex"].tolist() == ["m", "m", ""]
    assert selected["age"].tolist()[:2] == [41.5, 41.5]
    assert selected["age"].isna().tolist() == [False, False, True]


HEADER = "IXI_ID,SEX_ID,AGE\n"


def test_ids_and_ages_that_are_none_belong_to_nobody(tmp_path: Path) -> None:
    path = tmp_path / "people.csv"
    ids = ("inf", "-inf", "1e22", "1e300", "-3", "0", "100000", "x", "")
    path.write_text(HEADER + "".join(f"{n},1,30\n" for n in ids) + "12,1,inf\n13,2,50.5\n14,2,-inf\n")
    people = read_demographics(path).people
    assert people == {"IXI012": {"sex": "m"}, "IXI013": {"age": 50.5, "sex": "f"}, "IXI014": {"sex": "f"}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("IXI_ID,SEX_ID a,SEX_ID b,AGE\n1,1,2,30\n", "has more than one column SEX_ID; leave one of each"),
        ("IXI_ID,IXI_ID x,SEX_ID,AGE,AGE y\n1,2,1,30,3\n", "has more than one column AGE, IXI_ID; leave one of each"),
        (HEADER + "1,1,2\n1,2,3,4,5,6\n", "cannot be read as IXI.xls .*line 3"),
    ],
)
def test_a_table_of_another_form_is_one_clear_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "people.csv"
    path.write_text(text)
    with pytest.raises(DatasetError, match=said) as caught:
        read_demographics(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"not an xls", b""])
def test_a_broken_demographics_file_is_one_clear_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "IXI.xls"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"IXI\.xls (cannot be read|has no column)"):
        read_demographics(path)


def test_a_csv_without_the_columns_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "people.csv"
    path.write_text("id,years\n1,2\n")
    with pytest.raises(DatasetError, match="has no column AGE, IXI_ID, SEX_ID"):
        read_demographics(path)


IDS = ["IXI012", "ixi12", "IXI-012", "012", "12", "12.0", " 12 ", "IXI012-Guys-0700", "sub-no", "IXI0012"]


@pytest.mark.parametrize("written", [n for n in IDS if n != "sub-no"])
def test_an_id_is_read_however_it_is_written(written: str, tmp_path: Path) -> None:
    path = tmp_path / "people.CSV"
    path.write_text(HEADER + f"{written},2,30.5\n")
    found = read_demographics(path)
    assert (found.people, found.unread) == ({"IXI012": {"age": 30.5, "sex": "f"}}, [])
    (row,) = manifest.records(manifest.select(table_of(pair("IXI012-HH-1")), DatasetConfig(), found.people))
    assert (row["age"], row["sex"]) == (30.5, "f")


@pytest.mark.parametrize("written", ["2.5", "2,5", "-2", "0", "2 3", "2/3", "2-Jan", "two", "100000", "1e1", "n/a"])
def test_what_is_no_id_belongs_to_nobody_and_is_listed(written: str, tmp_path: Path) -> None:
    path = tmp_path / "people.csv"
    path.write_text(HEADER + f'2,1,40\n"{written}",2,30.5\n')
    found = read_demographics(path)
    assert (found.people, found.unread) == ({"IXI002": {"age": 40.0, "sex": "m"}}, [written])


def test_ids_of_another_kind_are_joined_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "people.csv"
    path.write_text(HEADER + "P7,m,30\npat7,F,31\nIXI7_b,f,32\n")
    people = read_demographics(path).people
    rows = [*pair("P07-HH-1"), *pair("PAT007-HH-1"), *pair("IXI7_b-HH-1"), *pair("IXI007-HH-1")]
    selected = manifest.select(table_of(rows), DatasetConfig(), people).set_index("subject_id")
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
def test_tables_of_many_programs_are_read(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "people.txt"
    path.write_bytes(data)
    assert read_demographics(path).people == {"IXI002": {"age": 35.8, "sex": "m"}}


def test_a_spreadsheet_is_read_whatever_its_name_and_its_cells_are(tmp_path: Path) -> None:
    path = write_xls(tmp_path / "a.xls", [[2, "m", 0, 35.8], ["IXI003", 2, 0, "41"], [2.5, 1, 0, 20], ["", "", "", ""]])
    path = path.rename(tmp_path / "PEOPLE.XLS")
    found = read_demographics(path)
    assert found.people == {"IXI002": {"age": 35.8, "sex": "m"}, "IXI003": {"age": 41.0, "sex": "f"}}
    assert found.unread == ["2.5"]


def test_what_matched_and_what_did_not_is_said() -> None:
    found = Demographics({"IXI001": {}, "IXI002": {}, "IXI009": {}}, {"IXI001": 2, "IXI002": 1, "IXI009": 1}, ["2.5"])
    wanted, matched, said = found.match(["IXI1", "IXI002", "IXI003"])
    assert (wanted, matched) == (3, 2)
    assert said == (
        "3 of 5 rows are of 2 of the 3 persons in the archives; not in the archives: 1 ('IXI009'); "
        "ids that were not understood: 1 ('2.5')"
    )


# -- equal scans ------------------------------------------------------------------------------------------------------


def settled_with(scans: dict[str, tuple[str, str]]) -> pd.DataFrame:
    table = table_of([row for subject in scans for row in pair(subject)])
    found = {s: CUT | {"voxels_sha256": dict(zip(("T1", "T2"), of, strict=True))} for s, of in scans.items()}
    return manifest.settle(manifest.select(table, DatasetConfig()), found, DatasetConfig()).set_index("subject_id")


PERSONS = {
    split: [f"IXI{n:03d}-HH-1" for n in range(1, 200) if DatasetConfig().split_of(f"IXI{n:03d}") == split]
    for split in SPLITS
}


@pytest.mark.parametrize("splits", [("train", "test"), ("test", "val"), ("test", "train"), ("val", "train", "test")])
def test_persons_with_an_equal_scan_are_in_the_first_of_their_splits(splits: tuple[str, ...]) -> None:
    """Through a chain, too: each has its T1 from the one before and its T2 for the next."""
    chain = [PERSONS[split][n] for n, split in enumerate(splits)]
    scans = {subject: (f"scan {n}", f"scan {n + 1}") for n, subject in enumerate(chain)}
    alone = {PERSONS[split][-1]: (f"{split} T1", f"{split} T2") for split in SPLITS}
    settled = settled_with(scans | alone)
    assert set(settled.loc[chain, "split"]) == {min(splits, key=SPLITS.index)}
    assert set(settled.loc[chain, "flags"]) == {"duplicate_scan"}
    assert settled.loc[list(alone), "split"].tolist() == [*SPLITS]
    assert set(settled.loc[list(alone), "flags"]) == {""}


def test_a_t2_that_is_the_t1_is_flagged() -> None:
    assert settled_with({"IXI001-HH-1": ("same", "same")})["flags"].tolist() == ["duplicate_scan"]


def test_scans_that_are_out_move_nobody() -> None:
    train, test = PERSONS["train"][0], PERSONS["test"][0]
    table = table_of([*pair(train), *pair(test)])
    found: dict[str, Any] = {s: CUT | {"voxels_sha256": {"T1": "same", "T2": s}} for s in (train, test)}
    found[train] |= {"reason": "empty_image", "detail": "T1"}
    settled = manifest.settle(manifest.select(table, DatasetConfig()), found, DatasetConfig()).set_index("subject_id")
    assert settled["split"].to_dict() == {train: "", test: "test"}
    assert set(settled["flags"]) == {""}
