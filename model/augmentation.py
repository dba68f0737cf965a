"""Choose the pairs of a batch, and augment them.

Both depend on the seed and on the place in an endless stream of pairs alone, so resuming needs only the step. Legend:
B, C, H, W are batch, channels, height, width; h and w are those of a crop.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ixi_etl.errors import ConfigError
from model.config import Augment

CPU = torch.device("cpu")
JITTER = 286 / 256  # as published: enlarge by this factor, then crop at random


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


def augment(images: Sequence[Tensor], kind: Augment, crop: tuple[int, int], seed: int, first: int) -> list[Tensor]:
    """Enlarge, crop to (B, C, h, w) and flip `images` (B, C, H, W) at random, all of a pair in the same way.

    The random draws for a pair depend on its place in the stream of `batch_indices`, where the first pair is `first`.
    So they are the same in batches of any size and for any number of processes.

    Raises:
        ConfigError: the images are smaller than the crop.
    """
    if kind == "jitter":
        size = [round(n * JITTER) for n in images[0].shape[-2:]]
        images = [functional.interpolate(i, size=size, mode="bilinear", align_corners=False) for i in images]
    batch, _, height, width = images[0].shape
    check_crop(crop, (height, width))
    if (height, width) == crop and kind == "none":
        return list(images)
    (tall, wide), device = crop, images[0].device
    choices = (height - tall + 1, width - wide + 1, 2 if kind != "none" else 1)
    draws = [_generator(seed, 1, first + n) for n in range(batch)]
    drawn = torch.stack([torch.cat([torch.randint(n, (1,), generator=draw) for n in choices]) for draw in draws])
    top, left, flipped = _to_device_async(drawn, device).split(1, dim=1)
    down, across = (torch.arange(n, device=device) for n in crop)
    rows, columns = top + down, left + torch.where(flipped.bool(), across.flip(0), across)
    return [_take(i, rows, columns) for i in images]


def _take(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The pixels at `rows` (B, h) and `columns` (B, w) of images (B, C, H, W)."""
    channels = images.shape[1]
    plane = torch.arange(images.shape[0] * channels, device=images.device)[:, None, None]
    rows, columns = (n[:, None].expand(-1, channels, -1).flatten(0, 1) for n in (rows, columns))
    taken = images.flatten(0, 1)[plane, rows[:, :, None], columns[:, None, :]]
    return taken.view(-1, channels, *taken.shape[1:])


def check_crop(crop: tuple[int, int], shape: tuple[int, int]) -> None:
    """Raise `ConfigError` if crops of this height and width do not fit slices of that `shape`."""
    if crop[0] > shape[0] or crop[1] > shape[1]:
        sizes = [f"{height} x {width}" for height, width in (crop, shape)]
        raise ConfigError(f"crops of {sizes[0]} do not fit slices of {sizes[1]}; set a smaller side")
