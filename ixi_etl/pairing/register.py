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

from ixi_etl.pairing.geometry import Matrix, import_sitk, rounded, transformed
from ixi_etl.pairing.heads import COARSE, FINE, Head, Level, RegistrationError, Volume, prepare
from ixi_etl.pairing.mutual_information import RADIUS_MM, MutualInformation

MIN_STRETCH, MAX_STRETCH = 0.8, 1.25
"""Stretch along any direction beyond which an affine search has run away. Scanners differ by a few per cent."""

# Larger motion is flagged `large_motion`. The heads of the real pairs in docs/registration.md moved by 0.5 to 5.5 mm
# and 0.3 to 1.8 degrees; users of IXI report a few millimetres or degrees.
MAX_MOTION_MM, MAX_MOTION_DEG = 15.0, 15.0
RETRY_MM = 1.0
"""Disagreement of two coarse searches from which more starts are tried. docs/registration.md has the distribution."""
TRIAL_ANGLE_DEG = 8.0
MIRROR_LAST_MM = 0.2
"""Length of the steps below which the search for the mirror image ends: it decides, and need not be accurate."""
NEWTON_GAIN = 2.0
"""Times the length of Newton's own step that a step may have near the end. The curvature is only an estimate, so 1
takes longer."""
MIRROR_CHECK_MM = 2.0
"""Disagreement of two searches for the mirror image up to which it is taken to fit."""
MIRROR_GAIN = 1.03
"""Ratio of the mutual informations of the mirrored and the stored moving scan with the fixed one, above which a header
is wrong. In 14 real T1s and T2s, half of them with added faults, the right one had 1.14 to 1.63 times that of its
mirror image."""
# Entries of the result are rounded to 1e-6, or 0.1 um at the edge of a head. The error of the search is 50 um.
MATRIX_BITS = 20
NOT_RIGID = 1e-5  # of an entry of R R^T; rounding alone changes them by 2e-6


def measure_motion(fixed_to_moving: Matrix, points: NDArray[np.float64]) -> tuple[float, float]:
    """Mean displacement (mm) of `points` (n, 3) in RAS mm, and angle of rotation (degrees), rounded to 6 digits.

    The angle of an affine matrix is that of the nearest rotation, the first factor of its polar decomposition.
    """
    moved = transformed(fixed_to_moving, points.T).T
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
    return float(np.linalg.norm(transformed(a - b, points.T), axis=0).mean())


def register(moving_scan: Volume, fixed_scan: Volume, *, is_affine: bool = False) -> Registration:
    """The rigid or affine `fixed_to_moving` that maximises the mutual information of two volumes.

    Starts from the headers' alignment. A second coarse search exchanges the roles of the scans: two searches that see
    other samples and another metric rarely end in the same wrong place. If they disagree, more starts are tried.
    An affine search starts from the rigid result. Its check has exchanged roles too, the same level, and starts from
    the rigid check.
    Deterministic: no random samples, one thread, and rounded geometry.

    Raises:
        RegistrationError: the volumes do not overlap, are constant, or show no head, or an affine search ran away.
    """
    fixed, moving = prepare(fixed_scan), prepare(moving_scan)
    start = np.eye(4)
    coarse, similarity = _search(COARSE, fixed, moving, start)
    check = _inverse_search(fixed, moving, start)
    disagreement_mm = mean_distance(coarse, check, fixed.points)
    is_poor = disagreement_mm > RETRY_MM
    if is_poor:
        coarse, similarity = _best_of_many(fixed, moving, [coarse, check, start])
    fine, _ = _search(FINE, fixed, moving, coarse)
    if is_poor:
        check = _inverse_search(fixed, moving, _displaced(fine, fixed))
    is_mirrored = _fits_better_mirrored(fixed, moving, fine, similarity, is_poor)
    if is_affine and not is_mirrored:
        fine = _affine_search(fixed, moving, fine)
        check = np.linalg.inv(_affine_search(moving, fixed, _inverse(check))).astype(np.float64)
    return Registration(rounded(fine, MATRIX_BITS), rounded(check, MATRIX_BITS), disagreement_mm, is_mirrored)


def _affine_search(fixed: Head, moving: Head, start: Matrix) -> Matrix:
    """The affine matrix from the fixed to the moving scan's world that a search from `start` finds."""
    found, _ = _search(FINE, fixed, moving, start, is_affine=True)
    stretches = np.linalg.svd(found[:3, :3], compute_uv=False)
    if np.linalg.det(found[:3, :3]) < 0 or stretches.min() < MIN_STRETCH or stretches.max() > MAX_STRETCH:
        raise RegistrationError(f"the search stretched the head by {stretches.min():.2f} to {stretches.max():.2f}")
    return found


def _inverse_search(fixed: Head, moving: Head, start: Matrix) -> Matrix:
    """The coarse search with exchanged roles."""
    return _inverse(_search(COARSE, moving, fixed, _inverse(start))[0])


def _inverse(matrix: Matrix) -> Matrix:
    """The inverse of a rigid matrix."""
    inverse = np.eye(4)
    inverse[:3, :3] = matrix[:3, :3].T
    inverse[:3, 3] = -matrix[:3, :3].T @ matrix[:3, 3]
    return inverse


