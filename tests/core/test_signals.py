"""A signal ends a command at once, in one line, without a traceback; a training saves first; the next run resumes."""

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

from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.recipes.ixi import refresh

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
LINE = "stopped by {}; run the same command again to resume"

READY = "print('ready', flush=True)"
BLOCKED = "m = ctypes.create_string_buffer(64); lock = ctypes.CDLL(None).pthread_mutex_lock; lock(m); lock(m)"
"""The main thread blocks in a library, where no signal interrupts it: it locks a mutex twice."""


def start(*lines: str, ignored: Sequence[signal.Signals] = ()) -> subprocess.Popen[str]:
    """Run lines of Python after `end_on_signals`, until they print `ready`."""
    setup = ["import ctypes, os, signal, time", "from ixi_etl.core import signals", "signals.end_on_signals()"]

    def ignore() -> None:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    process = subprocess.Popen(
        [sys.executable, "-c", "\n".join([*setup, *lines])],
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
        # Prefect installs handlers that raise, and its main thread waits in `finally`.
        (
            "def handler(*_): raise KeyboardInterrupt",
            "for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(n, handler)",
            f"try: {READY}; time.sleep(1000)",
            "except BaseException: time.sleep(1000)",
        ),
    ],
    ids=["asleep", "in a library", "with handlers of a library"],
)
def test_signal_ends_a_command_with_one_line(number: signal.Signals, lines: tuple[str, ...]) -> None:
    process = start(*lines)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (128 + number, LINE.format(number.name) + "\n")


def test_ignored_sighup_stays_ignored_but_ignored_sigint_does_not() -> None:
    process = start(READY, "time.sleep(1000)", ignored=[signal.SIGHUP, signal.SIGINT])
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, LINE.format("SIGINT") + "\n")


SAVING = ("import logging; logging.disable()", "with signals.catch_signals() as received:", f" {READY}")


def test_further_signals_do_not_interrupt_saving() -> None:
    saving = ["while not received: time.sleep(0.001)", "os.kill(os.getpid(), signal.SIGINT)", "time.sleep(0.1)"]
    process = start(*SAVING, *(f" {line}" for line in saving), "print('saved'); raise SystemExit(7)")
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (7, "saved\n", "")


def test_command_that_hangs_after_saving_is_ended() -> None:
    process = start("signals.GRACE_S = 0.1", *SAVING, " while not received: time.sleep(0.001)", "time.sleep(1000)")
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (143, LINE.format("SIGTERM") + "\n")


def test_child_processes_are_ended() -> None:
    """Including one that ignores the signal."""
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
        while child_process.status() != psutil.STATUS_ZOMBIE:  # in a container, no init process may reap it
            time.sleep(0.01)


# -- commands ---------------------------------------------------------------------------------------------------------


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "flows", *map(str, arguments)]


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.stack) for n in (signal.SIGINT, signal.SIGHUP))],
    ids=lambda n: n.name,
)
def test_refresh_stopped_by_a_signal_to_its_process_group_resumes(
    number: signal.Signals, published: PublishedVersion, archives: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    arguments = command("refresh", "--root", root, "--source", archives, "--slices", "12", "--registration", "none")
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    lines = [process.stderr.readline()]
    while "cut" not in lines[-1]:
        lines.append(process.stderr.readline())
        assert process.poll() is None, "".join(lines)
    os.killpg(process.pid, number)
    _, stderr = process.communicate(timeout=60)
    if process.returncode:  # otherwise it ended before the signal
        assert process.returncode == 128 + number
        assert stderr.splitlines()[-1] == LINE.format(number.name)
    assert "Traceback" not in "".join(lines) + stderr
    made = refresh(config_for(root, archives))
    assert made.version == published.version
    assert (made.folder / "manifest.csv").read_bytes() == (published.folder / "manifest.csv").read_bytes()


def run_versions(published: PublishedVersion, stdout: int) -> subprocess.CompletedProcess[str]:
    arguments = command("versions", "--root", published.folder.parents[2])
    return subprocess.run(arguments, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)


def test_closed_stdout_pipe_prints_no_error(published: PublishedVersion) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = run_versions(published, writer)
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


@pytest.mark.skipif(
    not Path("/dev/full").exists(),
    reason="only Linux has /dev/full, a device that is always full; the test above uses a pipe without a reader",
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_unwritable_result_is_a_one_line_error(
    published: PublishedVersion, unbuffered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    with open("/dev/full", "w") as full:
        result = run_versions(published, full.fileno())
    assert result.returncode == 1
    assert re.fullmatch(r"error: .*No space left on device\n", result.stderr)


@pytest.mark.skipif(
    not Path("/dev/full").exists(),
    reason="only Linux has /dev/full, a device that is always full; test_output pins the JSON of an error",
)
def test_unwritable_json_error_has_no_traceback(tmp_path: Path) -> None:
    arguments = command("verify", "--root", tmp_path, "--json")
    with open("/dev/full", "w") as full:
        result = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr


def test_standard_streams_may_be_closed(published: PublishedVersion) -> None:
    arguments = command("versions", "--root", published.folder.parents[2])
    result = subprocess.run(["/bin/sh", "-c", 'exec "$@" >&- 2>&-', "sh", *arguments], check=False)
    assert result.returncode == 0
