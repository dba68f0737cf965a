"""Show the progress of stages: bars on a terminal, otherwise a log line every few seconds."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ixi_etl.core.progress import Progress, no_progress

log = logging.getLogger("ixi_etl.progress")
LINE_EVERY_S = 5.0


@contextmanager
def show_progress() -> Iterator[Progress]:
    """Yield a `Progress` that shows rate and time left while the block runs; nothing if logging is quiet."""
    if not log.isEnabledFor(logging.INFO):
        yield no_progress
        return
    if not sys.stderr.isatty():
        yield _Lines().show
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    lock = threading.Lock()
    tasks: dict[str, TaskID] = {}
    started: dict[str, tuple[float, int]] = {}
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        TextColumn("{task.fields[amount]:>28}"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:

        def show(what: str, done: int, total: int, unit: str) -> None:
            with lock:
                if what not in tasks:
                    tasks[what] = bars.add_task(what, total=total, amount="")
                    started[what] = (time.monotonic(), done)
                since, first = started[what]
                rate = (done - first) / max(time.monotonic() - since, 1e-3)
                bars.update(tasks[what], completed=done, total=total, amount=_amount(done, total, rate, unit))

        yield show


class _Lines:
    """Logs a line at the start of a stage, every few seconds, and at its end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stages: dict[str, tuple[float, int, float]] = {}

    def show(self, what: str, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
        with self._lock:
            since, first, last = self._stages.get(what, (now, done, now))
            due = done >= total or now - last >= LINE_EVERY_S
            self._stages[what] = (since, first, now if due else last)
        if due:
            rate = (done - first) / max(now - since, 1e-3)
            left = "" if done >= total or rate <= 0 else f", {(total - done) / rate:.0f} s left"
            log.info("%s: %s%s", what, _amount(done, total, rate, unit), left)


def _amount(done: int, total: int, rate: float, unit: str) -> str:
    if unit == "B":
        scale, name = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
        return f"{done / scale:.2f} of {total / scale:.2f} {name}, {rate / 1e6:.1f} MB/s"
    if unit == "%":  # the number of parts is not known in advance
        return f"{done}%"
    return f"{done} of {total} {unit}, {rate:.1f}/s"
