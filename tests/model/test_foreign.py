"""ONNX models from elsewhere are scored as generators of runs are, and refused in one line if they do not fit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from onnx import TensorProto, helper

from flows.cli import main
from ixi_etl.dataset import metadata
from ixi_etl.dataset.direction import Direction
from ixi_etl.errors import CheckpointError, ConfigError
from model import foreign
from model.baselines import SOURCE
from model.export import export
from model.foreign import ORIENTATIONS, ForeignGenerator, evaluate_foreign, load_predictor
from model.jobs import evaluate_run
from model.protocols import MEASURES
from model.run import open_run

UNIT = (-1.0, 1.0)
SIDE = 64


def write_model(
    path: Path,
    shape: tuple[Any, ...] = ("batch", 1, SIDE, SIDE),
    out_shape: tuple[Any, ...] | None = None,
    operator: str = "Identity",
    kind: int = TensorProto.FLOAT,
    inputs: int = 1,
    **attributes: Any,
) -> Path:
    """A model of one operator of its first input."""
    given = [helper.make_tensor_value_info(f"x{n}", kind, shape) for n in range(inputs)]
    made = helper.make_tensor_value_info("y", kind, out_shape or shape)
    node = helper.make_node(operator, ["x0"], ["y"], **attributes)
    graph = helper.make_graph([node], "g", given, [made])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture(scope="module")
def root(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the root with the run `a`."""
    copy = tmp_path_factory.mktemp("foreign")
    shutil.copytree(trained, copy, symlinks=True, dirs_exist_ok=True)
    return copy


@pytest.fixture(scope="module")
def dataset(root: Path) -> str:
    return open_run(root, "a").config.dataset


def scores_of(path: Path, method: str) -> pd.DataFrame:
    table = pd.read_csv(path)
    columns = ["subject_id", "protocol", "mask", *MEASURES]
    return table[table["method"] == method][columns].set_index(["subject_id", "protocol", "mask"])


def test_our_own_exported_model_gets_the_scores_of_its_run(root: Path, dataset: str, tmp_path: Path) -> None:
    run = open_run(root, "a")
    name = evaluate_run(run, split="train", protocols=("ours",)).name
    model, _ = export(run.generator, "onnx", tmp_path)
    generator = ForeignGenerator(model, UNIT, UNIT)
    out, done = evaluate_foreign(root, generator, dataset, split="train", protocols=("ours",))
    ours, foreign = (scores_of(p / f"{name}.csv", "generated") for p in (run.folder, out))
    pd.testing.assert_frame_equal(ours, foreign, atol=1e-4, rtol=0)
    assert done.name == name
    record = json.loads((out / f"{name}.json").read_text())
    digest = record["weights_sha256"]
    assert re.fullmatch(f"generator-{digest[:8]}-{dataset.partition('@')[2]}-[0-9a-f]{{8}}", out.name)
    assert out.parent == root / "evaluations"
    assert (record["input_range"], record["orientation"], record["weights"]) == ([-1, 1], "AR", "generator.onnx")


def test_ranges_orientation_and_a_fixed_batch_are_translated(root: Path, dataset: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "same.onnx", (5, 1, SIDE, SIDE))  # 12 slices a subject
    generator = ForeignGenerator(model, (0, 255), (0, 255), "LP")
    out, done = evaluate_foreign(root, generator, dataset, split="train", out=tmp_path / "out", protocols=("ours",))
    source, generated = (scores_of(out / f"{done.name}.csv", name) for name in (SOURCE, "generated"))
    pd.testing.assert_frame_equal(source, generated, atol=1e-4, rtol=0)


