"""Without space on the disk or in memory, one line states what to do, and the same command run again resumes.

A limit on the size of files simulates a full disk; `make faults` fills real disks at many moments.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL_NETWORKS, config_for

from ixi_etl.core.storage import DataRoot
from ixi_etl.dataset import metadata, versions
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.errors import IxiError
from ixi_etl.recipes import ixi as jobs


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_refresh_without_disk_space_is_a_one_line_error_and_resumes(
    published: PublishedVersion, archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, data_root = config_for(tmp_path, archives), DataRoot(tmp_path)
    staging = data_root.staging(published.version)
    for stage, size in (("cut_subjects", 10_000), ("publish_version", 1000)):
        function = getattr(jobs, stage)

        def limited(*arguments: Any, function: Any = function, size: int = size) -> Any:
            with file_size_limit(size):
                return function(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(jobs, stage, limited)
            with pytest.raises(IxiError, match=f"{staging}.*: File too large; fix that") as caught:
                jobs.refresh(config)
        assert "\n" not in str(caught.value)
        assert versions.published_versions(data_root) == []
    made = jobs.refresh(config)
    assert metadata.read_metadata(made.folder) == metadata.read_metadata(published.folder)  # with every file's SHA-256


@pytest.fixture
def root(torch: Any, published: PublishedVersion, tmp_path: Path) -> Path:
    (tmp_path / "datasets").symlink_to(published.folder.parents[1])
    return tmp_path


def run_of(root: Path, **settings: Any) -> Any:
    from model.config import TrainConfig
    from model.jobs import prepare_run

    small = SMALL_NETWORKS | {"batch_size": 2, "checkpoint_every": 2, "log_every": 2, "samples": 0}
    return prepare_run(root, TrainConfig.model_validate(small | settings), "a")


def test_a_training_without_disk_space_is_a_one_line_error_and_resumes(root: Path) -> None:
    from model import checkpoint
    from model.jobs import train_run

    train_run(run_of(root, steps=2))
    run = run_of(root, steps=4)
    with file_size_limit(20_000), pytest.raises(IxiError, match="File too large") as caught:
        train_run(run, resume=True)
    assert "\n" not in str(caught.value)
    newest = checkpoint.latest_valid(run.folder / "checkpoints")
    assert newest is not None
    assert newest[0].step == 2
    train_run(run, resume=True)
    assert [c.step for c in checkpoint.list_checkpoints(run.folder / "checkpoints")] == [2, 4]


def test_a_training_without_memory_suggests_a_smaller_batch(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from ixi_etl.errors import TrainingError
    from model.jobs import train_run
    from model.trainer import Trainer

    monkeypatch.setattr(Trainer, "step", lambda *_: torch.empty(1 << 60, dtype=torch.uint8))  # the allocator refuses
    with pytest.raises(TrainingError, match="out of memory at batch_size 2; try batch_size 1"):
        train_run(run_of(root, steps=2))
