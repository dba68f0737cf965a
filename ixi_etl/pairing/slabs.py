"""Cut the slabs of a subject from its volumes, by index as stored or in anatomical space on the reference's planes.

Legend: volumes are [k, j, i] as stored; slabs are [z, y, x]: x increases to the right, y to anterior,
z to superior (RAS+).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ixi_etl.config import DatasetConfig
from ixi_etl.dataset.alignment import NO_GAIN
from ixi_etl.dataset.schema import matrix_column, pair_column
from ixi_etl.errors import BadVolumeError
from ixi_etl.modalities import ECHOES
from ixi_etl.pairing import geometry, register
from ixi_etl.pairing.heads import RegistrationError, Volume
from ixi_etl.pairing.similarity import nmi
from ixi_etl.scans import affines, nifti
from ixi_etl.scans.intensity import Quantisation, StoredSlab, clip_spikes, otsu_threshold, percentiles, to_int16

MAX_OUTSIDE = 0.05  # share of the reference slab's foreground. The real pairs in docs/registration.md have 0.
MIN_COMMON_FOREGROUND = 0.5  # share of the reference slab's foreground below which NMIs are not comparable
MAX_OFFSET_RATIO = 4096  # offset / range of a volume; leaves 12 of float32's 24 bits for the differences


@dataclass
class Slab:
    """The part of a volume that is stored.

    Attributes:
        stored: its voxels [z, y, x] (`index`: [k, j, i]) as they are stored.
        affine: slab voxel to RAS mm.
        window: [start, stop) along the slice axis; None if the slab was resampled.
    """

    stored: StoredSlab
    affine: geometry.Matrix
    window: tuple[int, int] | None

    @cached_property
    def foreground(self) -> NDArray[np.bool_]:
        """Mask of the head by Otsu's threshold. Artefacts are clipped, as bright ones would raise the threshold."""
        stored = self.stored
        threshold = otsu_threshold(clip_spikes(stored.voxels, stored.p_low, stored.p_high))
        mask: NDArray[np.bool_] = stored.voxels > math.floor(threshold)
        return mask

    @cached_property
    def points(self) -> NDArray[np.float64]:
        """(n, 3) RAS mm, some of the voxels in the foreground."""
        return geometry.world_points(self.foreground, self.affine)


class ScanVolume:
    """An inflated volume: its header, and its voxels as stored [k, j, i]."""

    def __init__(self, modality: str, packed: bytes) -> None:
        self.modality = modality
        try:
            self.header, self.voxels = nifti.read_volume(packed)
        except BadVolumeError as error:
            raise BadVolumeError(error.reason, f"{modality}: {error.detail}") from error
        self.voxels_sha256 = hashlib.sha256(self.voxels.view(np.uint8).data).hexdigest()
        self._remove_offset()

    @property
    def affine(self) -> geometry.Matrix:
        assert self.header.affine is not None
        return geometry.rounded(self.header.affine)

    def _remove_offset(self) -> None:
        """Move a large common offset from the voxels to the intercept, because float32 would lose their differences."""
        if self.voxels.dtype.itemsize < 4:
            return
        low, high = float(self.voxels.min()), float(self.voxels.max())
        if max(abs(low), abs(high)) / MAX_OFFSET_RATIO > high - low > 0:
            self.voxels = (self.voxels - self.voxels.min()).astype(np.float64)
            self.header.intercept += self.header.slope * low

    @cached_property
    def quantisation(self) -> Quantisation:
        """The possible values of the volume: multiples of its slope if all stored voxels are integers."""
        is_integer = self.voxels.dtype.kind != "f" or bool((np.rint(self.voxels) == self.voxels).all())
        return Quantisation(abs(self.header.slope) if is_integer else 0.0, self.header.intercept)

    def to_stored_slab(self, voxels: NDArray[Any], inside: NDArray[np.bool_] | None = None) -> StoredSlab:
        """Convert voxels or samples of the volume to their stored form; those not `inside` it become 0."""
        values = self.header.scaled(voxels)
        if inside is not None:
            values[~inside] = 0
        return to_int16(values, self.quantisation, inside)


def use_common_space(volumes: Mapping[str, ScanVolume]) -> None:
    """Use the forms that `selection` chose, by the same rule."""
    spaces = affines.choose_spaces(*(volume.header.forms for volume in volumes.values()))
    assert spaces is not None, "selection accepted a pair without a common space"
    for volume, space in zip(volumes.values(), spaces, strict=True):
        volume.header.use(space)


def index_slab(volume: ScanVolume, dataset_config: DatasetConfig) -> Slab:
    """The window of slices as stored, whatever their plane: the published recipe."""
    window = dataset_config.window_in(len(volume.voxels))
    assert window is not None, "selection accepted a window that does not fit"
    stored, affine = geometry.stored_slab(volume.voxels, volume.affine, window)
    return Slab(volume.to_stored_slab(stored), affine, window)


