"""Folds over people (`benchmarks.folds`): nobody is in both parts of a fold, and the common grid keeps positions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from strategies import world_of

from benchmarks import folds
from benchmarks.folds import Grid
from ixi_etl.errors import ConfigError
from ixi_etl.pairing.heads import Volume
from ixi_etl.testing import phantom
from model.config import TrainConfig
from model.data import Pairs, load_pairs
from model.protocols import MAIN_MEASURES

pytestmark = pytest.mark.standin  # its refresh and training take half a minute

SESSIONS = ("sub-01_ses-1", "sub-01_ses-2", "sub-02")
PEOPLE = ["sub_01", "sub_02"]
GRID = Grid(side=64, pixel_mm=4.0, slice_mm=5.0)


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folds")
    for number, name in enumerate(SESSIONS):
        packed, _ = phantom.simulate(phantom.PhantomSubject(number + 2, "Guys", seed=3, shrink=3 + number))
        for modality, data in packed.items():
            (folder / f"{name}_{modality}w.nii.gz").write_bytes(data)
    folds.write_archives(folder, folds.PERSON, GRID, folder / "archives")
    return folds.make_version(folder / "archives", folder / "data", slices=4)


@pytest.fixture(scope="module")
def pairs(version: Path) -> Pairs:
    return load_pairs(version, "train")


def test_sessions_of_different_grids_become_one_version(pairs: Pairs) -> None:
    assert len(pairs.subjects) == len(SESSIONS)
    assert pairs.sources[0].stored.shape == (len(SESSIONS), 4, 64, 64)
    assert folds.people_of(pairs) == PEOPLE


def test_no_person_is_in_both_parts_of_a_fold(pairs: Pairs) -> None:
    for person in PEOPLE:
        train, test = folds.split_fold(pairs, person)
        assert folds.people_of(test) == [person]
        assert folds.people_of(train) == [p for p in PEOPLE if p != person]
        assert len(train) + len(test) == len(pairs)
        for part in (train, test):
            for n, subject in enumerate(part.subjects):
                whole = pairs.subjects.index(subject)
                assert (part.sources[0].stored[n] == pairs.sources[0].stored[whole]).all()
                assert (part.target.stored[n] == pairs.target.stored[whole]).all()
                assert (part.target.low_high[n] == pairs.target.low_high[whole]).all()


def test_every_session_is_measured_once_by_every_method(version: Path, tmp_path: Path) -> None:
    config = TrainConfig(steps=1, side=64, width=2, discriminator_width=2, precision="fp32", device="cpu")
    scores = folds.run_folds(version, config, tmp_path, workers=1)
    assert scores.groupby(["method", "mask"])["subject_id"].nunique().eq(len(SESSIONS)).all()
    assert len(scores) == 7 * 2 * len(SESSIONS)
    assert np.isfinite(scores[list(MAIN_MEASURES)]).all(axis=None)
    assert sorted(path.name for path in (tmp_path / "sheets").iterdir()) == PEOPLE
    people = folds.average_sessions(scores)
    assert len(people) == 7 * 2 * len(PEOPLE)
    table = folds.by_person(people)
    assert list(table.columns) == PEOPLE
    assert set(table.index.get_level_values("method")) == set(scores["method"])
    assert set(table.index.get_level_values(1)) == set(MAIN_MEASURES)


def test_sessions_of_a_person_are_averaged() -> None:
    row = {"method": "generated", "mask": "head", "ssim": 0.5, "mae": 0.1}
    scores = pd.DataFrame([row | {"subject_id": f"a-x-{n}", "psnr": psnr} for n, psnr in enumerate((10.0, 20.0))])
    (averaged,) = folds.average_sessions(scores).to_dict("records")
    assert averaged == row | {"subject_id": "a", "protocol": "ours", "psnr": 15.0}


def test_a_single_person_is_refused(version: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folds, "people_of", lambda pairs: ["sub_01"])
    with pytest.raises(ConfigError, match="two or more"):
        folds.run_folds(version, TrainConfig(), tmp_path, workers=1)


@pytest.mark.parametrize("spacing_mm", [(0.6, 0.6, 3.3), (0.5, 0.7, 4.0), (1.0, 1.0, 1.0), (2.0, 2.0, 2.0)])
def test_the_common_grid_keeps_world_positions(spacing_mm: tuple[float, float, float]) -> None:
    """A linear function of the world passes smoothing and interpolation unchanged, away from the edges."""
    shape_ijk = tuple(round(60 / mm) for mm in spacing_mm)
    affine = phantom.rigid((5, -16, 7), (10, -20, 30)) @ phantom.grid_affine(shape_ijk, spacing_mm, "LPS")
    slope = np.array([1.0, 2.0, -3.0])
    scan = Volume((world_of(affine, shape_ijk[::-1]) @ slope).astype(np.float32), affine)
    grid = Grid(side=32, pixel_mm=0.9375, slice_mm=3.3)
    sampled = folds.to_grid(folds.smooth(scan, grid), grid)
    np.testing.assert_allclose(np.linalg.norm(sampled.affine[:3, :3], axis=0), grid.spacing_mm)
    want = world_of(sampled.affine, sampled.voxels.shape) @ slope
    inside = slice(4, -4)
    np.testing.assert_allclose(sampled.voxels[inside], want[inside], atol=0.02)


def test_slices_of_the_common_spacing_are_not_interpolated() -> None:
    scan = Volume(np.random.default_rng(0).random((9, 16, 16), np.float32), np.diag([2.0, 2.0, 3.3, 1]))
    grid = Grid(side=16, pixel_mm=2.0, slice_mm=3.3)
    np.testing.assert_allclose(folds.to_grid(folds.smooth(scan, grid), grid).voxels, scan.voxels, atol=1e-6)
