"""The layout that `NumpyDataset` of icon-lab/SelfRDB (`datasets.py`) reads.

::

    DIR/T1/{train,val,test}/slice_<n>.npy   float32 [row, column] in [0, 1]; T2 likewise, with the same numbers
    DIR/mask/test/slice_<n>.npy             uint8, the foreground of the T1: `eval_mask` of its config
    DIR/subject_ids.yaml                    the subject of each test slice: `eval_subject` of its config

It sorts by number and centres images in 256 x 256. Its metric crops to the size of the mask from the middle, which
finds the same pixels, and the same number of them, only if the size is even.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ixi_etl.config import SPLITS
from ixi_etl.core.progress import Progress
from ixi_etl.exports.layout import Layout, Row, describe_padding, even, folder_name, pad_to_even
from ixi_etl.exports.selection import Subject

MASK_ABOVE = 0.1  # of the range of a slice, as in its data/create_brats_dataset.py
NPY_HEADER = 128  # bytes


class SelfRDB(Layout):
    """One `.npy` file for each slice of each modality."""

    max_side: ClassVar[int | None] = 256  # image_size of its config

    @property
    def size_bytes(self) -> int:
        _, height, width = self.selection.shape
        images = self.selection.images * len(self.selection.names)
        masks = self.selection.counts()["test"]["slices"]
        pixels = even(height) * even(width)
        return images * (4 * pixels + NPY_HEADER) + masks * (pixels + NPY_HEADER)

    @property
    def mask_from(self) -> str:
        """The array that the masks are made of: T1 as published, without one the first source."""
        return "t1" if "t1" in self.selection.names else self.selection.names[0]

    def write(self, folder: Path, progress: Progress) -> list[Row]:
        for split in SPLITS:
            for name in self.selection.names:
                (folder / folder_name(name) / split).mkdir(parents=True)
        (folder / "mask" / "test").mkdir(parents=True)
        test = [s.subject_id for s in self.selection.subjects for each in s.slices if each.split == "test"]
        lines = (f"- {json.dumps(subject_id)}\n" for subject_id in test)
        (folder / "subject_ids.yaml").write_text("".join(lines) or "[]\n")

        def write_subject(subject: Subject) -> list[Row]:
            rows = []
            for name in self.selection.names:
                images = pad_to_even(self.selection.normalised(subject, name))
                rows += self._save(folder, folder_name(name), subject, name, self.role(name), images)
                if name == self.mask_from:
                    rows += self._save(folder, "mask", subject, name, "mask", foreground(images))
            return rows

        return self.each_subject(write_subject, progress)

    def _save(
        self, folder: Path, modality: str, subject: Subject, name: str, role: str, images: NDArray[Any]
    ) -> list[Row]:
        rows = []
        for each, image in zip(subject.slices, images, strict=True):
            if role == "mask" and each.split != "test":
                continue
            file = Path(modality, each.split, f"slice_{each.number}.npy")
            (folder / file).write_bytes(npy(image))
            rows.append(self.row(subject, name, role, file, split=each.split, slice=each.z, slices=1, index=0))
        return rows

    def describe(self) -> dict[str, Any]:
        mask = f"above {MASK_ABOVE} of the range of each slice of {self.mask_from}"
        return super().describe() | {**describe_padding(self.selection), "mask": mask}


def npy(image: NDArray[Any]) -> bytes:
    """The content of a `.npy` file. From memory, as `np.save` to a full disk does not say why it failed."""
    packed = io.BytesIO()
    np.save(packed, np.ascontiguousarray(image))
    return packed.getvalue()


def foreground(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Masks of images [n, row, column]: above `MASK_ABOVE` once each is scaled by its own minimum and maximum."""
    low, high = (limit(axis=(1, 2), keepdims=True) for limit in (images.min, images.max))
    mask: NDArray[np.uint8] = (images - low > MASK_ABOVE * (high - low)).astype(np.uint8)
    return mask
