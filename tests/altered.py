"""Make a version as another configuration would have made it, by altering the manifest of a published one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from ixi_etl.core.files import read_json, sha256_file, to_json
from ixi_etl.dataset import manifest, metadata
from ixi_etl.dataset.schema import SCHEMAS


def alter_version(folder: Path, root: Path, change: Callable[[pd.DataFrame], pd.DataFrame], **config: Any) -> Path:
    """Publish in `root` the version in `folder` with another manifest and other options; return its folder.

    `change` takes the manifest and returns it with other values and with optional columns.
    """
    described = read_json(folder / metadata.METADATA)
    schema = SCHEMAS[described["name"]]
    table = change(metadata.read_manifest(folder))
    described["inputs"]["config"] |= config
    described["version"] = metadata.version_name(described["inputs"])
    altered = root / "datasets" / described["name"] / described["version"]
    shutil.copytree(folder, altered)
    path = altered / metadata.MANIFEST
    path.write_text(schema.to_csv(schema.typed(table)))
    described["files"][metadata.MANIFEST] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    described |= manifest.counts(table, schema)
    (altered / metadata.METADATA).write_text(to_json(metadata.with_digest(described)))
    pointer = {"version": described["version"], "history": [{"version": described["version"]}]}
    (altered.parent / metadata.POINTER).write_text(to_json(pointer))
    return altered
