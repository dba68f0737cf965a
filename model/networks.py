"""The generator and the discriminator of pix2pix (Isola et al., 2017, arXiv:1611.07004), on one channel.

Legend: B, C, H, W are batch, channel, height, width. Images are in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.config import SIDES, Norm, Upsampling
from model.cpu import Conv2d, DoublingConv2d, InstanceNorm2d

Network = TypeVar("Network", bound=nn.Module)

DROPOUT_LEVELS = 3  # of the decoder, from the innermost
WIDEST = 8  # times the width, however deep


class UNetGenerator(nn.Module):
    """A U-Net whose only noise is dropout: stride-2 convolutions down to 1 x 1, and back up, with skip connections.

    Takes and gives (B, 1, side, side). The defaults are the published network: 8 levels at 256, 54.4 M parameters.

    Args:
        side: of the square image, a power of two from 32 to 512; it fixes the number of levels.
        width: channels of the outermost level; doubled at each level down to 8 x.
        dropout: probability in the first three decoder levels.
        upsampling: `transpose` (published), or `nearest`: resize and convolve, which leaves no checkerboard.
        norm: `instance` (affine), `batch`, or `none`. At batch size 1 the published batch norm, which uses the batch's
            statistics at test time too, is the same function as instance norm.
    """

    def __init__(
        self,
        side: int = 256,
        width: int = 64,
        dropout: float = 0.5,
        upsampling: Upsampling = "transpose",
        norm: Norm = "instance",
    ) -> None:
        super().__init__()
        if side not in SIDES:
            raise ValueError(f"side is {side}; the generator takes a power of two from 32 to 512")
        self.side = side
        levels = side.bit_length() - 1
        channels = [width * min(2**level, WIDEST) for level in range(levels)]
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        for level, wide in enumerate(channels):
            outermost, innermost = level == 0, level == levels - 1
            self.down.append(
                nn.Sequential(
                    *([] if outermost else [nn.LeakyReLU(0.2)]),
                    Conv2d(1 if outermost else channels[level - 1], wide, 4, 2, 1),
                    # A norm of the 1 x 1 image would leave nothing of it.
                    *([] if outermost or innermost else [_norm(norm, wide)]),
                )
            )
        for level in reversed(range(levels)):
            outermost, innermost = level == 0, level == levels - 1
            inside = channels[level] * (1 if innermost else 2)  # what came up, and the skip connection
            outside = 1 if outermost else channels[level - 1]
            from_inside = levels - 1 - level
            self.up.append(
                nn.Sequential(
                    nn.ReLU(),
                    *_upsample(upsampling, inside, outside),
                    *([nn.Tanh()] if outermost else [_norm(norm, outside)]),
                    *([nn.Dropout(dropout)] if from_inside < DROPOUT_LEVELS and not outermost else []),
                )
            )
        self.apply(_draw_weights)

    def forward(self, source: Tensor) -> Tensor:
        skips = []
        inside = source
        for down in self.down:
            inside = down(inside)
            skips.append(inside)
        x: Tensor = self.up[0](skips.pop())
        for up in self.up[1:]:
            x = up(torch.cat([skips.pop(), x], dim=1))
        return x

    def whole(self, source: Tensor) -> Tensor:
        """Generate from (B, 1, H, W) of any size: up to the next multiples of `side`, background (-1) is put around."""
        height, width = source.shape[-2:]
        padded = functional.pad(source, (0, -width % self.side, 0, -height % self.side), value=-1.0)
        generated: Tensor = self(padded)
        return generated[..., :height, :width]


class PatchDiscriminator(nn.Module):
    """Scores overlapping patches of a pair, real or not: from source and target (B, 1, H, W) to logits (B, 1, h, w).

    Each score sees `receptive_field` x `receptive_field` pixels: 70 at three layers (published), 34 at two, 16 at one,
    the latter for small images.
    """

    def __init__(self, width: int = 64, layers: int = 3, norm: Norm = "instance") -> None:
        super().__init__()
        strides = [2] * layers + [1, 1]
        channels = [2, *(width * min(2**n, WIDEST) for n in range(layers + 1)), 1]
        blocks: list[nn.Module] = []
        for n, stride in enumerate(strides):
            first, last = n == 0, n == len(strides) - 1
            blocks.append(Conv2d(channels[n], channels[n + 1], 4, stride, 1))
            if not last:
                blocks += [*([] if first else [_norm(norm, channels[n + 1])]), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*blocks)
        self.receptive_field = receptive_field([(4, stride) for stride in strides])
        self.apply(_draw_weights)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        scores: Tensor = self.layers(torch.cat([source, target], dim=1))
        return scores


def place(network: Network, device: str | torch.device) -> Network:
    """Move a network to a device, with channels last in memory: how convolutions run fastest."""
    return network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def receptive_field(layers: list[tuple[int, int]]) -> int:
    """Pixels along a side that one output sees, for convolutions given as (kernel, stride), first to last."""
    pixels = 1
    for kernel, stride in reversed(layers):
        pixels = (pixels - 1) * stride + kernel
    return pixels


def _upsample(kind: Upsampling, inside: int, outside: int) -> list[nn.Module]:
    if kind == "transpose":
        return [DoublingConv2d(inside, outside)]
    return [nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(inside, outside, 3, 1, 1)]


def _norm(kind: Norm, channels: int) -> nn.Module:
    kinds: dict[str, Callable[[], nn.Module]] = {
        "instance": lambda: InstanceNorm2d(channels, affine=True),
        "batch": lambda: nn.BatchNorm2d(channels),
        "none": nn.Identity,
    }
    return kinds[kind]()


def _draw_weights(module: nn.Module) -> None:
    """N(0, 0.02) for convolutions, N(1, 0.02) for norms, 0 for biases, as published."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.InstanceNorm2d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
