"""Cases of training on this CPU: a step of `model` and of plain PyTorch, their loss curves, the time of commands."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks import reference
from benchmarks.reference import Norm

if TYPE_CHECKING:
    from model.trainer import Trainer

Work = Callable[[], dict[str, Any]]
WARM_UP = 2
LR = 2e-4


def batches(count: int, batch: int, side: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Pairs of images in [-1, 1]: sources are smooth and random, targets their negative, blurred."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        coarse = torch.rand(batch, 1, side // 16, side // 16, generator=generator) * 2 - 1
        source = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
        target = -torch.nn.functional.avg_pool2d(source, 5, 1, 2)
        made.append((source, target))
    return made


def our_step(batch: int, side: int, width: int, times: int) -> Work:
    """`Trainer.step` as `ixi-etl train` runs it on this CPU: median of `times` steps."""
    from model.config import preset
    from model.devices import default_precision, keep_freed_memory
    from model.trainer import Trainer

    keep_freed_memory()  # as `ixi-etl train` does
    settings = {"batch_size": batch, "side": side, "width": width, "discriminator_width": width}
    config = preset("paper", device="cpu", precision=default_precision("cpu"), **settings)
    trainer = Trainer(config, torch.device("cpu"))
    return _steps(lambda source, target: float(trainer.step(source, target, LR)[3]), batch, side, times)


def reference_step(batch: int, side: int, width: int, times: int, norm: Norm = "batch") -> Work:
    """`benchmarks.reference.Trainer.step`, in float32: median of `times` steps."""
    torch.manual_seed(0)
    trainer = reference.Trainer(side, width, norm)
    return _steps(lambda source, target: float(trainer.step(source, target).l1), batch, side, times)


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


def copy_weights(ours: Trainer, theirs: reference.Trainer) -> None:
    """Give both networks of `theirs` the weights of `ours`; they must have equal sizes."""
    assert ours.discriminator is not None
    with torch.no_grad():
        for mine, other in ((ours.generator, theirs.generator), (ours.discriminator, theirs.discriminator)):
            for weight, copy in zip(mine.parameters(), other.parameters(), strict=True):
                copy.copy_(weight)


def curves(implementation: str, seed: int, steps: int, side: int, width: int) -> Work:
    """The L1 loss of each step on the same batches at batch size 1; the seed draws the weights and the dropout.

    `implementation` is `ours` or `reference`. Both start from the same weights where their seeds are equal.
    """
    from model.config import TrainConfig
    from model.devices import default_precision
    from model.trainer import Trainer

    images = batches(steps, 1, side, seed=1)
    settings = {"side": side, "width": width, "discriminator_width": width, "seed": seed, "device": "cpu"}
    precision = default_precision("cpu") if implementation == "ours" else "fp32"
    ours = Trainer(TrainConfig.model_validate(settings | {"precision": precision}), torch.device("cpu"))
    theirs = reference.Trainer(side, width, "instance")
    copy_weights(ours, theirs)

    def step(source: Tensor, target: Tensor) -> float:
        if implementation == "ours":
            return float(ours.step(source, target, LR)[5])
        return float(theirs.step(source, target).l1)

    def work() -> dict[str, Any]:
        return {"losses": [step(source, target) for source, target in images]}

    return work


def command(arguments: list[str]) -> Work:
    """`ixi-etl` with these arguments, from the start of its process to its end."""

    def work() -> dict[str, Any]:
        line = [sys.executable, "-m", "flows", *arguments]
        done = subprocess.run(line, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "120"})
        return {"lines": len(done.stdout.splitlines())}

    return work
