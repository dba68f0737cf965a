"""Flow `look-after`: start the training that an event did not start, report failed checks whose event was lost, end
lost runs that the automation missed, and report an outage of the server.

A deployment runs it every 15 minutes, because the server keeps events in memory: one that arrives while it stops is
lost, and what an automation was waiting for during an outage may be forgotten.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments import run_deployment
from prefect.events import emit_event
from prefect.events.filters import EventFilter, EventNameFilter, EventOccurredFilter, EventResourceFilter
from prefect.states import Cancelled, Crashed
from pydantic import Field

from flows.announce import CHECKS_FAILED, announce_failed_checks, resource_of
from flows.automations import FLOWS, LOST, MISSED_BEATS, heartbeat_s
from ixi_etl.config import NO_SECRET
from ixi_etl.core.storage import DataRoot, expand_home
from ixi_etl.dataset.checks import failed_checks, held_by
from ixi_etl.dataset.metadata import POINTER, read_pointer
from ixi_etl.dataset.prune import find_users
from ixi_etl.dataset.versions import datasets_in, parse_version, resolve_version
from ixi_etl.errors import ConfigError, DatasetError
from model.config import preset

log = logging.getLogger("ixi_etl.look_after")

PENDING_S = 3600
"""A run that a worker accepted so long ago was lost before it started; pulling an image takes less."""


CLOCKS_DIFFER = timedelta(hours=1)
"""Tolerance for the clocks of the machine that publishes and of the server."""

TOLD_WITHIN = timedelta(days=6)
"""Failed checks are reported for this long after publication. The server deletes events after 7 days, so later nobody
can tell whether they were reported."""


def train_missing(root: str, scratch: Path | None, minutes: float) -> str | None:
    """Start train-pix2pix on the latest version if nothing did within some minutes of its publication.

    Any run on this version counts, whether it finished or failed, and so does the folder of a training run. The
    parameters are those of the event's trigger (`prefect.yaml`).

    Args:
        root: as in the deployments.
        scratch: as in `DataRoot`.
        minutes: the time that the event has to start the training.

    Returns:
        The version, if a training run was started.

    Raises:
        DatasetError: the latest version cannot be determined.
    """
    data_root = DataRoot(root, scratch=scratch)
    if not (version := _latest(data_root)):
        return None
    published = _published(data_root, version)[-1]
    if datetime.now(UTC) < published + timedelta(minutes=minutes):
        return None
    if failed := held_by(data_root.version(version)):
        log.info("version %s is held by %s", version, ", ".join(failed))
        return None
    if version in find_users(data_root) or _has_flow_run(data_root, version, published):
        return None
    log.warning("version %s of %s had no training; starting one", version, published.isoformat())
    run_deployment(
        "train-pix2pix/train-pix2pix",
        parameters={"dataset": f"{data_root.name}@{version}", "root": root},
        timeout=0,
        as_subflow=False,
        idempotency_key=f"train:{root}:{version}:{published.isoformat()}",
    )
    return version


def _latest(data_root: DataRoot) -> str | None:
    """The latest version; None if none was published yet.

    Raises:
        DatasetError: `latest.json` is damaged, or names a version that does not exist.
    """
    try:
        return resolve_version(data_root)
    except DatasetError as error:
        if (data_root.datasets / POINTER).exists():
            raise
        log.info("%s", error)
        return None


def _published(data_root: DataRoot, version: str) -> list[datetime]:
    """When the version was made the latest, oldest first; long ago if that is unknown."""
    pointer = read_pointer(data_root) or {"history": []}
    times = [entry["published"] for entry in pointer["history"] if entry["version"] == version]
    return [datetime.fromisoformat(text) for text in times] or [datetime.min.replace(tzinfo=UTC)]


def _is_same_root(one: object, other: object) -> bool:
    """Whether two addresses are of one root: relative or not, through links or not, with a slash at the end or not."""
    return _resolved(str(one)) == _resolved(str(other))


def _resolved(root: str) -> str:
    return root.rstrip("/") if "://" in root else str(expand_home(root).resolve())


def _has_flow_run(data_root: DataRoot, version: str, published: datetime) -> bool:
    """Whether a flow run names this version, or took the latest one after this one was published, in this root."""
    after = published - CLOCKS_DIFFER
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(  # at most 200, the newest
            flow_filter=FlowFilter(name=FlowFilterName(any_=["train-pix2pix"])),
            flow_run_filter=FlowRunFilter(expected_start_time=FlowRunFilterExpectedStartTime(after_=after)),
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
        )

    def counts(run: FlowRun) -> bool:
        due = run.expected_start_time
        if not _is_same_root(run.parameters.get("root"), data_root.root):
            return False
        try:
            name, wanted = parse_version(_dataset_of(run.parameters))
        except (ConfigError, KeyError):  # no such dataset or preset: it trains on nothing
            return False
        if name != data_root.name:
            return False
        return (due is not None and due >= published) if wanted == "latest" else version.startswith(wanted)

    return any(map(counts, runs))


def _dataset_of(parameters: Mapping[str, Any]) -> str:
    """The dataset in the parameters of train-pix2pix, by the precedence of that flow."""
    settings = parameters.get("settings") or {}
    given = parameters.get("dataset") or settings.get("dataset")
    return str(given or preset(parameters.get("preset", "paper")).dataset)


def tell_failed_checks(root: str, scratch: Path | None, minutes: float) -> list[str]:
    """Emit the event of failed checks of the latest version of each dataset, if the server has no such event.

    The refresh may have been killed before it emitted the event, or the event was lost.

    Args:
        root: as in the deployments.
        scratch: as in `DataRoot`.
        minutes: the time that the event of the refresh has to arrive.

    Returns:
        The versions whose event was emitted, as NAME@VERSION.

    Raises:
        DatasetError: the latest version of a dataset cannot be determined, or is damaged; the others were looked at.
    """
    told, damaged = [], []
    for data_root in [DataRoot(root, name, scratch) for name in datasets_in(root)]:
        try:
            version = _latest(data_root)
            if version and _lacks_event(data_root, version, minutes):
                log.warning("the failed checks of version %s were not reported; reporting them now", version)
                announce_failed_checks(data_root, version)
                told.append(f"{data_root.name}@{version}")
        except DatasetError as error:
            damaged.append(error)
    if damaged:
        raise damaged[0]
    return told


def _lacks_event(data_root: DataRoot, version: str, minutes: float) -> bool:
    """Whether the server should have an event of failed checks of this version by now, and has none."""
    published = _published(data_root, version)[0]  # a refresh that only found it again, later, emitted none
    is_due = timedelta(minutes=minutes) <= datetime.now(UTC) - published < TOLD_WITHIN
    return is_due and bool(failed_checks(data_root.version(version))) and not _has_event(data_root, version)


def _has_event(data_root: DataRoot, version: str) -> bool:
    """Whether the server has an event of failed checks of this version."""
    wanted = EventFilter(
        event=EventNameFilter(name=[CHECKS_FAILED]),
        resource=EventResourceFilter(id=[resource_of(data_root)["prefect.resource.id"]]),
    )
    with get_client(sync_client=True) as client:
        payloads = [event.payload for event in client.read_events(wanted, limit=50).events]  # the newest
    return any(p.get("version") == version and _is_same_root(p.get("root"), data_root.root) for p in payloads)


def end_lost() -> list[str]:
    """End runs that have sent no heartbeat for too long, and then none for one more interval; return their names.

    After an outage of the server, runs that are well need the interval to report again. A run that someone cancelled
    after it was lost becomes Cancelled, any other Crashed: the server allows Cancelling runs no other end.
    """
    beat = heartbeat_s()
    with get_client(sync_client=True) as client:
        if not (silent := _silent_runs(client, beat)):
            return []
        time.sleep(beat + 15)
        still = {run.id for run in _silent_runs(client, beat)}
        lost = [run for run in silent if run.id in still]
        for run in lost:  # not forced: the server refuses it if the run has ended meanwhile
            end = Cancelled if run.state_type == StateType.CANCELLING else Crashed
            client.set_flow_run_state(run.id, end(message=LOST))
            log.warning("ended run %s: %s", run.name, LOST)
    return [run.name for run in lost]


def _silent_runs(client: SyncPrefectClient, beat: float) -> list[FlowRun]:
    alive = [StateType.RUNNING, StateType.CANCELLING, StateType.PENDING]
    runs = client.read_flow_runs(
        flow_filter=FlowFilter(name=FlowFilterName(any_=list(FLOWS))),
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=alive))),
    )
    pending = StateType.PENDING
    limits = [PENDING_S if run.state_type == pending else MISSED_BEATS * beat for run in runs]
    return [run for run, limit in zip(runs, limits, strict=True) if _silent_s(client, run) > limit]


def _silent_s(client: SyncPrefectClient, run: FlowRun) -> float:
    """Seconds since the last heartbeat of a run, or since its last change of state."""
    assert run.state is not None
    wanted = EventFilter(
        occurred=EventOccurredFilter(since=run.state.timestamp),
        event=EventNameFilter(name=["prefect.flow-run.heartbeat"]),
        resource=EventResourceFilter(id=[f"prefect.flow-run.{run.id}"]),
    )
    beats = [event.occurred for event in client.read_events(wanted, limit=1).events]
    return (datetime.now(UTC) - max([run.state.timestamp, *beats])).total_seconds()


def report_gap(minutes: float) -> datetime | None:
    """Emit the event `ixi.look-after.resumed` if no look-after started for some minutes before this one.

    The server or the worker was down then, and nobody could be told.

    Returns:
        The start of the last look-after, if that is reported.
    """
    now = datetime.now(UTC)
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=["look-after"])),
            flow_run_filter=FlowRunFilter(start_time=FlowRunFilterStartTime(before_=now)),
            sort=FlowRunSort.START_TIME_DESC,
            limit=2,
        )
    starts = [run.start_time for run in runs if run.start_time and str(run.id) != runtime.flow_run.id]
    if not starts or now - starts[0] < timedelta(minutes=minutes):
        return None
    payload = {
        "since": starts[0].isoformat(timespec="seconds"),
        "minutes": round((now - starts[0]).total_seconds() / 60),
    }
    emit_event("ixi.look-after.resumed", {"prefect.resource.id": "ixi.look-after"}, payload=payload)
    return starts[0]


check_outage = task(name="report_gap", cache_policy=NO_CACHE)(report_gap)
check_trainings = task(name="train_missing", cache_policy=NO_CACHE)(train_missing)
check_failures = task(name="tell_failed_checks", cache_policy=NO_CACHE)(tell_failed_checks)
check_runs = task(name="end_lost", cache_policy=NO_CACHE)(end_lost)


@flow(name="look-after", persist_result=False)
def look_after(
    root: Annotated[str, NO_SECRET] = "ixi-data",
    scratch: Annotated[Path | None, NO_SECRET] = None,
    train_after: float | Annotated[str, Field(pattern=r"^\d+$")] = 15,
    gap: float = 40,
) -> None:
    """Start a missing training, end lost runs, and report an outage and failed checks whose event was lost.

    Args:
        root: Folder, or s3://bucket/prefix, that holds datasets and runs.
        scratch: If the root is on S3: folder of this machine to work in.
        train_after: Minutes that the events of a new version have to arrive, and to start its training; `prefect.yaml`
            gives text.
        gap: Minutes without a look-after that are reported as an outage.
    """
    check_outage(gap)
    given = (root, scratch or None, float(train_after))
    beside = [check_runs.submit(), check_failures.submit(*given)]  # so none depends on another
    check_trainings(*given)
    for future in beside:
        future.result()
