"""Plain PyTorch pix2pix, as the paper describes it: what the benchmarks and the tests compare `model` with.

Written from the layer tables of Isola et al. (2017, arXiv:1611.07004, section 6.1): float32, eager, channels first,
with PyTorch's own layers and its default Adam. Legend: B, H, W are batch, height, width; images are in [-1, 1].
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, l1_loss

Norm = Literal["batch", "instance"]
"""`batch` is the paper's. `instance` is the default of `model`: at batch size 1 both compute the same function."""

ENCODER = (64, 128, 256, 512, 512, 512, 512, 512)  # C64-C128-C256-C512-C512-C512-C512-C512
DISCRIMINATOR = (64, 128, 256, 512)  # C64-C128-C256-C512: each output sees 70 x 70 pixels
DROPOUT_LAYERS = 3  # the decoder is CD512-CD512-CD512-C512-C256-C128-C64: the encoder's widths in reverse
LEAK = 0.2


class Skip(nn.Module):
    """Concatenate the input of `inner` and its output along the channels: the skip connection of a U-Net."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.inner(x)], dim=1)


def generator(
    side: int = 256, width: int = 64, channels: int = 1, norm: Norm = "batch", dropout: float = 0.5
) -> nn.Sequential:
    """The U-Net for square images of `side` pixels, from and to (B, channels, side, side).

    `width` replaces the 64 of the table and scales the other widths with it. The innermost 512s are left out for images
    smaller than 256 pixels, so that the encoder always ends at 1 x 1.
    """
    widths = [count * width // ENCODER[0] for count in ENCODER[: side.bit_length() - 1]]
    # The innermost encoder layer has no norm: a norm of 1 x 1 pixel gives 0.
    inside: list[nn.Module] = [*_encode(widths[-2], widths[-1], None)]
    for level in reversed(range(1, len(widths))):
        innermost = level == len(widths) - 1
        if not innermost:
            inside = [*_encode(widths[level - 1], widths[level], norm), Skip(nn.Sequential(*inside))]
        inside += _decode(widths[level] * (1 if innermost else 2), widths[level - 1], norm)
        if len(widths) - level <= DROPOUT_LAYERS:
            inside.append(nn.Dropout(dropout))
    first, last = nn.Conv2d(channels, widths[0], 4, 2, 1), nn.ConvTranspose2d(2 * widths[0], channels, 4, 2, 1)
    return _initialise(nn.Sequential(first, Skip(nn.Sequential(*inside)), nn.ReLU(inplace=True), last, nn.Tanh()))


def discriminator(width: int = 64, channels: int = 2, norm: Norm = "batch") -> nn.Sequential:
    """The 70 x 70 PatchGAN: from a pair (B, channels, H, W), source and target, to a logit for each patch."""
    widths = [count * width // DISCRIMINATOR[0] for count in DISCRIMINATOR]
    layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 4, 2, 1)]
    for (before, after), stride in zip(pairwise(widths), (2, 2, 1), strict=True):
        layers += _encode(before, after, norm, stride)
    return _initialise(nn.Sequential(*layers, nn.LeakyReLU(LEAK, inplace=True), nn.Conv2d(widths[-1], 1, 4, 1, 1)))


class Losses(NamedTuple):
    """Of one step: float32 scalars, before the weights change. `l1` is unweighted."""

    real: Tensor
    fake: Tensor
    adversarial: Tensor
    l1: Tensor


class Trainer:
    """Both networks with their optimisers."""

    def __init__(
        self,
        side: int = 256,
        width: int = 64,
        norm: Norm = "batch",
        dropout: float = 0.5,
        lambda_l1: float = 100.0,
        device: str = "cpu",
    ) -> None:
        self.generator = generator(side, width, norm=norm, dropout=dropout).to(device)
        self.discriminator = discriminator(width, norm=norm).to(device)
        self.lambda_l1 = lambda_l1
        self.optimisers = [
            torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999))
            for network in (self.generator, self.discriminator)
        ]

    def step(self, source: Tensor, target: Tensor) -> Losses:
        """Update the discriminator, then the generator, from one batch (B, 1, H, W)."""
        generator_optimiser, discriminator_optimiser = self.optimisers
        generated = self.generator(source)

        real = _distance_from(1, self.discriminator(torch.cat([source, target], dim=1)))
        fake = _distance_from(0, self.discriminator(torch.cat([source, generated.detach()], dim=1)))
        discriminator_optimiser.zero_grad()
        ((real + fake) / 2).backward()
        discriminator_optimiser.step()

        self.discriminator.requires_grad_(False)
        adversarial = _distance_from(1, self.discriminator(torch.cat([source, generated], dim=1)))
        l1 = l1_loss(generated, target)
        generator_optimiser.zero_grad()
        (adversarial + self.lambda_l1 * l1).backward()
        generator_optimiser.step()
        self.discriminator.requires_grad_(True)
        return Losses(*(loss.detach() for loss in (real, fake, adversarial, l1)))


def _encode(before: int, after: int, norm: Norm | None, stride: int = 2) -> list[nn.Module]:
    """LeakyReLU, convolution, norm.

    The activation works in place, so a skip connection carries its result. That is exact: the decoder's ReLU follows,
    and ReLU(LeakyReLU(x)) is ReLU(x).
    """
    conv = nn.Conv2d(before, after, 4, stride, 1, bias=norm != "batch")
    return [nn.LeakyReLU(LEAK, inplace=True), conv, *_norm(after, norm)]


def _decode(before: int, after: int, norm: Norm) -> list[nn.Module]:
    """ReLU, transposed convolution, norm."""
    conv = nn.ConvTranspose2d(before, after, 4, 2, 1, bias=norm != "batch")
    return [nn.ReLU(inplace=True), conv, *_norm(after, norm)]


def _norm(channels: int, norm: Norm | None) -> list[nn.Module]:
    """The convolution before a batch norm has no bias, which the norm would remove.

    Before an instance norm it has one, as in `model.networks`: so the parameters of both correspond one to one.
    """
    layers = {"batch": nn.BatchNorm2d(channels), "instance": nn.InstanceNorm2d(channels, affine=True)}
    return [] if norm is None else [layers[norm]]


def _initialise(network: nn.Sequential) -> nn.Sequential:
    """Draw the weights: N(0, 0.02) for convolutions, N(1, 0.02) for norms, 0 for biases."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    return network


def _distance_from(label: int, logits: Tensor) -> Tensor:
    """Binary cross-entropy to `label`: 1 for real, 0 for generated."""
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))
