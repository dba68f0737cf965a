"""What intensities a slab has: how 16 bits hold them, their percentiles, and the threshold between head and air.

What there are many of, and are small integers, is counted: it takes a quarter of the time that sorting takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PERCENTILES = (0.1, 99.9)
"""Of each slab, in the manifest: what a network's input is normalised by, and what tells one slab from another."""

LEAST_UNITS = 256
"""Between the two percentiles of a slab that is rounded to whole units of the scanner: rounding moves no value by over
1/512 of that range, half a level of 8-bit gray. IXI's own T1s of slope 1.68 and 1.84 have 4,000 units; a genuine one
of slope 1 has 97, but its values are whole numbers, which rounding does not change."""

INT16 = np.iinfo(np.int16)
FULL_SCALE = 65_000  # steps from the least to the largest value of a slab that has a scale of its own; 65,535 are there
LARGEST, SMALLEST = 1e30, 1e-30  # magnitude and spread of values that float32, in which ITK interpolates, can hold

SPIKE = 3.0
"""How far beyond the percentiles, in units of their range, a voxel counts as an artefact. Of 20 real scans no slab
reaches 0.9, and no volume 1.3; two volumes without their skulls reach 2.8."""

MANY = 1 << 16  # values: fewer are sorted as soon as counted
PART = 1 << 17  # values that are counted at a time
WIDE = 1 << 18  # values that may occur: more are sorted as soon as counted


@dataclass(frozen=True)
class Counts:
    """How often each integer occurs: `counts[n]` times `low + n`."""

    low: int
    counts: NDArray[np.intp]

    @property
    def levels(self) -> int:
        """How many occur at all."""
        return int(np.count_nonzero(self.counts))

    @property
    def values(self) -> NDArray[np.int64]:
        """What is counted: from the least to the largest."""
        return np.arange(self.low, self.low + len(self.counts))

    def percentiles(self, of: Sequence[float] = PERCENTILES) -> list[float]:
        """What `numpy.percentile` gives of the same integers."""
        up_to = self.counts.cumsum()
        last = int(up_to[-1]) - 1
        found = []
        for percentile in of:
            place = percentile / 100 * last
            below = int(place)
            a, b = (self.low + float(np.searchsorted(up_to, at, side="right")) for at in (below, min(below + 1, last)))
            t = place - below
            found.append(b - (b - a) * (1 - t) if t >= 0.5 else a + (b - a) * t)  # as numpy interpolates
        return found


def count_values(image: NDArray[Any]) -> Counts:
    """Counts of integers; of all between the least and the largest, so these must not lie far apart."""
    low = int(image.min())
    counts = np.zeros(int(image.max()) - low + 1, np.intp)
    for part in in_parts(image):
        counts += np.bincount(np.subtract(part, low, dtype=np.intp), minlength=len(counts))
    return Counts(low, counts)


