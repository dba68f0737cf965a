"""Cases of Prefect's part in a refresh of many subjects: the flow on a temporary server, and the plain function.

The volumes are tiny, and are neither registered nor drawn, so that Prefect's part is large.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.inputs import scratch_folder
from ixi_etl.config import DatasetConfig, RefreshConfig

Work = Callable[[], dict[str, Any]]
SLICES = 4
CHILDREN = Path(f"/proc/self/task/{os.getpid()}/children")


def _config(source: str, root: Path) -> RefreshConfig:
    dataset = DatasetConfig(slices=SLICES, registration="none", pictures=False)
    return RefreshConfig(root=str(root), source=source, dataset=dataset)


def plain(source: str, warm: str, scratch: str) -> Work:
    """`ixi_etl.recipes.ixi.refresh`, as `ixi-etl refresh` runs it without a server."""
    from ixi_etl.recipes.ixi import refresh

    folder = scratch_folder(Path(scratch), "plain")
    refresh(_config(warm, folder / "warm"))

    def work() -> dict[str, Any]:
        start, cpu_start = time.perf_counter(), time.process_time()
        version = refresh(_config(source, folder / "root")).version
        return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu_start, "version": version}

    return work


def flow(source: str, warm: str, scratch: str) -> Work:
    """The flow `refresh-dataset` on a server of its own, as `ixi-etl demo` starts it.

    `server_mb` is the most resident memory of the server, `tasks` and `events` what the flow run left on it.
    """
    from flows.server import run_flow, start_server

    folder = scratch_folder(Path(scratch), "flow")
    start_server(folder / "prefect")
    server = Path("/proc", CHILDREN.read_text().split()[0], "status")
    run_flow("refresh_dataset", _config(warm, folder / "warm"))

    def work() -> dict[str, Any]:
        before = _counts()
        start, cpu_start = time.perf_counter(), time.process_time()
        version = run_flow("refresh_dataset", _config(source, folder / "root")).version
        result = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu_start, "version": version}
        peak = next(line for line in server.read_text().splitlines() if line.startswith("VmHWM"))
        left = {name: count - before[name] for name, count in _counts().items()}
        return result | left | {"server_mb": int(peak.split()[1]) / 1024}

    return work


def _counts() -> dict[str, int]:
    """How many task runs, artifacts and events the server has, once it has received all events of this process."""
    from prefect.client.orchestration import get_client
    from prefect.events.worker import EventsWorker

    EventsWorker.drain_all()
    with get_client(sync_client=True) as client:
        post = client._client.post
        return {
            "tasks": post("/task_runs/count", json={}).json(),
            "artifacts": post("/artifacts/count", json={}).json(),
            "events": post("/events/filter", json={"limit": 1}).json()["total"],
        }
