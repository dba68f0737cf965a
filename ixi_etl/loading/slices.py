"""The slices of one split, one at a time, as a `torch.utils.data.Dataset`. torch is imported when one is made."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ixi_etl.core.text import quantity
from ixi_etl.dataset.normalisation import normalise
from ixi_etl.dataset.store import open_arrays
from ixi_etl.errors import DatasetError
from ixi_etl.exports.selection import Selection, Subject

if TYPE_CHECKING:
    import zarr
    from torch.utils.data import Dataset

Transform = Callable[[dict[str, Any]], Any]


@dataclass
class SliceReader:
    """Reads slices as stored. Every process opens the store for itself: see `fast_reading`.

    Attributes:
        name: of the split and the version, to be shown.
        names: the arrays that are read.
        places: the subject and the z of each slice.
    """

    folder: Path
    name: str
    names: tuple[str, ...]
    places: tuple[tuple[Subject, int], ...]

    def __post_init__(self) -> None:
        self._opened: tuple[int, dict[str, zarr.Array[Any]]] | None = None

    @classmethod
    def of(cls, selection: Selection, split: str) -> SliceReader:
        """The slices of one split, by subject, then from bottom to top."""
        places = []
        for subject in selection.subjects:
            brief = replace(subject, slices=())
            places += [(brief, each.z) for each in subject.slices if each.split == split]
        return cls(selection.folder, f"{split} of {selection.version}", selection.names, tuple(places))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def read(self, index: int) -> tuple[Subject, int, dict[str, NDArray[Any]]]:
        """The subject, the z and the arrays [y, x] of a slice.

        Raises:
            DatasetError: it cannot be decoded.
        """
        subject, z = self.places[index]
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), open_arrays(self.folder)
        try:
            arrays = self._opened[1]
            return subject, z, {name: np.asarray(arrays[name][subject.store_row, z]) for name in self.names}
        except Exception as error:  # codecs raise many kinds on damaged bytes
            raise DatasetError(
                f"{self.folder}: cannot read slice {z} of {subject.subject_id} ({' '.join(str(error).split())}); "
                "`ixi-etl verify --deep` lists what is damaged"
            ) from error


def make_dataset(reader: SliceReader, transform: Transform | None = None) -> Dataset[Any]:
    """The data set that `DatasetVersion.torch` returns."""
    return _dataset_class()(reader, transform)


@cache
def _dataset_class() -> Callable[[SliceReader, Transform | None], Dataset[Any]]:
    import torch
    from torch.utils.data import Dataset

    class Slices(Dataset[Any]):
        """Items of `DatasetVersion.torch`."""

        def __init__(self, reader: SliceReader, transform: Transform | None) -> None:
            self.reader, self.transform = reader, transform

        def __len__(self) -> int:
            return len(self.reader.places)

        def __getitem__(self, index: int) -> Any:
            subject, z, arrays = self.reader.read(index)
            item: dict[str, Any] = {}
            for name, stored in arrays.items():
                low_high = torch.tensor([subject.ranges[name]], dtype=torch.float32)
                item[name] = normalise(torch.from_numpy(stored)[None, None], low_high)[0]
            item |= {"subject_id": subject.subject_id, "slice": z}
            return item if self.transform is None else self.transform(item)

        def __reduce__(self) -> tuple[Any, ...]:
            """Pickle by the function that makes it: the class exists only where torch was imported."""
            return make_dataset, (self.reader, self.transform)

        def __repr__(self) -> str:
            return f"<{self.reader.name}: {quantity(len(self), 'slice')} of {', '.join(self.reader.names)}>"

    return Slices
