"""The losses of pix2pix (Isola et al., 2017, arXiv:1611.07004): adversarial, and lambda times L1 (or L2).

Logits are (B, 1, h, w), one for each patch; images (B, 1, H, W) in [-1, 1]. All losses are float32 scalars, means over
every element.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from model.config import Adversarial, TrainConfig


class GeneratorLoss(NamedTuple):
    """`total` is adversarial + lambda x reconstruction; the parts are unweighted, and 0 where they are off."""

    total: Tensor
    adversarial: Tensor
    reconstruction: Tensor


class DiscriminatorLoss(NamedTuple):
    """`total` is half of real + fake, which slows the discriminator down against the generator, as published."""

    total: Tensor
    real: Tensor
    fake: Tensor


def judge(kind: Adversarial, logits: Tensor, real: bool) -> Tensor:
    """How far logits are from calling every patch real, or fake: cross-entropy, or the squared distance to 1, or 0."""
    wanted = torch.full_like(logits, float(real), dtype=torch.float32)
    if kind == "lsgan":
        return functional.mse_loss(logits.float(), wanted)
    return functional.binary_cross_entropy_with_logits(logits.float(), wanted)


def generator_loss(config: TrainConfig, logits: Tensor | None, generated: Tensor, target: Tensor) -> GeneratorLoss:
    """`logits`: the discriminator's of the generated pair; None where there is no discriminator."""
    zero = torch.zeros((), device=target.device)
    adversarial = zero if logits is None else judge(config.adversarial, logits, real=True)
    distance = {"l1": functional.l1_loss, "l2": functional.mse_loss}.get(config.reconstruction)
    reconstruction = zero if distance is None else distance(generated.float(), target)
    return GeneratorLoss(adversarial + config.lambda_l1 * reconstruction, adversarial, reconstruction)


def discriminator_loss(config: TrainConfig, real_logits: Tensor, fake_logits: Tensor) -> DiscriminatorLoss:
    real = judge(config.adversarial, real_logits, real=True)
    fake = judge(config.adversarial, fake_logits, real=False)
    return DiscriminatorLoss((real + fake) / 2, real, fake)
