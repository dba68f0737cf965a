"""Plan a synthesis: which volumes are read for which output, and that no foreign file is overwritten."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ixi_etl.core.files import read_json
from ixi_etl.core.text import quantity
from ixi_etl.dataset.direction import Direction
from ixi_etl.errors import BadVolumeError, SynthesisError
from ixi_etl.scans import nifti
from model.synthesize import check_sources

log = logging.getLogger(__name__)

SUFFIXES = (".nii.gz", ".nii")

Job = tuple[Mapping[str, Path], Path]
"""The file of each source, by name, the one whose grid the output has first; and the output."""


def plan_outputs(inputs: Sequence[Path], out: Path, direction: Direction, sources: Sequence[str] = ()) -> list[Job]:
    """The jobs to process: one for each of the `inputs`, or a single one for the `sources`, each `NAME=FILE`.

    A folder among the inputs stands for the volumes in it. `out` is a file if there is a single output, otherwise a
    folder, in which `sub-01_T1w.nii.gz` becomes `sub-01_T2w.nii.gz`.

    Raises:
        SynthesisError: there are no inputs; a source is unknown, missing or given twice; or an output would overwrite
            an input, another output or a foreign file.
    """
    if sources and inputs:
        raise SynthesisError(f"{inputs[0]} and --source {sources[0]}: give either inputs or sources")
    if sources:
        files = _parse_sources(sources)
        check_sources(files, direction)
        planned, one = [files], True
    else:
        _check_inputs(inputs, direction)
        paths = [path for given in inputs for path in (_volumes_in(given) if given.is_dir() else [given])]
        planned = [{direction.sources[0]: path} for path in paths]
        one = len(inputs) == 1 and not inputs[0].is_dir()
    is_file = bool(_suffix(out.name)) and not out.is_dir()
    if is_file and not one:
        raise SynthesisError(f"-o {out} is a single file, but there may be several outputs; give a folder")
    jobs: list[Job] = [(files, out if is_file else out / _renamed(files, direction.target)) for files in planned]
    taken = {path.resolve() for files in planned for path in files.values()}
    for taken_from, target in jobs:
        for path in taken_from.values():
            _check_input(path)
        for written in (target, sidecar_path(target)):
            if written.resolve() in taken:
                raise SynthesisError(f"{written} is an input, or would be written twice; give another -o")
            taken.add(written.resolve())
            if written.exists() and not _is_own_output(written):
                raise SynthesisError(f"{written} was not written by this command; move it, or give another -o")
    return jobs


def _parse_sources(given: Sequence[str]) -> dict[str, Path]:
    """`["t1=a.nii", "pd=b.nii"]` -> the file of each name, in this order."""
    files: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise SynthesisError(f"--source {text}: give NAME=FILE, for example --source t1=T1.nii.gz")
        if name in files:
            raise SynthesisError(f"--source {text}: {name} is given twice")
        if Path(path) in files.values():
            raise SynthesisError(f"--source {text}: the file is given twice")
        files[name] = Path(path)
    return files


def _check_inputs(inputs: Sequence[Path], direction: Direction) -> None:
    """Raise `SynthesisError` if there are no inputs, or the generator takes more than one source."""
    wanted = " ".join(f"--source {name}=FILE" for name in direction.sources)
    if len(direction.sources) > 1:
        problem = f"{inputs[0]}: the generator takes" if inputs else "there is no input; the generator takes"
        raise SynthesisError(f"{problem} {' and '.join(direction.sources)}; give {wanted}")
    if not inputs:
        raise SynthesisError(f"there is no input; give volumes or folders, or {wanted}")


def _check_input(path: Path) -> None:
    if not _suffix(path.name):
        raise SynthesisError(f"{path} is not a NIfTI file by its name; give {' or '.join(SUFFIXES)}")
    if not path.is_file():
        raise SynthesisError(f"{path} is not a file" if path.exists() else f"{path} does not exist")


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
        log.warning("%s: skipped %s (%s ...)", folder, quantity(len(hidden), "hidden file"), hidden[0])
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


def sidecar_path(out: Path) -> Path:
    """The JSON file beside a volume."""
    return out.with_name(f"{_stem(out)}.json")


def _renamed(files: Mapping[str, Path], target: str) -> str:
    """The first input's name for the target: `IXI002-T1.nii.gz` -> `IXI002-T2.nii.gz`.

    A name that does not end in the source gets the target appended.
    """
    source, path = next(iter(files.items()))
    stem = _stem(path)
    renamed = re.sub(rf"(?i)(?<![a-z0-9]){re.escape(source)}(?=w?$)", lambda _: target.upper(), stem)
    return f"{renamed if renamed != stem else f'{stem}-{target.upper()}'}{_suffix(path.name).lower()}"


def check_writable(folder: Path) -> None:
    """Create a folder if needed; raise `SynthesisError` unless files can be written into it."""
    probe = folder / f".{os.getpid()}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SynthesisError(f"cannot write to {folder}: {error.strerror or error}; give another -o") from error
