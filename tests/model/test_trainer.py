"""A training step never waits for a GPU, and its moving average equals PyTorch's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_NETWORKS
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from ixi_etl.dataset.direction import Direction
from ixi_etl.errors import CheckpointError
from model import data
from model.config import TrainConfig
from model.data import Pairs, Slabs
from model.trainer import Trainer

N, SUBJECTS = 9, 3

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="only a GPU can show that a step waits for it, or that it differs from a CPU, and no GPU was found; "
    "test_a_step_reads_no_value_from_the_device counts the reads that would wait on a CPU",
)


def config_of(**settings: object) -> TrainConfig:
    return TrainConfig.model_validate(SMALL_NETWORKS | {"side": 32, "batch_size": 2, "ema": 0.9} | settings)


def pairs_on(device: str) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    shape = (SUBJECTS, N // SUBJECTS, 40, 40)
    low_high = torch.tensor([[5.0, 800.0]] * SUBJECTS).to(device)
    source, target = (
        Slabs(torch.randint(0, 900, shape, generator=generator, dtype=torch.int16).to(device), low_high)
        for _ in range(2)
    )
    return Pairs(Direction(("t1",), "t2"), [f"{n}" for n in range(SUBJECTS)], (source,), target, "lower")


class ValueReads(TorchDispatchMode):
    """Count how often Python reads the value of a tensor."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("augment", "norm"), [("none", "batch"), ("flip", "instance"), ("jitter", "batch")])
def test_a_step_reads_no_value_from_the_device(augment: str, norm: str) -> None:
    config = config_of(augment=augment, norm=norm, side=32)
    pairs, trainer = pairs_on("cpu"), Trainer(config, torch.device("cpu"))
    trainer.step(*data.draw_batch(pairs, config, 0), 1e-3)
    with ValueReads() as reads:
        for step in range(1, N // config.batch_size + 2):  # into the second pass
            trainer.step(*data.draw_batch(pairs, config, step * config.batch_size), 1e-3)
        assert reads.count == 0
        assert float(torch.ones(())) == reads.count == 1  # it does count


@contextmanager
def error_on_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("augment", ["none", "flip", "jitter"])
def test_a_step_does_not_wait_for_the_gpu(augment: str) -> None:
    config = config_of(augment=augment, device="cuda")
    pairs, trainer = pairs_on("cuda"), Trainer(config, torch.device("cuda"))
    for step in range(3 * N):
        with error_on_synchronisation() if step > N else nullcontext():  # captured by then
            trainer.step(*data.draw_batch(pairs, config, step * config.batch_size), 1e-3)


@needs_gpu
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_gpu_computes_the_losses_of_a_cpu(batch_size: int) -> None:
    losses = []
    for device in ("cuda", "cpu"):
        config = config_of(device=device, precision="fp32", dropout=0, batch_size=batch_size)
        pairs, trainer = pairs_on(device), Trainer(config, torch.device(device))
        steps = [trainer.step(*data.draw_batch(pairs, config, step * batch_size), 1e-3).cpu() for step in range(8)]
        losses.append(torch.stack(steps))
    torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_the_moving_average_equals_that_of_pytorch(norm: str) -> None:
    config = config_of(norm=norm)
    pairs, trainer = pairs_on("cpu"), Trainer(config, torch.device("cpu"))
    plain = AveragedModel(trainer.generator, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for step in range(5):
        if step == 3:  # resume
            state = trainer.state_dict()
            trainer = Trainer(config, torch.device("cpu"))
            trainer.load_state_dict(state, Path("step-3"))
        trainer.step(*data.draw_batch(pairs, config, step * config.batch_size), 1e-2)
        plain.update_parameters(trainer.generator)
    assert trainer.average is not None
    ours = trainer.average.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in plain.state_dict().items())


FIRST = "generator.down.0.0.weight"
MOMENT = "generator_optimizer.0.exp_avg"


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (FIRST, torch.zeros(3)),
        (FIRST, None),
        ("generator.more", torch.zeros(3)),
        (MOMENT, torch.zeros(1)),
        (MOMENT, torch.zeros(4, 1, 4, 4, dtype=torch.float64)),
        (MOMENT, None),
        ("generator_optimizer.0.step", torch.zeros(2)),
        ("generator_optimizer.x.exp_avg", torch.zeros(3)),
        ("generator_optimizer.0.exp_avg.x", torch.zeros(3)),
        ("random.cpu.0", torch.zeros(3)),
        ("random.cpu.0", torch.zeros(5056, dtype=torch.uint8)),
    ],
)
def test_a_state_of_another_shape_is_refused(name: str, tensor: Any) -> None:
    config = config_of()
    pairs, trainer = pairs_on("cpu"), Trainer(config, torch.device("cpu"))
    trainer.step(*data.draw_batch(pairs, config, 0), 1e-3)
    state = trainer.state_dict()
    assert tensor is None or tensor.dim() == 1 or state[name].shape == tensor.shape
    state = {k: v for k, v in state.items() if k != name} | ({} if tensor is None else {name: tensor})
    with pytest.raises(
        CheckpointError, match=r"^step-1 (does not fit its configuration: |has an invalid random state)"
    ) as e:
        Trainer(config, torch.device("cpu")).load_state_dict(state, Path("step-1"))
    assert "\n" not in str(e.value)


def test_the_state_before_the_first_step_can_be_loaded() -> None:
    fresh = Trainer(config_of(), torch.device("cpu"))
    Trainer(config_of(), torch.device("cpu")).load_state_dict(fresh.state_dict(), Path("step-0"))
