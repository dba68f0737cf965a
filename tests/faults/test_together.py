"""Two at once on one root: two refreshes, a refresh and a training, a refresh and a removal of old versions."""

from __future__ import annotations

import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import stages
import torch
from conftest import SMALL_NETWORKS, config_for
from faults_table import Row
from processes import GIVE_UP_S, Job, preload
from reader import latest_of, reading

from ixi_etl.core.storage import DEFAULT_DATASET, DataRoot
from ixi_etl.dataset import metadata, verify, versions
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.recipes.ixi import refresh
from model import checkpoint

pytestmark = pytest.mark.faults

SMALL: dict[str, Any] = SMALL_NETWORKS | {"batch_size": 2, "steps": 30, "checkpoint_every": 5, "samples": 0}


@pytest.fixture(scope="module", autouse=True)
def _jobs() -> None:
    preload()


@pytest.fixture(scope="module")
def before(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with three versions; the middle one is a run's."""
    root = tmp_path_factory.mktemp("together") / "root"
    for seed in (1, 2, 3):
        made = refresh(config_for(root, archives, split_seed=seed, pictures=False))
        if seed == 2:
            settings = SMALL | {"dataset": f"{DEFAULT_DATASET}@{made.version}", "steps": 1}
            Job(stages.do_training, str(root), settings, "old").end()
    return root


def test_together_refreshes(
    before: Path, archives: Path, published: PublishedVersion, tmp_path: Path, row: Row
) -> None:
    count, waited = 10, 0
    for n in range(count):
        root = Path(shutil.copytree(before, tmp_path / f"{n}"))
        config = config_for(root, archives).model_dump_json()
        with reading(latest_of(root)):
            jobs = [Job(stages.do_refresh_or_say, config) for _ in range(2)]
            said = [str(job.end()) for job in jobs]
        assert published.version in said
        for line in said:
            if line != published.version:  # the other found the lock held
                assert "is in use by" in line
                assert "\n" not in line
                waited += 1
        made = DataRoot(root).version(published.version)
        assert metadata.read_metadata(made) == metadata.read_metadata(published.folder)
        assert verify.verify(made, deep=True) == []
        shutil.rmtree(root)
    row("two refreshes at once", count, f"one version; {waited} of the second said who holds the root", "none")


def test_together_training(before: Path, archives: Path, published: PublishedVersion, tmp_path: Path, row: Row) -> None:
    count, weights = 5, []
    for n in range(count):
        root = Path(shutil.copytree(before, tmp_path / f"{n}"))
        older = versions.resolve_version(DataRoot(root))
        with reading(latest_of(root)):
            training = Job(stages.do_training, str(root), SMALL | {"dataset": f"{DEFAULT_DATASET}@{older}"}, "a")
            refreshing = Job(stages.do_refresh_or_say, config_for(root, archives).model_dump_json())
            assert refreshing.end() == published.version
            training.end()
        weights.append(checkpoint.load(root / "runs/a/generator.safetensors")[0])
        assert all(torch.equal(weights[0][name], weights[-1][name]) for name in weights[0])
        shutil.rmtree(root)
    row("a refresh and a training at once", count, "both end; the same weights each time", "none")


def test_together_prune(before: Path, archives: Path, published: PublishedVersion, tmp_path: Path, row: Row) -> None:
    """A removal in a loop, while a refresh publishes and a training starts on an old version, or has just begun."""
    count, removals, kept = 10, 0, []
    for n in range(count):
        root = Path(shutil.copytree(before, tmp_path / f"{n}"))
        data_root = DataRoot(root)
        first, second, _ = versions.published_versions(data_root)
        start = partial(
            Job, stages.do_training_or_say, str(root), SMALL | {"dataset": f"{DEFAULT_DATASET}@{first}"}, "a"
        )
        begun = start() if n % 2 else None
        with reading(latest_of(root, pruned=True)):
            if begun:
                assert begun.listen(time.monotonic() + GIVE_UP_S, "train")
            pruning = Job(stages.do_prunes, str(root))
            refreshing = Job(stages.do_refresh_or_wait, config_for(root, archives).model_dump_json())
            training = begun or start()
            assert refreshing.end() == published.version
            said = str(training.end())
            removals += int(pruning.end())
        there = versions.published_versions(data_root)
        assert published.version in there, "the newest was removed"
        assert second in there, "a run's version was removed"
        assert all(verify.verify(data_root.version(v), deep=True) == [] for v in there)
        if said == "a":  # the training began before the removal saw its version
            assert first in there
        else:
            assert "\n" not in said
            assert first in said
        kept.append(said == "a")
        assert kept[-1] or not begun, "a training had begun, and its version was removed"
        shutil.rmtree(root)
    said = f"{removals} removals; {sum(kept)} trainings kept their version, {count - sum(kept)} came too late"
    row("a refresh, a training and prune at once", count, f"{said}, in one line", "none that anybody uses")


def test_together_prune_killed(before: Path, tmp_path: Path, row: Row) -> None:
    """SIGKILL at moments spread evenly over a removal: what is left are whole versions, and the next ends it."""
    count, halves = 50, 0
    job = Job(stages.do_prune, str(shutil.copytree(before, tmp_path / "whole")))
    job.end()
    lasts = job.lasted("prune", "done")
    for n in range(count):
        root = Path(shutil.copytree(before, tmp_path / f"{n}"))
        data_root = DataRoot(root)
        names = versions.published_versions(data_root)
        with reading(latest_of(root)):
            job = Job(stages.do_prune, str(root))
            job.kill_after("prune", (n + 0.5) / count * lasts)
            there = versions.published_versions(data_root)
            halves += there != names and data_root.version(names[0]).exists()
            assert all(verify.verify(data_root.version(v), deep=True) == [] for v in there)
            Job(stages.do_prune, str(root)).end()
        assert versions.published_versions(data_root) == names[1:]
        assert not data_root.version(names[0]).exists()
        shutil.rmtree(root)
    said = f"whole versions only ({halves} removals half done, ended by the next)"
    row("kill in prune", count, said, "none that anybody uses")
