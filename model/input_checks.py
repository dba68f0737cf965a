"""Warn about volumes that are unlike those that a generator was trained on, and refuse those that no scan could be."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from ixi_etl.dataset.direction import Direction
from ixi_etl.errors import SynthesisError
from model import planes
from model.planes import PlaneSummary, SourceSummary

SPACING_WARNED, SPACING_REFUSED = 1.5, 8.0
"""Ratios of the input's voxel size to the training source's, or the inverse, above which to warn and to refuse.

T1s of 0.8 mm and IXI's own of 0.94 x 0.94 x 1.2 mm are within 1.5 of each other; clinical slices of 3 mm are not. No
real scan is beyond 8, but spacings in other units than mm are."""

NEAR_TARGET, FARTHER_FROM_SOURCE = 0.05, 2.0
"""An input is suspected to be a target if its histogram is within `NEAR_TARGET` of the training targets', and more than
`FARTHER_FROM_SOURCE` times as far from the training sources'. Intensities differ so much between protocols that a T1 is
often nearer to another protocol's T2 than to its T1; docs/synthesis.md has the measurements."""


def spacing_warnings(expected: SourceSummary, spacing_mm: NDArray[np.float64]) -> list[str]:
    """A warning if the voxel size (along x, y, z) is far from the training sources'.

    Raises:
        SynthesisError: no scan could have it.
    """
    ratio = spacing_mm / expected.spacing_mm
    furthest = float(np.maximum(ratio, 1 / ratio).max())
    found, wanted = (" x ".join(f"{mm:.4g}" for mm in each) for each in (spacing_mm, expected.spacing_mm))
    message = f"voxels of {found} mm (along x, y, z) are far from the {wanted} mm that the generator was trained on"
    if furthest > SPACING_REFUSED:
        raise SynthesisError(f"{message}; is the header's spacing in mm?")
    return [message] if furthest > SPACING_WARNED else []


def histogram_warnings(summary: PlaneSummary, direction: Direction, name: str, slab: NDArray[np.float32]) -> list[str]:
    """A warning if a normalised slab has the histogram of the training targets, not that of the source `name`."""
    found, expected = planes.histogram(slab), summary.sources[direction.sources.index(name)]
    to_source = planes.histogram_distance(found, expected.histogram)
    to_target = planes.histogram_distance(found, summary.target_histogram)
    if to_target > NEAR_TARGET or to_source <= FARTHER_FROM_SOURCE * to_target:
        return []
    message = f"by its histogram it looks more like a {direction.target.upper()} than a {name.upper()}"
    return [f"{message} (distance {to_target:.3f} against {to_source:.3f}); is it the right file?"]


def name_warnings(file_name: str, direction: Direction, source: str) -> list[str]:
    """A warning if a file's name contains the generator's target, or another source, and not `source`."""
    words = {word.removesuffix("w") for word in re.split(r"[^a-z0-9]+", file_name.lower())}
    others = [name for name in (direction.target, *direction.sources) if name.lower() in words]
    if not others or source in others:
        return []
    message = f"by its name it is a {others[0].upper()}, and the generator takes a {source.upper()}"
    return [f"{message}; is it the right file?"]
