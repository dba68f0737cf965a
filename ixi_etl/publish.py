"""Make a version appear: whole, verified, and last of all pointed at, whatever dataset it is of."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ixi_etl import software
from ixi_etl.config import SPLITS
from ixi_etl.dataset import (
    COMMANDS,
    FACTS,
    FILE_DIGEST,
    POINTER,
    SOFTWARE,
    published,
    published_digest,
    read_pointer,
    verify,
    with_digest,
)
from ixi_etl.download import Acquired
from ixi_etl.errors import DatasetError
from ixi_etl.files import Progress, sha256_file, silent, sync_path, to_json, write_atomic
from ixi_etl.places import Places, is_local, upload

log = logging.getLogger(__name__)

LIBRARIES = ("deflate", "isal", "nibabel", "numpy", "pandas", "pillow", "simpleitk", "zarr", "zarrs")
"""What is named in `software.json` besides the code: whatever has a part in the bytes of a version."""


@dataclass(frozen=True)
class Refreshed:
    """The version that is published now. `is_new` is False where it had been published before."""

    version: str
    folder: Path
    is_new: bool


def origins_of(files: Mapping[str, Acquired]) -> dict[str, Any]:
    """What the pointer's history tells of each file: where it came from, and whether its MD5 was checked."""
    return {a.name: {"from": a.origin, "md5": a.md5, "checked": a.checked} for a in files.values()}


def find_published(places: Places, version: str, origins: Mapping[str, Any]) -> Refreshed | None:
    """The version, if it has been published and is sound; then it is the latest again.

    One that is damaged stays where it is, for the runs that use it, until `publish` replaces it.
    """
    _put_back(places)
    if version not in published(places):
        return None
    problems = verify(places.version(version))
    if problems:
        log.warning("version %s is damaged and is made again: %s", version, problems[0])
        return None
    _point_to(places, version, origins)
    _clear_staging(places)
    return Refreshed(version, places.version(version), is_new=False)


def start_staging(places: Places, version: str) -> Path:
    """An empty folder to write all files of the version in; what a run that was killed left there is gone."""
    staged = places.staging(version) / "version"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    return staged


def publish(
    places: Places, staged: Path, summary: Mapping[str, Any], origins: Mapping[str, Any], progress: Progress = silent
) -> Refreshed:
    """Write `dataset.json` of `summary` into a staged folder, verify it, bring it to its place, point to it.

    `origins` is what `origins_of` gives; it goes into the pointer's history.

    Raises:
        DatasetError: what was staged does not verify.
    """
    version = str(summary["version"])
    write_atomic(staged / SOFTWARE, to_json(with_digest(software.describe(LIBRARIES))))
    write_atomic(staged / FACTS, to_json(with_digest({**summary, "files": list_files(staged, progress)})))
    problems = verify(staged, version=version)
    if problems:
        raise DatasetError(f"the staged version does not verify: {problems[0]}; run `{COMMANDS[places.name]}` again")
    target = places.version(version)
    if is_local(target):
        for path in (staged, *staged.rglob("*")):
            sync_path(path)
        _put_aside(places, version)
        staged.rename(target)
        sync_path(target.parent)
    else:  # over what is there: the files of a version have the same names and bytes whenever it is made
        upload(staged, target, last=FACTS, progress=progress)
    _point_to(places, version, origins)
    _clear_staging(places)
    _warn_of_empty_splits(summary["splits"])
    return Refreshed(version, target, is_new=True)


def _warn_of_empty_splits(splits: Mapping[str, int]) -> None:
    """Say at once what a training would find out hours later."""
    lost = {"train": "no training", "val": "no validation during a training", "test": "no evaluation after it"}
    empty = [name for name in SPLITS if not splits.get(name)]
    if empty:
        there = ", ".join(f"{count} {name}" for name, count in splits.items())
        log.warning(
            "no subject is in split %s (the version has %s): %s; give more subjects, or another split seed",
            *(" or ".join(empty), there, ", ".join(lost[name] for name in empty)),
        )


def list_files(folder: Path, progress: Progress = silent) -> dict[str, dict[str, Any]]:
    """Relative path -> size and SHA-256 of every file of a version but `dataset.json`, which holds this list, and
    `software.json`, in which equal versions of two machines may differ.
    """
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p not in (folder / FACTS, folder / SOFTWARE))
    files = {}
    for done, path in enumerate(paths, 1):
        files[str(path.relative_to(folder))] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
        progress("hash files", done, len(paths), "files")
    return files


def _aside(places: Places, version: str) -> Path:
    return places.staging(version) / "damaged"


def _put_aside(places: Places, version: str) -> None:
    """Take what is at a version's place, damaged or half there, out of the way, now that its replacement is ready."""
    if os.path.lexists(places.version(version)):
        shutil.rmtree(_aside(places, version), ignore_errors=True)
        places.version(version).rename(_aside(places, version))


def _put_back(places: Places) -> None:
    """Return versions that a refresh had put aside when it was stopped just before their replacements came."""
    for aside in places.unfinished.glob("*/damaged"):
        target = places.version(aside.parent.name)
        if is_local(target) and not os.path.lexists(target):
            aside.rename(target)


def _point_to(places: Places, version: str, origins: Mapping[str, Any]) -> None:
    """Make `latest.json` name `version` and the SHA-256 of its `dataset.json`, unless it does already."""
    pointer = read_pointer(places)
    if pointer is None:
        _keep_damaged_pointer(places)
        pointer = {"version": None, "history": []}
    digest = sha256_file(places.version(version) / FACTS)
    if pointer["version"] == version and published_digest(places.version(version)) in (digest, None):
        return
    published_at = datetime.now(UTC).isoformat(timespec="seconds")
    entry = {"version": version, FILE_DIGEST: digest, "published": published_at, "origins": origins}
    write_atomic(places.datasets / POINTER, to_json({**entry, "history": [*pointer["history"], entry]}))


def _keep_damaged_pointer(places: Places) -> None:
    """Nobody else knows the history in it."""
    path = places.datasets / POINTER
    if path.exists():
        kept = path.with_name(f"{POINTER}.damaged")
        if is_local(path):
            os.replace(path, kept)
        else:
            kept.write_bytes(path.read_bytes())
        log.warning("%s was damaged: it is kept as %s, and the history of versions begins anew", path, kept.name)


def _clear_staging(places: Places) -> None:
    """Remove what was left by those that were stopped; only with the root's lock held."""
    shutil.rmtree(places.unfinished, ignore_errors=True)
