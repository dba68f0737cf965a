"""The command that makes a version again, and the advice for a version with an empty split."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples

from flows.cli import app, import_commands
from ixi_etl.config import DatasetConfig, DigitsConfig, DigitsDataset, RefreshConfig
from ixi_etl.dataset.command import FILES, command_of, how_to_make
from ixi_etl.dataset.publish import _warn_of_empty_splits
from ixi_etl.preparations import PRESETS, configure

IXI_SOURCE = {"source": "ixi", "file": "IXI-T1.tar"}
OWN_SOURCE = {"source": "own", "file": "IXI-T1.tar"}


def described(config: DatasetConfig | DigitsDataset, name: str, **inputs: Any) -> dict[str, Any]:
    """The part of `dataset.json` that decides the command."""
    content: dict[str, Any] = {"name": name, "inputs": {"config": config.model_dump(mode="json"), **inputs}}
    preparation = getattr(config, "preparation", "none")
    return content if preparation == "none" else content | {"preparation": {"name": preparation}}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (DatasetConfig(), "ixi-etl refresh"),
        (DatasetConfig(slices=5, pictures=False), "ixi-etl refresh --slices 5 --no-pictures"),
        (DatasetConfig(window=(3, 9), depth="any"), "ixi-etl refresh --window 3 9 --depth any"),
        (configure("paper", {}), "ixi-etl refresh --preset paper"),
        (DatasetConfig(modalities=("T1", "PD"), reference="T1"), "ixi-etl refresh --modalities T1,PD --reference T1"),
        (configure("syndiff", {}), "ixi-etl refresh --preset syndiff"),
        (configure("moschetto", {"slices": 20}), "ixi-etl refresh --preset moschetto --slices 20"),
    ],
)
def test_the_command_has_the_preset_and_all_options(config: DatasetConfig, expected: str) -> None:
    assert command_of(described(config, config.name)) == expected
    assert how_to_make(described(config, config.name)) == f"`{expected}`"


@pytest.mark.parametrize(("limit", "options"), [(None, ""), (10, " --limit 10")])
def test_digits_are_made_by_their_own_command(limit: int | None, options: str) -> None:
    assert command_of(described(DigitsDataset(limit=limit), "digits")) == f"ixi-etl digits{options}"


def test_the_command_names_what_decides_the_version_beside_the_configuration() -> None:
    sources = {"T1": IXI_SOURCE, "T2": IXI_SOURCE, "demographics": {"source": "ixi"}}
    official = described(DatasetConfig(), "ixi-t1-t2", demographics_sha256="0", members_sha256="0")
    assert command_of(official | {"sources": sources}) == "ixi-etl refresh --fetch members --demographics official"
    own = described(DatasetConfig(), "ixi-t1-t2", demographics_sha256="0", pattern=["{subject}_{modality}.nii"])
    sources = {"T1": IXI_SOURCE, "T2": OWN_SOURCE, "demographics": {"source": "own"}}
    expected = "ixi-etl refresh --source FILES --pattern '{subject}_{modality}.nii' --demographics TABLE"
    assert command_of(own | {"sources": sources}) == expected


configurations = st.builds(
    configure,
    st.sampled_from(sorted(PRESETS)),
    st.fixed_dictionaries(
        {},
        optional={
            "slices": st.integers(1, 40),
            "margin": st.integers(0, 3),
            "depth": st.sampled_from(["modal", "any"]),
            "min_nmi": st.floats(0, 1),
            "split": st.sampled_from([(0.5, 0.25, 0.25), (0.4, 0.3, 0.3)]),
            "incomplete": st.just("keep"),
            "modalities": st.sampled_from([("T1", "T2"), ("T1", "T2", "PD")]),
            "register_echoes": st.booleans(),
            "pictures": st.booleans(),
            "subjects": st.just(40),
            "split_counts": st.just((20, 10, 10)),
            "normalisation": st.sampled_from(["percentiles", "range"]),
        },
    ),
)


patterns = st.lists(st.sampled_from(["{subject}_{modality}.nii.gz", "T1={subject}/mprage.nii.gz"]), max_size=2)
KINDS = ("ixi", "ixi_unverified", "simulated", "own")


@settings(max_examples=examples(25))
@given(configurations, patterns, st.lists(st.sampled_from(KINDS), min_size=3, max_size=3), st.booleans())
def test_the_command_gives_the_same_configuration_again(
    config: DatasetConfig, pattern: list[str], kinds: list[str], is_members: bool
) -> None:
    import_commands()
    inputs: dict[str, Any] = ({"pattern": pattern} if pattern else {}) | ({"members_sha256": "0"} if is_members else {})
    sources = {m: {"source": kind} for m, kind in zip(config.modalities, kinds, strict=False)}
    words = shlex.split(command_of(described(config, config.name, **inputs) | {"sources": sources}))
    made: list[RefreshConfig | DigitsConfig] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.cli.datasets.run_refresh", made.append)
        patch.setattr("flows.cli.datasets.show_version", lambda *_: None)
        typer.main.get_command(app)(words[1:], standalone_mode=False)
    [job] = made
    assert isinstance(job, RefreshConfig)
    assert (job.dataset, list(job.pattern), job.fetch == "members") == (config, pattern, is_members)
    is_own = any(source["source"] in ("simulated", "own") for source in sources.values())
    assert job.source == (FILES if pattern or is_own else None)


def test_of_a_configuration_that_this_code_does_not_know_the_message_names_its_place() -> None:
    content = {"name": "ixi-t1-t2", "version": "0", "inputs": {"config": {"unheard": 1}, "pipeline_version": 99}}
    assert how_to_make(content) == "`ixi-etl refresh` with the options in inputs.config of dataset.json"


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
