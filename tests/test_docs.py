"""The README and the pages in `docs/` agree with the code: tables match, commands parse, and Python runs."""

from __future__ import annotations

import json
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import typer
from api_page import PUBLIC, api_page, definition_of, first_line
from conftest import SMALL_NETWORKS, config_for
from test_layers import LAYERS, PACKAGES

from flows.cli import app, import_commands
from ixi_etl import __version__, errors
from ixi_etl.dataset import metadata
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.dataset.schema import IXI, REASONS
from ixi_etl.dataset.store import open_arrays
from ixi_etl.recipes.ixi import refresh
from ixi_etl.testing.loopback import serve_folder

TOP = Path(__file__).parent.parent
PAGES = [*sorted(TOP.glob("*.md")), *sorted((TOP / "docs").rglob("*.md"))]
import_commands()
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
TARGETS = re.findall(r"^([a-z-]+):", (TOP / "Makefile").read_text(), re.MULTILINE)
OTHER_PROGRAMS = {"python3", "pip", ".venv/bin/pip", ".venv/bin/pre-commit", "tensorboard", "napari"}
OTHER_PROGRAMS |= {
    "mlflow",
    "trackio",
    "hf",
    "docker",
    "cp",
    "export",
    "cd",
    "aws",
    "curl",
    "git",
    "ssh",
    "gzip",
    "helm",
    "kubectl",
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def rows(page: str, head: str) -> list[list[str]]:
    """The cells of the table with the header line `head` on a page in `docs/`."""
    table = (TOP / "docs" / page).read_text().partition(f"\n{head}\n")[2].partition("\n\n")[0]
    assert table, f"docs/{page} has no table {head}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[1:]]


def names(cell: str) -> list[str]:
    """The names in backticks in a cell."""
    return re.findall(r"`([^`]+)`", cell)


def test_dataset_page_lists_the_columns_of_the_manifest() -> None:
    kinds = {"text": "str", "JSON": "str", "integer": "Int64", "number": "Float64", "`": "str"}
    documented = {}
    for cell, kind, _ in rows("dataset.md", "| column | type | what it holds |"):
        documented |= dict.fromkeys(names(cell), next(kinds[k] for k in kinds if kind.startswith(k)))
    assert documented == dict(IXI.dtypes)
    for modality in ("t1_", "t2_"):  # both modalities share a row; within one, the order is that of the file
        page, schema = ([c for c in columns if c.startswith(modality)] for columns in (documented, IXI.columns))
        assert page == schema


def test_dataset_page_lists_the_columns_of_other_preparations() -> None:
    listed = [cells[0] for cells in rows("dataset.md", "| column | type | when | what it holds |")]
    assert sorted(name for cell in listed for name in names(cell)) == sorted(IXI.optional)


def test_dataset_page_lists_the_reasons_in_the_order_of_the_checks() -> None:
    documented = [name for cell, _ in rows("dataset.md", "| reason | what it means |") for name in names(cell)]
    assert documented == list(REASONS)


def test_dataset_page_lists_the_files_and_the_arrays(published: PublishedVersion) -> None:
    files = [name for cell, _ in rows("dataset.md", "| file | what it is |") for name in names(cell)]
    existing = {p.name for p in published.folder.iterdir()}
    assert existing <= {name.partition("/")[0] for name in files}
    arrays = open_arrays(published.folder)
    for cell, dimensions, dtype, _ in rows("dataset.md", "| array | dimensions | dtype | what it holds |"):
        for name in names(cell):
            array = arrays[name]
            assert (", ".join(array.metadata.dimension_names), str(array.dtype)) == (dimensions, dtype)


def test_operations_page_lists_the_exit_codes() -> None:
    documented = {
        name: cell
        for cell, classes, _ in rows("operations.md", "| exit code | error | what it means |")
        for name in names(classes)
    }
    defined = {name: error for name, error in vars(errors).items() if str(name).endswith("Error")}
    assert documented.pop("StoppedError") == "128 + n"
    assert documented == {
        name: str(error.exit_code) for name, error in defined.items() if name not in ("StoppedError", "BadVolumeError")
    }


def test_api_page_is_up_to_date() -> None:
    assert (TOP / "docs/api.md").read_text() == api_page(), "run `make api`"


@pytest.mark.parametrize("name", [name for public in PUBLIC.values() for name in public])
def test_public_names_exist_and_have_a_docstring(name: str) -> None:
    assert first_line(definition_of(name))
    if not name.startswith("flows."):  # importing Prefect takes seconds; `test_flow` imports the flows
        assert pkgutil.resolve_name(name)


def test_files_named_on_the_pages_exist() -> None:
    missing = [
        f"{page.name}: {path}"
        for page in PAGES
        for path in re.findall(
            r"`((?:ixi_etl|model|flows|tests|benchmarks|examples|docs)/[\w./-]+\.(?:py|md))`", page.read_text()
        )
        if not (TOP / path).exists()
    ]
    assert not missing


def test_modules_and_functions_named_on_the_pages_exist() -> None:
    """Dotted names in backticks, such as `ixi_etl.core.storage.DataRoot`."""
    unknown = [
        f"{page.name}: {name}"
        for page in PAGES
        if page.name != "CHANGELOG.md"  # it also names removed modules
        for name in re.findall(r"`((?:ixi_etl|model|flows|benchmarks)(?:\.\w+)+)", page.read_text())
        if not name.endswith(".py") and not is_defined(name)
    ]
    assert not unknown


def is_defined(name: str) -> bool:
    """Whether a module has this dotted name, or defines it at its top level."""
    path = TOP / name.replace(".", "/")
    if path.is_dir() or path.with_suffix(".py").exists() or any(name in public for public in PUBLIC.values()):
        return True
    module, attribute = path.parent.with_suffix(".py"), path.name
    return module.exists() and bool(re.search(rf"^(def|class) {attribute}\b|^{attribute}\b", module.read_text(), re.M))


def test_architecture_page_lists_every_module() -> None:
    tree = (TOP / "docs/architecture.md").read_text().partition("## The tree")[2].partition("## Layers")[0]
    modules = [path for package in ("ixi_etl", "model", "flows") for path in (TOP / package).rglob("*.py")]
    listed = set(re.findall(r"\w+", tree))
    missing = [path for path in modules if not path.stem.startswith("__") and path.stem not in listed]
    assert not missing, "add a line to the tree"


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_pages_list_the_layers_from_the_top_down(page: str) -> None:
    text = " ".join((TOP / page).read_text().split())
    assert ", ".join(f"`{layer}`" for layer in LAYERS) in text
    assert ", ".join(f"`{package}`" for package in PACKAGES) in text


def test_citation_names_the_version() -> None:
    assert f"\nversion: {__version__}\n" in (TOP / "CITATION.cff").read_text()


def test_changelog_begins_with_the_version_or_with_what_is_unreleased() -> None:
    [first, *_] = re.findall(r"^## (.*)$", (TOP / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first == ("Unreleased" if ".dev" in __version__ else __version__), "see Release in CONTRIBUTING.md"


def test_readme_names_the_wheel_of_the_released_version() -> None:
    [named] = re.findall(r"ixi_etl-([\w.]+)-py3-none-any\.whl", (TOP / "README.md").read_text())
    assert named == __version__ or ".dev" in __version__


def test_website_lists_every_page_of_the_docs() -> None:
    """`make docs` checks the same, and all links; this test needs no MkDocs."""
    listed = set(re.findall(r"[\w/-]+\.md", (TOP / "mkdocs.yml").read_text()))
    pages = {path.relative_to(TOP / "docs").as_posix() for path in (TOP / "docs").rglob("*.md")}
    assert {page for page in pages if not page.startswith("decisions/0")} <= listed
    sections = {re.sub("[^a-z]+", "-", section.lower()) for section in PUBLIC}
    assert {f"api/{section}.md" for section in sections} <= listed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_belongs_to_a_list_item_is_indented_by_four_spaces(page: Path) -> None:
    """The website's parser needs that after a blank line and for nested lists; repository pages accept it."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert not re.findall(r"\n\n( {1,3}\S.*)|\n( {1,3}(?:[-*]|\d+\.) .*)", text)
    assert not re.findall(r"\n\n    .*(?:\n    .*)*\n((?:[-*]|\d+\.) .*)", text), "add an empty line before it"


def test_links_between_the_pages_lead_to_files_and_headings() -> None:
    broken = []
    for page in PAGES:
        for target, _, heading in re.findall(r"\]\(((?!https?:)[^)#]*)(#([^)]*))?\)", page.read_text()):
            file = (page.parent / target) if target else page
            if not file.exists() or (heading and heading not in anchors_of(file)):
                broken.append(f"{page.name}: {target}#{heading}")
    assert not broken


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


WITH_PYTHON = [page for page in PAGES if page.name != "README.md" and blocks(page, "python")]


def shell_lines() -> Iterator[tuple[str, list[str]]]:
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words:
                    end = next((i for i, word in enumerate(words) if word in ("&&", ";", "|")), len(words))
                    yield page.name, words[:end]
                    words = words[end + 1 :]


@pytest.mark.parametrize(("page", "words"), list(shell_lines()), ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_every_command_in_the_docs_exists_and_parses(page: str, words: list[str]) -> None:
    while words and "=" in words[0]:  # environment variables
        words = words[1:]
    if words[:1] == ["torchrun"]:
        assert "$(which" in words  # not a module name: the working folder may have a module of the same name
        words = words[words.index("ixi-etl)") :]
        words[0] = "ixi-etl"
    match words:
        case ["ixi-etl", name, *arguments]:
            COMMANDS[name].make_context(name, arguments)  # parses and checks; runs nothing
        case ["make", target, *_]:
            assert target in TARGETS
        case ["prefect", *_]:
            pass  # tests/stack runs these
        case [program, *_]:
            assert program in OTHER_PROGRAMS, f"{page}: is `{' '.join(words)}` checked by any test?"


@pytest.fixture(scope="module")
def folder(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of a reader: `ixi-data` with a version that has every split, and an exported generator."""
    from model.config import TrainConfig
    from model.export import export
    from model.jobs import prepare_run, train_run

    folder = tmp_path_factory.mktemp("reader")
    root = folder / "ixi-data"
    version = refresh(config_for(root, archives, split=(0.4, 0.3, 0.3), pictures=False))
    assert set(metadata.read_metadata(version.folder)["splits"]) == {"train", "val", "test"}
    config = TrainConfig.model_validate(SMALL_NETWORKS | {"steps": 1, "samples": 0, "checkpoint_every": 1})
    export(train_run(prepare_run(root, config, "a")), "onnx", folder / "exported")
    return folder


OPTIONAL = ("napari",)
"""Modules that the tests do not install. Where they are installed, the blocks that import them run too."""


def missing_modules(block: str) -> list[str]:
    imported = re.findall(r"^(?:import|from) (\w+)", block, re.MULTILINE)
    return [name for name in imported if name in OPTIONAL and not find_spec(name)]


@pytest.mark.stack  # half a minute for imports and the export
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_python_of_a_page_runs_from_top_to_bottom(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`test_flow` runs the Python of the README, which needs a Prefect server."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        if not missing_modules(block):
            exec(compile(block, page.name, "exec"), names)
    if page.name == "loading.md":
        check_loaded(names)


def test_napari_command_names_arrays_not_groups(published: PublishedVersion) -> None:
    """The reader treats the arrays of a group as scales of one image. The test opens no display."""
    import zarr

    [line] = [
        line for block in blocks(TOP / "docs/loading.md", "sh") for line in block.splitlines() if "napari" in line[:6]
    ]
    opened = [zarr.open(published.folder / path, mode="r") for path in line.split()[1:]]
    assert len(opened) == 2
    assert all(isinstance(array, zarr.Array) and array.ndim == 4 for array in opened)


def check_loaded(names: dict[str, Any]) -> None:
    """Check that every way of loading on the page gives the same values."""
    version, subject = names["version"], names["subject"]
    store = open_arrays(version.folder)
    used = names["used"].set_index("subject_id")
    row = int(used.loc[subject, "store_row"])
    t2, affine = np.asarray(store["t2"][row]), np.asarray(store["t2_affine"][row])
    assert set(names["test"]["split"]) == {"test"}
    assert names["why_not"].sum() == len(version.manifest)
    assert np.array_equal(names["slab"].to_numpy(), t2)
    assert set(names["training"]["split"].to_numpy()) == {"train"}
    assert np.allclose(names["mean_of_middle"], names["training"]["t2"].to_numpy()[:, 10].mean(axis=0))
    assert np.array_equal(names["in_units"], t2 * used.loc[subject, "t2_scale"] + used.loc[subject, "t2_offset"])
    check_slices(names, store, used)
    saved = nib.load("slab-T2.nii.gz")
    assert np.array_equal(np.asarray(saved.dataobj).transpose(2, 1, 0), names["in_units"])
    assert np.allclose(saved.affine, affine, atol=1e-4)
    volume = names["volume"](subject, "T2")
    assert np.array_equal(volume[0].numpy().transpose(2, 1, 0), names["in_units"])
    assert np.array_equal(volume.affine, affine)
    assert names["cropped"]["t1"].shape[:2] == names["cropped"]["t2"].shape[:2] == (2, 1)
    assert np.array_equal(names["flipped"]["t1"], names["item"]["t1"].flip(2))
    check_layers(names, store, row)
    assert np.array_equal(names["stored"], store["t1"][int(names["rows"]["store_row"].iloc[0])])
    assert np.array_equal(names["two"], store["t2"][:2, 5:8])
    scan = names["scan"](subject, "T2")
    assert np.array_equal(scan.data[0].numpy().transpose(2, 1, 0), names["in_units"])
    assert np.allclose(scan.affine, affine)
    assert names["head"].t1.data.min() >= -1


def check_slices(names: dict[str, Any], store: Any, used: Any) -> None:
    """Check the slices of PyTorch, which are normalised."""
    item, z = names["item"], names["item"]["slice"]
    row = used.loc[item["subject_id"]]
    low, high = row[["t1_p_low", "t1_p_high"]]
    expected = (np.asarray(store["t1"][int(row["store_row"]), z], np.float64) - low) / (high - low)
    assert np.allclose(item["t1"][0], expected.clip(0, 1) * 2 - 1, atol=1e-5)
    relative = names["relative"].sel(subject=item["subject_id"]).isel(z=z)
    assert np.allclose(item["t2"][0], relative * 2 - 1, atol=1e-5)
    assert names["batch"]["t1"].shape == (16, 1, *store["t1"].shape[2:])
    assert np.array_equal(np.concatenate([names["top"], names["bottom"]], 1), item["t1"])
    assert np.array_equal(names["target"], item["t2"])
    assert np.array_equal(names["source"][0], item["t1"])
    assert np.array_equal(names["target_slices"][0], item["t2"])


def check_layers(names: dict[str, Any], store: Any, row: int) -> None:
    """Check what napari is given: arrays, voxel sizes and an affine in the order of the arrays' axes."""
    affine = np.asarray(store["t1_affine"][row])
    for name, layer in zip(("t1", "t2"), names["layers"], strict=True):
        assert np.array_equal(layer["data"].compute(), np.asarray(store[name]))
        assert np.allclose(layer["scale"], (1, *nib.affines.voxel_sizes(affine)[::-1]))
        assert layer["contrast_limits"][1] > 0
    z, y, x = 3, 2, 1
    assert np.array_equal(names["placed"]["data"].compute(), np.asarray(store["t1"][row]))
    assert np.allclose((names["placed"]["affine"] @ (z, y, x, 1))[2::-1], (affine @ (x, y, z, 1))[:3])


@pytest.mark.stack
def test_javascript_of_the_loading_page_reads_a_slice(every_split: PublishedVersion, tmp_path: Path) -> None:
    """With Deno, which comes with the BIDS validator, and Zarrita.js, if the npm registry or Deno's cache has it."""
    deno = Path(sys.executable).with_name("deno")
    [script] = blocks(TOP / "docs/loading.md", "js")
    (tmp_path / "deno.json").write_text(json.dumps({"imports": {"zarrita": "npm:zarrita@0.7.5"}}))
    fetched = subprocess.run([deno, "cache", "npm:zarrita@0.7.5"], cwd=tmp_path, capture_output=True, text=True)
    if fetched.returncode:
        pytest.skip(f"Zarrita.js is not in Deno's cache, and cannot be fetched: {fetched.stderr[-200:]}")
    with serve_folder(every_split.folder) as url:
        assert script.count("http://localhost:8000") == 1
        (tmp_path / "read.js").write_text(script.replace("http://localhost:8000", url))
        command = [deno, "run", "--cached-only", "--allow-net=127.0.0.1", "read.js"]
        read = json.loads(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout)
    expected = np.asarray(open_arrays(every_split.folder)["t2"][0, 5])
    assert read["shape"] == list(expected.shape)
    assert np.array_equal(np.reshape(read["values"], expected.shape), expected)
    assert read["subject"] == open_arrays(every_split.folder)["subject"][0]
