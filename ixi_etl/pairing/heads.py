"""A scan as the registration compares it: on the grids of two levels, and masked to the head on the coarse one.

Legend: volumes are [k, j, i]; matrices are 4 x 4 and act on RAS mm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ixi_etl.pairing.geometry import Matrix, import_sitk, rounded, transformed
from ixi_etl.pairing.mutual_information import Scan
from ixi_etl.scans.intensity import clip_spikes, otsu_threshold, percentiles


@dataclass(frozen=True)
class Level:
    """One resolution of the search.

    Attributes:
        spacing_mm: about that of the grids.
        samples: points in the head of the fixed scan at which the scans are compared.
        first_mm, last_mm: length of the first step, and the length below which the search ends.
        relax: factor by which the steps become shorter when the direction reverses.
        steps: largest number of steps.
    """

    spacing_mm: float
    samples: int
    first_mm: float
    last_mm: float
    relax: float
    steps: int


COARSE = Level(4.0, 32_000, 4.0, 0.02, 0.6, 100)
"""Must converge from far. Only voxels in both heads are compared: air, a neck in one scan only, and a face that was
removed from one would mislead it."""
FINE = Level(1.0, 80_000, 0.4, 0.01, 0.5, 40)
"""About 1 mm, for IXI the stored grid: a hundredth of its voxels suffices, and no coarser grid is accurate to a tenth
of a millimetre. Measured in docs/registration.md."""
RECURRENCE = np.array([0.8191725133961645, 0.6710436067037893, 0.5497004779019703])
"""1/g, 1/g^2, 1/g^3 with g^4 = g + 1: multiples of it, modulo 1, fill a cube evenly (M. Roberts 2018)."""


@dataclass(frozen=True)
class Volume:
    """A whole volume as stored, [k, j, i], and its affine (voxel to RAS mm)."""

    voxels: NDArray[Any]
    affine: Matrix


class RegistrationError(Exception):
    """The registration failed; the pair keeps the alignment of its headers."""


@dataclass(frozen=True)
class Head:
    """A scan on the grids of both levels.

    Attributes:
        scans: by level; the voxels of the coarse one are NaN except in and near the head.
    """

    scans: Mapping[Level, Scan]

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """In and near the head, on the coarse grid."""
        mask: NDArray[np.bool_] = ~np.isnan(self.scans[COARSE].voxels)
        return mask

    @cached_property
    def points(self) -> NDArray[np.float64]:
        """(n, 3) RAS mm, some of the voxels in the mask."""
        affine = self.scans[COARSE].affine
        return transformed(affine, np.argwhere(self.mask)[::23, ::-1].T.astype(np.float64)).T

    def samples(self, count: int) -> NDArray[np.float64]:
        """About `count` points (3, n) in the mask, RAS mm, evenly spread and between the voxels.

        Samples at voxels would favour motions by whole voxels (Thevenaz, Bierlaire and Unser 2008).
        """
        tries = min(8 * count, count * self.mask.size // int(np.count_nonzero(self.mask)))
        size = np.array(self.mask.shape[::-1])[:, np.newaxis]
        indices = (0.5 + np.arange(tries, dtype=np.float64) * RECURRENCE[:, np.newaxis]) % 1 * size
        i, j, k = indices.astype(np.intp)
        return transformed(self.scans[COARSE].affine, indices[:, self.mask[k, j, i]] - 0.5)


def prepare(scan: Volume) -> Head:
    """A scan with a mask of its head: the largest bright object, filled, and three voxels around it.

    The outermost of these are lost, because only cells of eight voxels in the mask are compared.

    Raises:
        RegistrationError: the scan is constant, or nothing in it is large.
    """
    sitk = import_sitk()
    voxels, affine = averaged(scan, COARSE.spacing_mm)
    # Artefacts are clipped: the bins span all values, and a spike would leave few for the head.
    voxels = clip_spikes(voxels, *percentiles(voxels[np.newaxis])[0])
    low, high = float(voxels.min()), float(voxels.max())
    if low == high:
        raise RegistrationError("a scan is constant")
    # Halfway to Otsu's threshold, because strong bias fields leave parts of a head dark.
    is_bright = voxels > (low + otsu_threshold(voxels)) / 2
    bright = sitk.GetImageFromArray(opened(is_bright).astype(np.uint8))
    parts = sitk.RelabelComponent(sitk.ConnectedComponent(bright), sortByObjectSize=True)
    head = sitk.GetArrayFromImage(parts) == 1
    if not head.any():
        raise RegistrationError("a scan shows no head")
    mask = filled(head)
    for _ in range(3):
        mask = _dilated(mask)
    masked = np.where(mask, voxels, np.float32(np.nan))
    return Head({COARSE: Scan(masked, affine, (low, high)), FINE: Scan(*averaged(scan, FINE.spacing_mm), (low, high))})


def filled(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask with its holes filled: all but the parts of its background that touch an edge of the volume.

    Faster than ITK's BinaryFillhole by a factor of four.
    """
    sitk = import_sitk()
    parts = sitk.GetArrayFromImage(sitk.ConnectedComponent(sitk.GetImageFromArray((~mask).astype(np.uint8))))
    edges = [np.moveaxis(parts, axis, 0)[[0, -1]].ravel() for axis in range(parts.ndim)]
    found: NDArray[np.bool_] = ~np.isin(parts, np.setdiff1d(np.concatenate(edges), [0]))
    return found


def opened(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The morphological opening [k, j, i] by ITK's ball of radius 1, which takes ITK 30 times as long."""
    return _dilated(~_dilated(~mask))


def _dilated(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask, and all voxels beside it along at most two axes: the ball is the union of three squares."""
    found = mask.copy()
    for axes in combinations(range(3), 2):
        square = mask
        for axis in axes:
            along, wider = np.moveaxis(square, axis, 0), square.copy()
            np.moveaxis(wider, axis, 0)[1:] |= along[:-1]
            np.moveaxis(wider, axis, 0)[:-1] |= along[1:]
            square = wider
        found |= square
    return found


def averaged(scan: Volume, spacing_mm: float) -> tuple[NDArray[Any], Matrix]:
    """A scan with a spacing of about `spacing_mm`, each voxel the mean of a block of stored ones; and its affine.

    Voxels that do not fill a block at the far end are left out. The centre of a block of n voxels is (n - 1) / 2 voxels
    from its first one.
    """
    factors = np.round(spacing_mm / np.linalg.norm(scan.affine[:3, :3], axis=0))
    factors = factors.clip(1, scan.voxels.shape[::-1]).astype(int)
    voxels = scan.voxels
    for axis, factor in enumerate(factors[::-1]):
        if factor > 1:
            blocks = np.split(voxels, [voxels.shape[axis] // factor * factor], axis)[0]
            shape = (*voxels.shape[:axis], -1, factor, *voxels.shape[axis + 1 :])
            voxels = blocks.reshape(shape).sum(axis + 1, dtype=np.float32) / np.float32(factor)
    to_stored = np.diag([*factors, 1.0])
    to_stored[:3, 3] = (factors - 1) / 2
    return voxels, rounded(scan.affine @ to_stored)
