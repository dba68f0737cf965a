"""Synthesise NIfTI files: plan the output names, read, generate, write."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ixi_etl import __version__
from ixi_etl.core.files import read_json, to_json, write_atomic
from ixi_etl.core.progress import Progress, no_progress
from ixi_etl.errors import BadVolumeError, SynthesisError
from ixi_etl.scans import affines, nifti
from ixi_etl.scans.intensity import FULL_SCALE, INT16, MIN_LEVELS
from model.synthesize import MAX_VOXELS, Trained, log, synthesize_volume

SUFFIXES = (".nii.gz", ".nii")


def _name_warnings(name: str, direction: tuple[str, str]) -> list[str]:
    """A warning if a file's name contains the generator's target and not its source."""
    source, target = direction
    words = {word.removesuffix("w") for word in re.split(r"[^a-z0-9]+", name.lower())}
    if target.lower() not in words or source.lower() in words:
        return []
    return [f"by its name it is a {target.upper()}, and the generator takes a {source.upper()}; is it the right file?"]


def synthesize_file(trained: Trained, source: Path, out: Path, progress: Progress = no_progress) -> Path:
    """Generate `out` from the volume `source`, with a JSON sidecar that records how; return `out`.

    Voxels are int16, as the training targets are, with a slope and intercept where whole units are too coarse.

    Raises:
        SynthesisError: the input cannot be used; the message names it.
    """
    try:
        packed = _read(source)
        header, stored = nifti.read_volume(packed)
        assert header.affine is not None
        scale, label = (header.slope, header.intercept), f"synthesize {source.name}"
        made = synthesize_volume(trained, stored, header.affine, progress, label, scale)
    except BadVolumeError as error:
        raise SynthesisError(f"{source} cannot be used: {error.detail}") from error
    except SynthesisError as error:
        raise SynthesisError(f"{source} cannot be used: {error}") from error
    made.warnings += _name_warnings(source.name, trained.direction)
    if header.note:
        made.warnings.append(f"{header.note}; the {affines.space_name(header.space)} one is used")
    for warning in made.warnings:
        log.warning("%s: %s", source, warning)
    dropped = nifti.extension_codes(packed, header)
    if dropped:
        log.info("%s: %d header extensions are not copied (codes %s)", source, len(dropped), dropped)
    del stored
    voxels, slope, intercept = _to_int16(made.values, *trained.planes.target_low_high)
    made.values = np.empty(0, np.float32)  # frees memory
    first, last = (name.upper() for name in trained.direction)
    description = f"SYNTHETIC {last} of a {first}, ixi-etl {__version__}"
    description += f", generator {trained.record['GeneratorSHA256'][:12]}"
    plain = nifti.pack_like(nifti.read_head(packed), voxels, description, slope, intercept)
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
    """The bytes of a file.

    Raises:
        SynthesisError: the file cannot be read, or has too many voxels.
    """
    try:
        size = source.stat().st_size
        if size > nifti.MAX_VOLUME_BYTES + (2 << 20):
            raise SynthesisError(f"it has {size} bytes; the limit is {nifti.MAX_VOLUME_BYTES} bytes of voxels")
        packed = source.read_bytes()
    except OSError as error:
        raise SynthesisError(f"{error.strerror or error}") from error
    shape = nifti.parse_header(nifti.read_head(packed), len(packed)).shape
    if math.prod(shape) > MAX_VOXELS:
        raise SynthesisError(
            f"it has {' x '.join(map(str, shape))} voxels; the limit is {MAX_VOXELS} (512 x 512 x 512)"
        )
    return packed


def _to_int16(values: NDArray[np.float32], low: float, high: float) -> tuple[NDArray[np.int16], float, float]:
    """Voxels, slope and intercept for values from `low` to `high`; whole units where these are fine enough.

    Overwrites `values`, which are large.
    """
    slope, intercept = 1.0, 0.0
    if high - low < MIN_LEVELS or low < INT16.min or high > INT16.max:
        slope, intercept = (float(np.float32(x)) for x in ((high - low) / FULL_SCALE, (high + low) / 2))
    if (slope, intercept) != (1.0, 0.0):
        values -= np.float32(intercept)
        values /= np.float32(slope)
    np.rint(values, out=values)
    return values.clip(INT16.min, INT16.max, out=values).astype(np.int16), slope, intercept


def plan_outputs(inputs: Sequence[Path], out: Path, direction: tuple[str, str]) -> list[tuple[Path, Path]]:
    """The pairs (input, output) to process. A folder stands for the volumes in it.

    `out` is a file if there is a single input file, otherwise a folder, in which `sub-01_T1w.nii.gz` becomes
    `sub-01_T2w.nii.gz`.

    Raises:
        SynthesisError: there are no inputs, or an output would overwrite an input, another output or a foreign file.
    """
    sources = [path for given in inputs for path in (_volumes_in(given) if given.is_dir() else [given])]
    one = len(inputs) == 1 and not inputs[0].is_dir()
    is_file = bool(_suffix(out.name)) and not out.is_dir()
    if is_file and not one:
        raise SynthesisError(f"-o {out} is a single file, but there may be several outputs; give a folder")
    jobs = [(path, out if is_file else out / _renamed(path.name, direction)) for path in sources]
    taken = {path.resolve() for path in sources}
    for source, target in jobs:
        if not _suffix(source.name):
            raise SynthesisError(f"{source} is not a NIfTI file by its name; give {' or '.join(SUFFIXES)}")
        if not source.is_file():
            raise SynthesisError(f"{source} is not a file" if source.exists() else f"{source} does not exist")
        for written in (target, _sidecar(target)):
            if written.resolve() in taken:
                raise SynthesisError(f"{written} is an input, or would be written twice; give another -o")
            taken.add(written.resolve())
            if written.exists() and not _is_own_output(written):
                raise SynthesisError(f"{written} was not written by this command; move it, or give another -o")
    return jobs


def _volumes_in(folder: Path) -> list[Path]:
    """The volumes in a folder, sorted by name; skipped files are logged.

    Raises:
        SynthesisError: the folder holds no NIfTI volume.
    """
    found: list[Path] = []
    skipped: list[Path] = []
    hidden, folders = [], []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):  # including ._NAME and .DS_Store, which macOS writes
            hidden.append(path.name)
        elif _suffix(path.name):
            (found if path.is_file() else skipped).append(path)
        elif path.is_dir():
            folders.append(path.name)
    if hidden:
        log.warning("%s: skipped %d hidden files (%s ...)", folder, len(hidden), hidden[0])
    for path in skipped:
        log.warning("skipped %s: it is not a file, or a broken link", path)
    if not found:
        within = f"; give one of the {len(folders)} folders in it, such as {folders[0]}" if folders else ""
        raise SynthesisError(f"{folder} has no volume in it ({' or '.join(SUFFIXES)}){within}")
    if folders:
        log.info("%s: folders inside it are not searched (%s ...)", folder, folders[0])
    return found


def _is_own_output(path: Path) -> bool:
    """Whether `synthesize_file` wrote this volume or sidecar, so that it may be overwritten."""
    if path.suffix == ".json":
        record = read_json(path)
        return isinstance(record, dict) and "Generator" in record
    try:
        with path.open("rb") as file:
            return b"SYNTHETIC " in nifti.read_head(file.read(1 << 12))
    except (OSError, BadVolumeError):
        return False


def _suffix(name: str) -> str:
    """The suffix `.nii` or `.nii.gz` in the name's own case; "" if it has neither."""
    return next((name[-len(s) :] for s in SUFFIXES if name.lower().endswith(s)), "")


