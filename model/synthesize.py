"""Generate a whole volume of another modality from one volume, or from one of each source, on the first one's grid.

The steps mirror training: interpolate each volume once onto planes with the size and spacing of the training planes,
normalise by its central slab as the dataset was, generate plane by plane, scale to the median range of the training
targets, and interpolate back. This is done block by block, so memory depends on the volumes alone, not on the number of
planes. All that must be known about the training run is in `generator.safetensors`, without the dataset. Volumes are
[k, j, i] as stored, planes [z, y, x].
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ixi_etl.core.files import sha256_file
from ixi_etl.core.progress import Progress, no_progress
from ixi_etl.dataset.direction import Direction
from ixi_etl.errors import CheckpointError, SynthesisError
from ixi_etl.pairing import geometry
from ixi_etl.scans.intensity import otsu_threshold
from model import checkpoint, input_checks, planes
from model.config import SEEDS
from model.generator import BATCH, GENERATOR_FILE, Predictor, as_predictor, load_generator
from model.planes import PlaneSummary
from model.run import find_run, generator_in
from model.source_planes import (
    BY_HEADERS,
    Alignment,
    Planes,
    Scan,
    Source,
    align,
    echo_of,
    generator_input,
    normalise_planes,
    sample_planes,
    translation,
)

log = logging.getLogger(__name__)
MAX_LOST = 0.05  # share of the head outside the planes, or outside another source, above which to warn
MAX_VOXELS = 1 << 27  # 512 x 512 x 512
BLOCK_PIXELS = 1 << 22  # pixels of planes, or voxels of a volume, processed at a time


@dataclass(frozen=True)
class Trained:
    """A loaded generator with what synthesis needs to know about its training run.

    Attributes:
        predict: generates planes (B, 1, H, W) from (B, C, H, W), both in [-1, 1].
        planes: the training planes.
        direction: names of the sources and of the target.
        device: the torch device to compute on.
        record: the description of the generator for sidecar files.
        neighbours: number of planes on either side of the generated one that it also sees, of each source.
        normalisation: of the dataset that it was trained on.
    """

    predict: Predictor
    planes: PlaneSummary
    direction: Direction
    device: str
    record: dict[str, Any]
    neighbours: int = 0
    normalisation: str = "percentiles"


@dataclass
class Synthesis:
    """A synthesised volume.

    Attributes:
        values: [k, j, i] float32, in the scanner's units of the training targets.
        source_low_high: for each source, the input values that were mapped to -1 and 1.
        alignments: for each source but the first, where its head is.
        warnings: how the input differs from the training sources, one line each.
    """

    values: NDArray[np.float32]
    source_low_high: dict[str, tuple[float, float]]
    alignments: dict[str, Alignment] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def find_generator(root: str | Path, name: str, scratch: Path | None = None) -> Path:
    """The generator's file: `name` is that file, a folder that holds it, or a run (see `find_run` for the names).

    Raises:
        CheckpointError: it does not exist.
    """
    path = Path(name)
    if path.suffix == Path(GENERATOR_FILE).suffix and path.is_file():
        return path
    return generator_in(path if (path / GENERATOR_FILE).is_file() else find_run(root, name, scratch))


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
    try:
        direction = Direction.parse(config.direction)  # output files are named after it
    except ValueError as error:
        raise CheckpointError(f"the direction in {path} cannot be used: {error}") from error
    if len(summary.sources) != len(direction.sources) or (config.neighbours and summary.slice_mm is None):
        raise CheckpointError(f"the planes in {path} do not fit its direction {direction} and its neighbours")
    torch.manual_seed(seed)
    record = {
        "GeneratorSHA256": sha256_file(path),
        "Dataset": config.dataset,
        "Direction": str(direction),
        "Neighbours": config.neighbours,
        "Step": step,
        "Dropout": dropout,
        **({"Seed": seed} if dropout else {}),
        **{name.capitalize(): metadata[name] for name in ("licence", "credit") if name in metadata},  # of the dataset
    }
    predict = as_predictor(generator, dropout=dropout)
    return Trained(predict, summary, direction, device, record, config.neighbours, metadata["normalisation"])


def synthesize_volume(
    trained: Trained, scans: Mapping[str, Scan], progress: Progress = no_progress, label: str = "synthesize"
) -> Synthesis:
    """Generate the target on the grid of the first of `scans`, one of each source by name.

    Values outside the head are the low end of the target's range. `label` names the volume in `progress`.

    Raises:
        SynthesisError: a source is missing, unknown or empty, or its voxel size is far from that of the training's.
    """
    check_sources(scans, trained.direction)
    summary, (name, first) = trained.planes, next(iter(scans.items()))
    warnings = []
    for each, expected in zip(trained.direction.sources, summary.sources, strict=True):
        with _naming(each, scans) as prefix:
            found = input_checks.spacing_warnings(expected, planes.spacing_of(scans[each].affine))
            warnings += [f"{prefix}{text}" for text in found]
    threshold = otsu_threshold(first.voxels)
    counts = _count_head_voxels(first, threshold)
    with _naming(name, scans):
        if not counts[0].any():
            level = threshold * first.scale[0] + first.scale[1]
            raise SynthesisError(f"it is empty: it has no voxel above {level:g}")
    stack = Planes(*planes.resampling_grid(summary, first.voxels.shape, first.affine, counts))
    slab = planes.trained_slab(summary, stack.shape[0], stack.step_mm)
    sources, more = _prepare_sources(trained, scans, stack, slab)
    warnings += more

    (low, high), volume = summary.target_low_high, first.voxels
    steps = range(-trained.neighbours, trained.neighbours + 1)
    shifts = [n * summary.slice_mm / stack.step_mm if n and summary.slice_mm else 0.0 for n in steps]
    in_order = [sources[each] for each in trained.direction.sources]
    values = np.full(volume.shape, low, np.float32)
    axis, to_inferior = planes.axial_axis(first.affine)
    depth, height, width = stack.shape
    channels = len(in_order) * len(shifts)
    lost, per_block = 0, max(BATCH, BLOCK_PIXELS // max(channels * height * width, volume.size // depth))
    for start in range(0, depth, per_block):
        block = slice(start, min(start + per_block, depth))
        generated = _generate(trained, in_order, generator_input(in_order, stack, block, shifts))
        scaled = ((generated[:, 0] + 1) / 2 * (high - low) + low).numpy()
        # Along this axis the grid has one plane per voxel, so a block of planes is a block of the volume.
        start_voxel = depth - block.stop if to_inferior else block.start
        part = tuple(slice(start_voxel, start_voxel + len(scaled)) if n == axis else slice(None) for n in range(3))
        part_affine, block_affine = (
            first.affine @ translation(2 - axis, start_voxel),
            stack.grid @ translation(2, start),
        )
        matrix = geometry.sampling_matrix(part_affine, block_affine, np.eye(4))
        resampled, covered = geometry.resample(scaled, matrix, values[part].shape)
        resampled[~covered] = low
        values[part] = resampled
        lost += int((_above_threshold(volume[part], threshold, first.scale) & ~covered).sum())
        progress(label, block.stop, depth, "planes")
    lost_share = lost / max(int(counts[0].sum()), 1)
    if lost_share > MAX_LOST:
        size = " x ".join(f"{n * mm:g}" for n, mm in zip(summary.shape[::-1], summary.spacing_mm, strict=True))
        warnings.append(f"{lost_share:.0%} of the head is outside the {size} mm of a training slice and is left empty")
    ranges = {each: source.low_high for each, source in sources.items()}
    alignments = {each: source.alignment for each, source in sources.items() if each != name}
    return Synthesis(values, ranges, alignments, warnings)


def check_sources(given: Iterable[str], direction: Direction) -> None:
    """Raise `SynthesisError` unless `given` are the sources of the direction, in any order."""
    takes = f"the generator takes {' and '.join(direction.sources)}"
    unknown = [name for name in given if name not in direction.sources]
    if unknown:
        raise SynthesisError(f"{takes}, not {unknown[0]}")
    missing = [name for name in direction.sources if name not in given]
    if missing:
        raise SynthesisError(f"{takes}, and {missing[0]} is missing; give --source {missing[0]}=FILE")


@contextmanager
def _naming(name: str, scans: Mapping[str, Scan]) -> Iterator[str]:
    """Name one of several scans in errors; yields what a warning about it begins with."""
    prefix = f"{name}: " if len(scans) > 1 else ""
    try:
        yield prefix
    except SynthesisError as error:
        raise SynthesisError(f"{prefix}{error}") from error


def _prepare_sources(
    trained: Trained, scans: Mapping[str, Scan], stack: Planes, slab: slice
) -> tuple[dict[str, Source], list[str]]:
    """Align all scans with the first one, and find the ranges that become [-1, 1]; also return warnings.

    Raises:
        SynthesisError: a central slab has a single value, or the mirror image of a scan fits better.
    """
    sources: dict[str, Source] = {}
    warnings, head = [], np.zeros(0, np.bool_)
    first = next(iter(scans.items()))
    summaries = dict(zip(trained.direction.sources, trained.planes.sources, strict=True))
    for name, scan in scans.items():
        with _naming(name, scans) as prefix:
            echo = echo_of(first, (name, scan))
            scan = echo or scan
            alignment = align(first, scan, stack, slab) if sources and echo is None else BY_HEADERS
            sampled, inside = sample_planes(scan, alignment, stack, slab)
            low, high = planes.intensity_range(trained.normalisation, sampled, summaries[name].largest_ratio)
            if not low < high:
                lacks = f"no other value than {low:g}" if low == high else "a mean below 0, and are divided by it"
                raise SynthesisError(f"it is empty: its middle {trained.planes.slab_mm:g} mm have {lacks}")
            central = normalise_planes(sampled, inside, (low, high))[:, 0].numpy()
            threshold = otsu_threshold(central)
            found = [alignment.warning] if alignment.warning else []
            found += input_checks.histogram_warnings(trained.planes, trained.direction, name, central)
            head = head if sources else central > threshold
            outside = float((head & ~inside).sum() / max(head.sum(), 1)) if sources else 0.0
            if outside > MAX_LOST:
                found.append(f"{outside:.0%} of the head of the {first[0]}, in its central slab, is outside")
            sources[name] = Source(scan, alignment, (low, high), threshold)
            warnings += [f"{prefix}{text}" for text in found]
    return sources, warnings


def _above_threshold(voxels: NDArray[Any], threshold: float, scale: tuple[float, float]) -> NDArray[np.bool_]:
    """Mask of the stored voxels that exceed a stored threshold once both are in the scanner's units."""
    above: NDArray[np.bool_] = voxels > threshold if scale[0] > 0 else voxels < threshold
    return above


