"""Write `docs/api.md` from the docstrings of the public API: `make api`.

`PUBLIC` is the one list of public names. The page is made from the source text, so no module is imported.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

TOP = Path(__file__).parent.parent
PAGE = TOP / "docs" / "api.md"

PUBLIC: dict[str, list[str]] = {
    "Configuration and errors": [
        "ixi_etl.config.RefreshConfig",
        "ixi_etl.config.DatasetConfig",
        "ixi_etl.config.DigitsConfig",
        "ixi_etl.config.DigitsDataset",
        "model.config.TrainConfig",
        "model.config.preset",
        "ixi_etl.errors.IxiError",
        "ixi_etl.errors.ConfigError",
        "ixi_etl.errors.DownloadError",
        "ixi_etl.errors.DatasetError",
        "ixi_etl.errors.LockedError",
        "ixi_etl.errors.CheckpointError",
        "ixi_etl.errors.TrainingError",
        "ixi_etl.errors.SynthesisError",
        "ixi_etl.errors.ExportError",
        "ixi_etl.errors.DeviceError",
    ],
    "Make a version": [
        "ixi_etl.recipes.ixi.refresh",
        "ixi_etl.recipes.digits.make_digits",
        "ixi_etl.dataset.publish.PublishedVersion",
        "ixi_etl.scans.survey.survey",
        "ixi_etl.scans.survey.depth_histogram",
        "ixi_etl.scans.survey.modal_depths",
        "ixi_etl.testing.phantom.write_phantom",
    ],
    "Open a version": [
        "ixi_etl.open_version",
        "ixi_etl.loading.version.DatasetVersion",
        "ixi_etl.loading.version.DatasetVersion.xarray",
        "ixi_etl.loading.version.DatasetVersion.torch",
        "ixi_etl.loading.version.DatasetVersion.nifti",
    ],
    "Read, check and remove versions": [
        "ixi_etl.dataset.versions.find_version",
        "ixi_etl.dataset.versions.resolve_version",
        "ixi_etl.dataset.versions.published_versions",
        "ixi_etl.dataset.metadata.read_metadata",
        "ixi_etl.dataset.metadata.read_manifest",
        "ixi_etl.dataset.manifest.used_rows",
        "ixi_etl.dataset.store.open_arrays",
        "ixi_etl.dataset.verify.verify",
        "ixi_etl.dataset.compare.compare_inputs",
        "ixi_etl.dataset.compare.compare_manifests",
        "ixi_etl.dataset.prune.prune_versions",
        "ixi_etl.core.storage.DataRoot",
    ],
    "Train and evaluate": [
        "model.data.load_pairs",
        "model.data.Pairs",
        "model.data.draw_batch",
        "model.networks.UNetGenerator",
        "model.networks.PatchDiscriminator",
        "model.jobs.prepare_run",
        "model.jobs.train_run",
        "model.jobs.evaluate_run",
        "model.run.Run",
        "model.run.open_run",
        "model.train.train",
        "model.evaluate.evaluate",
        "model.evaluate.Evaluation",
    ],
    "Use a generator": [
        "model.generator.load_generator",
        "model.generator.as_predictor",
        "model.synthesize.find_generator",
        "model.synthesize.load_trained",
        "model.synthesize.Trained",
        "model.synthesize.synthesize_volume",
        "model.source_planes.Scan",
        "model.volumes.synthesize_file",
        "model.export.export",
    ],
    "Share": [
        "model.cards.model_card",
        "model.cards_dataset.dataset_card",
        "model.hub.parse_target",
        "model.hub.Repository",
        "model.hub.push_run",
        "model.hub.push_version",
    ],
    "Prefect flows": [
        "flows.refresh_dataset.refresh_dataset",
        "flows.train_pix2pix.train_pix2pix",
        "flows.synthesize.synthesize",
    ],
}

HEAD = """\
# Python API

<!-- Written by `make api` from the docstrings. Edit the docstrings, or the list in tests/api_page.py. -->

These are the functions and classes that a user calls. Everything else is internal and may change. The docstring of each
function gives shapes, units, frames and the errors that it raises; `help(NAME)` prints it. Modules of `model` need the
extra `train`. The scripts in `examples/` show the API in use.
"""


def definition_of(name: str) -> ast.FunctionDef | ast.ClassDef:
    """The definition of a public name: a function or class of a module, a method, or what a package imports by a name.

    Raises:
        LookupError: the module does not define it.
    """
    module, attributes = split_name(name)
    source = source_of(module)
    node: Any = ast.parse(source.read_text())
    for attribute in attributes:
        found = [n for n in node.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == attribute]
        if not found and source.name == "__init__.py":
            imports = [n for n in ast.walk(node) if isinstance(n, ast.ImportFrom)]
            return next(
                definition_of(f"{n.module}.{attribute}") for n in imports if attribute in [a.name for a in n.names]
            )
        if not found:
            raise LookupError(f"{module} does not define {attribute}; correct PUBLIC in tests/api_page.py")
        node = found[0]
    return node


def split_name(name: str) -> tuple[str, list[str]]:
    """The module of a public name, and the attributes that lead from it to the definition."""
    parts = name.split(".")
    length = next(n for n in range(len(parts) - 1, 0, -1) if source_of(".".join(parts[:n])).exists())
    return ".".join(parts[:length]), parts[length:]


def source_of(module: str) -> Path:
    path = TOP / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def first_line(node: ast.FunctionDef | ast.ClassDef) -> str:
    return (ast.get_docstring(node) or "").partition("\n")[0]


def signature_of(node: ast.FunctionDef | ast.ClassDef) -> str:
    """The parameters of a function by name, those with a default in brackets; nothing for a class."""
    if isinstance(node, ast.ClassDef):
        return ""
    positional = [a for a in node.args.posonlyargs + node.args.args if a.arg != "self"]
    optional = {a.arg for a in positional[len(positional) - len(node.args.defaults) :]}
    optional |= {a.arg for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if d is not None}
    extra = [f"**{node.args.kwarg.arg}"] if node.args.kwarg else []
    names = [f"[{a.arg}]" if a.arg in optional else a.arg for a in positional + node.args.kwonlyargs]
    return f"({', '.join(names + extra)})"


def api_page() -> str:
    parts = [HEAD]
    for section, names in PUBLIC.items():
        parts += [f"## {section}", "", "| name | description |", "|---|---|"]
        for name in names:
            node = definition_of(name)
            parts.append(f"| `{name}{signature_of(node)}` | {first_line(node).replace('|', chr(92) + '|')} |")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(api_page())
