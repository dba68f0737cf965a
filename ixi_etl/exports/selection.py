"""What an export holds: the subjects of a version, normally those with all of its arrays, and each slice's split.

Legend: an array of a subject has Z slices without margins, H x W as stored, [z, y, x] (or [k, j, i] for pairs by
index). Images are float32 [image, row, column] in [0, 1], row 0 at the top.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ixi_etl.config import SPLITS
from ixi_etl.dataset import manifest, verify
from ixi_etl.dataset.command import how_to_make
from ixi_etl.dataset.direction import Direction, parse_direction
from ixi_etl.dataset.schema import SCHEMAS, is_absent
from ixi_etl.dataset.splits import person_of
from ixi_etl.dataset.store import open_arrays
from ixi_etl.errors import ConfigError, DatasetError, EmptySplitError
from ixi_etl.modalities import DATASETS


@dataclass(frozen=True)
class Slice:
    """One exported slice.

    Attributes:
        z: its place in the store's array, which may have a margin.
        split: the split that it belongs to.
        number: its place in that split, from 0: by subject, then by slice.
    """

    z: int
    split: str
    number: int


@dataclass(frozen=True)
class Subject:
    """One exported subject.

    Attributes:
        store_row: its row in the store.
        split: as in the manifest; `mixed` if its slices are in several.
        ranges: array name -> the stored values that become 0 and 1; of the exported arrays that the subject has.
        scales: array name -> (scale, offset); stored x scale + offset = scanner units.
        slices: those that are exported, in the order of the store.
    """

    subject_id: str
    person: str
    split: str
    store_row: int
    ranges: Mapping[str, tuple[float, float]]
    scales: Mapping[str, tuple[float, float]]
    slices: tuple[Slice, ...]

    def by_split(self) -> Iterator[tuple[str, list[int], int]]:
        """Each split of its slices, their indices in `slices`, and the number of the first; numbers are consecutive."""
        for split in dict.fromkeys(each.split for each in self.slices):
            chosen = [index for index, each in enumerate(self.slices) if each.split == split]
            yield split, chosen, self.slices[chosen[0]].number


@dataclass(frozen=True)
class Selection:
    """The part of a version that is exported.

    Attributes:
        metadata: the content of `dataset.json`.
        direction: source arrays and target array.
        names: the exported arrays: the sources, then the target; or all arrays of the store.
        subjects: in the order of the store.
        rows: their rows of the manifest, in the same order.
        left_out: subject id -> the arrays that it lacks.
        shape: (Z, H, W).
        margin: slices at either end of each stored slab, which are not exported.
        is_split_by_file: whether the slices of one subject may be in several splits.
        arrays: the arrays of the store, of Zarr or NumPy.
    """

    folder: Path
    metadata: Mapping[str, Any]
    direction: Direction
    names: tuple[str, ...]
    subjects: tuple[Subject, ...]
    rows: pd.DataFrame
    left_out: Mapping[str, tuple[str, ...]]
    shape: tuple[int, int, int]
    margin: int
    is_split_by_file: bool
    arrays: Mapping[str, Any]

    @property
    def version(self) -> str:
        return f"{self.metadata['name']}@{self.metadata['version']}"

    @property
    def pairing(self) -> str:
        """`anatomical` or `index`; `images` for a dataset that is no scan of a head."""
        return str(self.metadata["inputs"]["config"].get("pairing", "images"))

    @property
    def images(self) -> int:
        """Number of exported slices of each array."""
        return len(self.subjects) * self.shape[0]

    def counts(self) -> dict[str, dict[str, int]]:
        """Split -> the number of its `subjects` and `slices`. A subject counts in each split that it has slices in."""
        slices = Counter(each.split for subject in self.subjects for each in subject.slices)
        subjects = Counter(split for subject in self.subjects for split in {each.split for each in subject.slices})
        return {split: {"subjects": subjects[split], "slices": slices[split]} for split in SPLITS}

    def stored(self, subject: Subject, name: str) -> NDArray[Any]:
        """The slices [z, y, x] of one array as stored, without margins.

        Raises:
            DatasetError: they cannot be decoded.
        """
        try:
            window = slice(self.margin, self.margin + self.shape[0])
            return np.asarray(self.arrays[name][subject.store_row, window])
        except Exception as error:  # codecs raise many kinds on damaged bytes
            raise DatasetError(
                f"{self.folder}: cannot read {name} of {subject.subject_id} ({' '.join(str(error).split())}); "
                "`ixi-etl verify --deep` lists what is damaged"
            ) from error

    def normalised(self, subject: Subject, name: str) -> NDArray[np.float32]:
        """The slices of one array as images: (stored - low) / (high - low), clipped to [0, 1], the right way up."""
        low, high = subject.ranges[name]
        values = (self.stored(subject, name).astype(np.float64) - low) / (high - low)
        images = np.clip(values, 0, 1).astype(np.float32)
        return images if self.pairing == "images" else images[:, ::-1]  # y points to the anterior


def read_selection(
    folder: Path, direction: str | None = None, version: str | None = None, *, every_array: bool = False
) -> Selection:
    """Verify the version in `folder`, and select what an export in this direction holds.

    Args:
        direction: SOURCE->TARGET or SOURCE+SOURCE->TARGET; by default that of the dataset.
        version: the version's name, if the folder may have another one.
        every_array: select all used subjects, and all arrays that each has, not pairs.

    Raises:
        ConfigError: the direction does not fit the dataset, or its arrays have slices of different sizes.
        DatasetError: the version is damaged.
        EmptySplitError: no subject has all arrays of the direction.
    """
    metadata, table = verify.read_verified(folder, version)
    return select(folder, metadata, table, open_arrays(folder), direction, every_array=every_array)


def select(
    folder: Path,
    metadata: Mapping[str, Any],
    table: pd.DataFrame,
    arrays: Mapping[str, Any],
    direction: str | None = None,
    *,
    every_array: bool = False,
) -> Selection:
    """What `read_selection` selects, given the content of a version: `dataset.json`, the manifest and the arrays."""
    parsed = parse_direction(direction, metadata)
    names = SCHEMAS[metadata["name"]].arrays if every_array else (*parsed.sources, parsed.target)
    used = manifest.used_rows(table)
    lacks = pd.DataFrame({name: np.asarray(is_absent(used, name), bool) for name in names}, index=used.index)
    if every_array:
        chosen, left_out = used, dict[str, tuple[str, ...]]()
    else:
        chosen = used[~lacks.any(axis=1)]
        lacking = zip(used["subject_id"], lacks.itertuples(index=False), strict=True)
        left_out = {s: tuple(n for n, lack in zip(names, row, strict=True) if lack) for s, row in lacking if any(row)}
    if chosen.empty:
        raise EmptySplitError(f"no subject of {folder} has all of {', '.join(names)}; export another direction")
    margin = int(metadata["inputs"]["config"].get("margin", 0))
    shape = _common_shape(arrays, names if not every_array else (parsed.target,), margin)
    if not every_array:
        _check_ranges(chosen, names, metadata)
    return Selection(
        folder=folder,
        metadata=metadata,
        direction=parsed,
        names=names,
        subjects=_subjects(chosen, names, metadata, shape[0], margin),
        rows=chosen,
        left_out=left_out,
        shape=shape,
        margin=margin,
        is_split_by_file="slice_splits" in used,
        arrays=arrays,
    )


def _common_shape(arrays: Mapping[str, Any], names: tuple[str, ...], margin: int) -> tuple[int, int, int]:
    shapes = {name: tuple(int(n) for n in arrays[name].shape[1:]) for name in names}
    (depth, height, width), *others = dict.fromkeys(shapes.values())
    if others:
        sizes = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in shapes.items())
        raise ConfigError(f"the slabs (z, y, x) have different sizes ({sizes}), so their slices are no pairs of pixels")
    return depth - 2 * margin, height, width


def _check_ranges(chosen: pd.DataFrame, names: tuple[str, ...], metadata: Mapping[str, Any]) -> None:
    """Refuse subjects, each with all arrays, of which one cannot be normalised."""
    for name in names:
        low_high = manifest.intensity_ranges(chosen, name)
        usable = np.isfinite(low_high).all(axis=1) & (low_high[:, 0] < low_high[:, 1])
        for subject_id, (low, high) in zip(chosen["subject_id"][~usable], low_high[~usable], strict=True):
            raise DatasetError(
                f"cannot normalise the {name} of {subject_id}: the stored values of 0 and 1 are {low:g} and {high:g}; "
                f"make the version again: {how_to_make(metadata)}"
            )


def _subjects(
    chosen: pd.DataFrame, names: tuple[str, ...], metadata: Mapping[str, Any], slices: int, margin: int
) -> tuple[Subject, ...]:
    """The rows of `chosen` as subjects, with their slices numbered within each split."""
    ranges = {name: manifest.intensity_ranges(chosen, name) for name in names}
    scales = {
        name: chosen[[f"{name}_scale", f"{name}_offset"]].to_numpy(np.float64)
        if f"{name}_scale" in chosen
        else np.tile([1.0, 0.0], (len(chosen), 1))
        for name in names
    }
    present = {name: ~np.asarray(is_absent(chosen, name), bool) for name in names}
    in_split = {split: manifest.slices_in_split(chosen, split, slices) for split in SPLITS}
    # Row by row, as the store has them: the number of slices of the split before this one.
    numbers = {split: np.cumsum(mask).reshape(mask.shape) - 1 for split, mask in in_split.items()}
    subjects = []
    for n, row in enumerate(manifest.to_records(chosen[["subject_id", "split", "store_row"]])):
        split_of = [next(split for split in SPLITS if in_split[split][n, z]) for z in range(slices)]
        subjects.append(
            Subject(
                subject_id=row["subject_id"],
                person=person_of(row["subject_id"]) if metadata["name"] in DATASETS else "",
                split=row["split"],
                store_row=int(row["store_row"]),
                ranges={name: (float(r[n, 0]), float(r[n, 1])) for name, r in ranges.items() if present[name][n]},
                scales={name: (float(s[n, 0]), float(s[n, 1])) for name, s in scales.items() if present[name][n]},
                slices=tuple(Slice(z + margin, split, int(numbers[split][n, z])) for z, split in enumerate(split_of)),
            )
        )
    return tuple(subjects)
