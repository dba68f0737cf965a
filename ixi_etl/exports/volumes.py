"""What the layouts of NIfTI files have in common: whole slabs, each with the affine of its subject's reference.

Values are the scanner's: stored int16, with its scale and offset as slope and intercept. Scaled or clipped values could
not be turned back.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any, ClassVar

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from ixi_etl.errors import ConfigError
from ixi_etl.exports.layout import Layout
from ixi_etl.exports.selection import Subject

ALIGNED = 2  # code of a space that another scan defines; the affine of the reference holds for all slabs of a pair
COMPRESSION = 4  # of gzip: 6 takes three times as long for files that are 1% smaller


class Volumes(Layout):
    """One NIfTI file for each subject and modality.

    Attributes:
        name: what `--format` calls it.
    """

    name: ClassVar[str]
    values: ClassVar[str] = "scanner units: stored int16 x scale + offset, which readers of NIfTI apply"

    def check(self) -> None:
        super().check()
        if self.selection.pairing != "anatomical":
            raise ConfigError(
                f"{self.selection.version} is not paired in space, so its slices have no common grid; "
                f"{self.name} needs a version with --pairing anatomical"
            )
        if self.selection.is_split_by_file:
            raise ConfigError(
                f"{self.selection.version} has slices of one subject in several splits, but a NIfTI file holds a whole "
                "subject; export as selfrdb, syndiff or pix2pix"
            )

    def header(self, subject: Subject) -> bytes:
        """A NIfTI header with the grid of the subject's slabs, without margins (RAS+ voxel axes, mm)."""
        affine = np.asarray(self.selection.arrays[f"{self.selection.direction.target}_affine"][subject.store_row])
        shift = np.eye(4)
        shift[2, 3] = self.selection.margin
        return slab_header(self.selection.shape, affine @ shift)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {
            "orientation": "voxel axes x to the right, y to anterior, z to superior (RAS+), with the affine in mm",
            "size": list(self.selection.shape[::-1]),
        }


def slab_header(shape: tuple[int, int, int], affine: NDArray[np.float64]) -> bytes:
    """A NIfTI header for slabs of `shape` (z, y, x). The qform is left out if it cannot hold the affine's shear."""
    header = nib.Nifti1Header()
    header.set_data_shape(shape[::-1])
    header.set_xyzt_units("mm")
    header.set_qform(affine, ALIGNED)
    if not np.allclose(header.get_qform(), affine, atol=1e-3):
        header.set_qform(affine, 0)
    header.set_sform(affine, ALIGNED)
    return bytes(header.binaryblock)


def save_volume(path: Path, plain: bytes) -> None:
    """Write an uncompressed NIfTI file as `.nii.gz`, the same bytes whenever it is written."""
    path.write_bytes(gzip.compress(plain, COMPRESSION, mtime=0))
