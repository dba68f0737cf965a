"""A training step that is captured as a CUDA graph and replayed computes what the eager step computes."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from conftest import SMALL_NETWORKS
from torch import Tensor

from model import trainer
from model.config import TrainConfig
from model.cuda_graph import EAGER_STEPS, CudaGraphStep
from model.trainer import Trainer

STEPS = 12

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="CUDA graphs can be captured and replayed only on a GPU, and no GPU was found; on a CPU the same steps run "
    "without a graph, which test_trainer pins",
)


def train_steps(device: str, **settings: object) -> tuple[Trainer, Tensor]:
    """A trainer after `STEPS` steps with a falling learning rate, and the losses of each step."""
    config = TrainConfig.model_validate(SMALL_NETWORKS | {"device": device, "seed": 3, "ema": 0.9} | settings)
    trained = Trainer(config, torch.device(device))
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(STEPS):
        source, target = (torch.rand(2, 1, 32, 32, generator=generator).to(device) * 2 - 1 for _ in range(2))
        # Powers of two are exact in the graph's float32. Where a gradient is only rounding, Adam takes a full step.
        losses.append(trained.step(source, target, 2.0 ** -(10 + step // 4)))
    return trained, torch.stack(losses).cpu()


@needs_gpu
@pytest.mark.parametrize("settings", [{}, {"lr_discriminator": 5e-5, "label_smoothing": 0.095, "levels": 3}])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replayed_steps_equal_eager_steps(
    precision: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    with caplog.at_level(logging.WARNING):
        graphed, losses = train_steps("cuda", precision=precision, **settings)
    assert "cannot capture a step" not in caplog.text
    eager, expected = train_steps("cuda", precision=precision, cuda_graphs=False, **settings)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    wanted = eager.state_dict()
    for name, tensor in graphed.state_dict().items():
        torch.testing.assert_close(tensor.float(), wanted[name].float(), rtol=1e-3, atol=1e-4, msg=name)


@needs_gpu
def test_a_step_that_cannot_be_captured_continues_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    def reads_the_gpu(source: Tensor, target: Tensor) -> Tensor:
        return (source + target) * float(source.sum())  # not permitted during capture

    step = CudaGraphStep(reads_the_gpu)
    batch = torch.ones(2, device="cuda"), torch.ones(2, device="cuda")
    losses = [step(*batch).tolist() for _ in range(EAGER_STEPS + 3)]
    assert losses == [[4.0, 4.0]] * (EAGER_STEPS + 3)
    assert "cannot capture a step as a CUDA graph" in caplog.text


@needs_gpu
def test_running_out_of_memory_during_capture_is_reported_as_such() -> None:
    def allocates_during_capture(source: Tensor, target: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            torch.empty(1 << 44, device="cuda")  # 64 TB
        return source + target

    step = CudaGraphStep(allocates_during_capture)
    batch = torch.ones(2, device="cuda"), torch.ones(2, device="cuda")
    for _ in range(EAGER_STEPS):
        step(*batch)
    with pytest.raises(torch.OutOfMemoryError):
        step(*batch)


def test_a_step_that_fails_leaves_the_discriminator_trainable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator's loss is computed while the discriminator is frozen; a failed capture ends a step there."""

    def fails(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(trainer, "generator_loss", fails)
    failing = Trainer(TrainConfig.model_validate(SMALL_NETWORKS), torch.device("cpu"))
    with pytest.raises(RuntimeError, match="not permitted"):
        failing.step(torch.zeros(2, 1, 32, 32), torch.zeros(2, 1, 32, 32), 1e-3)
    assert failing.discriminator is not None
    assert all(weight.requires_grad for weight in failing.discriminator.parameters())


def test_the_option_changes_nothing_on_a_cpu() -> None:
    (with_option, losses), (without, expected) = train_steps("cpu"), train_steps("cpu", cuda_graphs=False)
    assert torch.equal(losses, expected)
    wanted = without.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in with_option.state_dict().items())
