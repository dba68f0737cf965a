"""Flow `refresh-dataset`: archives in, a published version out. `ixi_etl.refresh` has the stages.

Run it from Python, ``refresh_dataset(RefreshConfig(...))``; on the server that PREFECT_API_URL names::

    ixi-etl refresh --source /my/archives

or as a deployment. Without a server `ixi-etl refresh` calls `ixi_etl.refresh.refresh`.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event

from flows.artifacts import progress_artifacts, show_version
from flows.progress import show_progress
from ixi_etl import refresh
from ixi_etl.config import RefreshConfig
from ixi_etl.download import Acquired
from ixi_etl.errors import DownloadError
from ixi_etl.files import Progress, lock_root
from ixi_etl.places import NAME
from ixi_etl.publish import Refreshed
from ixi_etl.refresh import Inputs


def _may_work_later(_task: Any, _run: Any, state: Any) -> bool:
    """A server that is down may be up again; a person's mistake, and a bug, stay what they are."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, DownloadError) and error.transient


@task(
    task_run_name="download {source.name}",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=[30, 120],
    retry_jitter_factor=0.5,
    retry_condition_fn=_may_work_later,
)
def download(config: RefreshConfig, source: Any, progress: Progress) -> Acquired:
    return refresh.acquire_file(config, source, progress)


@task(
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=[30, 120],
    retry_jitter_factor=0.5,
    retry_condition_fn=_may_work_later,
)
def download_members(config: RefreshConfig, progress: Progress) -> Inputs:
    return refresh.acquire_members(config, progress)


@task(cache_policy=NO_CACHE)
def survey_archives(inputs: Inputs, progress: Progress) -> pd.DataFrame:
    return refresh.survey_archives(inputs, progress)


@task(cache_policy=NO_CACHE)
def select_subjects(config: RefreshConfig, table: pd.DataFrame, inputs: Inputs) -> pd.DataFrame:
    return refresh.select_subjects(config, table, inputs)


@task(task_run_name="cut for {version}", cache_policy=NO_CACHE)
def cut_subjects(
    config: RefreshConfig,
    version: str,
    table: pd.DataFrame,
    candidates: pd.DataFrame,
    inputs: Inputs,
    progress: Progress,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    return refresh.cut_subjects(config, version, table, candidates, inputs, progress)


@task(task_run_name="publish {version}", cache_policy=NO_CACHE)
def publish_version(
    config: RefreshConfig,
    version: str,
    facts: dict[str, Any],
    table: pd.DataFrame,
    settled: pd.DataFrame,
    records: dict[str, Any],
    inputs: Inputs,
    progress: Progress,
) -> Refreshed:
    return refresh.publish_version(config, version, facts, table, settled, records, inputs, progress)


def announce(config: RefreshConfig, refreshed: Refreshed) -> None:
    """Tell whoever waits for a new version; `prefect.yaml` has the training wait for it."""
    resource = {"prefect.resource.id": f"ixi.dataset.{NAME}", "prefect.resource.name": NAME}
    emit_event("ixi.dataset.published", resource, payload={"version": refreshed.version, "root": config.root})


def _run_name() -> str:
    from prefect.runtime import flow_run

    config = flow_run.parameters["config"]
    return f"refresh {config.dataset.pairing} from {config.source or 'the official host'}"


@flow(name="refresh-dataset", flow_run_name=_run_name, persist_result=False)
def refresh_dataset(config: RefreshConfig | None = None) -> Refreshed:
    """Make sure that the dataset version of this configuration and these archives is published.

    A version that is new is announced by an event; one that was there already is not.

    Args:
        config: Where to read and write, how hard to work, and which data to make.
    """
    config = config or RefreshConfig()
    log = get_run_logger()
    with lock_root(config.places.local), show_progress() as shown, progress_artifacts(shown) as progress:
        if config.fetch == "members":
            inputs = download_members(config, progress)
        else:
            sources = refresh.find_sources(config)
            downloads = {key: download.submit(config, source, progress) for key, source in sources.items()}
            inputs = refresh.inputs_of(config, {key: job.result() for key, job in downloads.items()})
        version, facts = refresh.name_version(config, inputs)
        published = refresh.find_published(config, version, inputs)
        if published:
            log.info("version %s is published already: %s", version, published.folder)
            show_version(published)
            return published
        table = survey_archives(inputs, progress)
        candidates = select_subjects(config, table, inputs)
        settled, records = cut_subjects(config, version, table, candidates, inputs, progress)
        refreshed = publish_version(config, version, facts, table, settled, records, inputs, progress)
        announce(config, refreshed)
        show_version(refreshed)
        log.info("published version %s: %s", version, refreshed.folder)
        return refreshed
