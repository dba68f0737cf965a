"""Pruning removes old versions, but keeps the latest, those that runs use, and unfinished ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from ixi_etl.core.files import lock_root, to_json
from ixi_etl.core.progress import no_progress
from ixi_etl.core.storage import DEFAULT_DATASET, DataRoot, file_sizes, to_path, upload_folder
from ixi_etl.dataset import metadata, prune, versions
from ixi_etl.dataset.prune import prune_versions
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.errors import DatasetError, IxiError, LockedError


def write_versions(data_root: DataRoot, published: PublishedVersion, count: int) -> list[str]:
    """Write `count` versions that consist of `dataset.json` only; the newest is the latest."""
    names = [f"{n:012x}" for n in range(1, count + 1)]
    record = json.loads((published.folder / metadata.METADATA).read_text())
    for name in names:
        folder = data_root.version(name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "slices").write_text("x" * 1000)
        (folder / metadata.METADATA).write_text(to_json(record | {"version": name}))
    history = [{"version": name} for name in names]
    (data_root.datasets / metadata.POINTER).write_text(to_json({"version": names[-1], "history": history}))
    return names


def start_run(root: Path, run: str, dataset: str) -> None:
    (root / "runs" / run).mkdir(parents=True)
    (root / "runs" / run / "config.json").write_text(to_json({"config": {"dataset": dataset}}))


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("folder", name) for name in ("ixi-t1-t2", "digits")), pytest.param("S3", "digits", marks=pytest.mark.stack)],
)
def test_the_newest_the_latest_and_used_versions_are_kept(
    name: str, kind: str, published: PublishedVersion, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = str(tmp_path) if kind == "folder" else request.getfixturevalue("s3_root")
    data_root = DataRoot(root, name, tmp_path / "scratch")
    a, b, c, d, e = write_versions(data_root, published, 5)
    start_run(to_path(root), "x", f"{name}@{b}")
    start_run(to_path(root), "y", f"{'digits' if name == DEFAULT_DATASET else DEFAULT_DATASET}@{a}")
    (data_root.datasets / metadata.POINTER).write_text(
        to_json({"version": c, "history": [{"version": v} for v in (a, b, c, d, e)]})
    )
    planned = prune_versions(data_root, 1, dry_run=True)
    assert versions.published_versions(data_root) == [a, b, c, d, e]
    assert prune_versions(data_root, 1) == planned
    assert {v.version: v.why for v in planned if not v.removed} == {
        e: "one of the newest 1",
        c: "it is the latest",
        b: "used by run x",
    }
    assert versions.published_versions(data_root) == [b, c, e]
    assert versions.resolve_version(data_root) == c
    assert not file_sizes(data_root.version(a))
    assert [v.removed for v in prune_versions(data_root, 9)] == [False] * 3


@dataclass(frozen=True)
class WatchedRoot(DataRoot):
    """Calls `on_access` at every access to the folder of versions."""

    on_access: Callable[[], None] = lambda: None

    @property
    def datasets(self) -> Path:
        self.on_access()
        return super().datasets


@pytest.mark.parametrize("count", [0, 1])
def test_latest_resolves_while_another_version_is_published(
    count: int, published: PublishedVersion, tmp_path: Path
) -> None:
    """At each access of the lookup, another version becomes the latest and the previous one is removed."""
    accesses = 0
    for publish_at in range(1, 100):
        data_root, accesses = DataRoot(tmp_path / f"{publish_at}"), 0
        before = write_versions(data_root, published, count) if count else []

        def publish_and_prune(data_root: DataRoot = data_root, publish_at: int = publish_at) -> None:
            nonlocal accesses
            accesses += 1
            if accesses == publish_at:
                write_versions(data_root, published, count + 1)
                prune_versions(data_root, 1)

        try:
            latest = versions.resolve_version(WatchedRoot(data_root.root, on_access=publish_and_prune))
            assert latest in [*before, f"{count + 1:012x}"]
        except DatasetError as error:
            assert not count
            assert "has no published version" in str(error)
        if accesses < publish_at:
            break
    assert 3 < accesses < 99


def test_a_version_not_in_the_history_is_kept(published: PublishedVersion, tmp_path: Path) -> None:
    data_root = DataRoot(tmp_path)
    shutil.copytree(published.folder, data_root.version(published.version))
    (decision,) = prune_versions(data_root, 1)
    assert (decision.removed, "its refresh was stopped" in decision.why) == (False, True)


def test_a_killed_removal_is_completed_by_the_next(
    published: PublishedVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_root = DataRoot(tmp_path)
    old, new = write_versions(data_root, published, 2)

    def interrupt(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prune.shutil, "rmtree", interrupt)  # type: ignore[attr-defined]
        with pytest.raises(KeyboardInterrupt):
            prune_versions(data_root, 1)
    assert versions.published_versions(data_root) == [new]
    assert data_root.version(old).exists()
    assert [(v.version, v.removed) for v in prune_versions(data_root, 1)] == [(new, False), (old, True)]
    assert not data_root.version(old).exists()


def test_folders_of_the_user_are_kept(published: PublishedVersion, tmp_path: Path) -> None:
    data_root = DataRoot(tmp_path)
    _, new = write_versions(data_root, published, 2)
    for name in ("my-notes", "000000000001-copy"):
        data_root.version(name).mkdir()
        (data_root.version(name) / "notes.txt").write_text("x")
    assert [(v.version, v.removed) for v in prune_versions(data_root, 1)] == [(new, False), (f"{1:012x}", True)]
    assert {p.name for p in data_root.datasets.iterdir()} == {"my-notes", "000000000001-copy", new, metadata.POINTER}


def test_a_folder_without_metadata_on_s3_is_kept_for_a_day(
    s3_root: str, published: PublishedVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_root = DataRoot(s3_root, scratch=tmp_path)
    old, new = write_versions(data_root, published, 2)
    (data_root.version(old) / metadata.METADATA).unlink()
    assert [(v.version, v.removed) for v in prune_versions(data_root, 1)] == [(new, False), (old, False)]
    assert file_sizes(data_root.version(old))
    monkeypatch.setattr(prune, "UPLOAD_LASTS", timedelta(seconds=-1))
    assert [(v.version, v.removed) for v in prune_versions(data_root, 1)] == [(new, False), (old, True)]
    assert not file_sizes(data_root.version(old))


def test_a_training_that_starts_during_pruning_keeps_its_version(
    published: PublishedVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_root = DataRoot(tmp_path)
    old, _ = write_versions(data_root, published, 2)
    unlink = Path.unlink

    def start_run_and_unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == metadata.METADATA:
            start_run(tmp_path, "x", f"{DEFAULT_DATASET}@{old}")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", start_run_and_unlink)
    assert prune_versions(data_root, 1)[1] == prune.PruneDecision(
        old, False, "used by run x", prune_versions(data_root, 1)[1].size
    )
    assert old in versions.published_versions(data_root)


@pytest.mark.parametrize("text", ["", "[]", '{"config": {}}', '{"config": {"dataset": 3}}'])
def test_an_unreadable_run_blocks_pruning(published: PublishedVersion, tmp_path: Path, text: str) -> None:
    data_root = DataRoot(tmp_path)
    names = write_versions(data_root, published, 3)
    start_run(tmp_path, "x", "")
    (tmp_path / "runs/x/config.json").write_text(text)
    with pytest.raises(DatasetError, match=r"runs/x/config\.json is damaged, so the version .* is unknown"):
        prune_versions(data_root, 1)
    assert versions.published_versions(data_root) == names


def test_nothing_is_removed_during_a_refresh_or_with_a_damaged_pointer(
    published: PublishedVersion, tmp_path: Path
) -> None:
    data_root = DataRoot(tmp_path)
    names = write_versions(data_root, published, 3)
    with lock_root(tmp_path), pytest.raises(LockedError):
        prune_versions(data_root, 1)
    (data_root.datasets / metadata.POINTER).write_text("{")
    with pytest.raises(DatasetError, match=r"latest\.json is damaged"):
        prune_versions(data_root, 1)
    assert set(versions.published_versions(data_root)) == set(names)


def test_a_version_that_is_a_link_is_not_followed(published: PublishedVersion, tmp_path: Path) -> None:
    data_root = DataRoot(tmp_path / "root")
    old, *_ = write_versions(data_root, published, 2)
    data_root.version(old).rename(tmp_path / "elsewhere")
    data_root.version(old).symlink_to(tmp_path / "elsewhere")
    assert not prune_versions(data_root, 1)[1].removed
    assert (tmp_path / "elsewhere" / metadata.METADATA).exists()


@pytest.mark.usefixtures("torch")
def test_a_run_on_s3_is_visible_before_its_first_checkpoint(
    s3_root: str, published: PublishedVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from conftest import SMALL_NETWORKS

    from model import data, jobs
    from model.config import TrainConfig

    data_root = DataRoot(s3_root)
    upload_folder(published.folder, data_root.version(published.version), last=metadata.METADATA, progress=no_progress)
    pointer = (published.folder.parent / metadata.POINTER).read_bytes()
    (data_root.datasets / metadata.POINTER).write_bytes(pointer)

    def stop(*args: object, **more: object) -> Path:
        raise IxiError("before the first step")

    monkeypatch.setattr(data, "load_pairs", stop)
    with pytest.raises(IxiError, match="before the first step"):
        jobs.train_run(jobs.prepare_run(s3_root, TrainConfig.model_validate(SMALL_NETWORKS), "a", tmp_path))
    assert prune.find_users(DataRoot(s3_root, scratch=tmp_path / "another machine's")) == {published.version: ["run a"]}


def test_the_command_prints_a_line_for_each_version(
    published: PublishedVersion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from flows.cli import main

    old, new = write_versions(DataRoot(tmp_path), published, 2)
    for options, verb in ((["--dry-run"], "would remove"), ([], "removed")):
        with pytest.raises(SystemExit):
            main(["prune", "--keep", "1", "--root", str(tmp_path), *options])
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"kept ixi-t1-t2@{new}: it is the latest (")
        assert lines[1].startswith(f"{verb} ixi-t1-t2@{old}: older than the newest 1, and nothing uses it (")
    assert versions.published_versions(DataRoot(tmp_path)) == [new]
