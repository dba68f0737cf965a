"""A whole volume in, a whole volume of the other modality out, on the input's own grid.

The way is the training's: the volume is interpolated once onto planes of the training's size and spacing, normalised
by the percentiles of its own central slab, generated plane by plane, scaled to the median percentiles of the training's
targets, and interpolated back. Planes are made, generated and interpolated back a block at a time, so memory depends on
the volume alone and not on how many planes go through it. All that is known of the training stands in
`generator.safetensors`; the dataset is not needed. Volumes are [k, j, i] as stored, planes [z, y, x].
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ixi_etl import __version__, align, nifti
from ixi_etl.align import Matrix
from ixi_etl.errors import BadVolumeError, IxiError
from ixi_etl.files import Progress, read_json, sha256_file, silent, to_json, write_atomic
from ixi_etl.intensity import FULL_SCALE, INT16, LEAST_UNITS, otsu_threshold, percentiles
from model import checkpoint, planes
from model.checkpoint import CheckpointError
from model.config import SEEDS
from model.data import normalise
from model.evaluate import BATCH, Method, generated_by, load_generator
from model.planes import Planes
from model.run import find_run
from model.train import GENERATOR

log = logging.getLogger(__name__)

SUFFIXES = (".nii.gz", ".nii")
SPACING_WARNED, SPACING_REFUSED = 1.5, 8.0
"""Times the training source's, or a part of it. Warned: T1s of 0.8 mm, and IXI's own of 0.94 x 0.94 x 1.2 mm, are
within it of each other; clinical slices of 3 mm are not. Refused: nothing real; spacing in other units than mm is."""
DIRECTION = re.compile(r"([A-Za-z0-9_]+)->([A-Za-z0-9_]+)")
MAX_BEYOND = 0.05  # of the head, outside the planes
MAX_VOXELS = 1 << 27  # 512 x 512 x 512
BLOCK_PIXELS = 1 << 22  # of planes, or of a volume, that are worked on at a time

NEAR_TARGET, FARTHER_FROM_SOURCE = 0.05, 2.0
"""A histogram is called the target's if it is as near to the training's as this, and so many times nearer than to the
source's. Intensities differ so much between protocols that a T1 is often nearer to another protocol's T2 than to its
T1; docs/synthesis.md has the measures."""


class SynthesisError(IxiError):
    """A generator cannot be used on volumes, or a volume not with a generator."""


@dataclass(frozen=True)
class Trained:
    """A generator to synthesise with.

    Attributes:
        method: generates planes (B, 1, H, W) in [-1, 1].
        planes: what it was trained on.
        direction: names of source and target.
        device: where it computes.
        record: what a sidecar says of it.
    """

    method: Method
    planes: Planes
    direction: tuple[str, str]
    device: str
    record: dict[str, Any]


@dataclass
class Synthesis:
    """What became of a volume.

    Attributes:
        values: [k, j, i] float32, in the units of the training's median target.
        source_low_high: the input's values that became -1 and 1.
        warnings: in what the input was unlike the training's sources, a line each.
    """

    values: NDArray[np.float32]
    source_low_high: tuple[float, float]
    warnings: list[str] = field(default_factory=list)


def find_generator(root: str | Path, name: str, scratch: Path | None = None) -> Path:
    """The generator's file of a run named as for `find_run`; or of a folder or file, wherever it lies.

    Raises:
        CheckpointError: there is none.
    """
    here = Path(name)
    if here.suffix == Path(GENERATOR).suffix and here.is_file():
        return here
    folder = here if (here / GENERATOR).is_file() else find_run(root, name, scratch)
    if not (folder / GENERATOR).is_file():
        raise CheckpointError(f"{folder} has no {GENERATOR} yet; `ixi-etl train --resume` writes it at the end")
    return folder / GENERATOR


def load(path: Path, device: str = "cpu", *, dropout: bool = False, seed: int = 0) -> Trained:
    """The generator in `path`. `dropout` leaves its noise on, drawn from `seed`.

    Raises:
        CheckpointError: the file is missing or damaged, or says what cannot be.
        SynthesisError: it was not trained on axial planes of heads; or the seed is too large.
    """
    if not -SEEDS <= seed < SEEDS:
        raise SynthesisError(f"seed {seed} is no number of 64 bits; give a smaller one")
    facts = checkpoint.read_facts(path)
    if "planes" not in facts:
        raise SynthesisError(f"{path} does not say which planes it was trained on; `ixi-etl train --resume` adds that")
    generator, config, step = load_generator(path, device)
    wanted = planes.of(path, facts)
    if wanted is None:
        name = config.dataset.partition("@")[0]
        why = "slices paired by index, which show two different planes" if name != "digits" else "digits, not on heads"
        raise SynthesisError(f"{path} was trained on {why}: no volume can be made; train on a version made by `paired`")
    direction = DIRECTION.fullmatch(str(config.direction))  # of which names of files are made
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
        **{name.capitalize(): facts[name] for name in ("licence", "credit") if name in facts},  # of the training's data
    }
    method = generated_by(generator, dropout=dropout)
    return Trained(method, wanted, (direction[1], direction[2]), device, record)


def synthesize_volume(
    trained: Trained,
    volume: NDArray[Any],
    affine: Matrix,
    progress: Progress = silent,
    what: str = "synthesize",
    scale: tuple[float, float] = (1.0, 0.0),
) -> Synthesis:
    """The other modality of `volume` [k, j, i], on its own grid; the low end of its range where there is no head.

    `scale` is slope and intercept, that take the voxels to the scanner's units.

    Raises:
        SynthesisError: it is too unlike what the generator was trained on, or empty.
    """
    wanted = trained.planes
    warnings = _spacing_warnings(wanted, planes.spacing_of(affine))
    threshold = otsu_threshold(volume)
    counts = _head_counts(volume, threshold, scale)
    if not counts[0].any():
        raise SynthesisError(f"it is empty: it has no voxel above {threshold * scale[0] + scale[1]:g}")
    grid, shape = planes.through(wanted, volume.shape, affine, counts)
    slab = planes.slab_of(wanted, shape[0], float(np.linalg.norm(grid[:3, 2])))
    sampled, inside = _sampled(volume, affine, scale, grid, shape, slab)
    low, high = percentiles(sampled[None])[0].tolist()
    if not low < high:
        raise SynthesisError(f"it is empty: its middle {wanted.slab_mm:g} mm hold no other value than {low:g}")
    central = _normalised(sampled, inside, low, high)
    warnings += _modality_warnings(trained, central[:, 0].numpy())
    head_above = otsu_threshold(central.numpy())
    del sampled, inside, central

    low_target, high_target = wanted.target_low_high
    values = np.full(volume.shape, low_target, np.float32)
    axis, to_inferior = planes.axial_axis(affine)
    lost, per_block = 0, max(BATCH, BLOCK_PIXELS // max(shape[1] * shape[2], volume.size // shape[0]))
    for start in range(0, shape[0], per_block):
        block = slice(start, min(start + per_block, shape[0]))
        source = _normalised(*_sampled(volume, affine, scale, grid, shape, block), low, high)
        generated = _generate(trained, source, head_above)
        scaled = ((generated[:, 0] + 1) / 2 * (high_target - low_target) + low_target).numpy()
        # A plane lies on each of the volume's own voxels along this axis: a block of the one is a block of the other.
        first = shape[0] - block.stop if to_inferior else block.start
        part = tuple(slice(first, first + len(scaled)) if n == axis else slice(None) for n in range(3))
        there, on_grid = affine @ _shifted(2 - axis, first), grid @ _shifted(2, start)
        back, known = align.resample(scaled, align.sampling_matrix(there, on_grid, np.eye(4)), values[part].shape)
        back[~known] = low_target
        values[part] = back
        lost += int((_is_head(volume[part], threshold, scale) & ~known).sum())
        progress(what, block.stop, shape[0], "planes")
    beyond = lost / max(int(counts[0].sum()), 1)
    if beyond > MAX_BEYOND:
        size = " x ".join(f"{n * mm:g}" for n, mm in zip(wanted.shape[::-1], wanted.spacing_mm, strict=True))
        warnings.append(f"{beyond:.0%} of the head lies beyond the {size} mm of a training slice, and is left empty")
    return Synthesis(values, (low, high), warnings)


def _is_head(voxels: NDArray[Any], threshold: float, scale: tuple[float, float]) -> NDArray[np.bool_]:
    """Which voxels lie above a threshold, given as they are stored, in the scanner's units."""
    above: NDArray[np.bool_] = voxels > threshold if scale[0] > 0 else voxels < threshold
    return above


