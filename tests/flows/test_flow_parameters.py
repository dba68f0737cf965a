"""Flows and their parameters are described in Prefect, the README and prefect.yaml; these tests need no server."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

README = Path(__file__).parents[2] / "README.md"


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
