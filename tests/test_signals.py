"""A signal ends a command promptly, in one line and without a trace; a training saves first; the next run goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import config_for

from ixi_etl.publish import Refreshed
from ixi_etl.refresh import refresh

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
LINE = "stopped by {}; the same command goes on from here"

READY = "print('ready', flush=True)"
BLOCKED = "m = ctypes.create_string_buffer(64); lock = ctypes.CDLL(None).pthread_mutex_lock; lock(m); lock(m)"
"""The main thread waits in a library, which no signal interrupts: it locks a mutex twice."""


def start(*lines: str, ignored: Sequence[signal.Signals] = ()) -> subprocess.Popen[str]:
    """Run lines of Python, with `end_on_signals` before them, up to where they print `ready`."""
    before = ["import ctypes, os, signal, time", "from ixi_etl import signals", "signals.end_on_signals()"]

    def ignore() -> None:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    process = subprocess.Popen(
        [sys.executable, "-c", "\n".join([*before, *lines])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=ignore,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
@pytest.mark.parametrize(
    "lines",
    [
        (READY, "time.sleep(1000)"),
        (READY, BLOCKED),
        # Prefect installs handlers that raise, and main threads wait in `finally`.
        (
            "def handler(*_): raise KeyboardInterrupt",
            "for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(n, handler)",
            f"try: {READY}; time.sleep(1000)",
            "except BaseException: time.sleep(1000)",
        ),
    ],
    ids=["asleep", "in a library", "with handlers of a library"],
)
def test_whatever_a_command_does_a_signal_ends_it_in_one_line(number: signal.Signals, lines: tuple[str, ...]) -> None:
    process = start(*lines)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (128 + number, LINE.format(number.name) + "\n")


def test_a_sighup_that_nohup_ignored_stays_ignored_and_a_sigint_that_a_shell_ignored_does_not() -> None:
    process = start(READY, "time.sleep(1000)", ignored=[signal.SIGHUP, signal.SIGINT])
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, LINE.format("SIGINT") + "\n")


SAVING = ("import logging; logging.disable()", "with signals.catch_signals() as received:", f" {READY}")


def test_who_saves_first_is_waited_for_whatever_else_comes() -> None:
    saved = ["while not received: time.sleep(0.001)", "os.kill(os.getpid(), signal.SIGINT)", "time.sleep(0.1)"]
    process = start(*SAVING, *(f" {line}" for line in saved), "print('saved'); raise SystemExit(7)")
    process.send_signal(signal.SIGTERM)
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out, said) == (7, "saved\n", "")


def test_who_has_saved_and_then_hangs_is_ended() -> None:
    process = start("signals.GRACE_S = 0.1", *SAVING, " while not received: time.sleep(0.001)", "time.sleep(1000)")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (143, LINE.format("SIGTERM") + "\n")


def test_processes_that_were_started_are_ended() -> None:
    """Also one that ignores the signal itself."""
    child = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(1000)"
    )
    process = start(
        "import subprocess, sys",
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE, start_new_session=True)",
        "child.stdout.readline()",
        "signals.at_end.append(child.kill)",
        READY,
        "print(child.pid, flush=True)",
        "time.sleep(1000)",
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    with suppress(psutil.NoSuchProcess):
        child_process = psutil.Process(pid)
        while child_process.status() != psutil.STATUS_ZOMBIE:  # a container may have nobody to reap it
            time.sleep(0.01)


# -- commands ---------------------------------------------------------------------------------------------------------


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "flows", *map(str, arguments)]


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.stack) for n in (signal.SIGINT, signal.SIGHUP))],
    ids=lambda n: n.name,
)
def test_a_refresh_that_a_signal_to_its_group_ends_goes_on(
    number: signal.Signals, published: Refreshed, archives: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    work = command("refresh", "--root", root, "--source", archives, "--slices", "12", "--registration", "none")
    process = subprocess.Popen(work, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    told = [process.stderr.readline()]
    while "cut" not in told[-1]:
        told.append(process.stderr.readline())
        assert process.poll() is None, "".join(told)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=60)
    if process.returncode:  # else it had ended before
        assert process.returncode == 128 + number
        assert said.splitlines()[-1] == LINE.format(number.name)
    assert "Traceback" not in "".join(told) + said
    made = refresh(config_for(root, archives))
    assert made.version == published.version
    assert (made.folder / "manifest.csv").read_bytes() == (published.folder / "manifest.csv").read_bytes()


def versions_into(published: Refreshed, stdout: int) -> subprocess.CompletedProcess[str]:
    work = command("versions", "--root", published.folder.parents[2])
    return subprocess.run(work, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)


def test_a_reader_that_has_gone_is_no_error(published: Refreshed) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = versions_into(published, writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(
    not Path("/dev/full").exists(),
    reason="only Linux has /dev/full, a device that is always full; the test above has a pipe that nobody reads",
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_result_that_cannot_be_written_is_one_line(
    published: Refreshed, unbuffered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    with open("/dev/full", "w") as full:
        done = versions_into(published, full.fileno())
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*No space left on device\n", done.stderr)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full, as above")
def test_an_error_whose_json_cannot_be_written_leaves_no_trace(tmp_path: Path) -> None:
    work = command("verify", "--root", tmp_path, "--json")
    with open("/dev/full", "w") as full:
        done = subprocess.run(work, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_standard_streams_may_be_closed(published: Refreshed) -> None:
    work = command("versions", "--root", published.folder.parents[2])
    closed = subprocess.run(["/bin/sh", "-c", 'exec "$@" >&- 2>&-', "sh", *work], check=False)
    assert closed.returncode == 0
