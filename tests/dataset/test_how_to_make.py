"""The command that makes a version again, and the advice for a version with an empty split."""

from __future__ import annotations

from typing import Any

import pytest

from ixi_etl.config import DatasetConfig, DigitsDataset
from ixi_etl.dataset.command import how_to_make
from ixi_etl.dataset.publish import _warn_of_empty_splits
from ixi_etl.preparations import configure

OPTIONS = " with the options in inputs.config of dataset.json"


def described(config: DatasetConfig | DigitsDataset, name: str) -> dict[str, Any]:
    """The part of `dataset.json` that decides the command."""
    content: dict[str, Any] = {"name": name, "inputs": {"config": config.model_dump(mode="json")}}
    preparation = getattr(config, "preparation", "none")
    return content if preparation == "none" else content | {"preparation": {"name": preparation}}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (DatasetConfig(), "`ixi-etl refresh`"),
        (DatasetConfig(slices=5), f"`ixi-etl refresh`{OPTIONS}"),
        (configure("paper", {}), f"`ixi-etl refresh`{OPTIONS}"),
        (DatasetConfig(modalities=("T1", "PD"), reference="T1"), "`ixi-etl refresh --modalities T1,PD --reference T1`"),
        (configure("syndiff", {}), "`ixi-etl refresh --preset syndiff`"),
        (configure("moschetto", {"slices": 20}), f"`ixi-etl refresh --preset moschetto`{OPTIONS}"),
    ],
)
def test_the_command_names_the_preset_or_where_the_options_are(config: DatasetConfig, expected: str) -> None:
    assert how_to_make(described(config, config.name)) == expected


@pytest.mark.parametrize(("limit", "options"), [(None, ""), (10, OPTIONS)])
def test_digits_are_made_by_their_own_command(limit: int | None, options: str) -> None:
    assert how_to_make(described(DigitsDataset(limit=limit), "digits")) == f"`ixi-etl digits`{options}"


@pytest.mark.parametrize(
    ("config", "advice"),
    [
        (DatasetConfig(), "give more subjects, or another --split-seed"),
        (DatasetConfig(split_counts=(2, 1, 0)), "give other --split-counts"),
    ],
)
def test_the_advice_for_an_empty_split_fits_the_split(
    config: DatasetConfig, advice: str, caplog: pytest.LogCaptureFixture
) -> None:
    _warn_of_empty_splits({**described(config, config.name), "splits": {"train": 2, "val": 1}})
    assert caplog.messages[0].endswith(advice)
