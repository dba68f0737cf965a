"""The mutual information of two scans under an affine transform, with its gradient and curvature.

Legend: scans are [k, j, i]; indices of voxels are (i, j, k), float; matrices are 4 x 4. A transform maps the fixed
scan's world to the moving scan's (RAS mm).

The histogram is that of Mattes et al. (IEEE Transactions on Medical Imaging 22, 2003): bins of the fixed scan, and a
cubic B-spline over the bins of the moving scan. Values of the moving scan are rounded to 1/16 bin, so the histogram is
counted and not summed, and a sample's derivative comes from a table.

All sums over samples have the same order on every CPU: no BLAS over samples, and arithmetic of single elements
otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ixi_etl.pairing.geometry import Matrix, rounded, transformed

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]

BINS = 48
STEPS = 16
"""Parts of a bin to which values of the moving scan are rounded."""
BLOCK = 1 << 15
"""Samples evaluated at a time: their arrays fit the cache of a core."""
CURVATURE_STRIDE = 4
"""Every fourth sample counts for the curvature, which need not be exact."""
MIN_OVERLAP = 0.05
"""Least share of the samples that must be inside the moving scan."""
RADIUS_MM = 64.0
"""Of a head: changes of rotation and scale are measured in mm at this distance from the centre."""

_PAIRS_OF_3, _PAIRS_OF_4 = np.triu_indices(3), np.triu_indices(4)
_CELLS = BINS * BINS * STEPS
_SPLINE_WIDTH = 4  # bins
_T = (np.arange(STEPS) + 0.5) / STEPS
_SPLINE = np.stack([(1 - _T) ** 3, 3 * _T**3 - 6 * _T**2 + 4, 3 * _T * (1 + _T - _T**2) + 1, _T**3]) / 6
_SPLINE_SLOPE = np.stack([-((1 - _T) ** 2), 3 * _T**2 - 4 * _T, 1 + 2 * _T - 3 * _T**2, _T**2]) / 2


@dataclass(frozen=True)
class Scan:
    """A scan on some grid.

    Attributes:
        voxels: [k, j, i]; NaN where voxels must not be compared.
        affine: voxel to RAS mm.
        low_high: range of the bins; values beyond count as the nearest of the two.
    """

    voxels: NDArray[Any]
    affine: Matrix
    low_high: tuple[float, float]

    @property
    def centre(self) -> Floats:
        """The middle of the grid, RAS mm."""
        middle = (np.array(self.voxels.shape[::-1]) - 1) / 2
        return rounded(self.affine[:3, :3] @ middle + self.affine[:3, 3])

    @cached_property
    def _flat(self) -> NDArray[Any]:
        return self.voxels.ravel()

    def samples(self, indices: Floats) -> tuple[Singles, Singles]:
        """Values at `indices` (3, n), linearly interpolated, NaN outside the grid; and their gradients (3, n)."""
        size_k, size_j, size_i = self.voxels.shape
        whole = np.floor(indices)
        x, y, z = (indices - whole).astype(np.float32)
        is_inside = np.logical_and.reduce(
            [(n >= 0) & (n < size - 1) for n, size in zip(whole, (size_i, size_j, size_k), strict=True)]
        )
        i, j, k = np.where(is_inside, whole, 0).astype(np.intp)
        corner, row, plane = (k * size_j + j) * size_i + i, size_i, size_i * size_j
        left = [self._flat.take(corner + n, mode="clip").astype(np.float32) for n in (0, row, plane, plane + row)]
        right = [self._flat.take(corner + n + 1, mode="clip").astype(np.float32) for n in (0, row, plane, plane + row)]
        slopes = [b - a for a, b in zip(left, right, strict=True)]
        lines = [a + x * slope for a, slope in zip(left, slopes, strict=True)]
        low_y, high_y = lines[1] - lines[0], lines[3] - lines[2]
        low, high = lines[0] + y * low_y, lines[2] + y * high_y
        low_x, high_x = slopes[0] + y * (slopes[1] - slopes[0]), slopes[2] + y * (slopes[3] - slopes[2])
        values = low + z * (high - low)
        values[~is_inside] = np.nan
        return values, np.stack([low_x + z * (high_x - low_x), low_y + z * (high_y - low_y), high - low])

    def steps(self, values: Singles, count: int) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """Which of `count` equal parts of the range values are in; and which values are not NaN."""
        low, high = self.low_high
        is_valid = ~np.isnan(values)
        scaled = (values - np.float32(low)) * np.float32(count / (high - low))
        return np.where(is_valid, scaled.clip(0, count - 1), 0).astype(np.intp), is_valid


@dataclass(frozen=True)
class Evaluation:
    """Mutual information of a transform, in nats, and its change if the transform is preceded by a small one, I + d.

    Attributes:
        value: minus infinity if the scans hardly overlap.
        gradient: (12,), by the entries of the first three rows of d, about the centre; those of the first three columns
            are in mm at `RADIUS_MM`.
        curvature: (12, 12), an estimate of the negative second derivatives by the products of the samples' first
            derivatives (Berndt et al. 1974). It is never negative, and exact if the scans' densities are right.
    """

    value: float
    gradient: Floats
    curvature: Floats


class _Block:
    """Samples that are evaluated together.

    Attributes:
        offsets: (3, n) mm from the centre of the fixed scan.
        rows: (n,) the first cell of the histogram of each sample's bin.
        arms: (4, n) by how much the sample moves, in mm, with each column of a change: see `Evaluation`.
        products_of_arms: (10, n / CURVATURE_STRIDE) of all pairs of these.
    """

    def __init__(self, offsets: Floats, rows: NDArray[np.intp]) -> None:
        self.offsets, self.rows = offsets, rows
        self.arms = np.concatenate([offsets / RADIUS_MM, np.ones((1, offsets.shape[1]))])
        thinned = self.arms[:, ::CURVATURE_STRIDE]
        self.products_of_arms = thinned[_PAIRS_OF_4[0]] * thinned[_PAIRS_OF_4[1]]


class MutualInformation:
    """The similarity of two scans at sampled points.

    Args:
        points: (3, n) RAS mm in the fixed scan. Those outside it are left out.
    """

    def __init__(self, fixed: Scan, moving: Scan, points: Floats) -> None:
        self._fixed, self._moving = fixed, moving
        self._from_world = rounded(np.linalg.inv(moving.affine))
        self._blocks: list[_Block] = []
        self.samples = 0
        for start in range(0, points.shape[1], BLOCK):
            world = points[:, start : start + BLOCK]
            values, _ = fixed.samples(transformed(rounded(np.linalg.inv(fixed.affine)), world))
            bins, is_valid = fixed.steps(values, BINS)
            offsets = (world - fixed.centre[:, np.newaxis])[:, is_valid]
            self._blocks.append(_Block(offsets, bins[is_valid] * (BINS * STEPS)))
            self.samples += offsets.shape[1]

    def evaluate(self, matrix: Matrix) -> Evaluation:
        to_moving = rounded(self._from_world @ matrix)
        about_centre = to_moving.copy()
        about_centre[:3, 3] += to_moving[:3, :3] @ self._fixed.centre
        sampled = list(self._sample(rounded(about_centre)))
        counts = np.zeros(_CELLS + 1, np.intp)
        for cells, _ in sampled:
            counts += np.bincount(cells, minlength=len(counts))
        joint = counts[:-1].reshape(BINS, BINS, STEPS)
        inside = int(joint.sum())
        if inside <= MIN_OVERLAP * self.samples:
            return Evaluation(-np.inf, np.zeros(12), np.eye(12))
        value, slopes = _information(joint / inside)
        low, high = self._moving.low_high
        slopes *= BINS / (high - low)
        scores = np.append(slopes, 0).astype(np.float32)
        gradient, products = np.zeros((3, 4)), np.zeros((6, 10))
        for block, (cells, slope) in zip(self._blocks, sampled, strict=True):
            by_index = (slope * scores.take(cells)).astype(np.float64)
            gradient += np.einsum("an,bn->ab", by_index, block.arms)
            a, b = by_index[:, ::CURVATURE_STRIDE][_PAIRS_OF_3[0]], by_index[:, ::CURVATURE_STRIDE][_PAIRS_OF_3[1]]
            products += np.einsum("an,bn->ab", a * b, block.products_of_arms)
        to_entries = np.kron(to_moving[:3, :3].T, np.eye(4))
        return Evaluation(
            value,
            to_entries @ gradient.ravel() / inside,
            to_entries @ _all_products(products) @ to_entries.T * (CURVATURE_STRIDE / inside),
        )

    def _sample(self, about_centre: Matrix) -> Iterator[tuple[NDArray[np.intp], Singles]]:
        """For each block, the cells of the histogram, and the gradients (3, n) of the moving scan by its indices."""
        for block in self._blocks:
            values, gradients = self._moving.samples(transformed(about_centre, block.offsets))
            columns, is_valid = self._moving.steps(values, BINS * STEPS)
            yield np.where(is_valid, block.rows + columns, _CELLS), np.where(is_valid, gradients, 0)


def _all_products(products: Floats) -> Floats:
    """The symmetric (12, 12) of which `products` (6, 10) has one of each equal ones: by pairs of 3 and pairs of 4."""
    of_3, of_4 = np.zeros((3, 3), np.intp), np.zeros((4, 4), np.intp)
    for pairs, numbers in ((_PAIRS_OF_3, of_3), (_PAIRS_OF_4, of_4)):
        numbers[pairs] = numbers.T[pairs] = np.arange(len(pairs[0]))
    found: Floats = products[of_3[:, np.newaxis, :, np.newaxis], of_4[np.newaxis, :, np.newaxis, :]].reshape(12, 12)
    return found


def _information(joint: Floats) -> tuple[float, Floats]:
    """The mutual information of a histogram (BINS, BINS, STEPS), and its derivative by the value of each cell."""
    parts = joint @ _SPLINE.T
    padded = np.zeros((BINS, BINS + _SPLINE_WIDTH - 1))
    for n in range(_SPLINE_WIDTH):
        padded[:, n : n + BINS] += parts[..., n]
    expected = padded.sum(axis=0) * padded.sum(axis=1, keepdims=True)
    ratios = np.log(np.divide(padded, expected, out=np.ones_like(padded), where=padded > 0))
    windows = np.lib.stride_tricks.sliding_window_view(ratios, _SPLINE_WIDTH, axis=1)
    return float((padded * ratios).sum()), (windows @ _SPLINE_SLOPE).ravel()
