"""Flow `train-pix2pix`: a dataset version in, a trained and evaluated generator out. Its tasks are in `model.jobs`.

Run it from Python, ``train_pix2pix(preset="smoke")``, or as a deployment::

    prefect deployment run train-pix2pix/train-pix2pix --param preset=gpu
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_run_logger, task
from prefect.assets import materialize
from prefect.cache_policies import NO_CACHE

from flows.artifacts import progress_artifacts, show_run
from flows.assets import dataset_asset, run_asset
from flows.presets import Preset
from flows.progress import show_progress
from ixi_etl.config import NO_SECRET
from ixi_etl.core.storage import DataRoot
from ixi_etl.dataset.versions import parse_version
from ixi_etl.errors import EmptySplitError
from model import jobs
from model.config import preset as preset_of
from model.devices import keep_freed_memory
from model.run import Run

evaluate = task(task_run_name="evaluate {run.folder.name}", cache_policy=NO_CACHE)(jobs.evaluate_run)


def train_task(run: Run, root: str | Path) -> Any:
    """The task that trains; it materialises the run's asset from that of the dataset."""
    dataset, folder = run.config.dataset, run.remote or run.folder
    upstream = dataset_asset(DataRoot(root, parse_version(dataset)[0]))
    return materialize(
        run_asset(folder, dataset),
        by="ixi-etl",
        asset_deps=[upstream],
        task_run_name="train {run.folder.name}",
        cache_policy=NO_CACHE,
    )(jobs.train_run)


def _run_name() -> str:
    from prefect.runtime import flow_run

    given = flow_run.parameters
    return f"train {given['preset']} on {given['dataset'] or 'the latest version'}"


@flow(name="train-pix2pix", flow_run_name=_run_name, persist_result=False)
def train_pix2pix(
    dataset: Annotated[str | None, NO_SECRET] = None,
    preset: Preset = "paper",
    root: Annotated[str | Path, NO_SECRET] = "ixi-data",
    scratch: Annotated[str | Path | None, NO_SECRET] = None,
    run: Annotated[str | None, NO_SECRET] = None,
    settings: dict[str, Annotated[Any, NO_SECRET]] | None = None,
    resume: bool = True,
) -> Path:
    """Train on a dataset version, evaluate on its test split, and return the location of the run.

    The version is resolved once, here. A run is named by version and configuration unless `run` names it. A run that
    was stopped resumes from its newest checkpoint; a finished run is only evaluated again.

    Args:
        dataset: NAME@VERSION; by default the latest version of the preset's dataset.
        preset: paper: as published, 49,200 steps, best on a GPU. digits: MNIST. smoke: a minute on a CPU. gpu: large
            batches. moschetto: the pix2pix of arXiv 2507.14575, 300 passes, on a GPU.
        root: Folder, or s3://bucket/prefix, that holds datasets and runs.
        scratch: If the root is on S3: folder of this machine to work in.
        run: Name of the run; by default from version and settings.
        settings: Fields of the configuration that override the preset, for example {"steps": 1000}.
        resume: Resume a run that was stopped; if false, an existing run is an error.
    """
    log = get_run_logger()
    named = {"dataset": dataset} if dataset else {}
    config = preset_of(preset, **(settings or {}) | named)
    prepared = jobs.prepare_run(root, config, run, Path(scratch) if scratch else None)
    log.info("run %s trains on %s", prepared.folder, prepared.config.dataset)
    if prepared.config.device == "cpu":
        keep_freed_memory()
    with show_progress() as shown, progress_artifacts(shown) as progress:
        train_task(prepared, root)(prepared, resume=resume, progress=progress)
        try:
            evaluate(prepared, progress=progress)
        except EmptySplitError as error:
            log.warning("not evaluated: %s", error)
    folder = prepared.remote or prepared.folder
    show_run(folder)
    return folder
