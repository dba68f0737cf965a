"""Estimate the motion of the head between the two scans of a pair, rigid or affine, and the error of that estimate.

Legend: volumes are [k, j, i], slabs [z, y, x]; matrices are 4 x 4 and act on RAS mm. The fixed scan is that of the
reference modality. `fixed_to_moving` maps a point of its world to the same tissue in the moving scan's; it is the
identity if the headers alone align the scans.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ixi_etl.pairing.geometry import Matrix, import_sitk, rounded
from ixi_etl.scans.intensity import clip_spikes, otsu_threshold, percentiles


@dataclass(frozen=True)
class Level:
    """One resolution of the search: grid of about `spacing_mm`, `samples` voxels of the fixed scan, steps in mm."""

    spacing_mm: float
    samples: int
    first_step: float
    relax: float
    iterations: int


COARSE = Level(4.0, 33_000, 2.0, 0.8, 200)
"""Must converge from far. Only voxels in both heads are compared: air, a neck in one scan only, and a face that was
removed from one would mislead it."""
FINE = Level(1.0, 85_000, 0.5, 0.5, 60)
"""About 1 mm, for IXI the stored grid: a hundredth of its voxels suffices, and no coarser grid is accurate to a tenth
of a millimetre. Measured in docs/registration.md."""
AFFINE = replace(FINE, iterations=100)
"""From the rigid result. The steps of an affine search are estimated: see `_search`."""
MIN_STRETCH, MAX_STRETCH = 0.8, 1.25
"""Stretch along any direction beyond which an affine search has run away. Scanners differ by a few per cent."""
TRIAL = replace(COARSE, samples=6_000)
"""One of many starts."""
MIRROR = replace(TRIAL, relax=0.6, iterations=60)
"""A first, short comparison with a mirrored scan."""

HISTOGRAM_BINS = 48
# Larger motion is flagged `large_motion`. The heads of the real pairs in docs/registration.md moved by 0.5 to 5.5 mm
# and 0.3 to 1.8 degrees; users of IXI report a few millimetres or degrees.
MAX_MOTION_MM, MAX_MOTION_DEG = 15.0, 15.0
RETRY_MM = 1.0
"""Disagreement of two coarse searches from which more starts are tried. docs/registration.md has the distribution."""
TRIAL_ANGLE_DEG = 8.0
MIRROR_CHECK_MM = 2.0
"""Disagreement of two searches for the mirror image up to which it is taken to fit."""
MIRROR_TRIAL_GAIN = 0.75
"""As `MIRROR_GAIN`, below which the short comparison suffices."""
MIRROR_GAIN = 1.03
"""Ratio of the mutual informations of the mirrored and the stored moving scan with the fixed one, above which a header
is wrong. In 14 real T1s and T2s, half of them with added faults, the right one had 1.09 to 1.75 times that of its
mirror image."""
# Entries of the result are rounded to 1e-6, or 0.1 um at the edge of a head. The error of the search is 50 um.
MATRIX_BITS = 20
NOT_RIGID = 1e-5  # of an entry of R R^T; rounding alone changes them by 2e-6


def measure_motion(fixed_to_moving: Matrix, points: NDArray[np.float64]) -> tuple[float, float]:
    """Mean displacement (mm) of `points` (n, 3) in RAS mm, and angle of rotation (degrees), rounded to 6 digits.

    The angle of an affine matrix is that of the nearest rotation, the first factor of its polar decomposition.
    """
    moved = points @ fixed_to_moving[:3, :3].T + fixed_to_moving[:3, 3]
    rotation = fixed_to_moving[:3, :3]
    if np.abs(rotation @ rotation.T - np.eye(3)).max() > NOT_RIGID:
        left, _, right = np.linalg.svd(rotation)
        rotation = left @ right
    cosine = (np.trace(rotation) - 1) / 2
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


@dataclass(frozen=True)
class Registration:
    """The result of `register`.

    Attributes:
        fixed_to_moving: the motion that was found.
        check: the same motion, found by a search with exchanged roles of the scans; affine if the result is.
        disagreement_mm: mean distance over the head between the results of the two first searches, which are rigid.
        is_mirrored: whether the mirror image of the moving scan fits the fixed one better.
    """

    fixed_to_moving: Matrix
    check: Matrix
    disagreement_mm: float = 0.0
    is_mirrored: bool = False

    def error_mm(self, points: NDArray[np.float64], alignment: Matrix) -> float:
        """Estimated error (mm) of an `alignment`: its mean distance from `check` at `points` (n, 3) in RAS mm.

        At least `disagreement_mm`: two searches disagree more, the flatter the similarity is around its maximum, and
        more starts do not always find the right place. Rounded to 6 digits. Compared in docs/registration.md.
        """
        return round(max(self.disagreement_mm, mean_distance(alignment, self.check, points)), 6)


def mean_distance(a: Matrix, b: Matrix, points: NDArray[np.float64]) -> float:
    """Mean distance (mm) between the positions that two matrices give to `points` (n, 3) in RAS mm."""
    difference = a - b
    return float(np.linalg.norm(points @ difference[:3, :3].T + difference[:3, 3], axis=1).mean())


@dataclass(frozen=True)
class _Head:
    """A scan on the grid of a level.

    Attributes:
        image: ITK image in RAS mm.
        mask: ITK image on the same grid, 1 in and near the head; None where all voxels are compared.
        points: (n, 3) RAS mm, some of the voxels in the mask.
        centre: RAS mm, of the grid; rotations are about it.
    """

    image: Any
    mask: Any
    points: NDArray[np.float64]
    centre: NDArray[np.float64]


def register(moving_scan: Volume, fixed_scan: Volume, *, is_affine: bool = False) -> Registration:
    """The rigid or affine `fixed_to_moving` that maximises the Mattes mutual information of two volumes.

    Starts from the headers' alignment. A second coarse search exchanges the roles of the scans: two searches that see
    other samples and another metric rarely end in the same wrong place. If they disagree, more starts are tried.
    An affine search starts from the rigid result. Its check has exchanged roles too, the same level, and starts from
    the rigid check.
    Deterministic: regular sampling, one thread, and rounded geometry.

    Raises:
        RegistrationError: the volumes do not overlap, are constant, or a search failed or ran away.
    """
    moving_scan, fixed_scan = (_clip_spikes(scan) for scan in (moving_scan, fixed_scan))
    fixed, moving = (_head(scan, COARSE.spacing_mm) for scan in (fixed_scan, moving_scan))
    start = np.eye(4)
    coarse, _ = _search(COARSE, fixed, moving, start)
    check = _inverse_search(fixed, moving, start)
    disagreement_mm = mean_distance(coarse, check, fixed.points)
    is_poor = disagreement_mm > RETRY_MM
    if is_poor:
        coarse = _best_of_many(fixed, moving, [coarse, check, start])
    whole_fixed, whole_moving = (_whole(scan, FINE.spacing_mm) for scan in (fixed_scan, moving_scan))
    fine, _ = _search(FINE, whole_fixed, whole_moving, coarse)
    if is_poor:
        check = _inverse_search(fixed, moving, _displaced(fine, fixed))
    is_mirrored = _fits_better_mirrored(fixed, moving, fine, is_poor)
    if is_affine and not is_mirrored:
        fine = _affine_search(whole_fixed, whole_moving, fine)
        check = np.linalg.inv(_affine_search(whole_moving, whole_fixed, _inverse(check))).astype(np.float64)
    return Registration(rounded(fine, MATRIX_BITS), rounded(check, MATRIX_BITS), disagreement_mm, is_mirrored)


def _affine_search(fixed: _Head, moving: _Head, start: Matrix) -> Matrix:
    """The affine matrix from the fixed to the moving scan's world that a search from `start` finds."""
    found, _ = _search(AFFINE, fixed, moving, start, is_affine=True)
    stretches = np.linalg.svd(found[:3, :3], compute_uv=False)
    if np.linalg.det(found[:3, :3]) < 0 or stretches.min() < MIN_STRETCH or stretches.max() > MAX_STRETCH:
        raise RegistrationError(f"the search stretched the head by {stretches.min():.2f} to {stretches.max():.2f}")
    return found


