"""Train pix2pix on one dataset version, from the command line::

    ixi-etl train --preset paper                                    # on this machine
    ixi-etl train --preset smoke --set steps=20 --set width=8       # seconds, on a CPU
    torchrun --nproc-per-node 4 $(which ixi-etl) train --preset gpu # on four GPUs

`train` is the loop. It writes into `<root>/runs/<run id>/`: metrics.csv, validation.csv, tensorboard/ or what other
trackers need, samples/, checkpoints/, and at the end generator.safetensors, the best generator. SIGTERM, SIGHUP and
Ctrl-C save and stop; `--resume` continues.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from ixi_etl import errors
from ixi_etl.core.progress import Progress, no_progress
from ixi_etl.core.signals import catch_signals
from ixi_etl.dataset import metadata
from ixi_etl.errors import CheckpointError, StoppedError, TrainingError
from model import checkpoint, data, evaluate, generator, planes, samples
from model.config import TrainConfig
from model.data import Pairs
from model.generator import GENERATOR_FILE, generator_weights
from model.metrics_log import MetricsLog
from model.planes import PlaneSummary
from model.trainer import Trainer

log = logging.getLogger(__name__)


def do_nothing() -> None:
    """The default of the callbacks of `train`."""


def train(
    run: Path,
    config: TrainConfig,
    version: Path,
    *,
    resume: bool = False,
    progress: Progress = no_progress,
    on_start: Callable[[], None] = do_nothing,
    on_saved: Callable[[], None] = do_nothing,
) -> Path:
    """Train with the resolved `config` on the dataset version in `version`; return the best generator's file.

    `run` is the folder to work in. `on_start` is called before data are read, unless the run resumes;
    `on_saved` after each checkpoint.

    Raises:
        TrainingError: the loss or the weights are not finite, memory runs out, or a tracker cannot start.
        StoppedError: on SIGTERM, SIGINT or SIGHUP, after saving.
        CheckpointError: `run` holds checkpoints and `resume` is not set; or they are of another configuration or
            another number of processes.
    """
    # Choose the device and find where to start.
    device = torch.device(config.device)
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)  # streams and graphs then use it by default
        torch.backends.cudnn.benchmark = True  # all batches have one shape: cuDNN times its algorithms once
    rank, processes = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    resume_point = checkpoint.find_resume_point(run / "checkpoints", config, processes, resume)
    if resume_point is None:
        on_start()

    # Load the data and make the networks.
    pairs = data.load_pairs(version, "train", config.direction, device, config.neighbours)
    sampled_pairs, validation_pairs = _load_validation(version, config, pairs, device)
    with _out_of_memory_as_user_error("before the first step", "a smaller width"):
        trainer, start = Trainer(config, device), 0
        if resume_point is not None:
            saved, tensors = resume_point
            trainer.load_state_dict(tensors, saved.path)
            start = saved.step
            log.info("resuming from %s", saved.path)
            del tensors
    del resume_point  # it holds a second copy of all tensors
    metrics_log = MetricsLog(run, config, trainer, start, config.batch_size * processes) if rank == 0 else None
    sample_steps = {round((n + 1) * config.steps / config.samples) for n in range(config.samples)}

    closed_on_error = nullcontext() if metrics_log is None else metrics_log.closed_on_error()
    suggestion = f"batch_size {config.batch_size // 2}" if config.batch_size > 1 else "a smaller width or side"
    out_of_memory = _out_of_memory_as_user_error(f"at batch_size {config.batch_size}", suggestion)
    with closed_on_error, out_of_memory, catch_signals() as received:
        for step in range(start, config.steps):
            first_pair = (step * processes + rank) * config.batch_size
            losses = trainer.step(*data.draw_batch(pairs, config, first_pair), config.lr_at(step))

            steps_done = step + 1
            last_step = steps_done == config.steps
            stop_signal = _any_rank_signal(received)
            progress("train", steps_done, config.steps, "steps")

            # Every `log_every` steps: log the losses.
            if metrics_log is not None:
                metrics_log.record(losses)
                if steps_done % config.log_every == 0 or last_step:
                    metrics_log.log_metrics(steps_done)

            # At the sample steps: draw samples.
            if metrics_log is not None and steps_done in sample_steps:
                with metrics_log.untimed():
                    name = f"step-{steps_done:08d}"
                    sheets = samples.draw_samples(trainer.ema_or_current, sampled_pairs, run / "samples", name)
                metrics_log.log_samples(steps_done, sheets)

            # Every `checkpoint_every` steps, at the end and when stopped: validate and save a checkpoint.
            if steps_done % config.checkpoint_every == 0 or last_step or stop_signal:
                state = trainer.state_dict()  # collective: every process must call it
                _check_finite(losses, state, steps_done, run)
                if metrics_log is not None:
                    with metrics_log.untimed():
                        # A stopped process may be killed within seconds: save without validating.
                        scores = {} if stop_signal or validation_pairs is None else validate(trainer, validation_pairs)
                        record = {"step": steps_done, "config": config.model_dump(mode="json"), "validation": scores}
                        path = checkpoint.checkpoint_path(run / "checkpoints", steps_done)
                        checkpoint.save(path, state, record | {"processes": processes})
                        checkpoint.prune_checkpoints(run / "checkpoints", config.keep)
                    metrics_log.log_validation(steps_done, scores)
                    with metrics_log.untimed():
                        on_saved()

            # Stop if any process received a signal, including one that came while the last checkpoint was saved.
            if stop_signal or (last_step and received):
                message = f"stopped at step {steps_done} of {config.steps} and saved in {run}; continue with --resume"
                raise StoppedError(message, stop_signal or received[0])

    if metrics_log is not None:
        with metrics_log.closed_on_error():
            recorded = {"normalisation": metadata.normalisation_of(version), "slice_shape": pairs.shape}
            recorded |= metadata.licence_of(version)
            save_best_generator(run, config, planes.summarise(version, pairs), recorded)
            metrics_log.log_generator(run / GENERATOR_FILE)
            metrics_log.close()
    return run / GENERATOR_FILE


def validate(trainer: Trainer, pairs: Pairs) -> dict[str, float]:
    """Means over the subjects of `pairs`, on whole slices: `mae`, `psnr` (dB) and `ssim`."""
    predict = generator.as_predictor(trainer.ema_or_current)

    def generate(source: Tensor, position: Tensor) -> Tensor:
        with trainer.autocast():  # only generating: SSIM computed in bf16 is wrong by up to 0.03
            return predict(source, position)

    means = evaluate.validation_scores(pairs, generate)[["mae", "psnr", "ssim"]].mean()
    return {str(k): float(v) for k, v in means.items()}


def save_best_generator(
    run: Path, config: TrainConfig, trained_on: PlaneSummary | None, recorded: Mapping[str, Any]
) -> None:
    """Write the generator with the best validation (without validation: the last) to a file of its own.

    The file holds all that synthesis needs: the weights, the configuration, the source and the slice offset of each
    input channel, the geometry of the training planes, and what is `recorded` of the dataset: its normalisation, the
    shape of its slices, and its licence and credit, under which it may be passed on.

    Raises:
        CheckpointError: the run has no valid checkpoint.
    """
    best = checkpoint.best_checkpoint(run / "checkpoints")
    if best is None:
        raise CheckpointError(f"{run / 'checkpoints'} has no valid checkpoint; train again")
    weights = generator_weights(checkpoint.load(best.path)[0])
    record = {"step": best.step, "config": config.model_dump(mode="json"), "validation": best.validation}
    record |= {"channels": config.channels, "planes": trained_on.model_dump(mode="json") if trained_on else None}
    checkpoint.save(run / GENERATOR_FILE, weights, {**record, **recorded})


def _load_validation(
    version: Path, config: TrainConfig, pairs: Pairs, device: torch.device
) -> tuple[Pairs, Pairs | None]:
    """Pairs for samples and for validation: the validation split; if it is empty, the training split and None."""
    try:
        held_out = data.load_pairs(version, "val", config.direction, device, config.neighbours)
    except errors.EmptySplitError as error:
        log.warning("%s: no validation; the last checkpoint counts as the best, and samples show training data", error)
        return pairs, None
    return held_out, held_out


def _check_finite(losses: Tensor, state: Mapping[str, Tensor], step: int, run: Path) -> None:
    """Raise `TrainingError` unless the losses and the weights are finite.

    The losses are those before the weights were updated: a step that ruins the weights shows only in the weights.
    """
    weights = [t for name, t in state.items() if t.is_floating_point() and "_optimizer." not in name]
    for what, values in (("the loss is", [losses]), ("the weights are", weights)):
        if not torch.stack([torch.isfinite(v).all() for v in values]).all():
            best = checkpoint.best_checkpoint(run / "checkpoints")
            last = f"the last good checkpoint is {best.path}" if best else "there is no checkpoint yet"
            raise TrainingError(f"{what} not finite at step {step}; {last}; try a lower lr, or precision fp32")


def _any_rank_signal(received: list[int]) -> int:
    """The number of the signal that this or any other process received, or 0.

    Processes wait for each other's gradients, so all must stop at the same step.
    """
    number = received[0] if received else 0
    if not distributed.is_initialized():
        return number
    highest = torch.tensor(number)  # on the CPU, so that nothing waits for a GPU
    distributed.all_reduce(highest, distributed.ReduceOp.MAX)
    return int(highest)


@contextmanager
def _out_of_memory_as_user_error(when: str, smaller: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # includes torch.OutOfMemoryError; the CPU allocator has no class of its own
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise TrainingError(f"out of memory {when}; try {smaller}") from error
