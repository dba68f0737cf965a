"""When `look-after` starts a training; `tests/stack/test_notifications.py` runs it on a server."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows import announce, look_after
from ixi_etl.core.files import read_json, to_json
from ixi_etl.dataset.checks import held_by
from ixi_etl.dataset.metadata import with_digest
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.errors import DatasetError


@dataclass
class Server:
    """A Prefect server with runs of train-pix2pix, each just due, and events of failed checks."""

    runs: list[dict[str, Any]] = field(default_factory=list)  # their parameters
    events: list[dict[str, Any]] = field(default_factory=list)  # their payloads

    def read_flow_runs(self, **filters: Any) -> list[Any]:
        return [SimpleNamespace(parameters=given, expected_start_time=datetime.now(UTC)) for given in self.runs]

    def read_events(self, wanted: Any, limit: int) -> Any:
        assert (wanted.event.name, wanted.resource.id) == (["ixi.dataset.checks_failed"], ["ixi.dataset.ixi-t1-t2"])
        return SimpleNamespace(events=[SimpleNamespace(payload=payload) for payload in self.events])

    def emit(self, event: str, resource: dict[str, str], payload: dict[str, Any]) -> None:
        assert (event, resource["prefect.resource.id"]) == ("ixi.dataset.checks_failed", "ixi.dataset.ixi-t1-t2")
        self.events.append(payload)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setattr(look_after, "get_client", lambda **_: nullcontext(server))
    monkeypatch.setattr(announce, "emit_event", server.emit)
    return server


@pytest.fixture
def started(server: Server, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The parameters and key of each training that would be started."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(look_after, "run_deployment", lambda _, **given: calls.append(given))
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
    fail_checks(refreshed)
    assert held_by(refreshed.folder) == ["funnel_change"]
    assert look_after.train_missing(str(tmp_path), None, -1) is None
    assert started == []


def test_root_without_versions_starts_nothing(started: list[dict[str, Any]], tmp_path: Path) -> None:
    assert look_after.train_missing(str(tmp_path), None, -1) is None
    assert started == []


@pytest.mark.parametrize(
    ("given", "counts"),
    [
        ({"dataset": "ixi-t1-t2@VERSION"}, True),
        ({"dataset": "VERSION"}, True),
        ({"dataset": "@VERSION"}, True),
        ({"dataset": "ixi-t1-t2@VERSION", "preset": "digits"}, True),
        ({"dataset": "ixi-t1-t2@VERSION", "root": "ROOT/"}, True),
        ({"dataset": "ixi-t1-t2@VERSION", "root": "ROOT/other"}, False),
        ({"dataset": "ixi-t1-t2@0123456789ab"}, False),
        ({"dataset": "digits@VERSION"}, False),
        ({}, True),
        ({"root": "ROOT/other"}, False),
        ({"dataset": "ixi-t1-t2@latest", "preset": "smoke"}, True),
        ({"preset": "digits"}, False),
        ({"preset": "of an older ixi-etl"}, False),
        ({"settings": {"steps": 1}}, True),
        ({"settings": {"dataset": "ixi-t1-t2@VERSION"}}, True),
        ({"settings": {"dataset": "ixi-t1-t2@VERSION"}, "preset": "digits"}, True),
        ({"settings": {"dataset": "ixi-t1-t2@0123456789ab"}}, False),
        ({"settings": {"dataset": "ixi-t1-t2@VERSION"}, "dataset": "ixi-t1-t2@0123456789ab"}, False),
    ],
)
def test_only_a_flow_run_on_the_version_of_this_root_counts(
    given: dict[str, Any],
    counts: bool,
    started: list[dict[str, Any]],
    server: Server,
    refreshed: PublishedVersion,
    tmp_path: Path,
) -> None:
    text = to_json({"dataset": None, "preset": "paper", "root": "ROOT", "settings": None} | given)
    stored = tmp_path / "parameters.json"
    stored.write_text(text.replace("VERSION", refreshed.version).replace("ROOT", str(tmp_path)))
    server.runs = [read_json(stored)]
    assert look_after.train_missing(str(tmp_path), None, -1) == (None if counts else refreshed.version)
    assert len(started) == (not counts)


def test_a_damaged_pointer_fails_look_after(
    started: list[dict[str, Any]], refreshed: PublishedVersion, tmp_path: Path
) -> None:
    (refreshed.folder.parent / "latest.json").write_text('{"half')
    for look in (look_after.train_missing, look_after.tell_failed_checks):
        with pytest.raises(DatasetError, match=r"/latest.json is damaged; `.*refresh.*` rewrites it$"):
            look(str(tmp_path), None, -1)
    assert started == []


# -- failed checks of which nobody was told ---------------------------------------------------------------------------


def fail_checks(refreshed: PublishedVersion, held: bool = True) -> None:
    failure = {"name": "funnel_change", "value": 0.4, "at_least": None, "at_most": 0.1, "unit": "share"}
    compared = {"failed": [failure], "held_by": ["funnel_change"] if held else []}
    (refreshed.folder / "compared.json").write_text(to_json(with_digest(compared)))


def publish_at(refreshed: PublishedVersion, *ages: timedelta) -> None:
    times = [(datetime.now(UTC) - age).isoformat() for age in ages]
    history = [{"version": refreshed.version, "published": time} for time in times]
    (refreshed.folder.parent / "latest.json").write_text(to_json({**history[-1], "history": history}))


@pytest.mark.parametrize("held", [True, False])
def test_failed_checks_without_an_event_are_told_once(
    held: bool, server: Server, refreshed: PublishedVersion, tmp_path: Path
) -> None:
    elsewhere = {"version": refreshed.version, "root": str(tmp_path / "other")}
    before = {"version": "0123456789ab", "root": str(tmp_path)}
    server.events = [elsewhere, before]
    fail_checks(refreshed, held)
    assert look_after.tell_failed_checks(str(tmp_path), None, -1) == [f"ixi-t1-t2@{refreshed.version}"]
    told = {"version": refreshed.version, "root": str(tmp_path), "held": held}
    assert server.events == [elsewhere, before, told | {"failed": "funnel_change: 0.4, limit at most 0.1"}]
    assert look_after.tell_failed_checks(f"{tmp_path}/", None, -1) == []


@pytest.mark.parametrize("through", [Path("link"), Path()], ids=["a link", "a relative path"])
def test_a_root_is_the_same_by_another_path(
    through: Path, server: Server, refreshed: PublishedVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    fail_checks(refreshed)
    server.events = [{"version": refreshed.version, "root": str(tmp_path)}]
    assert look_after.tell_failed_checks(str(through), None, -1) == []
    server.runs = [{"dataset": f"ixi-t1-t2@{refreshed.version}", "root": str(through)}]
    fail_checks(refreshed, held=False)
    assert look_after.train_missing(str(tmp_path), None, -1) is None


def test_a_damaged_dataset_hides_no_failed_check_of_another(
    server: Server, refreshed: PublishedVersion, tmp_path: Path
) -> None:
    fail_checks(refreshed)
    for name in ("digits", "ixi-pd-t1-t2"):  # before and after
        (tmp_path / "datasets" / name).mkdir()
        (tmp_path / "datasets" / name / "latest.json").write_text('{"half')
    with pytest.raises(DatasetError, match=r"latest.json is damaged"):
        look_after.tell_failed_checks(str(tmp_path), None, -1)
    assert [event["version"] for event in server.events] == [refreshed.version]


def test_a_version_without_failed_checks_is_not_told(
    server: Server, refreshed: PublishedVersion, tmp_path: Path
) -> None:
    assert look_after.tell_failed_checks(str(tmp_path), None, -1) == []
    assert look_after.tell_failed_checks(str(tmp_path / "empty"), None, -1) == []
    assert server.events == []


@pytest.mark.parametrize(
    ("ages", "is_told"),
    [
        ((timedelta(minutes=14),), False),  # its event may still arrive
        ((timedelta(minutes=16),), True),
        ((timedelta(days=5, hours=23),), True),
        ((timedelta(days=7),), False),  # the server may have deleted its event
        ((timedelta(days=7), timedelta(minutes=16)), False),
    ],
)
def test_failed_checks_are_told_while_the_server_knows_whether_they_were(
    ages: tuple[timedelta, ...], is_told: bool, server: Server, refreshed: PublishedVersion, tmp_path: Path
) -> None:
    fail_checks(refreshed)
    publish_at(refreshed, *ages)
    assert bool(look_after.tell_failed_checks(str(tmp_path), None, 15)) == is_told
    assert len(server.events) == is_told
