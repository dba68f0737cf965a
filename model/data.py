"""One split of a dataset version, held whole in the memory of the device that trains on it.

Legend: N pairs of slices, of S subjects with Z slices each; B, H, W are batch, height, width. Pairs lie in their stored
dtype (int16, uint8); batches are float32 (B, 1, H, W) in [-1, 1]. Which pairs a step sees, and how they are
augmented, is a function of the seed and the step alone, so a training that goes on needs no more than its step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Thread
from typing import Literal

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn import functional
from zarr.buffer.cpu import NDBuffer

from ixi_etl import dataset, manifest
from ixi_etl.errors import DatasetError
from ixi_etl.places import is_local
from ixi_etl.store import open_arrays, read_ahead, shards_of
from model.config import Augment, TrainConfig

CPU = torch.device("cpu")
JITTER = 286 / 256  # as published: enlarge by so much, then crop at random


class EmptySplitError(DatasetError):
    """A version has nobody in a split."""


@dataclass(frozen=True)
class Pairs:
    """Slices of a split, in the order of subjects and slices.

    Attributes:
        direction: names of the two arrays, source and target.
        subjects: S ids.
        source, target: (N, H, W) as stored.
        subject: (N,) which of the subjects a slice is of.
        position: (N,) which of the Z slices of its slab it is.
        source_range, target_range: (S, 2) float32, the stored values that become -1 and 1: the manifest's percentiles.
        split: which of the version's splits it is.
        origin: `lower` where row 0 is shown at the bottom (y runs to the anterior), `upper` where it is on top.
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
        """Sources and targets of the pairs `index` (B,), whole: (B, 1, H, W) in [-1, 1]."""
        subject = self.subject[index]
        return (  # `index_select` copies slice by slice, which takes a third of the time that indexing takes
            normalise(self.source.index_select(0, index), self.source_range[subject]),
            normalise(self.target.index_select(0, index), self.target_range[subject]),
        )


def normalise(stored: Tensor, low_high: Tensor) -> Tensor:
    """(B, H, W) as stored -> (B, 1, H, W) float32: low_high (B, 2) becomes [-1, 1], and what lies beyond is clipped."""
    low, high = low_high[:, 0, None, None], low_high[:, 1, None, None]
    # In place: new memory for each term costs more than the terms.
    return stored.to(torch.float32, copy=True).sub_(low).mul_(2 / (high - low)).sub_(1).clamp_(-1, 1).unsqueeze(1)


def parse_direction(direction: str | None, names: tuple[str, str]) -> tuple[str, str]:
    """`t1->t2` -> (`t1`, `t2`); None is the dataset's own.

    Raises:
        DatasetError: these are not the two arrays of the dataset.
    """
    if direction is None:
        return names
    source, _, target = direction.partition("->")
    if {source.strip(), target.strip()} != set(names):
        there = f"{names[0]}->{names[1]} or {names[1]}->{names[0]}"
        raise DatasetError(f"direction {direction!r} does not fit the dataset: it is {there}")
    return source.strip(), target.strip()