def in_parts(image: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """The values, flat, in parts that a cache holds: NumPy counts in 8 bytes a value, and makes all of them at once."""
    flat = image.ravel()
    return (flat[start : start + PART] for start in range(0, flat.size, PART))


def better_counted(image: NDArray[Any]) -> bool:
    """Whether these are many small integers."""
    return image.dtype.kind in "iu" and image.size >= MANY and int(image.max()) - int(image.min()) < WIDE


def percentiles(slabs: NDArray[Any]) -> NDArray[np.float64]:
    """`PERCENTILES` of each of the slabs [N, z, y, x], as `numpy.percentile` gives them: [N, 2]."""
    if len(slabs) and better_counted(slabs[0]):
        return np.array([count_values(slab).percentiles() for slab in slabs])
    return np.asarray(np.percentile(slabs, PERCENTILES, axis=(1, 2, 3)), np.float64).T


def clip_spikes(image: NDArray[Any], low: float, high: float) -> NDArray[Any]:
    """The image with artefacts far beyond its percentiles `low` and `high` clipped; the same one if it has none."""
    reach = SPIKE * (high - low)
    least, most = float(image.min()), float(image.max())
    if reach <= 0 or (low - reach <= least and most <= high + reach):
        return image
    bounds = [image.dtype.type(value) for value in (max(least, low - reach), min(most, high + reach))]
    return image.clip(*bounds)


@dataclass(frozen=True)
class Steps:
    """The values that a scan can have: `origin` + n x `step`, in the scanner's units. A `step` of 0: any value."""

    step: float
    origin: float

    @property
    def are_whole(self) -> bool:
        return self.step > 0 and self.step.is_integer() and self.origin.is_integer()


@dataclass(frozen=True)
class Stored:
    """A slab as the store holds it.

    Attributes:
        voxels: [z, y, x] or [k, j, i].
        scale, offset: voxels x scale + offset = the scanner's units; 1 and 0 where these are stored as they are.
        p_low, p_high: `PERCENTILES` of `voxels`.
        reason, problem: why the slab cannot be used, as a manifest reason and in words ("" where it can).
    """

    voxels: NDArray[np.int16]
    scale: float
    offset: float
    p_low: float
    p_high: float
    reason: str = ""
    problem: str = ""


def to_int16(values: NDArray[Any], steps: Steps, inside: NDArray[np.bool_] | None = None) -> Stored:
    """A slab in the scanner's units as int16, by the first of these that loses little:

    1. Rounded to whole units, where all fit and either the scan has whole numbers only, or there are `LEAST_UNITS`
       between the percentiles.
    2. In steps of the scan (of its slope), where there are at most 65,536 of them: not interpolated, it is exact.
    3. In 65,000 equal steps from the least to the largest value, if `LEAST_UNITS` of them lie between the percentiles.

    Where `inside` is given, only those voxels say how much is lost. The others lie outside the scan and are 0; where
    that is far from all values of the scan, in a slab with a scale of its own, the nearest of these. Nothing is raised:
    the result says what cannot be used.
    """
    low, high = float(values.min()), float(values.max())
    if low == high:
        return _unusable(values, "empty_image", f"every voxel of the slab is {low:g}")
    if not (low > -LARGEST and high < LARGEST and high - low > SMALLEST):
        return _unusable(
            values, "intensity_range", f"values from {low:g} to {high:g} cannot be interpolated in float32"
        )
    if inside is not None and (inside.all() or not inside.any()):
        inside = None
    if INT16.min - 0.5 < low and high < INT16.max + 0.5:
        stored = _on_scale(values, 1.0, 0.0)
        if steps.are_whole or _range(stored.voxels if inside is None else stored.voxels[inside]) >= LEAST_UNITS:
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
        first, last = math.floor(first + 1e-3), math.ceil(last - 1e-3)  # within the noise of float64
        if last - first <= INT16.max - INT16.min:
            shift = 0 if INT16.min <= first and last <= INT16.max else first - INT16.min
            return _on_scale(values, steps.step, steps.origin + shift * steps.step)
    scale, offset = float(np.float32((high - low) / FULL_SCALE)), (high + low) / 2  # a NIfTI's slope is float32
    spread = float(np.subtract(*np.percentile(known, PERCENTILES[::-1])))
    if spread == 0:
        return _unusable(values, "empty_image", f"percentiles {_BOTH} of the slab are the same")
    if spread < LEAST_UNITS * scale:
        said = f"values from {low:g} to {high:g}, but percentiles {_BOTH} only {spread:g} apart, do not fit 16 bits"
        return _unusable(values, "intensity_range", said)
    return _on_scale(values, scale, offset)


_BOTH = " and ".join(f"{p:g}" for p in PERCENTILES)


def _on_scale(values: NDArray[Any], scale: float, offset: float) -> Stored:
    if (scale, offset) != (1.0, 0.0):
        values = np.subtract(values, offset, dtype=np.float64) / scale
    voxels = (np.rint(values) if values.dtype.kind == "f" else values).astype(np.int16, order="C")
    p_low, p_high = count_values(voxels).percentiles()
    if p_low < p_high:
        return Stored(voxels, scale, offset, p_low, p_high)
    problem = f"percentiles {_BOTH} of the slab are both {p_low * scale + offset:g}"
    return Stored(voxels, scale, offset, p_low, p_high, "empty_image", problem)


def _unusable(values: NDArray[Any], reason: str, problem: str) -> Stored:
    return Stored(np.zeros(values.shape, np.int16), 1.0, 0.0, 0.0, 0.0, reason, problem)


def _range(image: NDArray[Any]) -> float:
    p_low, p_high = count_values(image).percentiles() if image.size else (0.0, 0.0)
    return p_high - p_low


def _histogram(image: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """`numpy.histogram` on 256 bins."""
    if not better_counted(image):
        return np.histogram(image, 256)
    counted = count_values(image)
    weighted, edges = np.histogram(counted.values.astype(image.dtype), 256, weights=counted.counts)
    return weighted.astype(np.intp), edges


def otsu_threshold(image: NDArray[Any]) -> float:
    """The value that parts foreground (above it) from background, after Otsu (1979), on 256 bins.

    The edge between bins that makes the variance between the two classes largest; of several the first.
    """
    counts, edges = _histogram(image)
    if counts.max() == image.size:
        return float(image.max())  # flat: all is background
    below = np.cumsum(counts)[:-1]
    centres = (edges[:-1] + edges[1:]) / 2
    sum_below = np.cumsum(counts * centres)
    above = counts.sum() - below
    with np.errstate(divide="ignore", invalid="ignore"):
        difference = sum_below[:-1] / below - (sum_below[-1] - sum_below[:-1]) / above
    return float(edges[1:-1][np.argmax(np.nan_to_num(below * above * difference**2))])
