"""Imports point down, between and inside the packages, and form no cycle: `docs/architecture.md`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
PACKAGES = ("flows", "model", "ixi_etl")
"""Packages from the top down."""

LAYERS = (
    *("recipes", "testing", "report", "loading", "exports", "pairing", "dataset", "sources", "scans"),
    *("preparations", "config", "modalities", "core", "errors"),
)
"""Packages and modules of `ixi_etl` from the top down."""

INFERENCE = (
    "generator",
    "baselines",
    "scores",
    "protocols",
    "subjects",
    "evaluate",
    "foreign",
    "planes",
    "source_planes",
    "input_checks",
    "synthesize",
    "outputs",
    "volumes",
    "export",
)
TRAINING_LOOP = {"model.train", "model.trainer", "model.jobs"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((PROJECT / package).rglob("*.py"))}


def imports_of(tree: ast.AST) -> Iterator[str]:
    """The project's modules that the code imports at its top or in a function, except those for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (
                name for full in names for name in [full if full in MODULES else node.module] if name in MODULES
            )
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        yield from imports_of(node)


IMPORTS = {name: set(imports_of(ast.parse(path.read_text()))) - {name} for name, path in MODULES.items()}


def rank(module: str) -> tuple[int, int]:
    """The layer of a module. It may import modules of the same or a higher rank."""
    package, _, rest = module.partition(".")
    layer = rest.partition(".")[0]
    if module == "ixi_etl":  # constants
        return len(PACKAGES), 0
    is_layer = package == "ixi_etl" and layer in LAYERS
    return PACKAGES.index(package), LAYERS.index(layer) if is_layer else -1


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module: str) -> None:
    upward = {name for name in IMPORTS[module] if rank(name) < rank(module)}
    assert not upward


def test_imports_form_no_cycle() -> None:
    list(TopologicalSorter(IMPORTS).static_order())  # a CycleError names the cycle


def test_inference_does_not_import_the_training_loop() -> None:
    for module in INFERENCE:
        reached: set[str] = set()
        new = {f"model.{module}"}
        while new:
            reached |= new
            new = set().union(*(IMPORTS[name] for name in new)) - reached
        assert not reached & TRAINING_LOOP, module
