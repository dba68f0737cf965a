"""Measure a generator by subject, next to baselines that any generator should beat.

Every number is of images normalised by the manifest's percentiles to [0, 1] (data range 1), over whole slices
(mask `whole`) and over the head alone (mask `head`: pixels over Otsu's threshold in the source or in the target, of
each subject's slab). Whole slices are mostly background, which flatters everybody.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ixi_etl.files import Progress, silent, to_json, write_atomic
from ixi_etl.intensity import otsu_threshold
from model import checkpoint, data, metrics
from model.checkpoint import CheckpointError
from model.config import TrainConfig
from model.data import Pairs
from model.learner import build_generator, generator_weights
from model.networks import UNetGenerator, place

Method = Callable[[Tensor, Tensor], Tensor]
"""From sources (B, 1, H, W) in [-1, 1] and their positions in the slab (B,) to what they say the targets are."""

GENERATED, SOURCE, MEAN_TARGET, MAPPING = "generated", "source as it is", "mean training target", "intensity mapping"
MEASURES = ("psnr", "ssim", "mae")
NORMALISATION = "slab percentiles 0.1 and 99.9 to [0, 1], clipped"
BINS = 256
BATCH = 16  # slices at a time
MUST_AGREE = ("dataset", "direction", "side")
"""Of a run and of weights that are evaluated in it: other weights may have been trained on its test subjects."""


class Evaluation(NamedTuple):
    """What was measured: see `summarise` and `compare`; `name` is that of the files in the run, without suffix."""

    summary: pd.DataFrame
    comparison: pd.DataFrame
    name: str


def generated_by(generator: UNetGenerator, *, dropout: bool = False) -> Method:
    """The generator as in synthesis; `dropout` leaves its noise on, as the publication does at test time."""

    def method(source: Tensor, _position: Tensor) -> Tensor:
        training = generator.training
        generator.train(dropout)
        generated = generator.whole(source).float()
        generator.train(training)
        return generated

    return method


def baselines(train: Pairs) -> dict[str, Method]:
    """The source as it is; the training targets' mean; and the best function of the source's intensity alone.

    The latter is the mean training target at each of 256 source intensities: no function of one intensity has a smaller
    mean squared error on the training split.
    """
    slices = int(train.position.max()) + 1
    total = torch.zeros(slices, *train.target.shape[1:], dtype=torch.float64)
    count, weight = torch.zeros(BINS, dtype=torch.float64), torch.zeros(BINS, dtype=torch.float64)
    for index in torch.arange(len(train), device=train.source.device).split(BATCH):
        source, target = (image.cpu() for image in train.normalised(index))
        total.index_add_(0, train.position[index].cpu(), target[:, 0].double())
        bins = _bins(source).flatten()
        count += torch.bincount(bins, minlength=BINS)
        weight += torch.bincount(bins, target.flatten().double(), minlength=BINS)
    mean = (total / len(train.subjects)).float().unsqueeze(1)
    met = (count > 0).numpy()
    curve = np.interp(np.arange(BINS), np.flatnonzero(met), (weight / count).numpy()[met])
    table = torch.from_numpy(curve).float()
    return {
        SOURCE: lambda source, _: source,
        MEAN_TARGET: lambda source, position: mean.to(source.device)[position],
        MAPPING: lambda source, _: table.to(source.device)[_bins(source)],
    }


def _bins(image: Tensor) -> Tensor:
    return ((image + 1) / 2 * (BINS - 1)).round().long()


@torch.no_grad()
def measure(pairs: Pairs, methods: Mapping[str, Method], progress: Progress = silent) -> pd.DataFrame:
    """A row for each method, mask and subject: subject_id, method, mask, psnr (dB), ssim, mae, pixels."""
    thresholds = _thresholds(pairs)
    found: dict[tuple[str, str], list[dict[str, Tensor]]] = {}
    for index in torch.arange(len(pairs), device=pairs.source.device).split(BATCH):
        source, target = pairs.normalised(index)
        mask = _head(source, target, thresholds.to(source.device)[pairs.subject[index]])
        for name, method in methods.items():
            generated = (method(source, pairs.position[index]).clamp(-1, 1) + 1) / 2
            for where, inside in (("whole", None), ("head", mask)):
                by_slice = metrics.by_slice(generated, (target + 1) / 2, inside)
                found.setdefault((name, where), []).append({k: v.cpu() for k, v in by_slice.items()})
        progress("evaluate", int(index[-1]) + 1, len(pairs), "slices")
    tables = []
    for (name, where), batches in found.items():
        slices = {k: torch.cat([b[k] for b in batches]) for k in batches[0]}
        of = metrics.over_subjects(slices, pairs.subject.cpu(), len(pairs.subjects))
        columns = {"subject_id": list(pairs.subjects), "method": name, "mask": where}
        tables.append(pd.DataFrame(columns | {m: of[m].numpy() for m in MEASURES}))
    return pd.concat(tables, ignore_index=True)


def _thresholds(pairs: Pairs) -> Tensor:
    """(S, 2): Otsu's threshold of each subject's source and target slab, in [-1, 1]."""
    everywhere = []
    for subject in range(len(pairs.subjects)):
        slabs = pairs.normalised(torch.nonzero(pairs.subject == subject).flatten())
        everywhere.append([otsu_threshold(slab.cpu().numpy()) for slab in slabs])
    return torch.tensor(everywhere)


def _head(source: Tensor, target: Tensor, thresholds: Tensor) -> Tensor:
    low = thresholds[:, :, None, None, None]
    return (source > low[:, 0]) | (target > low[:, 1])


# -- tables -----------------------------------------------------------------------------------------------------------


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over subjects of each measure: a row for each method and mask."""
    groups = table.groupby(["mask", "method"], sort=False)[list(MEASURES)]
    summary = groups.agg(["mean", "std"])
    summary.columns = pd.Index([f"{measure}_{what}" for measure in MEASURES for what in ("mean", "std")])
    return summary.assign(subjects=groups.size()).reset_index()


