"""The configuration of a training: presets and learning rate."""

from __future__ import annotations

import pytest

from model.config import PRESETS, TrainConfig, preset


def test_the_learning_rate_falls_linearly_at_the_end() -> None:
    config = TrainConfig(steps=100, lr=1.0, decay=0.25)
    assert [config.lr_at(step) for step in (0, 75, 80, 99)] == pytest.approx([1, 1, 0.8, 0.04])
    assert TrainConfig(steps=100, lr=1.0).lr_at(99) == 1


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid(name: str) -> None:
    config = preset(name)
    if name == "paper":
        assert (config.steps, config.batch_size, config.lambda_l1) == (49_200, 1, 100)
        assert (config.width, config.dropout, config.discriminator_layers, config.augment) == (64, 0.5, 3, "none")
