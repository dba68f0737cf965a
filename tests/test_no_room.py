"""No room on the disk or in memory: one line says what to do, and the same command run again continues from there.

The disk is one that lets no file grow beyond a limit; `make faults` has disks that are really full, at many moments.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL_NETWORKS, config_for

from ixi_etl import dataset
from ixi_etl import refresh as jobs
from ixi_etl.errors import IxiError
from ixi_etl.publish import Refreshed


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_refresh_without_room_is_one_line_and_the_next_goes_on(
    published: Refreshed, archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, places = config_for(tmp_path, archives), dataset.Places(tmp_path)
    staging = places.staging(published.version)
    for stage, size in (("cut_subjects", 10_000), ("publish_version", 1000)):
        honest = getattr(jobs, stage)

        def limited(*arguments: Any, honest: Any = honest, size: int = size) -> Any:
            with files_up_to(size):
                return honest(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(jobs, stage, limited)
            with pytest.raises(IxiError, match=f"{staging}.*: File too large; mend") as caught:
                jobs.refresh(config)
        assert "\n" not in str(caught.value)
        assert dataset.published(places) == []
    made = jobs.refresh(config)
    assert dataset.read_facts(made.folder) == dataset.read_facts(published.folder)  # with every file's SHA-256


@pytest.fixture
def root(published: Refreshed, tmp_path: Path) -> Path:
    pytest.importorskip("torch", reason="torch is not installed; pip install -c constraints.txt -e '.[train]'")
    (tmp_path / "datasets").symlink_to(published.folder.parents[1])
    return tmp_path


def run_of(root: Path, **settings: Any) -> Any:
    from model.config import TrainConfig
    from model.run import prepare

    small = SMALL_NETWORKS | {"batch_size": 2, "checkpoint_every": 2, "log_every": 2, "samples": 0}
    return prepare(root, TrainConfig.model_validate(small | settings), "a")


def test_a_training_without_room_is_one_line_and_goes_on_from_its_last_checkpoint(root: Path) -> None:
    from model import checkpoint
    from model.run import train_run

    train_run(run_of(root, steps=2))
    run = run_of(root, steps=4)
    with files_up_to(20_000), pytest.raises(IxiError, match="File too large") as caught:
        train_run(run, resume=True)
    assert "\n" not in str(caught.value)
    newest = checkpoint.newest_whole(run.folder / "checkpoints")
    assert newest is not None
    assert newest[0].step == 2
    train_run(run, resume=True)
    assert [c.step for c in checkpoint.found(run.folder / "checkpoints")] == [2, 4]


def test_a_training_without_memory_says_what_to_try(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from model.learner import Learner
    from model.run import train_run
    from model.train import TrainingError

    monkeypatch.setattr(Learner, "step", lambda *_: torch.empty(1 << 60, dtype=torch.uint8))  # the allocator refuses
    with pytest.raises(TrainingError, match="out of memory at batch_size 2; try batch_size 1"):
        train_run(run_of(root, steps=2))
