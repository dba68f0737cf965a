"""What the layouts of all consumers have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ixi_etl.core.parallel import parallel_map, usable_cores
from ixi_etl.core.progress import Progress
from ixi_etl.dataset.metadata import LICENCE_TEXT
from ixi_etl.errors import ConfigError
from ixi_etl.exports.selection import Selection, Subject

Row = dict[str, Any]
"""A line of `export.csv`; `Layout.row` makes it."""

OF_PAIRS = ("role", "low", "high")
"""Columns of `export.csv` that have a meaning only for the normalised pairs of a direction."""

ORIENTATIONS = {
    "anatomical": "row 0 is anterior, column 0 is the subject's left; slices from inferior to superior",
    "index": "row 0 is the last one as stored, columns and slices are as stored; the planes of the scans differ",
    "images": "as stored, row 0 at the top",
}
"""Pairing -> how 2-D images are turned."""

CHANGES = {
    "anatomical": "the scans were cut, paired and interpolated",
    "index": "the scans were cut, and paired slice by slice",
    "images": "the outlines were computed from the digits",
}
"""Pairing -> how the data differ from what was published; part of the licence's note."""


class Layout(ABC):
    """The files of one consumer.

    Attributes:
        extra: the extra of pyproject.toml that writing them needs.
        max_side: the largest image that the consumer reads, in pixels.
        every_array: whether it holds all scans of each subject, not the pairs of a direction.
        licence_file: where the credit and the licence are.
        values: what the numbers in the files mean.
    """

    extra: ClassVar[str | None] = None
    max_side: ClassVar[int | None] = None
    every_array: ClassVar[bool] = False
    licence_file: ClassVar[str] = LICENCE_TEXT
    values: ClassVar[str] = "(stored - low) / (high - low), clipped to [0, 1]; low and high are in export.csv"

    def __init__(self, selection: Selection) -> None:
        self.selection = selection

    def check(self) -> None:
        """Refuse a selection that the consumer could not read.

        Raises:
            ConfigError: it names what does not fit.
        """
        _, height, width = self.selection.shape
        if self.max_side and max(height, width) > self.max_side:
            raise ConfigError(
                f"the slices have {height} x {width} pixels; this format holds at most {self.max_side} x "
                f"{self.max_side}; export as pix2pix or nifti"
            )

    @property
    @abstractmethod
    def size_bytes(self) -> int:
        """Bytes on the disk, at most."""

    def bytes_on_disk_of(self, folder: Path) -> int:
        """Bytes that `write` adds to the disk of `folder`, at most."""
        return self.size_bytes

    @abstractmethod
    def write(self, folder: Path, progress: Progress) -> list[Row]:
        """Write all files into `folder`; the lines of `export.csv`."""

    @property
    def changes(self) -> str:
        """How the data differ from what was published."""
        return CHANGES[self.selection.pairing]

    def counts(self) -> dict[str, dict[str, int]]:
        """Split -> how much of it was written."""
        return self.selection.counts()

    def describe(self) -> dict[str, Any]:
        """What `export.json` says of this layout."""
        return {"values": self.values, "orientation": ORIENTATIONS[self.selection.pairing]}

    def each_subject(self, write: Callable[[Subject], list[Row]], progress: Progress) -> list[Row]:
        """Call `write` for every subject, on all cores; the rows in the order of the subjects."""
        subjects = self.selection.subjects
        written = parallel_map(
            write,
            subjects,
            workers=usable_cores(),
            on_done=lambda done: progress("export", done, len(subjects), "subjects"),
        )
        return [row for rows in written for row in rows]

    def row(self, subject: Subject, name: str, role: str, file: Path | str, **others: Any) -> Row:
        """A line of `export.csv`: what `file` holds of one array of a subject.

        `others` are `split`, `slice` (z in the store), `slices` (their number) and `index` (place in the file).
        Without `OF_PAIRS` if the layout holds no pairs of a direction.
        """
        low, high = subject.ranges[name]
        scale, offset = subject.scales[name]
        row = {
            "subject_id": subject.subject_id,
            "person": subject.person,
            "array": name,
            "role": role,
            "store_row": subject.store_row,
            **others,
            "file": str(file),
            "low": low,
            "high": high,
            "scale": scale,
            "offset": offset,
        }
        return {key: value for key, value in row.items() if not (self.every_array and key in OF_PAIRS)}

    def role(self, name: str) -> str:
        return "target" if name == self.selection.direction.target else "source"


def folder_name(array: str) -> str:
    """The name of an array in files: `T1` of `t1`."""
    return array.upper()


def even(size: int) -> int:
    """The next even number."""
    return size + size % 2


def pad_to_even(images: NDArray[Any]) -> NDArray[Any]:
    """Add a row of 0 below and a column of 0 on the right where the size of images [n, row, column] is odd."""
    return np.pad(images, ((0, 0), (0, images.shape[1] % 2), (0, images.shape[2] % 2)))


def describe_padding(selection: Selection) -> Mapping[str, Any]:
    """The entry of `export.json` about `pad_to_even`."""
    _, height, width = selection.shape
    return {
        "size": [even(height), even(width)],
        "size_as_stored": [height, width],
        "padding": "an odd size gets one more row (below) or column (right) of 0",
    }
