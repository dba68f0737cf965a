"""The whole scans of a version in BIDS: bytes of archives and folders, checked, linked, and read again as a source."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from bids_validation import validate
from conftest import SHRINK, config_for
from consumers import hashes
from selections import numbers, selection_of

from ixi_etl.core.progress import no_progress
from ixi_etl.dataset.manifest import to_records, used_rows
from ixi_etl.dataset.metadata import read_manifest
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.dataset.splits import person_of
from ixi_etl.dataset.store import open_arrays
from ixi_etl.errors import ArchiveError, ConfigError, DatasetError
from ixi_etl.exports.bids_raw import BidsRaw
from ixi_etl.exports.export import export_dataset
from ixi_etl.exports.selection import read_selection
from ixi_etl.modalities import MODALITIES
from ixi_etl.recipes.ixi import refresh
from ixi_etl.testing.phantom import write_phantom

UNKNOWN = {("NO_AUTHORS", "Authors"), ("TOO_FEW_AUTHORS", ""), ("JSON_KEY_RECOMMENDED", "HEDVersion")}
"""Warnings of the validator about fields of the description that nobody publishes for these data."""


@pytest.fixture(scope="module")
def from_archives(every_split: PublishedVersion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw") / "out"
    export_dataset(every_split.folder, "bids-raw", folder)
    return folder


@pytest.fixture(scope="module")
def loose(from_archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four subjects as loose files: two scans of IXI002, and a T1 that is not compressed."""
    folder = tmp_path_factory.mktemp("loose")
    people = sorted(path.name for path in from_archives.glob("sub-*"))
    for person, subject in zip(people, ("IXI002-Guys-0001", "IXI002-HH-0002", "IXI003-Guys-0003"), strict=False):
        for modality in ("T1", "T2"):
            data = (from_archives / f"{person}/anat/{person}_{modality}w.nii.gz").read_bytes()
            is_plain = (subject, modality) == ("IXI003-Guys-0003", "T1")
            path = folder / f"{subject}-{modality}.nii{'' if is_plain else '.gz'}"
            path.write_bytes(gzip.decompress(data) if is_plain else data)
    return folder


def refresh_loose(root: Path, loose: Path) -> PublishedVersion:
    """Their table of age and sex has two rows of IXI002 that contradict each other, as the published one has."""
    table = root / "IXI.csv"
    table.write_text("IXI_ID,SEX_ID,AGE\n2,1,35.5\n2,1,36.5\n3,2,40.25\n")
    return refresh(config_for(root, loose).model_copy(update={"demographics": str(table)}))


@pytest.fixture(scope="module")
def from_loose(loose: Path, tmp_path_factory: pytest.TempPathFactory) -> PublishedVersion:
    return refresh_loose(tmp_path_factory.mktemp("root"), loose)


def test_files_are_the_members_of_the_archives_byte_for_byte(
    from_archives: Path, every_split: PublishedVersion
) -> None:
    used = to_records(used_rows(read_manifest(every_split.folder)))
    expected = {
        f"sub-{person_of(row['subject_id'])}/anat/sub-{person_of(row['subject_id'])}_{m}w.nii.gz": row[
            f"{m.lower()}_sha256"
        ]
        for row in used
        for m in ("T1", "T2")
    }
    found = hashes(from_archives)
    assert {name: digest for name, digest in found.items() if "sub-" in name} == expected
    listed = pd.read_csv(from_archives / "export.csv")
    assert dict(zip(listed["file"], listed["sha256"], strict=True)) == expected
    assert set(listed["member"]) == {row[f"{m}_member"] for row in used for m in ("t1", "t2")}
    summary = json.loads((from_archives / "export.json").read_text())
    assert summary["counts"]["train"] == {"subjects": 3, "files": 6}
    assert "Changes: none" in (from_archives / "LICENSE").read_text()


