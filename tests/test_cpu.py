"""What makes a training step fast on a CPU changes nothing: each fast path gives what the plain one gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed; pip install -c constraints.txt -e '.[train]'")

from torch import nn  # noqa: E402

from benchmarks.reference import INSTANCE_NORM, Pix2PixModel  # noqa: E402
from model import cpu  # noqa: E402
from model.config import TrainConfig  # noqa: E402
from model.learner import Learner  # noqa: E402
from model.networks import place  # noqa: E402

Layers = tuple[nn.Module, nn.Module]


def image(*shape: int) -> torch.Tensor:
    return (torch.rand(shape) * 2 - 1).contiguous(memory_format=torch.channels_last)


def assert_the_same(ours: nn.Module, plain: nn.Module, x: torch.Tensor) -> None:
    """In what they give, and in every gradient."""
    place(ours, "cpu")
    plain.load_state_dict(ours.state_dict())
    place(plain, "cpu")
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    given, wanted = ours(a), plain(b)
    torch.testing.assert_close(given, wanted)
    assert given.is_contiguous(memory_format=torch.channels_last)
    pull = torch.randn_like(wanted)
    given.backward(pull)
    wanted.backward(pull)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


LAYERS: dict[str, Callable[[], Layers]] = {
    "norm": lambda: (cpu.InstanceNorm2d(6, affine=True), nn.InstanceNorm2d(6, affine=True)),
    "halving": lambda: (cpu.Conv2d(6, 8, 4, 2, 1), nn.Conv2d(6, 8, 4, 2, 1)),
    "same size": lambda: (cpu.Conv2d(6, 8, 4, 1, 1), nn.Conv2d(6, 8, 4, 1, 1)),
    "3 x 3": lambda: (cpu.Conv2d(6, 8, 3, 1, 1), nn.Conv2d(6, 8, 3, 1, 1)),
    "doubling": lambda: (cpu.DoublingConv2d(6, 8), nn.ConvTranspose2d(6, 8, 4, 2, 1)),
}


@pytest.mark.parametrize("shape", [(1, 6, 2, 2), (3, 6, 2, 4), (1, 6, 8, 6), (2, 6, 32, 16)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_gives_what_torch_s_gives(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    assert_the_same(*LAYERS[name](), image(*shape) if name != "same size" else image(*shape[:2], 8, 4))


def test_few_pixels_and_many_go_different_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above would compare torch's layers with themselves."""
    few, many = image(1, 6, 8, 8), image(1, 6, 64, 64)
    asked: list[str] = []
    for kind in (nn.Conv2d, nn.ConvTranspose2d):
        monkeypatch.setattr(kind, "forward", lambda self, x, *_: asked.append(type(self).__name__))
    for layer in (cpu.Conv2d(6, 8, 4, 2, 1), cpu.DoublingConv2d(6, 8)):
        layer(few)
        assert asked == []
        layer(many)
        layer.eval()(few)
        assert asked == [type(layer).__name__] * 2
        asked.clear()


def test_the_optimiser_steps_as_adam_does_however_weights_lie() -> None:
    learner = small(batch_size=2)
    plain = small(batch_size=2)
    plain_adam = {
        name: torch.optim.Adam(network.parameters(), 2e-4, (0.5, 0.999)) for name, network in plain._networks().items()
    }
    for _ in range(3):
        for name, network in learner._networks().items():
            for mine, theirs in zip(network.parameters(), plain._networks()[name].parameters(), strict=True):
                theirs.grad = torch.randn_like(theirs)
                mine.grad = theirs.grad.clone()
            learner.update(name)
            plain_adam[name].step()
    for name, network in learner._networks().items():
        for mine, theirs in zip(network.parameters(), plain._networks()[name].parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_the_discriminator_judges_real_and_generated_pairs_together_as_it_does_apart() -> None:
    learner = small()
    assert learner.discriminator is not None
    source, target, generated = image(2, 1, 64, 64), image(2, 1, 64, 64), image(2, 1, 64, 64)
    together = learner._judged(source, target, generated)
    for logits, image_of in zip(together, (target, generated), strict=True):
        torch.testing.assert_close(logits, learner.discriminator(source, image_of))


@pytest.mark.parametrize("batch", [1, 3])
def test_steps_are_those_of_the_reference_implementation(batch: int) -> None:
    """The same weights, no dropout, float32: the same losses, and after some steps the same weights."""
    torch.manual_seed(1)
    reference = Pix2PixModel(INSTANCE_NORM, num_downs=6, width=8, dropout=0.0)
    learner = small(batch_size=batch)
    for mine, theirs in ((learner.generator, reference.netG), (learner.discriminator, reference.netD)):
        assert mine is not None
        with torch.no_grad():
            for ours, other in zip(mine.parameters(), theirs.parameters(), strict=True):
                ours.copy_(other)
    for _ in range(3):
        source, target = image(batch, 1, 64, 64), image(batch, 1, 64, 64)
        _, d_real, d_fake, g, adversarial, l1 = learner.step(source, target, 2e-4)
        reference.set_input(source.contiguous(), target.contiguous())
        reference.optimize_parameters()
        for ours, other in (
            (d_real, reference.loss_D_real),
            (d_fake, reference.loss_D_fake),
            (adversarial, reference.loss_G_GAN),
            (l1 * 100, reference.loss_G_L1),
            (g, reference.loss_G),
        ):
            torch.testing.assert_close(ours, other.detach(), rtol=2e-3, atol=1e-4)


def test_memory_that_is_freed_is_kept_without_a_word_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    class Library:
        @staticmethod
        def mallopt(what: int, value: int) -> int:
            asked.append((what, value))
            return 1

    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda _: Library)
    cpu.keep_freed_memory()
    assert len(asked) == 2
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda _: object())  # a C library that has no mallopt
    cpu.keep_freed_memory()


def small(**settings: object) -> Learner:
    chosen = {"side": 64, "width": 8, "discriminator_width": 8, "dropout": 0.0, "precision": "fp32", "device": "cpu"}
    return Learner(TrainConfig.model_validate(chosen | settings), torch.device("cpu"))
