"""Flow `refresh-dataset`: archives in, a published version out.

Its tasks are the stages of `ixi_etl.recipes` (`ixi`, `ixi_inputs`, `ixi_version`).

Run it from Python, ``refresh_dataset(RefreshConfig(...))``, or on the server named by PREFECT_API_URL::

    ixi-etl refresh --source /my/archives

or as a deployment. Without a server `ixi-etl refresh` calls `ixi_etl.recipes.ixi.refresh`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import pandas as pd
from prefect import flow, get_run_logger, task
from prefect.assets import add_asset_metadata, materialize
from prefect.cache_policies import NO_CACHE
from prefect.utilities.annotations import quote

from flows.announce import announce
from flows.artifacts import progress_artifacts, show_version
from flows.assets import asset_key, dataset_asset, version_facts
from flows.progress import show_progress
from ixi_etl.config import RefreshConfig
from ixi_etl.core.lease import lock_data_root
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.errors import DownloadError
from ixi_etl.recipes import ixi, ixi_inputs, ixi_version
from ixi_etl.recipes.ixi_inputs import RefreshJob
from ixi_etl.recipes.ixi_overlap import head_start


def _may_succeed_later(_task: Any, _run: Any, state: Any) -> bool:
    """Retry only if a server may be up again later; a mistake of the user or a bug will not go away."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, DownloadError) and error.transient


RETRIES: dict[str, Any] = {
    "retries": 2,
    "retry_delay_seconds": [30, 120],
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": _may_succeed_later,
}

download = task(name="download", task_run_name="download {source.name}", cache_policy=NO_CACHE, **RETRIES)(
    ixi_inputs.acquire_file
)
download_members = task(name="download_members", task_run_name="download members", cache_policy=NO_CACHE, **RETRIES)(
    ixi_inputs.acquire_members
)
survey_archives = task(task_run_name="survey archives", cache_policy=NO_CACHE)(ixi.survey_archives)
select_subjects = task(task_run_name="select subjects", cache_policy=NO_CACHE)(ixi.select_subjects)
cut_subjects = task(task_run_name="cut for {job.version}", cache_policy=NO_CACHE)(ixi.cut_subjects)


def publish_version(
    job: RefreshJob, survey_table: pd.DataFrame, final: pd.DataFrame, records: Mapping[str, Any]
) -> PublishedVersion:
    """Publish the version, and tell Prefect what its asset is now."""
    published = ixi_version.publish_version(job, survey_table, final, records)
    add_asset_metadata(asset_key(job.config.data_root.datasets), version_facts(published.folder))
    return published


def publish_task(config: RefreshConfig) -> Callable[..., PublishedVersion]:
    """The task that publishes; it materialises the dataset's asset, whose key depends on the root."""
    asset = dataset_asset(config.data_root)
    named = materialize(asset, by="ixi-etl", task_run_name="publish {job.version}", cache_policy=NO_CACHE)
    return named(publish_version)


T = TypeVar("T")


def unsearched(value: T) -> T:
    """`value`, in which Prefect does not look for results of other tasks: that takes milliseconds per subject."""
    return cast(T, quote(value))


def _run_name() -> str:
    from prefect.runtime import flow_run

    config = flow_run.parameters["config"]
    return f"refresh {config.dataset.pairing} from {config.source or 'the official host'}"


@flow(name="refresh-dataset", flow_run_name=_run_name, persist_result=False)
def refresh_dataset(config: RefreshConfig | None = None) -> PublishedVersion:
    """Publish the dataset version of this configuration and these archives, unless it is published already.

    A new version emits an event, an existing one does not. That of a version of T1 and T2 starts a training run. A
    version that fails a data check emits another event, and under `checks: block` not the first.

    Args:
        config: Sources, root, parallelism and the dataset to make.
    """
    config = config or RefreshConfig()
    log = get_run_logger()
    with lock_data_root(config.data_root), show_progress() as shown, progress_artifacts(shown) as progress:
        if config.fetch == "members":
            inputs = download_members(config, progress)
        else:
            sources = ixi_inputs.find_sources(config)
            with head_start(config, sources, progress) as arrivals:
                downloads = {
                    key: download.submit(config, unsearched(source), progress, unsearched(arrivals.get(key)))
                    for key, source in sources.items()
                }
                inputs = ixi_inputs.collect_inputs(config, {key: future.result() for key, future in downloads.items()})
        job = ixi_inputs.create_job(config, inputs, progress)
        published = ixi.find_published(job)
        if published:
            log.info("version %s is published already: %s", job.version, published.folder)
            show_version(published)
            return published
        survey_table = survey_archives(unsearched(job))
        screened = select_subjects(unsearched(job), survey_table)
        final, records = cut_subjects(unsearched(job), survey_table, screened)
        refreshed = publish_task(config)(unsearched(job), survey_table, final, unsearched(records))
        announce(config.data_root, refreshed.version)
        show_version(refreshed)
        log.info("published version %s: %s", job.version, refreshed.folder)
        return refreshed
