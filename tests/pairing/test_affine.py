"""Affine registration recovers scale, and never runs away; slices by area are those with the most head."""

from __future__ import annotations

from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import config_for
from hypothesis import given
from hypothesis import strategies as st

from ixi_etl.config import DatasetConfig
from ixi_etl.dataset.metadata import read_manifest
from ixi_etl.pairing import geometry, register
from ixi_etl.pairing.heads import RegistrationError, Volume, prepare
from ixi_etl.recipes.ixi import refresh
from ixi_etl.scans import nifti
from ixi_etl.testing.phantom import PhantomSubject, grid_affine, pack_nifti, rigid, simulate, write_tar

STRETCHES = [(1.03, 1.03, 1.03), (1.03, 0.97, 1.0)]


def resting_pair() -> tuple[Volume, Volume]:
    """The T1 and the T2 of a head that did not move, of voxels of about 2 mm."""
    packed, _ = simulate(PhantomSubject(2, "Guys", seed=11, shrink=2))
    scans = (nifti.read_volume(packed[m]) for m in ("T1", "T2"))
    t1, t2 = (Volume(voxels, np.asarray(header.affine)) for header, voxels in scans)
    return t1, t2


def stretched(scan: Volume, factors: tuple[float, ...]) -> tuple[Volume, geometry.Matrix]:
    """The scan with other voxel sizes, and the matrix from its world to the new one."""
    factor, middle = np.diag([*factors, 1.0]), (np.array(scan.voxels.shape[::-1]) - 1) / 2
    factor[:3, 3] = middle - factor[:3, :3] @ middle
    return Volume(scan.voxels, scan.affine @ factor), scan.affine @ factor @ np.linalg.inv(scan.affine)


def stretches(matrix: geometry.Matrix) -> Any:
    return np.linalg.svd(matrix[:3, :3], compute_uv=False)


@pytest.mark.parametrize("factors", STRETCHES)
def test_affine_registration_recovers_scale_and_motion(factors: tuple[float, ...]) -> None:
    t1, t2 = resting_pair()
    other, stretch = stretched(t1, factors)
    motion = rigid((-3, 2, -4), (-3, 4, 2))
    found = register.register(Volume(other.voxels, motion @ other.affine), t2, is_affine=True)
    points = register.head_points(t2)
    np.testing.assert_allclose(stretches(found.fixed_to_moving), sorted(factors, reverse=True), atol=0.002)
    assert register.mean_distance(found.fixed_to_moving, motion @ stretch, points) < 0.1
    assert register.mean_distance(found.check, motion @ stretch, points) < 0.1
    assert not found.is_mirrored


def test_a_search_that_runs_away_is_a_failed_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    """An affine search of another method stretched a head by 1.23."""
    head = prepare(resting_pair()[0])
    for matrix in (np.diag([1.3, 1, 1, 1]), np.diag([0.7, 1, 1, 1]), np.diag([-1.0, 1, 1, 1])):
        monkeypatch.setattr(register, "_search", lambda *_, matrix=matrix, **__: (matrix, 0.0))
        with pytest.raises(RegistrationError, match="stretched the head"):
            register._affine_search(head, head, np.eye(4))


@given(st.floats(-20, 20), st.floats(0.9, 1.1), st.floats(0.9, 1.1))
def test_the_angle_of_an_affine_matrix_is_that_of_the_nearest_rotation(angle: float, a: float, b: float) -> None:
    points = np.zeros((1, 3))
    stretch = np.diag([a, b, 1.0, 1.0])
    shift_mm, angle_deg = register.measure_motion(rigid((0, 0, angle), (3, 0, 4)) @ stretch, points)
    assert shift_mm == pytest.approx(5)
    assert angle_deg == pytest.approx(abs(angle), abs=1e-4)


@pytest.mark.parametrize("registration", ["rigid", "affine"])
def test_the_configuration_selects_the_kind_of_registration(
    registration: str, archives: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fake(*_: Any, is_affine: bool) -> register.Registration:
        asked.append(is_affine)
        return register.Registration(np.diag([1.01, 1, 1, 1]), np.diag([1.01, 1, 1, 1]))

    monkeypatch.setattr(register, "register", fake)
    config = config_for(tmp_path, archives, registration=registration, subjects=2, pictures=False)
    refresh(config.model_copy(update={"workers": 1}))
    assert asked == [registration == "affine"] * 2


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20), st.integers(1, 6), st.integers(0, 3))
def test_the_largest_window_has_the_largest_sum_of_areas(areas: list[int], slices: int, margin: int) -> None:
    if slices + 2 * margin > len(areas):
        return
    start, stop = geometry.largest_window(np.array(areas), slices, margin)
    assert stop - start == slices + 2 * margin
    sums = {
        first: sum(areas[first + margin : first + margin + slices])
        for first in range(len(areas) - slices - 2 * margin + 1)
    }
    assert sums[start] == max(sums.values())
    assert start == min(first for first, total in sums.items() if total == sums[start])


@pytest.mark.parametrize("orientation", ["LAS", "PSR", "RPI"])
def test_slices_by_area_follow_the_head_in_any_orientation(orientation: str, tmp_path: Any) -> None:
    """The head is in the upper part of the volume: axial slices 9 to 14 of 20, from inferior to superior."""
    head = np.zeros((20, 24, 24), np.int16)  # z, y, x towards R, A, S
    head[9:15, 4:20, 4:20] = 500 + np.arange(6, dtype=np.int16)[:, None, None] * 9
    head[12, 0:24, 0:24] = 600
    upright = grid_affine((24, 24, 20), (2.0, 2.0, 2.0), "RAS")
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(orientation)
    )
    stored = nib.apply_orientation(head.transpose(2, 1, 0), turn)
    affine = upright @ nib.orientations.inv_ornt_aff(turn, (24, 24, 20))
    noise = np.random.default_rng(0).integers(0, 40, stored.shape, dtype=np.int16)
    for modality in ("T1", "T2"):
        volume = np.ascontiguousarray((stored + noise).transpose(2, 1, 0))
        write_tar(tmp_path / f"IXI-{modality}.tar", {f"IXI002-Guys-0001-{modality}.nii.gz": pack_nifti(volume, affine)})
    config = config_for(tmp_path / "root", tmp_path, slices=6, slice_rule="area", margin=2, pictures=False)
    made = refresh(config)
    row = read_manifest(made.folder).iloc[0]
    assert (row["t2_window_start"], row["t2_window_stop"]) == (7, 17)
    assert DatasetConfig(slice_rule="area", slices=6).window_in(5) is None
