"""The networks have the published shapes, numbers of parameters, receptive field and dropout."""

from __future__ import annotations

import pytest
import torch

from model.networks import PatchDiscriminator, UNetGenerator, receptive_field


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
def test_the_generator_s_layers_have_the_expected_shapes(side: int, upsampling: str) -> None:
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
