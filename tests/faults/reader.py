"""A reader that opens the latest version in a loop, while others are killed."""

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
    """Calls `look` again and again; `looks` are how often it saw something whole, `error` what it saw otherwise."""

    def __init__(self, look: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.look, self.looks, self.error = look, 0, ""
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.05):  # a processor must be left for those who are to be killed
            try:
                self.look()
                self.looks += 1
            except Exception as error:  # anything at all is a finding
                self.error = self.error or repr(error)


@contextmanager
def reading(look: Callable[[], object]) -> Iterator[Reader]:
    """A reader while the block runs; it must have seen nothing but whole things."""
    reader = Reader(look)
    reader.start()
    try:
        yield reader
    finally:
        reader.stop.set()
        reader.join()
    if reader.error:
        raise AssertionError(f"a reader saw {reader.error}")


def latest_of(root: Path, pruned: bool = False) -> Callable[[], object]:
    """Opens what `latest` names: it is there, whole, and its arrays can be read.

    `pruned`: what is no longer the latest may be removed while it is read; a run's version may not.
    """
    data_root = DataRoot(root)

    def look() -> None:
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

    return look


def checkpoints_of(run: Path) -> Callable[[], object]:
    """Loads the newest checkpoint: once there is one there always is, and none is older than one before."""
    seen = [0]

    def look() -> None:
        newest = checkpoint.latest_valid(run / "checkpoints")
        step = newest[0].step if newest else 0
        assert step >= seen[0]
        seen[0] = step

    return look
