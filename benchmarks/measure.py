"""Run one piece of work in a fresh process and measure it; rows of the table that pairs of such runs make.

A case is `module:function`. The function is called with the case's arguments, imports and prepares what it needs, and
returns a callable without arguments: that alone is timed. It returns facts, by which the work is checked.
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
from dataclasses import dataclass, field
from importlib import import_module
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Measured:
    """`peak_mb`: the most memory during the work, above `base_mb`, which it began with. `held_mb`: what it holds at the
    end, above the same. Both are of everything resident, libraries' code too.
    """

    seconds: float
    base_mb: float
    peak_mb: float
    held_mb: float
    facts: dict[str, Any]


@dataclass
class Row:
    """One line of the table; `reached` is None where there is nothing to reach."""

    what: str
    peer: str
    ours: str
    theirs: str
    ratio: str
    target: str
    reached: bool | None
    note: str = ""


@dataclass(frozen=True)
class Settings:
    """How thorough: `quick` takes small inputs and one run."""

    quick: bool = False
    runs: int = 5
    folder: str = ""
    said: list[str] = field(default_factory=list)

    @property
    def times(self) -> int:
        return 1 if self.quick else self.runs


def measure(case: str, **arguments: Any) -> Measured:
    """Run a case in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.measure", case, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case} {arguments} failed:\n{done.stderr[-4000:]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def alternate(times: int, *cases: tuple[str, dict[str, Any]]) -> list[list[Measured]]:
    """Each of the cases `times` times, in turns, so that all meet the same machine: results[case][run]."""
    results: list[list[Measured]] = [[] for _ in cases]
    for _ in range(times):
        for (case, arguments), of in zip(cases, results, strict=True):
            of.append(measure(case, **arguments))
            print(f"  {case.rpartition(':')[2]:<28} {of[-1].seconds:8.3f} s {of[-1].peak_mb:8.0f} MB", file=sys.stderr)
    return results


def seconds(runs: list[Measured]) -> float:
    return median(run.seconds for run in runs)


def ratio(theirs: list[Measured], ours: list[Measured]) -> float:
    """How many times faster ours is: the median over the pairs of runs."""
    return median(a.seconds / b.seconds for a, b in zip(theirs, ours, strict=True))


def told(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.1f} ms"


def faster(what: str, peer: str, theirs: list[Measured], ours: list[Measured], target: float | None) -> Row:
    """A row that holds the peer's time against ours."""
    times = ratio(theirs, ours)
    wanted = f"{target:g} x" if target else "-"
    reached = None if target is None else times >= target
    return Row(what, peer, told(seconds(ours)), told(seconds(theirs)), f"{times:.1f} x", wanted, reached)


def agree(name: str, *runs: list[Measured]) -> None:
    """All of them must have found the same."""
    found = {json.dumps(run.facts[name]) for of in runs for run in of}
    if len(found) != 1:
        raise RuntimeError(f"the peers did not do the same work: {name} is {found}")


def _memory(name: str) -> float:
    """A line of the process's status, MB: VmRSS is what is resident now, VmHWM the most of it so far."""
    if not os.path.exists("/proc/self/status"):
        return 0.0
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) / 1024


def _held() -> float:
    """What was freed, and is kept for what comes next, is not held."""
    gc.collect()
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    return _memory("VmRSS")


def _forget_peak() -> None:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:  # then the peak is that of the imports, if they took more
        pass


def main() -> None:
    module, _, name = sys.argv[1].partition(":")
    stdout = os.dup(1)
    os.dup2(2, 1)  # what libraries print is not the result
    work = getattr(import_module(module), name)(**json.loads(sys.argv[2]))
    before = _held()
    _forget_peak()
    start = time.perf_counter()
    facts = work()
    taken = facts.pop("seconds", None) or time.perf_counter() - start
    peak = _memory("VmHWM")
    told = {k: v for k, v in facts.items() if k != "keep"}
    measured = Measured(taken, before, peak - before, _held() - before, told)
    with os.fdopen(stdout, "w") as file:
        file.write(json.dumps(measured.__dict__) + "\n")
    os._exit(0)  # what is left of loaders and servers is not waited for


if __name__ == "__main__":
    main()
