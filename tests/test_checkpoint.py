"""A checkpoint is whole or refused; the newest whole one is found; the best and the newest are kept."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples

torch = pytest.importorskip("torch", reason="torch is not installed; pip install -c constraints.txt -e '.[train]'")

from safetensors.torch import save_file  # noqa: E402

from model import checkpoint  # noqa: E402
from model.checkpoint import CheckpointError  # noqa: E402

TENSORS = {
    "weights": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "step": torch.tensor(7.0),
    "random": torch.arange(50, dtype=torch.uint8),
    "half": torch.ones(2, 3, dtype=torch.bfloat16),
}


FACTS = {"step": 1, "config": {}, "validation": {}}


def write(folder: Path, step: int, mae: float | None = None) -> Path:
    path = checkpoint.path_of(folder, step)
    validation = {} if mae is None else {"mae": mae}
    checkpoint.save(path, TENSORS, {"step": step, "config": {"a": 1}, "validation": validation})
    return path


def test_what_was_saved_is_what_is_loaded(tmp_path: Path) -> None:
    tensors, facts = checkpoint.load(write(tmp_path, 3))
    assert facts == {"step": 3, "config": {"a": 1}, "validation": {}, "processes": None}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])


def test_a_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    path = write(tmp_path / "checkpoints", 1)
    write(tmp_path / "checkpoints", 1)  # over one that is there
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    before = os.umask(0o027)
    try:
        assert write(tmp_path, 2).stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_layout_in_memory_is_no_part_of_it(tmp_path: Path) -> None:
    image = torch.rand(2, 3, 4, 4)
    checkpoint.save(tmp_path / "a", {"x": image.contiguous(memory_format=torch.channels_last)}, FACTS)
    assert torch.equal(checkpoint.load(tmp_path / "a")[0]["x"], image)


@settings(max_examples=examples(60))
@given(data=st.data())
def test_any_cut_and_any_flipped_bit_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = write(tmp_path_factory.mktemp("damaged"), 1)
    whole = path.read_bytes()
    if data.draw(st.booleans(), label="cut"):
        broken = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        at, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
        broken = whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]
    path.write_bytes(broken)
    try:
        tensors, facts = checkpoint.load(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        return
    # What may change unnoticed is the white space in the header.
    assert facts == {"step": 1, "config": {"a": 1}, "validation": {}}
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_the_newest_whole_one_is_used_and_the_damaged_one_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (10, 20, 30):
        write(tmp_path, step)
    damaged = checkpoint.path_of(tmp_path, 30)
    damaged.write_bytes(damaged.read_bytes()[:-5])
    found = checkpoint.newest_whole(tmp_path)
    assert found is not None
    assert found[0].step == 20
    assert str(damaged) in caplog.text
    assert checkpoint.newest_whole(tmp_path / "nothing") is None


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, mae in ((1, 0.5), (2, 0.1), (3, 0.4), (4, 0.3), (5, 0.2)):
        write(tmp_path, step, mae)
        checkpoint.prune(tmp_path, keep=2)
    assert [c.step for c in checkpoint.found(tmp_path)] == [2, 4, 5]
    best = checkpoint.best(tmp_path)
    assert best is not None
    assert best.step == 2


def test_of_equally_good_ones_and_of_none_validated_the_newest_is_best(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    assert checkpoint.best(tmp_path).step == 2  # type: ignore[union-attr]
    write(tmp_path, 3, 0.2)
    write(tmp_path, 4, 0.2)
    write(tmp_path, 5)
    assert checkpoint.best(tmp_path).step == 4  # type: ignore[union-attr]


def test_one_whose_validation_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    write(tmp_path, 1, float("nan"))
    write(tmp_path, 2, 0.3)
    write(tmp_path, 3, float("nan"))
    assert checkpoint.best(tmp_path).step == 2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "said",
    ["[]", "5", "{}", "[" * 100_000, "1" * 5000]
    + [
        json.dumps(FACTS | change)
        for change in ({"step": "1"}, {"step": None}, {"step": -1}, {"config": []}, {"validation": [1]})
    ]
    + [json.dumps(FACTS | {"validation": {"mae": "x"}})],
    ids=lambda said: said[:60],
)
def test_facts_that_cannot_be_are_refused_in_a_line(said: str, tmp_path: Path) -> None:
    path = checkpoint.path_of(tmp_path, 1)
    save_file({}, path, metadata={"facts": said, "sha256": hashlib.sha256(said.encode()).hexdigest()})
    for read in (checkpoint.load, checkpoint.read_facts):
        with pytest.raises(CheckpointError, match="is damaged or no checkpoint of this project") as error:
            read(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    assert checkpoint.newest_whole(tmp_path) is None


def test_a_file_that_is_no_checkpoint_is_refused_and_never_run(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.safetensors"
    torch.save({"x": torch.ones(1)}, path)  # a pickle
    with pytest.raises(CheckpointError, match="is damaged or no checkpoint of this project"):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match="is not there"):
        checkpoint.load(tmp_path / "nothing")
