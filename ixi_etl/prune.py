"""Remove old versions of a dataset: never one that `latest` names or that a run uses, nor one that is being made."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ixi_etl.dataset import COMMANDS, FACTS, POINTER, published, read_pointer
from ixi_etl.errors import DatasetError
from ixi_etl.files import disk_errors_in_a_line, lock_root, read_json
from ixi_etl.places import Places, file_sizes, filesystem_of, is_local, naming, place, remove

UPLOAD_LASTS = timedelta(days=1)
"""What lies on S3 without `dataset.json` may be an upload of another machine, if something came within this time."""


@dataclass(frozen=True)
class Verdict:
    """What becomes of one version: `removed`, or kept; and why, in words. `size` in bytes."""

    version: str
    removed: bool
    why: str
    size: int


@disk_errors_in_a_line()
def prune(places: Places, keep: int, *, dry_run: bool = False) -> list[Verdict]:
    """Remove all versions of a dataset but the newest `keep`, and those that something needs; newest first.

    A version loses its `dataset.json` first: a removal that was stopped leaves no version, and the next one ends it.
    `dry_run`: say the same, remove nothing.

    Raises:
        DatasetError: the pointer, or the configuration of a run, is damaged, so that nobody knows what is in use.
        LockedError: a refresh is at work.
    """
    if dry_run:
        return _verdicts(places, keep)
    with lock_root(places.local):
        return [_remove(places, v) if v.removed else v for v in _verdicts(places, keep)]


def _verdicts(places: Places, keep: int) -> list[Verdict]:
    names, pointer, runs = published(places), read_pointer(places), users(places)
    if pointer is None and (places.datasets / POINTER).exists():
        raise DatasetError(f"{places.datasets / POINTER} is damaged; `{COMMANDS[places.name]}` writes it anew")
    latest, history = (pointer["version"], pointer["history"]) if pointer else ("", [])
    dated = {entry["version"] for entry in history}
    verdicts = []
    for age, name in enumerate(reversed(names)):
        why = ""
        if name == latest:
            why = "it is the latest"
        elif name in runs:
            why = f"used by {', '.join(runs[name])}"
        elif name not in dated:
            why = f"not in the history of {POINTER}: copied here, or its refresh was stopped"
        elif age < keep:
            why = f"one of the newest {keep}"
        size = sum(file_sizes(places.version(name)).values())
        verdicts.append(Verdict(name, not why, why or f"older than the newest {keep}, and nothing uses it", size))
    return verdicts + list(_remains(places, {*names, *runs, latest}))


def _remains(places: Places, needed: set[str]) -> Iterator[Verdict]:
    """Folders that bear a version's name without `dataset.json`: a removal, or an upload, was stopped."""
    folders = places.datasets.iterdir() if places.datasets.is_dir() else ()
    for folder in sorted(folders, key=str):
        if folder.name in needed or not re.fullmatch("[0-9a-f]{12}", folder.name) or not folder.is_dir():
            continue
        if is_local(folder) and folder.is_symlink():  # it lies elsewhere, and is not ours
            continue
        size = sum(file_sizes(folder).values())
        if is_local(folder) or datetime.now(UTC) - _last_written(folder) > UPLOAD_LASTS:
            yield Verdict(folder.name, True, f"no version: it has no {FACTS}", size)
        else:
            yield Verdict(folder.name, False, f"it has no {FACTS} yet, and was written to within a day", size)


def _last_written(folder: Path) -> datetime:
    filesystem, top = filesystem_of(folder)
    written: list[datetime] = [info["LastModified"] for info in filesystem.find(top, detail=True).values()]
    return max(written)


def users(places: Places) -> dict[str, list[str]]:
    """Version of the dataset -> the runs that use it, by the configuration in each run's folder.

    Raises:
        DatasetError: the configuration of a run cannot be read.
    """
    found: dict[str, set[str]] = {}
    for folder in (place(places.root) / "runs", places.local / "runs"):  # what is kept on S3 is worked on here
        for run in sorted(folder.iterdir() if folder.is_dir() else (), key=str):
            path = run / "config.json"
            if not path.is_file():
                continue
            name, _, version = _dataset_of(read_json(path), path).partition("@")
            if name == places.name:
                found.setdefault(version, set()).add(f"run {run.name}")
    return {version: sorted(runs) for version, runs in found.items()}


def _dataset_of(record: Any, path: Path) -> str:
    try:
        used = record["config"]["dataset"]
    except (TypeError, KeyError):
        used = None
    if not isinstance(used, str) or "@" not in used:
        raise DatasetError(f"{path} is damaged, so nobody knows which version that run uses; mend or remove the run")
    return used


def _remove(places: Places, verdict: Verdict) -> Verdict:
    folder = places.version(verdict.version)
    facts = folder / FACTS
    if is_local(folder) and folder.is_symlink():
        return Verdict(verdict.version, False, "it is a link; remove that by hand", verdict.size)
    with naming(folder):
        if facts.exists():
            kept = facts.read_bytes()
            facts.unlink()
            started = users(places).get(verdict.version)
            if started:  # while this was decided; from here on a training that starts finds no version
                facts.write_bytes(kept)
                return Verdict(verdict.version, False, f"used by {', '.join(started)}", verdict.size)
        if is_local(folder):
            shutil.rmtree(folder)
        else:
            remove(folder, first=FACTS)
    return verdict
