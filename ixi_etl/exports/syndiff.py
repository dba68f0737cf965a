"""The layout that `CreateDatasetSynthesis` of icon-lab/SynDiff (`dataset.py`) reads.

::

    DIR/data_{train,val,test}_T1.mat   HDF5, data set `data_fs`: float32 [image, column, row] in [0, 1]; T2 likewise

It swaps the last two axes, so that rows come first, and pads with int((256 - n) / 2) on either side: an odd size would
become 255.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar

from ixi_etl.config import SPLITS
from ixi_etl.core.progress import Progress
from ixi_etl.exports.layout import Layout, Row, describe_padding, even, folder_name, pad_to_even
from ixi_etl.exports.selection import Subject

KEY = "data_fs"
HDF5_HEADERS = 16 << 10  # bytes in a file beside the images; 2 KiB measured


class SynDiff(Layout):
    """One HDF5 file for each split and modality, written subject by subject."""

    extra: ClassVar[str | None] = "mat"
    max_side: ClassVar[int | None] = 256

    @property
    def size_bytes(self) -> int:
        _, height, width = self.selection.shape
        files = len(SPLITS) * len(self.selection.names)
        images = self.selection.images * len(self.selection.names)
        return 4 * images * even(height) * even(width) + files * HDF5_HEADERS

    def write(self, folder: Path, progress: Progress) -> list[Row]:
        import h5py

        _, height, width = self.selection.shape
        counts = self.selection.counts()
        with _disk_errors(), ExitStack() as stack:
            images: dict[tuple[str, str], Any] = {}
            for split in SPLITS:
                for name in self.selection.names:
                    file = stack.enter_context(h5py.File(folder / file_name(split, name), "w"))
                    shape = (counts[split]["slices"], even(width), even(height))
                    # Contiguous: the file is the same in whichever order threads write.
                    images[split, name] = file.create_dataset(KEY, shape, "<f4")
            lock = Lock()
            return self.each_subject(lambda subject: self._write_subject(subject, images, lock), progress)

    def _write_subject(self, subject: Subject, images: Mapping[tuple[str, str], Any], lock: Lock) -> list[Row]:
        rows = []
        for name in self.selection.names:
            columns_first = pad_to_even(self.selection.normalised(subject, name)).transpose(0, 2, 1)
            for split, chosen, first in subject.by_split():
                with lock:
                    images[split, name][first : first + len(chosen)] = columns_first[chosen]
            for each in subject.slices:
                file = file_name(each.split, name)
                place = {"split": each.split, "slice": each.z, "slices": 1, "index": each.number}
                rows.append(self.row(subject, name, self.role(name), file, **place))
        return rows

    def describe(self) -> dict[str, Any]:
        axes = {"axes": "image, column, row: the loader swaps the last two"}
        return super().describe() | {**describe_padding(self.selection), **axes}


@contextmanager
def _disk_errors() -> Iterator[None]:
    """Reduce an error of the disk, which HDF5 reports in several lines or as a `RuntimeError`, to its number."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        match = re.search(r"errno = (\d+)", str(error))
        if not match:
            raise
        raise OSError(int(match[1]), os.strerror(int(match[1]))) from error


def file_name(split: str, array: str) -> str:
    return f"data_{split}_{folder_name(array)}.mat"
