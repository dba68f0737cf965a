"""Where the slices lie in the head: axes, windows, and the T1 on the T2's planes.

Legend: I, J, K are voxel axes as stored; x, y, z are the slab's, x to the Right, y to the Anterior, z to the Superior;
world points are RAS mm. Arrays are indexed slowest axis first: [k, j, i] and [z, y, x]. Matrices are 4 x 4 and take
(i, j, k, 1) or (x, y, z, 1).
"""

from __future__ import annotations

from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

GRID_BITS = 30  # of what ITK is given: 2^-30 mm, or of a voxel, is 1e-9


def rounded(values: Any, bits: int = GRID_BITS) -> NDArray[np.float64]:
    """`values` rounded to multiples of 2^-bits.

    BLAS and LAPACK differ in the last bits of a product or a decomposition from one CPU type to another. Whatever they
    compute is rounded before voxels depend on it, so the same inputs give the same bytes on all of them. A binary grid
    leaves alone what is exact, such as 0.9375.
    """
    on_grid: NDArray[np.float64] = np.rint(np.asarray(values, np.float64) * 2.0**bits) / 2.0**bits + 0.0  # no -0.0
    return on_grid


def itk() -> Any:
    """SimpleITK on one thread: subjects run in parallel, and its sums depend on how many threads share them."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    return sitk


def stored_slab(volume: NDArray[Any], affine: Matrix, window: tuple[int, int]) -> tuple[NDArray[Any], Matrix]:
    """Slices [start, stop) of [k, j, i] along k, unflipped, and the affine of what was cut."""
    start, stop = window
    return volume[start:stop], rounded(affine @ _shift(0, 0, start))


def axial_slab(volume: NDArray[Any], affine: Matrix, window: tuple[int, int]) -> tuple[NDArray[Any], Matrix]:
    """Axial slices [start, stop), from inferior to superior, of a volume [k, j, i] stored in any orientation.

    Axes are permuted and flipped to the nearest of R, A, S; no voxel is resampled. Returns the slab [z, y, x], a view
    of `volume`, and the affine of the slab, (x, y, z, 1) to RAS mm.
    """
    orientation = nib.io_orientation(affine)
    xyz = nib.apply_orientation(volume.transpose(2, 1, 0), orientation)
    shape_ijk = volume.shape[::-1]
    start, stop = window
    to_stored = nib.orientations.inv_ornt_aff(orientation, shape_ijk)
    return xyz[:, :, start:stop].transpose(2, 1, 0), rounded(affine @ to_stored @ _shift(0, 0, start))


def axial_depth(shape_ijk: tuple[int, ...], affine: Matrix) -> int:
    """How many axial slices a stored volume has: its length along the axis nearest to inferior-superior."""
    return shape_ijk[int(np.argmax(nib.io_orientation(affine)[:, 0]))]


def sampling_matrix(slab_affine: Matrix, volume_affine: Matrix, slab_to_volume_mm: Matrix) -> Matrix:
    """(x, y, z, 1) of the slab to (i, j, k, 1) of the volume, through the world of each."""
    return rounded(np.linalg.solve(volume_affine, slab_to_volume_mm @ slab_affine))


def resample(
    volume: NDArray[Any], matrix: Matrix, shape_zyx: tuple[int, ...]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Trilinear samples of `volume` [k, j, i] on a slab's grid, and which of them lie inside the volume.

    `matrix` takes (x, y, z, 1) of the slab to (i, j, k, 1). Inside means between the outermost voxel centres, where
    eight neighbours are known; samples outside are 0.
    """
    slab = trilinear(volume, matrix, shape_zyx)
    inside = _inside(matrix, shape_zyx, volume.shape)
    slab[~inside] = 0
    return slab, inside


def trilinear(volume: NDArray[Any], matrix: Matrix, shape_zyx: tuple[int, ...]) -> NDArray[np.float32]:
    """Samples of `volume` [k, j, i] at `matrix` @ (x, y, z, 1); up to half a voxel beyond its edge, the edge's value.

    The work is done in voxel indices on both sides, so affines with shear, which an ITK image cannot have, are no
    special case.
    """
    sitk = itk()
    volume, matrix = _reached(volume, matrix, shape_zyx)
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


def _reached(volume: NDArray[Any], matrix: Matrix, shape_zyx: tuple[int, ...]) -> tuple[NDArray[Any], Matrix]:
    """The part of a volume that a slab's samples are made of, and the matrix to its indices: less for ITK to copy."""
    reach = np.multiply(matrix[:3, :3], np.subtract(shape_zyx[::-1], 1))  # (i, j, k), along each of x, y and z
    least = matrix[:3, 3] + np.minimum(reach, 0).sum(axis=1)
    most = matrix[:3, 3] + np.maximum(reach, 0).sum(axis=1)
    last = np.subtract(volume.shape[::-1], 1)
    start = np.clip(np.floor(least) - 1, 0, last).astype(int)  # a voxel more, so that no sample meets the new edge
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
            continue  # all of it is
        first = b * y + (c * z + d)  # of each row
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # a row may run beside an edge
            # Where it comes in and leaves. Rounding in the affines must not blank an edge that two grids share.
            ends = (-1e-6 - first) / a, (length - 1 + 1e-6 - first) / a
        inside &= (x >= np.minimum(*ends)) & (x <= np.maximum(*ends))
    return inside


def world_points(mask: NDArray[np.bool_], affine: Matrix, most: int = 100_000) -> NDArray[np.float64]:
    """RAS mm, (n, 3), of the voxels of a slab [z, y, x] that are set: every one, or evenly `most` of them."""
    at = np.argwhere(mask)
    at = at[:: -(-len(at) // most) or 1, ::-1]
    return rounded(at @ affine[:3, :3].T + affine[:3, 3])


def _shift(x: float, y: float, z: float) -> Matrix:
    matrix = np.eye(4)
    matrix[:3, 3] = x, y, z
    return matrix
