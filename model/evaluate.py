"""Measure a generator per subject, next to baselines that any generator should beat.

All measures are of images normalised by the manifest's percentiles to [0, 1] (data range 1), over whole slices (mask
`whole`) and over the head (mask `head`: pixels above Otsu's threshold of the subject's slab in a source or in the
target). Whole slices are mostly background, which inflates every score. Masks and baselines use the slices at the
target's place, not their neighbours.

Legend: N slices of S subjects with K sources; B, C, H, W are batch, channels of the sources, height, width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from ixi_etl.core.files import to_json, write_atomic
from ixi_etl.core.progress import Progress, no_progress
from ixi_etl.scans.intensity import otsu_threshold
from model import checkpoint, data
from model.config import TrainConfig
from model.data import Pairs
from model.generator import BATCH, Predictor, as_predictor, check_same_dataset, load_generator

GENERATED, SOURCE, MEAN_TARGET, MAPPING = "generated", "source as it is", "mean training target", "intensity mapping"
MEASURES = ("psnr", "ssim", "mae")
NORMALISATION = "slab percentiles 0.1 and 99.9 to [0, 1], clipped"
BINS = 256  # of the intensities of each source, for the intensity mapping
RCOND = 1e-10  # of its equations: rounding errors are far below, and the shares of all pixels in a bin above
DATA_RANGE = 1.0


class Evaluation(NamedTuple):
    """The results of `summarise` and `compare`; `name` is that of the files in the run, without suffix."""

    summary: pd.DataFrame
    comparison: pd.DataFrame
    name: str


def baselines(train: Pairs) -> dict[str, Predictor]:
    """Baseline predictors from the training split: each source, mean target, and intensity mapping.

    The last is a sum of one function of the intensity of each source, with `BINS` values each: the one with the
    smallest mean squared error on the training split. For a single source it is the mean target at each intensity.
    """
    slices, count = train.slices, len(train.sources)
    total = torch.zeros(slices, *train.shape, dtype=torch.float64)
    seen = torch.bincount(train.position.cpu(), minlength=slices)[:, None, None]
    counts = torch.zeros((count * BINS) ** 2, dtype=torch.float64)  # pixels with each two bins
    sums = torch.zeros(count * BINS, dtype=torch.float64)
    for index in torch.arange(len(train), device=train.device).split(BATCH):
        source, target = (image.cpu() for image in train.normalised(index))
        total.index_add_(0, train.position[index].cpu(), target[:, 0].double())
        bins = _bins(train.centres(source))
        sums += torch.bincount(bins.flatten(), target.expand(bins.shape).flatten().double(), minlength=len(sums))
        both = bins.unsqueeze(2) * len(sums) + bins.unsqueeze(1)
        counts += torch.bincount(both.flatten(), minlength=len(counts))
    # At a position without a training slice it is the mean of all of them: a split by file may have none there.
    mean = torch.where(seen > 0, total / seen, total.sum(0) / len(train)).float().unsqueeze(1)
    table = torch.from_numpy(_fit_mapping(counts.view(len(sums), -1).numpy(), sums.numpy())).float()
    names = [SOURCE] if count == 1 else [f"{name} as it is" for name in train.direction.sources]
    return {
        **{name: partial(_source_as_it_is, train, n) for n, name in enumerate(names)},
        MEAN_TARGET: lambda source, position: mean.to(source.device)[position],
        MAPPING: lambda source, _: table.to(source.device)[_bins(train.centres(source))].sum(1, keepdim=True),
    }


def _source_as_it_is(pairs: Pairs, number: int, source: Tensor, _position: Tensor) -> Tensor:
    return pairs.centres(source)[:, number : number + 1]


def _bins(image: Tensor) -> Tensor:
    """Bins of K intensities (B, K, H, W): those of source k begin at k x `BINS`."""
    first = torch.arange(image.shape[1], device=image.device)[:, None, None] * BINS
    return ((image + 1) / 2 * (BINS - 1)).round().long() + first


def _fit_mapping(counts: NDArray[np.float64], sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """The values (K x `BINS`,) of the intensity mapping, by least squares.

    The normal equations have the numbers of pixels with each two bins, (K x `BINS`, K x `BINS`), and the `sums` of the
    target in each bin. They are solved in units of one over the root of a bin's pixels, in which bins are equally
    precise; of all solutions the one with the least mean square is taken, as a constant may move from one source to
    another. Bins without pixels are interpolated.
    """
    pixels = np.diag(counts)
    seen = pixels > 0
    root = np.sqrt(pixels[seen])
    scaled = counts[np.ix_(seen, seen)] / np.outer(root, root)
    values = np.linalg.lstsq(scaled, sums[seen] / root, rcond=RCOND)[0] / root
    fitted = np.zeros(len(sums))
    fitted[seen] = values
    for own in np.split(np.arange(len(sums)), len(sums) // BINS):
        fitted[own] = np.interp(own, own[seen[own]], fitted[own][seen[own]])
    return fitted


@torch.no_grad()
def measure(pairs: Pairs, methods: Mapping[str, Predictor], progress: Progress = no_progress) -> pd.DataFrame:
    """Score each method on `pairs`: a row per method, mask and subject, with `MEASURES`; psnr is in dB."""
    thresholds = _otsu_thresholds(pairs)
    scores: dict[tuple[str, str], list[dict[str, Tensor]]] = {}
    for index in torch.arange(len(pairs), device=pairs.device).split(BATCH):
        source, target = pairs.normalised(index)
        head = _head_mask(pairs.centres(source), target, thresholds.to(pairs.device)[pairs.subject[index]])
        for name, predict in methods.items():
            generated = (predict(source, pairs.position[index]).clamp(-1, 1) + 1) / 2
            for mask_name, mask in (("whole", None), ("head", head)):
                by_slice = score_slices(generated, (target + 1) / 2, mask)
                scores.setdefault((name, mask_name), []).append({k: v.cpu() for k, v in by_slice.items()})
        progress("evaluate", int(index[-1]) + 1, len(pairs), "slices")
    tables = []
    for (name, mask_name), batches in scores.items():
        slices = {k: torch.cat([b[k] for b in batches]) for k in batches[0]}
        by_subject = score_subjects(slices, pairs.subject.cpu(), len(pairs.subjects))
        columns = {"subject_id": list(pairs.subjects), "method": name, "mask": mask_name}
        tables.append(pd.DataFrame(columns | {m: by_subject[m].numpy() for m in MEASURES}))
    return pd.concat(tables, ignore_index=True)


def _otsu_thresholds(pairs: Pairs) -> Tensor:
    """Otsu's thresholds (S, K + 1) of each subject's slabs of sources and target, in [-1, 1]."""
    pairs, thresholds = replace(pairs, neighbours=0), []
    for subject in range(len(pairs.subjects)):
        source, target = pairs.normalised(torch.nonzero(pairs.subject == subject).flatten())
        slabs = torch.cat([pairs.centres(source), target], 1).cpu().numpy()
        thresholds.append([otsu_threshold(slabs[:, n]) for n in range(slabs.shape[1])])
    return torch.tensor(thresholds)


def _head_mask(centres: Tensor, target: Tensor, thresholds: Tensor) -> Tensor:
    """Mask (B, 1, H, W) of the pixels above `thresholds` (B, K + 1) in a source (B, K, H, W) or in the target."""
    images = torch.cat([centres, target], 1)
    return (images > thresholds[:, :, None, None]).any(1, keepdim=True)


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation of each measure over the subjects of `measure`: a row per method and mask."""
    groups = table.groupby(["mask", "method"], sort=False)[list(MEASURES)]
    summary = groups.agg(["mean", "std"])
    summary.columns = pd.Index([f"{measure}_{statistic}" for measure in MEASURES for statistic in ("mean", "std")])
    return summary.assign(subjects=groups.size()).reset_index()


