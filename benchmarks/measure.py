"""Run a benchmark case in a fresh process, measure it, and build rows of the table from pairs of runs.

A case is named `module:function`. The function gets the case's arguments, imports and prepares what it needs, and
returns a callable without arguments. Only that callable is timed. It returns a dict by which the work is checked.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Measured:
    """One run. Memory counts all resident pages, including the code of libraries.

    Attributes:
        base_mb: resident memory when the work starts.
        peak_mb: the highest during the work, minus `base_mb`.
        held_mb: resident memory at the end, minus `base_mb`.
        result: the dict that the case returned.
    """

    seconds: float
    base_mb: float
    peak_mb: float
    held_mb: float
    result: dict[str, Any]


@dataclass
class Row:
    """One line of the table.

    Attributes:
        reached: None where the row has no target.
        times: how many times faster ours is than the peer, for `benchmarks.history`; None for other rows.
    """

    what: str
    peer: str
    ours: str
    theirs: str
    ratio: str
    target: str
    reached: bool | None
    note: str = ""
    times: float | None = None


@dataclass(frozen=True)
class Settings:
    """How thorough the benchmark is: `quick` uses small inputs and one run.

    Attributes:
        folder: for inputs and scratch files.
        archives: a folder with IXI-T1.tar, IXI-T2.tar and MD5SUMS, to measure refreshes on too; empty for none.
    """

    quick: bool = False
    runs: int = 5
    folder: str = ""
    archives: str = ""

    @property
    def times(self) -> int:
        return 1 if self.quick else self.runs


def measure(case: str, **arguments: Any) -> Measured:
    """Run a case in its own process.

    Raises:
        RuntimeError: the case failed; the message has the end of its stderr.
    """
    command = [sys.executable, "-m", "benchmarks.measure", case, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case} {arguments} failed:\n{done.stderr[-4000:]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def alternate(times: int, *cases: tuple[str, dict[str, Any]]) -> list[list[Measured]]:
    """Run each case `times` times, in turns, so that all see the same load of the machine: results[case][run]."""
    results: list[list[Measured]] = [[] for _ in cases]
    for _ in range(times):
        for (case, arguments), runs in zip(cases, results, strict=True):
            runs.append(measure(case, **arguments))
            print(
                f"  {case.rpartition(':')[2]:<28} {runs[-1].seconds:8.3f} s {runs[-1].peak_mb:8.0f} MB", file=sys.stderr
            )
    return results


def seconds(runs: list[Measured]) -> float:
    return median(run.seconds for run in runs)


def ratio(theirs: list[Measured], ours: list[Measured]) -> float:
    """How many times faster ours is: the median over pairs of runs."""
    return median(a.seconds / b.seconds for a, b in zip(theirs, ours, strict=True))


def duration(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.1f} ms"


def speed_row(
    what: str, peer: str, theirs: list[Measured], ours: list[Measured], target: float | None, note: str = ""
) -> Row:
    """A row that compares the peer's time with ours."""
    times = ratio(theirs, ours)
    wanted = f"{target:g} x" if target else "-"
    reached = None if target is None else times >= target
    shown = f"{times:.1f} x" if times >= 2 else f"{times:.2f} x"
    return Row(what, peer, duration(seconds(ours)), duration(seconds(theirs)), shown, wanted, reached, note, times)


def require_equal(name: str, *runs: list[Measured]) -> None:
    """Raise `RuntimeError` unless all runs of all cases have the same `result[name]`."""
    values = {json.dumps(run.result[name]) for case in runs for run in case}
    if len(values) != 1:
        raise RuntimeError(f"the peers did not do the same work: {name} is {values}")


def _status_mb(name: str) -> float:
    """A field of /proc/self/status in MB: VmRSS is resident memory now, VmHWM its peak so far."""
    if not os.path.exists("/proc/self/status"):
        return 0.0
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) / 1024


def _resident_mb() -> float:
    """Resident memory in MB, without memory that the allocator keeps after it was freed."""
    gc.collect()
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    return _status_mb("VmRSS")


def _reset_peak() -> None:
    """Make the kernel count VmHWM from now on."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:  # the peak then includes the imports
        pass


def main() -> None:
    module, _, name = sys.argv[1].partition(":")
    stdout = os.dup(1)
    os.dup2(2, 1)  # libraries may print; only the result goes to stdout
    work = getattr(import_module(module), name)(**json.loads(sys.argv[2]))
    before = _resident_mb()
    _reset_peak()
    start = time.perf_counter()
    result = work()
    taken = result.pop("seconds", None) or time.perf_counter() - start
    peak = _status_mb("VmHWM")
    reported = {k: v for k, v in result.items() if k != "keep"}
    measured = Measured(taken, before, peak - before, _resident_mb() - before, reported)
    with os.fdopen(stdout, "w") as file:
        file.write(json.dumps(measured.__dict__) + "\n")
    os._exit(0)  # do not wait for loaders and servers


if __name__ == "__main__":
    main()
