"""The planes that a generator was trained on, and the same planes laid through another volume.

Legend: volumes are [k, j, i] as stored, planes [z, y, x] with x to the Right, y to the Anterior, z to the Superior,
along the volume's own axes; matrices are 4 x 4 to RAS mm. `Planes` is written into `generator.safetensors`, so that a
run needs no dataset to be used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ixi_etl import dataset, manifest
from ixi_etl.align import Matrix
from ixi_etl.config import in_a_line
from ixi_etl.intensity import LARGEST, Counts, otsu_threshold
from ixi_etl.store import open_arrays
from model.checkpoint import CheckpointError
from model.data import Pairs

BINS = 32  # of the histograms
SHOWN = 32  # training subjects that the histograms are of, at most
SAME_SPACING = 1e-3  # scanners write spacings with noise in the last digits
_AXES = ("RL", "AP", "SI")

# A generator's file may come from anywhere: sizes that no head has would fill all memory with planes.
Pixels = Annotated[int, Field(ge=1, le=4096)]
Millimetres = Annotated[float, Field(ge=1e-3, le=1e3)]
Intensity = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Shares = Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=BINS, max_length=BINS)]


class Planes(BaseModel):
    """What volumes must become before a generator sees them, and what its output becomes.

    Attributes:
        shape: height (y) and width (x) of a training slice.
        spacing_mm: of its pixels along x and y; the median over the training subjects, as all below.
        slab_mm: how thick the slab was that was trained on, and whose percentiles became -1 and 1.
        slab_offset_mm: how far its middle was above the middle of the stack that it was cut from.
        source_spacing_mm: voxels of the source along x, y, z as it was scanned.
        target_low_high: percentiles 0.1 and 99.9 of the target's slab, in the scanner's units.
        source_histogram, target_histogram: shares of the head's pixels at intensities from -1 to 1, see `histogram`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    shape: tuple[Pixels, Pixels]
    spacing_mm: tuple[Millimetres, Millimetres]
    slab_mm: Millimetres
    slab_offset_mm: Annotated[float, Field(ge=-1e3, le=1e3)]
    source_spacing_mm: tuple[Millimetres, Millimetres, Millimetres]
    target_low_high: tuple[Intensity, Intensity]
    source_histogram: Shares
    target_histogram: Shares


def of(path: Path, facts: dict[str, Any]) -> Planes | None:
    """The planes in the facts of the generator in `path`; None where it was trained on none, or does not say.

    Raises:
        CheckpointError: they are no planes.
    """
    if facts.get("planes") is None:
        return None
    try:
        return Planes.model_validate(facts["planes"])
    except ValidationError as error:
        raise CheckpointError(f"the planes in {path} cannot be used: {in_a_line(error)}") from error


def describe(version: Path, pairs: Pairs) -> Planes | None:
    """The planes of the training split `pairs` of a version; None where slices are no axial planes of a head.

    That is so for pairs by index, whose source and target show different planes, and for digits.
    """
    if dataset.read_facts(version)["inputs"]["config"].get("pairing") != "anatomical":
        return None
    source, target = pairs.direction
    table = manifest.used(dataset.read_manifest(version)).set_index("subject_id").loc[list(pairs.subjects)]
    affines = np.asarray(open_arrays(version)[f"{target}_affine"])[table["store_row"].to_numpy(np.int64)]
    x, y, z = np.median(np.linalg.norm(affines[:, :3, :3], axis=1), axis=0).round(6).tolist()
    above = [
        (row["t2_window_start"] + row["t2_window_stop"] - _upright(row, "t2", "shape")[2]) / 2
        for row in manifest.records(table)
    ]
    spacings = [_upright(row, source, "spacing_mm") for row in manifest.records(table)]
    scale, offset = (torch.tensor(table[f"{target}_{c}"].to_numpy("float32"))[:, None] for c in ("scale", "offset"))
    low, high = (pairs.target_range.cpu() * scale + offset).quantile(0.5, dim=0).tolist()
    return Planes(
        shape=(pairs.source.shape[-2], pairs.source.shape[-1]),
        spacing_mm=(x, y),
        slab_mm=(int(pairs.position.max()) + 1) * z,
        slab_offset_mm=float(np.median(above)) * z,
        source_spacing_mm=tuple(np.median(spacings, axis=0).tolist()),
        target_low_high=(low, high),
        **_histograms(pairs),
    )


