"""A Dask cluster of real processes survives dead workers, and each of its errors is one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from ixi_etl.core import parallel
from ixi_etl.core.files import read_json
from ixi_etl.core.parallel import parallel_map
from ixi_etl.errors import IxiError


class Cluster:
    """A scheduler and its workers, each a child process, until the block ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def start_scheduler(self) -> None:
        file = self.folder / "scheduler.json"
        self._start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file))
        wait_for(lambda: read_json(file))
        self.address = str(read_json(file)["address"])

    def add_worker(self) -> subprocess.Popen[bytes]:
        options = ["--no-nanny", "--nthreads", "1", "--no-dashboard", "--local-directory", str(self.folder / "dask")]
        return self._start("worker", self.address, *options)

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        with open(self.folder / "log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "dask", *arguments],
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},  # workers import this module
            )
        self.processes.append(process)
        return process


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path) as cluster:
        cluster.start_scheduler()
        yield cluster


def wait_for(condition: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_and_double(item: int, folder: Path) -> tuple[int, int]:
    """Wait for the file `go`; return twice the item, and the process id."""
    (folder / f"{item}.{os.getpid()}").touch()
    wait_for((folder / "go").exists)
    return 2 * item, os.getpid()


def test_items_of_a_dead_worker_are_completed_by_another(cluster: Cluster, tmp_path: Path) -> None:
    victim, survivor = cluster.add_worker(), cluster.add_worker()
    done: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(
            parallel_map,
            partial(wait_and_double, folder=tmp_path),
            range(4),
            workers=1,
            address=cluster.address,
            on_done=done.append,
        )
        wait_for(lambda: all(list(tmp_path.glob(f"*.{worker.pid}")) for worker in (victim, survivor)))
        victim.send_signal(signal.SIGKILL)
        (tmp_path / "go").touch()
        results = job.result(300)
    assert results == [(2 * item, survivor.pid) for item in range(4)]
    assert done == [1, 2, 3, 4]


@pytest.mark.stack  # a second kind of fault
def test_lost_cluster_is_a_one_line_error(cluster: Cluster, tmp_path: Path) -> None:
    worker = cluster.add_worker()
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(
            parallel_map, partial(wait_and_double, folder=tmp_path), range(2), workers=1, address=cluster.address
        )
        wait_for(lambda: list(tmp_path.glob(f"*.{worker.pid}")))
        cluster.__exit__()
        with pytest.raises(IxiError, match=r"was lost \(\w+\); start it, and run this again$"):
            job.result(300)


def test_cluster_without_workers_is_a_one_line_error(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "WAIT_S", 0.2)
    with pytest.raises(IxiError, match="has no workers; start some"):
        parallel_map(abs, [1], workers=1, address=cluster.address)


def test_worker_with_another_library_version_is_refused() -> None:
    def packages(zarr: str) -> dict[str, object]:
        return {"packages": {"zarr": zarr, "zict": "3"}}

    versions = {
        "client": packages("3.1.6"),
        "workers": {"tcp://a:1": packages("3.1.6"), "tcp://b:1": packages("3.2.0")},
    }
    with pytest.raises(IxiError, match=r"tcp://b:1 has zarr 3\.2\.0, here it is 3\.1\.6"):
        parallel._check_versions(versions, ["zarr"])


def test_a_failure_on_threads_waits_for_the_items_that_are_being_worked_on(tmp_path: Path) -> None:
    """An export removed its folder while other threads still wrote into it."""
    started, finished = threading.Event(), []

    def work(item: int) -> None:
        if item == 0:
            started.wait()
            raise IxiError("the disk is full")
        if item == 1:
            started.set()
            time.sleep(0.2)  # longer than it takes to raise
        finished.append(item)

    with pytest.raises(IxiError, match="the disk is full"):
        parallel_map(work, range(9), workers=2)
    seen = list(finished)
    assert 1 in seen
    time.sleep(0.01)
    assert finished == seen
