"""Training: it goes on exactly where a kill left it, stops when it is told to, and says what is wrong in one line."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
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

torch = pytest.importorskip("torch", reason="torch is not installed; pip install -c constraints.txt -e '.[train]'")

import stages  # noqa: E402
from conftest import TRAINED  # noqa: E402
from processes import GIVE_UP_S, Job, preload  # noqa: E402

from flows.cli import main  # noqa: E402
from ixi_etl import dataset  # noqa: E402
from ixi_etl.errors import DatasetError, IxiError, StoppedError  # noqa: E402
from ixi_etl.files import read_json, to_json  # noqa: E402
from ixi_etl.publish import Refreshed  # noqa: E402
from model import checkpoint, data  # noqa: E402
from model.checkpoint import CheckpointError  # noqa: E402
from model.config import PRESETS, TrainConfig, preset  # noqa: E402
from model.evaluate import load_generator  # noqa: E402
from model.learner import LOSSES, Learner, build_generator  # noqa: E402
from model.logbook import Logbook  # noqa: E402
from model.run import Run, open_run, prepare, train_run  # noqa: E402
from model.train import TrainingError, torchrun_place  # noqa: E402


@pytest.fixture(scope="module")
def jobs() -> None:
    preload()


@pytest.fixture
def root(published: Refreshed, tmp_path: Path) -> Path:
    """A root of its own with the published dataset in it."""
    (tmp_path / "datasets").symlink_to(published.folder.parents[1])
    return tmp_path


@pytest.fixture
def ended(root: Path, trained: Path) -> Path:
    """A root with a run `a`, trained to step 6, as `train_run(run_of(root, "a"))` leaves it."""
    shutil.copytree(trained / "runs", root / "runs")
    return root


def run_of(root: Path, name: str, **settings: Any) -> Any:
    return prepare(root, TrainConfig.model_validate(TRAINED | settings), name)


def arguments(root: Path, run: str, *more: str, **settings: Any) -> list[str]:
    chosen = [f"--set={k}={v}" for k, v in (TRAINED | settings).items()]
    return ["train", "--root", str(root), "--run-id", run, *chosen, *more]


def command(root: Path, *given: str, **settings: Any) -> Job:
    """`ixi-etl train`, in a process that need not import torch; what it prints is in the file `said`."""
    return Job(stages.do_command, arguments(root, *given, **settings), str(root / "said"))


def launched(root: Path, **settings: Any) -> list[str]:
    """The same in two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "flows"]
    return launch + arguments(root, "two", **settings)


def wait_for(condition: Any, has_ended: Any) -> None:
    """Until it is so; the process must still be at work then."""
    end = time.monotonic() + GIVE_UP_S
    while not condition():
        assert not has_ended(), "it ended before it was there"
        assert time.monotonic() < end
        time.sleep(0.002)


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# -- going on ---------------------------------------------------------------------------------------------------------


# All that has a state: two optimisers, dropout's random numbers, the moving average, the order, crops and flips, lr.
FULL = {"steps": 12, "checkpoint_every": 3, "keep": 20, "ema": 0.9, "decay": 0.75, "augment": "jitter"}


def assert_same(got: Path, wanted: Path) -> None:
    """Two checkpoints hold the same values, the optimisers' among them."""
    (ours, _), (theirs, _) = checkpoint.load(got), checkpoint.load(wanted)
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("discriminator_optimizer") for name in ours)
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), f"{name} differs"


def test_a_training_goes_on_bit_for_bit_from_a_checkpoint_older_than_its_logs(root: Path) -> None:
    """As a kill between two checkpoints leaves them."""
    train_run(run_of(root, "whole", **FULL))
    whole, killed = root / "runs" / "whole", root / "runs" / "killed"
    shutil.copytree(whole, killed)
    for path in (c.path for c in checkpoint.found(killed / "checkpoints") if c.step > 6):
        path.unlink()
    train_run(run_of(root, "killed", **FULL), resume=True)
    for step in (9, FULL["steps"]):
        assert_same(*(checkpoint.path_of(run / "checkpoints", step) for run in (killed, whole)))
    rows = read_rows(killed / "metrics.csv")
    assert [int(r["step"]) for r in rows] == list(range(2, FULL["steps"] + 1, 2))