def load(folder: Path, split: str, direction: str | None = None, device: str | torch.device = "cpu") -> Pairs:
    """Read one split of the version in `folder`, once.

    Raises:
        EmptySplitError: nobody is in the split.
        DatasetError: the version is damaged, or the device's memory too small.
    """
    facts, table = dataset.read_sound(folder)  # a shard that is not there would be read as zeros
    source, target = parse_direction(direction, (facts["source"], facts["target"]))
    used = manifest.used(table)
    chosen = used[used["split"] == split]
    if chosen.empty:
        there = ", ".join(f"{n} {name}" for name, n in facts["splits"].items())
        raise EmptySplitError(f"{folder} has no subject in split {split} (it has {there}); try another split_seed")
    arrays = open_arrays(folder)
    rows = chosen["store_row"].to_numpy(dtype=np.int64)
    slices = arrays[source].shape[1]
    slab = sum(arrays[name].nbytes // arrays[name].shape[0] for name in (source, target))
    _check_memory(folder, split, slab * len(rows), device)
    if is_local(folder):
        files = [path for name in (source, target) for path in shards_of(folder, arrays[name], rows)]
        Thread(target=read_ahead, args=(files,), daemon=True).start()

    def ranges(name: str) -> Tensor:
        low_high = chosen[[f"{name}_p_low", f"{name}_p_high"]].to_numpy(dtype=np.float32, na_value=np.nan)
        usable = np.isfinite(low_high).all(axis=1) & (low_high[:, 0] < low_high[:, 1])
        for subject, (low, high) in zip(chosen["subject_id"][~usable], low_high[~usable], strict=True):
            said = f"{folder}: the {name} of {subject} cannot be normalised, its percentiles are {low:g} and {high:g}"
            raise DatasetError(f"{said}; make the version again: `{dataset.COMMANDS[facts['name']]}`")
        return torch.from_numpy(low_high).to(device)

    def memory(name: str) -> Tensor:
        """Room for the slabs of an array.

        Of torch's: for large arrays numpy asks for huge pages, and a busy system is slow to find them. Written once by
        all threads while the disk is read: threads that decode into new memory wait for each other to be given it.
        """
        array = arrays[name]
        return torch.empty((len(rows), *array.shape[1:]), dtype=getattr(torch, str(array.dtype))).zero_()

    def slabs(name: str, read: Tensor) -> Tensor:
        try:
            arrays[name].get_orthogonal_selection((rows,), out=NDBuffer.from_numpy_array(read.numpy()))
        except Exception as error:  # whatever a codec raises on damaged bytes
            found = dataset.verify(folder, deep=True)
            raise DatasetError(found[0] if found else f"{folder}: {name} cannot be read ({error})") from error
        return read.flatten(0, 1).to(device)

    rooms = memory(source), memory(target)
    return Pairs(
        direction=(source, target),
        subjects=chosen["subject_id"].tolist(),
        source=slabs(source, rooms[0]),
        target=slabs(target, rooms[1]),
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
            f"{free / 1e9:.2f} GB free; train on a device with more, or on a version of fewer slices"
        )


# -- which pairs, and how they are changed ----------------------------------------------------------------------------


def draw(pairs: Pairs, config: TrainConfig, start: int) -> tuple[Tensor, Tensor]:
    """A batch of a resolved configuration, which begins with pair `start` of the stream: (B, 1, side, side) each.

    Drawn where the pairs lie; a GPU is told what to do, and not waited for.
    """
    assert config.side is not None
    index = indices(len(pairs), config.seed, start, config.batch_size, pairs.source.device)
    source, target = augment(pairs.normalised(index), config.augment, config.side, config.seed, start)
    return source, target


def indices(pairs: int, seed: int, start: int, count: int, device: torch.device = CPU) -> Tensor:
    """(count,) pairs `start`, `start + 1`, ... of an endless stream: every pass over the data in a new random order."""
    passes = [_order(pairs, seed, n, device) for n in range(start // pairs, (start + count - 1) // pairs + 1)]
    order = passes[0] if len(passes) == 1 else torch.cat(passes)
    return order.narrow(0, start % pairs, count)


@lru_cache(maxsize=4)
def _order(pairs: int, seed: int, number: int, device: torch.device) -> Tensor:
    return _sent(torch.randperm(pairs, generator=_generator(seed, 0, number)), device)


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """Values of this machine's memory, on `device`. A GPU takes them when it comes to it, and nobody waits."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _generator(seed: int, stream: int, number: int) -> torch.Generator:
    """Random numbers of their own for each (stream, number)."""
    words = np.random.SeedSequence([seed % 2**63, stream, number]).generate_state(2)
    return torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


def augment(images: Sequence[Tensor], kind: Augment, side: int, seed: int, first: int) -> list[Tensor]:
    """The same change to each of `images` (B, 1, H, W): enlarged, cropped to (B, 1, side, side), flipped, as drawn.

    What is drawn for a pair depends on its place in the stream of `indices`, where these begin with `first`; so it is
    the same in batches of any size, on any number of processes.

    Raises:
        DatasetError: the images are smaller than the crop.
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
    top, left, flipped = _sent(drawn, device).split(1, dim=1)
    ahead = torch.arange(side, device=device)
    rows, columns = top + ahead, left + torch.where(flipped.bool(), ahead.flip(0), ahead)
    image = torch.arange(batch, device=device)[:, None, None]
    return [i[image, 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1) for i in images]


def check_side(side: int, height: int, width: int) -> None:
    """Raise `DatasetError` if crops of `side` do not fit slices of height x width."""
    if side > min(height, width):
        raise DatasetError(f"crops of {side} x {side} do not fit slices of {height} x {width}; set a smaller side")
