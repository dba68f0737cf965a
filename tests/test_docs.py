"""What the README and the pages in `docs/` say is so: tables agree with the code, commands parse, and Python runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import typer
from conftest import SMALL_NETWORKS, config_for

from flows.cli import app
from ixi_etl import dataset
from ixi_etl.publish import Refreshed
from ixi_etl.refresh import refresh
from ixi_etl.schema import IXI, REASONS
from ixi_etl.store import open_arrays

TOP = Path(__file__).parent.parent
PAGES = [TOP / "README.md", TOP / "CHANGELOG.md", *sorted((TOP / "docs").rglob("*.md"))]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
TARGETS = re.findall(r"^([a-z-]+):", (TOP / "Makefile").read_text(), re.MULTILINE)
NOT_OURS = {"python3", "pip", ".venv/bin/pip", "tensorboard", "napari"}
NOT_OURS |= {"docker", "cp", "export", "cd", "aws", "curl", "git", "ssh", "gzip"}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def rows(page: str, head: str) -> list[list[str]]:
    """The cells of the table under the line `head` of a page in `docs/`."""
    table = (TOP / "docs" / page).read_text().partition(f"\n{head}\n")[2].partition("\n\n")[0]
    assert table, f"docs/{page} has no table {head}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[1:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_page_of_the_format_has_the_columns_of_the_manifest() -> None:
    kinds = {"text": "str", "JSON": "str", "integer": "Int64", "number": "Float64", "`": "str"}
    told = {}
    for cell, kind, _ in rows("dataset.md", "| column | type | what it holds |"):
        told |= dict.fromkeys(names(cell), next(kinds[k] for k in kinds if kind.startswith(k)))
    assert told == dict(IXI.dtypes)
    for modality in ("t1_", "t2_", ""):  # both modalities share a row; otherwise the order is that of the file
        of = [[c for c in columns if c.startswith(modality)] for columns in (told, IXI.columns)]
        assert of[0] == of[1] or not modality


def test_the_page_of_the_format_has_the_reasons_in_their_order() -> None:
    told = [name for cell, _ in rows("dataset.md", "| reason | what it means |") for name in names(cell)]
    assert told == list(REASONS)


def test_the_page_of_the_format_has_the_files_and_the_arrays(published: Refreshed) -> None:
    files = [name for cell, _ in rows("dataset.md", "| file | what it is |") for name in names(cell)]
    there = {p.name for p in published.folder.iterdir()}
    assert there <= {name.partition("/")[0] for name in files}
    arrays = open_arrays(published.folder)
    for cell, dimensions, dtype, _ in rows("dataset.md", "| array | dimensions | dtype | what it holds |"):
        for name in names(cell):
            array = arrays[name]
            assert (", ".join(array.metadata.dimension_names), str(array.dtype)) == (dimensions, dtype)


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
def test_every_command_in_the_docs_is_one_that_there_is(page: str, words: list[str]) -> None:
    while words and "=" in words[0]:  # variables that are set for it
        words = words[1:]
    if words[:1] == ["torchrun"]:
        assert "$(which" in words  # no module's name, which a folder of the user's may have too
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
            assert program in NOT_OURS, f"{page}: is `{' '.join(words)}` checked by any test?"


@pytest.fixture(scope="module")
def folder(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader would be: `ixi-data` with a version that has every split, and an exported generator."""
    from model.config import TrainConfig
    from model.export import export
    from model.run import prepare, train_run

    here = tmp_path_factory.mktemp("reader")
    root = here / "ixi-data"
    version = refresh(config_for(root, archives, split=(0.4, 0.3, 0.3), pictures=False))
    assert set(dataset.read_facts(version.folder)["splits"]) == {"train", "val", "test"}
    config = TrainConfig.model_validate(SMALL_NETWORKS | {"steps": 1, "samples": 0, "checkpoint_every": 1})
    export(train_run(prepare(root, config, "a")), "onnx", here / "exported")
    return here


@pytest.mark.stack  # half a minute with what it imports and exports
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_the_python_of_a_page_runs_from_top_to_bottom(
    page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the README is run by `test_flow`, where there is a Prefect server."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)
    if page.name == "loading.md":
        check_loaded(names)


def test_the_napari_line_names_arrays_that_its_reader_takes(published: Refreshed) -> None:
    """Of a group that reader takes all arrays for the scales of one image. There is no display to open any."""
    import zarr

    [line] = [
        line for block in blocks(TOP / "docs/loading.md", "sh") for line in block.splitlines() if "napari" in line[:6]
    ]
    opened = [zarr.open(published.folder / path, mode="r") for path in line.split()[1:]]
    assert len(opened) == 2
    assert all(isinstance(array, zarr.Array) and array.ndim == 4 for array in opened)


def check_loaded(names: dict[str, Any]) -> None:
    """That the ways of loading agree with each other."""
    store = open_arrays(names["version"])
    row = int(names["used"]["store_row"].iloc[0])
    assert np.array_equal(names["one"].to_numpy(), store["t2"][row])
    assert float(names["normalised"][row].max()) == pytest.approx(1)
    volume = nib.load("slab-T1.nii.gz")
    assert np.array_equal(np.asarray(volume.dataobj).transpose(2, 1, 0), store["t1"][3])
    assert np.allclose(volume.affine, store["t1_affine"][3], atol=1e-4)
    t1, t2 = names["t1"], names["t2"]
    assert t1.shape == t2.shape == (16, 1, *store["t1"].shape[2:])
    assert 0 <= float(t1.min()) < float(t1.max()) <= 1
    index = int(names["pairs"].subject[7]), int(names["pairs"].position[7])
    row = int(names["used"].set_index("subject_id").loc[names["pairs"].subjects[index[0]], "store_row"])
    low, high = names["used"].set_index("store_row").loc[row, ["t1_p_low", "t1_p_high"]]
    by_hand = (np.asarray(store["t1"][row, index[1]], np.float64) - low) / (high - low)
    assert np.allclose(names["source"][1, 0], by_hand.clip(0, 1) * 2 - 1, atol=1e-5)
    assert names["batch"]["t1"].shape[:2] == names["batch"]["t2"].shape[:2] == (2, 1)
