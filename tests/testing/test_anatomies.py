"""Simulated subjects from the user's own heads: aligned, warped, and divided among the splits."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from ixi_etl.config import DatasetConfig
from ixi_etl.dataset.splits import split_of
from ixi_etl.errors import ConfigError
from ixi_etl.pairing.register import Registration
from ixi_etl.scans.survey import survey
from ixi_etl.testing import anatomies, phantom

MOTION = phantom.rigid((3, -2, 4), (4, -3, 5))


@pytest.fixture(autouse=True)
def coarse_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampled heads of 3 mm voxels in place of 1 mm, which take 2 seconds each."""
    monkeypatch.setattr(anatomies, "_HEAD_MM", 3.0)
    monkeypatch.setattr(anatomies, "_HEAD_SHAPE", (68, 78, 68))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One head twice: with aligned scans, and with a T2 whose header is displaced."""
    folder = tmp_path_factory.mktemp("bases")
    packed, _ = phantom.simulate(phantom.PhantomSubject(2, "Guys", seed=11, shrink=3))
    for name, motion in (("aligned", np.eye(4)), ("displaced", MOTION)):
        for modality, data in packed.items():
            path = folder / f"{name}_{modality.lower()}w.nii.gz"
            path.write_bytes(data)
            if modality == "T2":
                image = nib.nifti1.load(path)
                nib.save(nib.Nifti1Image(np.asarray(image.dataobj), motion @ image.affine), path)
    return folder


@pytest.fixture(scope="module")
def heads(bases: Path) -> list[anatomies.Anatomy]:
    """Read without registration, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anatomies, "register", lambda t1, t2: Registration(np.eye(4), np.eye(4)))
        return anatomies.read_anatomies(bases)


@pytest.mark.faults  # takes 8 seconds
def test_the_scans_of_a_head_are_registered(bases: Path) -> None:
    heads = anatomies.read_anatomies(bases)
    aligned, displaced = (head.sample(np.random.default_rng(1))[0] for head in heads)
    assert [head.name for head in heads] == ["aligned", "displaced"]
    np.testing.assert_array_equal(aligned["T1"], displaced["T1"])
    assert np.corrcoef(aligned["T2"].ravel(), displaced["T2"].ravel())[0, 1] > 0.99


def test_each_subject_is_warped_differently_and_reproducibly(heads: list[anatomies.Anatomy]) -> None:
    head = replace(heads[0], scans={"T1": heads[0].scans["T1"]})
    first, again, other = (head.sample(np.random.default_rng(seed))[0]["T1"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert 0.5 < np.corrcoef(first.ravel(), other.ravel())[0, 1] < 0.999
    assert 0 <= first.min() < first.max() <= 255


def test_no_head_is_in_two_splits() -> None:
    heads = [anatomies.Anatomy(str(n), str(n), {}, {}) for n in range(5)]
    persons = [f"IXI{n:03d}" for n in range(200)]
    assigned = anatomies.assign_anatomies(heads, persons, DatasetConfig())
    of_split: dict[str, set[str]] = {}
    for person, head in assigned.items():
        of_split.setdefault(split_of(person, DatasetConfig()), set()).add(head.name)
    assert of_split == {"train": {"0", "1", "2"}, "val": {"3"}, "test": {"4"}}


def test_sessions_of_a_person_are_in_one_split() -> None:
    heads = [anatomies.Anatomy(f"p{n // 2}s{n % 2}", f"p{n // 2}", {}, {}) for n in range(6)]
    assigned = anatomies.assign_anatomies(heads, [f"IXI{n:03d}" for n in range(200)], DatasetConfig())
    of_split: dict[str, set[str]] = {}
    for person, head in assigned.items():
        of_split.setdefault(split_of(person, DatasetConfig()), set()).add(head.name)
    assert of_split == {"train": {"p0s0", "p0s1"}, "val": {"p1s0", "p1s1"}, "test": {"p2s0", "p2s1"}}


@pytest.mark.parametrize(
    ("pattern", "people"),
    [
        (anatomies.PERSON, {"oms", "sub-01"}),
        (r"^[^_]+(_p\d+)?", {"oms_p01", "oms_p03", "sub-01"}),
    ],
)
def test_the_person_is_found_in_the_name(
    pattern: str, people: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("oms_p01s1", "oms_p01s2", "oms_p03s1", "sub-01_ses-1"):
        (tmp_path / f"{name}_T1w.nii.gz").touch()
        (tmp_path / f"{name}_T2w.nii.gz").touch()
    monkeypatch.setattr(anatomies, "_read_anatomy", lambda person, name, paths: anatomies.Anatomy(name, person, {}, {}))
    assert {head.person for head in anatomies.read_anatomies(tmp_path, pattern)} == people


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"p\d+", "finds nothing in the name a"),
        ("(", "--person ( is not a regular expression"),
        ("x*", "finds nothing"),
    ],
)
def test_an_unusable_pattern_is_refused(pattern: str, message: str, tmp_path: Path) -> None:
    for name in ("a_T1.nii", "a_T2.nii"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=re.escape(message)):
        anatomies.read_anatomies(tmp_path, pattern)


