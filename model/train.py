"""Train pix2pix on one dataset version. `train` has the loop; this is the command line that runs it::

    ixi-etl train --preset paper                                    # on this machine
    ixi-etl train --preset smoke --set steps=20 --set width=8       # seconds, on a CPU
    torchrun --nproc-per-node 4 $(which ixi-etl) train --preset gpu # on four GPUs

A run lies in `<root>/runs/<run id>/`: config.json, metrics.csv, validation.csv, tensorboard/, samples/, checkpoints/,
and at the end generator.safetensors, the best generator. SIGTERM, SIGHUP and Ctrl-C save and stop; `--resume` goes on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from ixi_etl import dataset
from ixi_etl.errors import IxiError, StoppedError
from ixi_etl.files import Progress, silent
from ixi_etl.signals import catch_signals
from model import checkpoint, data, evaluate, planes, samples
from model.checkpoint import CheckpointError
from model.config import TrainConfig
from model.cpu import keep_freed_memory
from model.data import Pairs
from model.learner import Learner, generator_weights
from model.logbook import Logbook
from model.planes import Planes

log = logging.getLogger(__name__)

GENERATOR = "generator.safetensors"


class TrainingError(IxiError):
    """A training cannot go on."""


def nothing() -> None:
    """What is done after each checkpoint, if nobody says otherwise."""


def train(
    run: Path,
    config: TrainConfig,
    version: Path,
    *,
    resume: bool = False,
    progress: Progress = silent,
    on_begun: Callable[[], None] = nothing,
    on_saved: Callable[[], None] = nothing,
) -> Path:
    """Train as the resolved `config` says on the version in `version`, in the folder `run`; the best generator's file.

    `on_begun` is called where there is nothing to go on from, before data are read; `on_saved` after each checkpoint.

    Raises:
        TrainingError: the loss is not finite, or memory is short.
        StoppedError: on SIGTERM, SIGINT or SIGHUP, after saving.
        CheckpointError: `run` holds a training already and `resume` is not set, or one of another configuration or
            another number of processes.
    """
    device = torch.device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    elif device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)  # what names no device, as a graph's stream, is then of this one
        torch.backends.cudnn.benchmark = True  # batches of one shape: it tries its algorithms once
    rank, processes = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    there = _to_go_on_from(run, config, processes, resume)
    if there is None:
        on_begun()
    pairs = data.load(version, "train", config.direction, device)
    shown, validated = _held_out(version, config, pairs, device)
    with _out_of_memory_in_a_line("before the first step", "a smaller width"):
        learner = Learner(config, device)
        start = _restore(learner, there) if there else 0
    del there  # it holds all tensors once more
    logbook = Logbook(run, config, learner, start, images_a_step=config.batch_size * processes) if rank == 0 else None
    sampled = {round((n + 1) * config.steps / config.samples) for n in range(config.samples)}

    smaller = f"batch_size {config.batch_size // 2}" if config.batch_size > 1 else "a smaller width or side"
    with _out_of_memory_in_a_line(f"at batch_size {config.batch_size}", smaller), catch_signals() as received:
        for step in range(start, config.steps):
            first = (step * processes + rank) * config.batch_size
            losses = learner.step(*data.draw(pairs, config, first), config.lr_at(step))

            done = step + 1
            progress("train", done, config.steps, "steps")
            ends, stopping = done == config.steps, _agreed(received)
            if logbook is not None:
                logbook.add(losses)
                if done % config.log_every == 0 or ends:
                    logbook.line(done)
                if done in sampled:
                    with logbook.aside():
                        sheets = samples.draw(learner.best_generator, shown, run / "samples", f"step-{done:08d}")
                    logbook.images(done, sheets)
            if done % config.checkpoint_every == 0 or ends or stopping:
                tensors = learner.tensors()  # of every process
                _check_finite(losses, tensors, done, run)
                if logbook is not None:
                    with logbook.aside():
                        # Asked to stop, there may be seconds left before the kill: save, and do not validate.
                        found = validate(learner, validated) if validated is not None and not stopping else {}
                        facts = {"step": done, "config": config.model_dump(mode="json"), "validation": found}
                        path = checkpoint.path_of(run / "checkpoints", done)
                        checkpoint.save(path, tensors, facts | {"processes": processes})
                        checkpoint.prune(run / "checkpoints", config.keep)
                    logbook.validation(done, found)
                    with logbook.aside():
                        on_saved()
            if stopping or (ends and received):  # the signal may have come while the last checkpoint was saved
                said = f"stopped at step {done} of {config.steps} and saved in {run}; --resume goes on"
                raise StoppedError(said, stopping or received[0])
    if logbook is not None:
        logbook.close()
        keep_best(run, config, planes.describe(version, pairs), dataset.licence_of(version))
    return run / GENERATOR


def validate(learner: Learner, pairs: Pairs) -> dict[str, float]:
    """Means over the subjects of the validation split: `mae`, `psnr` (dB) and `ssim` of whole slices."""
    generate = evaluate.generated_by(learner.best_generator)

    def generated(source: Tensor, position: Tensor) -> Tensor:
        with learner.autocast():  # generating alone: in bf16 SSIM tells equal images apart
            return generate(source, position)

    table = evaluate.measure(pairs, {"generated": generated})
    return {str(k): float(v) for k, v in table[table["mask"] == "whole"][["mae", "psnr", "ssim"]].mean().items()}


def keep_best(run: Path, config: TrainConfig, trained_on: Planes | None, licence: Mapping[str, Any]) -> None:
    """Write the best validated generator (without validation, the last) as a file of its own.

    It holds all that synthesis needs: the weights, how they were trained, and which planes they were trained on; and
    the licence and credit of the dataset, under which it may be passed on.
    """
    best = checkpoint.best(run / "checkpoints")
    if best is None:
        raise CheckpointError(f"{run / 'checkpoints'} has no whole checkpoint; train again")
    weights = generator_weights(checkpoint.load(best.path)[0])
    facts = {"step": best.step, "config": config.model_dump(mode="json"), "validation": best.validation}
    facts |= {"planes": trained_on.model_dump(mode="json") if trained_on else None, **licence}
    checkpoint.save(run / GENERATOR, weights, facts)


def _held_out(version: Path, config: TrainConfig, pairs: Pairs, device: torch.device) -> tuple[Pairs, Pairs | None]:
    """What samples are drawn of, and what is validated on: the validation split; without one, training and nothing."""
    try:
        held_out = data.load(version, "val", config.direction, device)
    except data.EmptySplitError as error:
        log.warning("%s: nothing is validated, the last checkpoint counts as the best, samples are of training", error)
        return pairs, None
    return held_out, held_out


def _to_go_on_from(
    run: Path, config: TrainConfig, processes: int, resume: bool
) -> tuple[checkpoint.Checkpoint, dict[str, Tensor]] | None:
    """The newest whole checkpoint with its tensors; None if there is none."""
    newest = checkpoint.newest_whole(run / "checkpoints")
    if newest is None:
        return None
    if not resume:
        step = newest[0].step
        raise CheckpointError(f"{run} has trained to step {step}; --resume goes on, another --run-id begins anew")
    check_same(newest[0], config, processes)
    return newest


def _restore(learner: Learner, there: tuple[checkpoint.Checkpoint, dict[str, Tensor]]) -> int:
    """Take up a checkpoint; the step to go on with."""
    learner.restore(there[1], there[0].path)
    log.info("going on from %s", there[0].path)
    return there[0].step


def check_same(there: checkpoint.Checkpoint, config: TrainConfig, processes: int = 1) -> None:
    """Raise `CheckpointError` unless `processes` with `config` may resume from the checkpoint `there`.

    Another number of processes takes other pairs at each step, and draws other random numbers.
    """
    unlike = config.difference(checkpoint.config_of(there.path, there.config))
    if there.processes != processes:
        count = f"{there.processes} processes, not {processes} (torchrun --nproc-per-node)"
        unlike = ", ".join(filter(None, [unlike, count]))
    if unlike:
        raise CheckpointError(
            f"{there.path} has another configuration ({unlike}); set the same, or give another --run-id"
        )


def _check_finite(losses: Tensor, tensors: Mapping[str, Tensor], step: int, run: Path) -> None:
    """The losses are of the weights before the step: one that ruins the weights shows in these alone."""
    weights = [t for name, t in tensors.items() if t.is_floating_point() and "_optimizer." not in name]
    for what, values in (("the loss is", [losses]), ("the weights are", weights)):
        if not torch.stack([torch.isfinite(v).all() for v in values]).all():
            good = checkpoint.best(run / "checkpoints")
            last = f"the last good checkpoint is {good.path}" if good else "there is no checkpoint yet"
            raise TrainingError(f"{what} not finite at step {step}; {last}; try a lower lr, or precision fp32")


def _agreed(received: list[int]) -> int:
    """The signal that this or any other process was sent, or 0: all must stop at the same step, as all wait for all."""
    number = received[0] if received else 0
    if not distributed.is_initialized():
        return number
    everybody = torch.tensor(number)  # on the CPU, so that no GPU is waited for
    distributed.all_reduce(everybody, distributed.ReduceOp.MAX)
    return int(everybody)


@contextmanager
def _out_of_memory_in_a_line(when: str, smaller: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of which torch.OutOfMemoryError is one; the CPU's allocator has none of its own
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise TrainingError(f"out of memory {when}; try {smaller}") from error


class TorchrunPlace(NamedTuple):
    """Which of how many processes this one is, and which of those on this machine."""

    rank: int
    processes: int
    local_rank: int


def torchrun_place() -> TorchrunPlace | None:
    """This process's place among those that `torchrun` started; None where it trains alone.

    Clusters and MPI wrappers set RANK, too, often without the other variables: a single process needs none of them.

    Raises:
        TrainingError: there are to be several processes, but the variables do not say how they find each other.
    """
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ.get(name, "") for name in names}
    said = ", ".join(f"{name}={value or '(unset)'}" for name, value in given.items())
    advice = "start with torchrun, or unset RANK to train in a single process"
    try:
        place = TorchrunPlace(*(int(given[name]) for name in names[:3]))
        sound = 0 <= place.rank < place.processes and 0 <= place.local_rank < place.processes
        sound = sound and bool(given["MASTER_ADDR"]) and 0 < int(given["MASTER_PORT"]) < 1 << 16
    except ValueError:
        sound = False
    if not sound:
        raise TrainingError(f"the environment names no place among several processes ({said}); {advice}")
    return place


@contextmanager
def under_torchrun(device: str) -> Iterator[str]:
    """Join the other processes if `torchrun` started this one; the device that is this process's.

    Raises:
        TrainingError: the other processes cannot be reached, or there is no GPU for this one.
    """
    place = torchrun_place()
    if place is None:
        yield device
        return
    cuda = device.startswith("cuda")
    if cuda:
        if place.local_rank >= torch.cuda.device_count():
            said = f"there are {torch.cuda.device_count()} GPUs here, and none for process {place.local_rank}"
            raise TrainingError(f"{said}; start fewer with --nproc-per-node")
        device = f"cuda:{place.local_rank}"
        torch.cuda.set_device(device)
    try:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    except (RuntimeError, ValueError) as error:  # of which torch's DistError is one
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrainingError(f"MASTER_ADDR and MASTER_PORT do not lead to the other processes ({said})") from error
    try:
        yield device
    finally:
        distributed.destroy_process_group()
