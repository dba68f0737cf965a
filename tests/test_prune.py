"""Old versions go, and none that somebody needs: not the latest, not a run's, not one that is being made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from ixi_etl import dataset
from ixi_etl import prune as module
from ixi_etl.errors import DatasetError, IxiError, LockedError
from ixi_etl.files import lock_root, silent, to_json
from ixi_etl.places import Places, file_sizes, place, upload
from ixi_etl.prune import prune
from ixi_etl.publish import Refreshed


def lay(places: Places, published: Refreshed, count: int) -> list[str]:
    """Put `count` versions there, by their folders' names and facts alone; the newest is the latest."""
    names = [f"{n:012x}" for n in range(1, count + 1)]
    facts = json.loads((published.folder / dataset.FACTS).read_text())
    for name in names:
        folder = places.version(name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "slices").write_text("x" * 1000)
        (folder / dataset.FACTS).write_text(to_json(facts | {"version": name}))
    history = [{"version": name} for name in names]
    (places.datasets / dataset.POINTER).write_text(to_json({"version": names[-1], "history": history}))
    return names


def start_run(root: Path, run: str, used: str) -> None:
    (root / "runs" / run).mkdir(parents=True)
    (root / "runs" / run / "config.json").write_text(to_json({"config": {"dataset": used}}))


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("folder", name) for name in dataset.COMMANDS), pytest.param("S3", "digits", marks=pytest.mark.stack)],
)
def test_the_newest_the_latest_and_what_runs_use_stay(
    name: str, kind: str, published: Refreshed, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = str(tmp_path) if kind == "folder" else request.getfixturevalue("s3_root")
    places = Places(root, name, tmp_path / "scratch")
    a, b, c, d, e = lay(places, published, 5)
    start_run(place(root), "x", f"{name}@{b}")
    start_run(place(root), "y", f"{'digits' if name == dataset.NAME else dataset.NAME}@{a}")
    (places.datasets / dataset.POINTER).write_text(
        to_json({"version": c, "history": [{"version": v} for v in (a, b, c, d, e)]})
    )
    said = prune(places, 1, dry_run=True)
    assert dataset.published(places) == [a, b, c, d, e]
    assert prune(places, 1) == said
    assert {v.version: v.why for v in said if not v.removed} == {
        e: "one of the newest 1",
        c: "it is the latest",
        b: "used by run x",
    }
    assert dataset.published(places) == [b, c, e]
    assert dataset.resolve(places) == c
    assert not file_sizes(places.version(a))
    assert [v.removed for v in prune(places, 9)] == [False] * 3


@dataclass(frozen=True)
class Watched(Places):
    """Calls `asked` whenever somebody asks where the versions lie."""

    asked: Callable[[], None] = lambda: None

    @property
    def datasets(self) -> Path:
        self.asked()
        return super().datasets


@pytest.mark.parametrize("count", [0, 1])
def test_the_latest_is_found_while_another_is_published_and_it_is_pruned(
    count: int, published: Refreshed, tmp_path: Path
) -> None:
    """At each step of looking it up, another version becomes the latest, and the one before is removed."""
    steps = 0
    for at in range(1, 100):
        quiet, steps = Places(tmp_path / f"{at}"), 0
        before = lay(quiet, published, count) if count else []

        def asked(quiet: Places = quiet, at: int = at) -> None:
            nonlocal steps
            steps += 1
            if steps == at:
                lay(quiet, published, count + 1)
                prune(quiet, 1)

        try:
            assert dataset.resolve(Watched(quiet.root, asked=asked)) in [*before, f"{count + 1:012x}"]
        except DatasetError as error:
            assert not count
            assert "has no published version" in str(error)
        if steps < at:
            break
    assert 3 < steps < 99


def test_a_version_that_nothing_has_pointed_to_yet_is_being_made(published: Refreshed, tmp_path: Path) -> None:
    places = Places(tmp_path)
    shutil.copytree(published.folder, places.version(published.version))
    (verdict,) = prune(places, 1)
    assert (verdict.removed, "its refresh was stopped" in verdict.why) == (False, True)


def test_a_removal_that_was_killed_leaves_no_version_and_is_ended_by_the_next(
    published: Refreshed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = Places(tmp_path)
    old, new = lay(places, published, 2)

    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "rmtree", killed)  # type: ignore[attr-defined]
        with pytest.raises(KeyboardInterrupt):
            prune(places, 1)
    assert dataset.published(places) == [new]
    assert places.version(old).exists()
    assert [(v.version, v.removed) for v in prune(places, 1)] == [(new, False), (old, True)]
    assert not places.version(old).exists()


def test_a_folder_of_a_person_s_own_stays(published: Refreshed, tmp_path: Path) -> None:
    places = Places(tmp_path)
    _, new = lay(places, published, 2)
    for name in ("my-notes", "000000000001-copy"):
        places.version(name).mkdir()
        (places.version(name) / "notes.txt").write_text("x")
    assert [(v.version, v.removed) for v in prune(places, 1)] == [(new, False), (f"{1:012x}", True)]
    assert {p.name for p in places.datasets.iterdir()} == {"my-notes", "000000000001-copy", new, dataset.POINTER}


def test_what_lacks_its_facts_on_s3_may_be_an_upload_and_stays_for_a_day(
    s3_root: str, published: Refreshed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = Places(s3_root, scratch=tmp_path)
    old, new = lay(places, published, 2)
    (places.version(old) / dataset.FACTS).unlink()
    assert [(v.version, v.removed) for v in prune(places, 1)] == [(new, False), (old, False)]
    assert file_sizes(places.version(old))
    monkeypatch.setattr(module, "UPLOAD_LASTS", timedelta(seconds=-1))
    assert [(v.version, v.removed) for v in prune(places, 1)] == [(new, False), (old, True)]
    assert not file_sizes(places.version(old))


def test_a_training_that_starts_meanwhile_keeps_its_version(
    published: Refreshed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = Places(tmp_path)
    old, _ = lay(places, published, 2)
    unlink = Path.unlink

    def starts_just_before(path: Path, missing_ok: bool = False) -> None:
        if path.name == dataset.FACTS:
            start_run(tmp_path, "x", f"{dataset.NAME}@{old}")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", starts_just_before)
    assert prune(places, 1)[1] == module.Verdict(old, False, "used by run x", prune(places, 1)[1].size)
    assert old in dataset.published(places)


@pytest.mark.parametrize("text", ["", "[]", '{"config": {}}', '{"config": {"dataset": 3}}'])
def test_a_run_that_cannot_be_read_may_use_any_version(published: Refreshed, tmp_path: Path, text: str) -> None:
    places = Places(tmp_path)
    names = lay(places, published, 3)
    start_run(tmp_path, "x", "")
    (tmp_path / "runs/x/config.json").write_text(text)
    with pytest.raises(DatasetError, match=r"runs/x/config\.json is damaged, so nobody knows which version"):
        prune(places, 1)
    assert dataset.published(places) == names


def test_nothing_is_removed_while_a_refresh_works_or_the_pointer_is_damaged(
    published: Refreshed, tmp_path: Path
) -> None:
    places = Places(tmp_path)
    names = lay(places, published, 3)
    with lock_root(tmp_path), pytest.raises(LockedError):
        prune(places, 1)
    (places.datasets / dataset.POINTER).write_text("{")
    with pytest.raises(DatasetError, match=r"latest\.json is damaged"):
        prune(places, 1)
    assert set(dataset.published(places)) == set(names)


def test_a_version_that_is_a_link_is_not_followed(published: Refreshed, tmp_path: Path) -> None:
    places = Places(tmp_path / "root")
    old, *_ = lay(places, published, 2)
    places.version(old).rename(tmp_path / "elsewhere")
    places.version(old).symlink_to(tmp_path / "elsewhere")
    assert not prune(places, 1)[1].removed
    assert (tmp_path / "elsewhere" / dataset.FACTS).exists()


def test_a_run_on_s3_is_there_for_others_to_see_before_its_first_checkpoint(
    s3_root: str, published: Refreshed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch", reason="torch is not installed; pip install -c constraints.txt -e '.[train]'")
    from conftest import SMALL_NETWORKS

    from model import data
    from model import run as runs
    from model.config import TrainConfig

    places = Places(s3_root)
    upload(published.folder, places.version(published.version), last=dataset.FACTS, progress=silent)
    pointer = (published.folder.parent / dataset.POINTER).read_bytes()
    (places.datasets / dataset.POINTER).write_bytes(pointer)

    def no_further(*args: object, **more: object) -> Path:
        raise IxiError("before the first step")

    monkeypatch.setattr(data, "load", no_further)
    with pytest.raises(IxiError, match="before the first step"):
        runs.train_run(runs.prepare(s3_root, TrainConfig.model_validate(SMALL_NETWORKS), "a", tmp_path))
    assert module.users(Places(s3_root, scratch=tmp_path / "another machine's")) == {published.version: ["run a"]}


def test_the_command_says_a_line_for_each_version(
    published: Refreshed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from flows.cli import main

    old, new = lay(Places(tmp_path), published, 2)
    for more, said in ((["--dry-run"], "would remove"), ([], "removed")):
        with pytest.raises(SystemExit):
            main(["prune", "--keep", "1", "--root", str(tmp_path), *more])
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"kept ixi-t1-t2@{new}: it is the latest (")
        assert lines[1].startswith(f"{said} ixi-t1-t2@{old}: older than the newest 1, and nothing uses it (")
    assert dataset.published(Places(tmp_path)) == [new]
