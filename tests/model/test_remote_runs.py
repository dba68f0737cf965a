"""A run on S3 works in a local folder; another machine can resume and evaluate it."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_NETWORKS, new_s3_root

from ixi_etl.core.files import write_atomic
from ixi_etl.core.lease import LEASE, Lease, LeaseTimes, lock_shared
from ixi_etl.core.progress import no_progress
from ixi_etl.core.storage import DataRoot, file_sizes, filesystem_of, to_path, upload_folder
from ixi_etl.dataset import metadata
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.errors import LockedError
from model import checkpoint
from model import run as runs
from model.config import TrainConfig
from model.jobs import evaluate_run, prepare_run, train_run
from model.run import Run, find_run, open_run

SMALL = SMALL_NETWORKS | {"steps": 4, "checkpoint_every": 2, "keep": 1, "log_every": 1, "samples": 0}


@pytest.fixture(scope="module")
def root(s3: None, published: PublishedVersion) -> str:
    """A root on S3 with the published dataset; each test uses its own runs in it."""
    root = new_s3_root()
    data_root = DataRoot(root)
    upload_folder(published.folder, data_root.version(published.version), last=metadata.METADATA, progress=no_progress)
    write_atomic(data_root.datasets / metadata.POINTER, (published.folder.parent / metadata.POINTER).read_bytes())
    return root


def run_in(root: str, name: str, scratch: Path, **settings: Any) -> Run:
    return prepare_run(root, TrainConfig.model_validate(SMALL | settings), name, scratch)


@dataclass(frozen=True)
class Trained:
    """A run of 4 steps, with the sizes of its local files and of its files on S3.

    `latest` is the same run, opened by that name on another machine.
    """

    run: Run
    latest: Run
    local_files: dict[str, int]
    remote_files: dict[str, int]

    def copy_as(self, name: str) -> Path:
        """A copy of the remote run under `name`, which a test may change."""
        assert self.run.remote
        copy = self.run.remote.with_name(name)
        (filesystem, top), (_, target) = filesystem_of(self.run.remote), filesystem_of(copy)
        filesystem.copy([f"{top}/{n}" for n in self.remote_files], [f"{target}/{n}" for n in self.remote_files])
        return copy


@pytest.fixture(scope="module")
def trained(root: str, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    run = run_in(root, "a", tmp_path_factory.mktemp("first"))
    train_run(run)
    assert run.remote
    latest = open_run(root, "latest", tmp_path_factory.mktemp("second"))
    on_s3 = {name: size for name, size in file_sizes(run.remote).items() if name != LEASE}
    return Trained(run, latest, file_sizes(run.folder), on_s3)


def test_one_machine_at_a_time_trains_a_run(trained: Trained, tmp_path: Path) -> None:
    remote = trained.copy_as("leased")
    lease = Lease(remote, "--run-id", LeaseTimes())
    assert lease.acquire(tmp_path)
    again = run_in(str(remote.parent.parent), "leased", tmp_path / "second")
    for work in (partial(train_run, resume=True), evaluate_run):
        with pytest.raises(LockedError, match=r"leased is in use by process .*; wait, or choose another --run-id"):
            work(again)
    lease.release()
    assert train_run(again, resume=True) == again.generator
    assert not (again.folder / LEASE).exists(), "the lock of another machine was downloaded"


def test_a_run_that_another_machine_took_over_is_not_uploaded(trained: Trained, tmp_path: Path) -> None:
    remote = trained.copy_as("taken")
    with lock_shared(trained.run.folder, remote, times=LeaseTimes(lasts_s=-2)):
        assert Lease(remote, "--run-id", LeaseTimes()).acquire(tmp_path)
        (remote / "config.json").unlink()
        with pytest.raises(LockedError, match="taken is now locked by process"):
            runs.push_if_possible(trained.run.folder, remote)
    assert not (remote / "config.json").exists()


def weights(path: Path) -> dict[str, Any]:
    return checkpoint.load(path)[0]


@pytest.mark.stack
def test_another_machine_resumes_a_run_bit_exactly(
    root: str, trained: Trained, published: PublishedVersion, tmp_path: Path
) -> None:
    remote = trained.copy_as("b")
    second = run_in(root, "b", tmp_path / "second", steps=8)
    assert str(second.remote) == str(remote) == f"{root}/runs/b"
    resumed = train_run(second, resume=True)
    (tmp_path / "datasets").symlink_to(published.folder.parents[1])
    uninterrupted = run_in(str(tmp_path), "a", tmp_path, steps=8)
    assert uninterrupted.remote is None
    wanted, got = weights(train_run(uninterrupted)), weights(resumed)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert (second.folder / "metrics.csv").read_text().count("\n") == 1 + 8


@pytest.mark.stack
def test_the_remote_has_all_local_files_except_locks(trained: Trained) -> None:
    remote = trained.remote_files
    assert remote == {n: s for n, s in trained.local_files.items() if not n.startswith(".")}
    assert str(trained.latest.remote) == str(trained.run.remote)
    assert {"config.json", "generator.safetensors", "metrics.csv"} <= set(remote)
    assert "checkpoints/step-00000004.safetensors" in remote
    assert len([name for name in remote if name.startswith("checkpoints/")]) <= 2  # the newest and the best


@pytest.mark.stack
def test_another_machine_evaluates_a_run_and_uploads_the_scores(root: str, trained: Trained, tmp_path: Path) -> None:
    trained.copy_as("c")
    opened = open_run(root, "c", tmp_path)
    assert opened.remote
    assert weights(opened.generator).keys() == weights(trained.run.folder / "generator.safetensors").keys()
    evaluate_run(opened, split="train")
    assert (opened.remote / "evaluation-train.csv").read_bytes() == (
        opened.folder / "evaluation-train.csv"
    ).read_bytes()


@pytest.mark.stack
def test_results_of_another_machine_are_downloaded(root: str, trained: Trained, tmp_path: Path) -> None:
    remote, local = trained.copy_as("f"), shutil.copytree(trained.run.folder, tmp_path / "runs" / "f")
    (local / "generator.safetensors").unlink()
    here, there = local / "evaluation-test.json", remote / "evaluation-test.json"
    there.write_bytes(b"of another machine")
    assert find_run(root, "f", tmp_path) == local
    assert here.read_bytes() == b"of another machine"
    assert (local / "generator.safetensors").read_bytes() == trained.run.generator.read_bytes()
    here.write_bytes(b"of this machine, later")
    tomorrow = time.time() + 86_400
    os.utime(here, (tomorrow, tomorrow))
    find_run(root, "f", tmp_path)
    assert here.read_bytes() == b"of this machine, later"
    os.utime(here, (0, 0))
    find_run(root, "f", tmp_path)
    assert here.read_bytes() == b"of another machine"


@pytest.mark.stack
def test_pull_changes_nothing_if_the_local_run_has_trained_further(trained: Trained, tmp_path: Path) -> None:
    remote, local = trained.copy_as("d"), shutil.copytree(trained.run.folder, tmp_path / "d")
    (remote / "checkpoints/step-00000003.safetensors").write_bytes(b"old")
    runs.pull(remote, local)
    assert not (local / "checkpoints/step-00000003.safetensors").exists()


def test_an_upload_that_fails_is_only_logged(s3: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.json").write_text("{}")
    runs.push_if_possible(tmp_path, to_path("s3://nowhere/runs/a"))
    assert f"cannot upload {tmp_path} to s3://nowhere/runs/a yet" in caplog.text