def _axial_window(scan: ScanVolume, dataset_config: DatasetConfig) -> tuple[int, int]:
    """The window [start, stop) of the axial slices of a scan, with the margin."""
    window = dataset_config.window_in(geometry.axial_depth(scan.header.shape, scan.affine))
    assert window is not None, "selection accepted a window that does not fit"
    if dataset_config.slice_rule == "middle":
        return window
    (low_high,) = percentiles(scan.voxels[np.newaxis])
    head = scan.voxels > otsu_threshold(clip_spikes(scan.voxels, *low_high))
    areas = np.count_nonzero(geometry.axial_view(head, scan.affine), axis=(1, 2))
    return geometry.largest_window(areas, dataset_config.target_slices, dataset_config.margin)


def _axial_slab(scan: ScanVolume, window: tuple[int, int]) -> Slab:
    """The axial slices [start, stop) of a scan, never resampled."""
    stored, affine = geometry.axial_slab(scan.voxels, scan.affine, window)
    # Copied, because a flipped view is read repeatedly at half the speed and keeps the whole volume in memory.
    return Slab(scan.to_stored_slab(stored.copy()), affine, window)


@dataclass(frozen=True)
class Alignment:
    """A scan on the planes of the reference.

    Attributes:
        slab: the scan, interpolated once from its stored voxels; 0 outside its grid.
        inside: mask of the voxels inside its grid.
        matrix: 4 x 4, a point of the reference's world (RAS mm) to the same tissue in the scan's world.
        nmi_before, nmi_after: similarity by the headers alone, and as aligned.
        error_mm: estimated error of `matrix`, mean over the foreground; None if the scans were not registered.
    """

    slab: Slab
    inside: NDArray[np.bool_]
    matrix: geometry.Matrix
    nmi_before: float
    nmi_after: float
    error_mm: float | None = None


def anatomical_slabs(
    volumes: dict[str, ScanVolume], dataset_config: DatasetConfig, record: dict[str, Any]
) -> dict[str, Slab]:
    """All slabs on the reference's planes; the other scans are interpolated once from their stored voxels.

    NMI, motion, matrix and flags of each go into `record`. Empties `volumes`, since each worker holds its own.

    Raises:
        BadVolumeError: `outside_fov` or `bad_affine`.
    """
    reference = dataset_config.reference
    window = _axial_window(volumes[reference], dataset_config)
    target = _axial_slab(volumes[reference], window)
    grid = volumes[reference].affine, volumes[reference].header.shape
    fixed = volumes.pop(reference)
    is_registered = dataset_config.registration != "none"
    slabs: dict[str, Slab] = {reference: target}
    all_flags: list[str] = []
    if not is_registered:
        del fixed
    for modality in [m for m in dataset_config.moving if m in volumes]:
        scan = volumes.pop(modality)
        measured: dict[str, Any] = {}
        flags: list[str] = []
        is_echo = {modality, reference} <= ECHOES
        on_grid = is_echo and geometry.affine_on_grid_of(scan.affine, scan.header.shape, *grid) is not None
        if on_grid and not dataset_config.register_echoes:
            alignment = _same_slices(scan, target, window)
        else:
            alignment = _by_headers(scan, target)
            if is_registered:
                is_affine = dataset_config.registration == "affine"
                alignment, flags = _register_pair(alignment, scan, fixed, target, is_affine=is_affine)
                motion_mm, motion_deg = register.measure_motion(alignment.matrix, target.points)
                measured = {"motion_mm": motion_mm, "motion_deg": motion_deg}
                measured["registration_error_mm"] = alignment.error_mm
            flags += ["grid_differs"] * (is_echo and not on_grid)
        del scan
        measured |= {"nmi_before": alignment.nmi_before, "nmi_after": alignment.nmi_after}
        record |= {pair_column(dataset_config.moving, modality, column): value for column, value in measured.items()}
        record[matrix_column(reference, modality)] = json.dumps(alignment.matrix.tolist())
        all_flags += [pair_column(dataset_config.moving, modality, flag) for flag in flags]
        record["flags"] = ",".join(all_flags)
        outside = _fraction_outside(target.foreground, alignment.inside)
        if outside > MAX_OUTSIDE:
            problem = f"{reference}: {outside:.1%} of the slab's foreground is outside the {modality}'s grid"
            raise BadVolumeError("outside_fov", f"{problem}; the maximum is {MAX_OUTSIDE:.0%}")
        slabs[modality] = alignment.slab
    return {m: slabs[m] for m in dataset_config.modalities if m in slabs}


