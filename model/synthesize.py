"""Generate a whole volume of the other modality from a volume, on the input's own grid.

The steps mirror training: interpolate the volume once onto planes with the size and spacing of the training planes,
normalise by the percentiles of its central slab, generate plane by plane, scale to the median percentiles of the
training targets, and interpolate back. This is done block by block, so memory depends on the volume alone, not on the
number of planes. All that must be known about the training run is in `generator.safetensors`; the dataset is not
needed. Volumes are [k, j, i] as stored, planes [z, y, x].
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ixi_etl.core.files import sha256_file
from ixi_etl.core.progress import Progress, no_progress
from ixi_etl.errors import CheckpointError, SynthesisError
from ixi_etl.pairing import geometry
from ixi_etl.pairing.geometry import Matrix
from ixi_etl.scans.intensity import otsu_threshold, percentiles
from model import checkpoint, planes
from model.config import SEEDS
from model.data import normalise
from model.generator import BATCH, GENERATOR_FILE, Predictor, as_predictor, load_generator
from model.planes import PlaneSummary
from model.run import find_run

log = logging.getLogger(__name__)
SPACING_WARNED, SPACING_REFUSED = 1.5, 8.0
"""Ratios of the input's voxel size to the training source's, or the inverse, above which to warn and to refuse.

T1s of 0.8 mm and IXI's own of 0.94 x 0.94 x 1.2 mm are within 1.5 of each other; clinical slices of 3 mm are not. No
real scan is beyond 8, but spacings in other units than mm are."""
DIRECTION = re.compile(r"([A-Za-z0-9_]+)->([A-Za-z0-9_]+)")
MAX_LOST = 0.05  # share of the head outside the planes above which to warn
MAX_VOXELS = 1 << 27  # 512 x 512 x 512
BLOCK_PIXELS = 1 << 22  # pixels of planes, or voxels of a volume, processed at a time

NEAR_TARGET, FARTHER_FROM_SOURCE = 0.05, 2.0
"""An input is suspected to be a target if its histogram is within `NEAR_TARGET` of the training targets', and more than
`FARTHER_FROM_SOURCE` times as far from the training sources'. Intensities differ so much between protocols that a T1 is
often nearer to another protocol's T2 than to its T1; docs/synthesis.md has the measurements."""


@dataclass(frozen=True)
class Trained:
    """A loaded generator with what synthesis needs to know about its training run.

    Attributes:
        predict: generates planes (B, 1, H, W) in [-1, 1].
        planes: the training planes.
        direction: names of source and target.
        device: the torch device to compute on.
        record: the description of the generator for sidecar files.
    """

    predict: Predictor
    planes: PlaneSummary
    direction: tuple[str, str]
    device: str
    record: dict[str, Any]


@dataclass
class Synthesis:
    """A synthesised volume.

    Attributes:
        values: [k, j, i] float32, in the scanner's units of the training targets.
        source_low_high: the input values that were mapped to -1 and 1.
        warnings: how the input differs from the training sources, one line each.
    """

    values: NDArray[np.float32]
    source_low_high: tuple[float, float]
    warnings: list[str] = field(default_factory=list)


def find_generator(root: str | Path, name: str, scratch: Path | None = None) -> Path:
    """The generator's file: `name` is that file, a folder that holds it, or a run (see `find_run` for the names).

    Raises:
        CheckpointError: it does not exist.
    """
    path = Path(name)
    if path.suffix == Path(GENERATOR_FILE).suffix and path.is_file():
        return path
    folder = path if (path / GENERATOR_FILE).is_file() else find_run(root, name, scratch)
    if not (folder / GENERATOR_FILE).is_file():
        raise CheckpointError(f"{folder} has no {GENERATOR_FILE} yet; `ixi-etl train --resume` writes it at the end")
    return folder / GENERATOR_FILE


