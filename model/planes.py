"""Summarise the planes that a generator was trained on, and define the same planes in other volumes.

Legend: volumes are [k, j, i] as stored; planes are [z, y, x]: x increases to the right, y to
anterior, z to superior (RAS+), along the volume's own axes; matrices are 4 x 4, to RAS mm. `PlaneSummary` is stored in
`generator.safetensors`, so a generator can be used without its dataset.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ixi_etl.config import format_validation_error
from ixi_etl.dataset import manifest, metadata
from ixi_etl.dataset.store import open_arrays
from ixi_etl.errors import CheckpointError
from ixi_etl.pairing.geometry import Matrix
from ixi_etl.scans.intensity import LARGEST, Counts, otsu_threshold, percentiles
from model.data import Pairs, Slabs

BINS = 32  # of the histograms
HISTOGRAM_SUBJECTS = 32  # training subjects that the histograms average over, at most
MAX_SOURCES = 8
SAME_SPACING = 1e-3  # relative; scanners write spacings with noise in the last digits
_AXES = ("RL", "AP", "SI")

# A generator's file may come from an untrusted source: unlimited sizes could fill all memory.
Pixels = Annotated[int, Field(ge=1, le=4096)]
Millimetres = Annotated[float, Field(ge=1e-3, le=1e3)]
Intensity = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Shares = Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=BINS, max_length=BINS)]


class SourceSummary(BaseModel):
    """One source of the training planes.

    Attributes:
        spacing_mm: voxel size of the scan along x, y, z, the median over the training subjects.
        histogram: mean of `histogram` over the training subjects.
        largest_ratio: of value to mean, over all subjects of the dataset; only with the normalisation `mean`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    spacing_mm: tuple[Millimetres, Millimetres, Millimetres]
    histogram: Shares
    largest_ratio: Annotated[float, Field(gt=0, le=LARGEST)] | None = None


