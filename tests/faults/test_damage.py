"""Deep verification names a damaged file, and so does the training, which refuses the version."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL_NETWORKS
from faults_table import Row

from ixi_etl.core.files import to_json
from ixi_etl.core.storage import DEFAULT_DATASET, DataRoot
from ixi_etl.dataset import manifest, metadata, verify, versions
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.errors import DatasetError
from model import data
from model.config import TrainConfig
from model.jobs import prepare_run, train_run

pytestmark = pytest.mark.faults


@pytest.fixture
def copy(published: PublishedVersion, tmp_path: Path) -> Path:
    """A copy of the version in another root, in which tests damage files."""
    shutil.copytree(published.folder.parents[2], tmp_path / "root")
    return tmp_path / "root/datasets" / DEFAULT_DATASET / published.version


def training_error(folder: Path) -> str:
    """The message with which a training refuses the version."""
    with pytest.raises(DatasetError) as caught:
        data.load_pairs(folder, "train")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_flipped_bit_in_a_shard_is_found(copy: Path, row: Row) -> None:
    """At positions spread evenly over all shards, and in every fourth case in the index at the end of a shard."""
    count = 400
    rng = np.random.default_rng(1)
    table = manifest.used_rows(metadata.read_manifest(copy))
    rows = table.loc[table["split"] == "train", "store_row"].tolist()
    shards = [copy / f"slices.zarr/{name}/c/{row}/0/0/0" for name in ("t1", "t2") for row in rows]
    for n in range(count):
        shard = shards[n % len(shards)]
        original = shard.read_bytes()
        at = len(original) - 1 - int(rng.integers(250)) if n % 4 == 0 else int((n + 0.5) / count * len(original))
        shard.write_bytes(original[:at] + bytes([original[at] ^ (1 << int(rng.integers(8)))]) + original[at + 1 :])
        assert any(str(shard) in problem for problem in verify.verify(copy, deep=True))
        assert str(shard) in training_error(copy)
        shard.write_bytes(original)
    data.load_pairs(copy, "train")
    row("one bit flipped in a shard", count, "verify --deep and the training name the file", "none undetected")


def edit_manifest(copy: Path) -> Path:
    path = copy / metadata.MANIFEST
    text = path.read_text()
    path.write_text(text.replace("Guys", "Guyz", 1) if "Guys" in text else text.replace("HH", "HG", 1))
    return path


def append_to_manifest(copy: Path) -> Path:
    """The table stays the same."""
    path = copy / metadata.MANIFEST
    path.write_text(path.read_text() + " ")
    return path


def delete_shard(copy: Path) -> Path:
    path = copy / "slices.zarr/t2/c/3/0/0/0"
    path.unlink()
    return path


def shorten_shard(copy: Path) -> Path:
    path = copy / "slices.zarr/t1/c/2/0/0/0"
    os.truncate(path, path.stat().st_size - 1)
    return path


def swap_shards(copy: Path) -> Path:
    one, two = (copy / f"slices.zarr/t1/c/{n}/0/0/0" for n in (0, 1))
    first = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(first)
    return one


def edit_array_metadata(copy: Path) -> Path:
    path = copy / "slices.zarr/t1/zarr.json"
    path.write_text(path.read_text().replace('"fill_value": 0', '"fill_value": 1'))
    return path


def delete_array_metadata(copy: Path) -> Path:
    path = copy / "slices.zarr/t1/zarr.json"
    path.unlink()
    return path


def truncate_dataset_json(copy: Path) -> Path:
    path = copy / metadata.METADATA
    os.truncate(path, 200)
    return path


def edit_dataset_json(copy: Path) -> Path:
    path = copy / metadata.METADATA
    path.write_text(path.read_text().replace('"anatomical"', '"index"'))
    return path


def list_file_outside(copy: Path) -> Path:
    """The list of files names one outside the version."""
    path = copy / metadata.METADATA
    fields = json.loads(path.read_text())
    fields["files"]["../../../../etc/hostname"] = {"size": 1, "sha256": "0" * 64}
    path.write_text(to_json(metadata.with_digest(fields)))
    return copy / "../../../../etc/hostname"


DAMAGE: dict[str, Callable[[Path], Path]] = {
    "a manifest edited": edit_manifest,
    "a manifest with an added space": append_to_manifest,
    "a shard deleted": delete_shard,
    "a shard truncated": shorten_shard,
    "two shards swapped": swap_shards,
    "an array's metadata edited": edit_array_metadata,
    "an array's metadata deleted": delete_array_metadata,
    "dataset.json truncated": truncate_dataset_json,
    "dataset.json edited": edit_dataset_json,
    "a list of files that names one outside": list_file_outside,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_version_is_refused(damage: str, copy: Path, row: Row) -> None:
    path = DAMAGE[damage](copy)
    assert any(str(path) in problem for problem in verify.verify(copy, deep=True))
    assert str(path) in training_error(copy)
    row(damage, 1, "verify --deep and the training name the file", "none undetected")


def test_wrong_values_in_dataset_json_are_reported_in_lines(copy: Path, row: Row) -> None:
    """With a digest that matches."""
    count, found = 300, 0
    path, rng = copy / metadata.METADATA, np.random.default_rng(3)
    original = json.loads(path.read_text())
    for _ in range(count):
        broken = json.loads(json.dumps(original))
        target = broken if rng.random() < 0.5 else broken[("files", "inputs", "funnel", "splits")[rng.integers(4)]]
        key = list(target)[rng.integers(len(target))]
        target[key] = (None, [], {}, "x", -1, {"size": "x"}, [1], {"../x": 1})[rng.integers(8)]
        path.write_text(to_json(metadata.with_digest(broken)))
        found += bool(problems := verify.verify(copy))
        assert all("\n" not in problem for problem in problems)
    row("dataset.json with other values", count, f"{found} found by verify, no traceback", "none")


def test_damaged_store_metadata_and_manifests_are_named_in_lines(copy: Path, row: Row) -> None:
    """Changed values in JSON, and changed bytes."""
    count, rng = 300, np.random.default_rng(4)
    values = [None, [], {}, "x", -1, 10**30, [1], {"a": 1}, True, 1.5]
    paths = [copy / "slices.zarr/zarr.json", copy / "slices.zarr/t1/zarr.json", copy / metadata.MANIFEST]
    for path in paths:
        original = path.read_bytes()
        broken = bytearray(original)
        for _ in range(count):
            if path.suffix == ".json" and rng.random() < 0.5:
                edited = target = json.loads(original)
                while True:
                    key = list(target)[rng.integers(len(target))]
                    if not isinstance(target[key], dict) or not target[key] or rng.random() < 0.2:
                        break
                    target = target[key]
                target[key] = values[rng.integers(len(values))]
                path.write_text(json.dumps(edited))
            else:
                at = int(rng.integers(len(broken)))
                broken[:] = original
                broken[at] ^= int(rng.integers(1, 256))
                path.write_bytes(broken)
            problems = verify.verify(copy)
            assert any(str(path) in problem for problem in problems)
            assert all("\n" not in problem for problem in problems)
        path.write_bytes(original)
    row(
        "metadata and manifests with other values",
        len(paths) * count,
        "verify names the file, no traceback",
        "none undetected",
    )


def test_a_pointer_to_a_missing_version_is_one_line(copy: Path, row: Row) -> None:
    data_root = DataRoot(copy.parents[2])
    pointer = data_root.datasets / metadata.POINTER
    for name in ("0123456789ab", "../../runs", "..", "/etc"):
        pointer.write_text(json.dumps({"version": name, "history": []}))
        for action in (
            lambda: versions.resolve_version(data_root),
            lambda: prepare_run(data_root.root, TrainConfig(), "a"),
        ):
            with pytest.raises(DatasetError, match=f"latest.json names version {name}, which does not exist"):
                action()
    row("a pointer to a missing version", 4, "one line that names it", "none")


def test_a_version_without_a_shard_is_not_trained_on(copy: Path) -> None:
    delete_shard(copy)  # Zarr reads a missing shard as zeros
    with pytest.raises(
        DatasetError,
        match=r"t2/c/3/0/0/0 is missing; `ixi-etl refresh --slices 12 --registration none --source FILES` makes",
    ):
        train_run(prepare_run(copy.parents[2], TrainConfig.model_validate(SMALL_NETWORKS | {"steps": 1}), "a"))