def _inverse_search(fixed: _Head, moving: _Head, start: Matrix) -> Matrix:
    """The coarse search with exchanged roles."""
    return _inverse(_search(COARSE, moving, fixed, _inverse(start))[0])


def _inverse(matrix: Matrix) -> Matrix:
    """The inverse of a rigid matrix."""
    inverse = np.eye(4)
    inverse[:3, :3] = matrix[:3, :3].T
    inverse[:3, 3] = -matrix[:3, :3].T @ matrix[:3, 3]
    return inverse


def _fits_better_mirrored(fixed: _Head, moving: _Head, found: Matrix, is_poor: bool) -> bool:
    """Whether the mirror image of the moving scan fits the fixed scan, and better than the scan as stored.

    A wrong header mostly makes the searches disagree (`is_poor`), and `found` far from the right place: more starts.
    """
    mirrored = _mirrored(moving)
    try:
        start = _best_of_many(fixed, mirrored, [np.eye(4), found]) if is_poor else found
        for level, gain in ((MIRROR, MIRROR_TRIAL_GAIN), (COARSE, MIRROR_GAIN)):
            start, as_mirrored = _search(level, fixed, mirrored, start)
            _, as_stored = _search(level, fixed, moving, found)
            if as_mirrored >= gain * as_stored:  # negative mutual informations
                return False
        # Scans of two people fit about as well mirrored as not, but then the searches end in different places.
        check = _inverse_search(fixed, mirrored, _displaced(start, fixed))
    except RegistrationError:
        return False
    return mean_distance(start, check, fixed.points) <= MIRROR_CHECK_MM