def compare(table: pd.DataFrame) -> pd.DataFrame:
    """By how much the generator is better than each baseline, in pairs of the same subject.

    A row for each mask, baseline and measure: mean difference, and its 95% interval by Student's t (NaN for a single
    subject). Above 0 the generator is better, for `mae` too.
    """
    from scipy.stats import t

    rows = []
    for where, part in table.groupby("mask", sort=False):
        ours = part[part["method"] == GENERATED].set_index("subject_id")
        for name, theirs in part[part["method"] != GENERATED].groupby("method", sort=False):
            for measure in MEASURES:
                better = (ours[measure] - theirs.set_index("subject_id")[measure]).to_numpy()
                better = -better if measure == "mae" else better
                n = len(better)
                half = t.ppf(0.975, n - 1) * better.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
                mean = better.mean()
                row = {"mask": where, "baseline": name, "measure": measure, "subjects": n, "better_by": mean}
                rows.append(row | {"low_95": mean - half, "high_95": mean + half})
    return pd.DataFrame(rows)


def load_generator(path: Path, device: str | torch.device = "cpu") -> tuple[UNetGenerator, TrainConfig, int]:
    """The generator of a checkpoint, or of `generator.safetensors`, its configuration, and the step it is of.

    Raises:
        CheckpointError: the file is missing or damaged, or holds no generator of its configuration.
    """
    tensors, facts = checkpoint.load(path)
    config, weights = checkpoint.config_of(path, facts["config"]), generator_weights(tensors)
    with torch.device("meta"):  # no memory yet for a configuration that the weights do not bear out
        checkpoint.require(path, weights, build_generator(config).state_dict())
    generator = build_generator(config)
    generator.load_state_dict(weights)
    return place(generator, device).eval(), config, facts["step"]


def check_same_data(weights: Path, config: TrainConfig, run: TrainConfig) -> None:
    """Raise `CheckpointError` unless the weights were trained, with `config`, on the data of the run."""
    unlike = [name for name in MUST_AGREE if getattr(config, name) != getattr(run, name)]
    if unlike:
        said = ", ".join(f"{name} {getattr(config, name)}, not {getattr(run, name)}" for name in unlike)
        raise CheckpointError(f"{weights} is of another training ({said}); evaluate it in a run of its own")


def name_of(split: str, weights: Path | None, dropout: bool) -> str:
    """What the files of an evaluation are called; `weights` are None where they are the run's own generator.

    All others have their digest in the name, so that no evaluation replaces one of something else.
    """
    parts = ["evaluation", split]
    if weights is not None:
        parts += [weights.stem, checkpoint.digest_of(weights)[:8]]
    return "-".join(parts + (["dropout"] if dropout else []))


def evaluate(
    run: Path,
    version: Path,
    config: TrainConfig,
    generator: Path,
    *,
    weights: Path | None = None,
    split: str = "test",
    device: str = "cpu",
    dropout: bool = False,
    progress: Progress = silent,
) -> Evaluation:
    """Measure `generator`, or the one in `weights`, on a split; write `<name>.csv` and `.json` into `run`.

    The CSV has a row for each subject, method and mask; the JSON the means, standard deviations and paired differences.
    `config` is the run's. The name is `evaluation-<split>` for the run's own generator, see `name_of` for others.

    Raises:
        CheckpointError: the weights are missing or damaged, or were trained on other data than the run.
        DatasetError: the version is damaged, or has nobody in the split.
    """
    if weights is not None and weights.resolve() == generator.resolve():
        weights = None
    measured = weights or generator
    network, trained, step = load_generator(measured, device)
    check_same_data(measured, trained, config)
    name = name_of(split, weights, dropout)
    pairs = data.load(version, split, config.direction, device)
    methods = {GENERATED: generated_by(network, dropout=dropout)}
    methods |= baselines(data.load(version, "train", config.direction, device))
    table = measure(pairs, methods, progress)
    table.insert(1, "split", split)
    table = table.assign(normalisation=NORMALISATION, data_range=metrics.DATA_RANGE)
    summary, comparison = summarise(table), compare(table)
    write_atomic(run / f"{name}.csv", table.to_csv(index=False))
    facts: dict[str, Any] = {
        "split": split,
        "weights": measured.name,
        "weights_sha256": checkpoint.digest_of(measured),
        "step": step,
        "dropout": dropout,
        "dataset": config.dataset,
        "direction": config.direction,
        "normalisation": NORMALISATION,
        "data_range": metrics.DATA_RANGE,
        "masks": {"whole": "every pixel", "head": "over Otsu's threshold in source or target"},
        "summary": json.loads(summary.to_json(orient="records")),
        "comparison": json.loads(comparison.to_json(orient="records")),
    }
    write_atomic(run / f"{name}.json", to_json(facts))
    return Evaluation(summary, comparison, name)
