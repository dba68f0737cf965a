"""The networks have the published shape, size, receptive field and dropout; loss gradients match those by hand."""

from __future__ import annotations

import math

import pytest
import torch

from model.config import TrainConfig
from model.networks import PatchDiscriminator, UNetGenerator, discriminator_loss, generator_loss, receptive_field
from model.trainer import Trainer


def parameters(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_the_defaults_have_the_published_numbers_of_parameters() -> None:
    assert round(parameters(UNetGenerator()) / 1e6, 1) == 54.4
    assert round(parameters(PatchDiscriminator()) / 1e6, 1) == 2.8


# By hand: each level halves the side and doubles the channels, from the width (here 4) to 8 times the width.
ENCODER = {
    32: [(4, 16), (8, 8), (16, 4), (32, 2), (32, 1)],
    64: [(4, 32), (8, 16), (16, 8), (32, 4), (32, 2), (32, 1)],
    256: [(4, 128), (8, 64), (16, 32), (32, 16), (32, 8), (32, 4), (32, 2), (32, 1)],
}


@pytest.mark.parametrize("upsampling", ["transpose", "nearest"])
@pytest.mark.parametrize("side", ENCODER)
def test_the_layers_of_the_generator_have_the_expected_shapes(side: int, upsampling: str) -> None:
    generator = UNetGenerator(side, width=4, upsampling=upsampling)  # type: ignore[arg-type]
    seen: list[tuple[int, int]] = []
    for block in [*generator.down, *generator.up]:
        block.register_forward_hook(lambda _m, _i, out: seen.append((out.shape[1], out.shape[2])))
    out = generator(torch.rand(2, 1, side, side) * 2 - 1)
    decoder = [*reversed(ENCODER[side][:-1]), (1, side)]
    assert seen == [*ENCODER[side], *decoder]
    assert out.shape == (2, 1, side, side)
    assert out.abs().max() <= 1


@pytest.mark.parametrize("side", [0, 16, 100, 1024])
def test_unsupported_sides_are_refused(side: int) -> None:
    with pytest.raises(ValueError, match=f"side is {side}; the generator takes a power of two"):
        UNetGenerator(side)


@pytest.mark.parametrize(("layers", "pixels"), [(1, 16), (2, 34), (3, 70)])
def test_the_receptive_field_is_the_extent_of_the_gradient(layers: int, pixels: int) -> None:
    discriminator = PatchDiscriminator(
        width=4, layers=layers, norm="none"
    )  # with instance norm each score depends on the whole image
    assert discriminator.receptive_field == pixels
    source = torch.rand(1, 1, 256, 256, requires_grad=True)
    target = torch.rand(1, 1, 256, 256, requires_grad=True)
    scores = discriminator(source, target)
    middle = scores.shape[-1] // 2
    scores[0, 0, middle, middle].backward()
    for image in (source, target):
        assert image.grad is not None
        rows, columns = image.grad[0, 0].nonzero(as_tuple=True)
        assert (int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1) == (pixels, pixels)


def test_the_receptive_field_of_one_layer_is_its_kernel() -> None:
    assert receptive_field([(4, 2)]) == 4
    assert receptive_field([(4, 2), (4, 2)]) == 10


def test_dropout_is_the_only_noise_of_the_generator() -> None:
    generator, x = UNetGenerator(64, width=4), torch.rand(1, 1, 64, 64)
    assert not torch.equal(generator(x), generator(x))
    generator.eval()
    assert torch.equal(generator(x), generator(x))
    noisy = [i for i, up in enumerate(generator.up) if any(isinstance(m, torch.nn.Dropout) for m in up)]
    assert noisy == [0, 1, 2]
    assert {m.p for m in generator.modules() if isinstance(m, torch.nn.Dropout)} == {0.5}


def test_weights_are_initialised_as_published() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator()
    weights = torch.cat([m.weight.flatten() for m in discriminator.modules() if isinstance(m, torch.nn.Conv2d)])
    assert abs(float(weights.detach().mean())) < 1e-4
    assert float(weights.detach().std()) == pytest.approx(0.02, rel=0.01)


def test_instance_norm_equals_batch_norm_in_training_at_batch_size_1() -> None:
    torch.manual_seed(3)
    instance, batch = (UNetGenerator(64, width=4, dropout=0.0, norm=n) for n in ("instance", "batch"))  # type: ignore[arg-type]
    batch.load_state_dict(instance.state_dict(), strict=False)
    x = torch.rand(1, 1, 64, 64)
    torch.testing.assert_close(instance(x), batch(x), atol=1e-5, rtol=1e-4)


GENERATED, TARGET = [0.5, -0.25, 0.0, 1.0], [0.0, 0.25, 0.5, 0.5]
LOGITS = [0.0, math.log(3.0)]  # the sigmoid is 1/2 and 3/4


def gradients(config: TrainConfig) -> tuple[list[float], list[float]]:
    """Gradients of the generator's loss with respect to the generated pixels and to the logits."""
    generated = torch.tensor(GENERATED, requires_grad=True)
    logits = torch.tensor(LOGITS, requires_grad=True)
    scores = None if config.adversarial == "none" else logits
    loss = generator_loss(config, scores, generated, torch.tensor(TARGET))
    loss.total.backward()
    return [[] if x.grad is None else x.grad.tolist() for x in (generated, logits)]  # type: ignore[return-value]


# d mean|g - t| / dg = sign(g - t) / n;  d mean (g - t)^2 / dg = 2 (g - t) / n, with n = 4
L1 = [0.25, -0.25, -0.25, 0.25]
L2 = [0.25, -0.25, -0.25, 0.25]  # every |g - t| is 1/2
# d mean -log sigmoid(x) / dx = (sigmoid(x) - 1) / n;  d mean (x - 1)^2 / dx = 2 (x - 1) / n, with n = 2
BCE = [-0.25, -0.125]
LSGAN = [-1.0, math.log(3.0) - 1]


@pytest.mark.parametrize(
    ("adversarial", "reconstruction", "by_pixels", "by_logits"),
    [
        ("none", "l1", L1, []),
        ("none", "l2", L2, []),
        ("bce", "none", [], BCE),
        ("lsgan", "none", [], LSGAN),
        ("bce", "l1", L1, BCE),
        ("lsgan", "l2", L2, LSGAN),
    ],
)
def test_each_loss_has_the_gradient_computed_by_hand(
    adversarial: str, reconstruction: str, by_pixels: list[float], by_logits: list[float]
) -> None:
    config = TrainConfig(adversarial=adversarial, reconstruction=reconstruction, lambda_l1=10)  # type: ignore[arg-type]
    pixels, logits = gradients(config)
    assert pixels == pytest.approx([10 * g for g in by_pixels])
    assert logits == pytest.approx(by_logits)


def test_the_gradient_of_l2_grows_with_the_distance_and_that_of_l1_does_not() -> None:
    generated = torch.tensor([0.1, 1.0], requires_grad=True)
    for kind, wanted in (("l1", [0.5, 0.5]), ("l2", [0.1, 1.0])):
        config = TrainConfig(adversarial="none", reconstruction=kind, lambda_l1=1)  # type: ignore[arg-type]
        (grad,) = torch.autograd.grad(generator_loss(config, None, generated, torch.zeros(2)).total, generated)
        assert grad.tolist() == pytest.approx(wanted)


def test_the_discriminator_loss_is_half_the_sum_of_its_real_and_generated_terms() -> None:
    real, fake = (torch.tensor(LOGITS, requires_grad=True) for _ in range(2))
    loss = discriminator_loss(TrainConfig(), real, fake)
    losses = [float(part.detach()) for part in loss]
    # real: -log 1/2, -log 3/4; fake: -log 1/2, -log 1/4
    assert losses[1] == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)
    assert losses[2] == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert losses[0] == pytest.approx((losses[1] + losses[2]) / 2)
    loss.total.backward()
    assert real.grad is not None
    assert fake.grad is not None
    assert real.grad.tolist() == pytest.approx([-0.125, -0.0625])
    assert fake.grad.tolist() == pytest.approx([0.125, 0.1875])


