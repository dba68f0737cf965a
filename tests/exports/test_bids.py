"""A version as a derivative of BIDS: slabs, names, tables and sidecars; the validator finds no error."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from bids_validation import validate
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples
from selections import affine, numbers, selection_of

from ixi_etl.core.files import to_json
from ixi_etl.core.progress import no_progress
from ixi_etl.dataset.manifest import to_records, used_rows
from ixi_etl.dataset.metadata import read_manifest
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.dataset.splits import person_of
from ixi_etl.dataset.store import open_arrays
from ixi_etl.errors import ConfigError
from ixi_etl.exports.bids import Bids
from ixi_etl.exports.bids_dataset import name_scans
from ixi_etl.exports.export import export_dataset
from ixi_etl.exports.selection import Selection

SCANS = ("IXI002-Guys-0828", "IXI002-HH-0900", "IXI012-HH-1211", "IXI035-IOP-0873")
"""Subjects of the selections below; the first two are one person."""


def bids_selection(*, names: Sequence[str] = ("t1", "pd", "t2"), **columns: Any) -> Selection:
    """A T1, PD and T2 of `SCANS` from IXI's archives; the last has no PD."""
    arrays = {name: numbers(4, 6, 5, 4, seed) for seed, name in enumerate(names)}
    common: dict[str, Any] = {
        "subject_id": SCANS,
        "site": [scan.split("-")[1] for scan in SCANS],
        "age": pd.array([95.5, 95.5, None, 33.4], "Float64"),
        "sex": ["m", "m", "", "f"],
        "flags": "",
    }
    for name in arrays:
        cut = 40 if name == "t2" else None  # of an echo too, whose slices are those of the reference
        common |= {f"{name}_gzip_crc32": "crc32:0", f"{name}_sha256": "", f"{name}_scale": 0.5, f"{name}_offset": -3.0}
        common |= {f"{name}_window_start": pd.array([cut] * 4, "Int64"), f"{name}_window_stop": cut and 46}
    if "pd" in names:
        common |= {"pd_member": ["a", "a", "a", ""], "pd_p_low": [-10, -10, -10, np.nan]}
    sources = {m: {"file": f"IXI-{m}.tar", "source": "ixi", "md5": "0" * 32} for m in map(str.upper, names)}
    return selection_of(
        arrays,
        ("train", "train", "val", "test"),
        name=f"ixi-{'-'.join(names)}",
        columns=common | columns,
        metadata={"sources": sources},
        every_array=True,
        registration="rigid",
        margin=1,
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bids")
    layout = Bids(bids_selection())
    layout.check()
    layout.write(folder, no_progress)
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= layout.size_bytes
    return folder


@pytest.fixture(scope="module")
def exported(every_split: PublishedVersion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A version as BIDS, with its whole scans at the place that the sidecars name."""
    folder = tmp_path_factory.mktemp("exported") / "bids"
    export_dataset(every_split.folder, "bids", folder)
    export_dataset(every_split.folder, "bids-raw", folder / "sourcedata/raw")
    return folder


def sidecar(image: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(str(image).replace(".nii.gz", ".json")).read_text())
    return content


def read_table(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)


def test_images_are_the_slabs_of_the_store_bit_for_bit(exported: Path, every_split: PublishedVersion) -> None:
    arrays, used = open_arrays(every_split.folder), used_rows(read_manifest(every_split.folder))
    assert len(used) == len(list(exported.glob("sub-*/anat/*_T2w.nii.gz"))) > 0
    for row in to_records(used):
        person = person_of(row["subject_id"])
        for name, ending in (("t1", "space-T2w_desc-slab_T1w"), ("t2", "desc-slab_T2w")):
            image = nib.load(exported / f"sub-{person}/anat/sub-{person}_{ending}.nii.gz")
            stored = np.asarray(arrays[name][row["store_row"]])
            assert np.array_equal(image.dataobj.get_unscaled(), stored.transpose(2, 1, 0))
            expected = stored * row[f"{name}_scale"] + row[f"{name}_offset"]
            np.testing.assert_allclose(image.get_fdata(), expected.transpose(2, 1, 0), rtol=1e-6)
            np.testing.assert_allclose(image.affine, arrays["t2_affine"][row["store_row"]], atol=1e-4)
            assert nib.aff2axcodes(image.affine) == ("R", "A", "S")


def test_a_voxel_of_the_reference_is_at_its_place_in_the_whole_scan(exported: Path) -> None:
    """Both are read as any tool reads them: by the affines of their own headers."""
    for image in map(nib.load, sorted(exported.glob("sub-*/anat/*_desc-slab_T2w.nii.gz"))):
        person = Path(image.get_filename()).name.partition("_")[0]
        whole = nib.load(exported / f"sourcedata/raw/{person}/anat/{person}_T2w.nii.gz")
        slab = image.get_fdata()
        voxels = np.stack(np.indices(slab.shape), axis=-1)
        places = nib.affines.apply_affine(np.linalg.inv(whole.affine) @ image.affine, voxels)
        assert np.abs(places - np.rint(places)).max() < 1e-2
        np.testing.assert_allclose(whole.get_fdata()[tuple(np.rint(places).astype(int).T)].T, slab, atol=0.5)
        assert slab.max() - slab.min() > 100


def test_sidecars_name_files_that_exist(exported: Path) -> None:
    images = sorted(exported.glob("sub-*/anat/*.nii.gz"))
    description = json.loads((exported / "dataset_description.json").read_text())
    links = {"": "", **description["DatasetLinks"]}
    assert description["DatasetType"] == "derivative"
    assert [tool["Name"] for tool in description["GeneratedBy"]] == ["ixi-etl"]
    for image in images:
        content = sidecar(image)
        assert content["SkullStripped"] is False
        for uri in [*content["Sources"], content["SpatialReference"]]:
            _, link, path = uri.split(":")
            assert (exported / links[link] / path).is_file()
        assert len(content["Sources"]) == (2 if "space-T2w" in image.name else 1)


def test_the_validator_finds_no_error(exported: Path, tmp_path: Path) -> None:
    assert validate(exported, tmp_path) == {
        ("SIDECAR_KEY_RECOMMENDED", "Description"): 2,  # of the tables
        ("TOO_FEW_AUTHORS", ""): 1,
    }


@pytest.mark.stack
def test_the_validator_finds_no_error_with_sessions_and_more_modalities(written: Path, tmp_path: Path) -> None:
    assert set(validate(written, tmp_path)) == {("SIDECAR_KEY_RECOMMENDED", "Description"), ("TOO_FEW_AUTHORS", "")}


def test_each_person_is_one_participant_and_each_of_its_scans_a_session(written: Path) -> None:
    table = read_table(written / "participants.tsv")
    assert table.to_dict("list") == {
        "participant_id": ["sub-IXI002", "sub-IXI012", "sub-IXI035"],
        "age": ["89", "n/a", "33.4"],
        "sex": ["M", "n/a", "F"],
        "site": ["n/a", "HH", "IOP"],
        "split": ["train", "val", "test"],
        "scan_id": ["n/a", "IXI012-HH-1211", "IXI035-IOP-0873"],
    }
    assert json.loads((written / "participants.json").read_text()).keys() == set(table)
    sessions = read_table(written / "sub-IXI002/sub-IXI002_sessions.tsv")
    assert sessions.to_dict("list") == {
        "session_id": ["ses-Guys0828", "ses-HH0900"],
        "site": ["Guys", "HH"],
        "split": ["train", "train"],
        "scan_id": list(SCANS[:2]),
    }
    assert json.loads((written / "sub-IXI002/sub-IXI002_sessions.json").read_text()).keys() == set(sessions)
    images = sorted(str(path.relative_to(written)) for path in written.rglob("*.nii.gz"))
    assert images == [
        "sub-IXI002/ses-Guys0828/anat/sub-IXI002_ses-Guys0828_desc-slab_T2w.nii.gz",
        "sub-IXI002/ses-Guys0828/anat/sub-IXI002_ses-Guys0828_space-T2w_desc-slab_PDw.nii.gz",
        "sub-IXI002/ses-Guys0828/anat/sub-IXI002_ses-Guys0828_space-T2w_desc-slab_T1w.nii.gz",
        "sub-IXI002/ses-HH0900/anat/sub-IXI002_ses-HH0900_desc-slab_T2w.nii.gz",
        "sub-IXI002/ses-HH0900/anat/sub-IXI002_ses-HH0900_space-T2w_desc-slab_PDw.nii.gz",
        "sub-IXI002/ses-HH0900/anat/sub-IXI002_ses-HH0900_space-T2w_desc-slab_T1w.nii.gz",
        "sub-IXI012/anat/sub-IXI012_desc-slab_T2w.nii.gz",
        "sub-IXI012/anat/sub-IXI012_space-T2w_desc-slab_PDw.nii.gz",
        "sub-IXI012/anat/sub-IXI012_space-T2w_desc-slab_T1w.nii.gz",
        "sub-IXI035/anat/sub-IXI035_desc-slab_T2w.nii.gz",
        "sub-IXI035/anat/sub-IXI035_space-T2w_desc-slab_T1w.nii.gz",
    ]


def test_sidecars_say_how_each_slab_was_made_and_on_which_scanner(written: Path) -> None:
    folder = written / "sub-IXI012/anat"
    of = {name: sidecar(folder / f"sub-IXI012_{name}.nii.gz") for name in ("desc-slab_T2w", "space-T2w_desc-slab_T1w")}
    scanner = {"MagneticFieldStrength": 3, "Manufacturer": "Philips", "InstitutionName": "Hammersmith Hospital"}
    assert of["desc-slab_T2w"] == scanner | {
        "Description": "Slab of the T2: slices 41 to 44 of the scan, from inferior, not interpolated. "
        "Axes are turned to RAS+.",
        "SkullStripped": False,
        "Sources": ["bids:raw:sub-IXI012/anat/sub-IXI012_T2w.nii.gz"],
        "SpatialReference": "bids:raw:sub-IXI012/anat/sub-IXI012_T2w.nii.gz",
    }
    t1 = of["space-T2w_desc-slab_T1w"]
    assert "interpolated once (trilinear) onto the planes of the T2, after rigid registration" in t1["Description"]
    assert t1["SpatialReference"] == "bids::sub-IXI012/anat/sub-IXI012_desc-slab_T2w.nii.gz"
    pd_slab = sidecar(folder / "sub-IXI012_space-T2w_desc-slab_PDw.nii.gz")
    assert "not interpolated" in pd_slab["Description"]  # the other echo of the T2
    assert sidecar(written / "sub-IXI035/anat/sub-IXI035_desc-slab_T2w.nii.gz")["MagneticFieldStrength"] == 1.5


RIGID, HEADERS, CUT = "onto the planes of the T2, after rigid registration.", "by the headers alone", "slices 41 to 44"
FAILED, NO_GAIN = (f"{HEADERS} (the registration {why})." for why in ("failed", "did not make the pair more similar"))


@pytest.mark.parametrize(
    ("flags", "config", "t1", "pd_slab"),
    [
        ("", {}, RIGID, CUT),
        ("archive_unchecked,t1_registration_failed", {}, FAILED, CUT),
        ("t1_registration_no_gain", {}, NO_GAIN, CUT),
        ("t1_registration_no_gain,pd_grid_differs", {}, NO_GAIN, RIGID),
        ("pd_grid_differs,pd_registration_failed", {}, RIGID, FAILED),
        ("pd_registration_no_gain", {"register_echoes": True}, RIGID, NO_GAIN),
        ("", {"register_echoes": True}, RIGID, RIGID),
        ("pd_grid_differs", {"registration": "none"}, f"{HEADERS}.", f"{HEADERS}."),
        ("t1_registration_failed", {"registration": "affine"}, FAILED, CUT),
    ],
)
def test_sidecars_say_what_aligned_this_pair(
    flags: str, config: dict[str, Any], t1: str, pd_slab: str, tmp_path: Path
) -> None:
    selection = bids_selection(flags=["", "", flags, "t1_registration_failed"])
    selection.metadata["inputs"]["config"].update(config)
    Bids(selection).write(tmp_path, no_progress)
    for name, how in (("T1w", t1), ("PDw", pd_slab)):
        content = sidecar(tmp_path / f"sub-IXI012/anat/sub-IXI012_space-T2w_desc-slab_{name}.nii.gz")
        assert how in content["Description"]
        assert ("interpolated once" in content["Description"]) == (how != CUT)
        assert content["Sources"][0].endswith(f"{name}.nii.gz")


@pytest.mark.parametrize(("flag", "how"), [("registration_failed", FAILED), ("registration_no_gain", NO_GAIN)])
def test_flags_of_a_single_pair_are_read_too(flag: str, how: str, tmp_path: Path) -> None:
    selection = bids_selection(names=("t1", "t2"), flags=["", "", flag, ""])
    Bids(selection).write(tmp_path, no_progress)
    for person, expected in (("IXI012", how), ("IXI035", RIGID)):
        content = sidecar(tmp_path / f"sub-{person}/anat/sub-{person}_space-T2w_desc-slab_T1w.nii.gz")
        assert expected in content["Description"]


def test_nothing_is_said_of_a_direction_or_normalisation(exported: Path) -> None:
    for folder in (exported, exported / "sourcedata/raw"):
        assert not {"role", "low", "high"} & set(pd.read_csv(folder / "export.csv"))
        assert not {"direction", "normalisation"} & set(json.loads((folder / "export.json").read_text()))
    assert {"scale", "offset"} <= set(pd.read_csv(exported / "export.csv"))


@pytest.mark.parametrize("high", [-10.0, np.nan])
def test_slabs_that_cannot_be_normalised_are_exported(high: float, tmp_path: Path) -> None:
    Bids(bids_selection(t2_p_high=high)).write(tmp_path, no_progress)
    assert len(list(tmp_path.rglob("*_T2w.nii.gz"))) == len(SCANS)


def test_margins_are_left_out_and_the_affine_follows(written: Path) -> None:
    arrays = bids_selection().arrays
    image = nib.load(written / "sub-IXI035/anat/sub-IXI035_desc-slab_T2w.nii.gz")
    assert np.array_equal(image.dataobj.get_unscaled(), arrays["t2"][3, 1:-1].transpose(2, 1, 0))
    np.testing.assert_allclose(image.affine @ (0, 0, 0, 1), affine() @ (0, 0, 1, 1), atol=1e-4)
    np.testing.assert_allclose(image.get_fdata(), image.dataobj.get_unscaled() * 0.5 - 3)


def test_the_description_gives_the_licence_credit_and_sources(written: Path) -> None:
    description = json.loads((written / "dataset_description.json").read_text())
    assert description["SourceDatasets"] == [
        {"URL": "https://brain-development.org/ixi-dataset/", "Version": f"IXI-{m}.tar, MD5 {'0' * 32}"}
        for m in ("T1", "PD", "T2")
    ]
    assert "ixi-t1-pd-t2@0123456789ab" in description["Name"]
    assert all(len(line) <= 120 for line in (written / "README.md").read_text().splitlines() if "Credit" not in line)


def test_scans_that_are_not_ixi_have_no_scanner(tmp_path: Path) -> None:
    selection = bids_selection()
    for source in selection.metadata["sources"].values():
        source["source"] = "simulated"
    Bids(selection).write(tmp_path, no_progress)
    content = [json.loads(path.read_text()) for path in tmp_path.rglob("anat/*.json")]
    assert {key for each in content for key in each} == {"Description", "SkullStripped", "Sources", "SpatialReference"}
    assert "URL" not in (tmp_path / "dataset_description.json").read_text()


WORD = st.tuples(st.sampled_from("aA1"), st.text("aB1_.", max_size=2)).map("".join)
SUBJECT = st.lists(WORD, min_size=1, max_size=3).map("-".join)


@settings(max_examples=examples(60))
@given(subjects=st.lists(SUBJECT, min_size=1, max_size=6, unique=True))
def test_names_of_bids_are_unique_and_keep_persons_together(subjects: Sequence[str]) -> None:
    try:
        names = name_scans(subjects)
    except ConfigError as error:
        assert "\n" not in str(error)
        bare = [re.sub("[^a-z0-9]", "", part.casefold()) for s in subjects for part in (person_of(s), s)]
        assert len(set(bare)) < len(bare)
        return
    folders = [name.folder.casefold() for name in names.values()]
    assert len(set(folders)) == len(subjects)
    for a in subjects:
        assert re.fullmatch(r"sub-[A-Za-z0-9]+(/ses-[A-Za-z0-9]+)?/anat", names[a].folder)
        assert names[a].file("T1w.nii").startswith(f"{names[a].folder}/sub-")
        for b in subjects:
            assert (names[a].participant == names[b].participant) == (person_of(a) == person_of(b))


def test_two_persons_with_one_label_are_refused_before_anything_is_written() -> None:
    scans = ["an_na-1", "anna-1", "bob-1", "bob-2"]
    with pytest.raises(ConfigError, match=r"an_na and anna would both be sub-anna in BIDS, whose names have letters"):
        Bids(bids_selection(subject_id=scans)).check()


def test_pairs_by_index_have_no_common_space() -> None:
    selection = bids_selection()
    selection.metadata["inputs"]["config"]["pairing"] = "index"
    with pytest.raises(ConfigError, match="bids needs a version with --pairing anatomical"):
        Bids(selection).check()


def test_descriptions_are_canonical_json(written: Path) -> None:
    for path in written.rglob("*.json"):
        assert path.read_text() == to_json(json.loads(path.read_text()))
