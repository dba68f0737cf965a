"""Every subject with a T1 or a T2 has a row in the manifest, and every excluded subject has a reason."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from profiles import examples
from survey_tables import CUT, pair, table_of, volume

from ixi_etl.config import SPLITS, DatasetConfig
from ixi_etl.core.files import write_atomic
from ixi_etl.dataset import manifest, metadata, selection
from ixi_etl.dataset.manifest import REASONS
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.dataset.schema import IXI
from ixi_etl.dataset.splits import split_of
from ixi_etl.errors import DatasetError
from ixi_etl.scans.survey import modal_depths
from ixi_etl.testing.phantom import grid_affine

HEADER_REASONS = ["", "", "", "unreadable", "not_3d", "unsupported_dtype", "bad_affine"]


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
def test_selection_keeps_all_subjects_and_gives_the_first_reason(
    table: pd.DataFrame, pairing: str, random: Any
) -> None:
    config = DatasetConfig(pairing=pairing)
    shuffled = table.iloc[random.sample(range(len(table)), len(table))].reset_index(drop=True)
    selected = selection.screen_headers(shuffled, config)
    assert selected["subject_id"].tolist() == sorted(table["subject_id"].unique())
    modal, order = modal_depths(table), list(REASONS)
    for row in selected.itertuples():
        members = table[table["subject_id"] == row.subject_id]
        expected = [f"missing_{m.lower()}" for m in ("T1", "T2") if m not in set(members["modality"])]
        expected += ["duplicate_member"] * bool(members.duplicated("modality").any())
        # of several members with one name, only the first is checked further
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
def test_final_manifests_are_valid_and_survive_the_csv(table: pd.DataFrame, data: st.DataObject) -> None:
    config = DatasetConfig(pairing="index")
    selected = selection.screen_headers(table, config)
    found: dict[str, Any] = {}
    for subject in selected.loc[selected["status"] == "candidate", "subject_id"]:
        if data.draw(st.booleans()):
            low = data.draw(st.floats(-1e4, 1e4))
            found[subject] = CUT | {"t1_p_low": low, "t1_p_high": low + abs(low) + 1, "affines": [], "flags": 'a, "b"'}
        else:
            found[subject] = {"reason": "corrupt_voxels", "detail": "T1: cut short,\nor so"}
    final = manifest.finalise(selected, {s: found.get(s, {"t1_sha256": "0"}) for s in selected["subject_id"]}, config)
    used = manifest.used_rows(final)
    assert used["store_row"].tolist() == list(range(len(used)))
    assert used["subject_id"].is_monotonic_increasing
    assert set(used["subject_id"]) == {s for s, r in found.items() if "reason" not in r}
    assert list(final.columns) == IXI.columns
    again = IXI.from_csv(IXI.to_csv(final), "m.csv")
    pd.testing.assert_frame_equal(again, final)
    funnel = manifest.funnel(final, IXI)["all"]
    assert funnel.is_monotonic_decreasing
    assert (funnel.iloc[0], funnel.iloc[-1]) == (len(final), len(used))
    assert manifest.exclusions(final)["all"].sum() == len(final) - len(used)


@pytest.mark.parametrize("folder", ["a\rb/", "a\r\nb/", 'a"b,c/', "=1+1/"])
def test_special_characters_in_a_folder_name_survive_the_csv(
    folder: str, published: PublishedVersion, tmp_path: Path
) -> None:
    final = metadata.read_manifest(published.folder)
    final["t1_member"] = folder + final["t1_member"]
    write_atomic(tmp_path / metadata.MANIFEST, IXI.to_csv(final))
    write_atomic(tmp_path / metadata.METADATA, (published.folder / metadata.METADATA).read_bytes())
    pd.testing.assert_frame_equal(metadata.read_manifest(tmp_path), final)


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


def test_no_cell_of_the_csv_is_a_formula_and_names_survive(published: PublishedVersion) -> None:
    table = metadata.read_manifest(published.folder)
    assert len(table) >= len(NAMES)
    names = pd.Series(NAMES)[np.arange(len(table)) % len(NAMES)].to_numpy()
    table = table.assign(t1_member=names, detail=np.roll(names, 1))
    table = table.assign(status="excluded", reason="unreadable", split="", store_row=pd.NA)
    table = IXI.typed(table)
    text = IXI.to_csv(table)
    cells = pd.read_csv(io.StringIO(text), dtype="str", keep_default_na=False, lineterminator="\n")
    for column in (name for name, dtype in IXI.dtypes.items() if dtype == "str"):
        assert not cells[column].str.match("[=+@\t\r＝-]").any()
    pd.testing.assert_frame_equal(IXI.from_csv(text, "m.csv"), table)


def test_columns_are_in_the_documented_order() -> None:
    volume_columns = "{m}_member {m}_sha256 {m}_depth {m}_shape {m}_spacing_mm {m}_orientation"
    volume_columns += " {m}_window_start {m}_window_stop {m}_p_low {m}_p_high "
    expected = "subject_id site status reason detail split store_row age sex "
    expected += volume_columns.format(m="t1") + volume_columns.format(m="t2")
    expected += "t2_to_t1_ras_mm motion_mm motion_deg registration_error_mm nmi_before nmi_after flags "
    expected += "t1_gzip_crc32 t2_gzip_crc32 t1_scale t1_offset t2_scale t2_offset"
    assert " ".join(IXI.columns) == expected


@pytest.fixture(scope="module")
def two_used() -> pd.DataFrame:
    """A valid manifest, which tests change."""
    table = table_of([*pair("IXI001-HH-1"), *pair("IXI002-HH-1")])
    found = {"IXI001-HH-1": CUT, "IXI002-HH-1": CUT}
    final = manifest.finalise(selection.screen_headers(table, DatasetConfig()), found, DatasetConfig())
    assert IXI.from_csv(final.to_csv(index=False), "m.csv").equals(final)
    return final


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.assign(status="maybe"), "status"),
        (lambda t: t.assign(reason="because"), "reason"),
        (lambda t: t.assign(store_row=pd.array([1, 0], "Int64")), "dense"),
        (lambda t: t.assign(split=""), "split"),
        (lambda t: t.assign(reason="not_3d"), "reason"),
        (lambda t: t.iloc[::-1], "dense"),
        (lambda t: t.drop(columns="flags"), "flags"),
        (lambda t: t.assign(extra=1), "extra"),
        (lambda t: pd.concat([t, t.iloc[:1]]), "duplicate"),
        (lambda t: t.assign(t1_depth="many"), "many"),
        (lambda t: t.assign(detail="text in a used row"), "detail"),
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
        (lambda t: t.assign(subject_id=["../../a", "IXI002-HH-1"]), "safe_file_name"),
        (lambda t: t.assign(subject_id=["/etc/a", "IXI002-HH-1"]), "safe_file_name"),
    ],
)
def test_an_edited_manifest_is_rejected(change: Any, message: str, two_used: pd.DataFrame) -> None:
    text = change(two_used).to_csv(index=False)
    with pytest.raises(DatasetError, match=rf"m\.csv is not a manifest.*{message}"):
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
    ids=["duplicate", "missing", "another order", "another type", "missing text"],
)
def test_a_table_with_wrong_columns_is_not_written(change: Any, two_used: pd.DataFrame) -> None:
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
        # a coronal stack of the modal depth has other axial slices
        (
            {
                "orientation": "RSA",
                "affine": grid_affine((256, 256, 130), (0.9375, 0.9375, 1.25), "RSA"),
            },
            "grid_not_modal",
        ),
    ],
)
def test_anatomical_pairs_need_a_t2_on_the_modal_grid(t2: dict[str, Any], reason: str) -> None:
    rows = [row for n in range(3) for row in pair(f"IXI{n:03d}-HH-1")] + pair("IXI900-HH-1", **t2)
    selected = selection.screen_headers(table_of(rows), DatasetConfig()).set_index("subject_id")
    assert selected.loc["IXI900-HH-1", "reason"] == reason


def test_a_window_that_does_not_fit_excludes_the_subject() -> None:
    selected = selection.screen_headers(table_of(pair("IXI001-HH-1")), DatasetConfig(window=(120, 140)))
    assert selected["detail"].tolist() == ["T2: 130 slices; the window [120, 140) does not fit"]


def test_index_pairs_need_slices_of_one_shape() -> None:
    rows = [volume("IXI001-HH-1", "T1", 150, plane=320), volume("IXI001-HH-1", "T2")]
    (reason,) = selection.screen_headers(table_of(rows), DatasetConfig(pairing="index"))["reason"]
    assert reason == "grid_not_modal"
    assert selection.screen_headers(table_of(rows), DatasetConfig())["reason"].tolist() == [""]


@settings(max_examples=examples(8))
@given(st.integers(0, 10**6), st.integers(0, 999))
def test_the_split_depends_on_the_person_and_the_seed(seed: int, number: int) -> None:
    config = DatasetConfig(split_seed=seed)
    table = table_of([*pair(f"IXI{number:03d}-HH-0001"), *pair(f"IXI{number:03d}-HH-0002"), *pair("IXI000-A-1")])
    assume(number != 0)
    final = manifest.finalise(selection.screen_headers(table, config), {s: {} for s in table["subject_id"]}, config)
    splits = final.set_index("subject_id")["split"]
    assert (
        splits[f"IXI{number:03d}-HH-0001"] == splits[f"IXI{number:03d}-HH-0002"] == split_of(f"IXI{number:03d}", config)
    )


def test_split_shares_are_as_configured() -> None:
    found = pd.Series([split_of(f"IXI{n:03d}", DatasetConfig(split_seed=7)) for n in range(5000)]).value_counts(
        normalize=True
    )
    np.testing.assert_allclose(found[["train", "val", "test"]], [0.8, 0.1, 0.1], atol=0.02)


def test_the_split_of_known_persons_never_changes() -> None:
    """Pins the hash, because another one would move subjects from test to train in the next refresh."""
    assert [split_of(f"IXI{n:03d}", DatasetConfig()) for n in (2, 12, 13, 14, 15, 16)] == PINNED


PINNED = ["train", "train", "test", "test", "train", "val"]


# -- duplicate scans --------------------------------------------------------------------------------------------------


def finalized_with(scans: dict[str, tuple[str, str]]) -> pd.DataFrame:
    table = table_of([row for subject in scans for row in pair(subject)])
    found = {s: CUT | {"voxels_sha256": dict(zip(("T1", "T2"), hashes, strict=True))} for s, hashes in scans.items()}
    return manifest.finalise(selection.screen_headers(table, DatasetConfig()), found, DatasetConfig()).set_index(
        "subject_id"
    )


PERSONS = {
    split: [f"IXI{n:03d}-HH-1" for n in range(1, 200) if split_of(f"IXI{n:03d}", DatasetConfig()) == split]
    for split in SPLITS
}


@pytest.mark.parametrize("splits", [("train", "test"), ("test", "val"), ("test", "train"), ("val", "train", "test")])
def test_persons_who_share_a_scan_get_the_first_of_their_splits(splits: tuple[str, ...]) -> None:
    """Including a chain in which each person shares a scan with the next."""
    chain = [PERSONS[split][n] for n, split in enumerate(splits)]
    scans = {subject: (f"scan {n}", f"scan {n + 1}") for n, subject in enumerate(chain)}
    unrelated = {PERSONS[split][-1]: (f"{split} T1", f"{split} T2") for split in SPLITS}
    final = finalized_with(scans | unrelated)
    assert set(final.loc[chain, "split"]) == {min(splits, key=SPLITS.index)}
    assert set(final.loc[chain, "flags"]) == {"duplicate_scan"}
    assert final.loc[list(unrelated), "split"].tolist() == [*SPLITS]
    assert set(final.loc[list(unrelated), "flags"]) == {""}


def test_a_t2_that_equals_the_t1_is_flagged() -> None:
    assert finalized_with({"IXI001-HH-1": ("same", "same")})["flags"].tolist() == ["duplicate_scan"]


def test_excluded_scans_do_not_change_splits() -> None:
    train, test = PERSONS["train"][0], PERSONS["test"][0]
    table = table_of([*pair(train), *pair(test)])
    found: dict[str, Any] = {s: CUT | {"voxels_sha256": {"T1": "same", "T2": s}} for s in (train, test)}
    found[train] |= {"reason": "empty_image", "detail": "T1"}
    final = manifest.finalise(selection.screen_headers(table, DatasetConfig()), found, DatasetConfig()).set_index(
        "subject_id"
    )
    assert final["split"].to_dict() == {train: "", test: "test"}
    assert set(final["flags"]) == {""}