def trainer(**settings: object) -> Trainer:
    chosen = {"side": 32, "width": 4, "discriminator_width": 4, "discriminator_layers": 1, "dropout": 0.0}
    config = TrainConfig.model_validate(chosen | {"precision": "fp32"} | settings)
    return Trainer(config, torch.device("cpu"))


def generator_gradients(**settings: object) -> list[torch.Tensor]:
    """The generator's gradients after one step, whose discriminator step is the same for all settings."""
    trained = trainer(**settings)
    torch.manual_seed(1)
    source, target = torch.rand(2, 1, 32, 32) * 2 - 1, torch.rand(2, 1, 32, 32) * 2 - 1
    trained.step(source, target, lr=2e-4)
    return [p.grad.clone() for p in trained.generator.parameters() if p.grad is not None]


def test_the_gradients_of_both_losses_add_up_in_the_generator() -> None:
    both = generator_gradients(lambda_l1=7)
    adversarial = generator_gradients(reconstruction="none")
    distance = generator_gradients(adversarial="none", lambda_l1=7)
    assert len(both) == len(adversarial) == len(distance) > 0
    for a, b, c in zip(both, adversarial, distance, strict=True):
        # The gradient of a bias before a norm is only rounding.
        torch.testing.assert_close(a, b + c, rtol=1e-4, atol=5e-6)


def test_without_an_adversarial_loss_there_is_no_discriminator() -> None:
    trained = trainer(adversarial="none")
    assert trained.discriminator is None
    assert not any(name.startswith("discriminator") for name in trained.state_dict())


def test_the_generator_loss_leaves_no_gradient_in_the_discriminator() -> None:
    """After a step the gradients of the discriminator are those of its own loss."""
    trained = trainer()
    source, target = torch.rand(1, 1, 32, 32) * 2 - 1, torch.rand(1, 1, 32, 32) * 2 - 1
    assert trained.discriminator is not None
    twin = trainer()
    assert twin.discriminator is not None
    generated = twin.generator.train()(source.contiguous(memory_format=torch.channels_last)).detach()
    own = discriminator_loss(trained.config, twin.discriminator(source, target), twin.discriminator(source, generated))
    own.total.backward()
    trained.step(source, target, lr=2e-4)
    for weight, expected in zip(trained.discriminator.parameters(), twin.discriminator.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, expected.grad)


def test_a_configuration_without_any_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no loss to train on"):
        TrainConfig(adversarial="none", reconstruction="none")
