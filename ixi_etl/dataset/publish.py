"""Publish a version of any dataset: verify it in staging, move it into place, and update the pointer last."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from ixi_etl.config import SPLITS
from ixi_etl.core import software
from ixi_etl.core.conditional import put_if_unchanged, read_object
from ixi_etl.core.files import fsync_path, fsync_tree, sha256_file, to_json, write_atomic
from ixi_etl.core.lease import confirm_lease, holds_lease
from ixi_etl.core.progress import Progress, no_progress
from ixi_etl.core.storage import DataRoot, filesystem_of, is_local, upload_folder
from ixi_etl.dataset.command import command_of, how_to_make
from ixi_etl.dataset.croissant import croissant
from ixi_etl.dataset.datasheet import make_datasheet
from ixi_etl.dataset.documents import write_documents
from ixi_etl.dataset.metadata import (
    CROISSANT,
    FILE_DIGEST,
    MANIFEST,
    METADATA,
    POINTER,
    SOFTWARE,
    UNHASHED,
    published_digest,
    read_pointer,
    with_digest,
)
from ixi_etl.dataset.schema import SCHEMAS
from ixi_etl.dataset.verify import verify, verify_files
from ixi_etl.dataset.versions import published_versions
from ixi_etl.errors import DatasetError, LockedError
from ixi_etl.sources.cache import VerifiedFile

log = logging.getLogger(__name__)

LIBRARIES = (
    *("deflate", "isal", "jinja2", "nibabel", "numcodecs", "numpy"),
    *("pandas", "pandera", "pillow", "simpleitk", "zarr", "zarrs"),
)
"""Libraries listed in `software.json`: all that contribute to the bytes of a version."""


@dataclass(frozen=True)
class PublishedVersion:
    """A published version. `is_new` is False if it was published before."""

    version: str
    folder: Path
    is_new: bool


def origins_of(files: Mapping[str, VerifiedFile]) -> dict[str, Any]:
    """The entry of the pointer's history for each file: where it came from, its MD5, and whether that was checked.

    A folder of files has `files_sha256` in place of the MD5.
    """
    hashes = {a.name: {"files_sha256": a.files_sha256} if a.files_sha256 else {"md5": a.md5} for a in files.values()}
    return {a.name: {"from": a.origin, **hashes[a.name], "checked": a.checked} for a in files.values()}


def find_published(data_root: DataRoot, version: str, origins: Mapping[str, Any]) -> PublishedVersion | None:
    """The version if it is published and intact, made the latest again; otherwise None.

    A damaged version stays in place for the runs that use it until `publish` replaces it. One whose data are intact is
    not made again for a file that no data depend on; `verify` reports such damage.
    """
    _restore_quarantined(data_root)
    if version not in published_versions(data_root):
        return None
    problems = verify_files(data_root.version(version), unhashed=False)
    if problems:
        log.warning("version %s is damaged and will be made again: %s", version, problems[0])
        return None
    _update_pointer(data_root, version, origins)
    _clear_staging(data_root)
    return PublishedVersion(version, data_root.version(version), is_new=False)


def start_staging(data_root: DataRoot, version: str) -> Path:
    """Create an empty folder for all files of the version; leftovers of a killed run are removed."""
    staged = data_root.staging(version) / "version"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    return staged


def publish(
    data_root: DataRoot,
    staged: Path,
    summary: Mapping[str, Any],
    origins: Mapping[str, Any],
    progress: Progress = no_progress,
) -> PublishedVersion:
    """Describe a staged folder by `dataset.json` and others, verify it, move it into place, and update the pointer.

    Args:
        summary: the content of `dataset.json`, without the list of files.
        origins: as returned by `origins_of`; they go into the pointer's history.

    Raises:
        DatasetError: the staged version does not verify.
        LockedError: another process took over the lock of the root, on S3.
    """
    version = str(summary["version"])
    summary = {**summary, "command": command_of(summary)}
    write_atomic(staged / SOFTWARE, to_json(with_digest(software.describe(LIBRARIES))))
    files = _describe(staged, summary, progress)
    write_atomic(staged / METADATA, to_json(with_digest({**summary, "files": files})))
    problems = verify(staged, version=version)
    if problems:
        raise DatasetError(f"the staged version does not verify: {problems[0]}; run {how_to_make(summary)} again")
    target = data_root.version(version)
    if is_local(target):
        fsync_tree(staged)
        _quarantine(data_root, version)
        staged.rename(target)
        fsync_path(target.parent)
    else:  # overwrites existing files, which have the same names and, but for the unhashed ones, the same bytes
        confirm = partial(confirm_lease, data_root.root)
        confirm()
        upload_folder(staged, target, last=METADATA, progress=progress, confirm=confirm, confirmed=UNHASHED)
    _update_pointer(data_root, version, origins)
    _clear_staging(data_root)
    _warn_of_empty_splits(summary)
    return PublishedVersion(version, target, is_new=True)


def _describe(staged: Path, summary: Mapping[str, Any], progress: Progress) -> dict[str, dict[str, Any]]:
    """Write the files that explain the others, and return the list of all hashed files."""
    schema = SCHEMAS[summary["name"]]
    final = schema.from_csv((staged / MANIFEST).read_bytes().decode(), MANIFEST, validate=False)  # `verify` validates
    sheet = make_datasheet(summary, final)
    write_documents(staged, summary, final, sheet)
    files = list_files(staged, progress)
    content = to_json(croissant(summary, final, sheet, files))
    write_atomic(staged / CROISSANT, content)
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    return files | {CROISSANT: {"size": len(content.encode()), "sha256": sha256}}


def _warn_of_empty_splits(summary: Mapping[str, Any]) -> None:
    """Warn now, because a training run would fail hours later."""
    splits, what = summary.get("slices", summary["splits"]), "slice" if "slices" in summary else "subject"
    consequences = {"train": "no training", "val": "no validation during training", "test": "no evaluation after it"}
    empty = [name for name in SPLITS if not splits.get(name)]
    if empty:
        existing = ", ".join(f"{count} {name}" for name, count in splits.items())
        by_order = summary["inputs"]["config"].get("split_by") == "order"
        advice = "other --split-counts" if by_order else "more subjects, or another --split-seed"
        log.warning(
            "no %s is in split %s (the version has %s): %s; give %s",
            *(what, " or ".join(empty), existing, ", ".join(consequences[name] for name in empty), advice),
        )


def list_files(folder: Path, progress: Progress = no_progress) -> dict[str, dict[str, Any]]:
    """Relative path -> size and SHA-256 of every file of a version.

    Excludes `dataset.json`, which holds this list, and `UNHASHED` files.
    """
    unlisted = {folder / name for name in (METADATA, *UNHASHED)}
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p not in unlisted)
    files = {}
    for done, path in enumerate(paths, 1):
        files[str(path.relative_to(folder))] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
        progress("hash files", done, len(paths), "files")
    return files


def _quarantine_folder(data_root: DataRoot, version: str) -> Path:
    return data_root.staging(version) / "damaged"


def _quarantine(data_root: DataRoot, version: str) -> None:
    """Move a damaged or incomplete version out of the way, now that its replacement is ready."""
    if os.path.lexists(data_root.version(version)):
        shutil.rmtree(_quarantine_folder(data_root, version), ignore_errors=True)
        data_root.version(version).rename(_quarantine_folder(data_root, version))


def _restore_quarantined(data_root: DataRoot) -> None:
    """Return versions to their place that an interrupted `publish` had quarantined but not yet replaced."""
    for quarantined in data_root.unfinished.glob("*/damaged"):
        target = data_root.version(quarantined.parent.name)
        if is_local(target) and not os.path.lexists(target):
            quarantined.rename(target)


def _update_pointer(data_root: DataRoot, version: str, origins: Mapping[str, Any]) -> None:
    """Write `version` and the SHA-256 of its `dataset.json` into `latest.json`, unless they are there already."""
    path = data_root.datasets / POINTER
    seen = read_object(path) if holds_lease(data_root.root) else None
    pointer = read_pointer(data_root)
    if pointer is None:
        _back_up_damaged_pointer(data_root)
        pointer = {"version": None, "history": []}
    digest = sha256_file(data_root.version(version) / METADATA)
    if pointer["version"] == version and published_digest(data_root.version(version)) in (digest, None):
        return
    published_at = datetime.now(UTC).isoformat(timespec="seconds")
    entry = {"version": version, FILE_DIGEST: digest, "published": published_at, "origins": origins}
    confirm_lease(data_root.root)
    content = to_json({**entry, "history": [*pointer["history"], entry]})
    if not holds_lease(data_root.root):
        write_atomic(path, content)
    elif not put_if_unchanged(path, content.encode(), seen.etag if seen else None) and not _has_content(path, content):
        raise LockedError(f"another process wrote {path} at the same time; run again")


def _has_content(path: Path, content: str) -> bool:
    """Whether an object is as it was to be written: the answer to a write that succeeded may be lost."""
    found = read_object(path)
    return found is not None and found.data == content.encode()


def _back_up_damaged_pointer(data_root: DataRoot) -> None:
    """Keep a damaged `latest.json`, because its history exists nowhere else."""
    path = data_root.datasets / POINTER
    if path.exists():
        kept = path.with_name(f"{POINTER}.damaged")
        if is_local(path):
            os.replace(path, kept)
        else:
            kept.write_bytes(path.read_bytes())
        log.warning("%s was damaged: it is kept as %s, and a new history of versions starts", path, kept.name)


def _clear_staging(data_root: DataRoot) -> None:
    """Remove leftovers of interrupted jobs, here and on S3. The caller must hold the lock of the root."""
    shutil.rmtree(data_root.unfinished, ignore_errors=True)
    if data_root.remote_unfinished:
        filesystem, top = filesystem_of(data_root.remote_unfinished)
        confirm_lease(data_root.root)  # it would be the work of another holder
        try:
            if filesystem.exists(top):
                filesystem.rm(top, recursive=True)
        except OSError as error:  # such as credentials without s3:DeleteObject
            log.warning("cannot remove %s, which is no longer needed (%s)", data_root.remote_unfinished, error)
