"""What intensities a slab has: its percentiles, and the threshold that parts the head from the air.

What there are many of, and are small integers, is counted: it takes a quarter of the time that sorting takes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

PERCENTILES = (0.1, 99.9)
"""Of each slab, in the manifest: what a network's input is normalised by, and what tells one slab from another."""

MANY = 1 << 16  # values: fewer are sorted as soon as counted


def count_values(image: NDArray[Any]) -> tuple[int, NDArray[np.intp]]:
    """The least of many integers, and how many there are of it, of the next, and so on to the largest."""
    low = int(image.min())
    return low, np.bincount(np.subtract(image, low, dtype=np.intp).ravel())


def _can_be_counted(image: NDArray[Any]) -> bool:
    return image.dtype.kind in "iu" and image.dtype.itemsize <= 2 and image.size >= MANY


def percentiles(slabs: NDArray[Any]) -> NDArray[np.float64]:
    """`PERCENTILES` of each of the slabs [N, z, y, x], as `numpy.percentile` gives them: [N, 2]."""
    if len(slabs) and _can_be_counted(slabs[0]):
        return np.array([_percentiles_by_counting(slab) for slab in slabs])
    return np.asarray(np.percentile(slabs, PERCENTILES, axis=(1, 2, 3)), np.float64).T


def _percentiles_by_counting(slab: NDArray[Any]) -> list[float]:
    low, counts = count_values(slab)
    up_to = counts.cumsum()
    found = []
    for percentile in PERCENTILES:
        place = percentile / 100 * (slab.size - 1)
        below = int(place)
        a, b = (low + float(np.searchsorted(up_to, at, side="right")) for at in (below, min(below + 1, slab.size - 1)))
        t = place - below
        found.append(b - (b - a) * (1 - t) if t >= 0.5 else a + (b - a) * t)  # as numpy interpolates
    return found


def _histogram(image: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """`numpy.histogram` on 256 bins."""
    if not _can_be_counted(image):
        return np.histogram(image, 256)
    low, counts = count_values(image)
    weighted, edges = np.histogram(np.arange(low, low + len(counts), dtype=image.dtype), 256, weights=counts)
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
