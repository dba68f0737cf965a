"""Load a split of a dataset version into the memory of the training device, and draw batches from it.

Legend: N pairs, of S subjects with Z stored slices each; B, H, W are batch, height, width. The margin of a version, M
slices at either end of each slab, is never a target, so N = S (Z - 2 M). A batch has C channels of sources: 2 n + 1
slices of each, n being the `neighbours`. Arrays keep their stored dtype (int16, uint8); batches are float32 in [-1, 1].
Which pairs a step uses, and how they are augmented, depends on the seed and the step alone, so resuming needs only the
step.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn import functional
from zarr.buffer.cpu import NDBuffer

from ixi_etl.dataset import manifest, metadata, verify
from ixi_etl.dataset.direction import Direction, parse_direction
from ixi_etl.dataset.schema import is_absent
from ixi_etl.dataset.store import open_arrays
from ixi_etl.errors import ConfigError, DatasetError, EmptySplitError
from model.config import Augment, TrainConfig

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
JITTER = 286 / 256  # as published: enlarge by this factor, then crop at random


@dataclass(frozen=True)
class Slabs:
    """One array of a split.

    Attributes:
        stored: (S, Z, H, W) as stored.
        low_high: (S, 2) float32, the stored values mapped to -1 and 1: the manifest's percentiles.
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
    """

    direction: Direction
    subjects: Sequence[str]
    sources: tuple[Slabs, ...]
    target: Slabs
    origin: Literal["lower", "upper"]
    split: str = "train"
    neighbours: int = 0
    margin: int = 0

    def __len__(self) -> int:
        return len(self.subjects) * self.slices

    @property
    def device(self) -> torch.device:
        return self.target.stored.device

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W)."""
        return self.target.stored.shape[2], self.target.stored.shape[3]

    @property
    def slices(self) -> int:
        """Number of pairs of each subject."""
        return self.target.stored.shape[1] - 2 * self.margin

    @cached_property
    def subject(self) -> Tensor:
        """(N,) index into `subjects`."""
        return torch.arange(len(self.subjects), device=self.device).repeat_interleave(self.slices)

    @cached_property
    def position(self) -> Tensor:
        """(N,) index of the slice among those of its subject that are targets."""
        return torch.arange(self.slices, device=self.device).repeat(len(self.subjects))

    def normalised(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Sources (B, C, H, W) and targets (B, 1, H, W) of the pairs `index` (B,), uncropped, in [-1, 1].

        Channels are ordered by source, then from inferior to superior. Beyond an end of the stored slab its outermost
        slice is repeated.
        """
        subject = self.subject[index]
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

    def centres(self, source: Tensor) -> Tensor:
        """The slices at the target's place, one of each source, among all channels (B, C, H, W): a view."""
        return source[:, self.neighbours :: 2 * self.neighbours + 1]


def normalise(stored: Tensor, low_high: Tensor) -> Tensor:
    """Map stored slices (B, K, H, W) to float32: `low_high` (B, 2) to [-1, 1], with clipping."""
    low, high = low_high[:, 0, None, None, None], low_high[:, 1, None, None, None]
    # In place: allocating memory for each term takes longer than computing it.
    return stored.to(torch.float32, copy=True).sub_(low).mul_(2 / (high - low)).sub_(1).clamp_(-1, 1)


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
    parsed = parse_direction(direction, version)
    names = (*parsed.sources, parsed.target)
    used = manifest.used_rows(table)
    in_split = used[used["split"] == split]
    if in_split.empty:
        counts = ", ".join(f"{n} {name}" for name, n in version["splits"].items())
        raise EmptySplitError(f"{folder} has no subject in split {split} (it has {counts}); try another split_seed")
    is_complete = ~np.logical_or.reduce([is_absent(in_split, name) for name in names])
    chosen = in_split[is_complete]
    if chosen.empty:
        raise EmptySplitError(f"no subject in split {split} of {folder} has all of {', '.join(names)}; train on others")
    if len(chosen) < len(in_split):
        lacking = len(in_split) - len(chosen)
        log.info("split %s: %d of %d subjects lack one of %s", split, lacking, len(in_split), ", ".join(names))
    arrays = open_arrays(folder)
    rows = chosen["store_row"].to_numpy(dtype=np.int64)
    slab = sum(arrays[name].nbytes // arrays[name].shape[0] for name in names)
    _check_memory(folder, split, slab * len(rows), device)

    def ranges(name: str) -> Tensor:
        low_high = chosen[[f"{name}_p_low", f"{name}_p_high"]].to_numpy(dtype=np.float32, na_value=np.nan)
        usable = np.isfinite(low_high).all(axis=1) & (low_high[:, 0] < low_high[:, 1])
        for subject, (low, high) in zip(chosen["subject_id"][~usable], low_high[~usable], strict=True):
            problem = f"{folder}: cannot normalise the {name} of {subject}, its percentiles are {low:g} and {high:g}"
            raise DatasetError(f"{problem}; make the version again: `{metadata.COMMANDS[version['name']]}`")
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
        margin=version["inputs"]["config"].get("margin", 0),
    )


def _check_memory(folder: Path, split: str, need: int, device: str | torch.device) -> None:
    device = torch.device(device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if need > free:
        raise DatasetError(
            f"split {split} of {folder} needs {need / 1e9:.2f} GB in the memory of {device}, which has "
            f"{free / 1e9:.2f} GB free; train on a device with more memory, or on a version with fewer slices"
        )


def draw_batch(pairs: Pairs, config: TrainConfig, start: int) -> tuple[Tensor, Tensor]:
    """A batch for a resolved configuration, from pair `start` of the stream on: source (B, C, side, side) and target.

    Computed on the device that holds the pairs, without waiting for a GPU.
    """
    assert config.side is not None
    index = batch_indices(len(pairs), config.seed, start, config.batch_size, pairs.device)
    source, target = augment(pairs.normalised(index), config.augment, config.side, config.seed, start)
    return source, target


def batch_indices(pairs: int, seed: int, start: int, count: int, device: torch.device = CPU) -> Tensor:
    """Indices (count,) of pairs `start`, `start + 1`, ... of an endless stream: each pass has a new random order."""
    passes = [_order(pairs, seed, n, device) for n in range(start // pairs, (start + count - 1) // pairs + 1)]
    order = passes[0] if len(passes) == 1 else torch.cat(passes)
    return order.narrow(0, start % pairs, count)


@lru_cache(maxsize=4)
def _order(pairs: int, seed: int, number: int, device: torch.device) -> Tensor:
    return _to_device_async(torch.randperm(pairs, generator=_generator(seed, 0, number)), device)


def _to_device_async(values: Tensor, device: torch.device) -> Tensor:
    """Copy values from CPU memory to `device`; to a GPU from pinned memory, without waiting."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _generator(seed: int, stream: int, number: int) -> torch.Generator:
    """An independent random generator for each (stream, number)."""
    words = np.random.SeedSequence([seed % 2**63, stream, number]).generate_state(2)
    return torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


def augment(images: Sequence[Tensor], kind: Augment, side: int, seed: int, first: int) -> list[Tensor]:
    """Enlarge, crop to (B, C, side, side) and flip `images` (B, C, H, W) at random, all of a pair in the same way.

    The random draws for a pair depend on its place in the stream of `batch_indices`, where the first pair is `first`.
    So they are the same in batches of any size and for any number of processes.

    Raises:
        ConfigError: the images are smaller than the crop.
    """
    if kind == "jitter":
        size = [round(n * JITTER) for n in images[0].shape[-2:]]
        images = [functional.interpolate(i, size=size, mode="bilinear", align_corners=False) for i in images]
    batch, _, height, width = images[0].shape
    check_side(side, height, width)
    if height == width == side and kind == "none":
        return list(images)
    choices, device = (height - side + 1, width - side + 1, 2 if kind != "none" else 1), images[0].device
    draws = [_generator(seed, 1, first + n) for n in range(batch)]
    drawn = torch.stack([torch.cat([torch.randint(n, (1,), generator=draw) for n in choices]) for draw in draws])
    top, left, flipped = _to_device_async(drawn, device).split(1, dim=1)
    offsets = torch.arange(side, device=device)
    rows, columns = top + offsets, left + torch.where(flipped.bool(), offsets.flip(0), offsets)
    return [_take(i, rows, columns) for i in images]


def _take(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The pixels at `rows` and `columns` (B, side) of images (B, C, H, W)."""
    channels = images.shape[1]
    plane = torch.arange(images.shape[0] * channels, device=images.device)[:, None, None]
    rows, columns = (n[:, None].expand(-1, channels, -1).flatten(0, 1) for n in (rows, columns))
    taken = images.flatten(0, 1)[plane, rows[:, :, None], columns[:, None, :]]
    return taken.view(-1, channels, *taken.shape[1:])


def check_side(side: int, height: int, width: int) -> None:
    """Raise `ConfigError` if crops of `side` x `side` do not fit slices of height x width."""
    if side > min(height, width):
        raise ConfigError(f"crops of {side} x {side} do not fit slices of {height} x {width}; set a smaller side")
