"""A whole volume in, a whole volume of the other modality out, on the input's own grid.

The way is the training's: the volume is interpolated once onto planes of the training's size and spacing, normalised
by the percentiles of its own central slab, generated plane by plane, scaled to the median percentiles of the training's
targets, and interpolated back. All that is known of the training stands in `generator.safetensors`; the dataset is not
needed. Volumes are [k, j, i] as stored, planes [z, y, x].
"""

from __future__ import annotations

import gzip
import hashlib
import logging
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
from ixi_etl.files import Progress, sha256_file, silent, to_json, write_atomic
from ixi_etl.intensity import otsu_threshold, percentiles
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
SPACING_WARNED, SPACING_REFUSED = 1.5, 8.0  # times the training source's, or a part of it
DIRECTION = re.compile(r"([A-Za-z0-9_]+)->([A-Za-z0-9_]+)")
MAX_BEYOND = 0.05  # of the head, outside the planes


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
    }
    method = generated_by(generator, dropout=dropout)
    return Trained(method, wanted, (direction[1], direction[2]), device, record)


def synthesize_volume(
    trained: Trained, volume: NDArray[Any], affine: Matrix, progress: Progress = silent, what: str = "synthesize"
) -> Synthesis:
    """The other modality of `volume` [k, j, i], on its own grid; the low end of its range where there is no head.

    Raises:
        SynthesisError: it is too unlike what the generator was trained on, or empty.
    """
    wanted = trained.planes
    warnings = _spacing_warnings(wanted, planes.spacing_of(affine))
    threshold = otsu_threshold(volume)
    head = volume > threshold
    if not head.any():
        raise SynthesisError(f"it is empty: it has no voxel above {threshold:g}")
    grid, shape = planes.through(wanted, volume.shape, affine, align.world_points(head, affine))
    sampled, inside = align.resample(volume, align.sampling_matrix(grid, affine, np.eye(4)), shape)
    thickness = float(np.linalg.norm(grid[:3, 2]))
    slab = planes.slab_of(wanted, shape[0], thickness)
    low, high = percentiles(sampled[slab][None])[0].tolist()
    if not low < high:
        raise SynthesisError(f"it is empty: its middle {wanted.slab_mm:g} mm hold no other value than {low:g}")

    source = normalise(torch.from_numpy(sampled), torch.tensor([[low, high]]))
    source[~torch.from_numpy(inside).unsqueeze(1)] = -1  # background, as in training
    warnings += _modality_warnings(trained, source[slab, 0].numpy())
    # Where there is no head there is nothing to translate: a network that was never shown air draws patterns into it.
    of_head = torch.nonzero(source.amax((1, 2, 3)) > otsu_threshold(source[slab].numpy())).flatten()
    generated = torch.full_like(source, -1)
    with torch.no_grad():
        for done, at in enumerate(of_head.split(BATCH), 1):
            generated[at] = trained.method(source[at].to(trained.device), at.to(trained.device)).clamp(-1, 1).cpu()
            progress(what, min(done * BATCH, len(of_head)), len(of_head), "planes")

    low_target, high_target = wanted.target_low_high
    scaled = ((generated[:, 0] + 1) / 2 * (high_target - low_target) + low_target).numpy()
    values, known = align.resample(scaled, align.sampling_matrix(affine, grid, np.eye(4)), volume.shape)
    values[~known] = low_target
    beyond = float((head & ~known).sum() / max(head.sum(), 1))
    if beyond > MAX_BEYOND:
        size = " x ".join(f"{n * mm:g}" for n, mm in zip(wanted.shape[::-1], wanted.spacing_mm, strict=True))
        warnings.append(f"{beyond:.0%} of the head lies beyond the {size} mm of a training slice, and is left empty")
    return Synthesis(values, (low, high), warnings)


def _spacing_warnings(wanted: Planes, spacing_mm: NDArray[np.float64]) -> list[str]:
    ratio = spacing_mm / wanted.source_spacing_mm
    furthest = float(np.maximum(ratio, 1 / ratio).max())
    here, there = (" x ".join(f"{mm:.4g}" for mm in size) for size in (spacing_mm, wanted.source_spacing_mm))
    said = f"voxels of {here} mm (along x, y, z) are far from the {there} mm that the generator was trained on"
    if furthest > SPACING_REFUSED:
        raise SynthesisError(f"{said}; is the header's spacing in mm?")
    return [said] if furthest > SPACING_WARNED else []


