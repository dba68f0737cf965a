"""Map one function over many items: on threads of this machine, or on a Dask cluster. Same function, same results."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar, cast

from ixi_etl.errors import IxiError

Item = TypeVar("Item")
Result = TypeVar("Result")

WAIT_S = 20.0  # for a Dask scheduler, and for its first worker


def spread(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    workers: int,
    address: str | None = None,
    libraries: Sequence[str] = (),
    on_done: Callable[[int], None] = lambda done: None,
) -> list[Result]:
    """`[function(item) for item in items]`, in parallel; `on_done` is told how many are done.

    `address` is that of a Dask scheduler, whose workers must see the same files; without one, `workers` threads. What
    a worker that dies had in hand or had done is done again by others. `libraries` are those whose versions must be
    the same on every worker as here.
    """
    if address:
        return _on_cluster(function, items, address, libraries, on_done)
    return _on_threads(function, items, workers, on_done)


def usable_cores(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """How many cores this process may use: its CPU affinity (taskset, SLURM, cpusets), and the CPU quota of its
    control group (`docker run --cpus`, Kubernetes), rounded up.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(quota) for quota in _cpu_quotas(cgroups, own))]))


def _cpu_quotas(cgroups: Path, own: Path) -> list[float]:
    """Cores' worth of CPU time that each control group around this process may use, of those that limit it.

    Version 2 has `cpu.max` ("QUOTA PERIOD" or "max PERIOD"), version 1 two files with a number each, -1 for no limit.
    """
    quotas = []
    for line in _text(own).splitlines():
        _, controllers, group = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = cgroups / "cpu" if controllers else cgroups
        here = top / group.lstrip("/")
        for folder in [here, *here.parents]:  # a container sees its own group as the top one
            if controllers:
                words = [_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
            else:
                words = _text(folder / "cpu.max").split()
            if len(words) == 2 and all(word.isdecimal() and int(word) for word in words):
                quotas.append(int(words[0]) / int(words[1]))
            if folder == top:
                break
    return quotas


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):  # no Linux, or no such limit
        return ""


def _on_threads(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, on_done: Callable[[int], None]
) -> list[Result]:
    from dask.base import compute
    from dask.delayed import delayed

    lock, done = Lock(), 0

    def counted(item: Item) -> Result:
        nonlocal done
        result = function(item)
        with lock:
            done += 1
            on_done(done)
        return result

    tasks = [delayed(counted, pure=False)(item) for item in items]
    return list(compute(*tasks, scheduler="threads", num_workers=workers))


def _on_cluster(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    address: str,
    libraries: Sequence[str],
    on_done: Callable[[int], None],
) -> list[Result]:
    from distributed import CancelledError, Client, KilledWorker, as_completed

    try:
        client = Client(address, timeout=WAIT_S)
    except (OSError, TimeoutError, ValueError) as error:
        raise IxiError(f"no Dask scheduler answers at {address} ({error}); start one, or leave --dask out") from error
    with client:
        try:
            client.wait_for_workers(1, timeout=WAIT_S)
            _check_versions(cast(Mapping[str, Any], client.get_versions(packages=libraries)), libraries)
            futures = client.map(function, items, pure=False)
            for done, _ in enumerate(as_completed(futures), 1):
                on_done(done)
            return list(client.gather(futures))
        except TimeoutError as error:
            raise IxiError(f"the Dask scheduler at {address} has no workers; start some") from error
        except (CancelledError, KilledWorker, OSError) as error:
            what = f"the Dask cluster at {address} was lost ({type(error).__name__})"
            raise IxiError(f"{what}; start it, and run this again") from error


def _check_versions(found: Mapping[str, Any], libraries: Sequence[str]) -> None:
    """With another version of a library, a worker would make other bytes, and the version's name would be wrong."""
    here = found["client"]["packages"]
    for worker, there in found["workers"].items():
        for name in libraries:
            if there["packages"][name] != here[name]:
                versions = f"{name} {there['packages'][name]}, here it is {here[name]}"
                raise IxiError(f"the Dask worker {worker} has {versions}; install the same constraints.txt on both")
