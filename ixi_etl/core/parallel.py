"""Map a function over items in parallel: on local threads, or on a Dask cluster, with the same results."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Condition
from typing import Any, TypeVar, cast

from ixi_etl.errors import IxiError

Item = TypeVar("Item")
Result = TypeVar("Result")

WAIT_S = 20.0
"""Seconds to wait for a Dask scheduler, and for its first worker."""


def parallel_map(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    workers: int,
    address: str | None = None,
    libraries: Sequence[str] = (),
    on_done: Callable[[int], None] = lambda done: None,
) -> list[Result]:
    """Return `[function(item) for item in items]`, computed in parallel.

    Args:
        workers: number of local threads, if `address` is None.
        address: of a Dask scheduler. If a worker dies, others repeat its items.
        libraries: distributions whose versions must be the same on every Dask worker as in this process.
        on_done: called with the number of finished items.

    If an item fails on a thread, no further item is started, and the error is raised when the others are finished. If
    one fails on Dask, the error is raised at once, and no further item is started when the client has gone.

    Raises:
        IxiError: the cluster has no scheduler, no workers or other library versions, or was lost.
    """
    if address:
        return _on_cluster(function, items, address, libraries, on_done)
    return _on_threads(function, items, workers, on_done)


def usable_cores(cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Number of cores that this process may use.

    The least of its CPU affinity (taskset, SLURM, cpusets) and the CPU quotas of its control groups
    (`docker run --cpus`, Kubernetes), rounded up.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(quota) for quota in _cpu_quotas(cgroups, membership))]))


def _cpu_quotas(cgroups: Path, membership: Path) -> list[float]:
    """CPU quotas, in cores, of the control groups of this process and their parents that have one.

    Cgroup version 2 has `cpu.max` ("QUOTA PERIOD" or "max PERIOD"); version 1 has two files with a number each, where
    -1 is no limit.
    """
    quotas = []
    for line in _read_text(membership).splitlines():
        _, controllers, group = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = cgroups / "cpu" if controllers else cgroups
        leaf = top / group.lstrip("/")
        for folder in [leaf, *leaf.parents]:  # a container sees its own group as the root
            if controllers:
                words = [_read_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
            else:
                words = _read_text(folder / "cpu.max").split()
            if len(words) == 2 and all(word.isdecimal() and int(word) for word in words):
                quotas.append(int(words[0]) / int(words[1]))
            if folder == top:
                break
    return quotas


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):  # not Linux, or no limit is set
        return ""


def _on_threads(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, on_done: Callable[[int], None]
) -> list[Result]:
    from dask.base import compute
    from dask.delayed import delayed

    changed, running, done, failed = Condition(), 0, 0, False

    def run_and_count(item: Item) -> Result | None:
        nonlocal running, done
        with changed:
            if failed:
                return None
            running += 1
        try:
            result = function(item)
        finally:
            with changed:
                running -= 1
                changed.notify_all()
        with changed:
            done += 1
            on_done(done)
        return result

    tasks = [delayed(run_and_count, pure=False)(item) for item in items]
    try:
        return list(compute(*tasks, scheduler="threads", num_workers=workers))
    except Exception:  # Dask does not wait for the other threads, which may write into a folder that is removed now
        with changed:
            failed = True
            changed.wait_for(lambda: not running)
        raise


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
        raise IxiError(f"no Dask scheduler answers at {address} ({error}); start one, or omit --dask") from error
    with client:
        try:
            client.wait_for_workers(1, timeout=WAIT_S)
            _check_versions(cast(Mapping[str, Any], client.get_versions(packages=libraries)), libraries)
            futures = client.map(function, items, pure=False)
            for done, future in enumerate(as_completed(futures), 1):
                if future.status == "error":
                    future.result()  # raises now, instead of after all others
                on_done(done)
            return list(client.gather(futures))
        except TimeoutError as error:
            raise IxiError(f"the Dask scheduler at {address} has no workers; start some") from error
        except (CancelledError, KilledWorker, OSError) as error:
            message = f"the Dask cluster at {address} was lost ({type(error).__name__}); start it, and run this again"
            raise IxiError(message) from error


def _check_versions(found: Mapping[str, Any], libraries: Sequence[str]) -> None:
    """Require the client's library versions on every worker.

    Another version may compute other bytes, but only the client's versions are in the name of the dataset version.
    """
    expected = found["client"]["packages"]
    for worker, report in found["workers"].items():
        for name in libraries:
            if report["packages"][name] != expected[name]:
                versions = f"{name} {report['packages'][name]}, here it is {expected[name]}"
                raise IxiError(f"the Dask worker {worker} has {versions}; install the same constraints.txt on both")
