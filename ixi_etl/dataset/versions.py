"""Find and list the published versions of a dataset.

::

    <root>/datasets/<name>/<version>/{slices.zarr, manifest.csv, dataset.json, software.json, README.md, ...}
    <root>/datasets/<name>/latest.json        the pointer, replaced last; the only file with a time
    <root>/datasets/<name>/.staging/<version> unfinished versions

`dataset.json` names the source and target arrays and lists every other file with size and SHA-256, except
`software.json`, which describes the code that made the version, and `compared.json` with its page `compared.html`,
which describe its differences from the version before. These JSON files contain the SHA-256 of all their other fields;
`latest.json` has the SHA-256 of each published `dataset.json`. Users refer to a version as `NAME@VERSION`, for example
`ixi-t1-t2@latest`.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from ixi_etl.core.storage import (
    DEFAULT_DATASET,
    DataRoot,
    check_reachable,
    expand_home,
    is_url,
    reject_url_credentials,
    to_path,
)
from ixi_etl.dataset.command import COMMANDS
from ixi_etl.dataset.metadata import METADATA, POINTER, read_metadata, read_pointer
from ixi_etl.errors import ConfigError, DatasetError

log = logging.getLogger(__name__)


def parse_version(text: str) -> tuple[str, str]:
    """Split `NAME@VERSION` into dataset and version; without a name, the dataset is `ixi-t1-t2`.

    `VERSION` is `latest`, a name, or the unique beginning of one; see `resolve_version`.

    Raises:
        ConfigError: the dataset does not exist, or the version after @ is empty.
    """
    name, _, version = text.rpartition("@")
    name = name or DEFAULT_DATASET
    if name not in COMMANDS:
        others = f"{DEFAULT_DATASET}@{version}, digits@{version}, or another name that `ixi-etl versions` lists"
        raise ConfigError(f"there is no dataset {name}; give {others}")
    if not version:
        raise ConfigError(f"{text} names no version; give {name}@latest, or the beginning of one")
    return name, version


def datasets_in(root: str | Path) -> list[str]:
    """The datasets that have a folder in the root; if there is none, the default one.

    Raises:
        IxiError: the bucket does not exist or does not respond.
    """
    folder = DataRoot(root).datasets.parent
    check_reachable(root)
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return [name for name in COMMANDS if name in names] or [DEFAULT_DATASET]


def find_version(root: str | Path, text: str) -> Path:
    """The folder of a version, given as `NAME@VERSION` below `root` or as the path of any folder.

    Text with a slash, or the name of a folder that contains `dataset.json`, is a path.

    Raises:
        DatasetError: there is no such version.
        ConfigError: the folder does not contain a version.
    """
    folder = folder_from(text)
    if folder is None:
        name, wanted = parse_version(text)
        data_root = DataRoot(root, name)
        return data_root.version(resolve_version(data_root, wanted))
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give the folder of a version, or NAME@VERSION")
    if not (folder / METADATA).is_file():
        raise ConfigError(f"{folder} has no {METADATA}; give the folder of a version, or NAME@VERSION")
    return folder


def dataset_of(text: str) -> str:
    """The name of the dataset of a version; see `find_version` for the accepted names.

    Raises:
        ConfigError: there is no such dataset.
        DatasetError: the folder does not contain a version.
    """
    folder = folder_from(text)
    return parse_version(text)[0] if folder is None else str(read_metadata(folder)["name"])


def folder_from(text: str) -> Path | None:
    """The folder if `text` is a path or URL; None if it is NAME@VERSION."""
    if is_url(text):
        reject_url_credentials(text)
        check_reachable(text)
        return to_path(text.rstrip("/"))
    path = expand_home(text)
    is_path = os.sep in text or text in (os.curdir, os.pardir) or (path / METADATA).is_file()
    return path.resolve() if is_path else None


def resolve_version(data_root: DataRoot, version: str = "latest") -> str:
    """The name of a published version, given as `latest`, a name, or the unique beginning of one.

    Raises:
        DatasetError: no version matches, or several do.
    """
    if version == "latest":
        return _latest(data_root)
    names = published_versions(data_root)
    matches = [name for name in names if name.startswith(version)]
    if version in matches:
        return version
    if len(matches) != 1:
        problem = f"{len(matches)} versions begin with {version}" if matches else f"there is no version {version}"
        raise DatasetError(f"{problem} in {data_root.datasets}; published: {', '.join(names) or 'none'}")
    return matches[0]


def _latest(data_root: DataRoot) -> str:
    check_reachable(data_root.root)
    path, command = data_root.datasets / POINTER, COMMANDS[data_root.name]
    while True:
        pointer, exists = read_pointer(data_root), path.exists()
        if pointer is not None and pointer["version"] in _version_names(data_root):  # listed after reading
            return str(pointer["version"])
        if read_pointer(data_root) == pointer:
            break  # otherwise a new version was published meanwhile, and the old one may have been pruned
    if pointer is not None:
        raise DatasetError(f"{POINTER} names version {pointer['version']}, which does not exist; run `{command}`")
    if exists:
        raise DatasetError(f"{path} is damaged; `{command}` rewrites it")
    raise DatasetError(f"{data_root.datasets} has no published version; run `{command}` first")


def published_versions(data_root: DataRoot) -> list[str]:
    """Names of the published versions, oldest first by the pointer's history.

    Raises:
        IxiError: the bucket does not exist or does not respond.
    """
    check_reachable(data_root.root)
    names = _version_names(data_root)
    pointer = read_pointer(data_root) or {"history": []}
    dated = list(dict.fromkeys(e["version"] for e in pointer["history"] if e["version"] in names))
    return [*sorted(names - set(dated)), *dated]


def _version_names(data_root: DataRoot) -> set[str]:
    if not data_root.datasets.is_dir():
        return set()
    return {p.name for p in data_root.datasets.iterdir() if not p.name.startswith(".") and _is_version(p)}


def _is_version(folder: Path) -> bool:
    try:
        return (folder / METADATA).is_file()
    except PermissionError:  # a folder of another user, such as lost+found
        return False


def list_versions(data_root: DataRoot) -> list[tuple[str, dict[str, Any] | None]]:
    """Each published version, oldest first, with its metadata; None, after a warning, if those are damaged."""
    versions: list[tuple[str, dict[str, Any] | None]] = []
    for name in published_versions(data_root):
        try:
            versions.append((name, read_metadata(data_root.version(name))))
        except (DatasetError, OSError) as error:
            log.warning("%s", error)
            versions.append((name, None))
    return versions


def find_latest(data_root: DataRoot) -> str | None:
    """The latest version; None, after a warning, if it cannot be determined."""
    try:
        return resolve_version(data_root)
    except DatasetError as error:
        log.warning("%s", error)
        return None
