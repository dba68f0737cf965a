"""Geometry of the slabs: axes, windows, and resampling of other scans on the planes of the reference.

Legend: I, J, K are voxel axes as stored; x, y, z are the slab's: x increases to the right, y to anterior, z to
superior (RAS+). World points are RAS mm. Arrays are indexed slowest axis first: [k, j, i] and [z, y, x]. Matrices are
4 x 4 and act on (i, j, k, 1) or (x, y, z, 1).
"""

from __future__ import annotations

from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from ixi_etl.scans.affines import same_grid

Matrix = NDArray[np.float64]

GRID_BITS = 30  # of affines, sampling matrices and small motions: 2^-30 mm or voxels is 1e-9


def rounded(values: Any, bits: int = GRID_BITS) -> NDArray[np.float64]:
    """Round `values` to multiples of 2^-bits.

    BLAS and LAPACK results differ in the last bits between CPU types. They are rounded before voxels depend on them, so
    the same inputs give the same bytes on every CPU. A binary grid keeps values such as 0.9375 exact.
    """
    on_grid: NDArray[np.float64] = np.rint(np.asarray(values, np.float64) * 2.0**bits) / 2.0**bits + 0.0  # no -0.0
    return on_grid


def transformed(matrix: Matrix, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """`points` (3, n), moved by a matrix.

    Without BLAS: its last bits differ between CPUs, and its threads wait busily on cores that other subjects need.
    """
    x, y, z = points
    return np.stack([row[0] * x + row[1] * y + row[2] * z + row[3] for row in matrix[:3]])


def import_sitk() -> Any:
    """SimpleITK on one thread, because subjects run in parallel and its sums depend on the number of threads."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    return sitk


def stored_slab(volume: NDArray[Any], affine: Matrix, window: tuple[int, int]) -> tuple[NDArray[Any], Matrix]:
    """Slices [start, stop) of `volume` [k, j, i] along k, unflipped, and their affine (voxel to RAS mm)."""
    start, stop = window
    return volume[start:stop], rounded(affine @ _shift(0, 0, start))


def axial_slab(volume: NDArray[Any], affine: Matrix, window: tuple[int, int]) -> tuple[NDArray[Any], Matrix]:
    """Axial slices [start, stop), from inferior to superior, of a volume [k, j, i] in any orientation.

    Axes are permuted and flipped to the nearest of R, A, S; nothing is resampled. Returns the slab [z, y, x], a view of
    `volume`, and its affine, (x, y, z, 1) to RAS mm.
    """
    start, stop = window
    to_stored = nib.orientations.inv_ornt_aff(nib.io_orientation(affine), volume.shape[::-1])
    return axial_view(volume, affine)[start:stop], rounded(affine @ to_stored @ _shift(0, 0, start))


def axial_view(volume: NDArray[Any], affine: Matrix) -> NDArray[Any]:
    """A volume [k, j, i] in any orientation as [z, y, x], a view with axes towards the nearest of R, A, S."""
    xyz: NDArray[Any] = nib.apply_orientation(volume.transpose(2, 1, 0), nib.io_orientation(affine))
    return xyz.transpose(2, 1, 0)


def largest_window(areas: NDArray[Any], slices: int, margin: int) -> tuple[int, int]:
    """[start, stop) of the `slices` adjacent slices with the largest sum of `areas`, and `margin` slices around them.

    The margin counts for nothing but must exist. Of equal sums the lowest window is taken.
    """
    up_to = np.concatenate([[0], np.cumsum(areas)])
    sums = (up_to[slices:] - up_to[:-slices])[margin : len(areas) - slices - margin + 1]
    start = int(np.argmax(sums))
    return start, start + slices + 2 * margin


def axial_depth(shape_ijk: tuple[int, ...], affine: Matrix) -> int:
    """Number of axial slices of a stored volume: its length along the axis nearest to inferior-superior."""
    return shape_ijk[int(np.argmax(nib.io_orientation(affine)[:, 0]))]


def affine_on_grid_of(
    affine: Matrix, shape_ijk: tuple[int, ...], other_affine: Matrix, other_shape_ijk: tuple[int, ...]
) -> Matrix | None:
    """The affine that puts the voxels of a volume exactly where another has its own, whatever their order in storage.

    None if the grids differ: in size, or by more than `affines.MAX_FORM_ERROR_MM` at a voxel.
    """
    (turn, own, own_size), (_, other, other_size) = (
        _reoriented(one, shape) for one, shape in ((affine, shape_ijk), (other_affine, other_shape_ijk))
    )
    is_same = own_size == other_size and same_grid(own, other, own_size)
    return rounded(other @ np.linalg.inv(turn)) if is_same else None


def _reoriented(affine: Matrix, shape_ijk: tuple[int, ...]) -> tuple[Matrix, Matrix, tuple[int, ...]]:
    """From (x, y, z, 1) of the volume turned to RAS to its (i, j, k, 1), the turned affine, and the turned size."""
    orientation = nib.io_orientation(affine)
    turn = nib.orientations.inv_ornt_aff(orientation, shape_ijk)
    size = tuple(shape_ijk[int(axis)] for axis in np.argsort(orientation[:, 0]))
    return turn, affine @ turn, size


def sampling_matrix(slab_affine: Matrix, volume_affine: Matrix, slab_to_volume_mm: Matrix) -> Matrix:
    """The matrix from (x, y, z, 1) of the slab to (i, j, k, 1) of the volume, through the world spaces of both."""
    return rounded(np.linalg.solve(volume_affine, slab_to_volume_mm @ slab_affine))


def resample(
    volume: NDArray[Any], matrix: Matrix, shape_zyx: tuple[int, ...]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Trilinear samples of `volume` [k, j, i] on a slab's grid, and the mask of samples inside the volume.

    `matrix` maps (x, y, z, 1) of the slab to (i, j, k, 1). Inside means between the outermost voxel centres, where all
    eight neighbours exist; samples outside are 0.
    """
    slab = trilinear(volume, matrix, shape_zyx)
    inside = _inside(matrix, shape_zyx, volume.shape)
    slab[~inside] = 0
    return slab, inside


def trilinear(volume: NDArray[Any], matrix: Matrix, shape_zyx: tuple[int, ...]) -> NDArray[np.float32]:
    """Trilinear samples of `volume` [k, j, i] at `matrix` @ (x, y, z, 1).

    Up to half a voxel beyond the edge, samples have the edge's value. ITK works in voxel indices on both sides, so
    affines with shear, which an ITK image cannot have, need no special case.
    """
    sitk = import_sitk()
    volume, matrix = _crop_to_footprint(volume, matrix, shape_zyx)
    resampler = sitk.ResampleImageFilter()
    resampler.SetSize(shape_zyx[::-1])
    resampler.SetOutputPixelType(sitk.sitkFloat32)
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(matrix[:3, :3].ravel().tolist())
    transform.SetTranslation(matrix[:3, 3].tolist())
    resampler.SetTransform(transform)
    native = np.ascontiguousarray(volume, volume.dtype.newbyteorder("="))
    slab: NDArray[np.float32] = sitk.GetArrayFromImage(resampler.Execute(sitk.GetImageFromArray(native)))
    return slab


def _crop_to_footprint(volume: NDArray[Any], matrix: Matrix, shape_zyx: tuple[int, ...]) -> tuple[NDArray[Any], Matrix]:
    """The part of a volume that a slab samples, and the matrix to its indices, so that ITK copies less."""
    reach = np.multiply(matrix[:3, :3], np.subtract(shape_zyx[::-1], 1))  # (i, j, k), along each of x, y and z
    least = matrix[:3, 3] + np.minimum(reach, 0).sum(axis=1)
    most = matrix[:3, 3] + np.maximum(reach, 0).sum(axis=1)
    last = np.subtract(volume.shape[::-1], 1)
    start = np.clip(np.floor(least) - 1, 0, last).astype(int)  # one more voxel, so that no sample touches the new edge
    stop = np.clip(np.ceil(most) + 1, start, last).astype(int) + 1
    part = tuple(slice(a, b) for a, b in zip(start[::-1], stop[::-1], strict=True))
    shifted = matrix.copy()
    shifted[:3, 3] -= start
    return volume[part], shifted


def _inside(matrix: Matrix, shape_zyx: tuple[int, ...], shape_kji: tuple[int, ...]) -> NDArray[np.bool_]:
    z, y, x = np.ogrid[: shape_zyx[0], : shape_zyx[1], : shape_zyx[2]]
    inside = np.ones(shape_zyx, bool)
    for (a, b, c, d), length in zip(matrix[:3], shape_kji[::-1], strict=True):
        reach = np.multiply((c, b, a), np.subtract(shape_zyx, 1))  # from the slab's first corner to its last
        if d + reach[reach < 0].sum() >= 0 and d + reach[reach > 0].sum() <= length - 1:
            continue  # the whole slab is inside along this axis
        first = b * y + (c * z + d)  # of each row
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # a row may be parallel to an edge
            # Entry and exit of each row. The tolerance keeps an edge that both grids share, despite rounding.
            ends = (-1e-6 - first) / a, (length - 1 + 1e-6 - first) / a
        inside &= (x >= np.minimum(*ends)) & (x <= np.maximum(*ends))
    return inside


def world_points(mask: NDArray[np.bool_], affine: Matrix, limit: int = 100_000) -> NDArray[np.float64]:
    """Positions (n, 3) in RAS mm of the voxels set in `mask` [z, y, x], evenly thinned to at most `limit`."""
    flat = np.flatnonzero(mask)
    indices = np.unravel_index(flat[:: -(-len(flat) // limit) or 1], mask.shape)
    return rounded(transformed(affine, np.stack(indices[::-1]).astype(np.float64)).T)


def _shift(x: float, y: float, z: float) -> Matrix:
    matrix = np.eye(4)
    matrix[:3, 3] = x, y, z
    return matrix
