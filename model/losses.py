"""Compute the losses of pix2pix (Isola et al., 2017, arXiv:1611.07004): adversarial, and lambda times L1 (or L2).

Logits are (B, 1, h, w), one per patch; images (B, 1, H, W) in [-1, 1]. All losses are float32 scalars, means over all
elements.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from model.config import Adversarial, TrainConfig


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


def adversarial_loss(kind: Adversarial, logits: Tensor, real: bool) -> Tensor:
    """Loss of logits against the label 1 (real) or 0 (fake): cross-entropy, or for `lsgan` the squared distance."""
    label = torch.full_like(logits, float(real), dtype=torch.float32)
    if kind == "lsgan":
        return functional.mse_loss(logits.float(), label)
    return functional.binary_cross_entropy_with_logits(logits.float(), label)


def generator_loss(config: TrainConfig, logits: Tensor | None, generated: Tensor, target: Tensor) -> GeneratorLoss:
    """The generator's loss; `logits` are those of the generated pairs, None without a discriminator."""
    zero = torch.zeros((), device=target.device)
    adversarial = zero if logits is None else adversarial_loss(config.adversarial, logits, real=True)
    distance = {"l1": functional.l1_loss, "l2": functional.mse_loss}.get(config.reconstruction)
    reconstruction = zero if distance is None else distance(generated.float(), target)
    return GeneratorLoss(adversarial + config.lambda_l1 * reconstruction, adversarial, reconstruction)


def discriminator_loss(config: TrainConfig, real_logits: Tensor, fake_logits: Tensor) -> DiscriminatorLoss:
    """The discriminator's loss from its logits of the real and of the generated pairs."""
    real = adversarial_loss(config.adversarial, real_logits, real=True)
    fake = adversarial_loss(config.adversarial, fake_logits, real=False)
    return DiscriminatorLoss((real + fake) / 2, real, fake)
