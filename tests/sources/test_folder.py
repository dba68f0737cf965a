"""A folder of NIfTI files, loose or in BIDS, is found, named and hashed; its files are read in place."""

from __future__ import annotations

import builtins
import gzip
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples

from ixi_etl.config import DatasetConfig, RefreshConfig
from ixi_etl.core import extras
from ixi_etl.dataset.schema import CANDIDATE
from ixi_etl.errors import ConfigError, DatasetError, DownloadError, MissingExtraError
from ixi_etl.pairing.cut import read_member_checked
from ixi_etl.recipes.ixi_inputs import Inputs, acquire_inputs, create_cut_jobs, find_sources, name_version
from ixi_etl.scans.survey import VolumeFile, survey
from ixi_etl.sources.cache import VerifiedFile
from ixi_etl.sources.catalog import official
from ixi_etl.sources.folder import VerifiedFolder
from ixi_etl.sources.user_source import find_inputs, user_sources
from ixi_etl.testing.phantom import grid_affine, pack_nifti, write_tar

VOLUME = pack_nifti(np.arange(60, dtype="<i2").reshape(3, 4, 5), grid_affine((5, 4, 3), (1, 1, 1), "RAS"))
PAIR = ("anna_T1.nii.gz", "anna_T2.nii.gz")


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.decompress(VOLUME) if name.endswith(".nii") else VOLUME)
    return folder


def found_in(folder: Path, *patterns: str) -> dict[str, list[str]]:
    """Modality -> subject_id and name of each file."""
    found = find_inputs(str(folder), ("T1", "T2"), patterns)
    return {
        m: [f"{f.volume.subject_id} {f.name}" for f in files if isinstance(f, VolumeFile)] for m, files in found.items()
    }


def inputs_of(root: Path, source: Path, **options: Any) -> Inputs:
    return acquire_inputs(RefreshConfig(root=str(root), source=str(source), **options))


def digests(inputs: Inputs) -> dict[str, str]:
    return {m: archive.files_sha256 for m, archive in inputs.archives.items()}


def error_of(folder: Path, *patterns: str) -> str:
    with pytest.raises(DownloadError) as caught:
        user_sources(str(folder), patterns=patterns)
    message = str(caught.value)
    assert message.isprintable()
    assert str(folder) in message
    return message


def test_loose_files_are_found_in_all_folders(tmp_path: Path) -> None:
    fill(tmp_path, "IXI002-Guys-0828-T1.nii.gz", "x/IXI002-Guys-0828-T2.nii", "y/z/-b c_T1.nii", "Zoë-t2w.nii.gz")
    fill(
        tmp_path, "._anna_T1.nii.gz", ".hidden/anna_T1.nii.gz", "anna_T1.nii.gz.txt", "d_T1.nii.gz/e_T2.nii", "f_PD.nii"
    )
    (tmp_path / "x/loop").symlink_to(tmp_path)
    assert found_in(tmp_path) == {
        "T1": ["IXI002-Guys-0828 IXI002-Guys-0828-T1.nii.gz", "b_c y/z/-b c_T1.nii"],
        "T2": ["Zo_ Zoë-t2w.nii.gz", "e d_T1.nii.gz/e_T2.nii", "IXI002-Guys-0828 x/IXI002-Guys-0828-T2.nii"],
    }


def test_names_that_differ_only_in_case_are_one_subject(tmp_path: Path) -> None:
    fill(tmp_path, "Anna_T1.nii.gz", "anna_T1.nii.gz", "ANNA_T2.nii.gz")
    found = found_in(tmp_path)
    assert {line.split()[0] for lines in found.values() for line in lines} == {"ANNA"}
    assert len(found["T1"]) == 2  # the selection excludes them as duplicate_member


