"""What may happen to a run: flows for the workers of `test_notifications`. They have the name of one of ours."""

from __future__ import annotations

import time

from prefect import flow, pause_flow_run, suspend_flow_run, task


@task
def wait(seconds: float) -> None:
    time.sleep(seconds)


@flow(name="synthesize", persist_result=False)
def live(ending: str = "finished") -> None:
    """End as the parameter says."""
    if ending == "failed":
        raise ValueError("the archive is damaged\nsee the log")
    if ending == "paused":
        pause_flow_run(timeout=3600)
    if ending == "suspended":
        suspend_flow_run(timeout=3600)
    if ending == "running on":
        wait(3600)
