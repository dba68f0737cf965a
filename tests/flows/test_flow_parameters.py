"""What people see of the flows on a server's page, in the README and in prefect.yaml; no server is needed for it."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

README = Path(__file__).parents[2] / "README.md"


def test_every_parameter_of_a_flow_is_described_and_a_preset_is_one_of_a_closed_list() -> None:
    from flows.presets import Preset
    from flows.refresh_dataset import refresh_dataset
    from flows.synthesize import synthesize
    from flows.train_pix2pix import train_pix2pix

    for flow in (refresh_dataset, synthesize, train_pix2pix):
        for name, field in flow.parameters.properties.items():
            assert field.get("description"), f"{flow.name}: {name} has no description on the server's page"
    assert train_pix2pix.parameters.properties["preset"]["enum"] == list(get_args(Preset))


def test_every_flow_has_help_and_stands_in_the_readme_and_in_the_deployments() -> None:
    import importlib

    from prefect import Flow

    top = README.parent
    modules = [importlib.import_module(f"flows.{path.stem}") for path in (top / "flows").glob("[a-z]*.py")]
    flows = {flow.name: flow for m in modules for flow in vars(m).values() if isinstance(flow, Flow)}
    assert set(flows) == {"refresh-dataset", "train-pix2pix", "synthesize"}
    for name, flow in flows.items():
        assert flow.description, f"{name} says nothing on the server's page"
        assert f"from flows.{flow.fn.__name__} import {flow.fn.__name__}" in README.read_text()
        assert f"flows/{flow.fn.__name__}.py:{flow.fn.__name__}" in (top / "prefect.yaml").read_text()
