"""A training resumes exactly, stops on a signal, and reports errors in one line."""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import stages
import torch
from conftest import TRAINED
from processes import TIMEOUT_S, Job

from flows.cli import main
from ixi_etl.core.files import read_json, to_json
from ixi_etl.dataset import metadata
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.errors import CheckpointError, ConfigError, DatasetError, IxiError, StoppedError, TrainingError
from model import checkpoint, data
from model.config import TrainConfig
from model.generator import build_generator, load_generator
from model.jobs import prepare_run, train_run
from model.run import Run, open_run
from model.trainer import Trainer


@pytest.fixture
def root(published: PublishedVersion, tmp_path: Path) -> Path:
    """A root with the published dataset, for one test."""
    (tmp_path / "datasets").symlink_to(published.folder.parents[1])
    return tmp_path


@pytest.fixture
def finished(root: Path, trained: Path) -> Path:
    """A root with a run `a`, trained to step 6, as `train_run(run_of(root, "a"))` leaves it."""
    shutil.copytree(trained / "runs", root / "runs")
    return root


def run_of(root: Path, name: str, **settings: Any) -> Any:
    return prepare_run(root, TrainConfig.model_validate(TRAINED | settings), name)


def arguments(root: Path, run: str, *more: str, **settings: Any) -> list[str]:
    chosen = [f"--set={k}={v}" for k, v in (TRAINED | settings).items()]
    return ["train", "--root", str(root), "--run-id", run, *chosen, *more]


def command(root: Path, *options: str, **settings: Any) -> Job:
    """`ixi-etl train` in a process forked after the import of torch; it prints to the file `output`."""
    return Job(stages.do_command, arguments(root, *options, **settings), str(root / "output"))