def _head_counts(volume: NDArray[Any], threshold: float, scale: tuple[float, float]) -> list[NDArray[np.intp]]:
    """How many voxels of the head there are at each index along k, j and i."""
    counts = [np.zeros(n, np.intp) for n in volume.shape]
    step = max(1, BLOCK_PIXELS // max(1, volume[0].size))
    for start in range(0, len(volume), step):
        head = _is_head(volume[start : start + step], threshold, scale)
        counts[0][start : start + step] = head.sum((1, 2))
        counts[1] += head.sum((0, 2))
        counts[2] += head.sum((0, 1))
    return counts


def _sampled(
    volume: NDArray[Any],
    affine: Matrix,
    scale: tuple[float, float],
    grid: Matrix,
    shape: tuple[int, int, int],
    block: slice,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Planes `block` of the grid through a volume, in the scanner's units, 0 outside of it; and what is inside."""
    matrix = align.sampling_matrix(grid @ _shifted(2, block.start), affine, np.eye(4))
    sampled, inside = align.resample(volume, matrix, (block.stop - block.start, *shape[1:]))
    if scale != (1.0, 0.0):
        sampled *= scale[0]
        sampled += scale[1]
        sampled[~inside] = 0
    return sampled, inside


def _normalised(sampled: NDArray[np.float32], inside: NDArray[np.bool_], low: float, high: float) -> torch.Tensor:
    """Planes as the generator takes them: (B, 1, H, W) in [-1, 1], background outside the volume, as in training."""
    source = normalise(torch.from_numpy(sampled), torch.tensor([[low, high]]))
    source[~torch.from_numpy(inside).unsqueeze(1)] = -1
    return source


@torch.no_grad()
def _generate(trained: Trained, source: torch.Tensor, head_above: float) -> torch.Tensor:
    """What the generator makes of the planes with a head; -1 for the others.

    A network that was never shown air draws patterns into it.
    """
    generated = torch.full_like(source, -1)
    with_head = torch.nonzero(source.amax((1, 2, 3)) > head_above).flatten()
    for at in with_head.split(BATCH) if len(with_head) else ():  # nothing is split into one empty part
        generated[at] = trained.method(source[at].to(trained.device), at.to(trained.device)).clamp(-1, 1).cpu()
    return generated


def _shifted(axis: int, by: int) -> Matrix:
    """Takes indices of a part of a grid to indices of the whole."""
    matrix = np.eye(4)
    matrix[axis, 3] = by
    return matrix


def _spacing_warnings(wanted: Planes, spacing_mm: NDArray[np.float64]) -> list[str]:
    ratio = spacing_mm / wanted.source_spacing_mm
    furthest = float(np.maximum(ratio, 1 / ratio).max())
    here, there = (" x ".join(f"{mm:.4g}" for mm in size) for size in (spacing_mm, wanted.source_spacing_mm))
    said = f"voxels of {here} mm (along x, y, z) are far from the {there} mm that the generator was trained on"
    if furthest > SPACING_REFUSED:
        raise SynthesisError(f"{said}; is the header's spacing in mm?")
    return [said] if furthest > SPACING_WARNED else []


def _modality_warnings(trained: Trained, slab: NDArray[np.float32]) -> list[str]:
    """Whether a normalised slab has the histogram of the training's targets."""
    found, (source, target) = planes.histogram(slab), trained.direction
    to_source = planes.distance(found, trained.planes.source_histogram)
    to_target = planes.distance(found, trained.planes.target_histogram)
    if to_target > NEAR_TARGET or to_source <= FARTHER_FROM_SOURCE * to_target:
        return []
    said = f"by its histogram it looks more like a {target.upper()} than a {source.upper()}"
    return [f"{said} (distance {to_target:.3f} against {to_source:.3f}); is it the right file?"]


def _name_warnings(name: str, direction: tuple[str, str]) -> list[str]:
    """Whether a file's name says that it is what the generator makes, and not what it takes."""
    source, target = direction
    words = {word.removesuffix("w") for word in re.split(r"[^a-z0-9]+", name.lower())}
    if target.lower() not in words or source.lower() in words:
        return []
    return [f"by its name it is a {target.upper()}, and the generator takes a {source.upper()}; is it the right file?"]


# -- files ------------------------------------------------------------------------------------------------------------


def synthesize_file(trained: Trained, source: Path, out: Path, progress: Progress = silent) -> Path:
    """Write the volume `out`, and beside it a JSON that says how it came to be; the path of the volume.

    Voxels are int16, as the targets of the training were, with a slope and intercept where whole units would be coarse.

    Raises:
        SynthesisError: the input cannot be used; the message names it.
    """
    try:
        packed = _read(source)
        header, stored = nifti.read(packed)
        assert header.affine is not None
        scale, what = (header.slope, header.intercept), f"synthesize {source.name}"
        made = synthesize_volume(trained, stored, header.affine, progress, what, scale)
    except BadVolumeError as error:
        raise SynthesisError(f"{source} cannot be used: {error.detail}") from error
    except SynthesisError as error:
        raise SynthesisError(f"{source} cannot be used: {error}") from error
    made.warnings += _name_warnings(source.name, trained.direction)
    if header.note:
        made.warnings.append(f"{header.note}; the {nifti.space_name(header.space)} one is used")
    for warning in made.warnings:
        log.warning("%s: %s", source, warning)
    dropped = nifti.extension_codes(packed, header)
    if dropped:
        log.info("%s: %d header extensions are not copied (codes %s)", source, len(dropped), dropped)
    del stored
    voxels, slope, intercept = _to_int16(made.values, *trained.planes.target_low_high)
    made.values = np.empty(0, np.float32)  # it is large, and no longer needed
    first, last = (name.upper() for name in trained.direction)
    said = f"SYNTHETIC {last} of a {first}, ixi-etl {__version__}, generator {trained.record['GeneratorSHA256'][:12]}"
    plain = nifti.pack_like(nifti.head_of(packed), voxels, said, slope, intercept)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, gzip.compress(plain, 4, mtime=0) if out.suffix.lower() == ".gz" else plain)
    sidecar = {
        "Description": f"Synthetic {last}, generated from a {first} by a neural network; no measurement",
        "Sources": [source.name],
        "SourcesSHA256": [hashlib.sha256(packed).hexdigest()],
        "SkullStripped": False,
        "SpatialReference": "orig",
        "GeneratedBy": [{"Name": "ixi-etl", "Version": __version__}],
        "Generator": trained.record,
        "SourceRange": list(made.source_low_high),
        "TargetRange": list(trained.planes.target_low_high),
        "TrainedSlab": {"Thickness": trained.planes.slab_mm, "Units": "mm"},
        "HeaderExtensionsDropped": dropped,
        "Warnings": made.warnings,
    }
    write_atomic(_sidecar(out), to_json(sidecar))
    return out


def _read(source: Path) -> bytes:
    """The file's bytes, if it is not too large.

    Raises:
        SynthesisError: it has more voxels than fit the memory that this may take, or cannot be read.
    """
    try:
        size = source.stat().st_size
        if size > nifti.MAX_VOLUME_BYTES + (2 << 20):
            raise SynthesisError(f"it has {size} bytes; {nifti.MAX_VOLUME_BYTES} of voxels are the most")
        packed = source.read_bytes()
    except OSError as error:
        raise SynthesisError(f"{error.strerror or error}") from error
    shape = nifti.parse_header(nifti.head_of(packed), len(packed)).shape
    if math.prod(shape) > MAX_VOXELS:
        raise SynthesisError(
            f"it has {' x '.join(map(str, shape))} voxels; {MAX_VOXELS} are the most (512 x 512 x 512)"
        )
    return packed


def _to_int16(values: NDArray[np.float32], low: float, high: float) -> tuple[NDArray[np.int16], float, float]:
    """Voxels, slope and intercept of values from `low` to `high`; whole units where these are fine enough.

    Works in `values`, as these are large.
    """
    slope, intercept = 1.0, 0.0
    if high - low < LEAST_UNITS or low < INT16.min or high > INT16.max:
        slope, intercept = (float(np.float32(x)) for x in ((high - low) / FULL_SCALE, (high + low) / 2))
    if (slope, intercept) != (1.0, 0.0):
        values -= np.float32(intercept)
        values /= np.float32(slope)
    np.rint(values, out=values)
    return values.clip(INT16.min, INT16.max, out=values).astype(np.int16), slope, intercept


def plan(inputs: Sequence[Path], out: Path, direction: tuple[str, str]) -> list[tuple[Path, Path]]:
    """What becomes of which file: (input, output). A folder stands for the volumes that lie in it.

    `out` is a file for a single file, else a folder, in which `sub-01_T1w.nii.gz` becomes `sub-01_T2w.nii.gz`.

    Raises:
        SynthesisError: there is nothing to do, or an output would overwrite another or an input.
    """
    sources = [path for given in inputs for path in (_volumes_in(given) if given.is_dir() else [given])]
    one = len(inputs) == 1 and not inputs[0].is_dir()
    is_file = bool(_suffix(out.name)) and not out.is_dir()
    if is_file and not one:
        raise SynthesisError(f"-o {out} is one file, and there may be several to write; give a folder")
    jobs = [(path, out if is_file else out / _renamed(path.name, direction)) for path in sources]
    taken = {path.resolve() for path in sources}
    for source, target in jobs:
        if not _suffix(source.name):
            raise SynthesisError(f"{source} is no NIfTI file by its name; give {' or '.join(SUFFIXES)}")
        if not source.is_file():
            raise SynthesisError(f"{source} is not a file" if source.exists() else f"{source} is not there")
        for written in (target, _sidecar(target)):
            if written.resolve() in taken:
                raise SynthesisError(f"{written} is an input, or would be written twice; give another -o")
            taken.add(written.resolve())
            if written.exists() and not _is_made_here(written):
                raise SynthesisError(f"{written} is there, and no work of this command; move it, or give another -o")
    return jobs


def _volumes_in(folder: Path) -> list[Path]:
    """The volumes that lie in a folder, by name; what is passed over is logged."""
    found: list[Path] = []
    others: list[Path] = []
    hidden, folders = [], []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):  # also what macOS writes beside each file: ._NAME, .DS_Store
            hidden.append(path.name)
        elif _suffix(path.name):
            (found if path.is_file() else others).append(path)
        elif path.is_dir():
            folders.append(path.name)
    if hidden:
        log.warning("%s: %d hidden files are passed over (%s ...)", folder, len(hidden), hidden[0])
    for path in others:
        log.warning("%s is passed over: it is no file, or a link to none", path)
    if not found:
        within = f"; give one of the {len(folders)} folders in it, such as {folders[0]}" if folders else ""
        raise SynthesisError(f"{folder} has no volume in it ({' or '.join(SUFFIXES)}){within}")
    if folders:
        log.info("%s: the folders in it are not searched (%s ...)", folder, folders[0])
    return found


