"""Log a training run: a line of losses every `log_every` steps, metrics.csv, validation.csv, and its trackers."""

from __future__ import annotations

import csv
import logging
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ixi_etl.core.files import write_atomic
from ixi_etl.errors import StoppedError
from model.config import TrainConfig
from model.trackers import Trackers
from model.trainer import LOSSES, Trainer

log = logging.getLogger(__name__)

METRICS, VALIDATION = "metrics.csv", "validation.csv"
SPEED = ("lr", "ms_per_step", "images_per_s", "peak_memory_mb")


class MetricsLog:
    """The metrics of one training process, which starts after `start` steps.

    Rows of steps after `start`, left by an interrupted process, are removed: these steps are about to be repeated.

    Raises:
        TrainingError: a tracker cannot start.
    """

    def __init__(self, run: Path, config: TrainConfig, trainer: Trainer, start: int, images_per_step: int) -> None:
        self.run, self.config, self.trainer, self.images_per_step = run, config, trainer, images_per_step
        run.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, VALIDATION):
            _truncate_after(run / name, start)
        self.trackers = Trackers(run, config, start)
        self._sums = torch.zeros(len(LOSSES), device=trainer.device)
        if trainer.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.device)  # exclude earlier training runs of this process
        self._since, self._steps = time.perf_counter(), 0

    def record(self, losses: Tensor) -> None:
        """Add the losses (6,) of one step to the running sums; nothing is read back from the device."""
        self._sums += losses
        self._steps += 1

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Exclude the block from step timing."""
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize(self.trainer.device)  # steps that are still running count as training
        entered = time.perf_counter()
        yield
        self._since += time.perf_counter() - entered

    def log_metrics(self, step: int) -> None:
        """Log the mean losses since the last call, and the speed."""
        means = dict(zip(LOSSES, (self._sums / self._steps).tolist(), strict=True))  # waits for the device
        now = time.perf_counter()
        seconds = (now - self._since) / self._steps
        left = time.strftime("%H:%M:%S", time.gmtime(seconds * (self.config.steps - step)))
        speed = (self.config.lr_at(step - 1), seconds * 1e3, self.images_per_step / seconds, self._peak_memory_mb())
        log.info(
            "step %d/%d  loss_d %.3f (real %.3f, fake %.3f)  loss_g %.3f (adversarial %.3f, %s %.4f)  "
            "%.1f ms/step  %.1f images/s  %s left  %.0f MB peak",
            *(step, self.config.steps, *list(means.values())[:5], self.config.reconstruction),
            *(means["loss_g_reconstruction"], speed[1], speed[2], left, speed[3]),
        )
        row = means | dict(zip(SPEED, speed, strict=True))
        _append(self.run / METRICS, {"step": step, **row})
        self.trackers.log_scalars(step, row)
        self._sums.zero_()
        self._since, self._steps = now, 0  # the time of this call counts: a GPU waits meanwhile

    def _peak_memory_mb(self) -> float:
        """Peak memory of this training run on a GPU; on a CPU, of the process."""
        if self.trainer.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.trainer.device) / 1e6
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6

    def log_validation(self, step: int, scores: Mapping[str, float]) -> None:
        """Log mae, psnr and ssim of the validation split; nothing if `scores` is empty."""
        if not scores:
            return
        log.info("step %d  validation: MAE %.4f, PSNR %.2f dB, SSIM %.4f", *(step, *scores.values()))
        _append(self.run / VALIDATION, {"step": step, **scores})
        self.trackers.log_scalars(step, {f"validation/{name}": value for name, value in scores.items()})

    def log_samples(self, step: int, sheets: Sequence[Path]) -> None:
        """Show the sample sheets in the trackers."""
        self.trackers.log_images(step, {sheet.stem.split("-")[-1]: sheet for sheet in sheets})
        log.info("step %d  samples: %s", step, sheets[0])

    def log_generator(self, path: Path) -> None:
        """Give the trackers a copy of the best generator's file."""
        self.trackers.log_file(path)

    def close(self) -> None:
        """End a training that is complete."""
        self.trackers.close("finished")

    @contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """End the run at the trackers if an error or a signal ends the block."""
        try:
            yield
        except BaseException as error:
            self.trackers.close("stopped" if isinstance(error, StoppedError) else "failed")
            raise


def _append(path: Path, row: Mapping[str, float]) -> None:
    is_new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def _truncate_after(path: Path, step: int) -> None:
    """Remove the rows of steps after `step`, and an incomplete last row.

    A file with an incomplete header or invalid rows, as a full disk or a crash leaves it, is removed.
    """
    if not path.exists():
        return
    try:
        header, *rows = path.read_text().splitlines(keepends=True) or [""]
        if not (header.startswith("step,") and header.endswith("\n")):
            raise ValueError("its header is incomplete")
        kept = [row for row in rows if row.endswith("\n") and int(row.split(",")[0]) <= step]
    except ValueError as error:  # includes UnicodeDecodeError
        log.warning("%s is damaged and is replaced by a new file (%s)", path, error)
        path.unlink()
        return
    write_atomic(path, header + "".join(kept))
