"""What ends a training: one line with what to do next, and all that it had saved."""

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
from conftest import SMALL_NETWORKS
from faults_table import Row
from processes import GIVE_UP_S, Job, preload

from ixi_etl.publish import Refreshed

torch = pytest.importorskip("torch", reason="torch is not installed; pip install -c constraints.txt -e '.[train]'")

from model import checkpoint  # noqa: E402
from model import train as module  # noqa: E402
from model.config import TrainConfig  # noqa: E402
from model.run import prepare, train_run  # noqa: E402
from model.train import TrainingError  # noqa: E402

pytestmark = pytest.mark.faults

SMALL = SMALL_NETWORKS | {"batch_size": 2, "steps": 12, "checkpoint_every": 3, "log_every": 3, "samples": 0, "keep": 9}


@pytest.fixture(scope="module", autouse=True)
def _jobs() -> None:
    preload()


@pytest.fixture
def root(published: Refreshed, tmp_path: Path) -> Path:
    (tmp_path / "datasets").symlink_to(published.folder.parents[1])
    return tmp_path


def run_of(root: Path, name: str, **settings: Any) -> Any:
    return prepare(root, TrainConfig.model_validate(SMALL | settings), name)


def test_training_nan(root: Path, monkeypatch: pytest.MonkeyPatch, row: Row) -> None:
    """From any step on; the checkpoints before it are whole, and none is made of what came after."""
    count = 12
    for n in range(count):
        step, last = 1 + n * 12 // count, n * 12 // count // 3 * 3
        learn, steps = module.Learner.step, iter(range(1, 100))

        def breaks(self: Any, *batch: Any, learn: Any = learn, steps: Any = steps, step: int = step) -> Any:
            losses = learn(self, *batch)
            return losses * float("nan") if next(steps) >= step else losses

        with monkeypatch.context() as patch:
            patch.setattr(module.Learner, "step", breaks)
            named = rf"the last good checkpoint is .*step-{last:08d}" if last else "there is no checkpoint yet"
            with pytest.raises(TrainingError, match=rf"the loss is not finite at step \d+; {named}.*; try a lower lr"):
                train_run(run_of(root, f"{n}"))
        assert [c.step for c in checkpoint.found(root / f"runs/{n}/checkpoints")] == list(range(3, last + 1, 3))
    row("a loss that is not finite", count, "stops, and names the last good checkpoint", "steps since that")


def command(root: Path, run: str, *more: str, **settings: Any) -> list[str]:
    chosen = [f"--set={k}={v}" for k, v in (SMALL | settings).items()]
    return [sys.executable, "-m", "flows", "train", "--root", str(root), "--run-id", run, *chosen, *more]


def test_training_sigterm(root: Path, row: Row) -> None:
    count, steps = 5, []
    for n in range(count):
        process = subprocess.Popen(
            command(root, f"{n}", steps=10**6, checkpoint_every=10**6, log_every=1), stderr=subprocess.PIPE
        )
        log = root / f"runs/{n}/metrics.csv"
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 3 * n):
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=GIVE_UP_S)
        assert process.returncode == 128 + signal.SIGTERM, said
        (saved,) = checkpoint.found(root / f"runs/{n}/checkpoints")
        assert f"stopped at step {saved.step} of 1000000 and saved" in said.decode().splitlines()[-1]
        steps.append(saved.step)
    row("SIGTERM in training", count, f"saves the step it is at ({', '.join(map(str, steps))}) and says so", "none")


@pytest.mark.parametrize(
    ("wants", "line"),
    [
        ({"batch_size": 3 * 10**6, "side": 64}, "at batch_size 3000000; try batch_size 1500000"),
        ({"width": 60_000}, "before the first step; try a smaller width"),
    ],
)
def test_training_out_of_memory(wants: dict[str, int], line: str, root: Path, row: Row) -> None:
    """A batch of 25 GB, or weights, with no more address space than 16 GiB: the allocator itself refuses, at once."""
    job = Job(stages.do_command, command(root, "a", **wants)[3:], str(root / "said"), 16 << 30)
    assert job.exit_code() == 1
    text = (root / "said").read_text()
    assert text.strip().splitlines()[-1] == f"error: out of memory {line}", text
    assert "Traceback" not in text
    when, _, advice = line.partition("; ")
    row(f"out of memory in training, {when}", 1, f"one line: {advice}", "steps since the last checkpoint")


def test_training_checkpoint_cut(root: Path, row: Row) -> None:
    """Cut anywhere, the newest is passed over for the one before, and the training ends in the same weights."""
    count = 25
    whole = train_run(run_of(root, "whole"))
    wanted, _ = checkpoint.load(whole)
    for n in range(count):
        run = run_of(root, f"{n}")
        shutil.copytree(root / "runs/whole", run.folder)
        (run.folder / module.GENERATOR).unlink()
        newest = checkpoint.path_of(run.folder / "checkpoints", 12)
        size = newest.stat().st_size
        newest.write_bytes(newest.read_bytes()[: int((n + 0.5) / count * size)])
        found, _ = checkpoint.load(train_run(run, resume=True))
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        shutil.rmtree(run.folder)
    row("a checkpoint cut short", count, "the one before is used; the same weights in the end", "steps since that")
