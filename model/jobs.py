"""Set up, train and evaluate a run, as plain functions::

    <root>/runs/<run id>/config.json            the resolved configuration, software and hardware; no paths, no times
                        /checkpoints/ /samples/ /tensorboard/ /metrics.csv /validation.csv
                        /generator.safetensors  the best generator, written when training ends
                        /evaluation-test.csv /evaluation-test.json
                        /trackers.json          what the trackers of `TrainConfig.log` call the run
                        /report.html            all of it as one page

If the root is on S3, a run works in the scratch folder and is uploaded: see `model.run`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from torch import distributed

from ixi_etl.core import software
from ixi_etl.core.files import os_errors_as_user_errors, read_json, to_json, write_atomic
from ixi_etl.core.lease import lock_shared
from ixi_etl.core.progress import Progress, no_progress
from ixi_etl.core.storage import DataRoot
from ixi_etl.core.text import quantity
from ixi_etl.dataset import metadata, versions
from ixi_etl.dataset.direction import parse_direction
from ixi_etl.dataset.store import open_arrays
from ixi_etl.errors import ConfigError, DatasetError
from model import evaluate
from model.augmentation import check_crop
from model.config import MAX_STEPS, SIDES, TrainConfig
from model.data import count_pairs
from model.devices import default_precision, describe_hardware, pick_device, torchrun_rank, under_torchrun
from model.evaluate import Evaluation
from model.report import write_report
from model.run import CONFIG_FILE, RUN_ID, Run, new_run, pull, push_if_possible
from model.trackers import Trackers, require_extras
from model.train import do_nothing, train

log = logging.getLogger(__name__)
SOFTWARE = ("torch", "numpy", "zarr")


def prepare_run(root: str | Path, config: TrainConfig, run: str | None = None, scratch: Path | None = None) -> Run:
    """Resolve the configuration (version, direction, side, steps, precision, device) and name the run.

    `root` and `scratch` are as in `DataRoot`.

    Raises:
        DatasetError: the version does not exist or is damaged.
        ConfigError: the configuration does not fit the version, or `run` is not a valid name.
        MissingExtraError: the library of a tracker is not installed.
        DeviceError: the device is not available.
    """
    require_extras(config.log)
    if run is not None and (run == "latest" or not RUN_ID.fullmatch(run)):  # no path to outside of runs/
        raise ConfigError(f"--run-id {run!r} is not a valid name; use letters, digits, '.', '_' and '-' (not latest)")
    name, wanted = versions.parse_version(config.dataset)
    data_root = DataRoot(root, name, scratch)
    version = versions.resolve_version(data_root, wanted)
    folder = data_root.version(version)
    version_metadata = metadata.read_metadata(folder)
    direction = parse_direction(config.direction, version_metadata)
    arrays = open_arrays(folder)
    missing = [name for name in (*direction.sources, direction.target) if name not in arrays]
    if missing:
        path = folder / metadata.METADATA
        raise DatasetError(f"{path} is damaged: it names an array {missing[0]} that does not exist")
    height, width = arrays[direction.target].shape[-2:]
    device = pick_device(config.device)
    resolved_fields = {
        "dataset": f"{name}@{version}",
        "direction": str(direction),
        "side": _side(config, height, width),
        "steps": config.steps if config.epochs is None else _steps_of(config, count_pairs(folder, "train", direction)),
        "precision": default_precision(device) if config.precision == "auto" else config.precision,
        "device": device,
    }
    resolved = config.model_copy(update=resolved_fields)
    check_crop(resolved.crop((height, width)), (height, width))
    return new_run(data_root, run or resolved.run_id, resolved, folder)


def _side(config: TrainConfig, height: int, width: int) -> int | None:
    """The side of the crops; None for whole slices of any shape, which `levels` allows."""
    if config.side or (config.levels and min(height, width) >= SIDES[0]):
        return config.side
    if height != width or height not in SIDES:
        problem = f"the generator does not support slices of {height} x {width}"
        raise ConfigError(f"{problem}; set side to one of {SIDES}, or levels for whole slices")
    return height


def _steps_of(config: TrainConfig, pairs: int) -> int:
    """The number of steps of `epochs` passes over the training pairs; all batches are full.

    Raises:
        ConfigError: the configuration has `steps` too, or they are too many.
    """
    assert config.epochs is not None
    if "steps" in config.model_fields_set:
        raise ConfigError(f"steps is {config.steps} and epochs {config.epochs}; give one of them")
    rank = torchrun_rank()
    per_step = config.batch_size * (1 if rank is None else rank.processes)
    steps = math.ceil(config.epochs * pairs / per_step)
    if steps > MAX_STEPS:
        raise ConfigError(f"epochs {config.epochs} are {steps:,} steps; the limit is {MAX_STEPS:,}")
    counts = quantity(pairs, "pair"), per_step, quantity(steps, "step")
    log.info("epochs: %s, over %s, %d a step: %s", config.epochs, *counts)
    return steps


def _deviations(run: Run) -> list[str]:
    """How the run differs from the published one that its preset follows: in training and in data, in sentences."""
    published = run.config.published
    found = metadata.read_metadata(run.version).get("preparation", {}).get("name")
    other = f"The dataset version is not prepared as published, by ixi-etl refresh --preset {published}."
    return run.config.deviations + ([] if found == published else [other])


@os_errors_as_user_errors()
def train_run(run: Run, *, resume: bool = False, progress: Progress = no_progress) -> Path:
    """Train, write the report, and return the best generator's file. A lock allows one process to train in a folder.

    Raises:
        IxiError: as `model.train.train`; or another process trains in this folder.
    """
    with under_torchrun(run.config.device) as device:
        config = run.config.model_copy(update={"device": device})
        if distributed.is_initialized() and distributed.get_rank() > 0:
            distributed.barrier()  # until process 0 has pulled the run
            return train(run.folder, config, run.version, resume=resume, progress=no_progress)
        with lock_shared(run.folder, run.remote, "--run-id"):
            if run.remote:
                pull(run.remote, run.folder)
            if distributed.is_initialized():
                distributed.barrier()
            record = {
                "config": run.config.model_dump(mode="json"),
                "software": software.describe(SOFTWARE),
                "hardware": describe_hardware(config.device),
                "data": metadata.licence_of(run.version),
            }
            if config.published != "none":
                record["preset"] = {"name": config.published, "deviations": _deviations(run)}
            upload = partial(push_if_possible, run.folder, run.remote) if run.remote else do_nothing

            def write_config() -> None:  # only for a new run: a resumed one keeps its record
                write_atomic(run.folder / CONFIG_FILE, to_json(record))
                upload()  # now, since this is what prevents `ixi-etl prune` from removing the version

            callbacks = {"on_start": write_config, "on_saved": upload}
            generator = train(run.folder, config, run.version, resume=resume, progress=progress, **callbacks)
            write_report(run.folder)
            run.push()
            return generator


@os_errors_as_user_errors()
def evaluate_run(
    run: Run,
    *,
    split: str = "test",
    weights: Path | None = None,
    dropout: bool = False,
    protocols: Sequence[str] | None = None,
    progress: Progress = no_progress,
) -> Evaluation:
    """Evaluate the best generator or the one in `weights`, and update the report: see `model.evaluate.evaluate`.

    The trackers that the run was logged to get the table. A run on S3 is locked, and fetched again, because uploading
    replaces what another machine may have trained meanwhile.

    Raises:
        LockedError: another machine works on the run.
    """
    with lock_shared(run.folder, run.remote, "--run-id") if run.remote else nullcontext():
        if run.remote:
            pull(run.remote, run.folder)
        return _evaluate(run, split, weights, dropout, protocols, progress)


def _evaluate(
    run: Run,
    split: str,
    weights: Path | None,
    dropout: bool,
    protocols: Sequence[str] | None,
    progress: Progress,
) -> Evaluation:
    evaluation = evaluate.evaluate(
        run.folder,
        run.version,
        run.config,
        run.generator,
        weights=weights,
        split=split,
        device=run.config.device,
        dropout=dropout,
        protocols=protocols,
        progress=progress,
    )
    write_report(run.folder)
    record = read_json(run.folder / f"{evaluation.name}.json")
    trackers = Trackers(run.folder, run.config, None)
    trackers.log_evaluation(record["step"], evaluation.name, record["summary"])
    trackers.close(None)
    run.push()
    return evaluation
