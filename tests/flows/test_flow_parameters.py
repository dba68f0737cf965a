"""Flows and their parameters are described in Prefect, the README and prefect.yaml, and refuse URLs with secrets.

These tests need no server.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from test_security import SECRET_URLS, test_harmless_at_signs_and_colons_are_accepted

PROJECT = Path(__file__).parents[2]
README = PROJECT / "README.md"
FLOWS = {d["name"]: d["entrypoint"] for d in yaml.safe_load((PROJECT / "prefect.yaml").read_text())["deployments"]}
[HARMLESS] = [mark.args[1] for mark in test_harmless_at_signs_and_colons_are_accepted.pytestmark]  # type: ignore[attr-defined]


def test_every_flow_parameter_has_a_description_and_presets_are_an_enum() -> None:
    from flows.look_after import look_after
    from flows.presets import Preset
    from flows.refresh_dataset import refresh_dataset
    from flows.synthesize import synthesize
    from flows.train_pix2pix import train_pix2pix

    for flow in (look_after, refresh_dataset, synthesize, train_pix2pix):
        for name, field in flow.parameters.properties.items():
            assert field.get("description"), f"{flow.name}: {name} has no description"
    assert train_pix2pix.parameters.properties["preset"]["enum"] == list(get_args(Preset))


def test_every_flow_has_a_description_and_is_in_the_readme_and_the_deployments() -> None:
    import importlib

    from prefect import Flow

    top = README.parent
    modules = [importlib.import_module(f"flows.{path.stem}") for path in (top / "flows").glob("[a-z]*.py")]
    flows = {flow.name: flow for m in modules for flow in vars(m).values() if isinstance(flow, Flow)}
    assert set(flows) == {"look-after", "refresh-dataset", "train-pix2pix", "synthesize"}
    for name, flow in flows.items():
        assert flow.description, f"{name} has no description"
        if name != "look-after":  # for the server only
            assert f"from flows.{flow.fn.__name__} import {flow.fn.__name__}" in README.read_text()
        assert f"flows/{flow.fn.__name__}.py:{flow.fn.__name__}" in (top / "prefect.yaml").read_text()


def schema_of(flow: str) -> dict[str, Any]:
    from prefect.flows import load_flow_from_entrypoint
    from prefect.utilities.callables import parameter_schema

    return parameter_schema(load_flow_from_entrypoint(str(PROJECT / FLOWS[flow]))).model_dump_for_openapi()


def texts_without_pattern(schema: Any, where: str = "", has_pattern: bool = False) -> Iterator[str]:
    """Paths in `schema` of the values that may be any text."""
    if isinstance(schema, dict):
        has_pattern = has_pattern or "pattern" in schema
        if schema.get("type") == "string" and not has_pattern and not schema.keys() & {"enum", "const"}:
            yield where
        for key, inner in schema.items():
            yield from texts_without_pattern(inner, f"{where}.{key}", has_pattern)
    elif isinstance(schema, list):
        for inner in schema:
            yield from texts_without_pattern(inner, where, has_pattern)


@pytest.mark.parametrize("flow", FLOWS)
def test_every_text_parameter_has_the_pattern(flow: str) -> None:
    found = list(texts_without_pattern(schema_of(flow)))
    assert [path for path in found if not path.endswith(".DatasetConfig.properties.modalities.items")] == []


def refused(schema: dict[str, Any], **parameters: Any) -> bool:
    from prefect.utilities.schema_tools.validation import ValidationError, validate

    try:
        validate(parameters, schema, raise_on_error=True)  # as the server does before it stores a run
    except ValidationError:
        return True
    return False


def test_a_secret_in_a_url_is_refused_before_it_is_stored_and_harmless_locations_are_not() -> None:
    training, refresh = schema_of("train-pix2pix"), schema_of("refresh-dataset")
    encoded = [url for url in SECRET_URLS if "%" in url and "@" not in url]  # refused when the run starts
    assert [url for url in SECRET_URLS if not refused(training, root=url)] == encoded
    assert all(refused(training, settings={"dataset": url}) for url in SECRET_URLS if "%" not in url)
    assert all(refused(refresh, config={"source": url}) for url in SECRET_URLS if "%" not in url)
    assert not any(refused(training, root=text) or refused(refresh, config={"source": text}) for text in HARMLESS)
    assert not refused(training, settings={"steps": 4, "dataset": "ixi-t1-t2@latest"})