class PlaneSummary(BaseModel):
    """Geometry and intensities of the training planes: how to prepare volumes and how to scale the output.

    Attributes:
        shape: height (y) and width (x) of a training slice.
        spacing_mm: pixel size along x and y. This and all fields below are medians over the training subjects.
        slice_mm: distance of the slices; None in files of older versions, whose generators take no neighbours.
        slab_mm: thickness of the slab that was normalised as a whole: the slices of a subject, and the margin.
        slab_offset_mm: distance of its middle above the middle of the stack that it was cut from.
        sources: the sources, in the order of the direction.
        target_low_high: values of the target's slab that became -1 and 1, in the scanner's units.
        target_histogram: mean of `histogram` over the training subjects.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    shape: tuple[Pixels, Pixels]
    spacing_mm: tuple[Millimetres, Millimetres]
    slice_mm: Millimetres | None = None
    slab_mm: Millimetres
    slab_offset_mm: Annotated[float, Field(ge=-1e3, le=1e3)]
    sources: Annotated[tuple[SourceSummary, ...], Field(min_length=1, max_length=MAX_SOURCES)]
    target_low_high: tuple[Intensity, Intensity]
    target_histogram: Shares

    @model_validator(mode="before")
    @classmethod
    def _read_single_source(cls, given: Any) -> Any:
        """Files of older versions have the fields of a single source beside the others."""
        if not isinstance(given, dict) or "sources" in given:
            return given
        fields = dict(given)
        names = {"spacing_mm": "source_spacing_mm", "histogram": "source_histogram"}
        return fields | {"sources": [{new: fields.pop(old) for new, old in names.items() if old in fields}]}


def parse(path: Path, generator: dict[str, Any]) -> PlaneSummary | None:
    """The field `planes` in the metadata of the generator in `path`; None if it is missing or null.

    Raises:
        CheckpointError: the field is invalid.
    """
    if generator.get("planes") is None:
        return None
    try:
        parsed = PlaneSummary.model_validate(generator["planes"])
    except ValidationError as error:
        raise CheckpointError(f"the planes in {path} cannot be used: {format_validation_error(error)}") from error
    if generator.get("normalisation") == "mean" and any(source.largest_ratio is None for source in parsed.sources):
        raise CheckpointError(f"the planes in {path} cannot be used: a source has no largest_ratio for its mean")
    return parsed


def summarise(version: Path, pairs: Pairs) -> PlaneSummary | None:
    """Summarise the training split `pairs` of a version; None if its slices are not axial planes of a head.

    That is the case for pairs by index, whose source and target show different planes, and for digits.
    """
    version_metadata = metadata.read_metadata(version)
    if version_metadata["inputs"]["config"].get("pairing") != "anatomical":
        return None
    reference, target = version_metadata["target"], pairs.direction.target  # the window is that of the reference
    table = manifest.used_rows(metadata.read_manifest(version)).set_index("subject_id").loc[list(pairs.subjects)]
    rows = manifest.to_records(table)
    affines = np.asarray(open_arrays(version)[f"{target}_affine"])[table["store_row"].to_numpy(np.int64)]
    x, y, z = np.median(np.linalg.norm(affines[:, :3, :3], axis=1), axis=0).round(6).tolist()
    depths = [_along_xyz(row, reference, "shape")[2] for row in rows]
    ends = [row[f"{reference}_window_start"] + row[f"{reference}_window_stop"] for row in rows]
    scale, offset = (torch.tensor(table[f"{target}_{c}"].to_numpy("float32"))[:, None] for c in ("scale", "offset"))
    low, high = (pairs.target.low_high.cpu() * scale + offset).quantile(0.5, dim=0).tolist()
    *source_histograms, target_histogram = _histograms(pairs)
    is_by_mean = metadata.normalisation_of(version) == "mean"
    sources = [
        SourceSummary(
            spacing_mm=tuple(np.median([_along_xyz(row, name, "spacing_mm") for row in rows], axis=0).tolist()),
            histogram=shares,
            largest_ratio=_largest_ratio(slabs) if is_by_mean else None,
        )
        for name, shares, slabs in zip(pairs.direction.sources, source_histograms, pairs.sources, strict=True)
    ]
    return PlaneSummary(
        shape=pairs.shape,
        spacing_mm=(x, y),
        slice_mm=z,
        slab_mm=(pairs.slices + 2 * pairs.margin) * z,
        slab_offset_mm=float(np.median(np.subtract(ends, depths) / 2)) * z,
        sources=tuple(sources),
        target_low_high=(low, high),
        target_histogram=target_histogram,
    )


def _largest_ratio(slabs: Slabs) -> float:
    """The largest ratio of value to mean over all subjects of a version with the normalisation `mean`.

    There 1 is the mean of a slab times this ratio, and 0 is 0: so in any subject it is the ratio of the two differences
    from 0, in stored values too. Their median is free of rounding.
    """
    means = torch.stack([slab.double().mean() for slab in slabs.stored])
    low, high = slabs.low_high.double().unbind(1)
    return float(((high - low) / (means - low)).median())


def intensity_range(
    normalisation: str, slab: NDArray[np.float32], largest_ratio: float | None = None
) -> tuple[float, float]:
    """The values of a slab [z, y, x] that become -1 and 1, for a `normalisation` of `DatasetConfig`."""
    if normalisation == "range":
        return float(slab.min()), float(slab.max())
    if normalisation == "mean":
        assert largest_ratio is not None
        return 0.0, largest_ratio * float(slab.mean(dtype=np.float64))
    low, high = percentiles(slab[None])[0].tolist()
    return low, high


def _along_xyz(row: dict[str, Any], name: str, column: str) -> list[float]:
    """A manifest's `shape` or `spacing_mm`, which are in the order of the stored axes, in the order x, y, z."""
    values, letters = json.loads(row[f"{name}_{column}"]), row[f"{name}_orientation"]
    return [values[next(n for n, letter in enumerate(letters) if letter in axis)] for axis in _AXES]


def _histograms(pairs: Pairs) -> list[tuple[float, ...]]:
    """Mean histograms of the sources and of the target, over up to `HISTOGRAM_SUBJECTS` subjects, evenly spread.

    They are of whole slabs, as those of new volumes are, even if some slices are in other splits.
    """
    pairs, count = replace(pairs, neighbours=0, kept=None), len(pairs.subjects)
    sums = np.zeros((len(pairs.sources) + 1, BINS))
    chosen = np.unique(np.linspace(0, count - 1, min(count, HISTOGRAM_SUBJECTS)).round().astype(int))
    for subject in chosen.tolist():
        source, target = pairs.normalised(torch.nonzero(pairs.subject == subject).flatten())
        slabs = torch.cat([pairs.centres(source), target], 1).cpu().numpy()
        sums += [histogram(slabs[:, n]) for n in range(len(sums))]
    return [tuple(shares) for shares in (sums / len(chosen)).round(6).tolist()]


