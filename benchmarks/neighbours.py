"""Measure whether neighbouring slices as inputs, and another upsampling, give better generators::

    python -m benchmarks.neighbours --pairs FOLDER --person 'p\\d+' --out OUT   # leaving out one person at a time
    python -m benchmarks.neighbours --version FOLDER --out OUT                # trained and measured on its splits

A variant is a number of neighbours (0, 1, 2: also the slices below and above) and an upsampling (transpose, nearest).
All variants train for the same steps on the same targets in the same order, with each seed, and are measured as
`ixi-etl evaluate` does. `benchmarks.folds` makes the version of FOLDER's pairs, with as many margin slices as the
largest number of neighbours, so that the outermost targets have real neighbours too.

OUT receives `scores.csv` (a row per training and subject), `summary.csv` (means over people and seeds, differences from
0 neighbours with transposed convolutions, paired by person, with 95% intervals, and the time of a step), `sheets`, and
`trainings`, with which the same command continues where it was stopped.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks.folds import (
    PERSON,
    Grid,
    average_sessions,
    make_version,
    median_slice_mm,
    people_of,
    split_fold,
    start_worker,
    write_archives,
)
from ixi_etl.core.files import write_atomic
from ixi_etl.core.parallel import usable_cores
from ixi_etl.dataset import metadata
from ixi_etl.errors import ConfigError
from model.baselines import baselines
from model.config import TrainConfig, preset
from model.data import Pairs, draw_batch, load_pairs
from model.devices import default_precision, keep_freed_memory
from model.evaluate import GENERATED, compare, measure, summarise
from model.generator import as_predictor
from model.samples import draw_samples
from model.trainer import Trainer

NEIGHBOURS, UPSAMPLINGS, SEEDS = (0, 1, 2), ("transpose", "nearest"), (0, 1)
SHOWN = ("psnr", "ssim")
TIMED_STEPS = 10  # are timed together; a step of the median block is reported


@dataclass(frozen=True)
class Training:
    """One generator to train: on all but `person`, or on the training split if it is None."""

    config: TrainConfig
    person: str | None

    @property
    def variant(self) -> str:
        return f"neighbours {self.config.neighbours}, {self.config.upsampling}"

    @property
    def name(self) -> str:
        """The name of its files: with a hash of all settings that affect the weights."""
        return f"{self.person or 'test'}-{self.config.run_id}"

    @property
    def is_first(self) -> bool:
        """Whether it measures the baselines, which are the same for all trainings with the same data."""
        return (self.variant, self.config.seed) == (BASE, SEEDS[0])

    def load(self, version: Path) -> tuple[Pairs, Pairs]:
        """The pairs to train on, and those to test on."""
        config = self.config
        load = partial(load_pairs, version, direction=config.direction, neighbours=config.neighbours)
        if self.person is not None:
            return split_fold(load("train", device=config.device), self.person)
        return load("train", device=config.device), load("test", device=config.device)


BASE = Training(TrainConfig(neighbours=NEIGHBOURS[0], upsampling=UPSAMPLINGS[0]), None).variant


def trainings(version: Path, config: TrainConfig, by_person: bool, neighbours: Sequence[int]) -> list[Training]:
    """All trainings, those of a person together.

    Raises:
        ConfigError: there is only one person to train on and to test on.
    """
    people: list[str | None] = [None]
    if by_person:
        people = [*people_of(load_pairs(version, "train", config.direction))]
        if len(people) < 2:
            raise ConfigError(f"all pairs are of the person {people[0]}; give pairs of two or more people")
    chosen = product(people, SEEDS, neighbours, UPSAMPLINGS)
    return [
        Training(config.model_copy(update={"neighbours": n, "upsampling": upsampling, "seed": seed}), person)
        for person, seed, n, upsampling in chosen
    ]


def run_training(training: Training, version: Path, out: Path) -> pd.DataFrame:
    """Train and measure one generator: a row per subject, method and mask; kept in `out/trainings`.

    The time of a step is CPU time, as other processes share the cores, and elapsed time on a GPU. Sheets are drawn for
    the first seed. The result of an earlier call with the same settings is read again.
    """
    kept = out / "trainings" / f"{training.name}.csv"
    if kept.exists():
        return pd.read_csv(kept)
    config = training.config
    train, test = training.load(version)
    trainer = Trainer(config, torch.device(config.device))
    clock = time.process_time if config.device == "cpu" else time.perf_counter
    blocks = []
    for first in range(0, config.steps, TIMED_STEPS):
        start = clock()
        steps = range(first, min(first + TIMED_STEPS, config.steps))
        for step in steps:
            losses = trainer.step(*draw_batch(train, config, step * config.batch_size), config.lr_at(step))
        l1 = float(losses[5])  # waits for a GPU
        blocks.append((clock() - start) / len(steps))
    ms = 1000 * float(np.median(blocks))
    print(f"{training.name}: {training.variant}, seed {config.seed}: L1 {l1:.3f}, {ms:.0f} ms a step", flush=True)
    if config.seed == SEEDS[0]:
        draw_samples(trainer.generator, test, out / "sheets" / training.name, training.variant)
    methods = {GENERATED: as_predictor(trainer.generator)} | (baselines(train) if training.is_first else {})
    scores = measure(test, methods, protocols=("ours",)).replace({"method": {GENERATED: training.variant}})
    scores.insert(0, "seed", config.seed)
    scores["ms_per_step"] = np.where(scores["method"] == training.variant, ms, np.nan)
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(kept, scores.to_csv(index=False))
    return scores


def run_all(chosen: list[Training], version: Path, out: Path, workers: int) -> pd.DataFrame:
    """The scores of all trainings, `workers` of them at a time with a core each; also written to `scores.csv`."""
    run = partial(run_training, version=version, out=out)
    if workers == 1:
        start_worker()
        scores = pd.concat(map(run, chosen), ignore_index=True)
    else:
        with ProcessPoolExecutor(workers, get_context("spawn"), start_worker) as pool:
            scores = pd.concat(pool.map(run, chosen), ignore_index=True)
    scores.to_csv(out / "scores.csv", index=False)
    return scores


def summarise_variants(scores: pd.DataFrame) -> pd.DataFrame:
    """A row per mask and method: means over people, differences from `BASE`, and the time of a step.

    A person counts once: its sessions and seeds are averaged before. `psnr_better_by` is the mean over people of the
    difference from `BASE`, and `psnr_low_95`, `psnr_high_95` its 95% interval by Student's t. `psnr_seeds` has the mean
    difference of each seed: if seeds differ by more than the interval is wide, it is chance of the training. Likewise
    for `ssim`.
    """
    people = average_sessions(scores)
    table = summarise(people).set_index(["mask", "method"])
    table = table[["subjects", *(f"{name}_mean" for name in SHOWN)]].rename(columns={"subjects": "people"})
    by_seed = pd.concat(average_sessions(part).assign(seed=seed) for seed, part in scores.groupby("seed"))
    means = by_seed.groupby(["mask", "method", "seed"])[list(SHOWN)].mean()
    for method in people["method"].unique():
        if method == BASE:
            continue
        both = people[people["method"].isin([method, BASE])]
        for row in compare(both.replace({"method": {method: GENERATED}})).to_dict("records"):
            mask, name = row["mask"], row["measure"]
            if name in SHOWN:
                differences = (means[name][mask][method] - means[name][mask][BASE]).dropna().round(4)
                columns = {column: row[column] for column in ("better_by", "low_95", "high_95")}
                for column, value in (columns | {"seeds": " ".join(map(str, differences))}).items():
                    table.loc[(mask, method), f"{name}_{column}"] = value
    steps = scores.groupby("method")["ms_per_step"].median()
    table["ms_per_step"] = steps.reindex(table.index.get_level_values("method")).to_numpy()
    return table.sort_index(level="mask", sort_remaining=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--pairs", type=Path, help="folder of NAME_T1.nii.gz and NAME_T2.nii.gz")
    data.add_argument("--version", type=Path, help="folder of a published version")
    parser.add_argument("--out", type=Path, default=Path("neighbours"), help="folder to write into")
    parser.add_argument("--person", default=PERSON, help="with --pairs: regular expression of the person; %(default)s")
    parser.add_argument("--pixel-mm", type=float, default=0.9375, help="with --pairs; %(default)s")
    parser.add_argument("--slice-mm", type=float, help="with --pairs: slice distance; by default the median of the T2s")
    parser.add_argument("--slices", type=int, default=20, help="with --pairs: targets of each pair; %(default)s")
    parser.add_argument("--direction", help="for example t1+pd->t2; by default that of the dataset")
    parser.add_argument("--neighbours", type=int, nargs="+", default=NEIGHBOURS, help="to compare, besides 0; 1 2")
    parser.add_argument("--side", type=int, default=256, help="pixels of the crops, a power of two; %(default)s")
    parser.add_argument("--steps", type=int, default=1600, help="%(default)s")
    parser.add_argument("--batch-size", type=int, default=1, help="%(default)s")
    parser.add_argument("--width", type=int, default=16, help="of both networks, published: 64; %(default)s")
    parser.add_argument("--device", default="cpu", help="%(default)s")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="trainings at a time; %(default)s")
    given = parser.parse_args()
    keep_freed_memory()
    neighbours = sorted({NEIGHBOURS[0], *given.neighbours})
    version = given.version
    if given.pairs is not None:
        grid = Grid(given.side, given.pixel_mm, given.slice_mm or median_slice_mm(given.pairs))
        write_archives(given.pairs, given.person, grid, given.out / "archives")
        version = make_version(given.out / "archives", given.out / "data", given.slices, max(neighbours))
    given.out.mkdir(parents=True, exist_ok=True)
    config = preset(
        "paper",
        dataset=f"{metadata.read_metadata(version)['name']}@{version.name}",
        direction=given.direction,
        side=given.side,
        steps=given.steps,
        batch_size=given.batch_size,
        width=given.width,
        discriminator_width=given.width,
        device=given.device,
        precision=default_precision(given.device),
    )
    chosen = trainings(version, config, given.pairs is not None, neighbours)
    summary = summarise_variants(run_all(chosen, version, given.out, given.workers))
    summary.to_csv(given.out / "summary.csv")
    print(summary.round(4).to_string())


if __name__ == "__main__":
    main()
