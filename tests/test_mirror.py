"""A run on S3 is worked on in a folder: another machine goes on with it, and whoever wants to measures it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed; pip install -c constraints.txt -e '.[train]'")

from conftest import SMALL_NETWORKS  # noqa: E402

from ixi_etl import dataset  # noqa: E402
from ixi_etl.files import silent, write_atomic  # noqa: E402
from ixi_etl.places import Places, file_sizes, place, upload  # noqa: E402
from ixi_etl.publish import Refreshed  # noqa: E402
from model import checkpoint, mirror  # noqa: E402
from model.config import TrainConfig  # noqa: E402
from model.run import Run, evaluate_run, open_run, prepare, train_run  # noqa: E402

SMALL = SMALL_NETWORKS | {"steps": 4, "checkpoint_every": 2, "keep": 1, "log_every": 1, "samples": 0}


@pytest.fixture
def root(s3_root: str, published: Refreshed) -> str:
    """A root on S3 with the published dataset in it."""
    places = Places(s3_root)
    upload(published.folder, places.version(published.version), last=dataset.FACTS, progress=silent)
    write_atomic(places.datasets / dataset.POINTER, (published.folder.parent / dataset.POINTER).read_bytes())
    return s3_root


def run_in(root: str, scratch: Path, **settings: Any) -> Run:
    return prepare(root, TrainConfig.model_validate(SMALL | settings), "a", scratch)


def weights(path: Path) -> dict[str, Any]:
    return checkpoint.load(path)[0]


def test_another_machine_goes_on_with_a_run_bit_for_bit(root: str, published: Refreshed, tmp_path: Path) -> None:
    first = run_in(root, tmp_path / "first")
    train_run(first)
    assert str(first.kept) == f"{root}/runs/a"
    second = run_in(root, tmp_path / "second", steps=8)
    went_on = train_run(second, resume=True)
    (tmp_path / "datasets").symlink_to(published.folder.parents[1])
    straight = run_in(str(tmp_path), tmp_path, steps=8)
    assert straight.kept is None
    wanted, got = weights(train_run(straight)), weights(went_on)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert (second.folder / "metrics.csv").read_text().count("\n") == 1 + 8


def test_what_is_kept_is_what_is_here_but_for_locks(root: str, tmp_path: Path) -> None:
    run = run_in(root, tmp_path)
    train_run(run)
    assert run.kept
    kept = file_sizes(run.kept)
    assert kept == {n: s for n, s in file_sizes(run.folder).items() if not n.startswith(".")}
    assert {"config.json", "generator.safetensors", "metrics.csv", "checkpoints/step-00000004.safetensors"} <= set(kept)
    assert len([name for name in kept if name.startswith("checkpoints/")]) <= 2  # the newest and the best


def test_a_kept_run_is_measured_elsewhere_and_the_figures_are_kept(root: str, tmp_path: Path) -> None:
    train_run(run_in(root, tmp_path / "first"))
    opened = open_run(root, "latest", tmp_path / "second")
    assert opened.kept
    assert weights(opened.generator).keys() == weights(tmp_path / "first/runs/a/generator.safetensors").keys()
    evaluate_run(opened, split="train")
    assert (opened.kept / "evaluation-train.csv").read_bytes() == (opened.folder / "evaluation-train.csv").read_bytes()


def test_a_run_that_is_further_here_is_not_fetched(root: str, tmp_path: Path) -> None:
    run = run_in(root, tmp_path)
    train_run(run)
    assert run.kept
    checkpoints = run.kept / "checkpoints"
    (checkpoints / "step-00000003.safetensors").write_bytes(b"old")
    mirror.fetch(run.kept, run.folder)
    assert not (run.folder / "checkpoints/step-00000003.safetensors").exists()


def test_s3_that_does_not_answer_does_not_end_a_training(
    s3: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_text("{}")
    mirror.keep_if_possible(tmp_path, place("s3://nowhere/runs/a"))
    assert f"{tmp_path} is not yet in s3://nowhere/runs/a" in caplog.text
