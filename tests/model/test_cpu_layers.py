"""The faster layers for CPUs compute the same outputs and gradients as PyTorch's, and the same training steps."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import SMALL_NETWORKS
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples
from torch import Tensor, nn

from model import cpu_layers
from model.config import TrainConfig
from model.cpu_layers import FEW_PIXELS
from model.networks import to_device
from model.trainer import Trainer

CHANNELS, OUTPUTS = 6, 8


def image(*shape: int) -> Tensor:
    return (torch.rand(shape) * 2 - 1).contiguous(memory_format=torch.channels_last)


def assert_equal_layers(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """Equal outputs, and equal gradients of the input and of every weight."""
    to_device(ours, "cpu")
    theirs.load_state_dict(ours.state_dict())
    to_device(theirs, "cpu")
    our_input, their_input = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = ours(our_input), theirs(their_input)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
    gradient = torch.randn_like(expected)
    found.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(our_input.grad, their_input.grad, rtol=1e-4, atol=1e-5)
    for our_weight, their_weight in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(our_weight.grad, their_weight.grad, rtol=1e-4, atol=1e-5)


batches = st.integers(1, 3)
sides = st.integers(2, 20)  # on both sides of `FEW_PIXELS`, where the layers change their algorithm
seeds = st.integers(0, 2**32 - 1)
KERNELS = {"halving": (4, 2, 1), "discriminator": (4, 1, 1), "after upsampling": (3, 1, 1)}


@settings(max_examples=examples(40))
@given(batch=batches, height=sides, width=sides, seed=seeds)
def test_instance_norm_equals_that_of_pytorch(batch: int, height: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    layers = (kind(CHANNELS, affine=True) for kind in (cpu_layers.InstanceNorm2d, nn.InstanceNorm2d))
    assert_equal_layers(*layers, image(batch, CHANNELS, height, width))


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
@settings(max_examples=examples(40))
@given(batch=batches, height=sides, width=sides, seed=seeds)
def test_a_convolution_equals_that_of_pytorch(
    kernel: tuple[int, int, int], batch: int, height: int, width: int, seed: int
) -> None:
    torch.manual_seed(seed)
    layers = (kind(CHANNELS, OUTPUTS, *kernel) for kind in (cpu_layers.Conv2d, nn.Conv2d))
    assert_equal_layers(*layers, image(batch, CHANNELS, height, width))


@settings(max_examples=examples(40))
@given(batch=batches, height=sides, width=sides, seed=seeds)
def test_a_doubling_convolution_equals_that_of_pytorch(batch: int, height: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    layers = cpu_layers.DoublingConv2d(CHANNELS, OUTPUTS), nn.ConvTranspose2d(CHANNELS, OUTPUTS, 4, 2, 1)
    assert_equal_layers(*layers, image(batch, CHANNELS, height, width))


@pytest.mark.parametrize(
    "layer", [cpu_layers.Conv2d(1, 1, 4, 2, 1), cpu_layers.DoublingConv2d(1, 1)], ids=["halving", "doubling"]
)
def test_training_on_few_pixels_does_not_use_the_convolution_of_pytorch(layer: nn.Module) -> None:
    """Otherwise the tests above would compare PyTorch's layers with themselves."""
    few, many = image(1, 1, 8, 8), image(1, 1, 4 * FEW_PIXELS, 4)
    assert not convolves(layer, few)
    assert convolves(layer, many)
    assert convolves(copy.deepcopy(layer).eval(), few)


def convolves(layer: nn.Module, x: Tensor) -> bool:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x)
    return any("convolution" in event.name for event in profile.events())


def test_the_optimiser_updates_weights_like_adam() -> None:
    """Weights are stored channels last, and the optimiser works on views of them."""
    config = TrainConfig.model_validate(SMALL_NETWORKS | {"dropout": 0.0})
    trainer = Trainer(config, torch.device("cpu"))
    copies = {
        name: [weight.detach().clone(memory_format=torch.contiguous_format) for weight in network.parameters()]
        for name, network in trainer.networks.items()
    }
    adams = {name: torch.optim.Adam(weights, 2e-4, (0.5, 0.999)) for name, weights in copies.items()}
    for _ in range(3):
        trainer.step(image(2, 1, 32, 32), image(2, 1, 32, 32), 2e-4)
        for name, network in trainer.networks.items():
            for weight, plain in zip(network.parameters(), copies[name], strict=True):
                assert weight.grad is not None
                plain.grad = weight.grad.clone(memory_format=torch.contiguous_format)
            adams[name].step()
    for name, network in trainer.networks.items():
        for weight, plain in zip(network.parameters(), copies[name], strict=True):
            torch.testing.assert_close(weight.detach(), plain, rtol=1e-5, atol=1e-6)
