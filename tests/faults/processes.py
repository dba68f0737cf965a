"""Processes that are started, watched through a pipe, and killed at a moment."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

import pytest

GIVE_UP_S = 300.0  # a busy machine may let a job wait for long

_forks = multiprocessing.get_context("forkserver")
_fresh = multiprocessing.get_context("spawn")


TRAINING = (
    "torch._dynamo",
    "torch.utils.tensorboard",
    "torchmetrics.functional.image",
    "matplotlib.figure",
    "model.jobs",
    "model.report",
    "flows.cli",
    "flows.progress",
)


def preload() -> None:
    """Start the process that all others are forked from, unless it runs; it imports all that they need.

    `conftest.py` has one worker run all tests that use it.
    """
    there = [name for name in TRAINING if find_spec("torch") or not name.startswith(("torch", "model"))]
    _forks.set_forkserver_preload(["stages", *there])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # it would not find what cannot be imported
        forkserver.ensure_running()


class Job:
    """`target(pipe, *args)` in a process of its own, and what it has told."""

    def __init__(self, target: Callable[..., None], *args: Any, fresh: bool = False) -> None:
        context: Any = _fresh if fresh else _forks
        receiver, sender = context.Pipe(duplex=False)
        self.pipe: Connection = receiver
        self.told: list[tuple[str, Any]] = []
        self.began: dict[str, float] = {}
        self.process = context.Process(target=target, args=(sender, *args), daemon=True)
        self.process.start()
        sender.close()

    def listen(self, until: float, stage: str | None = None) -> bool:
        """Take what is told until the moment `until`, or until `stage` is told; whether the process still runs."""
        while (left := until - time.monotonic()) > 0:
            try:
                if self.pipe.poll(left):
                    self.told.append(self.pipe.recv())
                    self.began.setdefault(self.told[-1][0], time.monotonic())
                    if self.told[-1][0] == stage:
                        return True
            except (EOFError, OSError):  # it has ended
                return False
        return True

    def kill(self) -> str:
        """SIGKILL it; the stage that it was in."""
        self.process.kill()
        self.process.join(GIVE_UP_S)
        self.listen(time.monotonic() + GIVE_UP_S)
        return self.stage

    def kill_after(self, stage: str, seconds: float) -> str:
        """Kill it so long after the stage has begun; where it was."""
        assert self.listen(time.monotonic() + GIVE_UP_S, stage), f"it ended in {self.stage}"
        self.listen(time.monotonic() + seconds)
        return self.kill()

    def exit_code(self) -> int:
        """Wait for its end."""
        self.process.join(GIVE_UP_S)
        assert self.process.exitcode is not None, f"it hangs in {self.stage}"
        return self.process.exitcode

    def end(self) -> Any:
        """Wait for its end, which must be a good one; what it told last."""
        if self.listen(time.monotonic() + GIVE_UP_S):
            os.kill(self.process.pid or 0, signal.SIGABRT)  # it says where it is: stages.py
            self.process.join(5)
            raise AssertionError(f"it hangs in {self.stage}")
        self.process.join(GIVE_UP_S)
        assert self.process.exitcode == 0, f"it ended with {self.process.exitcode} in {self.stage}"
        return self.told[-1][1]

    @property
    def stage(self) -> str:
        return next((name for name, _ in reversed(self.told) if " " not in name), "start")

    def left(self, stage: str) -> Any:
        return dict(self.told).get(f"{stage} left")

    def lasted(self, stage: str, following: str) -> float:
        """Seconds from the beginning of a stage to that of another."""
        return self.began[following] - self.began[stage]
