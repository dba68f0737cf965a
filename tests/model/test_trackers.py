"""A training logs the same to every tracker, continues the tracker's run when it resumes, and outlives the tracker."""

from __future__ import annotations

import csv
import errno
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from conftest import TRAINED
from PIL import Image

from flows.cli import main
from ixi_etl.core import extras
from ixi_etl.core.files import read_json
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.errors import IxiError, MissingExtraError, StoppedError, TrainingError
from model.config import TrackerName, TrainConfig, preset
from model.jobs import evaluate_run, prepare_run, train_run
from model.run import Run, open_run
from model.tracker import params_of
from model.trackers import TensorBoard, Trackers, require_extras

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
    assert all(f"'{name}'" in err for name in get_args(TrackerName))


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


@pytest.mark.stack  # seconds
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


@pytest.mark.stack
def test_an_evaluation_is_added_at_the_trackers_of_a_resume(root: Path, trackio_folder: Path) -> None:
    from trackio.sqlite_storage import SQLiteStorage

    run = prepare_run(root, TrainConfig.model_validate(SETTINGS | {"log": "none"}), "b")
    train_run(run)
    later = prepare_run(root, TrainConfig.model_validate(SETTINGS | {"log": "trackio", "steps": 8}), "b")
    train_run(later, resume=True)
    evaluate_run(open_run(root, "b"))
    evaluate_run(open_run(root, "b"))
    values = SQLiteStorage.get_metric_values("ixi-t1-t2", "b", "evaluation-test/ours/head/psnr")
    assert [value["step"] for value in values] == [read_json(run.folder / "evaluation-test.json")["step"]]
    (run.folder / "trackers.json").write_text(json.dumps({"trackio": "unknown"}))
    evaluate_run(open_run(root, "b"))  # a warning, and no error


# -- faults -----------------------------------------------------------------------------------------------------------


def test_a_training_outlives_a_tracker(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_tracker: TensorBoard, _step: int, _values: Any) -> None:
        raise OSError("API request to https://me:s3cret@host/api failed")

    monkeypatch.setattr(TensorBoard, "log_scalars", fail)
    run = run_of(root, "tensorboard")
    with caplog.at_level(logging.WARNING):
        assert train_run(run).is_file()
    [warning] = [r.getMessage() for r in caplog.records if "tensorboard" in r.getMessage()]
    shown = "API request to https://***@host/api failed"
    assert warning == f"no longer logging to tensorboard ({shown}); the CSV files have everything"
    assert [row["step"] for row in rows_of(run.folder / "metrics.csv")] == [2, 4, 6]


def test_an_address_of_mlflow_with_a_password_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:s3cret@127.0.0.1:9/mlflow")
    run = run_of(root, "mlflow")
    with pytest.raises(TrainingError, match="MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD") as refused:
        Trackers(run.folder, run.config, 0)
    assert "s3cret" not in str(refused.value)
    run.folder.mkdir(parents=True)
    (run.folder / "trackers.json").write_text(json.dumps({"mlflow": "0"}))
    Trackers(run.folder, run.config, None)  # of an evaluation
    [warning] = [record.getMessage() for record in caplog.records]
    assert "MLFLOW_TRACKING_PASSWORD" in warning
    assert "s3cret" not in warning


def disk_is_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "no space left on device")


def test_an_end_that_fails_is_marked_as_failed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statuses: list[str | None] = []
    monkeypatch.setattr(TensorBoard, "close", lambda _tracker, status: statuses.append(status))
    monkeypatch.setattr("model.train.save_best_generator", disk_is_full)
    with pytest.raises(IxiError, match="no space left on device"):
        train_run(run_of(root, "tensorboard"))
    assert statuses == ["failed"]


def test_a_step_is_logged_once_and_evaluations_may_be_of_any_step(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[int, str]] = []
    monkeypatch.setattr(TensorBoard, "steps_of", lambda _tracker, _name: {2, 6})
    monkeypatch.setattr(TensorBoard, "log_scalars", lambda _, step, values: logged.append((step, *values)))
    run = run_of(root, "tensorboard")
    trackers = Trackers(run.folder, run.config, 2)
    summary = [{"protocol": "ours", "mask": "head", "method": "generated", "subjects": 1, "psnr_mean": 20.0}]
    for step in (2, 4, 6, 8):
        trackers.log_scalars(step, {"loss": 0.5})
        trackers.log_evaluation(step, "test", summary)
    trackers.close("finished")
    assert logged == [(4, "test/ours/head/psnr"), (8, "loss"), (8, "test/ours/head/psnr")]


def test_a_tracker_that_cannot_start_ends_the_training_first(root: Path) -> None:
    run = run_of(root, "tensorboard")
    run.folder.mkdir(parents=True)
    (run.folder / "tensorboard").write_text("not a folder")
    with pytest.raises(TrainingError, match=r"cannot log to tensorboard \(.*--log"):
        train_run(run)
    assert not (run.folder / "metrics.csv").exists()
    assert not (run.folder / "checkpoints").exists()


