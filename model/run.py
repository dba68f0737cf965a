"""A run: its folder, its configuration made definite, and the whole job of train and evaluate as a plain function.

::

    <root>/runs/<run id>/config.json            the resolved configuration, software and hardware; no path, no time
                        /checkpoints/ /samples/ /tensorboard/ /metrics.csv /validation.csv
                        /generator.safetensors  the best generator, written when training has ended
                        /evaluation-test.csv /evaluation-test.json
                        /report.html            all of it to look at

Where the root is on S3, the run is kept there, and worked on in the scratch folder: `model.mirror`.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import distributed

from ixi_etl import dataset, software
from ixi_etl.errors import DatasetError
from ixi_etl.files import Progress, disk_errors_in_a_line, lock_root, read_json, silent, to_json, write_atomic
from ixi_etl.places import Places, check_reachable, is_local, place
from ixi_etl.store import open_arrays
from model import evaluate, mirror
from model.checkpoint import CheckpointError
from model.config import SIDES, TrainConfig
from model.data import check_side, parse_direction
from model.evaluate import Evaluation
from model.report import write_report
from model.train import GENERATOR, TrainingError, nothing, train, under_torchrun

log = logging.getLogger(__name__)

CONFIG = "config.json"
DEVICES = ("cpu", "cuda", "mps")
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
SOFTWARE = ("torch", "numpy", "zarr")


@dataclass(frozen=True)
class Run:
    """A training that is set up: a resolved configuration, the version it reads, and the folder that it works in.

    `kept` is where the run is kept on S3; None where that is `folder`.
    """

    folder: Path
    config: TrainConfig
    version: Path
    kept: Path | None = None

    @property
    def generator(self) -> Path:
        return self.folder / GENERATOR

    def keep(self) -> None:
        """Bring the folder as it is to S3, if that is where the run is kept."""
        if self.kept:
            mirror.keep(self.folder, self.kept)


def prepare(root: str | Path, config: TrainConfig, run: str | None = None, scratch: Path | None = None) -> Run:
    """Make every choice that was left open (version, direction, side, precision, device), and name the run.

    `root` and `scratch` are as in `Places`.

    Raises:
        DatasetError: there is no such version, or it does not fit the configuration.
        TrainingError: no run can have that name.
    """
    if run is not None and (run == "latest" or not RUN_ID.fullmatch(run)):  # runs are looked for in one folder
        raise TrainingError(f"--run-id {run!r} is no name of a run; give letters, digits, '.', '_' and '-' (no latest)")
    name, wanted = dataset.parse(config.dataset)
    places = Places(root, name, scratch)
    version = dataset.resolve(places, wanted)
    folder = places.version(version)
    facts = dataset.read_facts(folder)
    source, target = parse_direction(config.direction, (facts["source"], facts["target"]))
    arrays = open_arrays(folder)
    if source not in arrays:
        raise DatasetError(f"{folder / dataset.FACTS} is damaged: it names an array {source}, and there is none")
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
    return _run(places, run or resolved.run_id, resolved, folder)


def _run(places: Places, name: str, config: TrainConfig, version: Path) -> Run:
    kept = place(places.root) / "runs" / name
    return Run(kept, config, version) if is_local(kept) else Run(places.local / "runs" / name, config, version, kept)


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
        if torch.device(wanted).type not in DEVICES:
            raise RuntimeError(f"it is none of {', '.join(DEVICES)}")
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise DatasetError(f"device {wanted} is not to be had here ({str(error).splitlines()[0]}); try auto") from error
    return wanted


def _precision(device: str) -> str:
    """Where bf16 is computed in hardware it pays; elsewhere it is emulated, and slower than fp32."""
    if device.startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "fp32"


@disk_errors_in_a_line()
def train_run(run: Run, *, resume: bool = False, progress: Progress = silent) -> Path:
    """Train; the file of the best generator. One training at a time may work in a folder.

    Raises:
        IxiError: see `model.train.train`; or somebody else trains here.
    """
    with under_torchrun(run.config.device) as device:
        config = run.config.model_copy(update={"device": device})
        if distributed.is_initialized() and distributed.get_rank() > 0:
            distributed.barrier()  # until the first process has fetched the run
            return train(run.folder, config, run.version, resume=resume, progress=silent)
        with lock_root(run.folder, "--run-id"):
            if run.kept:
                mirror.fetch(run.kept, run.folder)
            if distributed.is_initialized():
                distributed.barrier()
            record = {
                "config": run.config.model_dump(mode="json"),
                "software": software.describe(SOFTWARE),
                "hardware": _hardware(config.device),
                "data": dataset.licence_of(run.version),
            }
            saved = partial(mirror.keep_if_possible, run.folder, run.kept) if run.kept else nothing

            def begun() -> None:  # else what is kept tells of the training that goes on
                write_atomic(run.folder / CONFIG, to_json(record))
                saved()  # at once: it is what keeps `ixi-etl prune` from removing the version

            generator = train(
                run.folder, config, run.version, resume=resume, progress=progress, on_begun=begun, on_saved=saved
            )
            write_report(run.folder)
            run.keep()
            return generator


def _hardware(device: str) -> dict[str, str | int]:
    if device.startswith("cuda"):
        return {"device": torch.cuda.get_device_name(device)}
    return {"device": str(torch.cpu.get_capabilities()["cpu_name"]), "threads": torch.get_num_threads()}


@disk_errors_in_a_line()
def evaluate_run(
    run: Run, *, split: str = "test", weights: Path | None = None, dropout: bool = False, progress: Progress = silent
) -> Evaluation:
    """Evaluate the best generator, or that of another checkpoint: see `model.evaluate.evaluate`."""
    done = evaluate.evaluate(
        run.folder,
        run.version,
        run.config,
        run.generator,
        weights=weights,
        split=split,
        device=run.config.device,
        dropout=dropout,
        progress=progress,
    )
    write_report(run.folder)
    run.keep()
    return done


def find_run(root: str | Path, name: str, scratch: Path | None = None) -> Path:
    """The folder of a run, by its id or the unique beginning of one; or `latest`, the one last written to.

    A run that is kept on S3 is fetched first.

    Raises:
        CheckpointError: there is no such run.
    """
    check_reachable(root)
    folder = place(root) / "runs"
    there = sorted((p for p in folder.glob("*") if (p / CONFIG).is_file()), key=_written)
    named = [p for p in there if p.name == name] or [p for p in there if p.name.startswith(name)]
    found = there[-1:] if name == "latest" else named
    if len(found) != 1:
        which = f"{len(found)} runs begin with {name}" if found else f"there is no run {name}"
        raise CheckpointError(f"{which} in {folder}; there are: {', '.join(p.name for p in there) or 'none'}")
    if is_local(found[0]):
        return found[0]
    here = Places(root, scratch=scratch).local / "runs" / found[0].name
    mirror.fetch(found[0], here)
    return here


def open_run(root: str | Path, name: str, scratch: Path | None = None) -> Run:
    """A run that has been trained, named as for `find_run`, with the dataset version that it was trained on.

    Raises:
        CheckpointError: there is no such run.
        DatasetError: its dataset version is not there.
    """
    folder = find_run(root, name, scratch)
    record = read_json(folder / CONFIG)
    if not isinstance(record, dict) or "config" not in record:
        raise CheckpointError(f"{folder / CONFIG} is damaged; it holds the run's configuration")
    config = TrainConfig.model_validate(record["config"])
    dataset_name, version = dataset.parse(config.dataset)
    places = Places(root, dataset_name, scratch)
    config = config.model_copy(update={"device": pick_device("auto")})
    return _run(places, folder.name, config, places.version(dataset.resolve(places, version)))


def _written(run: Path) -> float:
    """When something was last written in a run; on S3, where folders have no time, its configuration always is."""
    return (run if is_local(run) else run / CONFIG).stat().st_mtime