def _mirrored(head: _Head) -> _Head:
    """A head with left and right exchanged, at the sagittal plane through its middle."""
    middle = (head.points[:, 0].min() + head.points[:, 0].max()) / 2
    mirrored = {}
    for name, image in (("image", head.image), ("mask", head.mask)):
        mirrored[name] = copy = import_sitk().Image(image)
        direction, origin = np.array(image.GetDirection()), np.array(image.GetOrigin())
        copy.SetDirection((direction * np.repeat([-1, 1, 1], 3)).tolist())
        copy.SetOrigin([2 * middle - origin[0], *origin[1:]])
    return replace(head, **mirrored)


def _best_of_many(fixed: _Head, moving: _Head, starts: list[Matrix]) -> Matrix:
    """The best of coarse searches from `starts`, and from rotations of the last one to both sides about each axis."""
    turned = [
        starts[-1] @ _rotation(sign * TRIAL_ANGLE_DEG * axis, fixed.centre) for axis in np.eye(3) for sign in (1, -1)
    ]
    trials = [_search(TRIAL, fixed, moving, start) for start in (*starts, *turned)]
    best, _ = min(trials, key=lambda trial: trial[1])
    return _search(COARSE, fixed, moving, best)[0]


def _displaced(found: Matrix, fixed: _Head) -> Matrix:
    """A start for a search that should come back to `found`."""
    return found @ _rotation([4, -4, 4], fixed.centre)


def _rotation(angles_deg: Any, centre: NDArray[np.float64]) -> Matrix:
    transform = import_sitk().Euler3DTransform()
    transform.SetCenter(centre.tolist())
    transform.SetRotation(*np.deg2rad(angles_deg).tolist())
    return _matrix_of(transform)


