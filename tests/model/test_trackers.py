"""A training logs the same to every tracker, continues the tracker's run when it resumes, and outlives the tracker."""

from __future__ import annotations

import csv
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TRAINED

from flows.cli import main
from ixi_etl.core import extras
from ixi_etl.core.files import read_json
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.errors import MissingExtraError, TrainingError
from model.config import TrainConfig, preset
from model.jobs import evaluate_run, prepare_run, train_run
from model.run import Run
from model.trackers import TensorBoard, require_extras

SETTINGS = TRAINED | {"samples": 3, "width": 2}


@pytest.fixture
def root(every_split: PublishedVersion, tmp_path: Path) -> Path:
    """A root with a published dataset that has every split, for one test."""
    (tmp_path / "datasets").symlink_to(every_split.folder.parents[1])
    return tmp_path


@pytest.fixture(scope="module")
def trackio_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where Trackio writes; it reads the variable when it is imported."""
    assert "trackio" not in sys.modules
    folder = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder))
        yield folder


def run_of(root: Path, log: str, **settings: Any) -> Run:
    return prepare_run(root, TrainConfig.model_validate(SETTINGS | {"log": log} | settings), "a")


def rows_of(path: Path) -> list[dict[str, float]]:
    with open(path, newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def logged_rows(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Name at a tracker -> (step, value), from both CSV files."""
    found: dict[str, list[tuple[int, float]]] = {}
    for file, prefix in (("metrics.csv", ""), ("validation.csv", "validation/")):
        for row in rows_of(folder / file):
            for name, value in row.items():
                if name != "step":
                    found.setdefault(prefix + name, []).append((int(row["step"]), value))
    return found


def repeat_the_last_steps(root: Path, log: str) -> Run:
    """Resume as after a kill between the last checkpoint and its record: steps 5 and 6 are trained twice."""
    run = run_of(root, log)
    (run.folder / "checkpoints" / "step-00000006.safetensors").unlink()
    train_run(run, resume=True)
    return run


# -- the configuration ------------------------------------------------------------------------------------------------


def test_trackers_do_not_change_the_run_id_and_may_differ_on_resume() -> None:
    named = [preset("smoke", log=log) for log in ("tensorboard", "mlflow,trackio", "none", ["trackio"])]
    assert len({config.run_id for config in named}) == 1
    assert {config.difference(named[0]) for config in named} == {""}
    assert [config.log for config in named] == [("tensorboard",), ("mlflow", "trackio"), (), ("trackio",)]
    assert preset("smoke", log="mlflow, mlflow").log == ("mlflow",)


def test_an_unknown_tracker_is_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--root", str(root), "--log", "tensorboard,wandb"])
    err = capsys.readouterr().err
    assert (ended.value.code, err.count("\n")) == (2, 1)
    assert "wandb" in err or "log" in err


@pytest.mark.parametrize("name", ["mlflow", "trackio"])
def test_a_missing_library_is_named_before_training(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Any = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda module: None if module == name else original(module))
    with pytest.raises(MissingExtraError, match=rf"\({name}\).*ixi-etl\[{name}\]"):
        run_of(root, f"tensorboard,{name}")
    assert not (root / "runs").exists()
    require_extras(["tensorboard"])


# -- TensorBoard ------------------------------------------------------------------------------------------------------


def test_tensorboard_has_the_rows_the_configuration_and_the_evaluation(finished_run: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(finished_run.folder / "tensorboard"))
    board.Reload()
    for name, rows in logged_rows(finished_run.folder).items():
        assert [e.step for e in board.Scalars(name)] == [step for step, _ in rows]
        assert [e.value for e in board.Scalars(name)] == pytest.approx([value for _, value in rows], rel=1e-6)
    row = next(
        row
        for row in read_json(finished_run.folder / "evaluation-test.json")["summary"]
        if (row["protocol"], row["mask"], row["method"]) == ("ours", "head", "generated")
    )
    [psnr] = board.Scalars("evaluation-test/ours/head/psnr")
    assert psnr.value == pytest.approx(row["psnr_mean"])
    assert set(board.Tags()["images"]) == {"gray", "colour"}
    assert {"config/text_summary", "evaluation-test/text_summary"} <= set(board.Tags()["tensors"])


# -- Trackio ----------------------------------------------------------------------------------------------------------


def test_trackio_has_everything_and_continues_its_run(root: Path, trackio_folder: Path) -> None:
    run = run_of(root, "trackio")
    train_run(run)
    evaluate_run(run)
    from trackio import Api
    from trackio.sqlite_storage import SQLiteStorage

    [stored] = Api().runs("ixi-t1-t2")
    assert read_json(run.folder / "trackers.json") == {"trackio": stored.id}
    assert (stored.name, stored.config["batch_size"], stored.config["direction"]) == ("a", "2", "t1->t2")
    assert not (run.folder / "tensorboard").exists()

    def values(name: str) -> list[tuple[int, Any]]:
        return [(v["step"], v["value"]) for v in SQLiteStorage.get_metric_values("ixi-t1-t2", "a", name)]

    for name, rows in logged_rows(run.folder).items():
        assert values(name) == rows
    assert [step for step, _ in values("gray")] == [2, 4, 6]
    picture = trackio_folder / "media" / values("gray")[-1][1]["file_path"]
    assert picture.read_bytes() == (run.folder / "samples" / "step-00000006-gray.png").read_bytes()
    [(step, table)] = values("evaluation-test")
    summary = read_json(run.folder / "evaluation-test.json")["summary"]
    assert (step, [row["method"] for row in table["_value"]]) == (
        read_json(run.folder / "evaluation-test.json")["step"],
        [row["method"] for row in summary],
    )
    blobs = [path.read_bytes() for path in (trackio_folder / "artifacts").rglob("*") if path.is_file()]
    assert run.generator.read_bytes() in blobs

    repeat_the_last_steps(root, "trackio")
    assert [each.id for each in Api().runs("ixi-t1-t2")] == [stored.id]
    assert [step for step, _ in values("loss_g")] == [2, 4, 6]
    assert [step for step, _ in values("gray")] == [2, 4, 6]
    train_run(run_of(root, "trackio", steps=8), resume=True)
    assert [step for step, _ in values("validation/psnr")] == [2, 4, 6, 8]


# -- faults -----------------------------------------------------------------------------------------------------------


class Failing(TensorBoard):
    """A tracker whose disk fails."""

    def log_scalars(self, step: int, values: Any) -> None:
        raise OSError("no space left on device")


def test_a_training_outlives_a_tracker(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from model import trackers

    monkeypatch.setattr(trackers, "TensorBoard", Failing)
    run = run_of(root, "tensorboard")
    with caplog.at_level(logging.WARNING):
        assert train_run(run).is_file()
    [warning] = [r.getMessage() for r in caplog.records if "tensorboard" in r.getMessage()]
    assert warning == "no longer logging to tensorboard (no space left on device); the CSV files have everything"
    assert [row["step"] for row in rows_of(run.folder / "metrics.csv")] == [2, 4, 6]


def test_a_tracker_that_cannot_start_ends_the_training_first(root: Path) -> None:
    run = run_of(root, "tensorboard")
    run.folder.mkdir(parents=True)
    (run.folder / "tensorboard").write_text("not a folder")
    with pytest.raises(TrainingError, match=r"cannot log to tensorboard \(.*--log"):
        train_run(run)
    assert not (run.folder / "metrics.csv").exists()
    assert not (run.folder / "checkpoints").exists()
