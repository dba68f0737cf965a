"""The training of a published protocol (preset `moschetto`), and each field of the configuration that it needs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from altered import alter_version
from conftest import SMALL_NETWORKS

from ixi_etl.core.files import read_json
from ixi_etl.dataset import metadata
from ixi_etl.dataset.direction import Direction
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.errors import ConfigError
from model import data, jobs
from model.config import DEVIATIONS, PRESETS, TrainConfig, preset
from model.cpu_layers import InstanceNorm2d
from model.data import Pairs, Slabs
from model.export import export
from model.generator import build_generator, load_generator
from model.jobs import prepare_run, train_run
from model.networks import PatchDiscriminator, UNetGenerator, discriminator_loss, generator_loss
from model.trainer import Trainer

CPU = torch.device("cpu")


def test_the_preset_has_the_published_settings() -> None:
    config = preset("moschetto")
    assert (config.batch_size, config.epochs, config.levels, config.width) == (128, 300, 5, 64)
    assert (config.lr, config.lr_discriminator, config.betas) == (2e-4, 5e-5, (0.5, 0.999))
    assert (config.adversarial, config.reconstruction, config.lambda_l1) == ("bce", "l1", 100)
    assert config.discriminator_layers == 3
    falling = config.model_copy(update={"steps": 900})
    assert [falling.lr_at(step) for step in (0, 600, 750, 899)] == pytest.approx([2e-4, 2e-4, 1e-4, 2e-4 / 300])


RUN_IDS = {"paper": "ff5300df", "digits": "8293977b", "smoke": "76fdf2a1", "gpu": "0a91f1a1"}  # before these fields


@pytest.mark.parametrize("name", RUN_IDS)
def test_the_runs_of_older_presets_keep_their_ids(name: str) -> None:
    config = preset(name, side=256, precision="fp32", device="cpu")
    assert config.run_id.rpartition("-")[2] == RUN_IDS[name]
    for field, value in (("lr_discriminator", 1e-4), ("label_smoothing", 0.1), ("levels", 5)):
        assert config.model_copy(update={field: value}).run_id != config.run_id
    assert config.model_copy(update={"published": "moschetto", "epochs": 3}).run_id == config.run_id


# -- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upsampling", ["transpose", "nearest"])
def test_five_levels_take_rectangular_slices(upsampling: str) -> None:
    """By hand, for the published 224 x 192: five halvings, to 7 x 6."""
    generator = UNetGenerator(width=4, levels=5, upsampling=upsampling)  # type: ignore[arg-type]
    seen: list[tuple[int, ...]] = []
    for block in [*generator.down, *generator.up]:
        block.register_forward_hook(lambda _m, _i, out: seen.append(tuple(out.shape[1:])))
    assert generator(torch.zeros(1, 1, 224, 192)).shape == (1, 1, 224, 192)
    encoder = [(4, 112, 96), (8, 56, 48), (16, 28, 24), (32, 14, 12), (32, 7, 6)]
    assert seen == [*encoder, *reversed(encoder[:-1]), (1, 224, 192)]
    assert generator.multiple == 32


def test_the_networks_of_the_preset_have_the_published_numbers_of_weights() -> None:
    """Counted in the authors' networks, of which no convolution before a norm has a bias, and no norm has weights."""
    config = preset("moschetto")
    networks = build_generator(config), PatchDiscriminator(config.discriminator_width, config.discriminator_layers)
    counts = []
    for network in networks:
        weights = sum(p.numel() for p in network.parameters())
        counts.append(weights - sum(3 * m.num_features for m in network.modules() if isinstance(m, InstanceNorm2d)))
    biases = 64 + 512  # of our outermost and innermost convolutions
    assert counts == [16_649_217 + biases, 2_762_817]


def test_slices_of_other_sizes_are_padded_with_background_and_cropped() -> None:
    generator = UNetGenerator(width=4, levels=3).eval()
    source = torch.rand(2, 1, 35, 43) * 2 - 1
    padded = torch.full((2, 1, 40, 48), -1.0)
    padded[..., :35, :43] = source
    with torch.no_grad():
        assert torch.equal(generator.forward_padded(source), generator(padded)[..., :35, :43])
        exact = padded[..., :40, :48]
        assert torch.equal(generator.forward_padded(exact), generator(exact))


def rectangular_pairs(height: int, width: int) -> Pairs:
    draws = torch.Generator().manual_seed(0)
    source, target = (
        Slabs(
            torch.randint(0, 900, (2, 3, height, width), generator=draws, dtype=torch.int16),
            torch.tensor([[5.0, 800.0]] * 2),
        )
        for _ in range(2)
    )
    return Pairs(Direction(("t1",), "t2"), ["a", "b"], (source,), target, "lower")