def _fits_better_mirrored(fixed: Head, moving: Head, found: Matrix, similarity: float, is_poor: bool) -> bool:
    """Whether the mirror image of the moving scan fits the fixed scan, and better than the scan as stored.

    The scan as stored has the `similarity` (nats, coarse level). A wrong header mostly makes the searches disagree
    (`is_poor`), and `found` far from the right place: more starts.
    """
    mirrored = _mirrored(moving)
    try:
        if is_poor:
            start, mirrored_similarity = _best_of_many(fixed, mirrored, [np.eye(4), found])
        else:
            start, mirrored_similarity = _search(COARSE, fixed, mirrored, found, last_mm=MIRROR_LAST_MM)
        if mirrored_similarity < MIRROR_GAIN * similarity:
            return False
        # Scans of two people fit about as well mirrored as not, but then the searches end in different places.
        check = _inverse_search(fixed, mirrored, _displaced(start, fixed))
    except RegistrationError:
        return False
    return mean_distance(start, check, fixed.points) <= MIRROR_CHECK_MM


def _mirrored(head: Head) -> Head:
    """A head with left and right exchanged, at the sagittal plane through its middle."""
    mirror = np.diag([-1.0, 1, 1, 1])
    mirror[0, 3] = head.points[:, 0].min() + head.points[:, 0].max()
    return Head({level: replace(scan, affine=mirror @ scan.affine) for level, scan in head.scans.items()})


def _best_of_many(fixed: Head, moving: Head, starts: list[Matrix]) -> tuple[Matrix, float]:
    """The best of coarse searches from `starts`, and from rotations of the last one to both sides about each axis."""
    centre = fixed.scans[COARSE].centre
    turned = [starts[-1] @ _rotation(sign * TRIAL_ANGLE_DEG * axis, centre) for axis in np.eye(3) for sign in (1, -1)]
    found = [_search(COARSE, fixed, moving, start) for start in (*starts, *turned)]
    return max(found, key=lambda result: result[1])


def _displaced(found: Matrix, fixed: Head) -> Matrix:
    """A start for a search that should come back to `found`."""
    return found @ _rotation([4, -4, 4], fixed.scans[COARSE].centre)


def _rotation(angles_deg: Any, centre: NDArray[np.float64]) -> Matrix:
    transform = import_sitk().Euler3DTransform()
    transform.SetRotation(*np.deg2rad(angles_deg).tolist())
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(transform.GetMatrix(), (3, 3))
    matrix[:3, 3] = centre - matrix[:3, :3] @ centre
    return matrix


_directions = np.zeros((6, 3, 4))
_directions[[0, 1, 2], [0, 1, 2], 3] = 1
_directions[[3, 4, 5], [2, 0, 1], [1, 2, 0]] = 1
_directions[[3, 4, 5], [1, 2, 0], [2, 0, 1]] = -1
_RIGID = _directions.reshape(6, 12)
"""Shifts along and rotations about x, y and z, as changes of the first three rows of a matrix."""


def _search(
    level: Level, fixed: Head, moving: Head, start: Matrix, *, is_affine: bool = False, last_mm: float | None = None
) -> tuple[Matrix, float]:
    """The best matrix from the fixed to the moving scan's world on the way of the search, and its mutual information.

    The matrix is rigid, unless the search `is_affine`.
    Steps in the direction of Newton's method, of a fixed length, which also cross small maxima. The length becomes
    shorter when the direction reverses. When it is less than half the first one, the end is near, and steps are at
    most `NEWTON_GAIN` times as long as Newton's; far from the end these are too short. Steps are rounded to 2^-20 mm
    (about 1 nm), because the last bits of linear algebra differ between CPUs.

    Args:
        last_mm: length of a step below which the search ends, by default the level's.

    Raises:
        RegistrationError: the scans do not overlap.
    """
    information = MutualInformation(fixed.scans[level], moving.scans[level], fixed.samples(level.samples))
    centre = fixed.scans[level].centre
    matrix, best, best_value = start, start, -np.inf
    directions = np.eye(12) if is_affine else _RIGID
    step: NDArray[np.floating] = np.zeros(len(directions))
    longest_mm, last_mm = level.first_mm, last_mm or level.last_mm
    for _ in range(level.steps):
        here = information.evaluate(matrix)
        if here.value > best_value:
            best, best_value = matrix, here.value
        last_step = step
        step = np.linalg.lstsq(directions @ here.curvature @ directions.T, directions @ here.gradient)[0]
        if step @ last_step < 0:
            longest_mm *= level.relax
        newton_mm = float(np.linalg.norm(step))
        is_near = longest_mm < level.first_mm / 2
        length_mm = min(longest_mm, NEWTON_GAIN * newton_mm) if is_near else longest_mm
        if length_mm < last_mm or newton_mm == 0 or here.value == -np.inf:
            break
        step_mm = rounded(step * (length_mm / newton_mm), MATRIX_BITS)
        matrix = matrix @ _small_change(directions.T @ step_mm, centre, is_affine=is_affine)
    if best_value == -np.inf:
        raise RegistrationError("the scans do not overlap")
    return best, best_value


def _small_change(change: NDArray[np.float64], centre: NDArray[np.float64], *, is_affine: bool) -> Matrix:
    """The matrix, rigid or affine, of a change (12,) about `centre` as in `mutual_information.Evaluation`."""
    rows = change.reshape(3, 4)
    linear = np.eye(3) + rows[:, :3] / RADIUS_MM
    if not is_affine:
        left, _, right = np.linalg.svd(linear)
        linear = left @ right  # the nearest rotation
    matrix = np.eye(4)
    matrix[:3, :3] = linear
    matrix[:3, 3] = rows[:, 3] + centre - linear @ centre
    return rounded(matrix)


def head_points(scan: Volume) -> NDArray[np.float64]:
    """Positions (n, 3) in RAS mm of some voxels in and near the head."""
    return prepare(scan).points
