"""Compare two versions: inputs, configuration, software, each file, and each subject."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ixi_etl.core.files import read_json, sha256_file
from ixi_etl.core.progress import Progress, no_progress
from ixi_etl.dataset.metadata import METADATA, SOFTWARE, read_metadata


def compare_inputs(old: Path, new: Path) -> pd.DataFrame:
    """Differences between the inputs, configuration, libraries and software of two versions: columns what, old, new.

    `software.json` is compared too, although it does not affect the bytes of a version.
    """
    return differences(
        *(
            {"inputs": read_metadata(folder)["inputs"], "software": read_json(folder / SOFTWARE) or {}}
            for folder in (old, new)
        )
    )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> pd.DataFrame:
    """Entries of two nested mappings that differ: columns what, old, new (text, or `-` where it is missing)."""
    values = [_flat(each) for each in (old, new)]
    names = sorted({*values[0], *values[1]})
    rows = [(name, *(version.get(name, "-") for version in values)) for name in names]
    return pd.DataFrame([row for row in rows if row[1] != row[2]], columns=["what", "old", "new"])


def compare_files(old: Path, new: Path, progress: Progress = no_progress) -> pd.DataFrame:
    """The files of two versions whose bytes differ: columns file, old, new (SHA-256, or `-` where it is missing).

    Every byte of both is read. `UNHASHED` files, such as `software.json`, differ between equal versions and are not
    compared.
    """
    names = sorted({METADATA, *read_metadata(old)["files"], *read_metadata(new)["files"]})
    rows = []
    for done, name in enumerate(names, 1):
        rows.append((name, _sha256(old / name), _sha256(new / name)))
        progress("compare files", done, len(names), "files")
    return pd.DataFrame([row for row in rows if row[1] != row[2]], columns=["file", "old", "new"])


def _sha256(path: Path) -> str:
    try:
        return sha256_file(path)
    except FileNotFoundError:
        return "-"


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """Flatten nested mappings: `{"config": {"slices": 20}}` -> `{"config.slices": "20"}`."""
    if isinstance(value, Mapping):
        parts = [_flat(item, f"{name}.{key}" if name else str(key)) for key, item in value.items()]
        return {key: text for part in parts for key, text in part.items()}
    return {name.removeprefix("inputs."): value if isinstance(value, str) else json.dumps(value)}


def compare_manifests(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """Subjects that differ between two manifests: columns subject_id, old, new (status in words), changed (columns)."""

    def status(table: pd.DataFrame) -> pd.Series:
        text = table["status"] + table["reason"].map(lambda r: f" ({r})" if r else "")
        text += table["split"].map(lambda s: f", {s}" if s else "")
        return pd.Series(text.to_numpy(), index=table["subject_id"])

    def contents(table: pd.DataFrame) -> pd.DataFrame:
        return table.set_index("subject_id").drop(columns="store_row").astype("object")

    both = pd.DataFrame({"old": status(old), "new": status(new)}).sort_index()
    tables = contents(old), contents(new)
    columns = list(dict.fromkeys([*tables[0].columns, *tables[1].columns]))  # some configurations add columns
    a, b = (table.reindex(index=both.index, columns=columns).astype("object") for table in tables)
    differs = ((a != b) & ~(a.isna() & b.isna())).fillna(True)
    both = both[differs.any(axis=1)].fillna("absent")
    both["changed"] = [", ".join(c for c in differs.columns if differs.at[s, c]) for s in both.index]
    both.loc[(both["old"] == "absent") | (both["new"] == "absent"), "changed"] = ""
    return both.reset_index(names="subject_id")