def _by_headers(scan: ScanVolume, target: Slab) -> Alignment:
    """The alignment that the headers give."""
    slab, inside = _resampled_slab(scan, target, np.eye(4))
    similarity = nmi_within(target.foreground & inside, slab, target)
    return Alignment(slab, inside, np.eye(4), similarity, similarity)


def _same_slices(echo: ScanVolume, target: Slab, window: tuple[int, int]) -> Alignment:
    """The same slices of another echo, whose voxels are those of the reference: nothing is interpolated."""
    slab = replace(_axial_slab(echo, window), affine=target.affine, window=None)
    similarity = nmi_within(target.foreground, slab, target)
    return Alignment(slab, np.ones(target.foreground.shape, bool), np.eye(4), similarity, similarity)


def _register_pair(
    by_headers: Alignment,
    moving: ScanVolume,
    fixed: ScanVolume,
    target: Slab,
    *,
    is_affine: bool,
) -> tuple[Alignment, list[str]]:
    """Register a scan to the reference; return the better of both alignments, and flags for the manifest.

    Raises:
        BadVolumeError: `bad_affine`: the mirror image of the scan fits better.
    """
    try:
        volumes = (Volume(scan.voxels, scan.affine) for scan in (moving, fixed))
        found = register.register(*volumes, is_affine=is_affine)
    except RegistrationError:
        return by_headers, ["registration_failed"]
    if found.is_mirrored:
        problem = f"the mirror image of the {moving.modality} fits the {fixed.modality} better"
        raise BadVolumeError("bad_affine", f"{problem}: one of the headers exchanges left and right")
    slab, inside = _resampled_slab(moving, target, found.fixed_to_moving)
    foreground = target.foreground
    outside_before, outside_after = (_fraction_outside(foreground, mask) for mask in (by_headers.inside, inside))
    common = foreground & by_headers.inside & inside
    # NMIs are comparable only on the same voxels.
    if 1 - _fraction_outside(foreground, common) >= MIN_COMMON_FOREGROUND:
        before, after = (nmi_within(common, each, target) for each in (by_headers.slab, slab))
        is_better = after > before
    else:
        before, after = by_headers.nmi_before, nmi_within(foreground & inside, slab, target)
        is_better = outside_after < outside_before
    error_mm = found.error_mm(target.points, found.fixed_to_moving if is_better else by_headers.matrix)
    if not is_better:
        return replace(by_headers, error_mm=error_mm), [NO_GAIN]
    motion_mm, motion_deg = register.measure_motion(found.fixed_to_moving, target.points)
    is_large = motion_mm > register.MAX_MOTION_MM or motion_deg > register.MAX_MOTION_DEG
    flags = ["large_motion"] if is_large else []
    if outside_after > MAX_OUTSIDE >= outside_before:
        flags.append("registration_leaves_fov")
    return Alignment(slab, inside, found.fixed_to_moving, before, after, error_mm), flags


def _fraction_outside(foreground: NDArray[np.bool_], inside: NDArray[np.bool_]) -> float:
    return float(np.count_nonzero(foreground & ~inside)) / max(int(np.count_nonzero(foreground)), 1)


def nmi_within(mask: NDArray[np.bool_], a: Slab, b: Slab) -> float:
    """NMI of two slabs as stored, over the voxels in `mask`."""
    return nmi(*(slab.stored.voxels[mask].astype(np.int32) for slab in (a, b)))


def _resampled_slab(scan: ScanVolume, target: Slab, matrix: geometry.Matrix) -> tuple[Slab, NDArray[np.bool_]]:
    """The scan interpolated on exactly the target's planes, 0 outside its grid; and the mask of voxels inside it."""
    sampling = geometry.sampling_matrix(target.affine, scan.affine, matrix)
    samples, inside = geometry.resample(scan.voxels, sampling, target.stored.voxels.shape)
    return Slab(scan.to_stored_slab(samples, inside), target.affine, None), inside


def usable_voxels(slabs: Mapping[str, Slab], record: dict[str, Any]) -> dict[str, NDArray[np.int16]]:
    """The voxels of all slabs; their scales and percentiles go into `record`.

    Raises:
        BadVolumeError: a slab cannot be used, in the order of the reasons, T1 before T2 before others.
    """
    for reason in ("empty_image", "intensity_range"):
        for modality, slab in slabs.items():
            if slab.stored.reason == reason:
                raise BadVolumeError(reason, f"{modality}: {slab.stored.problem}")
    for modality, slab in slabs.items():
        for column in ("p_low", "p_high", "scale", "offset"):
            record[f"{modality.lower()}_{column}"] = getattr(slab.stored, column)
    return {modality: slab.stored.voxels for modality, slab in slabs.items()}
