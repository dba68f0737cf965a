"""Intensities of a slab: conversion to int16, percentiles, and the threshold between head and air.

Large arrays of small integers are histogrammed instead of sorted, which takes a quarter of the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PERCENTILES = (0.1, 99.9)
"""Of each slab, in the manifest. They normalise the input of a network and identify a slab in verification."""

_NORMALISATIONS = {
    "percentiles": f"percentiles {PERCENTILES[0]:g} and {PERCENTILES[1]:g} of the subject's slab",
    "range": "the least and the largest value of the subject's slab",
    "mean": "0 and the mean of the subject's slab times the largest ratio of value to mean over all subjects",
}

MIN_LEVELS = 256
"""Least range between the two percentiles of a slab that is rounded to whole scanner units: the rounding error is at
most 1/512 of that range, half a level of 8-bit grey. IXI T1s of slope 1.68 and 1.84 have a range of 4,000; one of slope
1 has 97, but its values are integers, which rounding does not change."""

INT16 = np.iinfo(np.int16)
FULL_SCALE = 65_000  # steps from the smallest to the largest value of a slab with its own scale; int16 has 65,535
LARGEST, SMALLEST = 1e30, 1e-30  # bounds of magnitude and range for ITK's interpolation in float32

SPIKE_RATIO = 3.0
"""A voxel further beyond the percentiles than this, in units of their range, is an artefact. In 20 real scans, slabs
reach at most 0.9 and volumes 1.3; two skull-stripped volumes reach 2.8."""

COUNT_ABOVE = 1 << 16  # values: for fewer, sorting is as fast as counting
BLOCK_VALUES = 1 << 17  # values counted at a time
MAX_HISTOGRAM_BINS = 1 << 18  # range of the values: for more, sorting is as fast as counting


@dataclass(frozen=True)
class Counts:
    """Histogram of integers: `low + n` occurs `counts[n]` times."""

    low: int
    counts: NDArray[np.intp]

    @property
    def levels(self) -> int:
        """Number of distinct values."""
        return int(np.count_nonzero(self.counts))

    @property
    def values(self) -> NDArray[np.int64]:
        """All integers from the smallest to the largest value."""
        return np.arange(self.low, self.low + len(self.counts))

    def percentiles(self, ranks: Sequence[float] = PERCENTILES) -> list[float]:
        """Percentiles, equal to those of `numpy.percentile`."""
        up_to = self.counts.cumsum()
        last = int(up_to[-1]) - 1
        values = []
        for rank in ranks:
            position = rank / 100 * last
            below = int(position)
            a, b = (self.low + float(np.searchsorted(up_to, at, side="right")) for at in (below, min(below + 1, last)))
            t = position - below
            values.append(b - (b - a) * (1 - t) if t >= 0.5 else a + (b - a) * t)  # as numpy interpolates
        return values


def count_values(image: NDArray[Any]) -> Counts:
    """Histogram of an integer array, in memory proportional to the range of its values."""
    low = int(image.min())
    counts = np.zeros(int(image.max()) - low + 1, np.intp)
    for block in in_blocks(image):
        counts += np.bincount(np.subtract(block, low, dtype=np.intp), minlength=len(counts))
    return Counts(low, counts)


def in_blocks(image: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """The values, flattened, in cache-sized blocks: `numpy.bincount` converts its input to 8 bytes per value."""
    flat = image.ravel()
    return (flat[start : start + BLOCK_VALUES] for start in range(0, flat.size, BLOCK_VALUES))


def prefers_counting(image: NDArray[Any]) -> bool:
    """Whether a histogram is faster than sorting: for large arrays of small integers."""
    return (
        image.dtype.kind in "iu"
        and image.size >= COUNT_ABOVE
        and int(image.max()) - int(image.min()) < MAX_HISTOGRAM_BINS
    )


def percentiles(slabs: NDArray[Any]) -> NDArray[np.float64]:
    """`PERCENTILES` of each of the slabs [N, z, y, x], as `numpy.percentile` gives them: [N, 2]."""
    if len(slabs) and prefers_counting(slabs[0]):
        return np.array([count_values(slab).percentiles() for slab in slabs])
    return np.asarray(np.percentile(slabs, PERCENTILES, axis=(1, 2, 3)), np.float64).T


def describe_normalisation(kind: str) -> str:
    """The two values of a slab that become the ends of a network's range, for a `normalisation` of `DatasetConfig`.

    Sentences continue it, for example "... become -1 and 1; clipped".
    """
    return _NORMALISATIONS[kind]


def clip_spikes(image: NDArray[Any], low: float, high: float) -> NDArray[Any]:
    """Clip artefacts far beyond the percentiles `low` and `high`; returns `image` itself if it has none."""
    reach = SPIKE_RATIO * (high - low)
    least, most = float(image.min()), float(image.max())
    if reach <= 0 or (low - reach <= least and most <= high + reach):
        return image
    bounds = [image.dtype.type(value) for value in (max(least, low - reach), min(most, high + reach))]
    return image.clip(*bounds)


@dataclass(frozen=True)
class Quantisation:
    """The possible values of a scan in scanner units: `origin` + n x `step`, or any value if `step` is 0."""

    step: float
    origin: float

    @property
    def is_integer(self) -> bool:
        return self.step > 0 and self.step.is_integer() and self.origin.is_integer()


@dataclass(frozen=True)
class StoredSlab:
    """A slab as stored.

    Attributes:
        voxels: [z, y, x] or [k, j, i].
        scale, offset: voxels x scale + offset = scanner units; 1 and 0 if scanner units are stored directly.
        p_low, p_high: `PERCENTILES` of `voxels`.
        reason, problem: why the slab cannot be used, as a manifest reason and in words ("" if it can).
    """

    voxels: NDArray[np.int16]
    scale: float
    offset: float
    p_low: float
    p_high: float
    reason: str = ""
    problem: str = ""


def to_int16(values: NDArray[Any], steps: Quantisation, inside: NDArray[np.bool_] | None = None) -> StoredSlab:
    """Convert a slab in scanner units to int16 by the first of these methods that loses little:

    1. Round to whole units, if all values fit and either the scan has only integers or the range between the
       percentiles is at least `MIN_LEVELS`.
    2. Use the scan's own steps (its slope), if at most 65,536 are needed. This is exact unless it was interpolated.
    3. Use 65,000 equal steps from the smallest to the largest value, if at least `MIN_LEVELS` of them are between the
       percentiles.

    Args:
        values: [z, y, x] in scanner units.
        steps: possible values of the scan.
        inside: mask of the voxels inside the scan; only these decide how much is lost. The others are 0, or the scan's
            value nearest to 0 if the slab has its own scale and 0 is far from its values.

    Returns:
        The slab, with `reason` and `problem` set if it cannot be used; nothing is raised.
    """
    low, high = float(values.min()), float(values.max())
    if low == high:
        return _rejected(values, "empty_image", f"every voxel of the slab is {low:g}")
    if not (low > -LARGEST and high < LARGEST and high - low > SMALLEST):
        return _rejected(
            values, "intensity_range", f"values from {low:g} to {high:g} cannot be interpolated in float32"
        )
    if inside is not None and (inside.all() or not inside.any()):
        inside = None
    if INT16.min - 0.5 < low and high < INT16.max + 0.5:
        stored = _with_scale(values, 1.0, 0.0)
        if steps.is_integer or _range(stored.voxels if inside is None else stored.voxels[inside]) >= MIN_LEVELS:
            return stored
    known = values
    if inside is not None:
        known = values[inside]
        least, most = float(known.min()), float(known.max())
        if not 2 * least - most <= 0 <= 2 * most - least:
            low, high = least, most
            values = np.where(inside, values, min(max(0.0, low), high))
    if steps.step:
        first, last = ((end - steps.origin) / steps.step for end in (low, high))
        first, last = math.floor(first + 1e-3), math.ceil(last - 1e-3)  # tolerance for float64 rounding
        if last - first <= INT16.max - INT16.min:
            shift = 0 if INT16.min <= first and last <= INT16.max else first - INT16.min
            return _with_scale(values, steps.step, steps.origin + shift * steps.step)
    scale, offset = float(np.float32((high - low) / FULL_SCALE)), (high + low) / 2  # a NIfTI's slope is float32
    spread = float(np.subtract(*np.percentile(known, PERCENTILES[::-1])))
    if spread == 0:
        return _rejected(values, "empty_image", f"percentiles {_BOTH} of the slab are equal")
    if spread < MIN_LEVELS * scale:
        problem = f"values from {low:g} to {high:g} do not fit 16 bits: percentiles {_BOTH} are {spread:g} apart"
        return _rejected(values, "intensity_range", problem)
    return _with_scale(values, scale, offset)


_BOTH = " and ".join(f"{p:g}" for p in PERCENTILES)


def _with_scale(values: NDArray[Any], scale: float, offset: float) -> StoredSlab:
    if (scale, offset) != (1.0, 0.0):
        values = np.subtract(values, offset, dtype=np.float64) / scale
    voxels = (np.rint(values) if values.dtype.kind == "f" else values).astype(np.int16, order="C")
    p_low, p_high = count_values(voxels).percentiles()
    if p_low < p_high:
        return StoredSlab(voxels, scale, offset, p_low, p_high)
    problem = f"percentiles {_BOTH} of the slab are both {p_low * scale + offset:g}"
    return StoredSlab(voxels, scale, offset, p_low, p_high, "empty_image", problem)


def _rejected(values: NDArray[Any], reason: str, problem: str) -> StoredSlab:
    return StoredSlab(np.zeros(values.shape, np.int16), 1.0, 0.0, 0.0, 0.0, reason, problem)


def _range(image: NDArray[Any]) -> float:
    p_low, p_high = count_values(image).percentiles() if image.size else (0.0, 0.0)
    return p_high - p_low


def _histogram(image: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The result of `numpy.histogram` with 256 bins."""
    if not prefers_counting(image):
        # Edges in float64: the range of a float32 image can be too narrow for 256 edges of its own type.
        return np.histogram(image, 256, (np.float64(image.min()), np.float64(image.max())))
    counted = count_values(image)
    weighted, edges = np.histogram(counted.values.astype(image.dtype), 256, weights=counted.counts)
    return weighted.astype(np.intp), edges


def otsu_threshold(image: NDArray[Any]) -> float:
    """The threshold above which a voxel is foreground, by Otsu's method (1979) on 256 bins.

    It is the first bin edge that maximises the variance between the two classes.
    """
    counts, edges = _histogram(image)
    if counts.max() == image.size:
        return float(image.max())  # a constant image is all background
    below = np.cumsum(counts)[:-1]
    centres = (edges[:-1] + edges[1:]) / 2
    sum_below = np.cumsum(counts * centres)
    above = counts.sum() - below
    with np.errstate(divide="ignore", invalid="ignore"):
        difference = sum_below[:-1] / below - (sum_below[-1] - sum_below[:-1]) / above
    return float(edges[1:-1][np.argmax(np.nan_to_num(below * above * difference**2))])
