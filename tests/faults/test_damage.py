"""A damaged store: deep verification names the damaged file, and so does the training, which refuses it."""

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
from model.jobs import (
    prepare_run,
    train_run,
)

pytestmark = pytest.mark.faults


@pytest.fixture
def copy(published: PublishedVersion, tmp_path: Path) -> Path:
    """The version in a root of its own, in which files may be damaged."""
    shutil.copytree(published.folder.parents[2], tmp_path / "root")
    return tmp_path / "root/datasets" / DEFAULT_DATASET / published.version


def refused_by_training(folder: Path) -> str:
    with pytest.raises(DatasetError) as caught:
        data.load_pairs(folder, "train")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_damage_flip(copy: Path, row: Row) -> None:
    """Any one byte of any shard: evenly spread over all of them, and those of their ends, where their indices lie."""
    count = 400
    rng = np.random.default_rng(1)
    table = manifest.used_rows(metadata.read_manifest(copy))
    rows = table.loc[table["split"] == "train", "store_row"].tolist()
    shards = [copy / f"slices.zarr/{name}/c/{row}/0/0/0" for name in ("t1", "t2") for row in rows]
    for n in range(count):
        shard = shards[n % len(shards)]
        whole = shard.read_bytes()
        at = len(whole) - 1 - int(rng.integers(250)) if n % 4 == 0 else int((n + 0.5) / count * len(whole))
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << int(rng.integers(8)))]) + whole[at + 1 :])
        assert any(str(shard) in problem for problem in verify.verify(copy, deep=True))
        assert str(shard) in refused_by_training(copy)
        shard.write_bytes(whole)
    data.load_pairs(copy, "train")
    row("one bit flipped in a shard", count, "verify --deep and the training name the file", "none unseen")


def edit_manifest(copy: Path) -> Path:
    path = copy / metadata.MANIFEST
    text = path.read_text()
    path.write_text(text.replace("Guys", "Guyz", 1) if "Guys" in text else text.replace("HH", "HG", 1))
    return path


def mend_split(copy: Path) -> Path:
    """Somebody moves a subject to another split, and the file keeps its size."""
    path = copy / metadata.MANIFEST
    path.write_text(path.read_text().replace(",train,0,", ",train,1,", 1).replace(",train,1,", ",train,0,", 1) + " ")
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


def edit_metadata(copy: Path) -> Path:
    path = copy / "slices.zarr/t1/zarr.json"
    path.write_text(path.read_text().replace('"fill_value": 0', '"fill_value": 1'))
    return path


def delete_metadata(copy: Path) -> Path:
    path = copy / "slices.zarr/t1/zarr.json"
    path.unlink()
    return path


def cut_facts(copy: Path) -> Path:
    path = copy / metadata.METADATA
    os.truncate(path, 200)
    return path


def edit_facts(copy: Path) -> Path:
    path = copy / metadata.METADATA
    path.write_text(path.read_text().replace('"anatomical"', '"index"'))
    return path


def lead_out(copy: Path) -> Path:
    """A list of files that points outside of the version."""
    path = copy / metadata.METADATA
    facts = json.loads(path.read_text())
    facts["files"]["../../../../etc/hostname"] = {"size": 1, "sha256": "0" * 64}
    path.write_text(to_json(metadata.with_digest(facts)))
    return copy / "../../../../etc/hostname"


DAMAGE: dict[str, Callable[[Path], Path]] = {
    "a manifest edited": edit_manifest,
    "a manifest with a space more": mend_split,
    "a shard deleted": delete_shard,
    "a shard cut short": shorten_shard,
    "two shards swapped": swap_shards,
    "an array's metadata edited": edit_metadata,
    "an array's metadata deleted": delete_metadata,
    "the facts cut short": cut_facts,
    "the facts edited": edit_facts,
    "a list of files that leads out": lead_out,
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage(what: str, copy: Path, row: Row) -> None:
    path = DAMAGE[what](copy)
    assert any(str(path) in problem for problem in verify.verify(copy, deep=True))
    assert str(path) in refused_by_training(copy)
    row(what, 1, "verify --deep and the training name the file", "none unseen")


def test_damage_facts_fuzzed(copy: Path, row: Row) -> None:
    """Whatever is in `dataset.json`, verification ends in lines, and not in a trace."""
    count, found = 300, 0
    path, rng = copy / metadata.METADATA, np.random.default_rng(3)
    facts = json.loads(path.read_text())
    for _ in range(count):
        broken = json.loads(json.dumps(facts))
        where = broken if rng.random() < 0.5 else broken[("files", "inputs", "funnel", "splits")[rng.integers(4)]]
        key = list(where)[rng.integers(len(where))]
        where[key] = (None, [], {}, "x", -1, {"size": "x"}, [1], {"../x": 1})[rng.integers(8)]
        path.write_text(to_json(metadata.with_digest(broken)))
        found += bool(problems := verify.verify(copy))
        assert all("\n" not in problem for problem in problems)
    row("facts with other values", count, f"{found} found at once, no trace", "none")


def test_damage_metadata_fuzzed(copy: Path, row: Row) -> None:
    """Whatever is in the metadata of the store, or in the manifest, verification ends in lines that name the file."""
    count, rng = 300, np.random.default_rng(4)
    kinds = [None, [], {}, "x", -1, 10**30, [1], {"a": 1}, True, 1.5]
    paths = [copy / "slices.zarr/zarr.json", copy / "slices.zarr/t1/zarr.json", copy / metadata.MANIFEST]
    for path in paths:
        whole = path.read_bytes()
        broken = bytearray(whole)
        for _ in range(count):
            if path.suffix == ".json" and rng.random() < 0.5:
                edited = where = json.loads(whole)
                while True:
                    key = list(where)[rng.integers(len(where))]
                    if not isinstance(where[key], dict) or not where[key] or rng.random() < 0.2:
                        break
                    where = where[key]
                where[key] = kinds[rng.integers(len(kinds))]
                path.write_text(json.dumps(edited))
            else:
                at = int(rng.integers(len(broken)))
                broken[:] = whole
                broken[at] ^= int(rng.integers(1, 256))
                path.write_bytes(broken)
            problems = verify.verify(copy)
            assert any(str(path) in problem for problem in problems)
            assert all("\n" not in problem for problem in problems)
        path.write_bytes(whole)
    row(
        "metadata and manifests with other values", len(paths) * count, "verify names the file, no trace", "none unseen"
    )


def test_damage_pointer(copy: Path, row: Row) -> None:
    data_root = DataRoot(copy.parents[2])
    pointer = data_root.datasets / metadata.POINTER
    for name in ("0123456789ab", "../../runs", "..", "/etc"):
        pointer.write_text(json.dumps({"version": name, "history": []}))
        for run in (
            lambda: versions.resolve_version(data_root),
            lambda: prepare_run(data_root.root, TrainConfig(), "a"),
        ):
            with pytest.raises(DatasetError, match=f"latest.json names version {name}, which does not exist"):
                run()
    row("a pointer to a missing version", 4, "one line that names it", "none")


def test_a_version_that_is_damaged_is_not_trained_on(copy: Path) -> None:
    delete_shard(copy)  # which Zarr reads as zeros
    with pytest.raises(DatasetError, match=r"t2/c/3/0/0/0 is missing; `ixi-etl refresh` makes the version again"):
        train_run(prepare_run(copy.parents[2], TrainConfig.model_validate(SMALL_NETWORKS | {"steps": 1}), "a"))
