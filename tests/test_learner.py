"""A step leaves a GPU alone: it asks for no number, sends nothing that is waited for, and averages as torch does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed; pip install -c constraints.txt -e '.[train]'")

from conftest import SMALL_NETWORKS  # noqa: E402
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from model import data  # noqa: E402
from model.checkpoint import CheckpointError  # noqa: E402
from model.config import TrainConfig  # noqa: E402
from model.data import Pairs  # noqa: E402
from model.learner import Learner  # noqa: E402

N, SUBJECTS = 9, 3

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="only a GPU can be waited for, or held against a CPU, and there is none here; "
    "test_a_step_asks_for_no_number counts on a CPU what would be waited for",
)


def config_of(**settings: object) -> TrainConfig:
    return TrainConfig.model_validate(SMALL_NETWORKS | {"side": 32, "batch_size": 2, "ema": 0.9} | settings)


def pairs_on(device: str) -> Pairs:
    draw = torch.Generator().manual_seed(0)
    source, target = (torch.randint(0, 900, (N, 40, 40), generator=draw, dtype=torch.int16) for _ in range(2))
    low_high = torch.tensor([[5.0, 800.0]] * SUBJECTS)
    return Pairs(
        ("t1", "t2"),
        [f"{n}" for n in range(SUBJECTS)],
        *(values.to(device) for values in (source, target, torch.arange(N) // SUBJECTS, torch.arange(N) % SUBJECTS)),
        *(low_high.to(device) for _ in range(2)),
        "lower",
    )


class Asked(TorchDispatchMode):
    """Counts how often a tensor's number was wanted by Python."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("augment", "norm"), [("none", "batch"), ("flip", "instance"), ("jitter", "batch")])
def test_a_step_asks_for_no_number(augment: str, norm: str) -> None:
    config = config_of(augment=augment, norm=norm, side=32)
    pairs, learner = pairs_on("cpu"), Learner(config, torch.device("cpu"))
    learner.step(*data.draw(pairs, config, 0), 1e-3)
    with Asked() as asked:
        for step in range(1, N // config.batch_size + 2):  # into the second epoch
            learner.step(*data.draw(pairs, config, step * config.batch_size), 1e-3)
        assert asked.count == 0
        assert float(torch.ones(())) == asked.count == 1  # it does count


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("augment", ["none", "flip", "jitter"])
def test_nothing_waits_for_a_gpu(augment: str) -> None:
    config = config_of(augment=augment, device="cuda")
    pairs, learner = pairs_on("cuda"), Learner(config, torch.device("cuda"))
    for step in range(3 * N):
        with waiting_is_an_error() if step > N else nullcontext():  # recorded by then
            learner.step(*data.draw(pairs, config, step * config.batch_size), 1e-3)


@needs_gpu
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_gpu_learns_what_a_cpu_learns(batch_size: int) -> None:
    losses = []
    for device in ("cuda", "cpu"):
        config = config_of(device=device, precision="fp32", dropout=0, batch_size=batch_size)
        pairs, learner = pairs_on(device), Learner(config, torch.device(device))
        steps = [learner.step(*data.draw(pairs, config, step * batch_size), 1e-3).cpu() for step in range(8)]
        losses.append(torch.stack(steps))
    torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_the_moving_average_is_torch_s(norm: str) -> None:
    config = config_of(norm=norm)
    pairs, learner = pairs_on("cpu"), Learner(config, torch.device("cpu"))
    plain = AveragedModel(learner.generator, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for step in range(5):
        if step == 3:  # as a training that was stopped
            state = learner.tensors()
            learner = Learner(config, torch.device("cpu"))
            learner.restore(state, Path("step-3"))
        learner.step(*data.draw(pairs, config, step * config.batch_size), 1e-2)
        plain.update_parameters(learner.generator)
    assert learner.average is not None
    ours = learner.average.state_dict()
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
def test_a_state_of_another_shape_is_refused_before_the_optimiser_reads_beyond_it(name: str, tensor: Any) -> None:
    config = config_of()
    pairs, learner = pairs_on("cpu"), Learner(config, torch.device("cpu"))
    learner.step(*data.draw(pairs, config, 0), 1e-3)
    state = learner.tensors()
    assert tensor is None or tensor.dim() == 1 or state[name].shape == tensor.shape
    state = {k: v for k, v in state.items() if k != name} | ({} if tensor is None else {name: tensor})
    with pytest.raises(
        CheckpointError, match=r"^step-1 (does not fit its configuration: of |has no random state)"
    ) as e:
        Learner(config, torch.device("cpu")).restore(state, Path("step-1"))
    assert "\n" not in str(e.value)


def test_the_state_of_a_learner_that_has_not_begun_is_taken_up() -> None:
    fresh = Learner(config_of(), torch.device("cpu"))
    Learner(config_of(), torch.device("cpu")).restore(fresh.tensors(), Path("step-0"))