def _count_head_voxels(scan: Scan, threshold: float) -> list[NDArray[np.intp]]:
    """The number of voxels above the threshold at each index along k, j and i."""
    volume = scan.voxels
    counts = [np.zeros(n, np.intp) for n in volume.shape]
    step = max(1, BLOCK_PIXELS // max(1, volume[0].size))
    for start in range(0, len(volume), step):
        head = _above_threshold(volume[start : start + step], threshold, scan.scale)
        counts[0][start : start + step] = head.sum((1, 2))
        counts[1] += head.sum((0, 2))
        counts[2] += head.sum((0, 1))
    return counts


@torch.no_grad()
def _generate(trained: Trained, sources: Sequence[Source], channels: torch.Tensor) -> torch.Tensor:
    """Generate the planes with a head in a source from channels (B, C, H, W); the others become -1: (B, 1, H, W).

    A network that never saw planes of air in training generates patterns in them.
    """
    centres = channels[:, trained.neighbours :: 2 * trained.neighbours + 1]
    thresholds = torch.tensor([source.head_threshold for source in sources])
    generated = torch.full_like(centres[:, :1], -1)
    with_head = torch.nonzero((centres.amax((2, 3)) > thresholds).any(1)).flatten()
    for index in with_head.split(BATCH) if len(with_head) else ():  # `split` makes one empty part of nothing
        predicted = trained.predict(channels[index].to(trained.device), index.to(trained.device))
        generated[index] = predicted.clamp(-1, 1).cpu()
    return generated