# -- MLflow, and both of them as processes ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def at_mlflow(every_split: PublishedVersion, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of 6 steps with its evaluation at MLflow, in the SQLite store of its root; tests only read it."""
    root = tmp_path_factory.mktemp("at_mlflow")
    (root / "datasets").symlink_to(every_split.folder.parents[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        run = run_of(root, "tensorboard,mlflow")
        train_run(run)
        evaluate_run(run)
    return run


def client_of(run: Run) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{run.folder.parents[1]}/mlflow/mlflow.db")


def check_metrics(client: Any, run: Run, run_id: str) -> None:
    for name, rows in logged_rows(run.folder).items():
        history = client.get_metric_history(run_id, name)
        assert sorted((point.step, point.value) for point in history) == rows


@pytest.mark.stack
def test_mlflow_has_everything(at_mlflow: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client, run_id = client_of(at_mlflow), read_json(at_mlflow.folder / "trackers.json")["mlflow"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)  # `load_table` uses the default client
    stored = client.get_run(run_id)
    assert (stored.info.run_name, stored.info.status) == ("a", "FINISHED")
    assert client.get_experiment(stored.info.experiment_id).name == "ixi-t1-t2"
    assert stored.data.params == params_of(at_mlflow.config)
    check_metrics(client, at_mlflow, run_id)
    result = read_json(at_mlflow.folder / "evaluation-test.json")
    assert client.load_table(stored.info.experiment_id, "evaluation-test.json", [run_id])["method"].tolist() == [
        row["method"] for row in result["summary"]
    ]
    measured = next(r for r in result["summary"] if (r["protocol"], r["mask"]) == ("ours", "head"))
    assert stored.data.metrics["evaluation-test/ours/head/psnr"] == measured["psnr_mean"]
    model = client.download_artifacts(run_id, "model/generator.safetensors", str(tmp_path))
    assert Path(model).read_bytes() == at_mlflow.generator.read_bytes()
    images = [file.path for file in client.list_artifacts(run_id, "images") if file.path.endswith(".png")]
    assert len(images) == 2 * 3
    [sheet] = [path for path in images if path.startswith("images/gray+step+6+")]
    shown = Image.open(client.download_artifacts(run_id, sheet, str(tmp_path)))
    with Image.open(at_mlflow.folder / "samples" / "step-00000006-gray.png") as drawn:
        assert shown.tobytes() == drawn.convert("RGB").tobytes()
    assert Path(stored.info.artifact_uri.removeprefix("file://")).is_relative_to(at_mlflow.folder.parents[1])


@pytest.mark.stack
def test_mlflow_continues_its_run_and_logs_no_step_twice(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = run_of(root, "mlflow")
    train_run(run)
    run_id = read_json(run.folder / "trackers.json")["mlflow"]
    repeat_the_last_steps(root, "mlflow")
    client = client_of(run)
    assert [e.step for e in client.get_metric_history(run_id, "loss_g")] == [2, 4, 6]
    assert len([f for f in client.list_artifacts(run_id, "images") if f.path.endswith(".png")]) == 2 * 3
    for _ in range(2):
        evaluate_run(open_run(root, "a"))
    assert [e["path"] for e in json.loads(client.get_run(run_id).data.tags["mlflow.loggedArtifacts"])] == [
        "evaluation-test.json"
    ]
    assert len(client.get_metric_history(run_id, "evaluation-test/ours/head/psnr")) == 1
    train_run(run_of(root, "mlflow", steps=8), resume=True)
    check = client.get_run(run_id)
    assert (check.info.status, check.data.params["steps"]) == ("FINISHED", "6")  # parameters are those of the start
    assert [e.step for e in client.get_metric_history(run_id, "validation/psnr")] == [2, 4, 6, 8]
    assert len(client.search_runs([check.info.experiment_id])) == 1


@pytest.mark.stack
def test_a_stopped_or_failed_training_is_marked_at_mlflow(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = run_of(root, "mlflow")

    def stop(_stage: str, done: int, *_: object) -> None:
        if done == 3:
            os.kill(os.getpid(), 15)

    with pytest.raises(StoppedError):
        train_run(run, progress=stop)
    run_id = read_json(run.folder / "trackers.json")["mlflow"]
    assert client_of(run).get_run(run_id).info.status == "KILLED"
    with monkeypatch.context() as patch:
        patch.setattr("model.train.save_best_generator", disk_is_full)
        with pytest.raises(IxiError):
            train_run(run, resume=True)
    assert client_of(run).get_run(run_id).info.status == "FAILED"
    train_run(run, resume=True)
    assert client_of(run).get_run(run_id).info.status == "FINISHED"


@pytest.mark.stack
def test_an_mlflow_server_that_does_not_answer_is_one_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    settings = [f"--set={k}={v}" for k, v in SETTINGS.items()]
    with pytest.raises(SystemExit) as ended:
        main(["train", "--root", str(root), "--run-id", "a", "--log", "mlflow", *settings])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 1
    assert len(errors) == 1
    assert "cannot log to mlflow" in errors[0]
    assert not (root / "runs" / "a" / "metrics.csv").exists()


WATCH = """
import os, sys
def record(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        with open(os.environ["WATCHED"], "a") as file:
            print(event, arguments[1:] if event == "socket.connect" else arguments, file=file)
sys.addaudithook(record)
"""


@pytest.mark.stack
def test_no_tracker_opens_a_connection(root: Path, tmp_path: Path) -> None:
    """Not even with a token of the Hub, whose owner's name Trackio would ask for."""
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(WATCH)
    hidden = ("CI", "GITHUB_ACTIONS", "PYTEST_CURRENT_TEST", "MLFLOW_TRACKING_URI", "MLFLOW_DISABLE_TELEMETRY")
    environment = {k: v for k, v in os.environ.items() if k not in hidden} | {
        "PYTHONPATH": str(tmp_path / "watch"),
        "WATCHED": str(tmp_path / "watched"),
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "HF_TOKEN": "hf_of_nobody",
    }
    settings = [f"--set={k}={v}" for k, v in SETTINGS.items()]
    command = [sys.executable, "-m", "flows", "train", "--root", str(root), "--run-id", "a", "--json"]
    command += ["--log", "tensorboard,mlflow,trackio", *settings]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout)["warnings"] == []  # and no tracker printed into the result
    assert read_json(root / "runs" / "a" / "trackers.json").keys() == {"mlflow", "trackio"}
    watched = tmp_path / "watched"
    assert not watched.exists(), watched.read_text()


@pytest.mark.stack
def test_only_the_first_process_of_torchrun_logs(root: Path, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "flows"]
    settings = [f"--set={k}={v}" for k, v in (SETTINGS | {"log": "mlflow"}).items()]
    command = [*launch, "train", "--root", str(root), "--run-id", "a", *settings]
    subprocess.run(command, env=environment, capture_output=True, check=True)
    run = open_run(root, "a")
    client = client_of(run)
    [experiment] = [e for e in client.search_experiments() if e.name == "ixi-t1-t2"]
    assert len(client.search_runs([experiment.experiment_id])) == 1
    check_metrics(client, run, read_json(run.folder / "trackers.json")["mlflow"])


@contextmanager
def serve_mlflow(store: Path, folder: Path) -> Iterator[str]:
    """Run MLflow's server, whose other files are in `folder`, while the block runs; the value is its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{store}", "--workers", "1"]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen([*command, "--port", str(port)], cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + 180
        while True:
            assert server.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < end
            try:
                if httpx.get(f"{address}/health").status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.1)
        yield address
    finally:
        server.terminate()
        server.wait()


@pytest.mark.stack
def test_a_server_of_mlflow_has_the_run_and_its_address_is_not_printed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    settings = [f"--set={k}={v}" for k, v in SETTINGS.items()]
    with serve_mlflow(tmp_path / "server.db", tmp_path) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        with pytest.raises(SystemExit) as ended:
            main(["train", "--root", str(root), "--run-id", "a", "--log", "mlflow", "--json", *settings])
    output = capsys.readouterr()
    assert not ended.value.code
    assert json.loads(output.out)["warnings"] == []
    assert address not in output.out + output.err
    stored = MlflowClient(f"sqlite:///{tmp_path}/server.db").get_run(read_json(root / "runs/a/trackers.json")["mlflow"])
    assert stored.info.status == "FINISHED"


@pytest.mark.stack
def test_the_page_of_mlflow_shows_the_run(at_mlflow: Run, browser: Any, tmp_path: Path) -> None:
    with serve_mlflow(at_mlflow.folder.parents[1] / "mlflow" / "mlflow.db", tmp_path) as address:
        requested: list[str] = []
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.on("request", lambda request: requested.append(request.url))
        run_id = read_json(at_mlflow.folder / "trackers.json")["mlflow"]
        experiment = client_of(at_mlflow).get_run(run_id).info.experiment_id
        page.goto(f"{address}/#/experiments/{experiment}/runs/{run_id}")
        page.get_by_role("heading", name="a", exact=True).wait_for(timeout=120_000)
        page.get_by_text("Finished", exact=True).wait_for()
        page.get_by_text("loss_g_reconstruction", exact=True).first.wait_for()
        page.get_by_text("Model training", exact=True).first.click()
        page.goto(f"{address}/#/experiments/{experiment}/runs")
        page.get_by_role("link", name="a", exact=True).first.wait_for(timeout=120_000)
        page.goto(f"{address}/#/experiments/{experiment}/runs/{run_id}/artifacts")
        page.get_by_text("evaluation-test.json", exact=True).first.click(timeout=120_000)
        page.get_by_text("intensity mapping").first.wait_for(timeout=120_000)
        assert not [url for url in requested if not url.startswith((address, "data:", "blob:"))]