def test_other_directions_orientations_and_ranges_have_folders_of_their_own(
    root: Path, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "same.onnx")
    monkeypatch.setattr(foreign, "measure_and_write", lambda *_: None)
    generators = [
        (ForeignGenerator(model, UNIT, UNIT), None),
        (ForeignGenerator(model, UNIT, UNIT), "t2->t1"),
        (ForeignGenerator(model, UNIT, UNIT, "PL"), None),
        (ForeignGenerator(model, (0, 1), UNIT), None),
        (ForeignGenerator(model, UNIT, (0, 1)), None),
    ]
    folders = {evaluate_foreign(root, g, dataset, direction=direction)[0] for g, direction in generators}
    assert len(folders) == len(generators)
    again, _ = evaluate_foreign(root, ForeignGenerator(model, (-1, 1), UNIT), dataset, direction="t1->t2")
    assert again in folders
    assert not any(folder.exists() for folder in folders)  # made only when there is something to write


def test_values_that_are_not_finite_end_the_evaluation_before_anything_is_written(
    root: Path, dataset: str, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "acos.onnx", operator="Acos")  # NaN above 1, so not at its first call, on black
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"acos\.onnx gives values that are not finite") as error:
        evaluate_foreign(root, ForeignGenerator(model, (0, 2), UNIT), dataset, split="train", out=out)
    assert "\n" not in str(error.value)
    assert not out.exists()


def test_the_output_range_is_its_own(tmp_path: Path) -> None:
    model = write_model(tmp_path / "abs.onnx", operator="Abs")
    predict = load_predictor(ForeignGenerator(model, (-1, 1), (0, 1)), SIDE, SIDE)
    source = torch.rand(3, 1, SIDE, SIDE) * 2 - 1
    torch.testing.assert_close(predict(source, torch.zeros(3)), source.abs() * 2 - 1)


def test_a_slice_is_turned_as_the_orientation_says() -> None:
    ours = torch.tensor([[1, 2, 3], [4, 5, 6]]).float()[None, None]  # rows to the anterior, columns to the right
    wanted = {
        "AR": [[1, 2, 3], [4, 5, 6]],
        "PL": [[6, 5, 4], [3, 2, 1]],  # upright: anterior at the top, the patient's right at the left
        "PR": [[4, 5, 6], [1, 2, 3]],
        "RA": [[1, 4], [2, 5], [3, 6]],
        "LP": [[6, 3], [5, 2], [4, 1]],
    }
    for orientation in ORIENTATIONS:
        generator = ForeignGenerator(Path("x"), UNIT, UNIT, orientation)
        turned = generator.from_ours(ours)
        assert torch.equal(generator.to_ours(turned), ours)
        if orientation in wanted:
            assert turned[0, 0].tolist() == wanted[orientation]


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ({"inputs": 2}, "has 2 inputs (x0, x1); it must have one"),
        (
            {"shape": ("batch", 3, SIDE, SIDE)},
            "is batch x 3 x 64 x 64; the slices of the version need batch x 1 x 64 x 64",
        ),
        ({"shape": (1, 1, 32, SIDE)}, "is 1 x 1 x 32 x 64; the slices of the version need batch x 1 x 64 x 64"),
        ({"shape": (SIDE, SIDE)}, "is 64 x 64; the slices of the version need batch x 1 x 64 x 64"),
        ({"kind": TensorProto.DOUBLE}, "must be float32 (it is tensor(double)); export the model in float32"),
        (
            {
                "shape": ("b", 1, "h", "w"),
                "out_shape": ("b", 1, "p", "q"),
                "operator": "MaxPool",
                "kernel_shape": [2, 2],
            },
            "makes [1, 1, 63, 63] of [1, 1, 64, 64]; it must give one channel of the same size",
        ),
        ({"operator": "Sqrt"}, "gives values that are not finite"),
        (
            {"shape": ("b", "c", "h", "w"), "out_shape": ("b", "c"), "operator": "DepthToSpace", "blocksize": 2},
            "fails on slices of 64 x 64",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_refused_in_one_line(model: dict[str, Any], problem: str, tmp_path: Path) -> None:
    generator = ForeignGenerator(write_model(tmp_path / "bad.onnx", **model), UNIT, UNIT)
    with pytest.raises(CheckpointError) as error:
        load_predictor(generator, SIDE, SIDE)
    assert problem in str(error.value)
    assert str(tmp_path / "bad.onnx") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a model")
    for name, problem in (("none.onnx", "there is no file"), ("text.onnx", "is not an ONNX model")):
        with pytest.raises(CheckpointError, match=problem) as error:
            load_predictor(ForeignGenerator(tmp_path / name, UNIT, UNIT), SIDE, SIDE)
        assert name in str(error.value)


@pytest.mark.parametrize("values", [(1, 1), (1, 0), (0, np.inf), (np.nan, 1)])
def test_an_empty_range_is_refused(values: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match=r"--input-range .*: give a lower and a higher number"):
        ForeignGenerator(Path("x"), values, UNIT)
    with pytest.raises(ConfigError, match="--output-range"):
        ForeignGenerator(Path("x"), UNIT, values)


@pytest.mark.parametrize("orientation", ["AA", "AP", "LR", "A", "SR", "ar", "ARS"])
def test_an_orientation_needs_two_axes(orientation: str) -> None:
    with pytest.raises(ConfigError, match=f"--orientation {orientation}: .* AR is ours"):
        ForeignGenerator(Path("x"), UNIT, UNIT, orientation)


def test_a_foreign_generator_takes_one_source(root: Path, dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "parse_direction", lambda *_: Direction(("t1", "pd"), "t2"))
    with pytest.raises(ConfigError, match=r"t1\+pd->t2: a foreign generator takes one source"):
        evaluate_foreign(root, ForeignGenerator(Path("x"), UNIT, UNIT), dataset, direction="t1+pd->t2")


def test_an_orientation_needs_slices_that_point_somewhere(
    root: Path, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = {"name": "ixi-t1-t2", "source": "t1", "target": "t2", "inputs": {"config": {"pairing": "index"}}}
    monkeypatch.setattr(metadata, "read_metadata", lambda _: described)
    with pytest.raises(ConfigError, match=r"--orientation PL: slices of ixi-t1-t2@.* have no known directions"):
        evaluate_foreign(root, ForeignGenerator(Path("x"), UNIT, UNIT, "PL"), dataset)


def run_command(root: Path, *words: str) -> Any:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *words, "--root", str(root)])
    return ended.value.code