def load_trained(path: Path, device: str = "cpu", *, dropout: bool = False, seed: int = 0) -> Trained:
    """Load the generator in `path`. `dropout` keeps dropout on, with random numbers from `seed`.

    Raises:
        CheckpointError: the file is missing or damaged, or its metadata is invalid.
        SynthesisError: it was not trained on axial planes of heads; or the seed is too large.
    """
    if not -SEEDS <= seed < SEEDS:
        raise SynthesisError(f"seed {seed} does not fit into 64 bits; give a smaller one")
    metadata = checkpoint.read_metadata(path)
    if "planes" not in metadata:
        raise SynthesisError(f"{path} does not record its training planes; `ixi-etl train --resume` adds them")
    generator, config, step = load_generator(path, device)
    summary = planes.parse(path, metadata)
    if summary is None:
        name = config.dataset.partition("@")[0]
        why = "slices paired by index, which show two different planes" if name != "digits" else "digits, not on heads"
        raise SynthesisError(
            f"{path} was trained on {why}: it cannot make volumes; train on a version made by `paired`"
        )
    direction = DIRECTION.fullmatch(str(config.direction))  # output files are named after it
    if direction is None:
        raise CheckpointError(f"the direction in {path} cannot be used: {config.direction!r} is not SOURCE->TARGET")
    torch.manual_seed(seed)
    record = {
        "GeneratorSHA256": sha256_file(path),
        "Dataset": config.dataset,
        "Direction": config.direction,
        "Step": step,
        "Dropout": dropout,
        **({"Seed": seed} if dropout else {}),
        **{name.capitalize(): metadata[name] for name in ("licence", "credit") if name in metadata},  # of the dataset
    }
    predict = as_predictor(generator, dropout=dropout)
    return Trained(predict, summary, (direction[1], direction[2]), device, record)


