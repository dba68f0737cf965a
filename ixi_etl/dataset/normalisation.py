"""Normalise slices, and find the stored values that become 0 and 1 with another `normalisation` than percentiles.

Legend: N subjects. A slab is [z, y, x] as stored; stored value x scale + offset = scanner units.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ixi_etl.config import DatasetConfig
from ixi_etl.errors import BadVolumeError

if TYPE_CHECKING:
    from torch import Tensor

MEAN_NOT_POSITIVE = "mean_not_positive"


def normalise(stored: Tensor, low_high: Tensor) -> Tensor:
    """Map stored slices (B, K, H, W) to float32: `low_high` (B, 2) float32 to -1 and 1, with clipping.

    `ixi_etl.dataset.manifest.intensity_ranges` gives `low_high`. Uses methods of tensors only, so that no torch is
    imported here.
    """
    low, high = low_high[:, 0, None, None, None], low_high[:, 1, None, None, None]
    # In place: allocating memory for each term takes longer than computing it.
    return stored.to(low_high.dtype, copy=True).sub_(low).mul_(2 / (high - low)).sub_(1).clamp_(-1, 1)


def measure_slab(slab: NDArray[np.integer[Any]], scale: float, offset: float) -> tuple[float, float, float, float]:
    """Least and largest stored value of a slab, then its mean and its maximum in scanner units.

    The mean is that of an exact sum of integers, so it is the same on every CPU.
    """
    low, high = int(slab.min()), int(slab.max())
    mean = int(slab.sum(dtype=np.int64)) / slab.size * scale + offset
    return float(low), float(high), mean, high * scale + offset


def record_slab(
    modality: str, slab: NDArray[np.integer[Any]], scale: float, offset: float, dataset_config: DatasetConfig
) -> dict[str, float]:
    """What the record of a cut subject holds for the normalisation of a slab: nothing for percentiles.

    For `range` these are the columns `_low` and `_high`; for `mean` the `_mean` and `_max` of `add_mean_ranges`.

    Raises:
        BadVolumeError: `mean_not_positive`.
    """
    name = modality.lower()
    if dataset_config.normalisation == "percentiles":
        return {}
    low, high, mean, largest = measure_slab(slab, scale, offset)
    if dataset_config.normalisation == "range":
        return {f"{name}_low": low, f"{name}_high": high}
    if not mean > 0:
        raise BadVolumeError(MEAN_NOT_POSITIVE, f"{modality}: the mean of the slab is {mean:g}; it must be above 0")
    return {f"{name}_mean": mean, f"{name}_max": largest}


def mean_ranges(
    means: NDArray[np.float64],
    maxima: NDArray[np.float64],
    scales: NDArray[np.float64],
    offsets: NDArray[np.float64],
) -> NDArray[np.float64]:
    """(N, 2) stored values that become 0 and 1: each slab is divided by its mean, then by the largest quotient of all.

    So 0 in scanner units stays 0, and mean x M becomes 1, where M is the largest ratio of maximum to mean among the N
    subjects, those of the test split too: as published for SynDiff (its issue 13). All arguments are (N,), means and
    maxima in scanner units; NaN where a subject has no scan.
    """
    most = np.nanmax(maxima / means) if np.isfinite(means).any() else np.nan
    return np.stack([(0.0 - offsets) / scales, (means * most - offsets) / scales], axis=1)


def add_mean_ranges(
    rows: list[dict[str, Any]], records: Mapping[str, Mapping[str, Any]], names: tuple[str, ...]
) -> None:
    """Add the columns `_low` and `_high` of `mean_ranges` to the used `rows`, from the records of their subjects."""
    for name in names:
        having = [row for row in rows if f"{name}_mean" in records[row["subject_id"]]]
        columns = (f"{name}_{column}" for column in ("mean", "max", "scale", "offset"))
        values = [np.array([records[row["subject_id"]][column] for row in having], np.float64) for column in columns]
        for row, (low, high) in zip(having, mean_ranges(*values).tolist(), strict=True):
            row |= {f"{name}_low": low, f"{name}_high": high}
