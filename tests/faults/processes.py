"""Run jobs in child processes that report their stages through a pipe, and kill them at chosen times."""

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

TIMEOUT_S = 300.0  # a busy machine may delay a job for long

_forkserver_context = multiprocessing.get_context("forkserver")
_spawn_context = multiprocessing.get_context("spawn")


TRAINING_MODULES = (
    "torch._dynamo",
    "torch.utils.tensorboard",
    "torchmetrics.functional.image",
    "matplotlib.figure",
    "model.jobs",
    "model.report",
    "flows.cli",
    "flows.progress",
)


@pytest.fixture(scope="session")
def fork_server() -> None:
    """Start the process from which jobs are forked; it has imported all modules that they need."""
    importable = [name for name in TRAINING_MODULES if find_spec("torch") or not name.startswith(("torch", "model"))]
    _forkserver_context.set_forkserver_preload(["stages", *importable])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # the fork server ignores failed imports
        forkserver.ensure_running()


class Job:
    """`target(pipe, *args)` in a child process, and the messages that it sent.

    Attributes:
        messages: pairs (name, value). A name without a space is a stage that started; the last value is the result.
        started: stage -> monotonic time at which its message arrived.
    """

    def __init__(self, target: Callable[..., None], *args: Any, fresh: bool = False) -> None:
        """Start the process: forked from the fork server, or, if `fresh`, a new interpreter."""
        context: Any = _spawn_context if fresh else _forkserver_context
        receiver, sender = context.Pipe(duplex=False)
        self.pipe: Connection = receiver
        self.messages: list[tuple[str, Any]] = []
        self.started: dict[str, float] = {}
        self.process = context.Process(target=target, args=(sender, *args), daemon=True)
        self.process.start()
        sender.close()

    def listen(self, until: float, stage: str | None = None) -> bool:
        """Receive messages until the monotonic time `until`, or until `stage` starts; return whether the job runs."""
        while (remaining := until - time.monotonic()) > 0:
            try:
                if self.pipe.poll(remaining):
                    self.messages.append(self.pipe.recv())
                    self.started.setdefault(self.messages[-1][0], time.monotonic())
                    if self.messages[-1][0] == stage:
                        return True
            except (EOFError, OSError):  # the process ended
                return False
        return True

    def kill(self) -> str:
        """Send SIGKILL; return the stage in which the job was."""
        self.process.kill()
        self.process.join(TIMEOUT_S)
        self.listen(time.monotonic() + TIMEOUT_S)
        return self.stage

    def kill_after(self, stage: str, seconds: float) -> str:
        """Send SIGKILL `seconds` after the stage started; return the stage in which the job was."""
        assert self.listen(time.monotonic() + TIMEOUT_S, stage), f"the job ended in {self.stage}"
        self.listen(time.monotonic() + seconds)
        return self.kill()

    def exit_code(self) -> int:
        """Wait for the process to end; return its exit code."""
        self.process.join(TIMEOUT_S)
        assert self.process.exitcode is not None, f"the job hangs in {self.stage}"
        return self.process.exitcode

    def result(self) -> Any:
        """Wait for the process to end with exit code 0; return the value of its last message."""
        if self.listen(time.monotonic() + TIMEOUT_S):
            os.kill(self.process.pid or 0, signal.SIGABRT)  # it prints its stack: stages.py enables faulthandler
            self.process.join(5)
            raise AssertionError(f"the job hangs in {self.stage}")
        self.process.join(TIMEOUT_S)
        assert self.process.exitcode == 0, f"the job ended with exit code {self.process.exitcode} in {self.stage}"
        return self.messages[-1][1]

    @property
    def stage(self) -> str:
        return next((name for name, _ in reversed(self.messages) if " " not in name), "start")

    def output_of(self, stage: str) -> Any:
        """The last snapshot of a stage's output that the job sent, or None."""
        return dict(self.messages).get(f"{stage} output")

    def duration(self, stage: str, following: str) -> float:
        """Seconds from the start of a stage to the start of a later one."""
        return self.started[following] - self.started[stage]
