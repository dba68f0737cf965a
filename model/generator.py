"""Build, load and use a generator. Imports nothing of the training loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ixi_etl.errors import CheckpointError
from model import checkpoint
from model.config import SIDES, TrainConfig
from model.networks import UNetGenerator, to_device

GENERATOR_FILE = "generator.safetensors"

Predictor = Callable[[Tensor, Tensor], Tensor]
"""From sources (B, C, H, W) in [-1, 1] and their positions in the slab (B,) to predicted targets (B, 1, H, W)."""

BATCH = 16  # slices at a time
DATASET_FIELDS = ("dataset", "direction", "neighbours", "side")
"""Weights are evaluated in a run only if they agree in these: others may have been trained on its test subjects."""


def as_predictor(generator: UNetGenerator, *, dropout: bool = False) -> Predictor:
    """The generator as synthesis uses it. `dropout` keeps dropout on, as the publication does at test time.

    Batch norm always uses its running statistics, and does not update them.
    """

    batch_norms = [layer for layer in generator.modules() if isinstance(layer, nn.BatchNorm2d)]

    def predict(source: Tensor, _position: Tensor) -> Tensor:
        training = generator.training
        generator.train(dropout)
        for layer in batch_norms:
            layer.eval()
        generated = generator.forward_padded(source).float()
        generator.train(training)
        return generated

    return predict


def build_generator(config: TrainConfig) -> UNetGenerator:
    """The generator of a resolved configuration, with new random weights."""
    assert config.is_sized
    return UNetGenerator(
        config.side or SIDES[0],
        config.width,
        config.dropout,
        config.upsampling,
        config.norm,
        config.input_channels,
        config.levels,
    )


def load_generator(path: Path, device: str | torch.device = "cpu") -> tuple[UNetGenerator, TrainConfig, int]:
    """The generator in a checkpoint or in `generator.safetensors`, its configuration, and its step.

    Raises:
        CheckpointError: the file is missing or damaged, or its weights do not fit its configuration.
    """
    tensors, metadata = checkpoint.load(path)
    config, weights = checkpoint.parse_config(path, metadata["config"]), generator_weights(tensors)
    with torch.device("meta"):  # allocates nothing before the weights are known to fit the configuration
        checkpoint.require_tensors(path, weights, build_generator(config).state_dict())
    generator = build_generator(config)
    generator.load_state_dict(weights)
    return to_device(generator, device).eval(), config, metadata["step"]


def check_same_dataset(weights: Path, config: TrainConfig, run: TrainConfig) -> None:
    """Raise `CheckpointError` unless `weights`, trained with `config`, were trained on the data of the run."""
    differing = [name for name in DATASET_FIELDS if getattr(config, name) != getattr(run, name)]
    if differing:
        difference = ", ".join(f"{name} {getattr(config, name)}, not {getattr(run, name)}" for name in differing)
        raise CheckpointError(f"{weights} is of another training run ({difference}); evaluate it in its own run")


def generator_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights to generate with: the moving average in a trainer's state if it has one, otherwise the generator.

    The state of a lone generator is returned as it is.
    """
    for name in ("average.module", "generator"):
        weights = with_prefix(state, name)
        if weights:
            return weights
    return state


def with_prefix(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The entries `<name>.<key>` of a state, under `<key>`."""
    return {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