def test_the_validator_finds_no_error(from_archives: Path, tmp_path: Path) -> None:
    warnings = validate(from_archives, tmp_path)
    assert {key for key in warnings if key[0] != "SIDECAR_KEY_RECOMMENDED"} == UNKNOWN


def test_files_of_a_folder_are_linked_and_sessions_tell_scans_of_a_person_apart(
    from_loose: PublishedVersion, loose: Path, tmp_path: Path
) -> None:
    before = hashes(loose)
    export_dataset(from_loose.folder, "bids-raw", tmp_path / "out")
    of = {
        "sub-IXI002/ses-Guys0001/anat/sub-IXI002_ses-Guys0001_T1w.nii.gz": "IXI002-Guys-0001-T1.nii.gz",
        "sub-IXI002/ses-HH0002/anat/sub-IXI002_ses-HH0002_T2w.nii.gz": "IXI002-HH-0002-T2.nii.gz",
        "sub-IXI003/anat/sub-IXI003_T1w.nii": "IXI003-Guys-0003-T1.nii",
        "sub-IXI003/anat/sub-IXI003_T2w.nii.gz": "IXI003-Guys-0003-T2.nii.gz",
    }
    for name, source in of.items():
        assert os.path.samefile(tmp_path / "out" / name, loose / source)
    assert len(list((tmp_path / "out").rglob("*.nii*"))) == 6
    assert hashes(loose) == before
    assert refresh_loose(from_loose.folder.parents[2], loose) == replace(from_loose, is_new=False)
    export_dataset(from_loose.folder, "bids", tmp_path / "slabs")
    name = "sub-IXI003/anat/sub-IXI003_space-T2w_desc-slab_T1w.json"
    assert (
        "bids:raw:sub-IXI003/anat/sub-IXI003_T1w.nii" in json.loads((tmp_path / "slabs" / name).read_text())["Sources"]
    )
    table = pd.read_csv(tmp_path / "out/participants.tsv", sep="\t", dtype=str, keep_default_na=False)
    shown = table[["participant_id", "age", "sex"]].to_numpy().tolist()
    assert shown == [["sub-IXI002", "n/a", "M"], ["sub-IXI003", "40.25", "F"]]


def test_scans_of_ixi_have_the_scanner_of_their_site(every_split: PublishedVersion, tmp_path: Path) -> None:
    selection = read_selection(every_split.folder, every_array=True)
    sources = {m: {**source, "source": "ixi"} for m, source in selection.metadata["sources"].items()}
    layout = BidsRaw(replace(selection, metadata={**selection.metadata, "sources": sources}))
    folder = tmp_path / "out"
    folder.mkdir()
    layout.write(folder, no_progress)
    strengths = {"Guys": 1.5, "HH": 3}
    for row in to_records(selection.rows):
        person = person_of(row["subject_id"])
        content = json.loads((folder / f"sub-{person}/anat/sub-{person}_T1w.json").read_text())
        assert (content["MagneticFieldStrength"], content["Manufacturer"]) == (strengths[row["site"]], "Philips")
    keys = {field for code, field in validate(folder, tmp_path) if code == "SIDECAR_KEY_RECOMMENDED"}
    assert not keys & {"MagneticFieldStrength", "Manufacturer", "InstitutionName"}


@pytest.mark.stack
def test_the_validator_finds_no_error_with_sessions(from_loose: PublishedVersion, tmp_path: Path) -> None:
    export_dataset(from_loose.folder, "bids-raw", tmp_path / "out")
    warnings = validate(tmp_path / "out", tmp_path)
    assert {key for key in warnings if key[0] != "SIDECAR_KEY_RECOMMENDED"} == UNKNOWN