def histogram(slab: NDArray[np.float32]) -> NDArray[np.float64]:
    """Shares (BINS,) of the pixels above Otsu's threshold in a normalised slab, in equal bins from -1 to 1."""
    counts, _ = np.histogram(slab[slab > otsu_threshold(slab)], BINS, (-1, 1))
    shares: NDArray[np.float64] = counts / max(counts.sum(), 1)
    return shares


def histogram_distance(a: Any, b: Any) -> float:
    """Wasserstein-1 distance of two histograms (BINS,): the mean shift between their intensities in [-1, 1]."""
    return float(np.abs(np.cumsum(np.subtract(a, b))).sum() * 2 / BINS)


def spacing_of(affine: Matrix) -> NDArray[np.float64]:
    """Voxel size in mm along x, y, z (3,) of a volume stored in any orientation."""
    to_xyz: NDArray[np.intp] = np.argsort(nib.io_orientation(affine)[:, 0])
    spacing: NDArray[np.float64] = np.linalg.norm(affine[:3, to_xyz], axis=0)
    return spacing


def axial_axis(affine: Matrix) -> tuple[int, bool]:
    """The axis of a volume [k, j, i] nearest to inferior-superior, and whether its indices increase to the inferior."""
    orientation = nib.io_orientation(affine)
    stored = int(np.argmax(orientation[:, 0]))
    return 2 - stored, bool(orientation[stored, 1] < 0)


def resampling_grid(
    planes: PlaneSummary, shape_kji: tuple[int, ...], affine: Matrix, head: Sequence[NDArray[np.intp]]
) -> tuple[Matrix, tuple[int, int, int]]:
    """The grid of `planes` through a whole volume: its affine, from (x, y, z, 1) to RAS mm, and its shape (z, y, x).

    The grid is aligned with the volume's axes, ordered nearest to R, A, S: training planes too are aligned with the
    axes of their scan, not of the scanner. Along z it has one plane per voxel of the volume, so nothing is interpolated
    along z in either direction. Along x and y pixels have the size and number of the training pixels, and one pixel is
    at the volume's first voxel, so equal spacing gives equal positions. If the volume is wider than a training slice,
    the grid is centred on the head. `head` has the number of head voxels at each index along k, j and i.
    """
    orientation = nib.io_orientation(affine)
    reoriented = affine @ nib.orientations.inv_ornt_aff(orientation, shape_kji[::-1])
    size = spacing_of(affine)
    step = np.array([*planes.spacing_mm, size[2]])
    step = np.where(np.abs(step / size - 1) < SAME_SPACING, size, step)
    length = [shape_kji[::-1][axis] for axis in np.argsort(orientation[:, 0])]
    need = [math.ceil((n - 1) * a / b - 1e-6) + 1 for n, a, b in zip(length, size, step, strict=True)]
    count = [planes.shape[1], planes.shape[0], need[2]]
    before = [(n - m) // 2 for n, m in zip(count, need, strict=True)]
    for axis in (0, 1):
        if before[axis] < 0:
            stored = int(np.flatnonzero(orientation[:, 0] == axis)[0])
            counts = head[2 - stored][:: int(orientation[stored, 1])]
            low, high = np.multiply(Counts(0, counts).percentiles((1, 99)), size[axis] / step[axis])
            centred = round((count[axis] - 1) / 2 - (low + high) / 2)
            before[axis] = min(0, max(centred, count[axis] - need[axis]))
    scale = np.diag([*step / size, 1])
    scale[:3, 3] = -np.array(before) * step / size
    return reoriented @ scale, (count[2], count[1], count[0])


def trained_slab(planes: PlaneSummary, depth: int, spacing_mm: float) -> slice:
    """The part of a stack of `depth` planes, `spacing_mm` apart, that matches the trained slab."""
    thick = min(depth, max(1, round(planes.slab_mm / spacing_mm)))
    start = math.floor((depth - thick) / 2 + planes.slab_offset_mm / spacing_mm + 1e-4)
    start = min(max(start, 0), depth - thick)
    return slice(start, start + thick)