def torchrun_command(root: Path, **settings: Any) -> list[str]:
    """The command line of a training `two` in two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "flows"]
    return launch + arguments(root, "two", **settings)


def wait_for(condition: Any, has_ended: Any) -> None:
    """Wait until the condition is true, while the process runs."""
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert not has_ended(), "the process ended first"
        assert time.monotonic() < end
        time.sleep(0.002)


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# -- resuming ---------------------------------------------------------------------------------------------------------


# Uses all state: two optimisers, dropout's random numbers, moving average, order, crops and flips, learning rate.
FULL = {"steps": 12, "checkpoint_every": 3, "keep": 20, "ema": 0.9, "decay": 0.75, "augment": "jitter"}


def assert_same(got: Path, wanted: Path) -> None:
    """Assert that two checkpoints hold equal tensors, including those of the optimisers."""
    (ours, _), (theirs, _) = checkpoint.load(got), checkpoint.load(wanted)
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("discriminator_optimizer") for name in ours)
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), f"{name} differs"


def test_resuming_from_a_checkpoint_older_than_the_logs_is_bit_exact(root: Path) -> None:
    """A kill between two checkpoints leaves such logs."""
    train_run(run_of(root, "uninterrupted", **FULL))
    uninterrupted, killed = root / "runs" / "uninterrupted", root / "runs" / "killed"
    shutil.copytree(uninterrupted, killed)
    for path in (c.path for c in checkpoint.list_checkpoints(killed / "checkpoints") if c.step > 6):
        path.unlink()
    train_run(run_of(root, "killed", **FULL), resume=True)
    for step in (9, FULL["steps"]):
        assert_same(*(checkpoint.checkpoint_path(run / "checkpoints", step) for run in (killed, uninterrupted)))
    rows = read_rows(killed / "metrics.csv")
    assert [int(r["step"]) for r in rows] == list(range(2, FULL["steps"] + 1, 2))


@pytest.mark.faults
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resuming_after_a_kill_is_bit_exact(root: Path, fork_server: None, precision: str) -> None:
    train_run(run_of(root, "uninterrupted", precision=precision, **FULL))
    expected = root / "runs" / "uninterrupted" / "checkpoints"
    folder, settings = root / "runs" / "killed" / "checkpoints", TRAINED | FULL | {"precision": precision}
    pattern = f"checkpoints/{checkpoint.checkpoint_path(folder, 6).name}"
    assert Job(stages.do_training_killed, str(root), settings, "killed", pattern).exit_code() == -signal.SIGKILL
    assert checkpoint.list_checkpoints(folder)[-1].step == 6
    again = command(root, "killed", "--resume", precision=precision, **FULL)
    assert again.exit_code() == 0, (root / "output").read_text()
    for step in (6, 9, FULL["steps"]):
        assert_same(checkpoint.checkpoint_path(folder, step), checkpoint.checkpoint_path(expected, step))
    rows = read_rows(root / "runs" / "killed" / "metrics.csv")
    assert [int(r["step"]) for r in rows] == list(range(2, FULL["steps"] + 1, 2))


def test_a_training_that_fails_to_start_leaves_no_configuration(published: PublishedVersion, tmp_path: Path) -> None:
    shutil.copytree(published.folder.parents[1], tmp_path / "datasets")
    (manifest,) = tmp_path.glob("datasets/*/*/manifest.csv")
    original = manifest.read_text()
    manifest.write_text(original.replace("used", "lost"))
    with pytest.raises(DatasetError):
        train_run(run_of(tmp_path, "a", seed=1))
    manifest.write_text(original)
    train_run(run_of(tmp_path, "a", seed=2))
    assert json.loads((tmp_path / "runs/a/config.json").read_text())["config"]["seed"] == 2


def test_a_signal_saves_and_stops_the_training(root: Path) -> None:
    metrics = root / "runs" / "stopped" / "metrics.csv"
    ended = threading.Event()

    def interrupt() -> None:  # once the loop runs and catches signals
        wait_for(metrics.exists, ended.is_set)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=interrupt)
    sender.start()
    try:
        with pytest.raises(StoppedError, match="stopped at step") as stopped:
            train_run(run_of(root, "stopped", steps=100_000, checkpoint_every=90_000))
    finally:
        ended.set()
        sender.join()
    (saved,) = checkpoint.list_checkpoints(metrics.parent / "checkpoints")
    assert f"stopped at step {saved.step} of 100000 and saved" in str(stopped.value)
    assert stopped.value.number == signal.SIGTERM


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])  # SIGINT: test_flow
def test_a_signal_to_the_command_saves_and_ends_in_one_line(
    root: Path, fork_server: None, number: signal.Signals
) -> None:
    job = command(root, "stopped", steps=100_000, checkpoint_every=90_000, samples=0)
    wait_for((root / "runs" / "stopped" / "metrics.csv").exists, lambda: not job.process.is_alive())
    os.kill(job.process.pid or 0, number)
    assert job.exit_code() == 128 + number
    output = (root / "output").read_text()
    assert "Traceback" not in output
    (saved,) = checkpoint.list_checkpoints(root / "runs" / "stopped" / "checkpoints")
    assert f"stopped at step {saved.step} of 100000 and saved" in output
    assert "continue with --resume" in output.splitlines()[-1]


def test_resuming_skips_a_damaged_checkpoint(finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    newest = checkpoint.checkpoint_path(finished / "runs" / "a" / "checkpoints", 6)
    before = checkpoint.checkpoint_path(newest.parent, 4)
    newest.write_bytes(newest.read_bytes()[:1000])
    with caplog.at_level(logging.INFO, "model"):
        train_run(run_of(finished, "a"), resume=True)
    assert str(newest) in caplog.text
    assert f"resuming from {before}" in caplog.text
    assert checkpoint.list_checkpoints(newest.parent)[-1].step == 6


def test_a_training_writes_its_configuration_if_all_checkpoints_are_damaged(finished: Path) -> None:
    """`prune` reads it to find the version in use."""
    for path in (finished / "runs" / "a" / "checkpoints").iterdir():
        content = bytearray(path.read_bytes())
        content[-1] ^= 1  # the header stays valid
        path.write_bytes(content)
    train_run(run_of(finished, "a", seed=2), resume=True)
    assert json.loads((finished / "runs" / "a" / "config.json").read_text())["config"]["seed"] == 2


def test_a_training_resumes_when_a_full_disk_emptied_its_logs(finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = run_of(finished, "a", steps=8)
    for name in ("metrics.csv", "validation.csv"):
        (run.folder / name).write_bytes(b"")
    train_run(run, resume=True)
    for name in ("metrics.csv", "validation.csv"):
        assert f"{run.folder / name} is damaged and is replaced by a new file" in caplog.text
    assert [row["step"] for row in read_rows(run.folder / "metrics.csv")] == ["8"]


# -- files of a run ---------------------------------------------------------------------------------------------------


def test_a_run_writes_the_documented_files(finished_run: Run) -> None:
    run = finished_run
    files = {str(p.relative_to(run.folder)) for p in run.folder.rglob("*")}
    assert {"config.json", "metrics.csv", "generator.safetensors", "samples", "tensorboard"} <= files
    assert [c.step for c in checkpoint.list_checkpoints(run.folder / "checkpoints")][-2:] == [4, 6]
    for step in (2, 4, 6):
        assert {f"samples/step-{step:08d}-gray.png", f"samples/step-{step:08d}-colour.png"} <= files
    assert any(path.startswith("samples/step-00000006/") and path.endswith("-generated.png") for path in files)
    assert any("tfevents" in path for path in files)
    row = read_rows(run.folder / "metrics.csv")[-1]
    assert {"step", "loss_d", "loss_g", "loss_g_reconstruction", "ms_per_step", "images_per_s"} <= row.keys()
    assert str(run.folder.parents[1]) not in (run.folder / "config.json").read_text()


def test_the_run_id_depends_on_what_affects_the_weights(root: Path) -> None:
    def name(**settings: Any) -> str:
        return str(prepare_run(root, TrainConfig.model_validate(TRAINED | settings)).folder.name)

    assert name() == name() == name(log_every=7) == name(keep=9)
    assert len({name(), name(seed=1), name(lr=1e-3), name(steps=8), name(direction="t2->t1")}) == 5
    assert name() == name(dataset="@latest") == name(direction="t1->t2")


def test_the_best_generator_is_kept_and_found_again(trained: Path) -> None:
    run = run_of(trained, "a")
    assert run.config.ema  # the average is kept
    best = checkpoint.best_checkpoint(run.folder / "checkpoints")
    assert best is not None
    kept, config, step = load_generator(run.generator)
    again, _, _ = load_generator(best.path)
    assert step == best.step
    assert config == run.config
    for a, b in zip(kept.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert open_run(trained, "a").generator == open_run(trained, "latest").generator == run.generator


def test_a_finished_run_is_not_trained_again(finished: Path) -> None:
    run = run_of(finished, "a")
    before = {p: p.stat().st_mtime_ns for p in (run.folder / "checkpoints").iterdir()}
    train_run(run, resume=True)
    assert {p: p.stat().st_mtime_ns for p in (run.folder / "checkpoints").iterdir()} == before


def test_a_version_that_names_a_missing_array_is_refused(published: PublishedVersion, tmp_path: Path) -> None:
    shutil.copytree(published.folder.parents[1], tmp_path / "datasets")
    path = tmp_path / "datasets/ixi-t1-t2" / published.version / "dataset.json"
    path.write_text(to_json(metadata.with_digest(read_json(path) | {"source": "zzz"})))
    with pytest.raises(DatasetError, match=r"dataset\.json is damaged: it names an array zzz"):
        run_of(tmp_path, "a")


@pytest.mark.parametrize("percentiles", [(3.0, 3.0), (7.0, 3.0), (float("nan"), 3.0), (1.0, float("inf"))])
def test_a_subject_with_invalid_percentiles_is_named(
    percentiles: tuple[float, float], published: PublishedVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refresh excludes such a subject; versions written by other code may have one."""
    version_metadata, table = data.verify.read_verified(published.folder)
    first = table.index[table["split"] == "train"][0]
    table.loc[first, ["t2_p_low", "t2_p_high"]] = percentiles
    monkeypatch.setattr("model.data.verify.read_verified", lambda _folder: (version_metadata, table))
    message = f"cannot normalise the t2 of {table.loc[first, 'subject_id']}, whose range is"
    with pytest.raises(DatasetError, match=message) as error:
        data.load_pairs(published.folder, "train")
    assert "\n" not in str(error.value)