def _modality_warnings(trained: Trained, slab: NDArray[np.float32]) -> list[str]:
    """Whether the histogram of a normalised slab is nearer to those of the training targets than of its sources."""
    found, (source, target) = planes.histogram(slab), trained.direction
    to_source = planes.distance(found, trained.planes.source_histogram)
    to_target = planes.distance(found, trained.planes.target_histogram)
    if to_source <= to_target:
        return []
    said = f"by its histogram it looks more like a {target.upper()} than a {source.upper()}"
    return [f"{said} (distance {to_target:.3f} against {to_source:.3f}); is it the right file?"]


# -- files ------------------------------------------------------------------------------------------------------------


def synthesize_file(trained: Trained, source: Path, out: Path, progress: Progress = silent) -> Path:
    """Write the volume `out`, and beside it a JSON that says how it came to be; the path of the volume.

    Voxels are int16, as the targets of the training were: rounding them moves none by more than half a unit of about a
    thousand, which is far below what a generator can be right to.

    Raises:
        SynthesisError: the input cannot be used; the message names it.
    """
    packed = source.read_bytes()
    try:
        header, stored = nifti.read(packed)
        assert header.affine is not None
        volume = header.scaled(stored)
        made = synthesize_volume(trained, volume, header.affine, progress, f"synthesize {source.name}")
    except BadVolumeError as error:
        raise SynthesisError(f"{source} cannot be used: {error.detail}") from error
    except SynthesisError as error:
        raise SynthesisError(f"{source} cannot be used: {error}") from error
    for warning in made.warnings:
        log.warning("%s: %s", source, warning)
    limits = np.iinfo(np.int16)
    values = np.rint(made.values).clip(limits.min, limits.max).astype(np.int16)
    first, last = (name.upper() for name in trained.direction)
    said = f"SYNTHETIC {last} of a {first}, ixi-etl {__version__}, generator {trained.record['GeneratorSHA256'][:12]}"
    plain = nifti.pack_like(nifti.head_of(packed), values, said)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, gzip.compress(plain, 4, mtime=0) if out.suffix == ".gz" else plain)
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
        "Warnings": made.warnings,
    }
    write_atomic(out.with_name(f"{_stem(out)}.json"), to_json(sidecar))
    return out


def plan(inputs: Sequence[Path], out: Path, direction: tuple[str, str]) -> list[tuple[Path, Path]]:
    """What becomes of which file: (input, output). A folder stands for the volumes that lie in it.

    `out` is a file for a single file, else a folder, in which `sub-01_T1w.nii.gz` becomes `sub-01_T2w.nii.gz`.

    Raises:
        SynthesisError: there is nothing to do, or an output would overwrite another or an input.
    """
    sources = [path for given in inputs for path in (_volumes_in(given) if given.is_dir() else [given])]
    one = len(inputs) == 1 and not inputs[0].is_dir()
    if _stem(out) != out.name and not one:
        raise SynthesisError(f"-o {out} is one file, and there may be several to write; give a folder")
    jobs = [(path, out if _stem(out) != out.name else out / _renamed(path.name, direction)) for path in sources]
    taken = {path.resolve() for path in sources}
    for source, target in jobs:
        if _stem(source) == source.name:
            raise SynthesisError(f"{source} is no NIfTI file by its name; give {' or '.join(SUFFIXES)}")
        if not source.is_file():
            raise SynthesisError(f"{source} is not there")
        if target.resolve() in taken:
            raise SynthesisError(f"{target} is an input, or would be written twice; give another -o")
        taken.add(target.resolve())
    return jobs


def _volumes_in(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIXES))
    if not found:
        raise SynthesisError(f"{folder} has no volume in it ({' or '.join(SUFFIXES)})")
    return found


def _stem(path: Path) -> str:
    """The name without `.nii` or `.nii.gz`; the whole name if it has neither."""
    return next((path.name.removesuffix(s) for s in SUFFIXES if path.name.endswith(s)), path.name)


def _renamed(name: str, direction: tuple[str, str]) -> str:
    """`IXI002-T1.nii.gz` -> `IXI002-T2.nii.gz`, and what does not end in the source's name gets the target's."""
    source, target = direction
    stem = _stem(Path(name))
    renamed = re.sub(rf"(?i)(?<![a-z0-9]){re.escape(source)}(?=w?$)", lambda _: target.upper(), stem)
    return f"{renamed if renamed != stem else f'{stem}-{target.upper()}'}{name[len(stem) :]}"


def synthesize(trained: Trained, jobs: Sequence[tuple[Path, Path]], progress: Progress = silent) -> list[Path]:
    """The volumes written. One that cannot be used is no reason to leave the others.

    Raises:
        SynthesisError: some could not be used, after all others are written.
    """
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
