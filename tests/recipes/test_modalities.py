"""Versions of other modalities than T1 and T2: which scans they have, where their voxels are, and what is recorded."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import SHRINK, SLICES, config_for
from numpy.typing import NDArray

from flows.cli import main
from ixi_etl.config import DatasetConfig, RefreshConfig
from ixi_etl.dataset import metadata
from ixi_etl.dataset.manifest import to_records, used_rows
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.dataset.store import open_arrays
from ixi_etl.dataset.verify import verify
from ixi_etl.errors import DatasetError
from ixi_etl.modalities import MODALITIES
from ixi_etl.pairing.register import mean_distance
from ixi_etl.recipes.ixi import _check_enough_subjects, refresh
from ixi_etl.report.dataset_report import list_pairs, worst_pairs
from ixi_etl.scans.tar import index_archive, read_member
from ixi_etl.testing.phantom import pack_nifti, write_phantom, write_tar

THREE = {"modalities": "T1,T2,PD"}


@pytest.fixture(scope="module")
def four_archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    write_phantom(folder, subjects=3, seed=5, shrink=SHRINK, modalities=MODALITIES)
    return folder


@pytest.fixture(scope="module")
def kept(four_archives: Path, tmp_path_factory: pytest.TempPathFactory) -> PublishedVersion:
    """All four modalities; subjects without one of them are kept."""
    config = config_for(
        tmp_path_factory.mktemp("kept"), four_archives, modalities=MODALITIES, incomplete="keep", depth="any"
    )
    return refresh(config)


def manifest_of(published: PublishedVersion) -> pd.DataFrame:
    return metadata.read_manifest(published.folder)


def members_of(archives: Path, modality: str) -> dict[str, bytes]:
    path = str(archives / f"IXI-{modality}.tar")
    return {m.name: read_member(path, m.offset, m.size) for m in index_archive(path)}


def axial_slices(packed: bytes, start: int, stop: int) -> NDArray[Any]:
    """The slices [z, y, x] of a volume as nibabel reads it, in scanner units."""
    canonical = nib.as_closest_canonical(nib.Nifti1Image.from_bytes(gzip.decompress(packed)))
    return canonical.get_fdata().transpose(2, 1, 0)[start:stop]


def test_pd_is_on_the_grid_of_the_t2_voxel_for_voxel(kept: PublishedVersion, four_archives: Path) -> None:
    arrays, members = open_arrays(kept.folder), members_of(four_archives, "PD")
    rows = [row for row in to_records(used_rows(manifest_of(kept))) if row["pd_member"]]
    assert rows
    for row in rows:
        stored = np.asarray(arrays["pd"][row["store_row"]]) * row["pd_scale"] + row["pd_offset"]
        expected = axial_slices(members[row["pd_member"]], row["t2_window_start"], row["t2_window_stop"])
        np.testing.assert_allclose(stored, expected, atol=max(0.5, row["pd_scale"] / 2))
        assert json.loads(row["t2_to_pd_ras_mm"]) == np.eye(4).tolist()
        assert row["flags"] == "" or "pd" not in row["flags"]


def test_arrays_columns_and_name_follow_the_modalities(kept: PublishedVersion) -> None:
    described = metadata.read_metadata(kept.folder)
    assert (described["name"], described["source"], described["target"]) == ("ixi-t1-pd-mra-t2", "t1", "t2")
    arrays = open_arrays(kept.folder)
    assert {name for name, array in arrays.items() if array.ndim == 4} == {"t1", "t2", "pd", "mra"}
    assert len({arrays[name].shape for name in ("t1", "t2", "pd", "mra")}) == 1
    columns = set(manifest_of(kept).columns)
    for name in ("t1", "pd", "mra"):
        assert {f"t2_to_{name}_ras_mm", f"{name}_nmi_after", f"{name}_registration_error_mm"} <= columns
    assert not {"motion_mm", "nmi_after"} & columns


def test_a_kept_subject_without_a_scan_has_fill_values_and_a_flag(kept: PublishedVersion) -> None:
    arrays, rows = open_arrays(kept.folder), used_rows(manifest_of(kept))
    lacking = {name: rows[rows[f"{name}_member"] == ""] for name in ("pd", "mra")}
    assert all(len(table) == 1 for table in lacking.values())
    for name, table in lacking.items():
        (row,) = to_records(table)
        assert f"missing_{name}" in row["flags"].split(",")
        assert pd.isna(row[f"{name}_p_low"])
        assert pd.isna(row[f"{name}_nmi_after"])
        assert row[f"t2_to_{name}_ras_mm"] == ""
        assert not np.asarray(arrays[name][row["store_row"]]).any()
        assert np.isnan(arrays[f"{name}_scale"][row["store_row"]])
        assert np.isnan(np.asarray(arrays[f"{name}_affine"][row["store_row"]])).all()
    assert verify(kept.folder, deep=True) == []


def test_each_missing_modality_excludes_with_its_reason(four_archives: Path, tmp_path: Path) -> None:
    table = manifest_of(refresh(config_for(tmp_path, four_archives, modalities=MODALITIES, depth="any")))
    missing = table[table["reason"].str.startswith("missing_")]
    assert set(missing["reason"]) == {f"missing_{m.lower()}" for m in MODALITIES}
    for row in to_records(missing):
        modality = row["reason"].removeprefix("missing_").upper()
        assert row["detail"].startswith(f"{modality}: ")
        assert row[f"{modality.lower()}_member"] == ""
    assert "outside_fov" in set(table["reason"])  # an MRA that covers another part of the head


def test_without_the_reference_a_subject_is_excluded_even_if_incomplete_ones_are_kept(kept: PublishedVersion) -> None:
    table = manifest_of(kept)
    without = table[table["t2_member"] == ""]
    assert set(without["reason"]) == {"missing_t2"}


@pytest.mark.parametrize("margin", [0, 2])
def test_a_margin_adds_slices_on_both_sides(margin: int, four_archives: Path, tmp_path: Path) -> None:
    config = DatasetConfig(slices=6, margin=margin, registration="none", pictures=False, depth="any")
    done = refresh(RefreshConfig(root=str(tmp_path), source=str(four_archives), dataset=config))
    row = to_records(used_rows(manifest_of(done)))[0]
    arrays = open_arrays(done.folder)
    start, stop = row["t2_window_start"], row["t2_window_stop"]
    middle = json.loads(row["t2_shape"])[2] // 2
    assert (stop - start, (start + stop) // 2) == (6 + 2 * margin, middle)
    stored = np.asarray(arrays["t2"][row["store_row"]]) * row["t2_scale"] + row["t2_offset"]
    expected = axial_slices(members_of(four_archives, "T2")[row["t2_member"]], start, stop)
    np.testing.assert_allclose(stored, expected, atol=0.51)
    described = metadata.read_metadata(done.folder)
    assert described["inputs"]["config"].get("margin", 0) == margin


def test_the_reference_may_be_the_t1(four_archives: Path, tmp_path: Path) -> None:
    config = config_for(tmp_path, four_archives, reference="T1", slices=8, depth="any")
    done = refresh(config)
    described = metadata.read_metadata(done.folder)
    assert (described["name"], described["source"], described["target"]) == ("ixi-t2-t1", "t2", "t1")
    row = to_records(used_rows(manifest_of(done)))[0]
    stored = np.asarray(open_arrays(done.folder)["t1"][row["store_row"]]) * row["t1_scale"] + row["t1_offset"]
    expected = axial_slices(
        members_of(four_archives, "T1")[row["t1_member"]], row["t1_window_start"], row["t1_window_stop"]
    )
    np.testing.assert_allclose(stored, expected, atol=max(0.5, row["t1_scale"] / 2))
    assert np.shape(json.loads(row["t1_to_t2_ras_mm"])) == (4, 4)


def echo_archives(folder: Path, four_archives: Path, shift_mm: float) -> Path:
    """The T2s and PDs, the header of each PD moved along x."""
    folder.mkdir()
    write_tar(folder / "IXI-T2.tar", members_of(four_archives, "T2"))
    moved = {}
    for name, packed in members_of(four_archives, "PD").items():
        try:
            image = nib.Nifti1Image.from_bytes(gzip.decompress(packed))
            affine = np.array(image.affine)
            affine[0, 3] += shift_mm
            moved[name] = pack_nifti(np.asarray(image.dataobj.get_unscaled()).T, affine)
        except (EOFError, ValueError):  # the damaged member
            moved[name] = packed
    write_tar(folder / "IXI-PD.tar", moved)
    return folder


@pytest.mark.parametrize(("shift_mm", "differs"), [(0.3, False), (8.0, True)])
def test_the_headers_of_two_echoes_are_checked(
    shift_mm: float, differs: bool, four_archives: Path, tmp_path: Path
) -> None:
    """A rounding error of the header moves no voxel; a real difference is flagged, and the PD is resampled."""
    source = echo_archives(tmp_path / "echoes", four_archives, shift_mm)
    done = refresh(config_for(tmp_path / "root", source, modalities="T2,PD", depth="any", slices=8))
    rows = to_records(used_rows(manifest_of(done)))
    assert {"grid_differs" in row["flags"] for row in rows} == {differs}
    members, arrays = members_of(source, "PD"), open_arrays(done.folder)
    for row in rows:
        stored = np.asarray(arrays["pd"][row["store_row"]]) * row["pd_scale"] + row["pd_offset"]
        as_stored = axial_slices(members[row["pd_member"]], row["t2_window_start"], row["t2_window_stop"])
        assert (np.abs(stored - as_stored).max() <= 0.51) == (not differs)


def test_another_order_of_storage_is_the_same_grid(four_archives: Path, tmp_path: Path) -> None:
    """The PDs are stored from right to left, with affines that say so: their voxels are where they were."""
    source = tmp_path / "turned"
    source.mkdir()
    write_tar(source / "IXI-T2.tar", members_of(four_archives, "T2"))
    turned = {}
    for name, packed in list(members_of(four_archives, "PD").items())[:3]:
        image = nib.Nifti1Image.from_bytes(gzip.decompress(packed))
        affine = image.affine @ np.array([[-1.0, 0, 0, image.shape[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
        turned[name] = pack_nifti(np.asarray(image.dataobj.get_unscaled())[::-1].T, affine)
    write_tar(source / "IXI-PD.tar", turned)
    done = refresh(config_for(tmp_path / "root", source, modalities="T2,PD", depth="any", slices=8))
    rows, arrays = to_records(used_rows(manifest_of(done))), open_arrays(done.folder)
    assert len(rows) == len(turned)
    for row in rows:
        assert row["flags"] == ""
        expected = axial_slices(turned[row["pd_member"]], row["t2_window_start"], row["t2_window_stop"])
        np.testing.assert_array_equal(np.asarray(arrays["pd"][row["store_row"]]), expected)


def test_the_report_shows_each_pair_and_the_uncertain_ones_first(kept: PublishedVersion) -> None:
    table = manifest_of(kept)
    pairs = list_pairs(table, "ixi-t1-pd-mra-t2")
    used = used_rows(table)
    present = {m: int((used[f"{m.lower()}_member"] != "").sum()) for m in ("T1", "PD", "MRA")}
    assert pairs["modality"].value_counts().to_dict() == present
    page = (kept.folder / metadata.REPORT).read_text()
    assert f"of {len(pairs)} pairs, sampled from all sites" in page
    assert "MRA: NMI by headers" in page
    registered = pairs.assign(motion_mm=1.0, registration_error_mm=np.linspace(0.1, 0.9, len(pairs)))
    echoes = pairs["modality"] == "PD"
    registered.loc[echoes, ["motion_mm", "registration_error_mm"]] = np.nan
    registered.loc[registered.index[-1:], "registration_error_mm"] = np.nan  # failed
    worst = worst_pairs(registered.reset_index(drop=True))
    assert pd.isna(worst["registration_error_mm"].iloc[0])
    assert worst["motion_mm"].iloc[0] == 1
    assert worst["registration_error_mm"].iloc[1:].dropna().is_monotonic_decreasing
    assert worst["motion_mm"].isna().to_list() == sorted(worst["motion_mm"].isna())  # echoes are last


def test_a_modality_without_a_usable_scan_is_a_one_line_error(four_archives: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for modality in ("T1", "T2"):
        write_tar(source / f"IXI-{modality}.tar", members_of(four_archives, modality))
    write_tar(source / "IXI-PD.tar", {"IXI999-Guys-0001-PD.nii.gz": b"no volume"})
    config = config_for(tmp_path / "root", source, **THREE, incomplete="keep")
    with pytest.raises(DatasetError, match="no subject that can be used has a PD; leave PD out of --modalities"):
        refresh(config)


def test_subjects_without_a_modality_do_not_count_as_paired() -> None:
    rows = [{"status": "excluded", "reason": "missing_pd", "subject_id": f"a{n}"} for n in range(100)]
    rows += [{"status": "excluded", "reason": "corrupt_voxels", "subject_id": f"b{n}"} for n in range(12)]
    rows += [{"status": "used", "reason": "", "subject_id": f"c{n}"} for n in range(20)]
    dataset = DatasetConfig(modalities="T1,T2,PD")
    with pytest.raises(DatasetError, match="12 of 32 paired subjects are unreadable"):
        _check_enough_subjects(pd.DataFrame(rows), RefreshConfig(dataset=dataset, max_unreadable=0.1), Path("x"), [])


def test_index_pairing_takes_slices_of_all_modalities_as_stored(four_archives: Path, tmp_path: Path) -> None:
    done = refresh(config_for(tmp_path, four_archives, **THREE, pairing="index", depth="any"))
    row = to_records(used_rows(manifest_of(done)))[0]
    arrays = open_arrays(done.folder)
    for name in ("t1", "t2", "pd"):
        packed = members_of(four_archives, name.upper())[row[f"{name}_member"]]
        volume = np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(packed)).get_fdata()).transpose(2, 1, 0)
        start, stop = row[f"{name}_window_start"], row[f"{name}_window_stop"]
        stored = np.asarray(arrays[name][row["store_row"]]) * row[f"{name}_scale"] + row[f"{name}_offset"]
        np.testing.assert_allclose(stored, volume[start:stop], atol=max(0.5, row[f"{name}_scale"] / 2))
    assert row["t1_nmi_before"] == row["t1_nmi_after"]
    assert row["pd_nmi_after"] > 0


@pytest.mark.faults
def test_each_modality_is_registered_to_the_reference(tmp_path: Path) -> None:
    """Larger volumes than elsewhere: at a quarter of the resolution a registration is not accurate."""
    write_phantom(tmp_path / "archives", subjects=3, seed=1, shrink=2, modalities=MODALITIES, oddities=False)
    config = config_for(
        tmp_path / "root", tmp_path / "archives", modalities=MODALITIES, registration="rigid", slices=SLICES
    )
    rows = to_records(used_rows(manifest_of(refresh(config))))
    truth = json.loads((tmp_path / "archives" / "truth.json").read_text())
    points = np.random.default_rng(0).uniform((-60, -80, 0), (60, 70, 25), (500, 3))
    assert len(rows) == 3
    for row in rows:
        true = truth[row["subject_id"]]["motions_mm_ras"]
        for name, limit_mm in (("t1", 0.5), ("mra", 1.0)):
            found = np.array(json.loads(row[f"t2_to_{name}_ras_mm"]))
            assert mean_distance(found, np.array(true[name.upper()]), points) < limit_mm
        assert row["mra_nmi_after"] > row["mra_nmi_before"]
        assert json.loads(row["t2_to_pd_ras_mm"]) == np.eye(4).tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modalities": "T1"}, "T1 alone makes no pairs"),
        ({"modalities": "T1,T1"}, "T1, T1: give different ones"),
        ({"modalities": ""}, "nothing: give different ones"),
        ({"modalities": "T1,DTI"}, "there is no modality DTI; the modalities are T1, T2, PD, MRA"),
        ({"modalities": "T1,PD"}, "reference T2 is not one of the modalities T1, PD"),
        ({"margin": -1}, "greater than or equal to 0"),
    ],
)
def test_impossible_modalities_are_one_line_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DatasetConfig.model_validate(options)


def test_options_that_are_not_used_leave_the_name_of_a_version_as_it_was() -> None:
    usual = DatasetConfig().model_dump(mode="json")
    assert list(usual) == [
        *("pairing", "window", "slices", "depth", "registration", "min_nmi", "low_similarity"),
        *("max_registration_error", "uncertain", "pictures", "split_seed", "split"),
    ]
    assert DatasetConfig(modalities=("T2", "T1")).model_dump(mode="json") == usual
    assert (
        DatasetConfig.model_validate({"modalities": ["t2", "t1"], "reference": "t2"}).model_dump(mode="json") == usual
    )
    others = DatasetConfig(modalities="pd t2,", margin=1).model_dump(mode="json")
    assert set(others) - set(usual) == {"modalities", "margin"}
    assert DatasetConfig.model_validate(others) == DatasetConfig(modalities=("T2", "PD"), margin=1)


def test_the_command_takes_modalities_and_names_the_dataset(
    four_archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--modalities", "pd,t2", "--margin", "1", "--slices", "4", "--depth", "any", "--no-pictures", "--json"]

    def run(*arguments: str) -> int | str | None:
        with pytest.raises(SystemExit) as end:
            main([*arguments, "--root", str(tmp_path)])
        return end.value.code

    assert run("refresh", "--source", str(four_archives), *options) == 0
    done = json.loads(capsys.readouterr().out)
    folder = Path(done["manifest"]).parent
    assert folder.parent.name == "ixi-pd-t2"
    assert open_arrays(folder)["pd"].shape[1] == 6
    assert run("versions", "--json") == 0
    assert f"ixi-pd-t2@{done['version']}" in capsys.readouterr().out
    assert run("refresh", "--modalities", "t1,pd") == 2
    assert "reference T2 is not one of the modalities T1, PD" in capsys.readouterr().err
