"""The trainings of the protocol study and their scores; `benchmarks.protocols` makes the tables of them.

Legend: B, H, W are batch, height, width.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context

import pandas as pd
import torch
from torch import Tensor

from benchmarks.folds import start_worker
from benchmarks.protocol_data import BY_SUBJECT, OWN_TEST, SPLITS, Dataset
from ixi_etl.core.progress import no_progress
from model.baselines import baselines
from model.config import TrainConfig, preset
from model.data import Pairs, draw_batch
from model.evaluate import GENERATED, measure
from model.generator import Predictor, as_predictor
from model.scores import average_maps, error_maps, score_subjects
from model.subjects import generate_subjects
from model.trainer import Trainer

SEEDS = (0, 1)
ERRORS_MM = (0.0, 0.5, 1.0, 2.0, 4.0)
WHOLE, HEAD = "whole", "head"
REGIONS = {WHOLE: (1.0, 1.0), "192 x 192": (0.75, 0.75), "256 x 152": (1.0, 152 / 256), "128 x 128": (0.5, 0.5)}
"""Centre crops: shares of the height and of the width, named for slices of 256 x 256. SynDiff has 256 x 152."""


@dataclass(frozen=True)
class Budget:
    """How much data, and how long each training is.

    Attributes:
        subjects: in train, and as many in test.
        slices: of each subject.
        shrink: divides the number of voxels along each axis of a scan.
    """

    subjects: int = 8
    slices: int = 12
    shrink: int = 1
    side: int = 256
    width: int = 16
    steps: int = 600

    def config(self, seed: int) -> TrainConfig:
        """The published recipe with smaller networks, in float32 on every CPU, so that scores differ little."""
        widths = {"width": self.width, "discriminator_width": self.width}
        return preset("paper", side=self.side, steps=self.steps, seed=seed, device="cpu", precision="fp32", **widths)


@dataclass(frozen=True)
class Training:
    """One generator: which of `SPLITS` it is trained on, the error of its pairs, and its seed."""

    split: str
    error_mm: float
    seed: int

    @property
    def is_plain(self) -> bool:
        """Whether it is split by subject and without error, as this project's data are by default."""
        return (self.split, self.error_mm) == (BY_SUBJECT, 0)


CHOSEN = [
    *((BY_SUBJECT, error_mm) for error_mm in ERRORS_MM),
    *((split, 0.0) for split in SPLITS if split != BY_SUBJECT),
]
TRAININGS = tuple(Training(split, error_mm, seed) for seed in SEEDS for split, error_mm in CHOSEN)


@dataclass(frozen=True)
class Scores:
    """Rows by subject, with the columns `seed`, `split` and `error_mm`, and further ones.

    Attributes:
        regions: of all trainings, from `score_regions`, and `test_on`: the name of the test set.
        metrics: of plain trainings, from `model.evaluate.measure`: all protocols, and baselines.
    """

    regions: pd.DataFrame
    metrics: pd.DataFrame


def run_all(dataset: Dataset, budget: Budget, workers: int) -> Scores:
    """The scores of all trainings, `workers` of them at a time with a core each."""
    run = partial(run_training, dataset=dataset, budget=budget)
    if workers == 1:
        start_worker()
        parts = list(map(run, TRAININGS))
    else:
        with ProcessPoolExecutor(workers, get_context("spawn"), start_worker) as pool:
            parts = list(pool.map(run, TRAININGS))
    regions, metrics = ([getattr(part, name) for part in parts] for name in ("regions", "metrics"))
    return Scores(pd.concat(regions, ignore_index=True), pd.concat(metrics, ignore_index=True))


def run_training(training: Training, dataset: Dataset, budget: Budget) -> Scores:
    """Train and score one generator."""
    train = dataset.training_set(training.split, training.error_mm)
    tests = dataset.test_sets(training.split, training.error_mm)
    config = budget.config(training.seed)
    trainer = Trainer(config, torch.device("cpu"))
    for step in range(config.steps):
        losses = trainer.step(*draw_batch(train, config, step * config.batch_size), config.lr_at(step))
    print(f"{training}: {len(train)} pairs, L1 {losses[5]:.3f}", flush=True)
    predict = as_predictor(trainer.generator)
    regions = [score_regions(test, predict).assign(test_on=name) for name, test in tests.items()]
    metrics = pd.DataFrame()
    if training.is_plain:
        others = baselines(train) if training.seed == SEEDS[0] else {}  # they have no seed
        metrics = measure(tests[OWN_TEST], {GENERATED: predict} | others)
    return Scores(*(table.assign(**asdict(training)) for table in (pd.concat(regions), metrics)))


def score_regions(pairs: Pairs, predict: Predictor) -> pd.DataFrame:
    """PSNR and SSIM over regions of the slices, as the protocol `ours` defines them: only the pixels that count differ.

    A row per subject and region: `REGIONS` and `HEAD`. `share` is that of the pixels.
    """
    rows = []
    for subject_id, by_method in generate_subjects(pairs, {GENERATED: predict}, no_progress):
        subject = by_method[GENERATED]
        generated, target = (torch.from_numpy(x).unsqueeze(1) for x in (subject.generated, subject.target))
        maps = error_maps(generated, target)
        size = target.shape[-2:]
        masks = {name: centre_crop(size, *shares).expand(target.shape) for name, shares in REGIONS.items()}
        masks[HEAD] = torch.from_numpy(subject.head).unsqueeze(1)
        for region, mask in masks.items():
            scores = score_subjects(average_maps(maps, mask), torch.zeros(len(target), dtype=torch.long), 1)
            row = {"subject_id": subject_id, "region": region, "share": float(mask.float().mean())}
            rows.append(row | {name: float(scores[name]) for name in ("psnr", "ssim")})
    return pd.DataFrame(rows)


def centre_crop(size: Sequence[int], height: float, width: float) -> Tensor:
    """Mask (H, W) of the centre crop with these shares of the height and of the width."""
    mask = torch.zeros(size, dtype=torch.bool)
    (top, rows), (left, columns) = (
        ((full - kept) // 2, kept)
        for full, kept in zip(size, (round(size[0] * height), round(size[1] * width)), strict=True)
    )
    mask[top : top + rows, left : left + columns] = True
    return mask
