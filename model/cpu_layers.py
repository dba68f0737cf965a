"""PyTorch's layers with the same weights and the same function, but faster when training on a CPU.

Legend: B, C, H, W are batch, channel, height, width; I, O are input and output channels. Images and weights are stored
channels last. On other devices and in evaluation mode these layers are PyTorch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

FEW_PIXELS = 128
"""Up to this many pixels, B x H x W of the smaller image, a convolution is limited by reading its weights.

oneDNN reorders them in memory on every call; a matrix product reads them in their stored order.
"""

FEW_IMAGES = 2  # the discriminator's batch at batch size 1: a real and a generated pair


class InstanceNorm2d(nn.InstanceNorm2d):
    """Instance norm as the batch norm of one image at a time.

    PyTorch's instance norm copies images to channels first, and the next convolution copies them back. Batch norm works
    on channels last. This also helps on a GPU, but only for few images: for many it would launch many small kernels.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not _trains_on_cpu(self, x) and not (self.training and len(x) <= FEW_IMAGES):
            return super().forward(x)
        if len(x) == 1:  # `cat` of one image would copy its gradient
            return self._normalise_image(x)
        return torch.cat([self._normalise_image(image) for image in x.split(1)])

    def _normalise_image(self, image: Tensor) -> Tensor:
        return functional.batch_norm(image, None, None, self.weight, self.bias, training=True, eps=self.eps)


class Conv2d(nn.Conv2d):
    """A convolution that multiplies unfolded windows with the weights as a matrix (16 I, O) if there are few pixels."""

    def forward(self, x: Tensor) -> Tensor:
        if not _trains_on_cpu(self, x):
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

    If there are few pixels, they are multiplied with the weights as a matrix (I, 16 O), and the resulting 4 x 4 patches
    are added where they overlap.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 4, 2, 1)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        batch, channels, height, width = x.shape
        if not _trains_on_cpu(self, x) or batch * height * width > FEW_PIXELS:
            return super().forward(x, output_size)
        matrix = self.weight.permute(0, 2, 3, 1).flatten(1)
        patches = x.permute(0, 2, 3, 1).reshape(-1, channels) @ matrix
        # Pixel (h, w) adds to rows 2 h + k and columns 2 w + l of the padded result, with k and l from 0 to 3. With
        # k = 2 a + b, that is row h + a of the rows of parity b; likewise for columns. So four shifted sums give all.
        patches = patches.view(batch, height, width, 2, 2, 2, 2, -1).permute(3, 5, 0, 1, 4, 2, 6, 7).float()
        padded = sum(
            functional.pad(patches[a, c], (0, 0, 0, 0, c, 1 - c, 0, 0, a, 1 - a)) for a in range(2) for c in range(2)
        )
        assert isinstance(padded, Tensor)
        y = padded.reshape(batch, 2 * height + 2, 2 * width + 2, -1)[:, 1:-1, 1:-1]
        assert self.bias is not None
        return (y + self.bias).to(x.dtype).permute(0, 3, 1, 2)


def _trains_on_cpu(layer: nn.Module, x: Tensor) -> bool:
    return layer.training and x.device.type == "cpu"


def channels_last_view(weight: Tensor) -> Tensor:
    """A contiguous view of weights (O, I, h, w) that are stored channels last: (O, h, w, I), on the same memory.

    On a CPU the fused Adam copies the gradient of every weight that is not contiguous, which takes longer than its
    computation.
    """
    return weight.detach().permute(0, 2, 3, 1) if weight.dim() == 4 else weight.detach()


def logical_view(stored: Tensor) -> Tensor:
    """The inverse of `channels_last_view`: (O, h, w, I) to (O, I, h, w)."""
    return stored.permute(0, 3, 1, 2) if stored.dim() == 4 else stored