@pytest.mark.parametrize("kind", ["none", "flip", "jitter"])
def test_whole_rectangular_slices_are_trained_on(kind: str) -> None:
    config = TrainConfig(**{**SMALL_NETWORKS, "side": None, "levels": 3, "augment": kind, "batch_size": 3, "steps": 9})
    pairs, trainer = rectangular_pairs(44, 36), Trainer(config, CPU)
    source, target = data.draw_batch(pairs, config, 4)
    assert source.shape == target.shape == (3, 1, 44, 36)
    assert torch.isfinite(trainer.step(source, target, 1e-3)).all()


def test_the_loss_of_padded_slices_counts_the_padding() -> None:
    """As in the published code, which pads its images before training."""
    config = TrainConfig(**{**SMALL_NETWORKS, "side": None, "levels": 3})
    draws = torch.Generator().manual_seed(0)
    images = [torch.rand(2, 1, 44, 36, generator=draws) * 2 - 1 for _ in range(2)]
    padded = [torch.nn.functional.pad(image, (0, 4, 0, 4), value=-1.0) for image in images]
    losses = [Trainer(config, CPU).step(source, target, 1e-3) for source, target in (images, padded)]
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"side": 32, "levels": 6}, "side 32 is not a multiple of 64, for 6 levels"),
        ({"levels": 0}, "greater than or equal to 1"),
        ({"levels": 10}, "less than or equal to 9"),
        ({"label_smoothing": 0.5}, "less than 0.5"),
        ({"epochs": 0}, "greater than or equal to 1"),
        ({"lr_discriminator": 0.0}, "greater than 0"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.model_validate(fields)


# -- losses and learning rates ----------------------------------------------------------------------------------------


def test_smoothed_labels_have_the_cross_entropy_of_soft_labels() -> None:
    """-y log p - (1 - y) log(1 - p), with y = 0.9 for real pairs and 0.1 for generated ones, p = 3/4 and 1/2."""
    config, logits = TrainConfig(label_smoothing=0.1), torch.tensor([math.log(3.0), 0.0])

    def entropy(y: float) -> float:
        return sum(-y * math.log(p) - (1 - y) * math.log(1 - p) for p in (0.75, 0.5)) / 2

    loss = discriminator_loss(config, logits, logits)
    assert [float(part) for part in loss[1:]] == pytest.approx([entropy(0.9), entropy(0.1)])
    images = torch.zeros(1, 1, 2, 2)
    assert float(generator_loss(config, logits, images, images).adversarial) == pytest.approx(entropy(1.0))


def test_the_labels_of_the_preset_are_the_mean_of_the_published_ones() -> None:
    """The published labels of a batch are hard with probability 5%; the loss is linear in the label."""
    config, logits = preset("moschetto"), torch.tensor([-1.3, 0.2, 2.0])

    def expected(soft: float, hard: float) -> float:
        entropy = torch.nn.functional.binary_cross_entropy_with_logits
        losses = [float(entropy(logits, torch.full_like(logits, label))) for label in (soft, hard)]
        return 0.95 * losses[0] + 0.05 * losses[1]

    loss = discriminator_loss(config, logits, logits)
    assert [float(part) for part in loss[1:]] == pytest.approx([expected(0.9, 1.0), expected(0.1, 0.0)])


def batch(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    source, target = (torch.rand(2, 1, 32, 32, generator=draws) * 2 - 1 for _ in range(2))
    return source, target


@pytest.mark.parametrize(("own", "wanted"), [(None, 4e-3), (1e-3, 1e-3)])
def test_the_discriminator_has_its_own_learning_rate(own: float | None, wanted: float) -> None:
    """The first step of Adam moves a weight by the learning rate, whatever its gradient; at half of lr, by half."""
    for lr in (4e-3, 2e-3):
        trainer = Trainer(TrainConfig(**{**SMALL_NETWORKS, "lr": 4e-3, "lr_discriminator": own}), CPU)
        assert trainer.discriminator is not None
        moved = {}
        for name, network in (("generator", trainer.generator), ("discriminator", trainer.discriminator)):
            moved[name] = network.state_dict()["down.0.0.weight" if name == "generator" else "layers.0.weight"]
        before = {name: weight.clone() for name, weight in moved.items()}
        trainer.step(*batch(), lr)
        steps = {name: float((moved[name] - before[name]).abs().median()) for name in moved}
        assert steps == pytest.approx({"generator": lr, "discriminator": wanted * lr / 4e-3}, rel=1e-3)


def test_a_resumed_run_keeps_both_learning_rates_exactly() -> None:
    settings = {"lr": 4e-3, "lr_discriminator": 1e-3, "label_smoothing": 0.1, "steps": 6, "decay": 0.5}
    config = TrainConfig(**{**SMALL_NETWORKS, **settings})
    whole = Trainer(config, CPU)
    for step in range(6):
        whole.step(*batch(step), config.lr_at(step))
    resumed = Trainer(config, CPU)
    for step in range(6):
        if step == 4:  # where the rates fall
            state = resumed.state_dict()
            resumed = Trainer(config, CPU)
            resumed.load_state_dict(state, Path("step-4"))
        resumed.step(*batch(step), config.lr_at(step))
    wanted = whole.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in resumed.state_dict().items())


# -- runs -------------------------------------------------------------------------------------------------------------

SMALL = {**SMALL_NETWORKS, "side": None, "levels": 3, "batch_size": 5, "samples": 0}


def root_of(published: PublishedVersion, root: Path) -> Path:
    (root / "datasets").symlink_to(published.folder.parents[1])
    return root


def test_epochs_are_passes_over_the_training_pairs(published: PublishedVersion, tmp_path: Path) -> None:
    root = root_of(published, tmp_path)
    pairs = len(data.load_pairs(published.folder, "train"))
    config = prepare_run(root, preset("smoke", **SMALL_NETWORKS, epochs=7, batch_size=5)).config
    assert config.steps == math.ceil(7 * pairs / 5)
    assert config.run_id == config.model_copy(update={"epochs": None}).run_id
    with pytest.raises(ConfigError, match="steps is 9 and epochs 7; give one of them"):
        prepare_run(root, preset("smoke", **SMALL_NETWORKS, epochs=7, steps=9))
    with pytest.raises(ConfigError, match="the limit is 99,999,999"):
        prepare_run(root, preset("smoke", **SMALL_NETWORKS, epochs=10**8 - 1))
    assert prepare_run(root, preset("moschetto", **SMALL_NETWORKS, levels=3, steps=9)).config.steps == 9


def test_a_run_of_the_preset_records_its_deviations(published: PublishedVersion, tmp_path: Path) -> None:
    settings = SMALL | {"discriminator_width": 4, "epochs": 1, "checkpoint_every": 1000}
    run = prepare_run(root_of(published, tmp_path), preset("moschetto", **settings))
    assert run.config.side is None
    path = train_run(run)
    record = read_json(run.folder / "config.json")
    assert record["preset"]["name"] == "moschetto"
    stated = record["preset"]["deviations"]
    assert stated[: len(DEVIATIONS["moschetto"])] == list(DEVIATIONS["moschetto"])
    assert "levels is 3, not 5." in stated
    assert "epochs is 1, not 300." in stated
    assert stated[-1].startswith("The dataset version is not prepared as published, by ixi-etl refresh --preset mos")
    assert preset("moschetto").deviations == list(DEVIATIONS["moschetto"])
    generator, config, _ = load_generator(path)
    assert (generator.multiple, config.published) == (8, "moschetto")
    resumed = prepare_run(tmp_path, preset("moschetto", **settings))
    assert resumed.folder == run.folder
    assert train_run(resumed, resume=True) == path


def test_every_changed_field_that_affects_the_weights_is_a_deviation() -> None:
    changed = {"lr": 1e-3, "lambda_l1": 10, "neighbours": 1, "side": 64, "seed": 3, "device": "cpu", "keep": 9}
    stated = preset("moschetto", **changed, steps=9).deviations
    assert set(stated) - set(DEVIATIONS["moschetto"]) == {
        "lr is 0.001, not 0.0002.",
        "lambda_l1 is 10.0, not 100.0.",
        "neighbours is 1, not 0.",
        "side is 64, not None.",
        "epochs is None, not 300.",
    }


def test_a_version_of_the_same_preparation_is_no_deviation(
    published: PublishedVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare_run(root_of(published, tmp_path), preset("moschetto", **SMALL))
    described = metadata.read_metadata(run.version)
    for name, expected in (("moschetto", 0), ("selfrdb", 1)):
        prepared = described | {"preparation": {"name": name, "deviations": []}}
        monkeypatch.setattr(metadata, "read_metadata", lambda _, prepared=prepared: prepared)
        assert len(jobs._deviations(run)) - len(run.config.deviations) == expected


def test_the_documentation_has_every_deviation() -> None:
    text = " ".join((Path(__file__).parents[2] / "docs" / "training.md").read_text().split())
    assert [sentence for sentence in DEVIATIONS["moschetto"] if f"- {sentence}" not in text] == []


def test_a_run_of_another_preset_records_no_deviations(trained: Path) -> None:
    assert "preset" not in read_json(trained / "runs" / "a" / "config.json")
    assert all(preset(name).deviations == [] for name in PRESETS if name != "moschetto")


def test_slices_of_index_pairs_are_exported_whole(published: PublishedVersion, tmp_path: Path) -> None:
    folder = alter_version(published.folder, tmp_path, lambda table: table, pairing="index")
    path = train_run(prepare_run(tmp_path, TrainConfig(**SMALL, steps=1), "a"))
    shape = data.load_pairs(folder, "train").shape
    export(path, "safetensors", tmp_path / "out")
    (described,) = read_json(tmp_path / "out" / "config.json")["inputs"]
    assert described["shape"] == ["batch", 1, *shape]
