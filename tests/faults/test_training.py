"""A training that fails ends in one line with advice and keeps its saved checkpoints."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import stages
import torch
from conftest import SMALL_NETWORKS
from faults_table import Row
from processes import TIMEOUT_S, Job

from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.errors import TrainingError
from model import checkpoint, generator
from model import train as module
from model.config import TrainConfig
from model.jobs import prepare_run, train_run

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("fork_server")]

SMALL = SMALL_NETWORKS | {"batch_size": 2, "steps": 12, "checkpoint_every": 3, "log_every": 3, "samples": 0, "keep": 9}


@pytest.fixture
def root(published: PublishedVersion, tmp_path: Path) -> Path:
    (tmp_path / "datasets").symlink_to(published.folder.parents[1])
    return tmp_path


def run_of(root: Path, name: str, **settings: Any) -> Any:
    return prepare_run(root, TrainConfig.model_validate(SMALL | settings), name)


def test_a_loss_that_is_not_finite_stops_the_training_and_saves_no_checkpoint(
    root: Path, monkeypatch: pytest.MonkeyPatch, row: Row
) -> None:
    """At any step; the earlier checkpoints remain."""
    count = 12
    for n in range(count):
        step, last = 1 + n * 12 // count, n * 12 // count // 3 * 3
        original, steps = module.Trainer.step, iter(range(1, 100))

        def nan_after(self: Any, *batch: Any, original: Any = original, steps: Any = steps, step: int = step) -> Any:
            losses = original(self, *batch)
            return losses * float("nan") if next(steps) >= step else losses

        with monkeypatch.context() as patch:
            patch.setattr(module.Trainer, "step", nan_after)
            named = rf"the last good checkpoint is .*step-{last:08d}" if last else "there is no checkpoint yet"
            with pytest.raises(TrainingError, match=rf"the loss is not finite at step \d+; {named}.*; try a lower lr"):
                train_run(run_of(root, f"{n}"))
        assert [c.step for c in checkpoint.list_checkpoints(root / f"runs/{n}/checkpoints")] == list(
            range(3, last + 1, 3)
        )
    row("a loss that is not finite", count, "stops, and names the last good checkpoint", "steps after it")


def command(root: Path, run: str, *more: str, **settings: Any) -> list[str]:
    chosen = [f"--set={k}={v}" for k, v in (SMALL | settings).items()]
    return [sys.executable, "-m", "flows", "train", "--root", str(root), "--run-id", run, *chosen, *more]


def test_sigterm_saves_the_current_step(root: Path, row: Row) -> None:
    count, steps = 5, []
    for n in range(count):
        process = subprocess.Popen(
            command(root, f"{n}", steps=10**6, checkpoint_every=10**6, log_every=1), stderr=subprocess.PIPE
        )
        log = root / f"runs/{n}/metrics.csv"
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 3 * n):
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 128 + signal.SIGTERM, stderr
        (saved,) = checkpoint.list_checkpoints(root / f"runs/{n}/checkpoints")
        assert f"stopped at step {saved.step} of 1000000 and saved" in stderr.decode().splitlines()[-1]
        steps.append(saved.step)
    row("SIGTERM in training", count, f"saves the current step ({', '.join(map(str, steps))}) and reports it", "none")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 3 * 10**6, "side": 64}, "at batch_size 3000000; try batch_size 1500000"),
        ({"width": 60_000}, "before the first step; try a smaller width"),
    ],
)
def test_out_of_memory_is_one_line_with_advice(settings: dict[str, int], message: str, root: Path, row: Row) -> None:
    """A batch of 25 GB, or large weights, in 16 GiB of address space: the allocator fails at once."""
    job = Job(stages.do_command, command(root, "a", **settings)[3:], str(root / "output"), 16 << 30)
    assert job.exit_code() == 1
    text = (root / "output").read_text()
    assert text.strip().splitlines()[-1] == f"error: out of memory {message}", text
    assert "Traceback" not in text
    when, _, advice = message.partition("; ")
    row(f"out of memory in training, {when}", 1, f"one line: {advice}", "steps since the last checkpoint")


def test_a_truncated_checkpoint_is_skipped_for_the_previous_one(root: Path, row: Row) -> None:
    """At any length; the training then ends with the same weights."""
    count = 25
    whole = train_run(run_of(root, "whole"))
    wanted, _ = checkpoint.load(whole)
    for n in range(count):
        run = run_of(root, f"{n}")
        shutil.copytree(root / "runs/whole", run.folder)
        (run.folder / generator.GENERATOR_FILE).unlink()
        newest = checkpoint.checkpoint_path(run.folder / "checkpoints", 12)
        size = newest.stat().st_size
        newest.write_bytes(newest.read_bytes()[: int((n + 0.5) / count * size)])
        found, _ = checkpoint.load(train_run(run, resume=True))
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        shutil.rmtree(run.folder)
    row("a truncated checkpoint", count, "the previous one is used; equal final weights", "steps after it")
