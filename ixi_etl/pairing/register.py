"""Estimate the rigid motion of the head between the two scans, and measure the similarity of a pair.

Legend: volumes are [k, j, i], slabs [z, y, x]; matrices are 4 x 4 and act on RAS mm. `t2_to_t1` maps a point of the
T2's world to the same tissue in the T1's; it is the identity if the headers alone align the scans.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ixi_etl.pairing.geometry import Matrix, import_sitk, rounded
from ixi_etl.scans.intensity import clip_spikes, count_values, in_blocks, percentiles, prefers_counting


@dataclass(frozen=True)
class Level:
    """One resolution of the search: grid of about `spacing_mm`, `samples` voxels of the T2, steps in mm."""

    spacing_mm: float
    samples: int
    first_step: float
    relax: float
    iterations: int


LEVELS = (Level(4.0, 33_000, 2.0, 0.8, 200), Level(1.0, 85_000, 0.5, 0.5, 60))
"""First a coarse grid, which must converge from far; then one of about 1 mm, for IXI the stored grid. A hundredth of
its voxels suffices, and no coarser grid is accurate to a tenth of a millimetre. Measured in docs/registration.md."""

HISTOGRAM_BINS = 48
NMI_BINS = 64
NMI_RANGE = (0.5, 99.5)  # percentiles
# Larger motion is flagged `large_motion`. The heads of the real pairs in docs/registration.md moved by 0.5 to 5.5 mm
# and 0.3 to 1.8 degrees; users of IXI report a few millimetres or degrees.
MAX_MOTION_MM, MAX_MOTION_DEG = 15.0, 15.0
# Entries of the result are rounded to 1e-6, or 0.1 um at the edge of a head. The error of the search is 50 um.
MATRIX_BITS = 20


def nmi(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Normalised mutual information of paired values, 2 I(A, B) / (H(A) + H(B)), from 0 to 1.

    Computed on 64 equal bins between the percentiles 0.5 and 99.5 of each array; values beyond go into the outermost
    bins. It is 0 if either array is constant or empty. Rounded to 9 digits, because the last digits of NumPy's
    logarithm depend on the CPU.
    """
    if a.size == 0 or a.min() == a.max() or b.min() == b.max():
        return 0.0
    counts = np.zeros(NMI_BINS**2)
    for bins_a, bins_b in zip(in_blocks(_bin_indices(a)), in_blocks(_bin_indices(b)), strict=True):
        counts += np.bincount(bins_a * NMI_BINS + bins_b, minlength=NMI_BINS**2)
    joint = counts.reshape(NMI_BINS, NMI_BINS) / a.size
    joint_entropy = _entropy(joint)
    marginal_entropies = _entropy(joint.sum(axis=0)) + _entropy(joint.sum(axis=1))
    if marginal_entropies <= 0:
        return 0.0
    return round(2 * (marginal_entropies - joint_entropy) / marginal_entropies, 9)


def _bin_indices(values: NDArray[Any]) -> NDArray[np.int16]:
    if not prefers_counting(values):
        return _bin_range(values, *np.percentile(values, NMI_RANGE))
    counted = count_values(values)
    bins = _bin_range(counted.values, *counted.percentiles(NMI_RANGE))
    return np.concatenate([bins[np.subtract(block, counted.low, dtype=np.intp)] for block in in_blocks(values)])


def _bin_range(values: NDArray[Any], low: float, high: float) -> NDArray[np.int16]:
    width = (high - low) or 1.0
    binned: NDArray[np.int16] = np.clip((values - low) * (NMI_BINS / width), 0, NMI_BINS - 1).astype(np.int16)
    return binned


def _entropy(shares: NDArray[np.float64]) -> float:
    positive = shares[shares > 0]
    return float(-(positive * np.log(positive)).sum())


def measure_motion(t2_to_t1: Matrix, points: NDArray[np.float64]) -> tuple[float, float]:
    """Mean displacement (mm) of `points` (n, 3) in RAS mm, and angle of rotation (degrees), rounded to 6 digits."""
    moved = points @ t2_to_t1[:3, :3].T + t2_to_t1[:3, 3]
    cosine = (np.trace(t2_to_t1[:3, :3]) - 1) / 2
    return (
        round(float(np.linalg.norm(moved - points, axis=1).mean()), 6) if len(points) else 0.0,
        round(float(np.degrees(np.arccos(np.clip(cosine, -1, 1)))), 6),
    )


