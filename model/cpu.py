"""Layers that compute what PyTorch's compute, with the same weights by name, in less time on a CPU in training.

Legend: B, C, H, W are batch, channel, height, width; images lie channels last in memory, weights too. I, O are channels
in and out, M = B x pixels of the smaller image of a convolution. Elsewhere, and outside training, they are PyTorch's.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn
from torch.nn import functional

FEW_PIXELS = 128
"""With so few, a convolution is bound by reading its weights, and a matrix product reads them as they lie."""

FEW_IMAGES = 2  # a pair and a generated one, which the discriminator is shown at batch size 1

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


class InstanceNorm2d(nn.InstanceNorm2d):
    """PyTorch copies images to channels first to normalise them, and the next convolution copies them back.

    Batch norm takes them as they lie, and that of one image by its own statistics is instance norm. On a GPU too, but
    there many images one by one would be many small kernels.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not _in_training(self, x) and not (self.training and len(x) <= FEW_IMAGES):
            return super().forward(x)
        if len(x) == 1:  # as `cat` of one would copy its gradient
            return self._of_one(x)
        return torch.cat([self._of_one(image) for image in x.split(1)])

    def _of_one(self, image: Tensor) -> Tensor:
        return functional.batch_norm(image, None, None, self.weight, self.bias, training=True, eps=self.eps)


class Conv2d(nn.Conv2d):
    """Few pixels are unfolded, and multiplied with the weights as a matrix (16 I, O): oneDNN would reorder those."""

    def forward(self, x: Tensor) -> Tensor:
        if not _in_training(self, x):
            return super().forward(x)
        size, stride, pad = self.kernel_size[0], self.stride[0], int(self.padding[0])
        height, width = ((n + 2 * pad - size) // stride + 1 for n in x.shape[-2:])
        if len(x) * height * width > FEW_PIXELS:
            return super().forward(x)
        padded = functional.pad(x.permute(0, 2, 3, 1), (0, 0, pad, pad, pad, pad))
        windows = padded.unfold(1, size, stride).unfold(2, size, stride).permute(0, 1, 2, 4, 5, 3)
        matrix = self.weight.permute(0, 2, 3, 1).flatten(1)
        y = functional.linear(windows.reshape(-1, matrix.shape[1]), matrix, self.bias)
        return y.view(len(x), height, width, -1).permute(0, 3, 1, 2)


class DoublingConv2d(nn.ConvTranspose2d):
    """A transposed convolution of kernel 4, stride 2, padding 1: (B, I, H, W) to (B, O, 2 H, 2 W).

    Few pixels are multiplied with the weights as a matrix (I, 16 O), and what each gives is laid over its neighbours'.
    """

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__(inside, outside, 4, 2, 1)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        batch, inside, height, width = x.shape
        if not _in_training(self, x) or batch * height * width > FEW_PIXELS:
            return super().forward(x, output_size)
        matrix = self.weight.permute(0, 2, 3, 1).flatten(1)
        patches = x.permute(0, 2, 3, 1).reshape(-1, inside) @ matrix
        # Row 2 h + k of the padded result, with k = 2 a + b: row h + a of those whose parity is b. The same of columns.
        patches = patches.view(batch, height, width, 2, 2, 2, 2, -1).permute(3, 5, 0, 1, 4, 2, 6, 7).float()
        canvas = sum(
            functional.pad(patches[a, c], (0, 0, 0, 0, c, 1 - c, 0, 0, a, 1 - a)) for a in range(2) for c in range(2)
        )
        assert isinstance(canvas, Tensor)
        y = canvas.reshape(batch, 2 * height + 2, 2 * width + 2, -1)[:, 1:-1, 1:-1]
        assert self.bias is not None
        return (y + self.bias).to(x.dtype).permute(0, 3, 1, 2)


def _in_training(layer: nn.Module, x: Tensor) -> bool:
    return layer.training and x.device.type == "cpu"


def as_it_lies(weight: Tensor) -> Tensor:
    """The same memory in its own order: weights (O, I, h, w) that lie channels last are (O, h, w, I), contiguous.

    The fused Adam on a CPU copies the gradient of every weight that is not, slower than it computes.
    """
    return weight.detach().permute(0, 2, 3, 1) if weight.dim() == 4 else weight.detach()


def as_it_is_shaped(lying: Tensor) -> Tensor:
    """The inverse of `as_it_lies`."""
    return lying.permute(0, 3, 1, 2) if lying.dim() == 4 else lying


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for what is allocated next, in this process from now on; elsewhere nothing.

    It would give blocks above 32 MB back to the system each time, which then has to clear every page of the next one:
    for gradients and activations that costs more than computing many of them.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
