"""An unknown field of a configuration is refused, with the most similar known field."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from ixi_etl.config import DatasetConfig, RefreshConfig, format_validation_error, nearest_name
from model.config import TrainConfig


@pytest.mark.parametrize(
    ("typed", "intended"),
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
def test_nearest_name_finds_the_intended_field(typed: str, intended: str | None) -> None:
    assert nearest_name(typed, list(TrainConfig.model_fields)) == intended


@pytest.mark.parametrize(
    ("model", "given", "expected"),
    [
        (TrainConfig, {"stpes": 1}, "there is no field stpes; did you mean steps?"),
        (DatasetConfig, {"slice": 1}, "there is no field slice; did you mean slices?"),
        (RefreshConfig, {"dataset": {"windows": 1}}, "dataset: there is no field windows; did you mean window?"),
        (RefreshConfig, {"sorce": "x"}, "there is no field sorce; did you mean source?"),
        (TrainConfig, {"stpes": 1, "widht": 2}, "did you mean steps?; there is no field widht; did you mean width?"),
        (DatasetConfig, {"zzz": 1}, "there is no field zzz; the fields are modalities, reference,"),
    ],
)
def test_error_names_the_nearest_field_in_one_line(model: Any, given: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError) as error:
        model.model_validate(given)
    line = format_validation_error(error.value)
    assert expected in line
    assert "\n" not in line
    assert "Extra inputs" not in line
    assert "Value error" not in line


@pytest.mark.parametrize(("window", "length"), [("middle", 20), ((3, 8), 5)])
def test_window_length_is_the_length_of_the_slab(window: Any, length: int) -> None:
    config = DatasetConfig(window=window)
    assert config.window_length == length
    start, stop = config.window_in(100) or (0, 0)
    assert stop - start == length