@pytest.mark.faults
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_killed_between_checkpoints_goes_on_bit_for_bit(root: Path, jobs: None, precision: str) -> None:
    train_run(run_of(root, "whole", precision=precision, **FULL))
    folder, settings = root / "runs" / "killed" / "checkpoints", TRAINED | FULL | {"precision": precision}
    pattern = f"checkpoints/{checkpoint.path_of(folder, 6).name}"
    assert Job(stages.do_training_killed, str(root), settings, "killed", pattern).exit_code() == -signal.SIGKILL
    assert checkpoint.found(folder)[-1].step == 6
    again = command(root, "killed", "--resume", precision=precision, **FULL)
    assert again.exit_code() == 0, (root / "said").read_text()
    for step in (6, 9, FULL["steps"]):
        assert_same(checkpoint.path_of(folder, step), checkpoint.path_of(root / "runs/whole/checkpoints", step))
    rows = read_rows(root / "runs" / "killed" / "metrics.csv")
    assert [int(r["step"]) for r in rows] == list(range(2, FULL["steps"] + 1, 2))


def test_the_configuration_kept_is_of_the_training_and_not_of_one_that_never_began(
    published: Refreshed, tmp_path: Path
) -> None:
    shutil.copytree(published.folder.parents[1], tmp_path / "datasets")
    (manifest,) = tmp_path.glob("datasets/*/*/manifest.csv")
    whole = manifest.read_text()
    manifest.write_text(whole.replace("used", "lost"))
    with pytest.raises(DatasetError):
        train_run(run_of(tmp_path, "a", seed=1))
    manifest.write_text(whole)
    train_run(run_of(tmp_path, "a", seed=2))
    assert json.loads((tmp_path / "runs/a/config.json").read_text())["config"]["seed"] == 2


def test_a_signal_has_it_save_and_stop(root: Path) -> None:
    metrics = root / "runs" / "stopped" / "metrics.csv"
    ended = threading.Event()

    def interrupt() -> None:  # once it is at work, when it catches signals
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
    (saved,) = checkpoint.found(metrics.parent / "checkpoints")
    assert f"stopped at step {saved.step} of 100000 and saved" in str(stopped.value)
    assert stopped.value.number == signal.SIGTERM


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])  # SIGINT: test_flow
def test_told_to_stop_it_saves_and_says_so(root: Path, jobs: None, number: signal.Signals) -> None:
    job = command(root, "stopped", steps=100_000, checkpoint_every=90_000, samples=0)
    wait_for((root / "runs" / "stopped" / "metrics.csv").exists, lambda: not job.process.is_alive())
    os.kill(job.process.pid or 0, number)
    assert job.exit_code() == 128 + number
    said = (root / "said").read_text()
    assert "Traceback" not in said
    (saved,) = checkpoint.found(root / "runs" / "stopped" / "checkpoints")
    assert f"stopped at step {saved.step} of 100000 and saved" in said
    assert "--resume goes on" in said.splitlines()[-1]


