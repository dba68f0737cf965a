"""Synthesise NIfTI files: read, generate, write."""

from __future__ import annotations

import gzip
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ixi_etl import __version__
from ixi_etl.core.files import to_json, write_atomic
from ixi_etl.core.progress import Progress, no_progress
from ixi_etl.core.text import quantity
from ixi_etl.errors import BadVolumeError, SynthesisError
from ixi_etl.scans import affines, nifti
from ixi_etl.scans.intensity import FULL_SCALE, INT16, MIN_LEVELS
from model.input_checks import name_warnings
from model.outputs import Job, check_writable, sidecar_path
from model.source_planes import Alignment, Scan
from model.synthesize import MAX_VOXELS, Synthesis, Trained, log, synthesize_volume


@dataclass
class SourceFile:
    """A file that was read: its bytes, and its header and voxels."""

    path: Path
    packed: bytes
    header: nifti.Header
    voxels: NDArray[Any]

    @property
    def scan(self) -> Scan:
        assert self.header.affine is not None
        return Scan(self.voxels, self.header.affine, (self.header.slope, self.header.intercept))


def synthesize_file(
    trained: Trained, source: Path | Mapping[str, Path], out: Path, progress: Progress = no_progress
) -> Path:
    """Generate `out` from a volume, with a JSON sidecar that records how; return `out`.

    `source` is the file, or the file of each source by its name, where the output is on the grid of the first. Voxels
    are int16, as the training targets are, with a slope and intercept where whole units are too coarse.

    Raises:
        SynthesisError: an input cannot be used; the message names it.
    """
    paths = {trained.direction.sources[0]: source} if isinstance(source, Path) else dict(source)
    files = [_open(path) for path in paths.values()]
    _use_common_space(files)
    first = files[0]
    try:
        scans = {name: file.scan for name, file in zip(paths, files, strict=True)}
        made = synthesize_volume(trained, scans, progress, f"synthesize {first.path.name}")
        del scans
    except SynthesisError as error:
        raise SynthesisError(f"{' and '.join(map(str, paths.values()))} cannot be used: {error}") from error
    made.warnings += _file_warnings(trained, paths, files)
    for warning in made.warnings:
        log.warning("%s: %s", first.path, warning)
    dropped = nifti.extension_codes(first.packed, first.header)
    if dropped:
        extensions = quantity(len(dropped), "header extension")
        log.info("%s: left out %s (codes %s)", first.path, extensions, dropped)
    digests = [hashlib.sha256(file.packed).hexdigest() for file in files]
    head = nifti.read_head(first.packed)
    del first, files  # frees memory
    voxels, slope, intercept = _to_int16(made.values, *trained.planes.target_low_high)
    made.values = np.empty(0, np.float32)  # frees memory
    target, taken = trained.direction.target.upper(), " and ".join(name.upper() for name in paths)
    taken = f"a {taken}" if len(paths) == 1 else taken
    description = f"SYNTHETIC {target} of {taken}, ixi-etl {__version__}"
    description += f", generator {trained.record['GeneratorSHA256'][:12]}"
    plain = nifti.pack_like(head, voxels, description, slope, intercept)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, gzip.compress(plain, 4, mtime=0) if out.suffix.lower() == ".gz" else plain)
    sidecar = {
        "Description": f"Synthetic {target}, generated from {taken} by a neural network; no measurement",
        "Sources": [path.name for path in paths.values()],
        "SourcesSHA256": digests,
        "SkullStripped": False,
        "SpatialReference": "orig",
        "GeneratedBy": [{"Name": "ixi-etl", "Version": __version__}],
        "Generator": trained.record,
        **_describe_sources(made),
        "TargetRange": list(trained.planes.target_low_high),
        "TrainedSlab": {"Thickness": trained.planes.slab_mm, "Units": "mm"},
        "HeaderExtensionsDropped": dropped,
        "Warnings": made.warnings,
    }
    write_atomic(sidecar_path(out), to_json(sidecar))
    return out


def _open(path: Path) -> SourceFile:
    """Read a volume.

    Raises:
        SynthesisError: it cannot be used; the message names it.
    """
    try:
        packed = _read(path)
        return SourceFile(path, packed, *nifti.read_volume(packed))
    except BadVolumeError as error:
        raise SynthesisError(f"{path} cannot be used: {error.detail}") from error
    except SynthesisError as error:
        raise SynthesisError(f"{path} cannot be used: {error}") from error


def _use_common_space(files: Sequence[SourceFile]) -> None:
    """Use the form of each header that a refresh would use for the scans of a subject.

    Raises:
        SynthesisError: the files share no space.
    """
    spaces = affines.choose_spaces(*(file.header.forms for file in files))
    if spaces is None:
        names = " and ".join(str(file.path) for file in files)
        raise SynthesisError(f"{names} cannot be used together: their headers share no space")
    for file, space in zip(files, spaces, strict=True):
        file.header.use(space)


def _file_warnings(trained: Trained, names: Iterable[str], files: Sequence[SourceFile]) -> list[str]:
    """Warnings about names and headers."""
    warnings = []
    for name, file in zip(names, files, strict=True):
        found = name_warnings(file.path.name, trained.direction, name)
        if file.header.note:
            found.append(f"{file.header.note}; the {affines.space_name(file.header.space)} one is used")
        warnings += [f"{name}: {text}" if len(files) > 1 else text for text in found]
    return warnings


def _describe_sources(made: Synthesis) -> dict[str, Any]:
    """The fields of the sidecar that say what was done to the sources; by name if there are several."""
    ranges = {name: list(low_high) for name, low_high in made.source_low_high.items()}
    if len(ranges) == 1:
        return {"SourceRange": next(iter(ranges.values()))}
    registration = {name: _describe_alignment(alignment) for name, alignment in made.alignments.items()}
    return {"SourceModalities": list(ranges), "SourceRange": ranges, "Registration": registration}


def _describe_alignment(alignment: Alignment) -> dict[str, Any]:
    return {
        "Matrix": alignment.first_to_own.tolist(),
        "Registered": alignment.is_registered,
        "EstimatedError": alignment.error_mm,
        "Motion": alignment.motion_mm,
        "Rotation": alignment.motion_deg,
        "Units": ["mm", "degrees"],
    }


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


def synthesize(trained: Trained, jobs: Sequence[Job], progress: Progress = no_progress) -> list[Path]:
    """Process the pairs of `plan_outputs`; return the volumes written. An unusable input does not stop the others.

    Raises:
        SynthesisError: the output folder is not writable; or, after all others were written, some inputs are unusable.
    """
    for folder in {out.parent for _, out in jobs}:
        check_writable(folder)  # before minutes of work
    written, problems = [], []
    for sources, out in jobs:
        try:
            written.append(synthesize_file(trained, sources, out, progress))
        except SynthesisError as error:
            if len(jobs) == 1:
                raise
            log.warning("%s", error)
            problems.append(error)
    if problems:
        raise SynthesisError(
            f"{len(problems)} of {quantity(len(jobs), 'input')} could not be used; the first: {problems[0]}"
        )
    return written