# -- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.stack  # takes half a minute on two cores
def test_two_processes_equal_one_process_with_twice_the_batch(root: Path, published: PublishedVersion) -> None:
    plain = {"dropout": 0.0, "steps": 8, "checkpoint_every": 8, "samples": 0, "augment": "flip", "lr": 1e-3}
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(torchrun_command(root, **plain, batch_size=1), check=True, capture_output=True, env=env)
    train_run(run_of(root, "one", **plain, batch_size=2))
    one, two = (load_generator(root / "runs" / name / "generator.safetensors")[0] for name in ("one", "two"))
    (saved,) = checkpoint.list_checkpoints(root / "runs" / "two" / "checkpoints")
    assert {"random.cpu.0", "random.cpu.1"} <= checkpoint.load(saved.path)[0].keys()
    source = data.load_pairs(published.folder, "train").normalised(torch.arange(4))[0]
    initial = build_generator(run_of(root, "one", **plain).config).eval()
    with torch.no_grad():  # biases before norms may differ; the output may not
        a, b, untrained = (generator.forward_padded(source) for generator in (one, two, initial))
    assert float((a - b).abs().max()) < 0.02 * float((a - untrained).abs().max())


@pytest.mark.stack  # takes a quarter of a minute on two cores
def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(root: Path) -> None:
    two = torchrun_command(root, steps=100_000, checkpoint_every=90_000, batch_size=1)
    process = subprocess.Popen(two, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    wait_for((root / "runs" / "two" / "metrics.csv").exists, process.poll)
    second = next(p for p in psutil.Process(process.pid).children() if p.environ().get("RANK") == "1")
    second.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=TIMEOUT_S)
    (saved,) = checkpoint.list_checkpoints(root / "runs" / "two" / "checkpoints")
    assert f"stopped at step {saved.step} of 100000 and saved" in stderr.decode()
    assert b'Traceback (most recent call last):\n  File "/tmp' not in stderr


