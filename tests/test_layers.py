"""Imports point down, between the packages and inside them, and never in a circle: `docs/architecture.md`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
PACKAGES = ("flows", "model", "ixi_etl")
"""From the top down."""

LAYERS = (
    *("recipes", "testing", "report", "pairing", "dataset", "sources", "scans"),
    *("config", "modalities", "core", "errors"),
)
"""Of `ixi_etl`, packages and modules, from the top down."""

INFERENCE = ("generator", "evaluate", "planes", "synthesize", "volumes", "export")
TRAINING_LOOP = {"model.train", "model.trainer", "model.jobs"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((PROJECT / package).rglob("*.py"))}


def imports_of(tree: ast.AST) -> Iterator[str]:
    """The project's modules that the code imports, at its top or inside a function, but for type checkers alone."""
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
    """Where a module stands: it imports those of the same or a higher rank."""
    package, _, rest = module.partition(".")
    layer = rest.partition(".")[0]
    if module == "ixi_etl":  # constants
        return len(PACKAGES), 0
    return PACKAGES.index(package), LAYERS.index(layer) if layer in LAYERS else -1


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module: str) -> None:
    upward = {name for name in IMPORTS[module] if rank(name) < rank(module)}
    assert not upward


def test_there_is_no_circle() -> None:
    list(TopologicalSorter(IMPORTS).static_order())  # raises CycleError, which names it


def test_inference_does_not_import_the_training_loop() -> None:
    for module in INFERENCE:
        found: set[str] = set()
        new = {f"model.{module}"}
        while new:
            found |= new
            new = set().union(*(IMPORTS[name] for name in new)) - found
        assert not found & TRAINING_LOOP, module
