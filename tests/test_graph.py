"""A step that is played back is the step. On a GPU alone, which CI has none of."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed; pip install -c constraints.txt -e '.[train]'")

from conftest import SMALL_NETWORKS  # noqa: E402

from model import learner  # noqa: E402
from model.config import TrainConfig  # noqa: E402
from model.graph import EAGER_STEPS, GraphedStep  # noqa: E402
from model.learner import Learner  # noqa: E402

STEPS = 12


def learnt(device: str, **settings: object) -> tuple[Learner, torch.Tensor]:
    """A learner after some steps of a falling learning rate, and the losses of each."""
    config = TrainConfig.model_validate(SMALL_NETWORKS | {"device": device, "seed": 3, "ema": 0.9} | settings)
    learnt = Learner(config, torch.device(device))
    draw = torch.Generator().manual_seed(0)
    losses = []
    for step in range(STEPS):
        source, target = (torch.rand(2, 1, 32, 32, generator=draw).to(device) * 2 - 1 for _ in range(2))
        # Exact in float32, as a graph has it: where a weight's gradient is but rounding, Adam takes a whole step.
        losses.append(learnt.step(source, target, 2.0 ** -(10 + step // 4)))
    return learnt, torch.stack(losses).cpu()


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="only a GPU can record a step and play it back, and there is none here; what a failed recording does is "
    "tested below in streams of nothing",
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_that_are_played_back_are_the_steps(
    precision: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    with caplog.at_level(logging.WARNING):
        graphed, losses = learnt("cuda", precision=precision)
    assert "cannot be recorded" not in caplog.text
    plain, expected = learnt("cuda", precision=precision, cuda_graphs=False)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    wanted = plain.tensors()
    for name, tensor in graphed.tensors().items():
        torch.testing.assert_close(tensor.float(), wanted[name].float(), rtol=1e-3, atol=1e-4, msg=name)


@pytest.fixture
def streams_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of CUDA's streams and graphs, where there is no GPU: all is computed at once, recorded or not."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name in ("Stream", "current_stream", "set_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: stream)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: nullcontext())


def fails_on_call(number: int, function: Callable[..., Any], error: Exception) -> Callable[..., Any]:
    calls = count(1)

    def called(*args: Any) -> Any:
        if next(calls) == number:
            raise error
        return function(*args)

    return called


@pytest.mark.parametrize("where", ["discriminator_loss", "generator_loss"])
def test_a_step_that_cannot_be_recorded_goes_on_as_it_began(
    where: str, streams_of_nothing: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forbidden = RuntimeError("operation not permitted when stream is capturing")
    monkeypatch.setattr(learner, where, fails_on_call(EAGER_STEPS + 1, getattr(learner, where), forbidden))
    monkeypatch.setattr(Learner, "_new_descent", lambda self: GraphedStep(self._learn))
    tried, losses = learnt("cpu")
    assert "cannot be recorded" in caplog.text
    assert torch.isfinite(losses).all()
    assert tried.discriminator is not None
    assert all(weight.requires_grad for weight in tried.discriminator.parameters())


def test_memory_that_runs_out_while_recording_is_told_as_such(
    streams_of_nothing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("the recording could not be ended")
    error.__context__ = torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(learner, "generator_loss", fails_on_call(EAGER_STEPS + 1, learner.generator_loss, error))
    monkeypatch.setattr(Learner, "_new_descent", lambda self: GraphedStep(self._learn))
    with pytest.raises(torch.OutOfMemoryError):
        learnt("cpu")


def test_on_a_cpu_graphs_are_nothing() -> None:
    (graphed, losses), (plain, expected) = learnt("cpu"), learnt("cpu", cuda_graphs=False)
    assert torch.equal(losses, expected)
    wanted = plain.tensors()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in graphed.tensors().items())
