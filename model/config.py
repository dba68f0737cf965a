"""What a training is told to do: one validated object, unknown keys refused, and the presets that fill it."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from ixi_etl.config import Strict

Norm = Literal["instance", "batch", "none"]
Upsampling = Literal["transpose", "nearest"]
Adversarial = Literal["bce", "lsgan", "none"]
Reconstruction = Literal["l1", "l2", "none"]
Augment = Literal["none", "flip", "jitter"]
Precision = Literal["auto", "fp32", "bf16"]

SIDES = (32, 64, 128, 256, 512)
"""Square crops that the generator takes."""

WIDTHS = 1 << 16  # more than any memory holds, and few enough for torch to count in
STEPS = 10**8 - 1  # checkpoints are in the order of their names, which have eight digits
SEEDS = 1 << 63  # torch's are 64 bits


class TrainConfig(Strict):
    """One training. The defaults are the published recipe."""

    model_config = ConfigDict(allow_inf_nan=False)

    dataset: str = Field("ixi-t1-t2@latest", description="NAME@VERSION; `latest` is resolved once, at the start")
    direction: str | None = Field(None, description="SOURCE->TARGET, as t1->t2 or t2->t1; omit for the dataset's own")
    side: int | None = Field(None, description="pixels of the square training crop; omit for whole slices")
    augment: Augment = Field(
        "none", description="none; flip left and right; jitter: flip, enlarge by 286/256, and crop"
    )

    width: Annotated[int, Field(ge=1, le=WIDTHS)] = Field(64, description="channels of the generator's outermost level")
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    upsampling: Upsampling = "transpose"
    norm: Norm = "instance"
    discriminator_width: Annotated[int, Field(ge=1, le=WIDTHS)] = 64
    discriminator_layers: Annotated[int, Field(ge=1, le=5)] = Field(3, description="3 see 70 pixels, 2: 34, 1: 16")

    steps: Annotated[int, Field(ge=1, le=STEPS)] = 49_200
    batch_size: Annotated[int, Field(ge=1, le=1 << 24)] = Field(1, description="pairs a step, on each GPU")
    lr: Annotated[float, Field(gt=0)] = 2e-4
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.5, 0.999)
    decay: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="share of the steps, at the end, that lr falls over"
    )
    adversarial: Adversarial = "bce"
    reconstruction: Reconstruction = "l1"
    lambda_l1: Annotated[float, Field(ge=0)] = Field(100.0, description="weight of the reconstruction loss, l1 or l2")
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="decay of the generator's moving average; 0: none"
    )
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS)] = 0
    precision: Precision = Field("auto", description="auto: bf16 where the hardware computes in it, else fp32")
    device: str = Field("auto", description="auto: the GPU if there is one; else as torch names it, cpu or cuda:1")
    cuda_graphs: bool = Field(True, description="on a GPU, alone: record a step once and play it back")

    checkpoint_every: Annotated[int, Field(ge=1)] = Field(1000, description="steps; validated at the same time")
    keep: Annotated[int, Field(ge=1)] = Field(2, description="newest checkpoints kept, besides the best")
    samples: Annotated[int, Field(ge=0, le=10_000)] = Field(
        10, description="how many times in a run the sample sheet is drawn"
    )
    log_every: Annotated[int, Field(ge=1)] = 50

    @field_validator("side")
    @classmethod
    def _side(cls, side: int | None) -> int | None:
        if side is not None and side not in SIDES:
            raise ValueError(f"{side} is none of {', '.join(map(str, SIDES))}")
        return side

    @model_validator(mode="after")
    def _something_to_learn(self) -> TrainConfig:
        if self.adversarial == "none" and self.reconstruction == "none":
            raise ValueError("adversarial and reconstruction are both none: there is no loss to train on")
        return self

    @property
    def run_id(self) -> str:
        """Of a resolved configuration: the dataset's version and a hash of all that decides the weights."""
        deciding = self.model_dump(mode="json", exclude=set(MAY_DIFFER))
        digest = hashlib.sha256(json.dumps({**deciding, "steps": self.steps}, sort_keys=True).encode()).hexdigest()
        return f"{self.dataset.replace('@', '-')}-{digest[:8]}"

    def difference(self, other: TrainConfig) -> str:
        """The fields, in words, that keep a run of `other` from going on as this one; empty if nothing does."""
        free = MAY_DIFFER if self.decay == other.decay == 0 else MAY_DIFFER - {"steps"}  # lr depends on the end
        theirs = other.model_dump()
        unlike = [k for k, mine in self.model_dump().items() if mine != theirs[k] and k not in free]
        return ", ".join(f"{k} {theirs[k]}, not {getattr(self, k)}" for k in unlike)

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ...: constant, then a straight line that would reach 0 at the end."""
        falling = self.decay * self.steps
        return self.lr * min(1.0, (self.steps - step) / falling) if falling else self.lr


MAY_DIFFER = frozenset({"steps", "device", "cuda_graphs", "checkpoint_every", "keep", "samples", "log_every"})
"""What a run that goes on may have otherwise than the one that it goes on from."""

PRESETS: dict[str, dict[str, Any]] = {
    # 49,200 steps are 100 passes over 492 pictures; with 20 slices of each subject they are far fewer passes.
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
}


def preset(name: str, **settings: Any) -> TrainConfig:
    """The preset's configuration, with `settings` over it."""
    return TrainConfig.model_validate(PRESETS[name] | settings)
