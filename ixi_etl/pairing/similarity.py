"""Normalised mutual information (NMI), the similarity of the two scans of a pair."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ixi_etl.scans.intensity import count_values, in_blocks, prefers_counting

NMI_BINS = 64
NMI_RANGE = (0.5, 99.5)  # percentiles


def nmi(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Normalised mutual information of paired values, 2 I(A, B) / (H(A) + H(B)), from 0 to 1.

    Computed on 64 equal bins between the percentiles 0.5 and 99.5 of each array; values beyond go into the outermost
    bins. It is 0 if either array is constant or empty. Rounded to 9 digits, because the last digits of NumPy's
    logarithm depend on the CPU.
    """
    if a.size == 0 or a.min() == a.max() or b.min() == b.max():
        return 0.0
    counts = np.zeros(NMI_BINS**2)
    for bins_a, bins_b in zip(in_blocks(_bin_indices(a)), in_blocks(_bin_indices(b)), strict=True):
        counts += np.bincount(bins_a * NMI_BINS + bins_b, minlength=NMI_BINS**2)
    joint = counts.reshape(NMI_BINS, NMI_BINS) / a.size
    joint_entropy = _entropy(joint)
    marginal_entropies = _entropy(joint.sum(axis=0)) + _entropy(joint.sum(axis=1))
    if marginal_entropies <= 0:
        return 0.0
    return round(2 * (marginal_entropies - joint_entropy) / marginal_entropies, 9)


def _bin_indices(values: NDArray[Any]) -> NDArray[np.int16]:
    if not prefers_counting(values):
        return _bin_range(values, *np.percentile(values, NMI_RANGE))
    counted = count_values(values)
    bins = _bin_range(counted.values, *counted.percentiles(NMI_RANGE))
    return np.concatenate([bins[np.subtract(block, counted.low, dtype=np.intp)] for block in in_blocks(values)])


def _bin_range(values: NDArray[Any], low: float, high: float) -> NDArray[np.int16]:
    width = (high - low) or 1.0
    binned: NDArray[np.int16] = np.clip((values - low) * (NMI_BINS / width), 0, NMI_BINS - 1).astype(np.int16)
    return binned


def _entropy(shares: NDArray[np.float64]) -> float:
    positive = shares[shares > 0]
    return float(-(positive * np.log(positive)).sum())