def test_bids_gives_subjects_with_their_sessions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("ancpbids", reason="pip install -c constraints.txt -e '.[bids]'")
    fill(tmp_path, "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz", "sub-01/ses-2/anat/sub-01_ses-2_acq-fast_T2w.nii")
    fill(tmp_path, "sub-02/anat/sub-02_T1w.nii.gz", "sub-02/anat/sub-02_T2w.nii.gz", "sub-02/anat/sub-02_angio.nii.gz")
    fill(tmp_path, "sub-02/func/sub-02_task-rest_bold.nii.gz", "derivatives/x/sub-02/anat/sub-02_T1w.nii.gz")
    fill(tmp_path, "sub-03/anat/sub-03-4_T1w.nii.gz")  # a label cannot have a -
    (tmp_path / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.9.0"}')
    assert found_in(tmp_path) == {
        "T1": ["01-2 sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz", "02 sub-02/anat/sub-02_T1w.nii.gz"],
        "T2": ["01-2 sub-01/ses-2/anat/sub-01_ses-2_acq-fast_T2w.nii", "02 sub-02/anat/sub-02_T2w.nii.gz"],
    }
    assert "1 of 6 NIfTI files are skipped, for example 'sub-03/anat/sub-03-4_T1w.nii.gz'" in caplog.text
    patterns = (f"sub-{{subject}}/anat/*_{m}w.nii.gz" for m in ("T1", "T2"))
    chosen = found_in(tmp_path, *(f"{m}={pattern}" for m, pattern in zip(("T1", "T2"), patterns, strict=True)))
    assert [line.split()[0] for line in chosen["T1"]] == ["02", "03"]  # templates replace the names of BIDS


def test_bids_without_its_reader_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz", "dataset_description.json")
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"not installed \(ancpbids\); run: pip install \"ixi-etl\[bids\]\""):
        user_sources(str(tmp_path))


def test_sessions_without_a_description_of_the_dataset_are_refused(tmp_path: Path) -> None:
    """Otherwise each session would be a person of its own, and might be in another split."""
    fill(tmp_path, "sub-01_ses-1_T1w.nii.gz", "sub-01_ses-2_T1w.nii.gz", "sub-01_ses-1_T2w.nii.gz")
    assert "has no dataset_description.json; give the folder that has it, or say which" in error_of(tmp_path)
    assert found_in(tmp_path, "sub-{subject}_ses-{session}_{modality}.nii.gz")["T1"][0].startswith("01-1 ")


def test_archives_take_precedence_over_files_beside_them(tmp_path: Path) -> None:
    fill(tmp_path, *PAIR)
    write_tar(tmp_path / "IXI-T1.tar", {"IXI002-Guys-0828-T1.nii.gz": VOLUME})
    message = error_of(tmp_path)
    assert f"{tmp_path}/IXI-T2.tar is not there; give a --source that has IXI-T2.tar, or move the archives" in message
    assert "NIfTI files such as anna_T1.nii.gz are not read" in message
    write_tar(tmp_path / "IXI-T2.tar", {})
    assert [source.urls[0] for source in user_sources(str(tmp_path)).values()] == [
        str(tmp_path / f"IXI-{m}.tar") for m in ("T1", "T2")
    ]


def test_a_folder_without_volumes_of_a_modality_is_a_one_line_error(tmp_path: Path) -> None:
    assert "has no archive IXI-T1.tar and no NIfTI file (.nii, .nii.gz)" in error_of(tmp_path)
    fill(tmp_path, "anna_T1.nii.gz", "bob_FLAIR.nii.gz")
    assert "has no volume of T2, only T1, among 2 NIfTI files, for example 'anna_T1.nii.gz': " in error_of(tmp_path)
    assert "say with --pattern how yours are named, such as '{subject}_{site}_{modality}.nii.gz'" in error_of(tmp_path)
    assert "they do not fit --pattern T1={subject}/x.nii, or" in error_of(tmp_path, "T1={subject}/x.nii")
    with pytest.raises(ConfigError, match=r"has no \{subject\}"):
        user_sources(str(tmp_path), patterns=("x",))


