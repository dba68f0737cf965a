"""What intensities a slab has: its percentiles, and the threshold that parts the head from the air.

What there are many of, and are small integers, is counted: it takes a quarter of the time that sorting takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PERCENTILES = (0.1, 99.9)
"""Of each slab, in the manifest: what a network's input is normalised by, and what tells one slab from another."""

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
