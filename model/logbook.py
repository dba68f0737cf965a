"""What a training says of itself: a line now and then, metrics.csv, validation.csv, TensorBoard."""

from __future__ import annotations

import csv
import logging
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ixi_etl.files import write_atomic
from model.config import TrainConfig
from model.learner import LOSSES, Learner

log = logging.getLogger(__name__)

METRICS, VALIDATION = "metrics.csv", "validation.csv"
SPEED = ("lr", "ms_per_step", "images_per_s", "peak_memory_mb")


class Logbook:
    """Of one process's training, from step `start`; what an earlier process wrote of later steps is struck out."""

    def __init__(self, run: Path, config: TrainConfig, learner: Learner, start: int, images_a_step: int) -> None:
        self.run, self.config, self.learner, self.images_a_step = run, config, learner, images_a_step
        run.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, VALIDATION):
            _strike_out(run / name, start)
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)
        self._sums = torch.zeros(len(LOSSES), device=learner.device)
        if learner.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(learner.device)  # an earlier training of this process had its own
        self._since, self._added = time.perf_counter(), 0

    def add(self, losses: Tensor) -> None:
        """Of one step; nothing is read back from the device."""
        self._sums += losses
        self._added += 1

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done in the block is no training, and does not count into ms a step."""
        if self.learner.device.type == "cuda":
            torch.cuda.synchronize(self.learner.device)  # the steps that it still works on are training
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def line(self, step: int) -> None:
        """Log the means since the last line."""
        means = dict(zip(LOSSES, (self._sums / self._added).tolist(), strict=True))  # waits for the device
        now = time.perf_counter()
        seconds = (now - self._since) / self._added
        left = time.strftime("%H:%M:%S", time.gmtime(seconds * (self.config.steps - step)))
        speed = (self.config.lr_at(step - 1), seconds * 1e3, self.images_a_step / seconds, self._peak_memory_mb())
        log.info(
            "step %d/%d  loss_d %.3f (real %.3f, fake %.3f)  loss_g %.3f (adversarial %.3f, %s %.4f)  "
            "%.1f ms/step  %.1f images/s  %s left  %.0f MB peak",
            *(step, self.config.steps, *list(means.values())[:5], self.config.reconstruction),
            *(means["loss_g_reconstruction"], speed[1], speed[2], left, speed[3]),
        )
        row = means | dict(zip(SPEED, speed, strict=True))
        _append(self.run / METRICS, {"step": step, **row})
        for name, value in row.items():
            self.board.add_scalar(name, value, step)
        self._sums.zero_()
        self._since, self._added = now, 0  # writing this line counts into the next: a GPU waits for it

    def _peak_memory_mb(self) -> float:
        """Of the device on a GPU, else of the process."""
        if self.learner.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.learner.device) / 1e6
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6

    def validation(self, step: int, found: Mapping[str, float]) -> None:
        """Log what validation found, if there was any."""
        if not found:
            return
        log.info("step %d  validation: MAE %.4f, PSNR %.2f dB, SSIM %.4f", *(step, *found.values()))
        _append(self.run / VALIDATION, {"step": step, **found})
        for name, value in found.items():
            self.board.add_scalar(f"validation/{name}", value, step)

    def images(self, step: int, sheets: Sequence[Path]) -> None:
        """Show the sample sheets."""
        for sheet in sheets:
            self.board.add_image(
                sheet.stem.split("-")[-1], np.asarray(Image.open(sheet).convert("RGB")), step, dataformats="HWC"
            )
        log.info("step %d  samples: %s", step, sheets[0])

    def close(self) -> None:
        self.board.close()


def _append(path: Path, row: Mapping[str, float]) -> None:
    fresh = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def _strike_out(path: Path, after: int) -> None:
    """Remove the rows of steps after `after`, which are about to be done again, and a row that was cut short.

    A file that a full disk or a crash left without a head, or with something else in it than rows, is started again.
    """
    if not path.exists():
        return
    try:
        head, *rows = path.read_text().splitlines(keepends=True) or [""]
        if not (head.startswith("step,") and head.endswith("\n")):
            raise ValueError("it has no whole head")
        kept = [row for row in rows if row.endswith("\n") and int(row.split(",")[0]) <= after]
    except ValueError as error:  # of which UnicodeDecodeError is one
        log.warning("%s is damaged, and is started again (%s)", path, error)
        path.unlink()
        return
    write_atomic(path, head + "".join(kept))
