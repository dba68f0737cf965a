"""Configure a training run: one validated object that rejects unknown keys, and its presets."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from ixi_etl.config import StrictModel
from ixi_etl.core.option import Option

Norm = Literal["instance", "batch", "none"]
Upsampling = Literal["transpose", "nearest"]
Adversarial = Literal["bce", "lsgan", "none"]
Reconstruction = Literal["l1", "l2", "none"]
Augment = Literal["none", "flip", "jitter"]
Precision = Literal["auto", "fp32", "bf16"]
TrackerName = Literal["tensorboard", "mlflow", "trackio"]

SIDES = (32, 64, 128, 256, 512)
"""Sides of the square crops that the generator supports, in pixels."""

MAX_WIDTH = 1 << 16  # more than any memory holds; larger sizes overflow in torch
MAX_STEPS = 10**8 - 1  # checkpoints are sorted by name, with the step in eight digits
SEEDS = 1 << 63  # torch's seeds are 64-bit integers: from -SEEDS to SEEDS - 1


MAX_LEVELS = SIDES[-1].bit_length() - 1
MAX_NEIGHBOURS = 8


class TrainConfig(StrictModel):
    """The configuration of one training run. The defaults are the published recipe.

    `prepare_run` resolves it: it sets the version in `dataset`, `direction`, `side` (unless `levels` is set), `steps`
    (from `epochs`), `precision` and `device`.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    dataset: str = Field("ixi-t1-t2@latest", description="NAME@VERSION; latest is resolved once, at the start")
    direction: str | None = Field(
        None, description="SOURCE->TARGET, for example t2->t1 or t1+pd->t2; by default that of the dataset"
    )
    neighbours: Annotated[int, Field(ge=0, le=MAX_NEIGHBOURS)] = Field(
        0, description="slices below and above, of each source, that the generator also sees"
    )
    side: int | None = Field(None, description="pixels of the square training crop; omit for whole slices")
    augment: Augment = Field("none", description="none; flip: left-right; jitter: flip, enlarge by 286/256, and crop")

    width: Annotated[int, Field(ge=1, le=MAX_WIDTH)] = Field(
        64, description="channels of the generator's outermost level"
    )
    levels: Annotated[int, Field(ge=1, le=MAX_LEVELS)] | None = Field(
        None,
        description="halvings of the generator, which then takes slices of any shape; by default down to 1 x 1",
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.5, description="dropout rate of the decoder's three innermost levels"
    )
    upsampling: Upsampling = "transpose"
    norm: Norm = "instance"
    discriminator_width: Annotated[int, Field(ge=1, le=MAX_WIDTH)] = 64
    discriminator_layers: Annotated[int, Field(ge=1, le=5)] = Field(
        3, description="3: patches of 70 pixels; 2: 34; 1: 16"
    )

    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] = Field(49_200, description="optimiser steps")
    epochs: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = Field(
        None, description="passes over the training pairs, in place of steps"
    )
    batch_size: Annotated[int, Field(ge=1, le=1 << 24)] = Field(1, description="pairs per step and process")
    lr: Annotated[float, Field(gt=0)] = Field(2e-4, description="learning rate")
    lr_discriminator: Annotated[float, Field(gt=0)] | None = Field(
        None, description="learning rate of the discriminator, if it differs; it falls as lr does"
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.5, 0.999)
    decay: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="share of the steps, at the end, over which lr falls to 0"
    )
    adversarial: Adversarial = "bce"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="s: the discriminator learns the labels 1 - s (real) and s (generated)"
    )
    reconstruction: Reconstruction = "l1"
    lambda_l1: Annotated[float, Field(ge=0)] = Field(100.0, description="weight of the reconstruction loss, l1 or l2")
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="decay of the generator's moving average; 0: none"
    )
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS)] = Field(0, description="seed of weights, batches and dropout")
    precision: Precision = Field("auto", description="auto: bf16 if the hardware supports it, otherwise fp32")
    device: str = Field(
        "auto", description="auto: the GPU if there is one; otherwise a torch device such as cpu or cuda:1"
    )
    cuda_graphs: bool = Field(True, description="on a single GPU: capture a step as a CUDA graph and replay it")

    checkpoint_every: Annotated[int, Field(ge=1)] = Field(
        1000, description="steps between checkpoints, each with a validation"
    )
    keep: Annotated[int, Field(ge=1)] = Field(2, description="newest checkpoints kept, besides the best")
    samples: Annotated[int, Field(ge=0, le=10_000)] = Field(10, description="number of sample sheets in a run")
    log_every: Annotated[int, Field(ge=1)] = 50
    log: Annotated[tuple[TrackerName, ...], Option(type=str, metavar="NAME,...")] = Field(
        ("tensorboard",), description="trackers, of tensorboard, mlflow and trackio; none: only CSV files"
    )

    published: Literal["none", "moschetto"] = Field(
        "none", description="the published training that a preset follows; its deviations are recorded"
    )

    @model_validator(mode="before")
    @classmethod
    def _compose_direction(cls, given: Any) -> Any:
        """Accept `sources` and `target` in place of `direction`."""
        if not isinstance(given, dict) or not {"sources", "target"} & given.keys():
            return given
        fields = dict(given)
        sources, target = fields.pop("sources", None), fields.pop("target", None)
        if fields.get("direction") is not None:
            raise ValueError("give either direction, or sources and target")
        names = [sources] if isinstance(sources, str) else sources
        if not isinstance(names, list | tuple) or not names or not all(isinstance(n, str) for n in (*names, target)):
            raise ValueError('give both sources and target, for example sources=["t1","pd"] and target=t2')
        return fields | {"direction": f"{'+'.join(names)}->{target}"}

    @field_validator("log", mode="before")
    @classmethod
    def _split_log(cls, given: Any) -> Any:
        """Accept `mlflow,trackio`, and `none` for no tracker; drop what is named twice."""
        names = [name.strip() for name in given.split(",")] if isinstance(given, str) else given
        return [] if names == ["none"] else list(dict.fromkeys(names)) if isinstance(names, list | tuple) else names

    @field_validator("side")
    @classmethod
    def _check_side(cls, side: int | None) -> int | None:
        if side is not None and side not in SIDES:
            raise ValueError(f"{side} is not one of {', '.join(map(str, SIDES))}")
        return side

    @model_validator(mode="after")
    def _check_sizes(self) -> TrainConfig:
        if self.levels is not None and self.side is not None and self.side % 2**self.levels:
            raise ValueError(f"side {self.side} is not a multiple of {2**self.levels}, for {self.levels} levels")
        return self

    @model_validator(mode="after")
    def _check_loss(self) -> TrainConfig:
        if self.adversarial == "none" and self.reconstruction == "none":
            raise ValueError("adversarial and reconstruction are both none: there is no loss to train on")
        return self

    @property
    def run_id(self) -> str:
        """The run id of a resolved configuration: the version and a hash of all fields that affect the weights."""
        # A newer field at its default is left out, so older runs without it keep their id.
        newer = {name for name in NEWER_FIELDS if getattr(self, name) == type(self).model_fields[name].default}
        fields = self.model_dump(mode="json", exclude={*MAY_DIFFER, *newer})
        digest = hashlib.sha256(json.dumps({**fields, "steps": self.steps}, sort_keys=True).encode()).hexdigest()
        return f"{self.dataset.replace('@', '-')}-{digest[:8]}"

    def difference(self, other: TrainConfig) -> str:
        """The fields that prevent resuming a run of `other` with this configuration, in words; empty if none."""
        # With decay the learning rate depends on the number of steps.
        free = MAY_DIFFER if self.decay == other.decay == 0 else MAY_DIFFER - {"steps"}
        others = other.model_dump()
        differing = [k for k, value in self.model_dump().items() if value != others[k] and k not in free]
        return ", ".join(f"{k} {others[k]}, not {getattr(self, k)}" for k in differing)

    @property
    def channels(self) -> tuple[tuple[str, int], ...]:
        """Source, and offset in slices to the superior, of each channel of the generator's input.

        A configuration that is not resolved counts as one with a single source.
        """
        sources = (self.direction or "source").partition("->")[0].split("+")
        return tuple((name, n) for name in sources for n in range(-self.neighbours, self.neighbours + 1))

    @property
    def input_channels(self) -> int:
        """Number of channels of the generator's input."""
        return len(self.channels)

    @property
    def is_sized(self) -> bool:
        """Whether the number of levels of the generator is known, as it is in a resolved configuration."""
        return self.side is not None or self.levels is not None

    @property
    def deviations(self) -> list[str]:
        """How the training differs from the published one that its preset follows, in sentences."""
        if self.published == "none":
            return []
        published = preset(self.published)
        compared = (type(self).model_fields.keys() - NOT_PUBLISHED - MAY_DIFFER) | PRESETS[self.published].keys()
        own = {name: (getattr(self, name), getattr(published, name)) for name in type(self).model_fields}
        changed = [
            f"{k} is {mine}, not {theirs}." for k, (mine, theirs) in own.items() if k in compared and mine != theirs
        ]
        return [*DEVIATIONS[self.published], *changed]

    def crop(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the training crops of slices with this `shape`."""
        return shape if self.side is None else (self.side, self.side)

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ...: constant, then falling linearly so that it would reach 0 at step `steps`."""
        falling = self.decay * self.steps
        return self.lr * min(1.0, (self.steps - step) / falling) if falling else self.lr


MAY_DIFFER = frozenset(
    {"steps", "epochs", "device", "cuda_graphs", "checkpoint_every", "keep", "samples", "log_every", "log", "published"}
)
"""Fields that may change when a run is resumed."""

NOT_PUBLISHED = frozenset({"dataset", "direction", "seed"})
"""Fields that affect the weights, and of which a preset of a published training says nothing."""

NEWER_FIELDS = frozenset({"neighbours", "levels", "lr_discriminator", "label_smoothing"})
"""Fields of the run id that were added after the first runs."""

PRESETS: dict[str, dict[str, Any]] = {
    # The published 49,200 steps are 100 passes over 492 images; a version of IXI has many more slices.
    "paper": {},
    "digits": {
        "dataset": "digits@latest",
        "steps": 20_000,
        "batch_size": 16,
        "width": 32,
        "discriminator_width": 32,
        "discriminator_layers": 1,
        "checkpoint_every": 2000,
    },
    "smoke": {
        "side": 128,
        "width": 16,
        "discriminator_width": 16,
        "batch_size": 4,
        "steps": 300,
        "checkpoint_every": 100,
        "samples": 3,
        "log_every": 25,
    },
    "gpu": {"batch_size": 32, "steps": 20_000, "augment": "jitter", "decay": 0.5, "ema": 0.999, "precision": "bf16"},
    # The pix2pix of Moschetto et al. (2025, arXiv:2507.14575).
    "moschetto": {
        "published": "moschetto",
        "levels": 5,
        "batch_size": 128,
        "epochs": 300,
        "decay": 1 / 3,
        "lr_discriminator": 5e-5,
        "label_smoothing": 0.095,
        "precision": "fp32",
        "checkpoint_every": 50,
    },
}

DEVIATIONS: dict[str, tuple[str, ...]] = {
    "none": (),
    "moschetto": (
        "Images are normalised to [-1, 1]; theirs are 8-bit images in [0, 1].",
        "Slices whose sides are no multiples of 32 are padded at the ends of the axes; theirs on both sides.",
        "Norms are of each channel, with learned scale and shift; theirs are of all channels of an image together, "
        "without.",
        "Dropout is in the three innermost levels of the decoder; theirs is in the three between its innermost and its "
        "outermost.",
        "The discriminator learns the labels 0.905 and 0.095. Theirs are 0.9 and 0.1, and in 5% of the batches 1 and "
        "0: the same on average, and the loss is linear in the label.",
        "Both losses of a step are of one output of the generator; theirs are of two, with new dropout.",
        "All batches are full; theirs is smaller at the end of each pass, so they make more steps.",
        "The learning rates fall at each step of the last third, towards 0; theirs once a pass, to 1/101.",
        "The best of the generators validated every 50 steps is kept; theirs is the best after any pass.",
    ),
}
"""For each published training, how its preset differs from the published code."""


def preset(name: str, **settings: Any) -> TrainConfig:
    """The configuration of a preset, with `settings` overriding its fields; `steps` or `epochs` overrides both.

    Raises:
        pydantic.ValidationError: a field is unknown or a value is invalid.
    """
    lengths = {"steps", "epochs"}
    replaced = lengths if lengths & settings.keys() else set()
    return TrainConfig.model_validate({k: v for k, v in PRESETS[name].items() if k not in replaced} | settings)
