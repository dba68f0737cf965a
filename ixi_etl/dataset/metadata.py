"""Metadata files of a version (`dataset.json`, `software.json`) and of a dataset (`latest.json`), and their digests."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel

from ixi_etl import PIPELINE_VERSION
from ixi_etl.core.files import parse_json, read_json, to_json
from ixi_etl.core.storage import DataRoot, read_bytes
from ixi_etl.dataset.command import COMMANDS
from ixi_etl.dataset.credit import is_all_share_alike
from ixi_etl.dataset.schema import SCHEMAS, Schema
from ixi_etl.errors import DatasetError

MANIFEST, METADATA, REPORT, PICTURES, POINTER = "manifest.csv", "dataset.json", "report.html", "pictures", "latest.json"
README, LICENCE_TEXT, COLUMNS, CROISSANT = "README.md", "LICENSE.txt", "columns.csv", "croissant.json"
SOFTWARE = "software.json"
"""Describes the code that made a version. Not among the hashed files, as other code can make equal bytes."""
COMPARED, COMPARED_PAGE = "compared.json", "compared.html"
"""How a version differs from the one before it, as data and as a page. Not hashed: another root has another history."""
PAGE_DIGEST = "page_sha256"
"""Key of the SHA-256 of `compared.html` in `compared.json`."""
UNHASHED = (SOFTWARE, COMPARED, COMPARED_PAGE)
"""Files of a version that may differ between equal versions."""
WORST_PAIRS = "worst.jpg"  # in `PICTURES`
DIGEST, DIGEST_SINCE = "self_sha256", 6
"""Key of the SHA-256 of all other fields of `dataset.json`, and the first pipeline version that writes it."""
FILE_DIGEST = "dataset_json_sha256"
"""Key of the SHA-256 of a published `dataset.json` in the history of `latest.json`."""


def version_inputs(
    md5s: Mapping[str, str], config: BaseModel, libraries: Iterable[str], **others: Any
) -> dict[str, Any]:
    """Everything that determines the bytes of a version: never a path, a URL, a worker count or a time.

    Args:
        md5s: file or modality -> MD5.
        config: the options that affect data.
        libraries: names of libraries whose versions may change a byte.
        others: hashes of further inputs.
    """
    return {
        "archives_md5": dict(md5s),
        "config": config.model_dump(mode="json"),
        "pipeline_version": PIPELINE_VERSION,
        "libraries": {name: installed(name) for name in libraries},
        **others,
    }


def version_name(inputs: Mapping[str, Any]) -> str:
    """The name of a version: the first 12 hex digits of the SHA-256 of its inputs."""
    return hashlib.sha256(to_json(inputs).encode()).hexdigest()[:12]


def read_pointer(data_root: DataRoot) -> dict[str, Any] | None:
    """The content of `latest.json`; None if it is missing or damaged."""
    return _read_pointer(data_root.datasets)


def _read_pointer(folder: Path) -> dict[str, Any] | None:
    pointer = read_json(folder / POINTER)
    try:
        if isinstance(pointer["version"], str) and all(isinstance(e["version"], str) for e in pointer["history"]):
            return dict(pointer)
    except (TypeError, KeyError):
        pass
    return None


def with_digest(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` with the SHA-256 of its JSON text as one more field."""
    rest: dict[str, Any] = json.loads(to_json({key: value for key, value in content.items() if key != DIGEST}))
    return rest | {DIGEST: hashlib.sha256(to_json(rest).encode()).hexdigest()}


def parse_with_digest(data: bytes) -> dict[str, Any] | None:
    """The content of a file that `to_json` wrote of `with_digest`; None if any of its bytes has changed.

    `to_json` writes each key on its own line, so the digest is that of the file without the line that holds it. Where
    among the fields that line is does not matter.
    """
    line = _DIGEST_LINE.search(data)
    if line is None:
        return None
    before = data[: line.start()] if line["comma"] else data[: line.start()].removesuffix(b",")
    if hashlib.sha256(before + data[line.end() :]).hexdigest().encode() != line["digest"]:
        return None
    content = parse_json(data)
    return content if isinstance(content, dict) and DIGEST in content else None


_DIGEST_LINE = re.compile(rb'\n "%s": "(?P<digest>[0-9a-f]{64})"(?P<comma>,?)(?=\n)' % DIGEST.encode())


def read_metadata(folder: Path) -> dict[str, Any]:
    """Read `dataset.json` of a version's folder.

    Raises:
        DatasetError: the file is missing or damaged: its digest or its structure is wrong.
    """
    path = folder / METADATA
    try:
        data = read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        data = b""
    verified = parse_with_digest(data)
    metadata: dict[str, Any] = parse_json(data) if verified is None else verified
    if not _is_metadata(metadata):
        raise DatasetError(f"{path} is missing, damaged or of an older ixi-etl; make the version again")
    made_by = metadata["inputs"].get("pipeline_version")  # part of the version's name, which `verify` checks
    is_older = DIGEST not in metadata and isinstance(made_by, int) and made_by < DIGEST_SINCE
    if verified is None and not is_older:
        raise DatasetError(f"{path} is damaged: it does not have the SHA-256 that it holds; make the version again")
    return metadata


def _is_metadata(content: Any) -> bool:
    kinds = {"inputs": dict, "files": dict, "funnel": dict, "splits": dict, "subjects": int}
    kinds |= dict.fromkeys(("name", "version", "source", "target"), str)
    if not isinstance(content, dict) or not all(isinstance(content.get(key), kind) for key, kind in kinds.items()):
        return False
    if not isinstance(content["inputs"].get("config"), dict):
        return False
    return content["name"] in COMMANDS and all(
        isinstance(f, dict) and isinstance(f.get("size"), int) and isinstance(f.get("sha256"), str)
        for f in content["files"].values()
    )


def licence_of(folder: Path) -> dict[str, Any]:
    """The `licence` and `credit` of a version, which apply to everything made from it.

    `share_alike` tells whether all inputs are under `catalog.LICENCE`, which the texts do not where they differ.
    """
    metadata = read_metadata(folder)
    terms = {name: metadata[name] for name in ("licence", "credit") if name in metadata}
    return terms | ({"share_alike": is_all_share_alike(metadata["sources"])} if metadata.get("sources") else {})


def normalisation_of(folder: Path) -> str:
    """The `normalisation` of a version: see `DatasetConfig`."""
    return str(read_metadata(folder)["inputs"]["config"].get("normalisation", "percentiles"))


def read_manifest(folder: Path, *, validate: bool = True) -> pd.DataFrame:
    """Read the manifest of a version's folder.

    Args:
        validate: check the rules of its schema, too. Not needed if the version was just made or verified.

    Raises:
        DatasetError: the manifest is missing or breaks its schema.
    """
    return read_manifest_of(folder, SCHEMAS[read_metadata(folder)["name"]], validate=validate)


def read_manifest_of(folder: Path, schema: Schema, *, validate: bool = True) -> pd.DataFrame:
    """`read_manifest` of a dataset whose schema is known."""
    path = folder / MANIFEST
    try:
        text = read_bytes(path).decode()  # reading as text would turn \r into \n
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read ({error})") from error
    return schema.from_csv(text, str(path), validate=validate)


def published_digest(folder: Path) -> str | None:
    """SHA-256 of this version's `dataset.json` when it was published, from the pointer beside it; None if unknown."""
    history = (_read_pointer(folder.parent) or {"history": []})["history"]
    digests = [e.get(FILE_DIGEST) for e in history if e["version"] == folder.name]
    return digests[-1] if digests and isinstance(digests[-1], str) else None
