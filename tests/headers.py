"""NIfTI headers with any combination of sform, qform, codes and pixdim."""

from __future__ import annotations

from typing import Any

import nibabel as nib
import numpy as np

from ixi_etl.pairing.geometry import Matrix
from ixi_etl.testing.phantom import grid_affine, rigid

SHAPE = (64, 60, 40)
SPACING = (0.9375, 0.9375, 1.25)
GRID = rigid((6, 2, -3), (3, -2, 8)) @ grid_affine(SHAPE, SPACING, "LAS")
MIRROR = np.diag([-1.0, 1, 1, 1])
MNI = rigid((4, 1, 2), (0, -6, 5)) @ np.diag([1.05, 1.06, 1.08, 1])
SHEAR = np.eye(4) + 0.2 * np.eye(4, k=1) * [[1], [0], [0], [0]]


def with_forms(
    sform: Matrix | None, s_code: int, qform: Matrix | None, q_code: int, *, nifti2: bool = False, **fields: Any
) -> bytes:
    """A header of `SHAPE`, 352 or 544 bytes. The code of a form that is None stays 0. `fields` are set last."""
    raw = (nib.Nifti2Header if nifti2 else nib.Nifti1Header)()
    raw.set_data_shape(SHAPE)
    raw.set_data_dtype("<i2")
    raw["pixdim"][1:4] = SPACING
    raw["vox_offset"], raw["magic"] = (544, raw["magic"]) if nifti2 else (352, b"n+1")
    if qform is not None:
        raw.set_qform(qform, 1)
        raw["pixdim"][1:4] = np.linalg.norm(qform[:3, :3], axis=0)
    if sform is not None:
        raw.set_sform(sform, 1)
    raw["sform_code"], raw["qform_code"] = s_code, q_code
    for name, value in fields.items():
        if name == "qfac":
            raw["pixdim"][0] = value
        elif name == "pixdim":
            raw["pixdim"][1:4] = value
        else:
            raw[name] = value
    return bytes(raw.binaryblock) + bytes(4)
