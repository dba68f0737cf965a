"""Make a pair of scans harder to register: bias, noise, a cropped neck, a removed face, thick slices, coarse grids.

All functions take and return `Volume`s; random ones take a generator. Volumes are turned to RAS first.
"""

from __future__ import annotations

from collections.abc import Callable

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from ixi_etl.pairing.geometry import Matrix
from ixi_etl.pairing.heads import Volume
from ixi_etl.scans.intensity import clip_spikes, otsu_threshold, percentiles

Pair = tuple[Volume, Volume]  # T1, T2
Rng = np.random.Generator

BIAS = 0.5  # largest logarithm of the factor: 0.6 to 1.65
NOISE = 0.07  # of the 99th percentile, Rician
NECK = 0.35  # share of the head's height that is cut off below
THICK_MM, COARSE_MM = 6.0, 2.0


def to_ras(scan: Volume) -> tuple[NDArray[np.float32], Matrix]:
    """The voxels [x, y, z] with axes towards R, A, S, and their affine."""
    orientation = nib.io_orientation(scan.affine)
    voxels = nib.apply_orientation(scan.voxels.transpose(2, 1, 0), orientation)
    affine = scan.affine @ nib.orientations.inv_ornt_aff(orientation, scan.voxels.shape[::-1])
    return np.ascontiguousarray(voxels, np.float32), affine


def from_ras(voxels: NDArray[np.float32], affine: Matrix) -> Volume:
    return Volume(np.ascontiguousarray(voxels.transpose(2, 1, 0)), affine)


def foreground(voxels: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Mask of the voxels above Otsu's threshold, artefacts clipped."""
    (low_high,) = percentiles(voxels[np.newaxis])
    mask: NDArray[np.bool_] = voxels > otsu_threshold(clip_spikes(voxels, *low_high))
    return mask


def add_bias(scan: Volume, rng: Rng) -> Volume:
    """Multiply by the exponential of a random polynomial of the second degree."""
    voxels, affine = to_ras(scan)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in voxels.shape), indexing="ij", sparse=True)
    a = rng.normal(0, 1, 9)
    field = a[0] * x + a[1] * y + a[2] * z + 0.7 * (a[3] * x * y + a[4] * y * z + a[5] * x * z)
    field = field + 0.7 * (a[6] * (x * x - 1 / 3) + a[7] * (y * y - 1 / 3) + a[8] * (z * z - 1 / 3))
    return from_ras((voxels * np.exp(field * (BIAS / np.abs(field).max()))).astype(np.float32), affine)


def add_noise(scan: Volume, rng: Rng) -> Volume:
    sigma = np.percentile(scan.voxels, 99) * NOISE
    real, imaginary = rng.normal(0, sigma, (2, *scan.voxels.shape))
    return Volume(np.hypot(scan.voxels + real, imaginary).astype(np.float32), scan.affine)


def crop_neck(scan: Volume) -> Volume:
    """Cut off the lowest part of the head, as a smaller field of view would."""
    voxels, affine = to_ras(scan)
    heights = np.flatnonzero(foreground(voxels).mean(axis=(0, 1)) > 0.01)
    start = int(heights[0] + NECK * (heights[-1] - heights[0]))
    shift = np.eye(4)
    shift[2, 3] = start
    return from_ras(voxels[:, :, start:], affine @ shift)


def deface(scan: Volume) -> Volume:
    """Set a wedge at the front and bottom of the head to 0."""
    voxels, affine = to_ras(scan)
    mask = foreground(voxels)
    depth, height = (_relative(mask.mean(axis=axes)) for axes in ((0, 2), (0, 1)))
    y, z = depth[:, np.newaxis], height[np.newaxis, :]
    face = (y > 0.5) & ((y - 0.55) / 0.45 > (z - 0.15) / 0.45)
    return from_ras(np.where(face[np.newaxis], 0, voxels).astype(np.float32), affine)


def _relative(profile: NDArray[np.floating]) -> NDArray[np.float64]:
    """Positions along an axis, 0 and 1 at the ends of the head."""
    inside = np.flatnonzero(profile > 0.01)
    positions: NDArray[np.float64] = (np.arange(len(profile)) - inside[0]) / max(inside[-1] - inside[0], 1)
    return positions


def average_blocks(scan: Volume, spacing_mm: tuple[float, float, float]) -> Volume:
    """Average blocks of voxels to about `spacing_mm` along R, A, S; 0 keeps an axis."""
    voxels, affine = to_ras(scan)
    factors = np.maximum(1, np.round(spacing_mm / np.linalg.norm(affine[:3, :3], axis=0))).astype(int)
    shape = np.array(voxels.shape) // factors
    cut = voxels[tuple(slice(0, n) for n in shape * factors)]
    blocks = cut.reshape([n for pair in zip(shape, factors, strict=True) for n in pair]).mean(axis=(1, 3, 5))
    scale = np.diag([*factors, 1.0])
    scale[:3, 3] = (factors - 1) / 2
    return from_ras(blocks.astype(np.float32), affine @ scale)


def _all(pair: Pair, rng: Rng) -> Pair:
    t1, t2 = crop_neck(deface(pair[0])), average_blocks(pair[1], (0, 0, THICK_MM))
    t1, t2 = add_bias(t1, rng), add_bias(t2, rng)
    return add_noise(t1, rng), add_noise(t2, rng)


CONDITIONS: dict[str, Callable[[Pair, Rng], Pair]] = {
    "none": lambda pair, rng: pair,
    "bias": lambda pair, rng: (add_bias(pair[0], rng), add_bias(pair[1], rng)),
    "noise": lambda pair, rng: (add_noise(pair[0], rng), add_noise(pair[1], rng)),
    "cropped neck": lambda pair, rng: (crop_neck(pair[0]), pair[1]),
    "defaced T1": lambda pair, rng: (deface(pair[0]), pair[1]),
    "6 mm slices": lambda pair, rng: (pair[0], average_blocks(pair[1], (0, 0, THICK_MM))),
    "2 mm grids": lambda pair, rng: (
        average_blocks(pair[0], (COARSE_MM,) * 3),
        average_blocks(pair[1], (COARSE_MM,) * 3),
    ),
    "all but 2 mm": _all,
}
