"""Load a split of a dataset version into the memory of the training device, and draw batches from it.

Legend: N pairs of slices, of S subjects with Z slices each; B, H, W are batch, height, width. Pairs keep their stored
dtype (int16, uint8); batches are float32 (B, 1, H, W) in [-1, 1]. Which pairs a step uses, and how they are augmented,
depends on the seed and the step alone, so resuming needs only the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn import functional
from zarr.buffer.cpu import NDBuffer

from ixi_etl.dataset import manifest, metadata, verify
from ixi_etl.dataset.store import open_arrays
from ixi_etl.errors import ConfigError, DatasetError, EmptySplitError
from model.config import Augment, TrainConfig

CPU = torch.device("cpu")
JITTER = 286 / 256  # as published: enlarge by this factor, then crop at random


@dataclass(frozen=True)
class Pairs:
    """The pairs of slices of a split, ordered by subject, then by slice.

    Attributes:
        direction: names of the source array and the target array.
        subjects: S ids.
        source, target: (N, H, W) as stored.
        subject: (N,) index into `subjects`.
        position: (N,) index of the slice in its slab, 0 to Z - 1.
        source_range, target_range: (S, 2) float32, the stored values mapped to -1 and 1: the manifest's percentiles.
        split: name of the split.
        origin: `lower` if row 0 is shown at the bottom (y points to the anterior), `upper` if at the top.
    """

    direction: tuple[str, str]
    subjects: Sequence[str]
    source: Tensor
    target: Tensor
    subject: Tensor
    position: Tensor
    source_range: Tensor
    target_range: Tensor
    origin: Literal["lower", "upper"]
    split: str = "train"

    def __len__(self) -> int:
        return len(self.source)

    def normalised(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Sources and targets of the pairs `index` (B,), uncropped: (B, 1, H, W) in [-1, 1]."""
        subject = self.subject[index]
        return (  # `index_select` copies slice by slice, which takes a third of the time of indexing
            normalise(self.source.index_select(0, index), self.source_range[subject]),
            normalise(self.target.index_select(0, index), self.target_range[subject]),
        )


def normalise(stored: Tensor, low_high: Tensor) -> Tensor:
    """Map stored slices (B, H, W) to (B, 1, H, W) float32: `low_high` (B, 2) to [-1, 1], with clipping."""
    low, high = low_high[:, 0, None, None], low_high[:, 1, None, None]
    # In place: allocating memory for each term takes longer than computing it.
    return stored.to(torch.float32, copy=True).sub_(low).mul_(2 / (high - low)).sub_(1).clamp_(-1, 1).unsqueeze(1)


def parse_direction(direction: str | None, names: tuple[str, str]) -> tuple[str, str]:
    """Parse `t1->t2` to (`t1`, `t2`); None means the direction of the dataset, `names`.

    Raises:
        ConfigError: these are not the two arrays of the dataset.
    """
    if direction is None:
        return names
    source, _, target = direction.partition("->")
    if {source.strip(), target.strip()} != set(names):
        allowed = f"{names[0]}->{names[1]} or {names[1]}->{names[0]}"
        raise ConfigError(f"direction {direction!r} does not fit the dataset; use {allowed}")
    return source.strip(), target.strip()


def load_pairs(folder: Path, split: str, direction: str | None = None, device: str | torch.device = "cpu") -> Pairs:
    """Read one split of the version in `folder`, once.

    Raises:
        EmptySplitError: the split has no subjects.
        ConfigError: `direction` does not fit the dataset.
        DatasetError: the version is damaged, or the device has too little memory.
    """
    version, table = verify.read_verified(folder)  # Zarr would read a missing shard as zeros
    source, target = parse_direction(direction, (version["source"], version["target"]))
    used = manifest.used_rows(table)
    chosen = used[used["split"] == split]
    if chosen.empty:
        counts = ", ".join(f"{n} {name}" for name, n in version["splits"].items())
        raise EmptySplitError(f"{folder} has no subject in split {split} (it has {counts}); try another split_seed")
    arrays = open_arrays(folder)
    rows = chosen["store_row"].to_numpy(dtype=np.int64)
    slices = arrays[source].shape[1]
    slab = sum(arrays[name].nbytes // arrays[name].shape[0] for name in (source, target))
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

    def read_slices(name: str, buffer: Tensor) -> Tensor:
        try:
            arrays[name].get_orthogonal_selection((rows,), out=NDBuffer.from_numpy_array(buffer.numpy()))
        except Exception as error:  # codecs raise many types on damaged bytes
            problems = verify.verify(folder, deep=True)
            raise DatasetError(problems[0] if problems else f"{folder}: cannot read {name} ({error})") from error
        return buffer.flatten(0, 1).to(device)

    source_buffer, target_buffer = allocate(source), allocate(target)
    return Pairs(
        direction=(source, target),
        subjects=chosen["subject_id"].tolist(),
        source=read_slices(source, source_buffer),
        target=read_slices(target, target_buffer),
        subject=torch.arange(len(rows), device=device).repeat_interleave(slices),
        position=torch.arange(slices, device=device).repeat(len(rows)),
        source_range=ranges(source),
        target_range=ranges(target),
        origin="lower" if f"{source}_affine" in arrays else "upper",
        split=split,
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
    """A batch for a resolved configuration, from pair `start` of the stream on: source and target (B, 1, side, side).

    Computed on the device that holds the pairs, without waiting for a GPU.
    """
    assert config.side is not None
    index = batch_indices(len(pairs), config.seed, start, config.batch_size, pairs.source.device)
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
    """Enlarge, crop to (B, 1, side, side) and flip `images` (B, 1, H, W) at random, all of a pair in the same way.

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
    image = torch.arange(batch, device=device)[:, None, None]
    return [i[image, 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1) for i in images]


def check_side(side: int, height: int, width: int) -> None:
    """Raise `ConfigError` if crops of `side` x `side` do not fit slices of height x width."""
    if side > min(height, width):
        raise ConfigError(f"crops of {side} x {side} do not fit slices of {height} x {width}; set a smaller side")