def _upright(row: dict[str, Any], name: str, column: str) -> list[float]:
    """A manifest's `shape` or `spacing_mm`, given along the axes as stored, along x, y, z."""
    values, letters = json.loads(row[f"{name}_{column}"]), row[f"{name}_orientation"]
    return [values[next(n for n, letter in enumerate(letters) if letter in axis)] for axis in _AXES]


def _histograms(pairs: Pairs) -> dict[str, tuple[float, ...]]:
    """Means over up to `SHOWN` subjects, evenly spread."""
    count = len(pairs.subjects)
    sums = np.zeros((2, BINS))
    chosen = np.unique(np.linspace(0, count - 1, min(count, SHOWN)).round().astype(int))
    for subject in chosen.tolist():
        slabs = pairs.normalised(torch.nonzero(pairs.subject == subject).flatten())
        sums += [histogram(slab.cpu().numpy()) for slab in slabs]
    source, target = (sums / len(chosen)).round(6).tolist()
    return {"source_histogram": tuple(source), "target_histogram": tuple(target)}


def histogram(slab: NDArray[np.float32]) -> NDArray[np.float64]:
    """Shares of a normalised slab's head (above Otsu's threshold) in `BINS` equal bins from -1 to 1."""
    counts, _ = np.histogram(slab[slab > otsu_threshold(slab)], BINS, (-1, 1))
    shares: NDArray[np.float64] = counts / max(counts.sum(), 1)
    return shares


def distance(a: Any, b: Any) -> float:
    """Wasserstein's distance between two histograms: by how much intensities, from -1 to 1, must move on average."""
    return float(np.abs(np.cumsum(np.subtract(a, b))).sum() * 2 / BINS)


# -- through a volume -------------------------------------------------------------------------------------------------


def spacing_of(affine: Matrix) -> NDArray[np.float64]:
    """Voxel size (mm) along x, y, z of a volume stored in any orientation."""
    to_xyz: NDArray[np.intp] = np.argsort(nib.io_orientation(affine)[:, 0])
    spacing: NDArray[np.float64] = np.linalg.norm(affine[:3, to_xyz], axis=0)
    return spacing


def axial_axis(affine: Matrix) -> tuple[int, bool]:
    """Which axis of a volume [k, j, i] is nearest to inferior-superior, and whether it runs to the inferior."""
    orientation = nib.io_orientation(affine)
    stored = int(np.argmax(orientation[:, 0]))
    return 2 - stored, bool(orientation[stored, 1] < 0)


def through(
    planes: Planes, shape_kji: tuple[int, ...], affine: Matrix, head: Sequence[NDArray[np.intp]]
) -> tuple[Matrix, tuple[int, int, int]]:
    """The grid of `planes` through a whole volume: its affine, (x, y, z, 1) to RAS mm, and shape (z, y, x).

    It lies along the volume's axes, nearest to R, A, S, as the training's planes lie along their scan's axes and not
    the scanner's. Along z there is a plane at each of the volume's own voxels, so nothing is interpolated there, either
    way. Along x and y pixels have the training's size and number, and one lies on the volume's first voxel, so equal
    spacing means equal positions. Where the volume is wider than a training slice, pixels are centred on the head:
    `head` says how many of its voxels there are at each index along k, j and i.
    """
    orientation = nib.io_orientation(affine)
    upright = affine @ nib.orientations.inv_ornt_aff(orientation, shape_kji[::-1])
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
    return upright @ scale, (count[2], count[1], count[0])


def slab_of(planes: Planes, depth: int, spacing_mm: float) -> slice:
    """Which of `depth` planes, `spacing_mm` apart, are the part of the head that the generator was trained on."""
    thick = min(depth, max(1, round(planes.slab_mm / spacing_mm)))
    start = math.floor((depth - thick) / 2 + planes.slab_offset_mm / spacing_mm + 1e-4)
    start = min(max(start, 0), depth - thick)
    return slice(start, start + thick)
