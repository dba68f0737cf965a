"""An unknown field of any configuration is refused with the field that was probably meant."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from ixi_etl.config import DatasetConfig, RefreshConfig, in_a_line, nearest
from model.config import TrainConfig


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("learning_rate", "lr"),
        ("LR", "lr"),
        ("batch", "batch_size"),
        ("batchsize", "batch_size"),
        ("batch-size", "batch_size"),
        ("step", "steps"),
        ("lambda", "lambda_l1"),
        ("lambda_L1", "lambda_l1"),
        ("up_sampling", "upsampling"),
        ("cuda_graph", "cuda_graphs"),
        ("checkpoint", "checkpoint_every"),
        ("wormhole", None),
        ("", None),
    ],
)
def test_the_nearest_field_is_found(typed: str, meant: str | None) -> None:
    assert nearest(typed, list(TrainConfig.model_fields)) == meant


@pytest.mark.parametrize(
    ("model", "given", "said"),
    [
        (TrainConfig, {"stpes": 1}, "there is no field stpes; did you mean steps?"),
        (DatasetConfig, {"slice": 1}, "there is no field slice; did you mean slices?"),
        (RefreshConfig, {"dataset": {"windows": 1}}, "dataset: there is no field windows; did you mean window?"),
        (RefreshConfig, {"sorce": "x"}, "there is no field sorce; did you mean source?"),
        (TrainConfig, {"stpes": 1, "widht": 2}, "did you mean steps?; there is no field widht; did you mean width?"),
        (DatasetConfig, {"zzz": 1}, "there is no field zzz; the fields are pairing, window, slices, depth,"),
    ],
)
def test_the_message_names_it_in_one_line(model: Any, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as error:
        model.model_validate(given)
    line = in_a_line(error.value)
    assert said in line
    assert "\n" not in line
    assert "Extra inputs" not in line
    assert "Value error" not in line