def _stem(path: Path) -> str:
    """The name without the suffix `.nii` or `.nii.gz`."""
    return path.name.removesuffix(_suffix(path.name))


def _sidecar(out: Path) -> Path:
    return out.with_name(f"{_stem(out)}.json")


def _renamed(name: str, direction: tuple[str, str]) -> str:
    """`IXI002-T1.nii.gz` -> `IXI002-T2.nii.gz`; a name that does not end in the source gets the target appended."""
    source, target = direction
    stem = _stem(Path(name))
    renamed = re.sub(rf"(?i)(?<![a-z0-9]){re.escape(source)}(?=w?$)", lambda _: target.upper(), stem)
    return f"{renamed if renamed != stem else f'{stem}-{target.upper()}'}{_suffix(name).lower()}"


def _check_writable(folder: Path) -> None:
    """Create a folder if needed; raise `SynthesisError` unless files can be written into it."""
    probe = folder / f".{os.getpid()}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SynthesisError(f"cannot write to {folder}: {error.strerror or error}; give another -o") from error


def synthesize(trained: Trained, jobs: Sequence[tuple[Path, Path]], progress: Progress = no_progress) -> list[Path]:
    """Process the pairs of `plan_outputs`; return the volumes written. An unusable input does not stop the others.

    Raises:
        SynthesisError: the output folder is not writable; or, after all others were written, some inputs are unusable.
    """
    for folder in {out.parent for _, out in jobs}:
        _check_writable(folder)  # before minutes of work
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
