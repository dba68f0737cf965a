"""When `look-after` starts a training; `tests/stack/test_notifications.py` runs it on a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows import look_after
from ixi_etl.core.files import read_json, to_json
from ixi_etl.dataset.checks import held_by
from ixi_etl.dataset.metadata import with_digest
from ixi_etl.dataset.publish import PublishedVersion


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The parameters and key of each training that would be started, on a server that has no runs."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(look_after, "run_deployment", lambda _, **given: calls.append(given))
    monkeypatch.setattr(look_after, "_has_flow_run", lambda *_: False)
    return calls


def test_latest_version_without_a_training_gets_one(
    started: list[dict[str, Any]], refreshed: PublishedVersion, tmp_path: Path
) -> None:
    assert look_after.train_missing(str(tmp_path), None, -1) == refreshed.version
    [call] = started
    assert call["parameters"] == {"dataset": f"ixi-t1-t2@{refreshed.version}", "root": str(tmp_path)}
    assert call["idempotency_key"].startswith(f"train:{tmp_path}:{refreshed.version}:20")


def test_event_has_time_to_start_the_training(
    started: list[dict[str, Any]], refreshed: PublishedVersion, tmp_path: Path
) -> None:
    assert look_after.train_missing(str(tmp_path), None, 1e6) is None
    assert started == []


def test_version_with_a_training_run_gets_no_other(
    started: list[dict[str, Any]], refreshed: PublishedVersion, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "config.json").write_text(to_json({"config": {"dataset": f"ixi-t1-t2@{refreshed.version}"}}))
    assert look_after.train_missing(str(tmp_path), None, -1) is None
    assert started == []


def test_held_version_is_not_trained(
    started: list[dict[str, Any]], refreshed: PublishedVersion, tmp_path: Path
) -> None:
    assert held_by(refreshed.folder) == []
    path = refreshed.folder / "compared.json"
    path.write_text(to_json(with_digest(read_json(path) | {"held_by": ["funnel_change"]})))
    assert held_by(refreshed.folder) == ["funnel_change"]
    assert look_after.train_missing(str(tmp_path), None, -1) is None
    assert started == []


def test_root_without_versions_starts_nothing(started: list[dict[str, Any]], tmp_path: Path) -> None:
    assert look_after.train_missing(str(tmp_path), None, -1) is None
    assert started == []
