"""The layout that `AlignedDataset` of junyanz/pytorch-CycleGAN-and-pix2pix (`data/aligned_dataset.py`) reads.

::

    DIR/{train,val,test}/<n>_<subject>_<z>.png   the source (A) on the left, the target (B) on the right

Grey, in 8 bits (as published) or 16. The loader sorts by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ixi_etl.config import SPLITS
from ixi_etl.core.progress import Progress
from ixi_etl.errors import ConfigError
from ixi_etl.exports.layout import Layout, Row
from ixi_etl.exports.selection import Selection, Subject

BITS = (8, 16)
COMPRESSION = 3  # of zlib: its default, 6, takes more than twice as long, for files that are at most a tenth smaller
PNG_HEADERS = 1 << 10  # bytes beside the pixels; a line of a PNG has one more byte than its pixels


class Pix2pix(Layout):
    """One PNG for each pair of slices."""

    def __init__(self, selection: Selection, bits: int = 8) -> None:
        super().__init__(selection)
        self.bits = bits

    def check(self) -> None:
        super().check()
        if len(self.selection.direction.sources) > 1:
            raise ConfigError(
                f"{self.selection.direction} has several sources, and a picture of pix2pix has room for one: "
                f"--direction {self.selection.direction.sources[0]}->{self.selection.direction.target}"
            )

    @property
    def size_bytes(self) -> int:
        _, height, width = self.selection.shape
        return self.selection.images * (height * (2 * width * self.bits // 8 + 1) + PNG_HEADERS)

    def write(self, folder: Path, progress: Progress) -> list[Row]:
        for split in SPLITS:
            (folder / split).mkdir()

        def write_subject(subject: Subject) -> list[Row]:
            halves = [to_integers(self.selection.normalised(subject, n), self.bits) for n in self.selection.names]
            rows = []
            for each, image in zip(subject.slices, np.concatenate(halves, axis=2), strict=True):
                file = Path(each.split, f"{each.number:06d}_{subject.subject_id}_{each.z:03d}.png")
                Image.fromarray(image).save(folder / file, compress_level=COMPRESSION)
                place = {"split": each.split, "slice": each.z, "slices": 1, "index": 0}
                rows += [self.row(subject, name, self.role(name), file, **place) for name in self.selection.names]
            return rows

        return self.each_subject(write_subject, progress)

    def describe(self) -> dict[str, Any]:
        _, height, width = self.selection.shape
        values = f"{self.values}; times {2**self.bits - 1}, rounded"
        return super().describe() | {"values": values, "bits": self.bits, "size": [height, 2 * width]}


def to_integers(images: NDArray[np.float32], bits: int) -> NDArray[Any]:
    """Images in [0, 1] as unsigned integers of 8 or 16 bits."""
    rounded: NDArray[Any] = np.rint(images.astype(np.float64) * (2**bits - 1)).astype(f"uint{bits}")
    return rounded