def synthesize_volume(
    trained: Trained,
    volume: NDArray[Any],
    affine: Matrix,
    progress: Progress = no_progress,
    label: str = "synthesize",
    scale: tuple[float, float] = (1.0, 0.0),
) -> Synthesis:
    """Generate the other modality of `volume` [k, j, i], on its own grid; outside the head the low end of its range.

    `affine` maps (i, j, k, 1) to RAS mm. `scale` is slope and intercept, from voxels to the scanner's units. `label`
    names the volume in `progress`.

    Raises:
        SynthesisError: the volume is empty, or its voxel size is far from that of the training sources.
    """
    summary = trained.planes
    warnings = _spacing_warnings(summary, planes.spacing_of(affine))
    threshold = otsu_threshold(volume)
    counts = _count_head_voxels(volume, threshold, scale)
    if not counts[0].any():
        raise SynthesisError(f"it is empty: it has no voxel above {threshold * scale[0] + scale[1]:g}")
    grid, shape = planes.resampling_grid(summary, volume.shape, affine, counts)
    slab = planes.trained_slab(summary, shape[0], float(np.linalg.norm(grid[:3, 2])))
    sampled, inside = _sample_planes(volume, affine, scale, grid, shape, slab)
    low, high = percentiles(sampled[None])[0].tolist()
    if not low < high:
        raise SynthesisError(f"it is empty: its middle {summary.slab_mm:g} mm have no other value than {low:g}")
    central = _normalise_planes(sampled, inside, low, high)
    warnings += _modality_warnings(trained, central[:, 0].numpy())
    head_threshold = otsu_threshold(central.numpy())
    del sampled, inside, central

    low_target, high_target = summary.target_low_high
    values = np.full(volume.shape, low_target, np.float32)
    axis, to_inferior = planes.axial_axis(affine)
    lost, per_block = 0, max(BATCH, BLOCK_PIXELS // max(shape[1] * shape[2], volume.size // shape[0]))
    for start in range(0, shape[0], per_block):
        block = slice(start, min(start + per_block, shape[0]))
        source = _normalise_planes(*_sample_planes(volume, affine, scale, grid, shape, block), low, high)
        generated = _generate(trained, source, head_threshold)
        scaled = ((generated[:, 0] + 1) / 2 * (high_target - low_target) + low_target).numpy()
        # Along this axis the grid has one plane per voxel, so a block of planes is a block of the volume.
        first = shape[0] - block.stop if to_inferior else block.start
        part = tuple(slice(first, first + len(scaled)) if n == axis else slice(None) for n in range(3))
        part_affine, block_affine = affine @ _translation(2 - axis, first), grid @ _translation(2, start)
        matrix = geometry.sampling_matrix(part_affine, block_affine, np.eye(4))
        resampled, covered = geometry.resample(scaled, matrix, values[part].shape)
        resampled[~covered] = low_target
        values[part] = resampled
        lost += int((_above_threshold(volume[part], threshold, scale) & ~covered).sum())
        progress(label, block.stop, shape[0], "planes")
    lost_share = lost / max(int(counts[0].sum()), 1)
    if lost_share > MAX_LOST:
        size = " x ".join(f"{n * mm:g}" for n, mm in zip(summary.shape[::-1], summary.spacing_mm, strict=True))
        warnings.append(f"{lost_share:.0%} of the head is outside the {size} mm of a training slice and is left empty")
    return Synthesis(values, (low, high), warnings)


def _above_threshold(voxels: NDArray[Any], threshold: float, scale: tuple[float, float]) -> NDArray[np.bool_]:
    """Mask of the stored voxels that exceed a stored threshold once both are in the scanner's units."""
    above: NDArray[np.bool_] = voxels > threshold if scale[0] > 0 else voxels < threshold
    return above


def _count_head_voxels(volume: NDArray[Any], threshold: float, scale: tuple[float, float]) -> list[NDArray[np.intp]]:
    """The number of voxels above the threshold at each index along k, j and i."""
    counts = [np.zeros(n, np.intp) for n in volume.shape]
    step = max(1, BLOCK_PIXELS // max(1, volume[0].size))
    for start in range(0, len(volume), step):
        head = _above_threshold(volume[start : start + step], threshold, scale)
        counts[0][start : start + step] = head.sum((1, 2))
        counts[1] += head.sum((0, 2))
        counts[2] += head.sum((0, 1))
    return counts


def _sample_planes(
    volume: NDArray[Any],
    affine: Matrix,
    scale: tuple[float, float],
    grid: Matrix,
    shape: tuple[int, int, int],
    block: slice,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Planes `block` of the grid through a volume, in the scanner's units, 0 outside; and the mask of the inside."""
    matrix = geometry.sampling_matrix(grid @ _translation(2, block.start), affine, np.eye(4))
    sampled, inside = geometry.resample(volume, matrix, (block.stop - block.start, *shape[1:]))
    if scale != (1.0, 0.0):
        sampled *= scale[0]
        sampled += scale[1]
        sampled[~inside] = 0
    return sampled, inside


def _normalise_planes(sampled: NDArray[np.float32], inside: NDArray[np.bool_], low: float, high: float) -> torch.Tensor:
    """The generator's input (B, 1, H, W) in [-1, 1], with background outside the volume, as in training."""
    source = normalise(torch.from_numpy(sampled), torch.tensor([[low, high]]))
    source[~torch.from_numpy(inside).unsqueeze(1)] = -1
    return source


@torch.no_grad()
def _generate(trained: Trained, source: torch.Tensor, head_threshold: float) -> torch.Tensor:
    """Generate the planes with a head; the others become -1.

    A network that never saw planes of air in training generates patterns in them.
    """
    generated = torch.full_like(source, -1)
    with_head = torch.nonzero(source.amax((1, 2, 3)) > head_threshold).flatten()
    for index in with_head.split(BATCH) if len(with_head) else ():  # `split` makes one empty part of nothing
        predicted = trained.predict(source[index].to(trained.device), index.to(trained.device))
        generated[index] = predicted.clamp(-1, 1).cpu()
    return generated


def _translation(axis: int, by: int) -> Matrix:
    """Maps indices of a part of a grid to indices of the whole grid."""
    matrix = np.eye(4)
    matrix[axis, 3] = by
    return matrix


def _spacing_warnings(summary: PlaneSummary, spacing_mm: NDArray[np.float64]) -> list[str]:
    """A warning if the voxel size is far from the training sources'; `SynthesisError` if no scan could have it."""
    ratio = spacing_mm / summary.source_spacing_mm
    furthest = float(np.maximum(ratio, 1 / ratio).max())
    size, expected = (" x ".join(f"{mm:.4g}" for mm in each) for each in (spacing_mm, summary.source_spacing_mm))
    message = f"voxels of {size} mm (along x, y, z) are far from the {expected} mm that the generator was trained on"
    if furthest > SPACING_REFUSED:
        raise SynthesisError(f"{message}; is the header's spacing in mm?")
    return [message] if furthest > SPACING_WARNED else []


def _modality_warnings(trained: Trained, slab: NDArray[np.float32]) -> list[str]:
    """A warning if a normalised slab has the histogram of the training targets."""
    found, (source, target) = planes.histogram(slab), trained.direction
    to_source = planes.histogram_distance(found, trained.planes.source_histogram)
    to_target = planes.histogram_distance(found, trained.planes.target_histogram)
    if to_target > NEAR_TARGET or to_source <= FARTHER_FROM_SOURCE * to_target:
        return []
    message = f"by its histogram it looks more like a {target.upper()} than a {source.upper()}"
    return [f"{message} (distance {to_target:.3f} against {to_source:.3f}); is it the right file?"]