def _search(
    level: Level, fixed: _Head, moving: _Head, start: Matrix, *, is_affine: bool = False
) -> tuple[Matrix, float]:
    """The matrix from the fixed to the moving scan's world that the search finds, and its metric (the less the better).

    The matrix is rigid, unless the search `is_affine`. Then the length of each step is estimated, so that no point
    moves by more than `level.first_step` mm: an entry of an affine matrix moves points a hundred times as far as a
    shift of the same number, and a fixed length would throw the search far away.

    Raises:
        RegistrationError: the search failed.
    """
    sitk = import_sitk()
    start = rounded(start)
    transform = sitk.AffineTransform(3) if is_affine else sitk.Euler3DTransform()
    transform.SetCenter(fixed.centre.tolist())
    transform.SetMatrix(start[:3, :3].ravel().tolist(), *([] if is_affine else [1e-6]))  # the tolerance of a rotation
    transform.SetTranslation((start[:3, 3] - fixed.centre + start[:3, :3] @ fixed.centre).tolist())
    search = sitk.ImageRegistrationMethod()
    search.SetMetricAsMattesMutualInformation(HISTOGRAM_BINS)
    search.SetMetricSamplingStrategy(search.REGULAR)
    search.SetMetricSamplingPercentage(min(1.0, level.samples / fixed.image.GetNumberOfPixels()), seed=1)
    if fixed.mask is not None:
        search.SetMetricFixedMask(fixed.mask)
        search.SetMetricMovingMask(moving.mask)
    # Central differences at the samples: twice as fast as whole gradient images, and half the error.
    search.MetricUseFixedImageGradientFilterOff()
    search.MetricUseMovingImageGradientFilterOff()
    search.SetInterpolator(sitk.sitkLinear)
    search.SetOptimizerAsRegularStepGradientDescent(
        learningRate=level.first_step,
        minStep=1e-5 if is_affine else 1e-3,
        numberOfIterations=level.iterations,
        relaxationFactor=level.relax,
        gradientMagnitudeTolerance=1e-8,
        estimateLearningRate=search.EachIteration if is_affine else search.Never,
        maximumStepSizeInPhysicalUnits=level.first_step,
    )
    search.SetOptimizerScalesFromPhysicalShift()
    search.SetInitialTransform(transform, inPlace=True)
    try:
        search.Execute(fixed.image, moving.image)
    except RuntimeError as error:
        raise RegistrationError(str(error).strip().splitlines()[-1]) from error
    matrix = _matrix_of(transform)
    if not np.isfinite(matrix).all():
        raise RegistrationError("the search ended in values that are not finite")
    return matrix, search.GetMetricValue()


def _matrix_of(transform: Any) -> Matrix:
    rotation = np.array(transform.GetMatrix()).reshape(3, 3)
    centre = np.array(transform.GetCenter())
    matrix = np.eye(4)
    matrix[:3, :3] = rotation
    matrix[:3, 3] = transform.GetTranslation() + centre - rotation @ centre
    return matrix


def _whole(scan: Volume, spacing_mm: float) -> _Head:
    """A scan whose voxels are all compared."""
    middle = (np.array(scan.voxels.shape[::-1]) - 1) / 2
    centre = rounded(scan.affine[:3, :3] @ middle + scan.affine[:3, 3])
    return _Head(_to_itk_image(scan, spacing_mm), None, np.zeros((0, 3)), centre)


def head_points(scan: Volume) -> NDArray[np.float64]:
    """Positions (n, 3) in RAS mm of some voxels in and near the head."""
    return _head(scan, COARSE.spacing_mm).points


def _head(scan: Volume, spacing_mm: float) -> _Head:
    """A scan with a mask of its head: the largest bright object, filled, and two voxels around it."""
    sitk = import_sitk()
    head = _whole(scan, spacing_mm)
    voxels = sitk.GetArrayViewFromImage(head.image)
    # Halfway to Otsu's threshold, because strong bias fields leave parts of a head dark.
    threshold = (float(voxels.min()) + otsu_threshold(voxels)) / 2
    bright = sitk.BinaryMorphologicalOpening(head.image > threshold, [1, 1, 1])
    parts = sitk.RelabelComponent(sitk.ConnectedComponent(bright), sortByObjectSize=True)
    mask = sitk.BinaryDilate(sitk.BinaryFillhole(parts == 1), [2, 2, 2])
    inside = np.argwhere(sitk.GetArrayViewFromImage(mask))[::23, ::-1]
    origin, spacing = np.array(mask.GetOrigin()), np.array(mask.GetSpacing())
    direction = np.array(mask.GetDirection()).reshape(3, 3)
    return replace(head, mask=mask, points=(inside * spacing) @ direction.T + origin)


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
