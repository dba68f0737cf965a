"""Hypothesis strategies for the voxel grids of scanners."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
from hypothesis import strategies as st

from ixi_etl.pairing.geometry import Matrix
from ixi_etl.testing.phantom import grid_affine, rigid

ORIENTATIONS = [
    "".join(pair[side] for pair, side in zip(axes, sides, strict=True))
    for axes in permutations(("RL", "AP", "SI"))
    for sides in product((0, 1), repeat=3)
]

shapes = st.tuples(*[st.integers(3, 9)] * 3)


@st.composite
def affines(draw: st.DrawFn, shape: tuple[int, int, int], tilt_deg: float = 12) -> Matrix:
    """The affine of an oblique grid in any of the 48 orientations, centred within a few mm of the origin."""
    spacing = draw(st.tuples(*[st.floats(0.7, 2.5)] * 3))
    angles = draw(st.tuples(*[st.floats(-tilt_deg, tilt_deg)] * 3))
    shift = draw(st.tuples(*[st.floats(-4, 4)] * 3))
    return rigid(angles, shift) @ grid_affine(shape, spacing, draw(st.sampled_from(ORIENTATIONS)))


def numbered(shape_ijk: tuple[int, int, int]) -> np.ndarray:
    """A volume [k, j, i] in which every voxel has a distinct value."""
    return np.arange(np.prod(shape_ijk), dtype=np.int32).reshape(shape_ijk[::-1])


def world_of(affine: Matrix, shape: tuple[int, ...]) -> np.ndarray:
    """RAS coordinates (mm) of every voxel of an array indexed slowest axis first: shape + (3,)."""
    slow = np.indices(shape)
    fast = np.stack([*slow[::-1], np.ones(shape)], axis=-1)
    return (fast @ affine.T)[..., :3]