@pytest.mark.parametrize("modality", ["PD", "MRA"])
def test_a_modality_that_no_head_has_is_refused(modality: str, tmp_path: Path) -> None:
    for name in ("a_T1.nii", "a_T2.nii", "a_MRA.nii"):  # an MRA is not read: its place in the head is not known
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=f"no head in .* has {modality} that can be used; leave {modality} out"):
        phantom.write_phantom(tmp_path / "sim", bases=tmp_path, modalities=("T1", "T2", modality))
    assert not (tmp_path / "sim").exists()


def test_heads_of_fewer_than_three_people_are_shared_by_the_splits(caplog: pytest.LogCaptureFixture) -> None:
    heads = [anatomies.Anatomy(str(n), "ab"[n % 2], {}, {}) for n in range(4)]
    assigned = anatomies.assign_anatomies(heads, [f"IXI{n:03d}" for n in range(50)], DatasetConfig())
    assert {head.name for head in assigned.values()} == {"0", "1", "2", "3"}
    assert "fewer than three people (a, b), so all splits share them; if this is wrong, give --person" in caplog.text


def test_a_scan_without_its_pair_is_named_and_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a_T1.nii", "a_T2.nii", "b_T1.nii.gz", "c-PD.nii.gz", "notes.txt"):
        (tmp_path / name).touch()
    assert list(anatomies.find_pairs(tmp_path)) == ["a"]
    assert "not used, because T1 or T2 is missing: b, c" in caplog.text


def test_a_header_that_contradicts_itself_is_refused(bases: Path, tmp_path: Path) -> None:
    image = nib.nifti1.load(bases / "aligned_t1w.nii.gz")
    image.set_sform(MOTION @ image.affine, 1)
    nib.save(image, tmp_path / "a_T1.nii.gz")
    with pytest.raises(ConfigError, match="cannot be used: bad_affine: sform and qform contradict"):
        anatomies.read_scan(tmp_path / "a_T1.nii.gz")


def test_a_pair_that_exchanges_left_and_right_is_refused(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anatomies, "register", lambda t1, t2: Registration(np.eye(4), np.eye(4), is_mirrored=True))
    with pytest.raises(ConfigError, match="one of the headers exchanges left and right"):
        anatomies.read_anatomies(bases)


def test_subjects_whose_head_has_a_pd_have_one(
    heads: list[anatomies.Anatomy], tmp_path: Path, monkeypatch: Any
) -> None:
    one, other = heads
    with_pd = replace(one, scans=one.scans | {"PD": one.scans["T2"]})
    monkeypatch.setattr(phantom, "read_anatomies", lambda *_, **__: [with_pd, other])
    blank = np.zeros((4, 4, 4), np.float32)
    monkeypatch.setattr(anatomies.Anatomy, "sample", lambda head, _: (dict.fromkeys(head.scans, blank), np.eye(4)))
    phantom.write_phantom(tmp_path, subjects=3, seed=5, oddities=False, shrink=4, bases=tmp_path)
    without_pd = tmp_path / "without"
    phantom.write_phantom(
        without_pd, subjects=3, seed=5, oddities=False, shrink=4, bases=tmp_path, modalities=("T1", "T2")
    )
    assert not (without_pd / "IXI-PD.tar").exists()
    heads_used = {s: t["head"] for s, t in json.loads((tmp_path / "truth.json").read_text()).items()}
    table = survey({"PD": str(tmp_path / "IXI-PD.tar")})
    assert set(table["subject_id"]) == {s for s, head in heads_used.items() if head == "aligned"}
    assert 0 < len(table) < 3
    assert set(table["orientation"]) == {"LAS"}


def test_archives_are_made_from_the_heads(
    bases: Path, heads: list[anatomies.Anatomy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phantom, "read_anatomies", lambda folder, *_, **__: {bases: heads}[folder])
    phantom.write_phantom(tmp_path, subjects=2, seed=5, oddities=False, shrink=4, bases=bases)
    assert not (tmp_path / "IXI-PD.tar").exists()
    truth = json.loads((tmp_path / "truth.json").read_text())
    assert {subject["head"] for subject in truth.values()} <= {"aligned", "displaced"}
    table = survey({m: str(tmp_path / f"IXI-{m}.tar") for m in ("T1", "T2")})
    assert len(table) == 4
    assert table["simulated"].all()
    assert table["orientation"].tolist() == ["PSR", "PSR", "LAS", "LAS"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no pair of NAME_T1.nii.gz and NAME_T2.nii.gz"),
        ({"a_T1.nii": b"x"}, "has no pair"),
        ({"a_T1.nii": b"x", "a_T2.nii": b"x"}, "a_T1.nii cannot be used: unreadable: not a NIfTI file"),
        ({"a_T1.nii": b"x", "a_T1w.nii.gz": b"x", "a_T2.nii": b"x"}, "have the same name and modality; remove one"),
    ],
)
def test_a_folder_without_usable_heads_is_refused(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        anatomies.read_anatomies(tmp_path)
