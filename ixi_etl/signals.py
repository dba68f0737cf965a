"""SIGINT, SIGTERM and SIGHUP: a command ends at once, and a training saves first.

Python runs a signal's handler in the main thread, between two instructions: not while a library computes or waits
there. And libraries (Prefect) install handlers of their own. So `end_on_signals` has a thread wait for the signals.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

log = logging.getLogger(__name__)

GRACE_S = 5.0
"""How long a command may take to end after a training has saved: its Prefect server may no longer answer."""

at_end: list[Callable[[], None]] = []
"""Called before a signal ends this process, to end the processes that it started."""

_saving: list[threading.Event] = []
"""The blocks of `catch_signals` that run, each set when it is left."""


def _handled() -> list[signal.Signals]:
    """The signals that end a command.

    A SIGHUP that `nohup` has ignored stays ignored. A SIGINT does not: shells ignore it for whatever they run in the
    background, and `kill -INT` is still expected to work there.
    """
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    numbers = [signal.Signals[name] for name in names if hasattr(signal, name)]  # Windows has no SIGHUP
    return [n for n in numbers if n.name != "SIGHUP" or signal.getsignal(n) is not signal.SIG_IGN]


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """The signals received while the block runs: it saves and stops. Only the main thread can receive them.

    A signal after the first changes nothing: `timeout`, `sudo` and supervisors send two for one.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handler(number: int, _frame: FrameType | None) -> None:
        if not received:
            log.warning("%s: saving after this step", signal.Signals(number).name)
        received.append(number)

    left = threading.Event()
    _saving.append(left)
    before = {number: signal.signal(number, handler) for number in _handled()}
    try:
        yield received
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
        _saving.remove(left)
        left.set()


def end_on_signals() -> None:
    """From here on a signal ends this process with status 128 + its number, one line, and no trace.

    What is on the disk outlives a kill, so nothing is tidied up; but a block of `catch_signals` is waited for.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    handled = _handled()
    for number in handled:
        signal.signal(number, lambda _number, _frame: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # Python writes each signal's number there, at once
    threading.Thread(target=_watch, args=(reader, frozenset(handled)), name="signals", daemon=True).start()


def _watch(reader: int, handled: frozenset[int]) -> None:
    while (number := os.read(reader, 1)[0]) not in handled:
        pass
    for left in list(_saving):
        left.wait()
        while select.select([reader], [], [], 0)[0]:  # what came meanwhile asked for the same
            os.read(reader, 1)
        select.select([reader], [], [], GRACE_S)
    _end(number)


def _end(number: int) -> None:
    for end in at_end:
        with suppress(Exception):
            end()
    # On a terminal: show the cursor, which a progress bar hides, and leave the line in which it wrote ^C.
    begin = "\x1b[?25h\n" if sys.stderr is not None and sys.stderr.isatty() else ""
    line = f"{begin}stopped by {signal.Signals(number).name}; the same command goes on from here\n"
    with suppress(OSError, ValueError):
        if select.select([], [2], [], 0)[1]:  # nobody may be reading
            os.write(2, line.encode())
    os._exit(128 + number)
