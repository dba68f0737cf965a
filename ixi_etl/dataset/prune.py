"""Remove old versions of a dataset."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ixi_etl.core.files import os_errors_as_user_errors, read_json
from ixi_etl.core.lease import confirm_lease, lock_data_root
from ixi_etl.core.storage import DataRoot, file_sizes, filesystem_of, is_local, naming_file, remove_tree, to_path
from ixi_etl.dataset.command import COMMANDS
from ixi_etl.dataset.metadata import METADATA, POINTER, read_pointer
from ixi_etl.dataset.versions import published_versions
from ixi_etl.errors import DatasetError

UPLOAD_LASTS = timedelta(days=1)
"""On S3, a folder without `dataset.json` may be another machine's upload if it was written to within this time."""


@dataclass(frozen=True)
class PruneDecision:
    """Whether one version is removed, and why, in words. `size` is in bytes."""

    version: str
    removed: bool
    why: str
    size: int


@os_errors_as_user_errors()
def prune_versions(data_root: DataRoot, keep: int, *, dry_run: bool = False) -> list[PruneDecision]:
    """Remove all versions except the latest, the newest `keep`, those in use, and those not in the pointer's history.

    Also remove folders that an interrupted removal or upload left.

    `dataset.json` is removed first, so an interrupted removal leaves no version, and the next call completes it.

    Args:
        dry_run: decide, but remove nothing.

    Returns:
        The decisions, newest version first.

    Raises:
        DatasetError: the pointer or the configuration of a run is damaged, so the versions in use are unknown.
        LockedError: a refresh is running, here or on another machine.
    """
    if dry_run:
        return _decide(data_root, keep)
    with lock_data_root(data_root):
        return [_remove_version(data_root, v) if v.removed else v for v in _decide(data_root, keep)]


def _decide(data_root: DataRoot, keep: int) -> list[PruneDecision]:
    names, pointer, runs = published_versions(data_root), read_pointer(data_root), find_users(data_root)
    if pointer is None and (data_root.datasets / POINTER).exists():
        raise DatasetError(f"{data_root.datasets / POINTER} is damaged; `{COMMANDS[data_root.name]}` rewrites it")
    latest, history = (pointer["version"], pointer["history"]) if pointer else ("", [])
    dated = {entry["version"] for entry in history}
    decisions = []
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
        size = sum(file_sizes(data_root.version(name)).values())
        removed, why = not why, why or f"older than the newest {keep}, and nothing uses it"
        decisions.append(PruneDecision(name, removed, why, size))
    return decisions + list(_orphans(data_root, {*names, *runs, latest}))


def _orphans(data_root: DataRoot, needed: set[str]) -> Iterator[PruneDecision]:
    """Folders with a version's name but without `dataset.json`, left by an interrupted removal or upload."""
    folders = data_root.datasets.iterdir() if data_root.datasets.is_dir() else ()
    for folder in sorted(folders, key=str):
        if folder.name in needed or not re.fullmatch("[0-9a-f]{12}", folder.name) or not folder.is_dir():
            continue
        if is_local(folder) and folder.is_symlink():  # its target may belong to something else
            continue
        size = sum(file_sizes(folder).values())
        if is_local(folder) or datetime.now(UTC) - _last_written(folder) > UPLOAD_LASTS:
            yield PruneDecision(folder.name, True, f"no version: it has no {METADATA}", size)
        else:
            yield PruneDecision(folder.name, False, f"it has no {METADATA} yet, and was written to within a day", size)


def _last_written(folder: Path) -> datetime:
    filesystem, top = filesystem_of(folder)
    written: list[datetime] = [info["LastModified"] for info in filesystem.find(top, detail=True).values()]
    return max(written)


def find_users(data_root: DataRoot) -> dict[str, list[str]]:
    """Version of the dataset -> runs that use it, from the configuration in each run's folder.

    Raises:
        DatasetError: the configuration of a run cannot be read.
    """
    users: dict[str, set[str]] = {}
    for folder in (to_path(data_root.root) / "runs", data_root.local / "runs"):  # runs on S3 also have a local folder
        for run in sorted(folder.iterdir() if folder.is_dir() else (), key=str):
            path = run / "config.json"
            if not path.is_file():
                continue
            name, _, version = _dataset_of(read_json(path), path).partition("@")
            if name == data_root.name:
                users.setdefault(version, set()).add(f"run {run.name}")
    return {version: sorted(runs) for version, runs in users.items()}


def _dataset_of(record: Any, path: Path) -> str:
    try:
        used = record["config"]["dataset"]
    except (TypeError, KeyError):
        used = None
    if not isinstance(used, str) or "@" not in used:
        raise DatasetError(f"{path} is damaged, so the version that the run uses is unknown; repair or remove the run")
    return used


def _remove_version(data_root: DataRoot, decision: PruneDecision) -> PruneDecision:
    confirm_lease(data_root.root)
    folder = data_root.version(decision.version)
    metadata = folder / METADATA
    if is_local(folder) and folder.is_symlink():
        return PruneDecision(decision.version, False, "it is a link; remove it by hand", decision.size)
    with naming_file(folder):
        if metadata.exists():
            content = metadata.read_bytes()
            metadata.unlink()
            users = find_users(data_root).get(decision.version)
            if users:  # started since the decision; without dataset.json no further training run can start
                metadata.write_bytes(content)
                return PruneDecision(decision.version, False, f"used by {', '.join(users)}", decision.size)
        if is_local(folder):
            shutil.rmtree(folder)
        else:
            remove_tree(folder, first=METADATA)
    return decision
