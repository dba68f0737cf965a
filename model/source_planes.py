"""The input of a generator from whole volumes: align scans with the first of them, and sample all on its planes.

Legend: volumes are [k, j, i] as stored, planes [z, y, x]; matrices are 4 x 4 and act on RAS mm, grids map (x, y, z, 1)
of planes to RAS mm. B, C, H, W are batch, channels, height, width of the generator's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ixi_etl.config import MAX_REGISTRATION_ERROR_MM
from ixi_etl.dataset.normalisation import normalise
from ixi_etl.errors import SynthesisError
from ixi_etl.modalities import ECHOES
from ixi_etl.pairing import geometry, register
from ixi_etl.pairing.geometry import Matrix
from ixi_etl.pairing.heads import RegistrationError, Volume
from ixi_etl.pairing.similarity import nmi
from ixi_etl.scans.intensity import otsu_threshold

MIN_COMMON = 0.5  # share of the head below which similarities are not comparable


@dataclass(frozen=True)
class Scan:
    """A volume, and where it is.

    Attributes:
        voxels: [k, j, i] as stored.
        affine: maps (i, j, k, 1) to RAS mm.
        scale: slope and intercept, from voxels to the scanner's units.
    """

    voxels: NDArray[Any]
    affine: Matrix
    scale: tuple[float, float] = (1.0, 0.0)


@dataclass(frozen=True)
class Alignment:
    """Where the head of a scan is.

    Attributes:
        first_to_own: from a point in the world of the first scan to the same tissue in the scan's own.
        is_registered: whether it is the result of a registration, or that of the headers.
        motion_mm, motion_deg: mean displacement over the head, and angle of rotation.
        error_mm: estimated error, mean over the head; None without a registration.
        warning: why it is uncertain; "" if it is not.
    """

    first_to_own: Matrix
    is_registered: bool = False
    motion_mm: float = 0.0
    motion_deg: float = 0.0
    error_mm: float | None = None
    warning: str = ""


BY_HEADERS = Alignment(np.eye(4))


@dataclass(frozen=True)
class Planes:
    """A stack of planes.

    Attributes:
        grid: maps (x, y, z, 1) to RAS mm.
        shape: (z, y, x).
    """

    grid: Matrix
    shape: tuple[int, int, int]

    @property
    def step_mm(self) -> float:
        """Distance of the planes."""
        return float(np.linalg.norm(self.grid[:3, 2]))


@dataclass(frozen=True)
class Source:
    """A scan with all that turns it into channels.

    Attributes:
        low_high: values that become -1 and 1, in the scanner's units.
        head_threshold: Otsu's threshold of the central slab, in [-1, 1].
    """

    scan: Scan
    alignment: Alignment
    low_high: tuple[float, float]
    head_threshold: float


def echo_of(first: tuple[str, Scan], other: tuple[str, Scan]) -> Scan | None:
    """The other scan with its voxels exactly at those of the first, if both are echoes of one scan on one grid."""
    (first_name, fixed), (name, scan) = first, other
    if not {first_name.upper(), name.upper()} <= ECHOES:
        return None
    grids = [(each.affine, each.voxels.shape[::-1]) for each in (scan, fixed)]
    affine = geometry.affine_on_grid_of(*grids[0], *grids[1])
    return None if affine is None else replace(scan, affine=affine)


def align(first: tuple[str, Scan], moving: Scan, planes: Planes, slab: slice) -> Alignment:
    """Register a scan to the first one (given with its name), as a refresh does.

    For scans of which `echo_of` gives None. The registration counts only if it makes the scans more
    similar over the head in the planes `slab`.

    Raises:
        SynthesisError: the mirror image of the scan fits better.
    """
    first_name, fixed = first
    volumes = (Volume(scan.voxels, geometry.rounded(scan.affine)) for scan in (moving, fixed))
    try:
        found = register.register(*volumes)
    except RegistrationError as error:
        return Alignment(np.eye(4), warning=f"it could not be registered ({error}); the headers' alignment is used")
    if found.is_mirrored:
        raise SynthesisError(f"its mirror image fits the {first_name} better: one header exchanges left and right")
    target, within = sample_planes(fixed, BY_HEADERS, planes, slab)
    foreground = (target > otsu_threshold(target)) & within
    points = geometry.world_points(foreground, planes.grid @ translation(2, slab.start))
    matrix = found.fixed_to_moving
    aligned = Alignment(matrix, True, *register.measure_motion(matrix, points))
    (before, covered), (after, covered_after) = (
        sample_planes(moving, alignment, planes, slab) for alignment in (BY_HEADERS, aligned)
    )
    common = foreground & covered & covered_after
    if common.sum() >= MIN_COMMON * foreground.sum():
        is_better = nmi(after[common], target[common]) > nmi(before[common], target[common])
    else:
        is_better = bool((foreground & covered_after).sum() > (foreground & covered).sum())
    better = aligned if is_better else BY_HEADERS
    error_mm = found.error_mm(points, better.first_to_own)
    is_uncertain = error_mm > MAX_REGISTRATION_ERROR_MM
    warning = f"the estimated error of its alignment with the {first_name} is {error_mm:.1f} mm" if is_uncertain else ""
    return replace(better, error_mm=error_mm, warning=warning)


def sample_planes(
    scan: Scan, alignment: Alignment, planes: Planes, block: slice, shift: float = 0.0
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Planes `block` of a scan, in the scanner's units, 0 outside it; and the mask of the inside.

    `shift` moves the planes to the superior, in steps of the stack; beyond an end of the stack its outermost plane is
    repeated.
    """
    positions, last = np.arange(block.start, block.stop) + shift, planes.shape[0] - 1
    below, above = int((positions < 0).sum()), int((positions > last).sum())
    between = len(positions) - below - above
    parts: list[tuple[NDArray[np.float32], NDArray[np.bool_]]] = []
    for start, count, repeats in ((0, 1, below), (block.start + below + shift, between, 1), (last, 1, above)):
        if count and repeats:
            grid = planes.grid @ translation(2, start)
            matrix = geometry.sampling_matrix(grid, scan.affine, alignment.first_to_own)
            sampled, inside = geometry.resample(scan.voxels, matrix, (count, *planes.shape[1:]))
            parts += [(sampled, inside)] * repeats
    sampled, inside = parts[0]
    if len(parts) > 1:
        sampled, inside = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
    if scan.scale != (1.0, 0.0):
        sampled *= scan.scale[0]
        sampled += scan.scale[1]
        sampled[~inside] = 0
    return sampled, inside


def normalise_planes(
    sampled: NDArray[np.float32], inside: NDArray[np.bool_], low_high: tuple[float, float]
) -> torch.Tensor:
    """One channel (B, 1, H, W) in [-1, 1], with background outside the volume, as in training."""
    channel = normalise(torch.from_numpy(sampled).unsqueeze(1), torch.tensor([low_high]))
    channel[~torch.from_numpy(inside).unsqueeze(1)] = -1
    return channel


def generator_input(sources: Sequence[Source], planes: Planes, block: slice, shifts: Sequence[float]) -> torch.Tensor:
    """The input (B, C, H, W) for planes `block`: by source, then by shift, as in training."""
    channels = [
        normalise_planes(*sample_planes(source.scan, source.alignment, planes, block, shift), source.low_high)
        for source in sources
        for shift in shifts
    ]
    return channels[0] if len(channels) == 1 else torch.cat(channels, 1)


def translation(axis: int, by: float) -> Matrix:
    """Maps indices of a part of a grid to indices of the whole grid."""
    matrix = np.eye(4)
    matrix[axis, 3] = by
    return matrix