@pytest.mark.stack
def test_all_modalities_have_a_name_that_the_validator_knows(tmp_path: Path) -> None:
    write_phantom(tmp_path / "archives", subjects=3, seed=5, shrink=SHRINK, modalities=MODALITIES)
    options: dict[str, Any] = {"modalities": MODALITIES, "incomplete": "keep", "depth": "any"}
    made = refresh(config_for(tmp_path / "root", tmp_path / "archives", **options))
    used = used_rows(read_manifest(made.folder))
    for file_format, name in (("bids", "*_space-T2w_desc-slab_{}.nii.gz"), ("bids-raw", "*_{}.nii.gz")):
        out = tmp_path / file_format
        export_dataset(made.folder, file_format, out)
        validate(out, tmp_path)
        for modality, suffix in (("t1", "T1w"), ("pd", "PDw"), ("mra", "angio")):
            expected = int((used[f"{modality}_member"] != "").sum())
            assert len(list(out.glob(f"sub-*/anat/{name.format(suffix)}"))) == expected > 0
    assert (used["pd_member"] == "").any()
    assert not used["flags"].str.contains("pd_grid_differs").any()
    for modality, was_cut in (("PDw", True), ("T1w", False)):  # the PD is an echo of the T2
        described = [path.read_text() for path in (tmp_path / "bids").glob(f"sub-*/anat/*_desc-slab_{modality}.json")]
        assert described
        assert all(("not interpolated" in text) == was_cut for text in described)