def test_a_folder_that_cannot_be_listed_is_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its subjects would be missing otherwise."""
    fill(tmp_path, *PAIR, "closed/bob_T1.nii")
    scanned = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scanned(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert f"{tmp_path}/closed: Permission denied" in error_of(tmp_path)


def test_an_unchanged_folder_is_not_read_again(tmp_path: Path) -> None:
    folder, root, reports = fill(tmp_path / "in", *PAIR, "bob_T1.nii"), tmp_path / "root", []
    first = inputs_of(root, folder)
    opened = open

    def count(path: Any, *arguments: Any, **options: Any) -> Any:
        reports.append(str(path)) if str(path).startswith(str(folder)) else None
        return opened(path, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", count)
        assert inputs_of(root, folder) == first
        assert reports == []
        (folder / "bob_T1.nii").write_bytes(gzip.decompress(VOLUME))  # the same bytes at another time
        assert digests(inputs_of(root, folder)) == digests(first)
        assert reports == [str(folder / "bob_T1.nii")]
    (folder / "bob_T1.nii").write_bytes(VOLUME)
    changed = digests(inputs_of(root, folder))
    assert (changed["T1"] != digests(first)["T1"], changed["T2"]) == (True, digests(first)["T2"])


def test_the_digest_has_what_decides_the_rows_and_no_path(tmp_path: Path) -> None:
    here, there = fill(tmp_path / "a", *PAIR), fill(tmp_path / "b", *PAIR)
    expected = f"{hashlib.sha256(VOLUME).hexdigest()}  T1  anna    anna_T1.nii.gz\n"
    found = [digests(inputs_of(tmp_path / "root", folder)) for folder in (here, there)]
    assert found[0] == found[1]
    assert found[0]["T1"] == hashlib.sha256(expected.encode()).hexdigest()
    named = digests(inputs_of(tmp_path / "root", here, pattern=("{session}na_{modality}.{subject}.gz",)))
    assert named != found[0]  # another id


def test_the_version_is_named_after_the_files_and_not_after_the_template(tmp_path: Path) -> None:
    config = RefreshConfig(root=str(tmp_path), source=str(fill(tmp_path / "a", *PAIR)))
    patterned = config.model_copy(update={"pattern": ("{subject}_{modality}.nii.gz",)})
    names = [name_version(c, acquire_inputs(c)) for c in (config, patterned)]
    assert names[0] == names[1]
    assert names[0][1]["archives_md5"] == {}
    assert names[0][1]["files_sha256"].keys() == {"T1", "T2"}


def test_templates_for_members_of_archives_are_part_of_the_name(tmp_path: Path) -> None:
    for m in ("T1", "T2"):
        write_tar(tmp_path / f"IXI-{m}.tar", {f"anna_{m}.nii.gz": VOLUME})
    config = RefreshConfig(root=str(tmp_path), source=str(tmp_path))
    plain, patterned = (
        name_version(c, acquire_inputs(c))[1]
        for c in (config, config.model_copy(update={"pattern": ("{subject}_{modality}.nii.gz",)}))
    )
    assert patterned == plain | {"pattern": ["{subject}_{modality}.nii.gz"]}


@pytest.mark.parametrize("from_ixi", [True, False])
def test_what_decides_the_credit_of_an_archive_without_md5_is_part_of_the_name(from_ixi: bool) -> None:
    config = RefreshConfig(dataset=DatasetConfig(modalities=("T2", "MRA")))
    archives = {}
    for m in ("T2", "MRA"):
        source = official(f"IXI-{m}.tar")
        origin = source.urls[0] if from_ixi else f"/data/IXI-{m}.tar"
        archives[m] = VerifiedFile(source.name, origin, 1, "0" * 32, bool(source.md5), origin, None, "")
    inputs = name_version(config, Inputs(archives, None))[1]
    assert inputs.get("archives_of_ixi") == (["MRA"] if from_ixi else None)


def test_all_chosen_modalities_are_requested(tmp_path: Path) -> None:
    config = RefreshConfig(root=str(tmp_path), dataset=DatasetConfig(modalities=("T1", "PD"), reference="PD"))
    assert find_sources(config) == {m: official(f"IXI-{m}.tar") for m in ("T1", "PD")}
    fill(tmp_path / "files", "anna_T1.nii", "anna_PD.nii")
    own = config.model_copy(update={"source": str(tmp_path / "files")})
    assert acquire_inputs(own).archives.keys() == {"T1", "PD"}


def cut_members(inputs: Inputs) -> list[Any]:
    table = survey(inputs.locations)
    screened = table.drop_duplicates("subject_id").assign(status=CANDIDATE)
    return [member for job in create_cut_jobs(table, screened, inputs) for member in job.members.values()]


def test_files_are_surveyed_and_read_in_place(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in", "anna_T1.nii", "anna_T2.nii.gz")
    (folder / "bob_T1.nii.gz").write_bytes(b"")
    (folder / "eve_T1.nii.gz").write_bytes(gzip.decompress(VOLUME))  # not a gzip file
    inputs = inputs_of(tmp_path / "root", folder)
    table = survey(inputs.locations).set_index("member")
    assert table["reason"].to_dict() == {
        "anna_T1.nii": "",
        "bob_T1.nii.gz": "unreadable",
        "eve_T1.nii.gz": "unreadable",
        "anna_T2.nii.gz": "",
    }
    assert table.loc["anna_T1.nii", "affine"] == table.loc["anna_T2.nii.gz", "affine"]
    read = {Path(m.archive).name: read_member_checked(m)[0] for m in cut_members(inputs)}
    assert read == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("change", [lambda p: p.write_bytes(VOLUME + b"x"), os.unlink, lambda p: os.utime(p, (1, 1))])
def test_a_file_that_changes_after_it_was_hashed_is_an_error(tmp_path: Path, change: Callable[[Path], None]) -> None:
    inputs = inputs_of(tmp_path / "root", fill(tmp_path / "in", *PAIR))
    archive, members = inputs.archives["T1"], cut_members(inputs)
    assert isinstance(archive, VerifiedFolder)
    assert archive.current_fingerprint() == archive.fingerprint
    change(tmp_path / "in/anna_T1.nii.gz")
    try:
        assert archive.current_fingerprint() != archive.fingerprint
    except FileNotFoundError:
        assert not (tmp_path / "in/anna_T1.nii.gz").exists()
    with pytest.raises(DatasetError, match=r"anna_T1\.nii\.gz changed while it was read"):
        read_member_checked(members[0])


def test_a_file_that_cannot_be_read_is_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, root = fill(tmp_path / "in", *PAIR), tmp_path / "root"
    path = folder / "anna_T1.nii.gz"

    def message() -> str:
        with pytest.raises(DownloadError) as caught:
            inputs_of(root, folder)
        assert str(path) in str(caught.value)
        assert str(caught.value).isprintable()
        return str(caught.value)

    with monkeypatch.context() as patch:
        opened = open

        def refuse(name: Any, *arguments: Any, **options: Any) -> Any:
            if str(name) == str(path):
                raise PermissionError(13, "Permission denied", name)
            return opened(name, *arguments, **options)

        patch.setattr(builtins, "open", refuse)
        assert "Permission denied" in message()
        files = {"T1": (VolumeFile(str(path), path.name, find_inputs(str(folder))["T1"][0].volume),)}
        assert survey(files)["problem"].tolist() == ["the file cannot be read (Permission denied)"]
    path.unlink()
    os.mkfifo(path)
    assert "is not a regular file" in message()
    path.unlink()
    path.symlink_to(folder / "nowhere")
    assert "is a broken link; fetch what it points to (git annex get, datalad get)" in message()


@settings(max_examples=examples(15))
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=8), max_size=5))
def test_any_file_names_are_read_or_skipped(tmp_path_factory: pytest.TempPathFactory, starts: list[str]) -> None:
    folder = fill(tmp_path_factory.mktemp("any"), *PAIR)
    for start in starts:
        (folder / f"{start}_T1.nii").write_bytes(VOLUME)
    found = found_in(folder)
    assert len({name.casefold() for name in os.listdir(folder)}) + 1 >= len(found["T1"]) >= 1
    inputs = inputs_of(folder / ".root", folder)
    assert len(survey(inputs.locations)) == sum(map(len, found.values()))
