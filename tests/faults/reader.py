"""A thread that reads the latest version or checkpoint in a loop, while jobs are killed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ixi_etl.core.storage import DataRoot
from ixi_etl.dataset import verify, versions
from ixi_etl.dataset.store import open_arrays
from model import checkpoint


class Reader(threading.Thread):
    """Calls `check` in a loop.

    Attributes:
        reads: number of calls that succeeded.
        error: the first exception of a call, or "".
    """

    def __init__(self, check: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.check, self.reads, self.error = check, 0, ""
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.05):  # leave a processor to the jobs
            try:
                self.check()
                self.reads += 1
            except Exception as error:  # any exception is a finding
                self.error = self.error or repr(error)


@contextmanager
def reading(check: Callable[[], object]) -> Iterator[Reader]:
    """Run a reader during the block; raise `AssertionError` at its end if a call of `check` failed."""
    reader = Reader(check)
    reader.start()
    try:
        yield reader
    finally:
        reader.stop.set()
        reader.join()
    if reader.error:
        raise AssertionError(f"a reader saw {reader.error}")


def latest_of(root: Path, pruned: bool = False) -> Callable[[], object]:
    """Return a check: the latest version exists, verifies, and its arrays can be read.

    With `pruned`, a version that is no longer the latest may be removed while it is read.
    """
    data_root = DataRoot(root)

    def check() -> None:
        version = versions.resolve_version(data_root)
        try:
            problems = verify.verify(data_root.version(version))
            if problems:
                raise ValueError(problems[0])
            for array in open_arrays(data_root.version(version)).values():
                np.asarray(array[-1])
        except Exception:
            if not pruned or versions.resolve_version(data_root) == version:
                raise

    return check


def checkpoints_of(run: Path) -> Callable[[], object]:
    """Return a check: the newest valid checkpoint of the run folder never gets older or disappears."""
    newest_step = [0]

    def check() -> None:
        newest = checkpoint.latest_valid(run / "checkpoints")
        step = newest[0].step if newest else 0
        assert step >= newest_step[0]
        newest_step[0] = step

    return check
