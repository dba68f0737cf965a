"""Cases of training: one step of ours and of the reference on this CPU, their loss curves, and the time of commands."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.reference import BATCH_NORM, INSTANCE_NORM, Pix2PixModel

Work = Callable[[], dict[str, Any]]
WARM_UP = 2
LR = 2e-4


def batches(count: int, batch: int, side: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Smooth random images in [-1, 1] and what is to be generated from them: the inverse, blurred."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        coarse = torch.rand(batch, 1, side // 16, side // 16, generator=generator) * 2 - 1
        source = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
        target = -torch.nn.functional.avg_pool2d(source, 5, 1, 2)
        made.append((source, target))
    return made


def our_step(batch: int, side: int, width: int, times: int) -> Work:
    """`Learner.step` as a training on this CPU takes it: median of `times` steps."""
    from model.config import preset
    from model.cpu import keep_freed_memory
    from model.learner import Learner
    from model.run import _precision

    keep_freed_memory()  # as `model.train.train` does
    settings = {"batch_size": batch, "side": side, "width": width, "discriminator_width": width}
    config = preset("paper", device="cpu", precision=_precision("cpu"), **settings)
    learner = Learner(config, torch.device("cpu"))
    return _steps(lambda source, target: float(learner.step(source, target, LR)[3]), batch, side, times)


def reference_step(batch: int, side: int, width: int, times: int, norm: str = "batch") -> Work:
    """`optimize_parameters` in float32, as published."""
    torch.manual_seed(0)
    layer = BATCH_NORM if norm == "batch" else INSTANCE_NORM
    model = Pix2PixModel(layer, num_downs=side.bit_length() - 1, width=width)

    def step(source: Tensor, target: Tensor) -> float:
        model.set_input(source, target)
        model.optimize_parameters()
        return float(model.loss_G.detach())

    return _steps(step, batch, side, times)


def _steps(step: Callable[[Tensor, Tensor], float], batch: int, side: int, times: int) -> Work:
    images = batches(WARM_UP + times, batch, side)
    for source, target in images[:WARM_UP]:
        step(source, target)

    def work() -> dict[str, Any]:
        taken, losses = [], []
        for source, target in images[WARM_UP:]:
            start = time.perf_counter()
            losses.append(step(source, target))
            taken.append(time.perf_counter() - start)
        return {"seconds": median(taken), "losses": losses}

    return work


def curves(whose: str, seed: int, steps: int, side: int, width: int) -> Work:
    """The reconstruction loss of each step, of the same batches, at batch size 1; the seed draws weights and dropout.

    Both begin with the same weights of a seed.
    """
    from model.config import TrainConfig
    from model.learner import Learner
    from model.run import _precision

    images = batches(steps, 1, side, seed=1)
    settings = {"side": side, "width": width, "discriminator_width": width, "seed": seed, "device": "cpu"}
    precision = _precision("cpu") if whose == "ours" else "fp32"
    learner = Learner(TrainConfig.model_validate(settings | {"precision": precision}), torch.device("cpu"))
    reference = Pix2PixModel(INSTANCE_NORM, num_downs=side.bit_length() - 1, width=width)
    assert learner.discriminator is not None
    with torch.no_grad():
        for ours, theirs in ((learner.generator, reference.netG), (learner.discriminator, reference.netD)):
            for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
                other.copy_(mine)

    def work() -> dict[str, Any]:
        losses = []
        for source, target in images:
            if whose == "ours":
                losses.append(float(learner.step(source, target, LR)[5]))
            else:
                reference.set_input(source, target)
                reference.optimize_parameters()
                losses.append(float(reference.loss_G_L1.detach()) / reference.lambda_L1)
        return {"losses": losses}

    return work


def command(arguments: list[str]) -> Work:
    """`ixi-etl` with these arguments, from the start of the process to its end."""

    def work() -> dict[str, Any]:
        line = [sys.executable, "-m", "flows", *arguments]
        done = subprocess.run(line, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "120"})
        return {"lines": len(done.stdout.splitlines())}

    return work