def compare(table: pd.DataFrame) -> pd.DataFrame:
    """Differences between the generator and each baseline, paired by subject.

    A row per mask, baseline and measure: the mean difference `better_by`, and its 95% interval by Student's t (NaN for
    a single subject). Above 0 the generator is better, for `mae` too.
    """
    from scipy.stats import t

    rows = []
    for mask, part in table.groupby("mask", sort=False):
        ours = part[part["method"] == GENERATED].set_index("subject_id")
        for name, theirs in part[part["method"] != GENERATED].groupby("method", sort=False):
            for measure in MEASURES:
                better = (ours[measure] - theirs.set_index("subject_id")[measure]).to_numpy()
                better = -better if measure == "mae" else better
                n = len(better)
                half = t.ppf(0.975, n - 1) * better.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
                mean = better.mean()
                row = {"mask": mask, "baseline": name, "measure": measure, "subjects": n, "better_by": mean}
                rows.append(row | {"low_95": mean - half, "high_95": mean + half})
    return pd.DataFrame(rows)


def evaluation_name(split: str, weights: Path | None, dropout: bool) -> str:
    """The name of the files of an evaluation; `weights` is None for the run's own generator.

    For other weights it contains their digest, so that evaluations of different weights never overwrite each other.
    """
    parts = ["evaluation", split]
    if weights is not None:
        parts += [weights.stem, checkpoint.read_digest(weights)[:8]]
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
    progress: Progress = no_progress,
) -> Evaluation:
    """Measure `generator`, or the one in `weights`, on a split; write `<name>.csv` and `.json` into `run`.

    The CSV has a row per subject, method and mask; the JSON has means, standard deviations and paired differences.
    `config` is the run's. `evaluation_name` gives the name.

    Raises:
        CheckpointError: the weights are missing or damaged, or were trained on other data than the run.
        EmptySplitError: the split has no subjects.
        DatasetError: the version is damaged.
    """
    if weights is not None and weights.resolve() == generator.resolve():
        weights = None
    measured = weights or generator
    network, trained, step = load_generator(measured, device)
    check_same_dataset(measured, trained, config)
    name = evaluation_name(split, weights, dropout)
    load = partial(data.load_pairs, direction=config.direction, device=device, neighbours=config.neighbours)
    pairs = load(version, split)
    methods = {GENERATED: as_predictor(network, dropout=dropout)}
    methods |= baselines(load(version, "train"))
    table = measure(pairs, methods, progress)
    table.insert(1, "split", split)
    table = table.assign(normalisation=NORMALISATION, data_range=DATA_RANGE)
    summary, comparison = summarise(table), compare(table)
    write_atomic(run / f"{name}.csv", table.to_csv(index=False))
    record: dict[str, Any] = {
        "split": split,
        "weights": measured.name,
        "weights_sha256": checkpoint.read_digest(measured),
        "step": step,
        "dropout": dropout,
        "dataset": config.dataset,
        "direction": config.direction,
        "neighbours": config.neighbours,
        "normalisation": NORMALISATION,
        "data_range": DATA_RANGE,
        "masks": {"whole": "every pixel", "head": "over Otsu's threshold in a source or in the target"},
        "summary": json.loads(summary.to_json(orient="records")),
        "comparison": json.loads(comparison.to_json(orient="records")),
    }
    write_atomic(run / f"{name}.json", to_json(record))
    return Evaluation(summary, comparison, name)