@dataclass(frozen=True)
class Volume:
    """A whole volume as stored, [k, j, i], and its affine (voxel to RAS mm)."""

    voxels: NDArray[Any]
    affine: Matrix


class RegistrationError(Exception):
    """The registration failed; the pair keeps the alignment of its headers."""


def register(t1: Volume, t2: Volume) -> Matrix:
    """The rigid `t2_to_t1` that maximises the Mattes mutual information of two volumes.

    Starts from the headers' alignment. Deterministic: regular sampling, one thread, and rounded geometry.

    Raises:
        RegistrationError: the volumes do not overlap, are constant, or the search failed.
    """
    t1, t2 = (_clip_spikes(scan) for scan in (t1, t2))
    sitk = import_sitk()
    transform = sitk.Euler3DTransform()
    middle = (np.array(t2.voxels.shape[::-1]) - 1) / 2
    transform.SetCenter(rounded(t2.affine[:3, :3] @ middle + t2.affine[:3, 3]).tolist())
    for level in LEVELS:
        fixed, moving = _to_itk_image(t2, level.spacing_mm), _to_itk_image(t1, level.spacing_mm)
        search = sitk.ImageRegistrationMethod()
        search.SetMetricAsMattesMutualInformation(HISTOGRAM_BINS)
        search.SetMetricSamplingStrategy(search.REGULAR)
        search.SetMetricSamplingPercentage(min(1.0, level.samples / fixed.GetNumberOfPixels()), seed=1)
        # Central differences at the samples: twice as fast as whole gradient images, and half the error.
        search.MetricUseFixedImageGradientFilterOff()
        search.MetricUseMovingImageGradientFilterOff()
        search.SetInterpolator(sitk.sitkLinear)
        search.SetOptimizerAsRegularStepGradientDescent(
            learningRate=level.first_step,
            minStep=1e-3,
            numberOfIterations=level.iterations,
            relaxationFactor=level.relax,
            gradientMagnitudeTolerance=1e-8,
        )
        search.SetOptimizerScalesFromPhysicalShift()
        search.SetInitialTransform(transform, inPlace=True)
        try:
            search.Execute(fixed, moving)
        except RuntimeError as error:
            raise RegistrationError(str(error).strip().splitlines()[-1]) from error
    rotation = np.array(transform.GetMatrix()).reshape(3, 3)
    centre = np.array(transform.GetCenter())
    matrix = np.eye(4)
    matrix[:3, :3] = rotation
    matrix[:3, 3] = transform.GetTranslation() + centre - rotation @ centre
    if not np.isfinite(matrix).all():
        raise RegistrationError("the search ended in values that are not finite")
    return rounded(matrix, MATRIX_BITS)


def _clip_spikes(scan: Volume) -> Volume:
    """Clip artefacts: the bins of the mutual information span all values, and a spike would leave few for the head."""
    (low_high,) = percentiles(scan.voxels[np.newaxis])
    return replace(scan, voxels=clip_spikes(scan.voxels, *low_high))


def _to_itk_image(scan: Volume, spacing_mm: float) -> Any:
    """An ITK image in RAS mm with a spacing of about `spacing_mm`; each voxel is the mean of a block of stored ones.

    The centre of a block of n voxels is (n - 1) / 2 voxels from its first one. ITK's `Shrink` ignores this, which
    displaces the image by up to half a coarse voxel; `BinShrink` and the affine computed here do not.
    """
    sitk = import_sitk()
    stored_mm = rounded(np.linalg.norm(scan.affine[:3, :3], axis=0))
    factors = np.maximum(1, np.round(spacing_mm / stored_mm)).astype(int)
    native = np.ascontiguousarray(scan.voxels, scan.voxels.dtype.newbyteorder("="))
    image = sitk.Cast(sitk.GetImageFromArray(native), sitk.sitkFloat32)
    if factors.max() > 1:
        image = sitk.BinShrink(image, factors.tolist())
    first = scan.affine @ np.array([*((factors - 1) / 2), 1.0])
    # An ITK image has right angles, so use the nearest rotation. Shear in an IXI affine is rounding error.
    left, _, right = np.linalg.svd(scan.affine[:3, :3] / stored_mm)
    image.SetSpacing((stored_mm * factors).tolist())
    image.SetDirection(rounded(left @ right).ravel().tolist())
    image.SetOrigin(rounded(first[:3]).tolist())
    return image
