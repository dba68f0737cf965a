"""Concurrent commands on one root: two refreshes, a refresh and a training, a refresh and a removal of versions."""

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
from processes import TIMEOUT_S, Job
from reader import latest_of, reading

from ixi_etl.core.storage import DEFAULT_DATASET, DataRoot
from ixi_etl.dataset import metadata, verify, versions
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.recipes.ixi import refresh
from model import checkpoint

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("fork_server")]

SMALL: dict[str, Any] = SMALL_NETWORKS | {"batch_size": 2, "steps": 30, "checkpoint_every": 5, "samples": 0}


@pytest.fixture(scope="module")
def initial_root(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with three versions; a run uses the second one."""
    root = tmp_path_factory.mktemp("together") / "root"
    for seed in (1, 2, 3):
        made = refresh(config_for(root, archives, split_seed=seed, pictures=False))
        if seed == 2:
            settings = SMALL | {"dataset": f"{DEFAULT_DATASET}@{made.version}", "steps": 1}
            Job(stages.do_training, str(root), settings, "old").result()
    return root


def test_concurrent_refreshes_publish_one_version(
    initial_root: Path, archives: Path, published: PublishedVersion, tmp_path: Path, row: Row
) -> None:
    count, refused = 10, 0
    for n in range(count):
        root = Path(shutil.copytree(initial_root, tmp_path / f"{n}"))
        config = config_for(root, archives).model_dump_json()
        with reading(latest_of(root)):
            jobs = [Job(stages.do_refresh_or_report_error, config) for _ in range(2)]
            results = [str(job.result()) for job in jobs]
        assert published.version in results
        for result in results:
            if result != published.version:  # the other job held the lock
                assert "is in use by" in result
                assert "\n" not in result
                refused += 1
        made = DataRoot(root).version(published.version)
        assert metadata.read_metadata(made) == metadata.read_metadata(published.folder)
        assert verify.verify(made, deep=True) == []
        shutil.rmtree(root)
    row(
        "two refreshes at once",
        count,
        f"one version; {refused} of the others named the process that holds the root",
        "none",
    )


def test_a_refresh_does_not_change_a_concurrent_training(
    initial_root: Path, archives: Path, published: PublishedVersion, tmp_path: Path, row: Row
) -> None:
    count, weights = 5, []
    for n in range(count):
        root = Path(shutil.copytree(initial_root, tmp_path / f"{n}"))
        older = versions.resolve_version(DataRoot(root))
        with reading(latest_of(root)):
            training = Job(stages.do_training, str(root), SMALL | {"dataset": f"{DEFAULT_DATASET}@{older}"}, "a")
            refreshing = Job(stages.do_refresh_or_report_error, config_for(root, archives).model_dump_json())
            assert refreshing.result() == published.version
            training.result()
        weights.append(checkpoint.load(root / "runs/a/generator.safetensors")[0])
        assert all(torch.equal(weights[0][name], weights[-1][name]) for name in weights[0])
        shutil.rmtree(root)
    row("a refresh and a training at once", count, "both end; the same weights each time", "none")


def test_prune_keeps_the_latest_version_and_those_of_runs(
    initial_root: Path, archives: Path, published: PublishedVersion, tmp_path: Path, row: Row
) -> None:
    """Prune in a loop while a refresh publishes and a training on an old version starts, or has just started."""
    count, removals, kept = 10, 0, []
    for n in range(count):
        root = Path(shutil.copytree(initial_root, tmp_path / f"{n}"))
        data_root = DataRoot(root)
        first, second, _ = versions.published_versions(data_root)
        start = partial(
            Job, stages.do_training_or_report_error, str(root), SMALL | {"dataset": f"{DEFAULT_DATASET}@{first}"}, "a"
        )
        early_training = start() if n % 2 else None
        with reading(latest_of(root, pruned=True)):
            if early_training:
                assert early_training.listen(time.monotonic() + TIMEOUT_S, "train")
            pruning = Job(stages.do_prune_until_refreshed, str(root))
            refreshing = Job(stages.do_refresh_with_retries, config_for(root, archives).model_dump_json())
            training = early_training or start()
            assert refreshing.result() == published.version
            result = str(training.result())
            removals += int(pruning.result())
        existing = versions.published_versions(data_root)
        assert published.version in existing, "the latest version was removed"
        assert second in existing, "a run's version was removed"
        assert all(verify.verify(data_root.version(v), deep=True) == [] for v in existing)
        if result == "a":  # the training started before prune decided on its version
            assert first in existing
        else:
            assert "\n" not in result
            assert first in result
        kept.append(result == "a")
        assert kept[-1] or not early_training, "the version of a running training was removed"
        shutil.rmtree(root)
    outcome = f"{removals} removals; {sum(kept)} trainings kept their version, {count - sum(kept)} started too late"
    row("a refresh, a training and prune at once", count, f"{outcome}, in one line", "no version in use")


def test_a_killed_prune_leaves_whole_versions_and_the_next_completes_it(
    initial_root: Path, tmp_path: Path, row: Row
) -> None:
    """SIGKILL at times spread evenly over a removal."""
    count, incomplete = 50, 0
    job = Job(stages.do_prune, str(shutil.copytree(initial_root, tmp_path / "whole")))
    job.result()
    duration = job.duration("prune", "done")
    for n in range(count):
        root = Path(shutil.copytree(initial_root, tmp_path / f"{n}"))
        data_root = DataRoot(root)
        names = versions.published_versions(data_root)
        with reading(latest_of(root)):
            job = Job(stages.do_prune, str(root))
            job.kill_after("prune", (n + 0.5) / count * duration)
            existing = versions.published_versions(data_root)
            incomplete += existing != names and data_root.version(names[0]).exists()
            assert all(verify.verify(data_root.version(v), deep=True) == [] for v in existing)
            Job(stages.do_prune, str(root)).result()
        assert versions.published_versions(data_root) == names[1:]
        assert not data_root.version(names[0]).exists()
        shutil.rmtree(root)
    outcome = f"whole versions only ({incomplete} incomplete removals, completed by the next)"
    row("kill in prune", count, outcome, "no version in use")
