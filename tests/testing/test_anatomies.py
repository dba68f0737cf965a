"""Simulated subjects from the user's own heads: aligned, warped, and divided among the splits."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ixi_etl.config import DatasetConfig
from ixi_etl.dataset.splits import split_of
from ixi_etl.errors import ConfigError
from ixi_etl.scans.survey import survey
from ixi_etl.testing import anatomies, phantom

MOTION = phantom.rigid((3, -2, 4), (4, -3, 5))


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
    return anatomies.read_anatomies(bases)


def test_the_scans_of_a_head_are_registered(heads: list[anatomies.Anatomy]) -> None:
    aligned, displaced = (head.sample(np.random.default_rng(1))[0] for head in heads)
    assert [head.name for head in heads] == ["aligned", "displaced"]
    np.testing.assert_array_equal(aligned["T1"], displaced["T1"])
    assert np.corrcoef(aligned["T2"].ravel(), displaced["T2"].ravel())[0, 1] > 0.99


def test_each_subject_is_warped_differently_and_reproducibly(heads: list[anatomies.Anatomy]) -> None:
    first, again, other = (heads[0].sample(np.random.default_rng(seed))[0]["T1"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert 0.5 < np.corrcoef(first.ravel(), other.ravel())[0, 1] < 0.999
    assert 0 <= first.min() < first.max() <= 255


def test_no_head_is_in_two_splits() -> None:
    heads = [anatomies.Anatomy(str(n), {}, {}) for n in range(5)]
    persons = [f"IXI{n:03d}" for n in range(200)]
    assigned = anatomies.assign_anatomies(heads, persons, DatasetConfig())
    of_split: dict[str, set[str]] = {}
    for person, head in assigned.items():
        of_split.setdefault(split_of(person, DatasetConfig()), set()).add(head.name)
    assert of_split == {"train": {"0", "1", "2"}, "val": {"3"}, "test": {"4"}}


def test_fewer_than_three_heads_are_shared_by_the_splits() -> None:
    heads = [anatomies.Anatomy(str(n), {}, {}) for n in range(2)]
    assigned = anatomies.assign_anatomies(heads, [f"IXI{n:03d}" for n in range(50)], DatasetConfig())
    assert {head.name for head in assigned.values()} == {"0", "1"}


def test_archives_are_made_from_the_heads(bases: Path, tmp_path: Path) -> None:
    phantom.write_phantom(tmp_path, subjects=2, seed=5, oddities=False, shrink=4, bases=bases)
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
        ({"a_T1.nii": b"x", "a_T2.nii": b"x"}, "a_T1.nii cannot be read"),
    ],
)
def test_a_folder_without_usable_heads_is_refused(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        anatomies.read_anatomies(tmp_path)
