"""How far the head moved between the two scans: a rigid matrix, and the similarity that says whether to believe it.

Legend: volumes are [k, j, i], slabs [z, y, x]; matrices are 4 x 4 and act on RAS mm. `t2_to_t1` takes a point of the
T2's world to the same tissue in the T1's; the identity where the headers alone align the two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ixi_etl.align import Matrix, itk, rounded
from ixi_etl.intensity import better_counted, clip_spikes, count_values, in_parts, percentiles


@dataclass(frozen=True)
class Level:
    """One resolution of the search: about `spacing_mm`, `samples` of the T2's voxels, steps in mm."""

    spacing_mm: float
    samples: int
    first_step: float
    relax: float
    iterations: int


LEVELS = (Level(4.0, 33_000, 2.0, 0.8, 200), Level(1.0, 85_000, 0.5, 0.5, 60))
"""Coarse, which must converge from far, then fine, which is the stored grid itself: a hundredth of its voxels hold as
much as is needed, and no coarser grid gives a tenth of a millimetre. Measured in docs/registration.md."""

HISTOGRAM_BINS = 48
NMI_BINS = 64
NMI_RANGE = (0.5, 99.5)  # percentiles
# Of a registered pair: more is flagged `large_motion`. The heads of the real pairs of docs/registration.md moved by 0.5
# to 5.5 mm and 0.3 to 1.8 degrees, and those of IXI by a few millimetres or degrees, as its users report.
MAX_MOTION_MM, MAX_MOTION_DEG = 15.0, 15.0
# Of the kept matrix: its entries are rounded to 1e-6, or 0.1 um at the edge of a head. The search errs by 50 um.
MATRIX_BITS = 20


def nmi(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Normalised mutual information of paired values, 2 I(A, B) / (H(A) + H(B)), from 0 to 1.

    On 64 equal bins between the percentiles 0.5 and 99.5 of each, values beyond put into the outermost. 0 where either
    is constant or there are no values. Rounded to 9 digits: NumPy's logarithm depends on the CPU in the last ones.
    """
    if a.size == 0 or a.min() == a.max() or b.min() == b.max():
        return 0.0
    counts = np.zeros(NMI_BINS**2)
    for bins_a, bins_b in zip(in_parts(_bins(a)), in_parts(_bins(b)), strict=True):
        counts += np.bincount(bins_a * NMI_BINS + bins_b, minlength=NMI_BINS**2)
    joint = counts.reshape(NMI_BINS, NMI_BINS) / a.size
    of_both = _entropy(joint)
    of_each = _entropy(joint.sum(axis=0)) + _entropy(joint.sum(axis=1))
    return round(2 * (of_each - of_both) / of_each, 9) if of_each > 0 else 0.0


def _bins(values: NDArray[Any]) -> NDArray[np.int16]:
    if not better_counted(values):
        return _binned(values, *np.percentile(values, NMI_RANGE))
    counted = count_values(values)
    bins = _binned(counted.values, *counted.percentiles(NMI_RANGE))
    return np.concatenate([bins[np.subtract(part, counted.low, dtype=np.intp)] for part in in_parts(values)])


def _binned(values: NDArray[Any], low: float, high: float) -> NDArray[np.int16]:
    width = (high - low) or 1.0
    binned: NDArray[np.int16] = np.clip((values - low) * (NMI_BINS / width), 0, NMI_BINS - 1).astype(np.int16)
    return binned


def _entropy(shares: NDArray[np.float64]) -> float:
    positive = shares[shares > 0]
    return float(-(positive * np.log(positive)).sum())


def motion_of(t2_to_t1: Matrix, points: NDArray[np.float64]) -> tuple[float, float]:
    """Mean displacement (mm) of points (n, 3) in RAS mm, and the angle of rotation (degrees), to 6 digits."""
    moved = points @ t2_to_t1[:3, :3].T + t2_to_t1[:3, 3]
    cosine = (np.trace(t2_to_t1[:3, :3]) - 1) / 2
    return (
        round(float(np.linalg.norm(moved - points, axis=1).mean()), 6) if len(points) else 0.0,
        round(float(np.degrees(np.arccos(np.clip(cosine, -1, 1)))), 6),
    )


@dataclass(frozen=True)
class Scan:
    """A whole volume as stored, [k, j, i], and its affine."""

    voxels: NDArray[Any]
    affine: Matrix


class RegistrationError(Exception):
    """The registration gave nothing; the pair stays as its headers align it."""


def register(t1: Scan, t2: Scan) -> Matrix:
    """The rigid `t2_to_t1` that makes the Mattes mutual information of the two volumes largest.

    Starts from the headers' alignment. Deterministic: regular sampling, one thread, and rounded geometry.

    Raises:
        RegistrationError: the volumes do not overlap, are flat, or the search broke off.
    """
    t1, t2 = (_without_spikes(scan) for scan in (t1, t2))
    sitk = itk()
    transform = sitk.Euler3DTransform()
    middle = (np.array(t2.voxels.shape[::-1]) - 1) / 2
    transform.SetCenter(rounded(t2.affine[:3, :3] @ middle + t2.affine[:3, 3]).tolist())
    for level in LEVELS:
        fixed, moving = _image(t2, level.spacing_mm), _image(t1, level.spacing_mm)
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


def _without_spikes(scan: Scan) -> Scan:
    """Mutual information has bins from the least to the largest value: one spike would leave few for the head."""
    (low_high,) = percentiles(scan.voxels[np.newaxis])
    return replace(scan, voxels=clip_spikes(scan.voxels, *low_high))


def _image(scan: Scan, spacing_mm: float) -> Any:
    """An ITK image of about `spacing_mm`, in RAS mm, each voxel the mean of a block of stored ones.

    The centre of a block of n voxels is (n - 1) / 2 voxels from its first; ITK's `Shrink` takes the first voxel for
    it, which displaces the image by up to half a coarse voxel. `BinShrink` does not, nor does this affine.
    """
    sitk = itk()
    stored_mm = rounded(np.linalg.norm(scan.affine[:3, :3], axis=0))
    factors = np.maximum(1, np.round(spacing_mm / stored_mm)).astype(int)
    native = np.ascontiguousarray(scan.voxels, scan.voxels.dtype.newbyteorder("="))
    image = sitk.Cast(sitk.GetImageFromArray(native), sitk.sitkFloat32)
    if factors.max() > 1:
        image = sitk.BinShrink(image, factors.tolist())
    first = scan.affine @ np.array([*((factors - 1) / 2), 1.0])
    # An ITK image has right angles: the nearest rotation. What shear there is in an IXI affine is rounding.
    left, _, right = np.linalg.svd(scan.affine[:3, :3] / stored_mm)
    image.SetSpacing((stored_mm * factors).tolist())
    image.SetDirection(rounded(left @ right).ravel().tolist())
    image.SetOrigin(rounded(first[:3]).tolist())
    return image
