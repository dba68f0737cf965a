"""Baselines that any generator should beat, fitted on the training split.

They use the slices at the target's place, not their neighbours.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.data import Pairs
from model.generator import BATCH, Predictor

SOURCE, MEAN_TARGET, MAPPING = "source as it is", "mean training target", "intensity mapping"
BINS = 256  # of the intensities of each source, for the intensity mapping
RCOND = 1e-10  # of its equations: rounding errors are far below, and the shares of all pixels in a bin above


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
