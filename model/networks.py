"""The networks and losses of pix2pix (Isola et al., 2017, arXiv:1611.07004), with a target of one channel.

Legend: B, C, H, W are batch, channels of the source, height, width; h, w those of the discriminator's output, one logit
per patch. Images are in [-1, 1]. All losses are float32 scalars, means over all elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.config import SIDES, Adversarial, Norm, TrainConfig, Upsampling
from model.cpu_layers import Conv2d, DoublingConv2d, InstanceNorm2d

Network = TypeVar("Network", bound=nn.Module)

DROPOUT_LEVELS = 3  # of the decoder, from the innermost
MAX_WIDTH_FACTOR = 8  # channels of the inner levels, in multiples of the width


class UNetGenerator(nn.Module):
    """A U-Net with skip connections: stride-2 convolutions down to 1 x 1, and transposed convolutions back up.

    From (B, C, side, side) to (B, 1, side, side). Its only noise is dropout. The defaults are the published network: 8
    levels for 256 pixels, 54.4 M parameters. With fewer levels images are of any shape in multiples of 2**levels.

    Args:
        side: pixels of the square image, a power of two from 32 to 512; it determines the number of levels. Not used if
            `levels` is given.
        width: channels of the outermost level; doubled at each inner level, up to 8 times the width.
        dropout: probability in the decoder's three innermost levels.
        upsampling: `transpose` (published), or `nearest`: resize and convolve, which avoids checkerboard artifacts.
        norm: `instance` (affine), `batch`, or `none`. The published batch norm uses the statistics of the batch at test
            time too; at batch size 1 that is instance norm.
        in_channels: C.
        levels: number of levels.

    Attributes:
        multiple: pixels; the sides of an image are multiples of it.

    Raises:
        ValueError: `side` is not supported.
    """

    def __init__(
        self,
        side: int = 256,
        width: int = 64,
        dropout: float = 0.5,
        upsampling: Upsampling = "transpose",
        norm: Norm = "instance",
        in_channels: int = 1,
        levels: int | None = None,
    ) -> None:
        super().__init__()
        if levels is None:
            if side not in SIDES:
                raise ValueError(f"side is {side}; the generator takes a power of two from 32 to 512")
            levels = side.bit_length() - 1
        self.multiple, self.in_channels = 2**levels, in_channels
        channels = [width * min(2**level, MAX_WIDTH_FACTOR) for level in range(levels)]
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        for level, wide in enumerate(channels):
            outermost, innermost = level == 0, level == levels - 1
            self.down.append(
                nn.Sequential(
                    *([] if outermost else [nn.LeakyReLU(0.2)]),
                    Conv2d(in_channels if outermost else channels[level - 1], wide, 4, 2, 1),
                    # A norm of a 1 x 1 image would set it to 0.
                    *([] if outermost or innermost else [_norm(norm, wide)]),
                )
            )
        for level in reversed(range(levels)):
            outermost, innermost = level == 0, level == levels - 1
            inside = channels[level] * (1 if innermost else 2)  # the inner level's output, and the skip connection
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
        self.apply(_initialise)

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

    def forward_padded(self, source: Tensor) -> Tensor:
        """Generate from (B, C, H, W) of any size, padded with background."""
        height, width = source.shape[-2:]
        generated: Tensor = self(pad(source, self.multiple))
        return generated[..., :height, :width]


def pad(images: Tensor, multiple: int) -> Tensor:
    """Pad images (B, C, H, W) at the ends of both axes with background (-1), to the next multiples of `multiple`."""
    below, right = (-size % multiple for size in images.shape[-2:])
    return functional.pad(images, (0, right, 0, below), value=-1.0) if below or right else images  # without a copy


class PatchDiscriminator(nn.Module):
    """Classify overlapping patches of a pair as real or generated.

    From source (B, C, H, W) and target (B, 1, H, W) to logits (B, 1, h, w).

    Each logit sees `receptive_field` x `receptive_field` pixels: 70 with three layers (published), 34 with two, 16 with
    one, for small images.
    """

    def __init__(self, width: int = 64, layers: int = 3, norm: Norm = "instance", source_channels: int = 1) -> None:
        super().__init__()
        strides = [2] * layers + [1, 1]
        channels = [source_channels + 1, *(width * min(2**n, MAX_WIDTH_FACTOR) for n in range(layers + 1)), 1]
        blocks: list[nn.Module] = []
        for n, stride in enumerate(strides):
            first, last = n == 0, n == len(strides) - 1
            blocks.append(Conv2d(channels[n], channels[n + 1], 4, stride, 1))
            if not last:
                blocks += [*([] if first else [_norm(norm, channels[n + 1])]), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*blocks)
        self.receptive_field = receptive_field([(4, stride) for stride in strides])
        self.apply(_initialise)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        scores: Tensor = self.layers(torch.cat([source, target], dim=1))
        return scores


class GeneratorLoss(NamedTuple):
    """`total` is adversarial + lambda x reconstruction. The parts are unweighted; a part that is `none` is 0."""

    total: Tensor
    adversarial: Tensor
    reconstruction: Tensor


class DiscriminatorLoss(NamedTuple):
    """`total` is half of real + fake, as published, which slows the discriminator relative to the generator."""

    total: Tensor
    real: Tensor
    fake: Tensor


def adversarial_loss(kind: Adversarial, logits: Tensor, label: float) -> Tensor:
    """Loss of logits against a label, 1 for real and 0 for fake: cross-entropy, or for `lsgan` the squared distance."""
    labels = torch.full_like(logits, label, dtype=torch.float32)
    if kind == "lsgan":
        return functional.mse_loss(logits.float(), labels)
    return functional.binary_cross_entropy_with_logits(logits.float(), labels)


def generator_loss(config: TrainConfig, logits: Tensor | None, generated: Tensor, target: Tensor) -> GeneratorLoss:
    """The generator's loss; `logits` are those of the generated pairs, None without a discriminator."""
    zero = torch.zeros((), device=target.device)
    adversarial = zero if logits is None else adversarial_loss(config.adversarial, logits, 1.0)
    distance = {"l1": functional.l1_loss, "l2": functional.mse_loss}.get(config.reconstruction)
    reconstruction = zero if distance is None else distance(generated.float(), target)
    return GeneratorLoss(adversarial + config.lambda_l1 * reconstruction, adversarial, reconstruction)


def discriminator_loss(config: TrainConfig, real_logits: Tensor, fake_logits: Tensor) -> DiscriminatorLoss:
    """The discriminator's loss from its logits of the real and of the generated pairs.

    Its labels are smoothed (Szegedy et al., 2016, arXiv:1512.00567); those of the generator's loss are not.
    """
    real = adversarial_loss(config.adversarial, real_logits, 1 - config.label_smoothing)
    fake = adversarial_loss(config.adversarial, fake_logits, config.label_smoothing)
    return DiscriminatorLoss((real + fake) / 2, real, fake)


def to_device(network: Network, device: str | torch.device) -> Network:
    """Move a network to a device, in channels-last memory format, in which convolutions run fastest."""
    return network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def receptive_field(layers: list[tuple[int, int]]) -> int:
    """Pixels along a side that one output depends on, for convolutions given as (kernel, stride), first to last."""
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


def _initialise(module: nn.Module) -> None:
    """Draw weights as published: N(0, 0.02) for convolutions, N(1, 0.02) for norms, 0 for biases."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.InstanceNorm2d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