def test_the_command_needs_no_run(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "same.onnx")
    words = ["--generator", str(model), "--input-range", "-1", "1", "-o", str(tmp_path / "out"), "--split", "train"]
    assert not run_command(root, *words, "--protocol", "selfrdb,ours", "--json")
    result = json.loads(capsys.readouterr().out)
    assert {row["protocol"] for row in result["evaluation"]} == {"ours", "selfrdb"}
    assert {row["definition"] for row in result["evaluation"]} == {
        "docs/protocols.md#ours",
        "docs/protocols.md#selfrdb",
    }
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "evaluation-train-ours-selfrdb.csv",
        "evaluation-train-ours-selfrdb.json",
    ]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--generator", "m.onnx"], "--generator needs --input-range LOW HIGH"),
        (["--generator", "m.onnx", "--input-range", "1", "0"], "--input-range 1 0: give a lower and a higher number"),
        (["a", "--generator", "m.onnx", "--input-range", "0", "1"], "RUN and --generator exclude each other"),
        (["--dropout", "--generator", "m.onnx", "--input-range", "0", "1"], "--dropout and --generator exclude"),
        (["a", "--input-range", "0", "1"], "--input-range is for --generator FILE"),
        (["a", "--orientation", "PL"], "--orientation is for --generator FILE"),
        (["a", "--protocol", "syndif"], "there is no protocol syndif; did you mean syndiff?"),
        (["--generator", "none.onnx", "--input-range", "0", "1"], "there is no file none.onnx"),
    ],
)
def test_wrong_options_are_one_line(
    words: list[str], problem: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(root, *words)
    errors = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(errors) == 1
    assert problem in errors[0]
