"""A damaged checkpoint is refused, the newest valid one is found, the newest and the best are kept."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples
from safetensors.torch import save_file

from ixi_etl.errors import CheckpointError
from model import checkpoint

TENSORS = {
    "weights": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "step": torch.tensor(7.0),
    "random": torch.arange(50, dtype=torch.uint8),
    "half": torch.ones(2, 3, dtype=torch.bfloat16),
}


METADATA = {"step": 1, "config": {}, "validation": {}}


def write(folder: Path, step: int, mae: float | None = None) -> Path:
    path = checkpoint.checkpoint_path(folder, step)
    validation = {} if mae is None else {"mae": mae}
    checkpoint.save(path, TENSORS, {"step": step, "config": {"a": 1}, "validation": validation})
    return path


def test_load_returns_what_was_saved(tmp_path: Path) -> None:
    tensors, metadata = checkpoint.load(write(tmp_path, 3))
    defaults = {"processes": None, "normalisation": "percentiles", "slice_shape": None}
    assert metadata == {"step": 3, "config": {"a": 1}, "validation": {}, **defaults}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    path = write(tmp_path / "checkpoints", 1)
    write(tmp_path / "checkpoints", 1)  # overwrites the first
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    before = os.umask(0o027)
    try:
        assert write(tmp_path, 2).stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_the_memory_format_is_not_stored(tmp_path: Path) -> None:
    image = torch.rand(2, 3, 4, 4)
    checkpoint.save(tmp_path / "a", {"x": image.contiguous(memory_format=torch.channels_last)}, METADATA)
    assert torch.equal(checkpoint.load(tmp_path / "a")[0]["x"], image)


@settings(max_examples=examples(60))
@given(data=st.data())
def test_truncation_and_flipped_bits_are_detected(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = write(tmp_path_factory.mktemp("damaged"), 1)
    original = path.read_bytes()
    if data.draw(st.booleans(), label="truncate"):
        broken = original[: data.draw(st.integers(0, len(original) - 1))]
    else:
        position, bit = data.draw(st.integers(0, len(original) - 1)), data.draw(st.integers(0, 7))
        broken = original[:position] + bytes([original[position] ^ 1 << bit]) + original[position + 1 :]
    path.write_bytes(broken)
    try:
        tensors, metadata = checkpoint.load(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        return
    # Only changes of white space in the header go unnoticed.
    assert metadata == {"step": 1, "config": {"a": 1}, "validation": {}}
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_latest_valid_skips_and_names_a_damaged_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (10, 20, 30):
        write(tmp_path, step)
    damaged = checkpoint.checkpoint_path(tmp_path, 30)
    damaged.write_bytes(damaged.read_bytes()[:-5])
    found = checkpoint.latest_valid(tmp_path)
    assert found is not None
    assert found[0].step == 20
    assert str(damaged) in caplog.text
    assert checkpoint.latest_valid(tmp_path / "nothing") is None


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, mae in ((1, 0.5), (2, 0.1), (3, 0.4), (4, 0.3), (5, 0.2)):
        write(tmp_path, step, mae)
        checkpoint.prune_checkpoints(tmp_path, keep=2)
    assert [c.step for c in checkpoint.list_checkpoints(tmp_path)] == [2, 4, 5]
    best = checkpoint.best_checkpoint(tmp_path)
    assert best is not None
    assert best.step == 2


def test_the_best_is_the_newest_if_scores_are_equal_or_missing(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    assert checkpoint.best_checkpoint(tmp_path).step == 2  # type: ignore[union-attr]
    write(tmp_path, 3, 0.2)
    write(tmp_path, 4, 0.2)
    write(tmp_path, 5)
    assert checkpoint.best_checkpoint(tmp_path).step == 4  # type: ignore[union-attr]


def test_a_checkpoint_with_nan_validation_is_never_best(tmp_path: Path) -> None:
    write(tmp_path, 1, float("nan"))
    write(tmp_path, 2, 0.3)
    write(tmp_path, 3, float("nan"))
    assert checkpoint.best_checkpoint(tmp_path).step == 2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "text",
    ["[]", "5", "{}", "[" * 100_000, "1" * 5000]
    + [
        json.dumps(METADATA | change)
        for change in ({"step": "1"}, {"step": None}, {"step": -1}, {"config": []}, {"validation": [1]})
    ]
    + [json.dumps(METADATA | {"validation": {"mae": "x"}})],
    ids=lambda text: text[:60],
)
def test_invalid_metadata_is_a_one_line_error(text: str, tmp_path: Path) -> None:
    path = checkpoint.checkpoint_path(tmp_path, 1)
    save_file({}, path, metadata={"facts": text, "sha256": hashlib.sha256(text.encode()).hexdigest()})
    for read in (checkpoint.load, checkpoint.read_metadata):
        with pytest.raises(CheckpointError, match="is damaged or not a checkpoint of this project") as error:
            read(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    assert checkpoint.latest_valid(tmp_path) is None


def test_a_pickle_is_refused_and_not_executed(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.safetensors"
    torch.save({"x": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="is damaged or not a checkpoint of this project"):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.load(tmp_path / "nothing")
