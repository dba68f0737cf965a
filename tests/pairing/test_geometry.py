"""Every voxel of a slab is at the position that its affine gives, for all orientations."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from profiles import examples
from scipy.ndimage import map_coordinates
from strategies import ORIENTATIONS, affines, numbered, shapes, world_of

from ixi_etl.config import DatasetConfig
from ixi_etl.pairing import geometry
from ixi_etl.testing.phantom import grid_affine


@given(st.data(), shapes)
def test_axial_slab_keeps_the_world_position_of_every_voxel(data: st.DataObject, shape: tuple[int, int, int]) -> None:
    affine = data.draw(affines(shape))
    volume = numbered(shape)
    depth = geometry.axial_depth(shape, affine)
    start = data.draw(st.integers(0, depth - 1))
    stop = data.draw(st.integers(start + 1, depth))
    slab, slab_affine = geometry.axial_slab(volume, affine, (start, stop))
    assert slab.shape[0] == stop - start
    found = world_of(slab_affine, slab.shape).reshape(-1, 3)
    nearest = np.linalg.inv(affine) @ np.c_[found, np.ones(len(found))].T
    i, j, k = nearest[:3].round().astype(int)
    assert np.abs(nearest[:3] - nearest[:3].round()).max() < 1e-4
    np.testing.assert_array_equal(volume[k, j, i], slab.ravel())


@given(st.data(), shapes)
def test_axial_slab_points_right_anterior_superior(data: st.DataObject, shape: tuple[int, int, int]) -> None:
    affine = data.draw(affines(shape))
    _, slab_affine = geometry.axial_slab(numbered(shape), affine, (0, 1))
    assert nib.aff2axcodes(slab_affine) == ("R", "A", "S")


@given(st.data(), shapes)
def test_stored_slab_has_the_stored_slices_and_their_affine(data: st.DataObject, shape: tuple[int, int, int]) -> None:
    affine = data.draw(affines(shape))
    volume = numbered(shape)
    start = data.draw(st.integers(0, shape[2] - 1))
    slab, slab_affine = geometry.stored_slab(volume, affine, (start, shape[2]))
    np.testing.assert_array_equal(slab, volume[start:])
    np.testing.assert_allclose(world_of(slab_affine, slab.shape), world_of(affine, volume.shape)[start:], atol=1e-8)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_axial_depth_is_the_length_from_inferior_to_superior(orientation: str) -> None:
    shape = (4, 5, 6)
    axis = next(n for n, letter in enumerate(orientation) if letter in "SI")
    assert geometry.axial_depth(shape, grid_affine(shape, (1, 1, 1), orientation)) == shape[axis]


@settings(max_examples=examples(60))
@given(st.data(), shapes, shapes, st.integers(0, 2**32 - 1))
def test_resample_equals_scipy_at_every_voxel(
    data: st.DataObject, shape: tuple[int, int, int], slab_shape: tuple[int, int, int], seed: int
) -> None:
    affine, slab_affine = data.draw(affines(shape)), data.draw(affines(slab_shape))
    motion = data.draw(affines((1, 1, 1), tilt_deg=5))
    volume = np.random.default_rng(seed).integers(-2000, 2000, shape[::-1]).astype(np.int16)
    matrix = geometry.sampling_matrix(slab_affine, affine, motion)
    np.testing.assert_allclose(matrix, np.linalg.inv(affine) @ motion @ slab_affine, atol=1e-9)
    slab, inside = geometry.resample(volume, matrix, slab_shape[::-1])
    ijk = world_of(matrix, slab_shape[::-1])
    edge = np.array(shape) - 1
    off_edge = (np.abs(ijk) > 1e-5).all(axis=-1) & (np.abs(ijk - edge) > 1e-5).all(axis=-1)
    expected = map_coordinates(volume.astype(float), np.moveaxis(ijk[..., ::-1], -1, 0), order=1, mode="constant")
    np.testing.assert_allclose(slab[off_edge], expected[off_edge], atol=0.01)
    np.testing.assert_array_equal(inside[off_edge], ((ijk > 0) & (ijk < edge)).all(axis=-1)[off_edge])
    assert (slab[~inside] == 0).all()


def test_resample_on_the_grid_of_the_volume_returns_the_volume() -> None:
    volume = numbered((5, 6, 7)).astype(np.int16)
    slab, inside = geometry.resample(volume, np.eye(4), volume.shape)
    np.testing.assert_array_equal(slab, volume)
    assert inside.all()


@pytest.mark.parametrize("dtype", [">i2", "<i2", "u1", "i1", "<u2", "<i4", "<u4", "<i8", "<f4", ">f4", "<f8"])
def test_resample_reads_every_supported_dtype(dtype: str) -> None:
    volume = (np.arange(60).reshape(3, 4, 5) + 3).astype(dtype)
    slab, _ = geometry.resample(volume, np.eye(4), volume.shape)
    np.testing.assert_array_equal(slab, np.arange(60).reshape(3, 4, 5) + 3)


@given(st.integers(1, 400), st.integers(1, 60))
def test_middle_window_is_centred_or_rejected(depth: int, slices: int) -> None:
    window = DatasetConfig(slices=slices).window_in(depth)
    if slices > depth:
        assert window is None
        return
    assert window is not None
    start, stop = window
    assert stop - start == slices
    assert start >= 0
    assert stop <= depth
    assert (depth - stop) - start in (0, 1)


def test_middle_windows_of_ixi_are_the_published_ones() -> None:
    assert DatasetConfig().window_in(150) == (65, 85)
    assert DatasetConfig().window_in(130) == (55, 75)


SHAPES = st.tuples(*[st.integers(1, 9)] * 3)
ROWS = st.lists(st.tuples(*[st.floats(-2, 2)] * 3, st.floats(-9, 9)), min_size=3, max_size=3)


@given(ROWS, SHAPES, SHAPES)
def test_the_inside_mask_equals_a_check_of_every_voxel(
    rows: list[tuple[float, ...]], shape_zyx: tuple[int, int, int], shape_kji: tuple[int, int, int]
) -> None:
    matrix = np.array([*rows, (0, 0, 0, 1)])
    z, y, x = np.indices(shape_zyx).reshape(3, -1)
    position = (matrix @ np.stack([x, y, z, np.ones_like(x)]))[:3]
    last = np.array(shape_kji[::-1])[:, None] - 1
    off_edge = (np.abs(position) > 1e-5) & (np.abs(position - last) > 1e-5)  # on the edge itself, rounding decides
    expected = ((position > 0) & (position < last)).all(axis=0)
    found = geometry._inside(matrix, shape_zyx, shape_kji).ravel()
    certain = off_edge.all(axis=0)
    np.testing.assert_array_equal(found[certain], expected[certain])


@settings(max_examples=examples(60))
@given(ROWS, SHAPES, SHAPES, st.integers(0, 2**32 - 1))
def test_cropping_to_the_footprint_does_not_change_samples(
    rows: list[tuple[float, ...]], shape_zyx: tuple[int, int, int], shape_kji: tuple[int, int, int], seed: int
) -> None:
    matrix = np.array([*rows, (0, 0, 0, 1)])
    assume(abs(np.linalg.det(matrix)) > 0.01)
    volume = np.random.default_rng(seed).integers(-999, 999, shape_kji).astype(np.int16)
    found = geometry.trilinear(volume, matrix, shape_zyx).ravel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "_crop_to_footprint", lambda volume, matrix, _: (volume, matrix))
        expected = geometry.trilinear(volume, matrix, shape_zyx).ravel()
    z, y, x = np.indices(shape_zyx).reshape(3, -1)
    position = (matrix @ np.stack([x, y, z, np.ones_like(x)]))[:3]
    last = np.array(shape_kji[::-1])[:, None] - 1
    # Rounding decides half a voxel beyond an edge, and where ITK crosses from one cell to the next.
    certain = (np.minimum(np.abs(position + 0.5), np.abs(position - last - 0.5)) > 1e-5).all(axis=0)
    np.testing.assert_allclose(found[certain], expected[certain], rtol=1e-4, atol=1e-2)


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=9), st.integers(-8, 8))
def test_rounding_removes_only_the_last_bits(values: list[float], ulps: int) -> None:
    exact = np.array(values)
    rounded = geometry.rounded(exact)
    np.testing.assert_allclose(rounded, exact, rtol=0, atol=2.0**-geometry.GRID_BITS / 2)
    np.testing.assert_array_equal(geometry.rounded(rounded), rounded)
    other_cpu = rounded + ulps * np.spacing(rounded)  # differs in the last bits
    np.testing.assert_array_equal(geometry.rounded(other_cpu), rounded)
    assert not np.signbit(geometry.rounded([-0.0, -1e-12])).any()  # -0.0 would be written differently in the manifest


def test_rounding_keeps_exact_values() -> None:
    for value in (0.9375, 1.25, 0.9765625, -119.53125, 2.0**-20):
        assert geometry.rounded(value) == value