def score_slices(generated: Tensor, target: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Scores (B,) of slices (B, 1, H, W) in [0, 1]: `mae`, `mse` and `ssim` over the mask, and `pixels`, its size.

    `score_subjects` computes PSNR from `mse`.

    SSIM is that of Wang et al. (2004), with a Gaussian window of sigma 1.5. A slice with an empty mask scores 0.
    """
    # Imported here since it also imports scipy.signal, which takes more than a second.
    from torchmetrics.functional.image import structural_similarity_index_measure

    inside = torch.ones_like(target) if mask is None else mask.to(target.dtype)
    pixels = inside.sum((1, 2, 3))

    def mean(values: Tensor) -> Tensor:
        return (values * inside).sum((1, 2, 3)) / pixels.clamp(min=1)

    _, similarity = structural_similarity_index_measure(
        generated, target, data_range=DATA_RANGE, sigma=1.5, reduction="none", return_full_image=True
    )
    error = generated - target
    return {"mae": mean(error.abs()), "mse": mean(error**2), "ssim": mean(similarity), "pixels": pixels}


def score_subjects(slices: dict[str, Tensor], subject: Tensor, subjects: int) -> dict[str, Tensor]:
    """Scores (S,) of subjects from those of slices (N,): `mae`, `psnr` and `ssim`.

    `subject` (N,) is the subject of each slice. Slices are weighted by their `pixels`. `psnr` is in dB, from
    the MSE over all slices of a subject; it is infinite if the MSE is 0.
    """
    weight = slices["pixels"].double()

    def pooled(values: Tensor) -> Tensor:
        total = torch.zeros(subjects, dtype=torch.float64).index_add_(0, subject, values.double() * weight)
        return total / torch.zeros(subjects, dtype=torch.float64).index_add_(0, subject, weight)

    mse = pooled(slices["mse"])
    return {"mae": pooled(slices["mae"]), "psnr": 10 * torch.log10(DATA_RANGE**2 / mse), "ssim": pooled(slices["ssim"])}