def test_a_damaged_checkpoint_is_passed_over_for_the_newest_whole_one(
    ended: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest = checkpoint.path_of(ended / "runs" / "a" / "checkpoints", 6)
    before = checkpoint.path_of(newest.parent, 4)
    newest.write_bytes(newest.read_bytes()[:1000])
    with caplog.at_level(logging.INFO, "model"):
        train_run(run_of(ended, "a"), resume=True)
    assert str(newest) in caplog.text
    assert f"going on from {before}" in caplog.text
    assert checkpoint.found(newest.parent)[-1].step == 6


def test_after_nothing_but_damage_the_configuration_kept_is_of_the_training_that_began_anew(ended: Path) -> None:
    """By it `prune` knows which version is in use."""
    for path in (ended / "runs" / "a" / "checkpoints").iterdir():
        whole = bytearray(path.read_bytes())
        whole[-1] ^= 1  # which no header tells
        path.write_bytes(whole)
    train_run(run_of(ended, "a", seed=2), resume=True)
    assert json.loads((ended / "runs" / "a" / "config.json").read_text())["config"]["seed"] == 2


@pytest.mark.parametrize("name", ["metrics.csv", "validation.csv"])
@pytest.mark.parametrize("left", [b"", b"step,lo", b"step,mae\n\0\0\0\n", b"\xff\xfe\n1,2\n"])
def test_a_log_that_a_full_disk_left_is_started_again(
    name: str, left: bytes, learner: Learner, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / name).write_bytes(left)
    book = Logbook(tmp_path, learner.config, learner, start=6, images_a_step=2)
    assert f"{tmp_path / name} is damaged, and is started again" in caplog.text
    assert not (tmp_path / name).exists()
    book.add(torch.ones(len(LOSSES)))
    book.line(7)
    book.validation(7, {"mae": 0.5, "psnr": 1.0, "ssim": 0.5})
    book.close()
    assert [row["step"] for row in read_rows(tmp_path / name)] == ["7"]


@pytest.fixture(scope="module")
def learner() -> Learner:
    return Learner(TrainConfig.model_validate(TRAINED), torch.device("cpu"))


def test_a_training_goes_on_where_a_full_disk_left_nothing_of_its_logs(
    ended: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(ended, "a", steps=8)
    for name in ("metrics.csv", "validation.csv"):
        (run.folder / name).write_bytes(b"")
    train_run(run, resume=True)
    for name in ("metrics.csv", "validation.csv"):
        assert f"{run.folder / name} is damaged, and is started again" in caplog.text
    assert [row["step"] for row in read_rows(run.folder / "metrics.csv")] == ["8"]


# -- what a run leaves ------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_its_documentation_says(whole_run: Run) -> None:
    run = whole_run
    there = {str(p.relative_to(run.folder)) for p in run.folder.rglob("*")}
    assert {"config.json", "metrics.csv", "generator.safetensors", "samples", "tensorboard"} <= there
    assert [c.step for c in checkpoint.found(run.folder / "checkpoints")][-2:] == [4, 6]
    for step in (2, 4, 6):
        assert {f"samples/step-{step:08d}-gray.png", f"samples/step-{step:08d}-colour.png"} <= there
    assert any(path.startswith("samples/step-00000006/") and path.endswith("-generated.png") for path in there)
    assert any("tfevents" in path for path in there)
    row = read_rows(run.folder / "metrics.csv")[-1]
    assert {"step", "loss_d", "loss_g", "loss_g_reconstruction", "ms_per_step", "images_per_s"} <= row.keys()
    assert str(run.folder.parents[1]) not in (run.folder / "config.json").read_text()


def test_a_run_is_named_by_what_decides_its_weights(root: Path) -> None:
    def name(**settings: Any) -> str:
        return str(prepare(root, TrainConfig.model_validate(TRAINED | settings)).folder.name)

    assert name() == name() == name(log_every=7) == name(keep=9)
    assert len({name(), name(seed=1), name(lr=1e-3), name(steps=8), name(direction="t2->t1")}) == 5
    assert name() == name(dataset="@latest") == name(direction="t1->t2")


def test_the_best_generator_is_kept_and_found_again(trained: Path) -> None:
    run = run_of(trained, "a")
    assert run.config.ema  # so that the average is what is kept
    best = checkpoint.best(run.folder / "checkpoints")
    assert best is not None
    kept, config, step = load_generator(run.generator)
    again, _, _ = load_generator(best.path)
    assert step == best.step
    assert config == run.config
    for a, b in zip(kept.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert open_run(trained, "a").generator == open_run(trained, "latest").generator == run.generator


def test_a_finished_run_is_not_trained_again(ended: Path) -> None:
    run = run_of(ended, "a")
    before = {p: p.stat().st_mtime_ns for p in (run.folder / "checkpoints").iterdir()}
    train_run(run, resume=True)
    assert {p: p.stat().st_mtime_ns for p in (run.folder / "checkpoints").iterdir()} == before


def test_the_learning_rate_falls_in_a_straight_line_at_the_end() -> None:
    config = TrainConfig(steps=100, lr=1.0, decay=0.25)
    assert [config.lr_at(step) for step in (0, 75, 80, 99)] == pytest.approx([1, 1, 0.8, 0.04])
    assert TrainConfig(steps=100, lr=1.0).lr_at(99) == 1


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_sound(name: str) -> None:
    config = preset(name)
    if name == "paper":  # to the letter
        assert (config.steps, config.batch_size, config.lambda_l1) == (49_200, 1, 100)
        assert (config.width, config.dropout, config.discriminator_layers, config.augment) == (64, 0.5, 3, "none")


def test_a_version_that_names_an_array_that_is_not_there_is_one_line(published: Refreshed, tmp_path: Path) -> None:
    shutil.copytree(published.folder.parents[1], tmp_path / "datasets")
    facts = tmp_path / "datasets/ixi-t1-t2" / published.version / "dataset.json"
    facts.write_text(to_json(dataset.with_digest(read_json(facts) | {"source": "zzz"})))
    with pytest.raises(DatasetError, match=r"dataset\.json is damaged: it names an array zzz"):
        run_of(tmp_path, "a")


@pytest.mark.parametrize("percentiles", [(3.0, 3.0), (7.0, 3.0), (float("nan"), 3.0), (1.0, float("inf"))])
def test_a_subject_that_cannot_be_normalised_is_named(
    percentiles: tuple[float, float], published: Refreshed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a version that another code made: a refresh excludes such a subject."""
    facts, table = data.dataset.read_sound(published.folder)
    first = table.index[table["split"] == "train"][0]
    table.loc[first, ["t2_p_low", "t2_p_high"]] = percentiles
    monkeypatch.setattr("model.data.dataset.read_sound", lambda _folder: (facts, table))
    named = f"the t2 of {table.loc[first, 'subject_id']} cannot be normalised, its percentiles are"
    with pytest.raises(DatasetError, match=named) as error:
        data.load(published.folder, "train")
    assert "\n" not in str(error.value)


# -- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.stack  # half a minute on two cores
def test_two_processes_learn_what_one_learns_from_both_their_batches(root: Path, published: Refreshed) -> None:
    plain = {"dropout": 0.0, "steps": 8, "checkpoint_every": 8, "samples": 0, "augment": "flip", "lr": 1e-3}
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(launched(root, **plain, batch_size=1), check=True, capture_output=True, env=env)
    train_run(run_of(root, "one", **plain, batch_size=2))
    one, two = (load_generator(root / "runs" / name / "generator.safetensors")[0] for name in ("one", "two"))
    (saved,) = checkpoint.found(root / "runs" / "two" / "checkpoints")
    assert {"random.cpu.0", "random.cpu.1"} <= checkpoint.load(saved.path)[0].keys()
    source = data.load(published.folder, "train").normalised(torch.arange(4))[0]
    fresh = build_generator(run_of(root, "one", **plain).config).eval()
    with torch.no_grad():  # weights that norms make irrelevant may differ; what is generated may not
        a, b, before = (generator.whole(source) for generator in (one, two, fresh))
    assert float((a - b).abs().max()) < 0.02 * float((a - before).abs().max())


@pytest.mark.stack  # a quarter of a minute on two cores
def test_one_of_two_processes_told_to_stop_stops_both_at_the_same_step(root: Path) -> None:
    two = launched(root, steps=100_000, checkpoint_every=90_000, batch_size=1)
    process = subprocess.Popen(two, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    wait_for((root / "runs" / "two" / "metrics.csv").exists, process.poll)
    one = next(p for p in psutil.Process(process.pid).children() if p.environ().get("RANK") == "1")
    one.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=GIVE_UP_S)
    (saved,) = checkpoint.found(root / "runs" / "two" / "checkpoints")
    assert f"stopped at step {saved.step} of 100000 and saved" in said.decode()
    assert b'Traceback (most recent call last):\n  File "/tmp' not in said


def test_another_number_of_processes_does_not_resume(ended: Path) -> None:
    """It would take other pairs at each step."""
    *_, saved = checkpoint.found(ended / "runs/a/checkpoints")
    assert saved.processes == 1
    tensors, facts = checkpoint.load(saved.path)
    for told in ({"processes": 2}, {"processes": None}):  # older checkpoints tell by their random states
        tensors["random.cpu.1"] = tensors["random.cpu.0"].clone()
        checkpoint.save(saved.path, tensors, facts | told)
        with pytest.raises(CheckpointError, match=r"another configuration \(2 processes, not 1 \(torchrun"):
            train_run(run_of(ended, "a", steps=7), resume=True)
    checkpoint.save(saved.path, tensors, facts | {"processes": 1})
    train_run(run_of(ended, "a", steps=7), resume=True)


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"RANK": "0"}, None),  # of a cluster's prolog, or an MPI wrapper
        ({"RANK": "3"}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"RANK": "", "WORLD_SIZE": "1"}, None),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "WORLD_SIZE": "2"}, None),
        (TORCHRUN, (1, 2, 1)),
        (TORCHRUN | {"MASTER_ADDR": ""}, "MASTER_ADDR=(unset)"),
        (TORCHRUN | {"MASTER_PORT": "x"}, "MASTER_PORT=x"),
        (TORCHRUN | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
        (TORCHRUN | {"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        (TORCHRUN | {"RANK": "2"}, "RANK=2"),
        (TORCHRUN | {"RANK": "-1"}, "RANK=-1"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "LOCAL_RANK=(unset), MASTER_ADDR=(unset)"),
    ],
)
def test_several_processes_train_together_only_where_the_environment_says_how(
    environment: dict[str, str], place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if not isinstance(place, str):
        assert torchrun_place() == place
        return
    with pytest.raises(TrainingError, match=re.escape(place)) as error:
        torchrun_place()
    assert "start with torchrun, or unset RANK" in str(error.value)


def test_other_processes_that_cannot_be_reached_are_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)

    def unreachable(_backend: str) -> None:  # in earnest it takes minutes
        raise torch.distributed.DistNetworkError("the client socket has timed out\nwith a trace")

    monkeypatch.setattr("torch.distributed.init_process_group", unreachable)
    with pytest.raises(TrainingError, match="MASTER_ADDR and MASTER_PORT do not lead to the other processes") as error:
        train_run(run_of(root, "a"))
    assert "\n" not in str(error.value)


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_it_with_the_last_good_checkpoint_named(root: Path) -> None:
    with pytest.raises(TrainingError, match="not finite at step 2; there is no checkpoint yet; try a lower lr"):
        train_run(run_of(root, "b", lr=1e38))


def test_weights_that_are_not_finite_are_never_saved(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses are of the weights before a step, and finite when the step ruins them."""
    learn, steps = Learner.step, iter((1, 2))

    def ruins(self: Learner, *batch: Any) -> Any:
        losses = learn(self, *batch)
        if next(steps) == 2:
            next(self.generator.parameters()).data[0] = float("nan")
        return losses

    monkeypatch.setattr(Learner, "step", ruins)
    said = r"the weights are not finite at step 2; the last good checkpoint is .*step-00000001"
    with pytest.raises(TrainingError, match=said):
        train_run(run_of(root, "a", checkpoint_every=1))
    (saved,) = checkpoint.found(root / "runs" / "a" / "checkpoints")
    assert saved.step == 1


@pytest.mark.parametrize("name", ["exp/one", "..", ".", ".a", "/tmp/a", "../../x", "", "latest", "a\n"])
def test_a_run_has_a_name_that_stays_among_the_runs(name: str, root: Path) -> None:
    with pytest.raises(TrainingError, match="is no name of a run; give letters, digits") as error:
        run_of(root, name)
    assert "\n" not in str(error.value)


def test_a_run_is_not_overwritten(ended: Path) -> None:
    with pytest.raises(CheckpointError, match="has trained to step 6; --resume goes on, another --run-id begins anew"):
        train_run(run_of(ended, "a"))


def test_a_checkpoint_of_another_configuration_is_refused_and_the_difference_named(ended: Path) -> None:
    with pytest.raises(CheckpointError, match=r"another configuration \(width 4, not 8\)"):
        train_run(run_of(ended, "a", width=8), resume=True)
    with pytest.raises(CheckpointError, match="has another configuration"):
        train_run(run_of(ended, "a", lr=1e20), resume=True)
    train_run(run_of(ended, "a", steps=8, log_every=1), resume=True)  # longer is the same training, without decay


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"dataset": "ixi-t1-t2@ffff"}, "there is no version ffff in"),
        ({"dataset": "mnist@latest"}, "there is no dataset mnist"),
        ({"side": 256}, "crops of 256 x 256 do not fit slices of 64 x 64; set a smaller side"),
        ({"direction": "t1->t1"}, "direction 't1->t1' does not fit the dataset: it is t1->t2 or t2->t1"),
        ({"device": "cuda:7"}, "device cuda:7 is not to be had here"),
        ({"device": "meta"}, "device meta is not to be had here"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line_before_anything_is_made(
    root: Path, settings: dict[str, Any], line: str
) -> None:
    with pytest.raises(IxiError, match=line) as error:
        run_of(root, "a", **settings)
    assert "\n" not in str(error.value)
    assert not (root / "runs").exists()


def test_a_damaged_store_is_refused_by_the_name_of_its_file(published: Refreshed, tmp_path: Path) -> None:
    shutil.copytree(published.folder.parents[2], tmp_path / "root")
    for shard in (tmp_path / "root").rglob("t1/c/*/0/0/0"):
        whole = bytearray(shard.read_bytes())
        whole[len(whole) // 3] ^= 1
        shard.write_bytes(whole)
    run = run_of(tmp_path / "root", "a")
    with pytest.raises(DatasetError, match=r"t1/c/\d/0/0/0 is damaged: its SHA-256"):
        train_run(run)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "--dataset", "ixi-t1-t2@ffff"], "error: there is no version ffff in"),
        (
            ["train", "--set", "wormhole=1"],
            "error: there is no field wormhole; the fields are dataset, direction, side,",
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
        (["evaluate", "a", "--split", "train", "--weights", "nothing"], "error: nothing is not there"),
    ],
)
def test_the_command_line_says_what_is_wrong_in_one_line(
    trained: Path, arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--root", str(trained)])
    assert end.value.code == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert line in said[-1]
    assert not [other for other in said[:-1] if "rror" in other]


def test_without_validation_the_last_is_the_best_and_the_samples_are_of_training(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(root, "b", steps=2, samples=1)
    train_run(run)
    assert "has no subject in split val" in caplog.text
    best = checkpoint.best(run.folder / "checkpoints")
    assert best is not None
    assert (best.step, best.validation) == (2, {})
    assert list((run.folder / "samples").glob("*.png"))
    page = (run.folder / "report.html").read_text()
    assert "Middle slices of training subjects" in page
    assert "the generator was trained on these subjects" in page
    assert "validation subjects" not in page
