"""Downloads that are followed: the order of their segments, their common pace, and what has arrived."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from answers import HTTP, SEGMENT

from ixi_etl.core.http_options import HttpOptions
from ixi_etl.sources import arrivals
from ixi_etl.sources.arrivals import Arrival, keep_pace
from ixi_etl.sources.http import RemoteFile
from ixi_etl.sources.partial import PartialFile, Segment

RUNNING = threading.Event()  # that does not halt


class Download:
    """A download in progress, of some segments, of which the last is short."""

    def __init__(self, arrival: Arrival, segments: int, http: HttpOptions = HTTP) -> None:
        remote = RemoteFile(f"http://host/{arrival.path.name}", segments * SEGMENT - 10, '"first"', True, True)
        self.arrival, self.running = arrival, ExitStack()
        self.part = self.running.enter_context(PartialFile(arrival.path, remote, http))
        self.queue = [[segment] for segment in self.part.segments]
        self.running.enter_context(arrival.following(remote.url, self.part, http))

    def take(self, count: int = 1, halt: threading.Event = RUNNING) -> list[int]:
        """The next segments that would be requested."""
        groups: list[list[Segment]] = [self.arrival.take(self.queue, halt) for _ in range(count)]
        return [segment.index for group in groups for segment in group]

    def finish(self, *indices: int) -> None:
        self.part.done.update(indices)
        self.arrival.advanced()


Start = Callable[..., Download]


@pytest.fixture
def start() -> Iterator[Start]:
    """`Download` of the same arguments; ended after the test."""
    started: list[Download] = []

    def start(*arguments: Any) -> Download:
        started.append(Download(*arguments))
        return started[-1]

    yield start
    for download in started:
        download.running.close()


@pytest.fixture
def arrival(tmp_path: Path) -> Arrival:
    return Arrival(tmp_path / "IXI-T1.tar")


@pytest.fixture
def companion(arrival: Arrival, tmp_path: Path) -> Arrival:
    """Another file, which keeps pace with `arrival`."""
    other = Arrival(tmp_path / "IXI-T2.tar", arrival.changed)
    keep_pace([arrival, other])
    return other


def test_segments_come_in_the_order_of_the_file_unless_others_are_to_be_first(start: Start, arrival: Arrival) -> None:
    download = start(arrival, 7)
    assert download.take() == [0]
    arrival.fetch_first([(5 * SEGMENT - 1, 5 * SEGMENT + 1), (2 * SEGMENT, 3 * SEGMENT)])
    assert download.take(7) == [4, 5, 2, 1, 3, 6]


def test_a_halted_download_takes_no_more_segments(start: Start, arrival: Arrival) -> None:
    halt = threading.Event()
    halt.set()
    assert start(arrival, 2).take(2, halt) == []


def test_bytes_have_arrived_when_all_their_segments_are_done(start: Start, arrival: Arrival) -> None:
    assert not arrival.has(0, 1)
    download = start(arrival, 4)
    download.finish(1, 3)
    edges = [n * SEGMENT + by for n in range(1, 4) for by in (-1, 0, 1)]
    for first, stop in itertools.combinations([0, *edges, 4 * SEGMENT - 10], 2):
        touched = {byte // SEGMENT for byte in (*range(first, stop, SEGMENT), stop - 1)}
        assert arrival.has(first, stop) == (touched <= {1, 3})


def test_a_download_waits_for_a_companion_that_is_behind(start: Start, arrival: Arrival, companion: Arrival) -> None:
    ahead, behind, lead = start(arrival, 40), start(companion, 20), 2 * HTTP.connections
    assert ahead.take(lead + 1) == [*range(lead + 1)]
    received: list[int] = []
    waiting = threading.Thread(target=lambda: received.extend(ahead.take(3)))
    waiting.start()
    waiting.join(0.05)
    assert received == []
    behind.finish(0)  # as much as two segments of the other
    behind.finish(1)
    waiting.join(10)
    assert received == [*range(lead + 1, lead + 4)]


@pytest.mark.parametrize("how", ["ended", "stalls", "never started"])
def test_a_download_does_not_wait_for_a_companion_that_gets_nothing(
    how: str, start: Start, arrival: Arrival, companion: Arrival
) -> None:
    if how != "never started":
        other = start(companion, 40, replace(HTTP, timeout_s=0.0 if how == "stalls" else 20.0))
        if how == "ended":
            other.running.close()
    assert start(arrival, 40).take(40) == [*range(40)]


def test_received_bytes_make_a_companion_wait_again(
    start: Start, arrival: Arrival, companion: Arrival, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(arrivals.time, "monotonic", lambda: now[0])
    ahead = start(arrival, 40)
    ahead.take(20)
    start(companion, 40)
    now[0] = HTTP.timeout_s + 1
    assert not arrival._is_ahead(len(ahead.queue))
    companion.received()
    assert arrival._is_ahead(len(ahead.queue))


def test_after_a_failed_attempt_nothing_has_arrived(arrival: Arrival, tmp_path: Path) -> None:
    remote = RemoteFile("http://host/IXI-T1.tar", 4 * SEGMENT, '"first"', True, True)
    with PartialFile(arrival.path, remote, HTTP) as part:
        download = ExitStack()
        download.enter_context(arrival.following(remote.url, part, HTTP))
        part.done.update(range(4))
        assert arrival.has(0, SEGMENT)
        error = OSError("reset")
        assert not download.__exit__(OSError, error, None)
        assert not arrival.has(0, SEGMENT)


def test_arrived_bytes_are_read_before_and_after_the_file_gets_its_name(start: Start, arrival: Arrival) -> None:
    part = start(arrival, 3).part
    part.write(b"member", SEGMENT)
    assert arrival.read(SEGMENT, 6) == b"member"
    part.path.rename(arrival.path)
    assert arrival.read(SEGMENT, 6) == b"member"
    part.path.write_bytes(b"of another download")
    arrival.finish()
    assert arrival.has(0, 3 * SEGMENT)
    assert arrival.read(SEGMENT, 6) == b"member"
