"""A run: its folder, its configuration made definite, and the whole job of train and evaluate as a plain function.

::

    <root>/runs/<run id>/config.json            the resolved configuration, software and hardware; no path, no time
                        /checkpoints/ /samples/ /tensorboard/ /metrics.csv /validation.csv
                        /generator.safetensors  the best generator, written when training has ended
                        /evaluation-test.csv /evaluation-test.json
"""

from __future__ import annotations

import logging
import platform
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path

import pandas as pd
import torch
from torch import distributed

from ixi_etl import dataset
from ixi_etl.dataset import Places
from ixi_etl.errors import DatasetError
from ixi_etl.files import Progress, lock_root, read_json, silent, to_json, write_atomic
from ixi_etl.store import open_arrays
from model import evaluate
from model.checkpoint import CheckpointError
from model.config import TrainConfig
from model.data import check_side, parse_direction
from model.networks import SIDES
from model.train import GENERATOR, train, under_torchrun

log = logging.getLogger(__name__)

CONFIG = "config.json"
SOFTWARE = ("torch", "numpy", "zarr", "ixi-etl")


@dataclass(frozen=True)
class Run:
    """A training that is set up: a resolved configuration, the version it reads, and its folder."""

    folder: Path
    config: TrainConfig
    version: Path

    @property
    def generator(self) -> Path:
        return self.folder / GENERATOR


def prepare(root: Path, config: TrainConfig, run: str | None = None) -> Run:
    """Make every choice that was left open (version, direction, side, precision, device), and name the run.

    Raises:
        DatasetError: there is no such version, or it does not fit the configuration.
    """
    name, wanted = dataset.parse(config.dataset)
    places = Places(root, name)
    version = dataset.resolve(places, wanted)
    folder = places.version(version)
    facts = dataset.read_facts(folder)
    source, target = parse_direction(config.direction, (facts["source"], facts["target"]))
    arrays = open_arrays(folder)
    height, width = arrays[source].shape[-2:]
    device = pick_device(config.device)
    chosen = {
        "dataset": f"{name}@{version}",
        "direction": f"{source}->{target}",
        "side": config.side or _whole_side(height, width),
        "precision": _precision(device) if config.precision == "auto" else config.precision,
        "device": device,
    }
    resolved = config.model_copy(update=chosen)
    assert resolved.side is not None
    check_side(resolved.side, height, width)
    return Run(root / "runs" / (run or resolved.run_id), resolved, folder)


def _whole_side(height: int, width: int) -> int:
    if height != width or height not in SIDES:
        raise DatasetError(f"slices of {height} x {width} are not the generator's; set side to one of {SIDES}")
    return height


def pick_device(wanted: str) -> str:
    """`auto` is the GPU if there is one.

    Raises:
        DatasetError: the device is not there.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise DatasetError(f"device {wanted} is not to be had here ({str(error).splitlines()[0]}); try auto") from error
    return wanted


def _precision(device: str) -> str:
    """Where bf16 is computed in hardware it pays; elsewhere it is emulated, and slower than fp32."""
    if device.startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "fp32"


def train_run(run: Run, *, resume: bool = False, progress: Progress = silent) -> Path:
    """Train; the file of the best generator. One training at a time may work in a folder.

    Raises:
        IxiError: see `model.train.train`; or somebody else trains here.
    """
    with under_torchrun(run.config.device) as device:
        config = run.config.model_copy(update={"device": device})
        if distributed.is_initialized() and distributed.get_rank() > 0:
            return train(run.folder, config, run.version, resume=resume, progress=silent)
        with lock_root(run.folder, "--run"):
            record = {
                "config": run.config.model_dump(mode="json"),
                "software": {name: installed(name) for name in SOFTWARE} | {"python": platform.python_version()},
                "hardware": _hardware(config.device),
            }
            if not (run.folder / CONFIG).exists():
                write_atomic(run.folder / CONFIG, to_json(record))
            return train(run.folder, config, run.version, resume=resume, progress=progress)


def _hardware(device: str) -> dict[str, str | int]:
    if device.startswith("cuda"):
        return {"device": torch.cuda.get_device_name(device)}
    return {"device": str(torch.cpu.get_capabilities()["cpu_name"]), "threads": torch.get_num_threads()}


def evaluate_run(
    run: Run, *, split: str = "test", weights: Path | None = None, dropout: bool = False, progress: Progress = silent
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Evaluate the best generator, or that of another checkpoint; (summary, comparison), see `model.evaluate`."""
    return evaluate.evaluate(
        run.folder,
        run.version,
        weights or run.generator,
        split=split,
        device=run.config.device,
        dropout=dropout,
        progress=progress,
    )


def find_run(root: Path, name: str) -> Path:
    """The folder of a run, by its id or the unique beginning of one; or `latest`, the one last written to.

    Raises:
        CheckpointError: there is no such run.
    """
    folder = root / "runs"
    there = sorted((p for p in folder.glob("*") if (p / CONFIG).is_file()), key=lambda p: p.stat().st_mtime)
    named = [p for p in there if p.name == name] or [p for p in there if p.name.startswith(name)]
    found = there[-1:] if name == "latest" else named
    if len(found) != 1:
        which = f"{len(found)} runs begin with {name}" if found else f"there is no run {name}"
        raise CheckpointError(f"{which} in {folder}; there are: {', '.join(p.name for p in there) or 'none'}")
    return found[0]


def open_run(root: Path, name: str) -> Run:
    """A run that has been trained, named as for `find_run`, with the dataset version that it was trained on.

    Raises:
        CheckpointError: there is no such run.
        DatasetError: its dataset version is not there.
    """
    folder = find_run(root, name)
    record = read_json(folder / CONFIG)
    if not isinstance(record, dict) or "config" not in record:
        raise CheckpointError(f"{folder / CONFIG} is damaged; it holds the run's configuration")
    config = TrainConfig.model_validate(record["config"])
    dataset_name, version = dataset.parse(config.dataset)
    places = Places(root, dataset_name)
    config = config.model_copy(update={"device": pick_device("auto")})
    return Run(folder, config, places.version(dataset.resolve(places, version)))
