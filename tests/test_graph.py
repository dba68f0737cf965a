"""A step that is played back is the step. On a GPU alone, which CI has none of."""

from __future__ import annotations

import logging

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed; pip install -c constraints.txt -e '.[train]'")

from conftest import SMALL_NETWORKS  # noqa: E402

from model.config import TrainConfig  # noqa: E402
from model.learner import Learner  # noqa: E402

STEPS = 12


def learnt(device: str, **settings: object) -> tuple[Learner, torch.Tensor]:
    """A learner after some steps of a falling learning rate, and the losses of each."""
    config = TrainConfig.model_validate(SMALL_NETWORKS | {"device": device, "seed": 3, "ema": 0.9} | settings)
    learner = Learner(config, torch.device(device))
    draw = torch.Generator().manual_seed(0)
    losses = []
    for step in range(STEPS):
        source, target = (torch.rand(2, 1, 32, 32, generator=draw).to(device) * 2 - 1 for _ in range(2))
        losses.append(learner.step(source, target, 1e-3 / (step + 1)))
    return learner, torch.stack(losses).cpu()


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="only a GPU can record a step and play it back, and there is none here"
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


def test_on_a_cpu_graphs_are_nothing() -> None:
    (graphed, losses), (plain, expected) = learnt("cpu"), learnt("cpu", cuda_graphs=False)
    assert torch.equal(losses, expected)
    wanted = plain.tensors()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in graphed.tensors().items())
