"""The mutual information of two scans, its gradient, and the sampling of scans."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.interpolate import BSpline
from scipy.ndimage import gaussian_filter, map_coordinates

from ixi_etl.pairing import mutual_information
from ixi_etl.pairing.mutual_information import BINS, RADIUS_MM, STEPS, MutualInformation, Scan
from ixi_etl.testing.phantom import rigid

AFFINE = rigid((5, -8, 12), (3, -2, 7)) @ np.diag([2.0, 2.5, 3.0, 1.0])


def smooth_scan(seed: int, affine: np.ndarray) -> Scan:
    voxels = gaussian_filter(np.random.default_rng(seed).normal(size=(30, 32, 34)), 4).astype(np.float32)
    return Scan(voxels, affine, (float(voxels.min()), float(voxels.max())))


FIXED, MOVING = smooth_scan(1, AFFINE), smooth_scan(2, rigid((0, 3, 0), (0, 1, 0)) @ AFFINE)
INSIDE = FIXED.affine[:3, :3] @ np.random.default_rng(3).uniform(6, 24, (3, 20_000)) + FIXED.affine[:3, 3:]


def change(entry: int, size: float) -> np.ndarray:
    """The small transform about the centre of the fixed scan whose `entry` is `size`."""
    matrix = np.zeros((3, 4))
    matrix.flat[entry] = size
    matrix[:, :3] /= RADIUS_MM
    matrix[:, 3] -= matrix[:, :3] @ FIXED.centre
    return np.eye(4) + np.vstack([matrix, np.zeros(4)])


def test_samples_are_linear_interpolation_and_its_slope() -> None:
    indices = np.random.default_rng(0).uniform(-1, 34, (3, 3000))
    values, gradients = MOVING.samples(indices)
    want = map_coordinates(MOVING.voxels, indices[::-1], order=1, mode="constant", cval=np.nan)
    is_inside = ((indices >= 0) & (indices < np.array([33, 31, 29])[:, np.newaxis])).all(axis=0)
    np.testing.assert_array_equal(np.isnan(values), ~is_inside)
    np.testing.assert_allclose(values[is_inside], want[is_inside], atol=1e-5)
    for axis in range(3):
        ends = [np.array(indices) for _ in range(2)]
        ends[0][axis], ends[1][axis] = np.floor(indices[axis]), np.floor(indices[axis]) + 1 - 1e-9
        low, high = (MOVING.samples(end)[0] for end in ends)
        np.testing.assert_allclose(gradients[axis][is_inside], (high - low)[is_inside], atol=1e-5)


def test_voxels_that_are_nan_are_not_compared() -> None:
    voxels = FIXED.voxels.copy()
    voxels[15:] = np.nan
    half = MutualInformation(Scan(voxels, FIXED.affine, FIXED.low_high), MOVING, INSIDE)
    k = (np.linalg.inv(FIXED.affine)[:3, :3] @ (INSIDE - FIXED.affine[:3, 3:]))[2]
    assert half.samples == np.count_nonzero(k < 14)


def test_the_value_is_that_of_the_histogram_with_a_cubic_spline() -> None:
    """Against a histogram made with scipy's spline; values are rounded to a sixteenth of a bin."""
    found = MutualInformation(FIXED, MOVING, INSIDE).evaluate(np.eye(4)).value
    sampled = []
    for scan in (FIXED, MOVING):
        inverse = np.linalg.inv(scan.affine)
        values, _ = scan.samples(inverse[:3, :3] @ INSIDE + inverse[:3, 3:])
        sampled.append((values.astype(np.float64) - scan.low_high[0]) / (scan.low_high[1] - scan.low_high[0]) * BINS)
    spline = BSpline.basis_element([-2, -1, 0, 1, 2], extrapolate=False)
    rows = np.eye(BINS)[sampled[0].astype(int).clip(0, BINS - 1)]
    distances = np.floor(sampled[1] * STEPS + 1e-9)[:, np.newaxis] / STEPS + 0.5 / STEPS - np.arange(-1, BINS + 2)
    joint = rows.T @ np.nan_to_num(spline(distances)) / INSIDE.shape[1]
    expected = joint.sum(axis=0) * joint.sum(axis=1, keepdims=True)
    positive = joint > 0
    assert found == pytest.approx((joint[positive] * np.log(joint[positive] / expected[positive])).sum(), abs=2e-3)


def test_the_gradient_is_the_change_of_the_value() -> None:
    information, start = MutualInformation(FIXED, MOVING, INSIDE), rigid((2, 0, 1), (1, 0, 1))
    gradient = information.evaluate(start).gradient
    step = 0.5
    slopes = [
        (information.evaluate(start @ change(n, step)).value - information.evaluate(start @ change(n, -step)).value)
        / (2 * step)
        for n in range(12)
    ]
    np.testing.assert_allclose(gradient, slopes, atol=0.05 * np.abs(slopes).max())


def test_the_curvature_is_never_negative() -> None:
    curvature = MutualInformation(FIXED, MOVING, INSIDE).evaluate(np.eye(4)).curvature
    np.testing.assert_allclose(curvature, curvature.T)
    assert np.linalg.eigvalsh(curvature).min() > 0


def test_scans_that_hardly_overlap_have_no_mutual_information() -> None:
    assert MutualInformation(FIXED, MOVING, INSIDE).evaluate(rigid((0, 0, 0), (0, 0, 500))).value == -np.inf


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = MutualInformation(FIXED, MOVING, INSIDE).evaluate(np.eye(4))
    monkeypatch.setattr(mutual_information, "BLOCK", 4096)
    parts = MutualInformation(FIXED, MOVING, INSIDE).evaluate(np.eye(4))
    assert parts.value == whole.value
    np.testing.assert_allclose(parts.gradient, whole.gradient, rtol=1e-9, atol=1e-12)