def _is_made_here(path: Path) -> bool:
    """Whether a file is a volume or a sidecar that `synthesize_file` wrote, which may be written again."""
    if path.suffix == ".json":
        record = read_json(path)
        return isinstance(record, dict) and "Generator" in record
    try:
        with path.open("rb") as file:
            return b"SYNTHETIC " in nifti.head_of(file.read(1 << 12))
    except (OSError, BadVolumeError):
        return False


def _suffix(name: str) -> str:
    """`.nii` or `.nii.gz`, as it is written; "" if the name has neither."""
    return next((name[-len(s) :] for s in SUFFIXES if name.lower().endswith(s)), "")


def _stem(path: Path) -> str:
    """The name without `.nii` or `.nii.gz`; the whole name if it has neither."""
    return path.name.removesuffix(_suffix(path.name))


def _sidecar(out: Path) -> Path:
    return out.with_name(f"{_stem(out)}.json")


def _renamed(name: str, direction: tuple[str, str]) -> str:
    """`IXI002-T1.nii.gz` -> `IXI002-T2.nii.gz`, and what does not end in the source's name gets the target's."""
    source, target = direction
    stem = _stem(Path(name))
    renamed = re.sub(rf"(?i)(?<![a-z0-9]){re.escape(source)}(?=w?$)", lambda _: target.upper(), stem)
    return f"{renamed if renamed != stem else f'{stem}-{target.upper()}'}{_suffix(name).lower()}"


def _check_writable(folder: Path) -> None:
    """Raise `SynthesisError` unless files can be written into a folder, which is made if it is not there."""
    probe = folder / f".{os.getpid()}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SynthesisError(f"cannot write to {folder}: {error.strerror or error}; give another -o") from error


def synthesize(trained: Trained, jobs: Sequence[tuple[Path, Path]], progress: Progress = silent) -> list[Path]:
    """The volumes written. One that cannot be used is no reason to leave the others.

    Raises:
        SynthesisError: nothing can be written; or some could not be used, after all others are written.
    """
    for folder in {out.parent for _, out in jobs}:
        _check_writable(folder)  # better now than after minutes of work
    written, problems = [], []
    for source, out in jobs:
        try:
            written.append(synthesize_file(trained, source, out, progress))
        except SynthesisError as error:
            if len(jobs) == 1:
                raise
            log.warning("%s", error)
            problems.append(error)
    if problems:
        raise SynthesisError(f"{len(problems)} of {len(jobs)} inputs could not be used; the first: {problems[0]}")
    return written
