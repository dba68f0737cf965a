"""The history of the benchmarks, and a measurement that is compared with it (`make bench-check`)."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

import pytest

from benchmarks import history, run
from benchmarks.machine import machine_class
from benchmarks.measure import Row, Settings

CHECKED = ("survey", "refresh", "reading", "step")
THEIR_RATIOS = (
    "survey, 200",
    *(f"refresh, 24 pairs, {how}" for how in ("as by default", "index", "anatomical")),
    "reading, first epoch",
    "training step on CPU",
)
COMPARED = "survey, compared with nibabel"


def row(times: float | None, what: str = "survey", peer: str = "nibabel") -> Row:
    return Row(what, peer, "1 s", "2 s", "2.0 x", "-", None, times=times)


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit, in which the history is kept."""
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    monkeypatch.setattr(history, "REPOSITORY", tmp_path)
    monkeypatch.setattr(history, "FOLDER", tmp_path / "history")
    monkeypatch.setattr(history, "PICTURE", tmp_path / "history.svg")
    return tmp_path


@pytest.mark.parametrize(("now", "fell"), [(3.0, False), (2.01, False), (2.0, True), (0.1, True), (9.0, False)])
def test_a_ratio_has_fallen_if_it_lost_a_third(now: float, fell: bool) -> None:
    found = history.fallen({"a": 3.0, "not measured now": 5.0}, {"a": now, "new": 0.1})
    assert found == ([f"a: {now:.2f} x, 3.00 x before"] if fell else [])


def test_only_rows_that_compare_times_are_kept() -> None:
    assert history.ratios([row(2.5), row(None, "memory")]) == {COMPARED: 2.5}


def test_a_commit_has_one_line_and_later_runs_of_it_add_to_it(repository: Path) -> None:
    said = history.record([row(2.5)], "2026-01-01", 0.1)
    assert "recorded 1 ratios" in said
    git(repository, "add", "history", "history.svg")
    history.record([row(3.0), row(4.0, "refresh")], "2026-01-02", 0.2)
    (line,) = history.read(machine_class())
    assert line["commit"] == git(repository, "log", "-1", "--format=%h")
    assert line["ratios"] == {COMPARED: 3.0, "refresh, compared with nibabel": 4.0}
    git(repository, "commit", "-q", "--allow-empty", "-m", "second")
    history.record([row(1.0)], "2026-01-03", 0.1)
    first, second = history.read(machine_class())
    assert (first, second["ratios"]) == (line, {COMPARED: 1.0})
    assert history.latest([first, second]) == {COMPARED: 1.0, "refresh, compared with nibabel": 4.0}
    assert (repository / "history.svg").read_text().startswith("<?xml")


def test_changed_code_and_code_outside_a_repository_are_not_recorded(
    repository: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "code.py").write_text("2")
    assert history.record([row(2.5)], "2026-01-01", 0.1).startswith("not recorded")
    monkeypatch.setattr(history, "REPOSITORY", tmp_path_factory.mktemp("elsewhere"))
    assert history.record([row(2.5)], "2026-01-01", 0.1).startswith("not recorded")
    assert not history.FOLDER.exists()


def test_the_recorded_lines_have_all_that_the_picture_shows(tmp_path: Path) -> None:
    names: set[str] = set()
    for path in history.FOLDER.glob("*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            assert set(line) == {"commit", "date", "load", "ratios"}
            assert all(value > 0 for value in line["ratios"].values())
            names |= set(line["ratios"])
    assert set(history.SHOWN) <= names
    history.draw(tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == history.PICTURE.read_bytes()


@pytest.mark.bench
def test_no_ratio_fell_by_a_third() -> None:
    from benchmarks.rows import ROWS

    before = history.latest(history.read(machine_class()))
    if not before:
        pytest.skip(f"no benchmark is recorded for {machine_class()}: run make bench")
    settings = Settings(runs=3, folder=str(Path(tempfile.gettempdir()) / "ixi-etl-bench"))
    now = history.ratios(row for name in CHECKED for row in ROWS[name](settings))
    assert {name for name in before if name.startswith(THEIR_RATIOS)} <= now.keys()  # a renamed row would be skipped
    assert not history.fallen(before, now)


def test_a_row_that_fails_costs_no_other_row(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(settings: Settings) -> list[Row]:
        raise RuntimeError("no such library")

    monkeypatch.setattr(run, "ROWS", {"broken": fail, "survey": lambda settings: [row(2.5)]})
    monkeypatch.setattr("sys.argv", ["run", "--folder", str(tmp_path / "in"), "--out", str(tmp_path / "table.md")])
    with pytest.raises(SystemExit, match=r"^not measured: broken; the reasons are above$"):
        run.main()
    assert "no such library" in capsys.readouterr().err
    assert "| survey | nibabel | 1 s" in (tmp_path / "table.md").read_text()
    [line] = history.read(machine_class())
    assert line["ratios"] == {COMPARED: 2.5}
