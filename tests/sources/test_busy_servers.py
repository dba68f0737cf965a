"""A busy server gets fewer requests, and none until the time that its Retry-After gives."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from answers import (
    acquire,
    after_probe,
    first,
    source_of,
    status,
)
from servers import Call, Host, serve

from ixi_etl.core.http_options import HttpOptions
from ixi_etl.sources.catalog import Source
from ixi_etl.sources.retries import RetryPolicy, ServerLoad, TransientError

pytest_plugins = ["downloads"]
pytestmark = pytest.mark.usefixtures("isolated_network")


class Crowded:
    """Answers `limit` requests at a time, and refuses the others."""

    def __init__(self, limit: int, code: int = 503, **headers: str) -> None:
        self.limit, self.busy, self.refusal = limit, 0, status(code, **headers)
        self.refused, self.peak, self.changed = 0, 0, threading.Condition()

    def __call__(self, call: Call) -> None:
        with self.changed:
            full = self.busy >= self.limit
            self.refused += full
            self.busy += not full
            self.changed.notify_all()
        if full:
            self.refusal(call)
            return
        try:
            data = call.start()
            with self.changed:  # hold these responses until other requests have been refused
                self.changed.wait_for(lambda: self.refused, 10)
            call.send(data[:-1])
        finally:
            with self.changed:
                self.busy -= 1
        call.send(data[-1:])  # the slot is free before the client has the whole response


@pytest.mark.parametrize("code", [503, 429])
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_download_adapts_to_the_connections_that_a_server_allows(
    tmp_path: Path, tar: bytes, limit: int, code: int
) -> None:
    crowded = Crowded(limit, code)
    with serve(Host(tar, after_probe(crowded))) as host:
        found = acquire(source_of(host, md5=None), tmp_path, connections=8, tries=2)
    assert Path(found.location).read_bytes() == tar
    assert host.sent < 2 * len(tar)
    assert crowded.refused <= 8


def test_two_archives_share_the_connection_limit_of_a_server(tmp_path: Path, tar: bytes, other: bytes) -> None:
    with serve(Host(tar, after_probe(Crowded(1)), files={"/IXI-T2.tar": other})) as host:
        urls = {"IXI-T1.tar": host.url, "IXI-T2.tar": host.url.replace("T1", "T2")}
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(acquire, Source(name, (url,), None), tmp_path, tries=2) for name, url in urls.items()]
            found = [Path(job.result().location).read_bytes() for job in jobs]
    assert found == [tar, other]


def http_date(seconds: float) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("retry_after", "least", "most"),
    [
        ("7", 7, 7),
        ("0", 0, 1.5),
        ("100000", 60, 60),
        ("9" * 5000, 60, 60),
        (30, 1.6, 31),
        (10**6, 60, 60),
        (-100, 0, 1.5),
        ("soon", 0, 1.5),
        ("-5", 0, 1.5),
        ("Fri, 99 Foo 2026", 0, 1.5),
    ],
    ids=lambda value: str(value)[:12],
)
@pytest.mark.parametrize("code", [503, 429])
def test_retry_after_is_obeyed_within_bounds(
    tmp_path: Path,
    tar: bytes,
    retry_after: str | int,
    least: float,
    most: float,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`retry_after` is the header, or seconds from now, which are sent as a date."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    value = retry_after if isinstance(retry_after, str) else http_date(retry_after)
    with serve(Host(tar, first(1, status(code, retry_after=value)))) as host:
        acquire(source_of(host, md5=None), tmp_path, backoff_s=1.0)
    (wait,) = waits
    assert least <= wait <= most


def test_ranges_obey_retry_after(tmp_path: Path, tar: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(threading.Event, "wait", lambda self, timeout=None: waits.append(timeout or 0))
    with serve(Host(tar, after_probe(first(1, status(429, retry_after="7"))))) as host:
        found = acquire(source_of(host, md5=None), tmp_path, connections=1)
    assert Path(found.location).read_bytes() == tar
    assert 7 in waits


def test_failure_pauses_all_connections() -> None:
    """Otherwise eight connections that take turns at a busy server use up all tries in the time of one wait."""
    policy = RetryPolicy(ServerLoad(), HttpOptions(backoff_s=1000.0, max_wait_s=1e6))
    assert policy.remaining_pause() == 0
    longest = 0.0  # waits are random: the second may end before the first
    for busy in (True, False):
        wait = policy.record_failure(TransientError("failed", busy=busy), policy.start_attempt())
        longest = max(longest, wait)
        assert 0.9 * longest < policy.remaining_pause() <= longest


def test_retry_after_pauses_all_connections() -> None:
    policy = RetryPolicy(ServerLoad(), HttpOptions(max_wait_s=1e6))
    attempt = policy.start_attempt()
    policy.add_saved(10**9)  # by other connections
    policy.record_failure(TransientError("503", busy=True, wait_s=1000), attempt)
    assert policy.remaining_pause() > 900