def test_resuming_with_another_number_of_processes_is_refused(finished: Path) -> None:
    """Each step would use other pairs."""
    *_, saved = checkpoint.list_checkpoints(finished / "runs/a/checkpoints")
    assert saved.processes == 1
    tensors, recorded_metadata = checkpoint.load(saved.path)
    for recorded in ({"processes": 2}, {"processes": None}):  # None: as in older checkpoints
        tensors["random.cpu.1"] = tensors["random.cpu.0"].clone()
        checkpoint.save(saved.path, tensors, recorded_metadata | recorded)
        with pytest.raises(CheckpointError, match=r"another configuration \(2 processes, not 1 \(torchrun"):
            train_run(run_of(finished, "a", steps=7), resume=True)
    checkpoint.save(saved.path, tensors, recorded_metadata | {"processes": 1})
    train_run(run_of(finished, "a", steps=7), resume=True)


# -- errors -----------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_names_the_last_good_checkpoint(root: Path) -> None:
    with pytest.raises(TrainingError, match="not finite at step 2; there is no checkpoint yet; try a lower lr"):
        train_run(run_of(root, "b", lr=1e38))


def test_weights_that_are_not_finite_are_never_saved(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses are computed before the weights change, so they are finite when a step ruins the weights."""
    original_step, steps = Trainer.step, iter((1, 2))

    def step_that_ruins_the_weights(self: Trainer, *batch: Any) -> Any:
        losses = original_step(self, *batch)
        if next(steps) == 2:
            next(self.generator.parameters()).data[0] = float("nan")
        return losses

    monkeypatch.setattr(Trainer, "step", step_that_ruins_the_weights)
    message = r"the weights are not finite at step 2; the last good checkpoint is .*step-00000001"
    with pytest.raises(TrainingError, match=message):
        train_run(run_of(root, "a", checkpoint_every=1))
    (saved,) = checkpoint.list_checkpoints(root / "runs" / "a" / "checkpoints")
    assert saved.step == 1


@pytest.mark.parametrize("name", ["exp/one", "..", ".", ".a", "/tmp/a", "../../x", "", "latest", "a\n"])
def test_a_run_id_cannot_name_a_folder_outside_the_runs(name: str, root: Path) -> None:
    with pytest.raises(ConfigError, match="is not a valid name; use letters, digits") as error:
        run_of(root, name)
    assert "\n" not in str(error.value)


def test_a_run_is_not_overwritten(finished: Path) -> None:
    with pytest.raises(CheckpointError, match="has trained to step 6; continue with --resume, or start a new run"):
        train_run(run_of(finished, "a"))


def test_resuming_with_another_configuration_is_refused_with_the_difference(finished: Path) -> None:
    with pytest.raises(CheckpointError, match=r"another configuration \(width 4, not 8\)"):
        train_run(run_of(finished, "a", width=8), resume=True)
    with pytest.raises(CheckpointError, match="has another configuration"):
        train_run(run_of(finished, "a", lr=1e20), resume=True)
    train_run(run_of(finished, "a", steps=8, log_every=1), resume=True)  # without decay, more steps are allowed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "ixi-t1-t2@ffff"}, "there is no version ffff in"),
        ({"dataset": "mnist@latest"}, "there is no dataset mnist"),
        ({"side": 256}, "crops of 256 x 256 do not fit slices of 64 x 64; set a smaller side"),
        (
            {"direction": "t1->t1"},
            "direction 't1->t1' names t1 twice; the arrays of ixi-t1-t2 are t1, t2: use for example t1->t2",
        ),
        ({"device": "cuda:7"}, "device cuda:7 is not available"),
        ({"device": "meta"}, "device meta is not available"),
    ],
)
def test_a_configuration_that_does_not_fit_is_a_one_line_error_and_writes_nothing(
    root: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(IxiError, match=message) as error:
        run_of(root, "a", **settings)
    assert "\n" not in str(error.value)
    assert not (root / "runs").exists()


def test_a_damaged_shard_is_refused_by_name(published: PublishedVersion, tmp_path: Path) -> None:
    shutil.copytree(published.folder.parents[2], tmp_path / "root")
    for shard in (tmp_path / "root").rglob("t1/c/*/0/0/0"):
        content = bytearray(shard.read_bytes())
        content[len(content) // 3] ^= 1
        shard.write_bytes(content)
    run = run_of(tmp_path / "root", "a")
    with pytest.raises(DatasetError, match=r"t1/c/\d/0/0/0 is damaged: its SHA-256"):
        train_run(run)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--dataset", "ixi-t1-t2@ffff"], "error: there is no version ffff in"),
        (
            ["train", "--set", "wormhole=1"],
            "error: there is no field wormhole; the fields are dataset, direction, neighbours,",
        ),
        (["train", "--set", "learning_rate=1"], "error: there is no field learning_rate; did you mean lr?"),
        (["train", "--set", "steps"], "error: --set steps: give NAME=VALUE, for example --set steps=1000"),
        (["train", "--set", "steps=-1"], "error: steps: Input should be greater than or equal to 1"),
        (["train", "--set", f"steps={10**20}"], "error: steps: Input should be less than"),
        (["train", "--set", f"seed={10**23}"], "error: seed: Input should be less than"),
        (["train", "--set", "width=400000"], "error: width: Input should be less than"),
        (["train", "--set", "lr=Infinity"], "error: lr: Input should be a finite number"),
        (["train", "--set", "lambda_l1=Infinity"], "error: lambda_l1: Input should be a finite number"),
        (["train", "--preset", "smoke"], "error: crops of 128 x 128 do not fit slices of 64 x 64; set a smaller side"),
        (["evaluate", "zz"], "error: there is no run zz in"),
        (["evaluate", "a", "--split", "val"], "has no subject in split val"),
        (["evaluate", "a", "--split", "train", "--weights", "nothing"], "error: nothing does not exist"),
    ],
)
def test_errors_of_the_command_line_are_one_line(
    trained: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--root", str(trained)])
    assert end.value.code in (1, 2, 6)
    printed = capsys.readouterr().err.strip().splitlines()
    assert message in printed[-1]
    assert not [other for other in printed[:-1] if "rror" in other]


def test_without_validation_the_last_checkpoint_is_best_and_samples_show_training_data(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(root, "b", steps=2, samples=1)
    train_run(run)
    assert "has no subject in split val" in caplog.text
    best = checkpoint.best_checkpoint(run.folder / "checkpoints")
    assert best is not None
    assert (best.step, best.validation) == (2, {})
    assert list((run.folder / "samples").glob("*.png"))
    page = (run.folder / "report.html").read_text()
    assert "Middle slices of training subjects" in page
    assert "the generator was trained on these subjects" in page
    assert "validation subjects" not in page
