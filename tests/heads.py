"""Small volumes with a head-like signal, and a generator that returns its source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from ixi_etl.dataset.direction import Direction
from model import planes
from model.planes import PlaneSummary, SourceSummary
from model.source_planes import Scan
from model.synthesize import Trained


def identity(shape: tuple[int, int] = (24, 24), spacing_mm: float = 2.0, low_high: tuple[float, float] = (0, 1)) -> Any:
    """A generator that returns its source, for planes of that shape and spacing and targets in `low_high`."""
    summary = PlaneSummary(
        shape=shape,
        spacing_mm=(spacing_mm, spacing_mm),
        slab_mm=14.0,
        slab_offset_mm=0.0,
        sources=(SourceSummary(spacing_mm=(2.0, 2.0, 2.0), histogram=tuple(np.eye(planes.BINS)[20])),),
        target_low_high=low_high,
        target_histogram=tuple(np.eye(planes.BINS)[1]),
    )
    return Trained(lambda source, _: source, summary, Direction(("t1",), "t2"), "cpu", {"GeneratorSHA256": "0" * 64})


def t1(values: np.ndarray, affine: np.ndarray, scale: tuple[float, float] = (1.0, 0.0)) -> dict[str, Scan]:
    """The scans of a generator that takes a T1."""
    return {"t1": Scan(values, affine, scale)}


def head(shape_ijk: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """A smooth asymmetric signal [k, j, i], 0 to 1000, around the world's z axis, almost 0 at 20 mm from it."""
    i, j, k = np.indices(shape_ijk)
    world = np.stack([i, j, k, np.ones(shape_ijk)], axis=-1) @ affine.T
    x, y, z = (world[..., n] for n in range(3))
    ball = np.exp(-((x / 10) ** 2 + (y / 12) ** 2 + (z / 60) ** 2))
    return (1000 * ball * (0.75 + 0.25 * np.sin(x / 9) * np.cos(y / 8 + z / 7))).astype(np.float32).T


def nifti_of(values: np.ndarray, affine: np.ndarray, qform: int = 2, sform: int = 1) -> bytes:
    """An uncompressed NIfTI file of float32 [k, j, i], with the given codes."""
    image = nib.Nifti1Image(values.T, affine)
    image.set_qform(affine, qform)
    image.set_sform(affine, sform)
    return bytes(image.to_bytes())


def volume_of(folder: Path, name: str) -> bytes:
    import tarfile

    with tarfile.open(folder / f"IXI-{name[-9:-7]}.tar") as tar:
        member = tar.extractfile(name)
        assert member is not None
        return member.read()