def test_files_that_are_linked_need_no_space(
    from_loose: PublishedVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, device = BidsRaw(read_selection(from_loose.folder, every_array=True)), tmp_path.stat().st_dev
    free = layout.bytes_on_disk_of(tmp_path)
    assert free == layout.size_bytes - sum(scan.size for scan in layout.scans.values()) > 0
    assert not any(scan.is_on(device + 1) for scan in layout.scans.values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, free))  # type: ignore[attr-defined]
    export_dataset(from_loose.folder, "bids-raw", tmp_path / "out")
    written = [path.stat() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sum(each.st_size for each in written if each.st_nlink == 1) <= free


def test_members_of_archives_need_their_space(
    every_split: PublishedVersion, from_archives: Path, tmp_path: Path
) -> None:
    layout = BidsRaw(read_selection(every_split.folder, every_array=True))
    needed = layout.bytes_on_disk_of(tmp_path)
    assert needed == layout.size_bytes
    assert sum(path.stat().st_size for path in from_archives.rglob("*") if path.is_file()) <= needed


def test_files_are_copied_where_they_cannot_be_linked(
    from_loose: PublishedVersion, loose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    export_dataset(from_loose.folder, "bids-raw", tmp_path / "linked")
    monkeypatch.setattr(os, "link", refuse)
    moved = tmp_path / "moved"
    shutil.copytree(loose, moved)
    export_dataset(from_loose.folder, "bids-raw", tmp_path / "copied", source=str(moved))
    assert hashes(tmp_path / "copied") == hashes(tmp_path / "linked")
    assert not os.path.samefile(
        tmp_path / "copied/sub-IXI003/anat/sub-IXI003_T1w.nii", moved / "IXI003-Guys-0003-T1.nii"
    )


def test_the_export_is_a_source_that_gives_the_same_pairs(from_loose: PublishedVersion, tmp_path: Path) -> None:
    pytest.importorskip("ancpbids", reason="pip install -c constraints.txt -e '.[bids]'")
    export_dataset(from_loose.folder, "bids-raw", tmp_path / "out")
    again = refresh(config_for(tmp_path / "root", tmp_path / "out"))
    first, second = (used_rows(read_manifest(made.folder)) for made in (from_loose, again))
    assert second["subject_id"].tolist() == ["IXI002-Guys0001", "IXI002-HH0002", "IXI003"]
    assert first["subject_id"].str.startswith("IXI").all()
    same = ["split", "t1_sha256", "t2_sha256", "t1_p_high", "t2_p_high", "t2_window_start", "nmi_after"]
    pd.testing.assert_frame_equal(first[same], second[same])
    one, two = (open_arrays(made.folder) for made in (from_loose, again))
    for name in ("t1", "t2", "t2_affine"):
        assert np.array_equal(one[name], two[name])


@pytest.fixture
def altered(archives: Path, every_split: PublishedVersion, tmp_path: Path) -> tuple[Path, str]:
    """A copy of the archives in which one byte of a used T2 differs, and the name of that member."""
    folder = tmp_path / "altered"
    shutil.copytree(archives, folder)
    member = used_rows(read_manifest(every_split.folder))["t2_member"].iloc[1]
    data = bytearray((folder / "IXI-T2.tar").read_bytes())
    data[data.index(member.encode()) + 512 + 1000] ^= 1
    (folder / "IXI-T2.tar").write_bytes(data)
    return folder, member


def test_a_scan_that_differs_is_one_line_and_leaves_nothing(
    altered: tuple[Path, str], every_split: PublishedVersion, tmp_path: Path
) -> None:
    folder, member = altered
    with pytest.raises(DatasetError, match=rf"{member} in .*IXI-T2.tar has the SHA-256 .*; give the files") as caught:
        export_dataset(every_split.folder, "bids-raw", tmp_path / "out", source=str(folder))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["altered"]


def test_a_file_that_differs_is_not_linked(from_loose: PublishedVersion, loose: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(loose, moved)
    (moved / "IXI003-Guys-0003-T1.nii").write_bytes(b"another")
    with pytest.raises(DatasetError, match=r"IXI003-Guys-0003-T1.nii has the SHA-256 .* and the version was made from"):
        export_dataset(from_loose.folder, "bids-raw", tmp_path / "out", source=str(moved))
    assert (moved / "IXI003-Guys-0003-T1.nii").read_bytes() == b"another"
    (moved / "IXI003-Guys-0003-T1.nii").unlink()
    with pytest.raises(DatasetError, match=r"moved has no IXI003-Guys-0003-T1.nii; give the folder that has it"):
        export_dataset(from_loose.folder, "bids-raw", tmp_path / "out", source=str(moved))
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]


def test_missing_archives_are_named(every_split: PublishedVersion, tmp_path: Path) -> None:
    copy = tmp_path / "root/datasets/ixi-t1-t2" / every_split.version
    shutil.copytree(every_split.folder, copy)
    with pytest.raises(DatasetError, match=r"archives has no whole IXI-T1.tar; give the archives or the folder"):
        export_dataset(copy, "bids-raw", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"https://example.org is on a server; give a local copy as --source"):
        export_dataset(copy, "bids-raw", tmp_path / "out", source="https://example.org")
    (tmp_path / "IXI-T1.tar").write_bytes(bytes(10240))
    with pytest.raises((ArchiveError, DatasetError), match=r"IXI-T1.tar"):
        export_dataset(copy, "bids-raw", tmp_path / "out", source=str(tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"file_format": "bids", "source": "."},
            "--source is an option of bids-raw; bids holds what is in the version",
        ),
        ({"file_format": "bids-raw", "direction": "t1->t2"}, "--direction: bids-raw holds all scans of each subject"),
        ({"file_format": "bids", "bits": 16}, "--bits is an option of pix2pix"),
    ],
)
def test_options_of_other_formats_are_refused(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        export_dataset(tmp_path / "no-version", out=tmp_path / "out", **given)


def test_digits_have_no_scans() -> None:
    arrays = {name: numbers(2, 1, 8, 8, seed) for seed, name in enumerate(("sketch", "digit"))}
    columns = {"site": "", "age": None, "sex": ""}
    selection = selection_of(arrays, ("train", "val"), name="digits", columns=columns, every_array=True)
    with pytest.raises(ConfigError, match="has no scans of heads; bids-raw needs a version of IXI"):
        BidsRaw(selection).check()


def test_hashes_are_those_of_the_files(from_archives: Path) -> None:
    for row in to_records(pd.read_csv(from_archives / "export.csv")):
        assert hashlib.sha256((from_archives / row["file"]).read_bytes()).hexdigest() == row["sha256"]
