"""A run on S3 is worked on in a folder: another machine goes on with it, and whoever wants to measures it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed; pip install -c constraints.txt -e '.[train]'")

from conftest import SMALL_NETWORKS, new_s3_root  # noqa: E402

from ixi_etl import dataset  # noqa: E402
from ixi_etl.files import silent, write_atomic  # noqa: E402
from ixi_etl.places import Places, file_sizes, filesystem_of, place, upload  # noqa: E402
from ixi_etl.publish import Refreshed  # noqa: E402
from model import checkpoint, mirror  # noqa: E402
from model.config import TrainConfig  # noqa: E402
from model.run import Run, evaluate_run, open_run, prepare, train_run  # noqa: E402

SMALL = SMALL_NETWORKS | {"steps": 4, "checkpoint_every": 2, "keep": 1, "log_every": 1, "samples": 0}


@pytest.fixture(scope="module")
def root(s3: None, published: Refreshed) -> str:
    """A root on S3 with the published dataset in it; each test has runs of its own there."""
    root = new_s3_root()
    places = Places(root)
    upload(published.folder, places.version(published.version), last=dataset.FACTS, progress=silent)
    write_atomic(places.datasets / dataset.POINTER, (published.folder.parent / dataset.POINTER).read_bytes())
    return root


def run_in(root: str, name: str, scratch: Path, **settings: Any) -> Run:
    return prepare(root, TrainConfig.model_validate(SMALL | settings), name, scratch)


@dataclass(frozen=True)
class Trained:
    """A run of 4 steps: in a folder, with the sizes of its files there, and what was then kept of it on S3.

    `latest` is the run that another machine then found under that name.
    """

    run: Run
    latest: Run
    here: dict[str, int]
    kept: dict[str, int]

    def copied(self, name: str) -> Path:
        """Of what is kept, a copy that a test may change: the run `name`."""
        assert self.run.kept
        copy = self.run.kept.with_name(name)
        filesystem, top = filesystem_of(self.run.kept)
        filesystem.copy([f"{top}/{n}" for n in self.kept], [f"{filesystem_of(copy)[1]}/{n}" for n in self.kept])
        return copy


@pytest.fixture(scope="module")
def trained(root: str, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    run = run_in(root, "a", tmp_path_factory.mktemp("first"))
    train_run(run)
    assert run.kept
    latest = open_run(root, "latest", tmp_path_factory.mktemp("second"))
    return Trained(run, latest, file_sizes(run.folder), file_sizes(run.kept))


def weights(path: Path) -> dict[str, Any]:
    return checkpoint.load(path)[0]


@pytest.mark.stack
def test_another_machine_goes_on_with_a_run_bit_for_bit(
    root: str, trained: Trained, published: Refreshed, tmp_path: Path
) -> None:
    kept = trained.copied("b")
    second = run_in(root, "b", tmp_path / "second", steps=8)
    assert str(second.kept) == str(kept) == f"{root}/runs/b"
    went_on = train_run(second, resume=True)
    (tmp_path / "datasets").symlink_to(published.folder.parents[1])
    straight = run_in(str(tmp_path), "a", tmp_path, steps=8)
    assert straight.kept is None
    wanted, got = weights(train_run(straight)), weights(went_on)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert (second.folder / "metrics.csv").read_text().count("\n") == 1 + 8


@pytest.mark.stack
def test_what_is_kept_is_what_is_here_but_for_locks(trained: Trained) -> None:
    kept = trained.kept
    assert kept == {n: s for n, s in trained.here.items() if not n.startswith(".")}
    assert str(trained.latest.kept) == str(trained.run.kept)
    assert {"config.json", "generator.safetensors", "metrics.csv", "checkpoints/step-00000004.safetensors"} <= set(kept)
    assert len([name for name in kept if name.startswith("checkpoints/")]) <= 2  # the newest and the best


@pytest.mark.stack
def test_a_kept_run_is_measured_elsewhere_and_the_figures_are_kept(root: str, trained: Trained, tmp_path: Path) -> None:
    trained.copied("c")
    opened = open_run(root, "c", tmp_path)
    assert opened.kept
    assert weights(opened.generator).keys() == weights(trained.run.folder / "generator.safetensors").keys()
    evaluate_run(opened, split="train")
    assert (opened.kept / "evaluation-train.csv").read_bytes() == (opened.folder / "evaluation-train.csv").read_bytes()


@pytest.mark.stack
def test_a_run_that_is_further_here_is_not_fetched(trained: Trained, tmp_path: Path) -> None:
    kept, here = trained.copied("d"), shutil.copytree(trained.run.folder, tmp_path / "d")
    (kept / "checkpoints/step-00000003.safetensors").write_bytes(b"old")
    mirror.fetch(kept, here)
    assert not (here / "checkpoints/step-00000003.safetensors").exists()


def test_s3_that_does_not_answer_does_not_end_a_training(
    s3: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_text("{}")
    mirror.keep_if_possible(tmp_path, place("s3://nowhere/runs/a"))
    assert f"{tmp_path} is not yet in s3://nowhere/runs/a" in caplog.text
