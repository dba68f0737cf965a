"""Do our generators equal those of the published recipe? Both train on the same pairs and are measured by subject.

The data are simulated: heads of the project's phantom, each of its own proportions, at half of IXI's resolution. Both
sides train the same networks for the same steps of one pair, in the same order. At this batch size the batch norm of
the publication normalises each image by itself, so the instance norm of `model` is the same function.

Both generators are measured as `ixi-etl evaluate` does: with dropout off, which is how `model` generates, and with
dropout on, as the publication generates.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from benchmarks import inputs
from benchmarks.measure import Measured, Row, Settings, alternate, speed_row

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks import reference
    from model.config import TrainConfig
    from model.data import Pairs
    from model.generator import Predictor

Work = Callable[[], dict[str, Any]]
Step = Callable[["Tensor", "Tensor"], object]

CASES = "benchmarks.quality:"
SEEDS = (0, 1, 2, 3)
"""The quality of one training depends on its seed as much as on anything here: two seeds can agree by chance."""
PEER = "plain PyTorch, fp32, batch norm"
OFF, ON = "dropout off", "dropout on"
UNITS = {"psnr": " dB", "ssim": ""}
MASKS = ("whole", "head")
SPLIT = (0.7, 0.0, 0.3)
TIMES_FASTER = 2.0


def quality(settings: Settings) -> list[Row]:
    """Quality, time and memory of generators trained by `model` and by plain PyTorch, with the same seeds."""
    folder = Path(settings.folder)
    subjects, shrink = (8, 4) if settings.quick else (24, 2)
    side, width, steps = (64, 8, 10) if settings.quick else (128, 64, 800)
    source = str(inputs.different_heads(folder, subjects, shrink))
    root = str(inputs.scratch_folder(folder, "quality"))
    ((made,),) = alternate(1, (CASES + "prepare", {"source": source, "root": root}))
    shared = {"version": made.result["version"], "side": side, "width": width, "steps": steps}
    runs = alternate(1, *((CASES + case, shared | {"seed": seed}) for seed in SEEDS for case in ("ours", "theirs")))
    ours, theirs = ([run for (run,) in runs[first::2]] for first in (0, 1))
    what = f"quality, {steps} steps, side {side}, width {width}"
    counts = ours[0].result
    data = f"simulated; trained on {counts['trained_on']} subjects, tested on {counts['tested_on']}"
    mine, other = (max(run.result["peak_mb"] for run in case) for case in (ours, theirs))
    note = f"of the whole process; {data}"
    return [
        *(quality_row(what, name, mask, ours, theirs) for name in UNITS for mask in MASKS),
        speed_row(f"{what}: training", PEER, theirs, ours, TIMES_FASTER),
        Row(
            what + ": peak memory", PEER, f"{mine:.0f} MB", f"{other:.0f} MB", f"{mine / other:.2f} x", "-", None, note
        ),
    ]


def quality_row(what: str, name: str, mask: str, ours: list[Measured], theirs: list[Measured]) -> Row:
    """A row that compares a measure of both, with dropout off: the mean over the seeds, of the mean over subjects.

    Ours must be no worse than the peer's by more than the peer's seeds differ. The spread of ours does not count: noise
    of our own must not help.
    """

    def by_subject(runs: list[Measured], dropout: str) -> list[list[float]]:
        return [run.result["scores"][dropout][mask][name] for run in runs]

    def values(runs: list[Measured], dropout: str) -> list[float]:
        return [fmean(scores) for scores in by_subject(runs, dropout)]

    def shown(numbers: list[float]) -> str:
        return ", ".join(f"{number:.{digits}f}" for number in numbers)

    unit, digits = UNITS[name], 2 if name == "psnr" else 4
    mine, other = values(ours, OFF), values(theirs, OFF)
    spread = max(other) - min(other)
    mine_of_subjects, others = ([fmean(n) for n in zip(*by_subject(r, OFF), strict=True)] for r in (ours, theirs))
    paired = [a - b for a, b in zip(mine_of_subjects, others, strict=True)]
    better = fmean(paired)
    note = f"mean paired difference by subject {better:+.{digits}f}{unit}"
    note += f", ours is better for {sum(x > 0 for x in paired)} of {len(paired)}"
    note += f"; seeds: {shown(mine)}, the peer's {shown(other)}"
    note += f"; {ON}: {shown(values(ours, ON))}, the peer's {shown(values(theirs, ON))}"
    return Row(
        f"{what}: {name.upper()}, {mask}",
        PEER,
        shown([fmean(mine)]) + unit,
        shown([fmean(other)]) + unit,
        f"{better:+.{digits}f}{unit}",
        f"-{spread:.{digits}f}{unit}, the peer's seeds",
        better >= -spread,
        note,
    )


def prepare(source: str, root: str) -> Work:
    """Publish a version as by default, with a larger test split."""

    def work() -> dict[str, Any]:
        from ixi_etl.config import DatasetConfig, RefreshConfig
        from ixi_etl.recipes.ixi import refresh

        dataset = DatasetConfig(split=SPLIT, pictures=False)
        return {"version": str(refresh(RefreshConfig(root=root, source=source, dataset=dataset, workers=2)).folder)}

    return work


def ours(version: str, side: int, width: int, steps: int, seed: int) -> Work:
    """Train with `model` as `ixi-etl train` does on this CPU, and measure the generator."""
    import torch

    from model.devices import default_precision, keep_freed_memory
    from model.generator import as_predictor
    from model.trainer import Trainer

    keep_freed_memory()
    config = _config(side, width, steps, seed, default_precision("cpu"))
    trainer = Trainer(config, torch.device("cpu"))
    predictors = {OFF: as_predictor(trainer.generator), ON: as_predictor(trainer.generator, dropout=True)}
    return _train_and_measure(
        version, config, lambda source, target: trainer.step(source, target, config.lr), predictors
    )


def theirs(version: str, side: int, width: int, steps: int, seed: int) -> Work:
    """Train the published networks with plain PyTorch, and measure the generator."""
    import torch

    from benchmarks import reference

    torch.manual_seed(seed)
    trainer = reference.Trainer(side, width, "batch")
    predictors = {OFF: _reference_predictor(trainer, dropout=False), ON: _reference_predictor(trainer, dropout=True)}
    return _train_and_measure(version, _config(side, width, steps, seed, "fp32"), trainer.step, predictors)


def _config(side: int, width: int, steps: int, seed: int, precision: str) -> TrainConfig:
    from model.config import preset

    widths = {"width": width, "discriminator_width": width}
    return preset("paper", side=side, steps=steps, seed=seed, device="cpu", precision=precision, **widths)


def _reference_predictor(trainer: reference.Trainer, *, dropout: bool) -> Predictor:
    """One image at a time, with the batch norm in training mode, as the publication generates."""
    import torch
    from torch import nn

    def predict(source: Tensor, _position: Tensor) -> Tensor:
        network = trainer.generator.train()
        for layer in network.modules():
            if isinstance(layer, nn.Dropout):
                layer.train(dropout)
        return torch.cat([network(image) for image in source.split(1)])

    return predict


def _train_and_measure(version: str, config: TrainConfig, step: Step, predictors: dict[str, Predictor]) -> Work:
    """Train on the training split; only this is timed. Then measure the predictors on the test split."""
    from model.data import draw_batch, load_pairs

    train, test = (load_pairs(Path(version), split) for split in ("train", "test"))

    def work() -> dict[str, Any]:
        start = time.perf_counter()
        for number in range(config.steps):
            step(*draw_batch(train, config, number * config.batch_size))
        taken = time.perf_counter() - start
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        counts = {"trained_on": len(train.subjects), "tested_on": len(test.subjects)}
        return {"seconds": taken, "peak_mb": peak_mb, "scores": _scores(test, predictors), **counts}

    return work


def _scores(test: Pairs, predictors: dict[str, Predictor]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Scores of the subjects, [predictor][mask][measure][subject]."""
    import torch

    from model.evaluate import measure

    torch.manual_seed(0)  # of the dropout
    table = measure(test, predictors, protocols=("ours",))
    return {
        str(method): {str(mask): {name: part[name].tolist() for name in UNITS} for mask, part in rows.groupby("mask")}
        for method, rows in table.groupby("method")
    }
