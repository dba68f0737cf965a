"""Handle SIGINT, SIGTERM and SIGHUP: a command ends at once; a training run saves first.

Python runs signal handlers in the main thread, between two bytecode instructions, so not while a library computes or
blocks. Libraries such as Prefect also replace handlers. Therefore, `end_on_signals` waits for signals in a thread.
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

GRACE_S = 15.0
"""Seconds that a command may take to end after a training run has saved; its Prefect server may no longer answer. Five
were too few on a machine with four busy processes on two cores."""

at_end: list[Callable[[], None]] = []
"""Callbacks that end the child processes of this process, run before a signal ends it."""

_active_blocks: list[threading.Event] = []
"""One event for each running `catch_signals` block, set when the block is left."""


def _handled() -> list[signal.Signals]:
    """The signals that end a command.

    A SIGHUP that `nohup` ignores stays ignored. An ignored SIGINT is handled: shells ignore it in background jobs,
    where `kill -INT` is still expected to work.
    """
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    numbers = [signal.Signals[name] for name in names if hasattr(signal, name)]  # Windows has no SIGHUP
    return [n for n in numbers if n.name != "SIGHUP" or signal.getsignal(n) is not signal.SIG_IGN]


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Collect the signals received while the block runs, which must then save and stop; only in the main thread.

    Further signals have no effect: `timeout`, `sudo` and supervisors often send two.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handler(number: int, _frame: FrameType | None) -> None:
        if not received:
            log.warning("%s: saving after this step", signal.Signals(number).name)
        received.append(number)

    block_left = threading.Event()
    _active_blocks.append(block_left)
    previous_handlers = {number: signal.signal(number, handler) for number in _handled()}
    try:
        yield received
    finally:
        for number, previous in previous_handlers.items():
            signal.signal(number, previous)
        _active_blocks.remove(block_left)
        block_left.set()


def end_on_signals() -> None:
    """From now on, end this process on a signal: status 128 + its number, a one-line message and no traceback.

    Nothing is cleaned up, because all files on disk survive a kill. Running `catch_signals` blocks are waited for.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    handled = _handled()
    for number in handled:
        signal.signal(number, lambda _number, _frame: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # Python writes each signal's number to it at once
    threading.Thread(target=_watch, args=(reader, frozenset(handled)), name="signals", daemon=True).start()


def _watch(reader: int, handled: frozenset[int]) -> None:
    while (number := os.read(reader, 1)[0]) not in handled:
        pass
    for block_left in list(_active_blocks):
        block_left.wait()
        while select.select([reader], [], [], 0)[0]:  # discard repeated signals
            os.read(reader, 1)
        select.select([reader], [], [], GRACE_S)
    _end(number)


def _end(number: int) -> None:
    for callback in at_end:
        with suppress(Exception):
            callback()
    # On a terminal, show the cursor, which a progress bar hides, and leave the line that shows ^C.
    prefix = "\x1b[?25h\n" if sys.stderr is not None and sys.stderr.isatty() else ""
    line = f"{prefix}stopped by {signal.Signals(number).name}; run the same command again to resume\n"
    with suppress(OSError, ValueError):
        if select.select([], [2], [], 0)[1]:  # do not block if the pipe is full
            os.write(2, line.encode())
    os._exit(128 + number)
