"""The assets of a Prefect server: a dataset, whose versions a refresh materialises, and the runs made from it.

The events by which they arrive hold their lineage. A key is the address of the folder, so it is the same for each
version of a dataset, and holds no secret: a root with one is refused before.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from prefect.assets import Asset, AssetProperties

from ixi_etl.core.storage import DataRoot, is_url, to_path
from ixi_etl.dataset.checks import all_results, failed
from ixi_etl.dataset.metadata import REPORT, read_metadata

MAX_KEY = 512  # characters that Prefect allows
_NOT_IN_A_KEY = re.compile(r"[^\w/:.,;@~+=()!$*-]")


def asset_key(folder: str | Path) -> str:
    """The key of a folder: its address, as `file:///...` or `s3://...`.

    Prefect allows neither spaces nor percent signs in keys, nor long ones. A folder that needs another name gets one,
    which ends with a hash of its address, so that no two folders share a key.
    """
    text = str(folder)
    address = text if is_url(text) else f"file://{Path(folder).resolve().as_posix()}"
    key = _NOT_IN_A_KEY.sub("_", address)
    if key == address and len(key) <= MAX_KEY:
        return key
    digest = hashlib.sha256(address.encode()).hexdigest()[:12]
    return f"{key[: MAX_KEY - len(digest) - 1]}-{digest}"


def dataset_asset(data_root: DataRoot) -> Asset:
    """The asset of a dataset of a root; each of its versions materialises it."""
    properties = AssetProperties(
        name=data_root.name,
        description=f"Versions of the dataset {data_root.name}: slabs of paired scans, a manifest, and checks.",
        url=asset_url(data_root.datasets),
    )
    return Asset(key=asset_key(data_root.datasets), properties=properties)


def run_asset(folder: Path, dataset: str) -> Asset:
    """The asset of a training run on the version `dataset`."""
    properties = AssetProperties(
        name=f"run {folder.name}",
        description=f"A generator trained on {dataset}, its metrics and its evaluation.",
        url=asset_url(folder / REPORT),
    )
    return Asset(key=asset_key(folder), properties=properties)


def asset_url(path: Path) -> str:
    return str(path) if is_url(str(path)) else path.resolve().as_uri()


def version_facts(folder: Path) -> dict[str, Any]:
    """What a materialisation says of a version: name, subjects, checks passed and failed, address of its report."""
    described = read_metadata(folder)
    results = all_results(folder, described)
    return {
        "version": described["version"],
        "subjects": described["subjects"],
        "splits": described["splits"],
        "checks_passed": sum(result["passed"] for result in results),
        "checks_failed": [result["name"] for result in failed(results)],
        "report": asset_url(to_path(str(folder)) / REPORT),
    }
