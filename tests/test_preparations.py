"""Presets of published preparations: their fields, and the deviations that are recorded with a version."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from ixi_etl.config import DatasetConfig, format_validation_error
from ixi_etl.preparations import PREPARATIONS, PRESETS, configure, deviations

PAGE = Path(__file__).parent.parent / "docs/protocols.md"


def test_every_preparation_is_a_preset_and_a_value_of_the_configuration() -> None:
    values = get_args(DatasetConfig.model_fields["preparation"].annotation)
    assert values == ("none", *PREPARATIONS)
    assert list(PRESETS) == ["paired", "paper", *PREPARATIONS]


@pytest.mark.parametrize("name", PREPARATIONS)
def test_an_unchanged_preset_has_only_the_deviations_of_its_preparation(name: str) -> None:
    chosen = configure(name, {})
    assert chosen.preparation == name
    assert deviations(chosen) == [deviation.sentence for deviation in PREPARATIONS[name].deviations]
    assert deviations(configure(name, {"pictures": False})) == deviations(chosen)


def test_presets_without_a_publication_have_no_deviations() -> None:
    assert deviations(configure("paired", {"slices": 3})) == deviations(configure("paper", {})) == []


@pytest.mark.parametrize(
    ("given", "sentences"),
    [
        ({"slices": 10}, ["slices is 10, not 100."]),
        ({"split_counts": (5, 1, 2)}, ["split_counts is 5, 1, 2, not 25, 5, 10."]),
        ({"reference": "T2", "min_nmi": 0.1}, ["reference is T2, not T1.", "min_nmi is 0.1, not 0.06."]),
        ({"split_by": "person"}, ["split_by is person, not order.", "split_counts is none, not 25, 5, 10."]),
    ],
)
def test_every_changed_field_is_a_deviation(given: dict[str, Any], sentences: list[str]) -> None:
    assert deviations(configure("syndiff", given))[-len(sentences) :] == sentences


@pytest.mark.parametrize(
    ("preset", "given", "left_out"),
    [
        ("syndiff", {"registration": "rigid"}, ["The affine registration", "All subjects are registered"]),
        ("selfrdb", {"normalisation": "mean"}, ["Each slab is scaled by its own"]),
        ("moschetto", {"split_by": "person"}, ["The files are sorted by subject"]),
        ("moschetto", {"slices": 20}, ["The slice is the middle one", "Each slice is scaled by its own"]),
        ("moschetto", {"split_seed": 1}, []),
    ],
)
def test_sentences_about_a_changed_field_are_left_out(preset: str, given: dict[str, Any], left_out: list[str]) -> None:
    found = deviations(configure(preset, given))
    missing = [each.sentence for each in PREPARATIONS[preset].deviations if each.sentence not in found]
    assert [sentence[: len(start)] for sentence, start in zip(missing, left_out, strict=True)] == left_out


def test_deviations_describe_only_fields_of_the_configuration() -> None:
    named = {name for each in PREPARATIONS.values() for deviation in each.deviations for name in deviation.fields}
    assert named <= DatasetConfig.model_fields.keys()


@pytest.mark.parametrize(
    ("preset", "given", "expected"),
    [
        ("moschetto", {"split_counts": (25, 5, 10)}, {"split_by": "order", "subject_limit": 40}),
        ("syndiff", {"split_by": "person"}, {"split_counts": None, "subject_limit": 40}),
        ("syndiff", {"split_by": "file", "subjects": 9}, {"split_counts": None, "subject_limit": 9}),
        ("syndiff", {"pairing": "index"}, {"registration": "none", "slice_rule": "middle", "reference": "T1"}),
        ("syndiff", {"window": (30, 50)}, {"registration": "affine", "slice_rule": "middle"}),
    ],
)
def test_fields_of_a_preset_give_way_to_the_options_that_exclude_them(
    preset: str, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    chosen = configure(preset, given)
    assert {name: getattr(chosen, name) for name in expected} == expected


def test_a_limit_other_than_the_sum_of_the_split_counts_is_refused() -> None:
    assert configure("syndiff", {"subjects": 40}).subject_limit == 40
    with pytest.raises(ValidationError, match="25 \\+ 5 \\+ 10 uses 40 subjects, but --subjects is 100"):
        configure("syndiff", {"subjects": 100})


def test_the_same_limit_without_split_counts_is_no_deviation() -> None:
    assert not [each for each in deviations(configure("syndiff", {"split_by": "person"})) if each.startswith("subj")]
    assert "subjects is 9, not 40." in deviations(configure("syndiff", {"split_by": "person", "subjects": 9}))


def test_a_preparation_without_its_preset_deviates_in_every_field() -> None:
    """As a parameter of a Prefect flow, the preparation can be given without the fields of its preset."""
    named = {sentence.partition(" is ")[0] for sentence in deviations(DatasetConfig(preparation="moschetto"))}
    assert named >= PREPARATIONS["moschetto"].fields.keys()


def test_the_page_lists_every_preparation_and_all_its_deviations() -> None:
    page = " ".join(re.sub(r"^- ", "", PAGE.read_text(), flags=re.MULTILINE).split())
    for name, preparation in PREPARATIONS.items():
        assert f"### Preset {name}" in page
        sentences = [deviation.sentence for deviation in preparation.deviations]
        missing = [sentence for sentence in (preparation.source, *sentences) if sentence not in page]
        assert not missing


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"pairing": "index", "registration": "affine"}, "--registration must be none"),
        ({"pairing": "index", "slice_rule": "area"}, "index pairing takes the same slices of all subjects"),
        ({"window": (3, 8), "slice_rule": "area"}, "is explicit; give --slice-rule middle"),
        ({"split_counts": (25, 5, 10), "subjects": 8}, "uses 40 subjects, but --subjects is 8; leave out"),
        ({"split_counts": (0, 0, 0)}, "uses no subject"),
        ({"split_counts": (1, 1, 1), "split_by": "file"}, "only order uses them"),
        ({"split_by": "order"}, "--split-by order needs --split-counts"),
    ],
)
def test_contradictions_are_refused_in_one_line(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError) as error:
        DatasetConfig.model_validate(given)
    line = format_validation_error(error.value)
    assert expected in line
    assert "\n" not in line
