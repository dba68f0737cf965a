"""The plain PyTorch pix2pix of the benchmarks is as published, and `model.trainer` computes the same steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks import reference
from benchmarks.reference import Norm
from model.config import TrainConfig
from model.trainer import Trainer

NORMS: tuple[Norm, ...] = ("batch", "instance")


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def images(count: int, *shape: int) -> list[Tensor]:
    return [torch.rand(shape) * 2 - 1 for _ in range(count)]


def test_the_networks_have_the_published_numbers_of_parameters() -> None:
    with torch.device("meta"):
        assert count_parameters(reference.generator(channels=3)) == 54_414_531
        assert count_parameters(reference.generator()) == 54_408_385  # one channel in and out
        assert count_parameters(reference.discriminator(channels=6)) == 2_768_705
        assert count_parameters(reference.discriminator()) == 2_764_609  # one channel of source, one of target


def output_shapes(network: nn.Module, source: Tensor, *kinds: type[nn.Module]) -> list[tuple[int, int]]:
    """Channels and side of the output of each layer of these kinds, in the order of computation."""
    seen: list[tuple[int, int]] = []
    for module in network.modules():
        if isinstance(module, kinds):
            module.register_forward_hook(lambda _module, _inputs, out: seen.append((out.shape[1], out.shape[3])))
    network(source)
    return seen


def test_the_layers_of_the_generator_have_the_published_shapes() -> None:
    with torch.device("meta"):
        seen = output_shapes(reference.generator(), torch.rand(2, 1, 256, 256), nn.Conv2d, nn.ConvTranspose2d)
    encoder = [(64, 128), (128, 64), (256, 32), (512, 16), (512, 8), (512, 4), (512, 2), (512, 1)]
    decoder = [(512, 2), (512, 4), (512, 8), (512, 16), (256, 32), (128, 64), (64, 128), (1, 256)]
    assert seen == encoder + decoder


def test_the_layers_of_the_discriminator_have_the_published_shapes() -> None:
    with torch.device("meta"):
        seen = output_shapes(reference.discriminator(), torch.rand(1, 2, 256, 256), nn.Conv2d)
    assert seen == [(64, 128), (128, 64), (256, 32), (512, 31), (1, 30)]


def test_dropout_is_in_the_three_innermost_layers_of_the_decoder() -> None:
    with torch.device("meta"):
        seen = output_shapes(reference.generator(width=8), torch.rand(2, 1, 256, 256), nn.Dropout)
    assert seen == [(64, 2), (64, 4), (64, 8)]


@pytest.mark.parametrize("norm", NORMS)
def test_a_step_runs_and_changes_both_networks(norm: Norm) -> None:
    torch.manual_seed(0)
    trainer = reference.Trainer(side=64, width=8, norm=norm)
    networks = (trainer.generator, trainer.discriminator)
    before = [[p.clone() for p in network.parameters()] for network in networks]
    losses = trainer.step(*images(2, 2, 1, 64, 64))
    assert torch.isfinite(torch.stack(losses)).all()
    for network, old in zip(networks, before, strict=True):
        assert any(not torch.equal(a, b) for a, b in zip(network.parameters(), old, strict=True))
        assert all(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("batch", [1, 3])
def test_steps_of_the_trainer_give_the_same_losses(batch: int) -> None:
    """From equal weights, without dropout, in float32."""
    torch.manual_seed(1)
    theirs = reference.Trainer(side=64, width=8, norm="instance", dropout=0.0)
    settings = {"side": 64, "width": 8, "discriminator_width": 8, "dropout": 0.0, "precision": "fp32", "device": "cpu"}
    ours = Trainer(TrainConfig.model_validate(settings | {"batch_size": batch}), torch.device("cpu"))
    assert ours.discriminator is not None
    for our_network, their_network in ((ours.generator, theirs.generator), (ours.discriminator, theirs.discriminator)):
        with torch.no_grad():
            for weight, wanted in zip(our_network.parameters(), their_network.parameters(), strict=True):
                weight.copy_(wanted)
    for _ in range(3):
        source, target = images(2, batch, 1, 64, 64)
        _, real, fake, total, adversarial, l1 = ours.step(source, target, 2e-4)
        wanted = theirs.step(source, target)
        found = torch.stack([real, fake, adversarial, 100 * l1, total])
        expected = [wanted.real, wanted.fake, wanted.adversarial, 100 * wanted.l1, wanted.adversarial + 100 * wanted.l1]
        torch.testing.assert_close(found, torch.stack(expected), rtol=2e-3, atol=1e-4)
