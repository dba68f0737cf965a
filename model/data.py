"""Load a split of a dataset version into the memory of the training device, and draw batches from it.

Legend: N pairs, of S subjects with Z stored slices each; B, H, W are batch, height, width. The margin of a version, M
slices at either end of each slab, is never a target, so N = S (Z - 2 M). A batch has C channels of sources: 2 n + 1
slices of each, n being the `neighbours`. A version split by file has fewer pairs: see `Pairs.kept`. Arrays keep their
stored dtype (int16, uint8); batches are float32 in [-1, 1]. `model.augmentation` chooses and augments the pairs of one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor
from zarr.buffer.cpu import NDBuffer

from ixi_etl.config import SPLITS
from ixi_etl.core.text import quantity
from ixi_etl.dataset import command, manifest, metadata, verify
from ixi_etl.dataset.direction import Direction, parse_direction
from ixi_etl.dataset.normalisation import normalise
from ixi_etl.dataset.schema import is_absent
from ixi_etl.dataset.store import open_arrays
from ixi_etl.errors import DatasetError, EmptySplitError
from model.augmentation import augment, batch_indices
from model.config import TrainConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slabs:
    """One array of a split.

    Attributes:
        stored: (S, Z, H, W) as stored.
        low_high: (S, 2) float32, the stored values mapped to -1 and 1: `manifest.intensity_ranges`.
    """

    stored: Tensor
    low_high: Tensor

    def normalised(self, rows: Tensor, subject: Tensor) -> Tensor:
        """Slices `rows` (B, K) of the S x Z in this array, of the subjects (B,), in [-1, 1]: (B, K, H, W)."""
        # `index_select` copies slice by slice, which takes a third of the time of indexing.
        slices = self.stored.flatten(0, 1).index_select(0, rows.flatten())
        return normalise(slices.unflatten(0, rows.shape), self.low_high[subject])

    def of_subjects(self, chosen: Tensor) -> Slabs:
        """The slabs of the subjects `chosen`, copied."""
        return Slabs(self.stored[chosen], self.low_high[chosen])


@dataclass(frozen=True)
class Pairs:
    """The pairs of a split, ordered by subject, then by slice: a slice of the target and what it is generated from.

    Attributes:
        direction: names of the source arrays and of the target array.
        subjects: S ids.
        sources: the source arrays, in the order of the direction.
        target: the target array.
        origin: `lower` if row 0 is shown at the bottom (y points to the anterior), `upper` if at the top.
        split: name of the split.
        neighbours: n.
        margin: M.
        kept: (N,) int64 in increasing order, which of the S (Z - 2 M) slices are pairs of the split; None for all. A
            split by file keeps some slices of a subject, but its whole slabs are in memory: the others are neighbours.
    """

    direction: Direction
    subjects: Sequence[str]
    sources: tuple[Slabs, ...]
    target: Slabs
    origin: Literal["lower", "upper"]
    split: str = "train"
    neighbours: int = 0
    margin: int = 0
    kept: Tensor | None = None

    def __len__(self) -> int:
        return len(self.subjects) * self.slices if self.kept is None else len(self.kept)

    @property
    def device(self) -> torch.device:
        return self.target.stored.device

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W)."""
        return self.target.stored.shape[2], self.target.stored.shape[3]

    @property
    def slices(self) -> int:
        """Number of slices of each subject that can be targets."""
        return self.target.stored.shape[1] - 2 * self.margin

    @cached_property
    def subject(self) -> Tensor:
        """(N,) index into `subjects`."""
        if self.kept is not None:
            return self.kept // self.slices
        return torch.arange(len(self.subjects), device=self.device).repeat_interleave(self.slices)

    @cached_property
    def position(self) -> Tensor:
        """(N,) index of the slice among those of its subject that can be targets."""
        if self.kept is not None:
            return self.kept % self.slices
        return torch.arange(self.slices, device=self.device).repeat(len(self.subjects))

    def normalised(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Sources (B, C, H, W) and targets (B, 1, H, W) of the pairs `index` (B,), uncropped, in [-1, 1].

        Channels are ordered by source, then from inferior to superior. Beyond an end of the stored slab its outermost
        slice is repeated.
        """
        subject = self.subject[index]
        if self.kept is not None:
            index = self.kept[index]
        # Among all S x Z slices; `index` counts those without margins.
        rows = (index if not self.margin else index + self.margin * (2 * subject + 1)).unsqueeze(1)
        source_rows = rows
        if self.neighbours:
            depth = self.target.stored.shape[1]
            first = (subject * depth).unsqueeze(1)
            offsets = torch.arange(-self.neighbours, self.neighbours + 1, device=self.device)
            source_rows = first + (rows - first + offsets).clamp_(0, depth - 1)
        images = [source.normalised(source_rows, subject) for source in self.sources]
        return images[0] if len(images) == 1 else torch.cat(images, 1), self.target.normalised(rows, subject)

    def of_subjects(self, chosen: Tensor, split: str) -> Pairs:
        """The pairs of the subjects `chosen` (n,), copied, as another split."""
        kept = None
        if self.kept is not None:
            numbered = enumerate(chosen.tolist())
            kept = torch.cat([self.position[self.subject == old] + new * self.slices for new, old in numbered])
        return replace(
            self,
            subjects=[self.subjects[n] for n in chosen.tolist()],
            sources=tuple(source.of_subjects(chosen) for source in self.sources),
            target=self.target.of_subjects(chosen),
            split=split,
            kept=kept,
        )

    def centres(self, source: Tensor) -> Tensor:
        """The slices at the target's place, one of each source, among all channels (B, C, H, W): a view."""
        return source[:, self.neighbours :: 2 * self.neighbours + 1]


def load_pairs(
    folder: Path, split: str, direction: str | None = None, device: str | torch.device = "cpu", neighbours: int = 0
) -> Pairs:
    """Read one split of the version in `folder`, once. Subjects that lack one of the arrays are left out.

    Raises:
        EmptySplitError: the split has no subjects with all of these arrays.
        ConfigError: `direction` does not fit the dataset.
        DatasetError: the version is damaged, or the device has too little memory.
    """
    version, table = verify.read_verified(folder)  # Zarr would read a missing shard as zeros
    if leaking := version.get("leaking_subjects"):
        _warn_of_leaks(folder, leaking)
    parsed = parse_direction(direction, version)
    names = (*parsed.sources, parsed.target)
    arrays = open_arrays(folder)
    margin = version["inputs"]["config"].get("margin", 0)
    chosen, is_in_split = _choose(folder, version, table, split, names, arrays[parsed.target].shape[1] - 2 * margin)
    rows = chosen["store_row"].to_numpy(dtype=np.int64)
    slab = sum(arrays[name].nbytes // arrays[name].shape[0] for name in names)
    _check_memory(folder, split, slab * len(rows), device)

    def ranges(name: str) -> Tensor:
        low_high = manifest.intensity_ranges(chosen, name).astype(np.float32)
        usable = np.isfinite(low_high).all(axis=1) & (low_high[:, 0] < low_high[:, 1])
        for subject, (low, high) in zip(chosen["subject_id"][~usable], low_high[~usable], strict=True):
            problem = f"{folder}: cannot normalise the {name} of {subject}, whose range is {low:g} to {high:g}"
            raise DatasetError(f"{problem}; make the version again: {command.how_to_make(version)}")
        return torch.from_numpy(low_high).to(device)

    def allocate(name: str) -> Tensor:
        """A buffer (rows, Z, H, W) for the slabs of an array.

        From torch: for large arrays NumPy requests huge pages, which a busy system is slow to find.
        """
        array = arrays[name]
        return torch.empty((len(rows), *array.shape[1:]), dtype=getattr(torch, str(array.dtype)))

    def read(name: str, buffer: Tensor) -> Slabs:
        low_high = ranges(name)
        try:
            arrays[name].get_orthogonal_selection((rows,), out=NDBuffer.from_numpy_array(buffer.numpy()))
        except Exception as error:  # codecs raise many types on damaged bytes
            problems = verify.verify(folder, deep=True)
            raise DatasetError(problems[0] if problems else f"{folder}: cannot read {name} ({error})") from error
        return Slabs(buffer.to(device), low_high)

    buffers = {name: allocate(name) for name in names}
    *sources, target = (read(name, buffers.pop(name)) for name in names)
    return Pairs(
        direction=parsed,
        subjects=chosen["subject_id"].tolist(),
        sources=tuple(sources),
        target=target,
        origin="lower" if f"{parsed.target}_affine" in arrays else "upper",
        split=split,
        neighbours=neighbours,
        margin=margin,
        kept=None if is_in_split.all() else torch.from_numpy(np.flatnonzero(is_in_split)).to(device),
    )


@cache
def _warn_of_leaks(folder: Path, leaking: int) -> None:
    """Warn of a split by file, once for each version: a run loads several splits of it."""
    subjects = quantity(leaking, "subject")
    log.warning("%s is split by file: slices of %s are in train and in test", folder, subjects)


def _choose(
    folder: Path, version: Mapping[str, Any], table: pd.DataFrame, split: str, names: Sequence[str], slices: int
) -> tuple[pd.DataFrame, NDArray[np.bool_]]:
    """The rows of the subjects with slices in a split and all of the arrays, and the mask (S, slices) of these slices.

    Raises:
        EmptySplitError: no subject of the split has slices in it and all of these arrays.
    """
    used = manifest.used_rows(table)
    masks = {name: manifest.slices_in_split(used, name, slices) for name in dict.fromkeys((*SPLITS, split))}
    of_split = masks[split].any(axis=1)
    if not of_split.any():
        counts = ", ".join(f"{masks[name].any(axis=1).sum()} {name}" for name in SPLITS)
        other = "--split-seed" if version["inputs"]["config"].get("split_counts") is None else "--split-counts"
        raise EmptySplitError(f"{folder} has no subject in split {split} (it has {counts}); try another {other}")
    is_complete = ~np.logical_or.reduce([is_absent(used, name) for name in names])
    is_chosen = of_split & is_complete
    if not is_chosen.any():
        raise EmptySplitError(f"no subject in split {split} of {folder} has all of {', '.join(names)}; train on others")
    if lacking := (of_split & ~is_complete).sum():
        subjects = quantity(of_split.sum(), "subject")
        log.info("split %s: %d of %s without one of %s", split, lacking, subjects, ", ".join(names))
    return used[is_chosen], masks[split][is_chosen]


def count_pairs(folder: Path, split: str, direction: Direction) -> int:
    """The number of pairs that `load_pairs` would load, from the manifest alone; see there for the errors."""
    version, table = metadata.read_metadata(folder), metadata.read_manifest(folder)
    slices = open_arrays(folder)[direction.target].shape[1] - 2 * version["inputs"]["config"].get("margin", 0)
    return int(_choose(folder, version, table, split, (*direction.sources, direction.target), slices)[1].sum())


def _check_memory(folder: Path, split: str, need: int, device: str | torch.device) -> None:
    device = torch.device(device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if need > free:
        raise DatasetError(
            f"split {split} of {folder} needs {need / 1e9:.2f} GB in the memory of {device}, which has "
            f"{free / 1e9:.2f} GB free; train on a device with more memory, or on a version with fewer slices"
        )


def draw_batch(pairs: Pairs, config: TrainConfig, start: int) -> tuple[Tensor, Tensor]:
    """A batch for a resolved configuration, from pair `start` of the stream on: source (B, C, h, w) and target.

    h and w are those of the crop. Computed on the device that holds the pairs, without waiting for a GPU.
    """
    index = batch_indices(len(pairs), config.seed, start, config.batch_size, pairs.device)
    source, target = augment(pairs.normalised(index), config.augment, config.crop(pairs.shape), config.seed, start)
    return source, target
