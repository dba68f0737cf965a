"""Downloads from real servers on loopback, honest and otherwise: the right file, or one line that says why not."""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trustme
from answers import (
    DRIP,
    FAULTS,
    LASTING,
    NAME,
    SEGMENT,
    after_probe,
    assert_one_clear_line,
    close,
    drip,
    drip_headers,
    first,
    flipped,
    half_of_who_knows,
    half_then,
    make_tar,
    md5,
    page,
    small,
    status,
    strange_etag,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples
from servers import PROBE, Answer, Call, Host, serve, served_as
from starlette.staticfiles import StaticFiles

from ixi_etl import catalog, transfer
from ixi_etl.catalog import Source
from ixi_etl.download import acquire, own_sources
from ixi_etl.errors import DownloadError
from ixi_etl.files import read_json
from ixi_etl.serve import serve_folder


@pytest.fixture(scope="session")
def tar(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_tar(tmp_path_factory.mktemp("tar"), 1)


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Another file of the same length."""
    return make_tar(tmp_path_factory.mktemp("other"), 2)


@pytest.fixture(scope="session")
def longer(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_tar(tmp_path_factory.mktemp("longer"), 3, 800_000)


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, stranger: str) -> None:
    small(monkeypatch, stranger)


def source_of(*hosts: Host, md5: str | None) -> Source:
    return Source(NAME, tuple(host.url for host in hosts), md5)


def segment_bytes(done: set[int] | list[int], size: int) -> int:
    return sum(min(SEGMENT, size - i * SEGMENT) for i in done)


def done_in(folder: Path) -> list[int]:
    return list((read_json(folder / f"{NAME}.part.json") or {}).get("done", []))


def left_in(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


# -- a whole download -------------------------------------------------------------------------------------------------


class Watched(StaticFiles):
    """Starlette's own server of files; the first four ranges are answered only when all four have been asked for."""

    asked: list[dict[str, Any]]
    four: asyncio.Barrier

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = {k.decode(): v.decode() for k, v in scope["headers"]}
        entry = {"method": scope["method"], "port": scope["client"][1], "sent": 0, **headers}
        self.asked.append(entry)
        if entry.get("range") != PROBE and sum(a.get("range") != PROBE for a in self.asked) <= 4:
            async with asyncio.timeout(30):
                await self.four.wait()

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                entry["etag"] = dict(message["headers"])[b"etag"].decode()
            entry["sent"] += len(message.get("body", b""))
            await send(message)

        await super().__call__(scope, receive, counted)


def test_whole_download_in_four_parallel_ranges(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tar: bytes) -> None:
    monkeypatch.setattr(Watched, "asked", [], raising=False)
    monkeypatch.setattr(Watched, "four", asyncio.Barrier(4), raising=False)
    monkeypatch.setattr("starlette.staticfiles.StaticFiles", Watched)
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / NAME).write_bytes(tar)
    seen: list[tuple[str, int, int, str]] = []
    with serve_folder(tmp_path / "served") as url:
        source = Source(NAME, (f"{url}/{NAME}",), md5(tar))
        found = acquire(source, tmp_path / "got", progress=lambda *args: seen.append(args))
    assert Path(found.location) == tmp_path / "got" / NAME
    assert Path(found.location).read_bytes() == tar
    assert (found.size, found.md5, found.checked, found.origin) == (len(tar), md5(tar), True, source.urls[0])
    assert left_in(tmp_path / "got") == {NAME, f"{NAME}.json"}

    ranges = [a for a in Watched.asked if a.get("range") != PROBE]
    assert len({a["port"] for a in ranges}) == 4
    assert {(a["method"], a.get("if-range")) for a in ranges} == {("GET", None)}  # the MD5 will judge
    assert found.validator == ranges[0]["etag"]
    assert sum(a["sent"] for a in ranges) == len(tar)
    assert max(a["sent"] for a in ranges) == SEGMENT

    fetched = [done for what, done, _, _ in seen if what == f"download {NAME}"]
    assert fetched == sorted(fetched)
    assert (fetched[0], fetched[-1]) == (0, len(tar))
    assert (f"verify {NAME}", len(tar), len(tar), "B") in seen


def test_redirects_are_followed(tmp_path: Path, tar: bytes) -> None:
    with serve(Host(tar)) as store, serve(Host(b"", lambda call: call.plain(302, location=store.url))) as host:
        found = acquire(source_of(host, md5=None), tmp_path)
    assert (found.origin, Path(found.location).read_bytes()) == (host.url, tar)
    assert {a.if_range for a in store.fetches} == {store.etag}


@pytest.mark.parametrize("says_length", [True, False])
def test_without_ranges_the_file_comes_in_one_stream(tmp_path: Path, tar: bytes, says_length: bool) -> None:
    with serve(Host(tar, ranges=False, says_length=says_length)) as host:
        found = acquire(source_of(host, md5=None), tmp_path)
    assert Path(found.location).read_bytes() == tar
    assert [a.sent for a in host.fetches] == [len(tar)]


def test_a_stream_cut_short_begins_again(tmp_path: Path, tar: bytes) -> None:
    answer = after_probe(first(2, half_then(close)))
    with serve(Host(tar, answer, ranges=False)) as host:
        found = acquire(source_of(host, md5=None), tmp_path)
    assert Path(found.location).read_bytes() == tar


def test_a_stream_that_begins_again_keeps_nothing_of_the_first_try(
    tmp_path: Path, tar: bytes, longer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(call: Call) -> None:
        call.head(200, {"connection": "close"})
        call.send(longer[:-512])
        call.stall()

    monkeypatch.setattr(transfer, "TIMEOUT_S", 0.3)
    monkeypatch.setattr(transfer, "TRIES", 6)
    with serve(Host(tar, after_probe(first(1, answer)), ranges=False, says_length=False)) as host:
        found = acquire(source_of(host, md5=None), tmp_path)
    assert Path(found.location).read_bytes() == tar


def test_a_stream_of_no_said_length_that_came_short_begins_again(tmp_path: Path, tar: bytes) -> None:
    answer = after_probe(first(2, half_of_who_knows))
    with serve(Host(tar, answer, ranges=False, says_length=False)) as host:
        found = acquire(source_of(host, md5=None), tmp_path)
    assert Path(found.location).read_bytes() == tar


def test_a_stream_of_no_said_length_that_always_comes_short_gets_no_final_name(tmp_path: Path, tar: bytes) -> None:
    with serve(Host(tar, after_probe(half_of_who_knows), ranges=False, says_length=False)) as host:
        with pytest.raises(DownloadError, match="no whole tar archive, 3 times") as caught:
            acquire(source_of(host, md5=None), tmp_path)
        assert_one_clear_line(str(caught.value), tmp_path, host.url)
        host.answer = Call.honest
        found = acquire(source_of(host, md5=None), tmp_path)
    assert Path(found.location).read_bytes() == tar


# -- stops and resumption ---------------------------------------------------------------------------------------------

CHILD = """
import sys
from pathlib import Path
from ixi_etl import download, transfer
from ixi_etl.catalog import Source
name, url, folder, segment = sys.argv[1:]
transfer.SEGMENT = int(segment)
download.acquire(Source(name, (url,), None), Path(folder))
"""


def kill_at(host: Host, folder: Path, segments: int) -> None:
    """Start a download in a process of its own; kill it when `segments` more are done and the next have started."""
    aim = len(done_in(folder)) + segments
    host.asked.clear()
    host.answer = after_probe(first(segments, Call.honest, half_then(Call.stall)))
    child = subprocess.Popen([sys.executable, "-c", CHILD, NAME, host.url, str(folder), str(SEGMENT)])
    give_up = time.monotonic() + 60
    try:
        while len(done_in(folder)) < aim or len(host.fetches) < segments + 4:
            assert child.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.005)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == -9
    assert len(done_in(folder)) == aim
    assert not (folder / NAME).exists()


def test_killed_downloads_go_on_from_the_segments_that_were_done(tmp_path: Path, tar: bytes) -> None:
    with serve(Host(tar)) as host:
        for segments in (2, 3):
            kill_at(host, tmp_path, segments)
        have = segment_bytes(done_in(tmp_path), len(tar))
        host.asked.clear()
        host.answer = Call.honest
        found = acquire(source_of(host, md5=None), tmp_path)
        assert Path(found.location).read_bytes() == tar
        assert host.sent == len(tar) - have
    assert left_in(tmp_path) == {NAME, f"{NAME}.json"}


@dataclass
class Unfinished:
    """A download that was stopped: the server, and the record that it left."""

    host: Host
    record: dict[str, Any]
    segments: int = field(init=False)

    def __post_init__(self) -> None:
        self.segments = -(-len(self.host.body) // SEGMENT)

    def lay(self, folder: Path, done: set[int], **changes: Any) -> None:
        """Put a `.part` there whose segments `done` are right and the others rubbish, with its record."""
        body, rubbish = self.host.body, b"\xa5" * SEGMENT
        parts = [body[i * SEGMENT : (i + 1) * SEGMENT] if i in done else rubbish for i in range(self.segments)]
        (folder / f"{NAME}.part").write_bytes(b"".join(parts)[: len(body)])
        (folder / f"{NAME}.part.json").write_text(json.dumps(self.record | {"done": sorted(done)} | changes))
        self.host.asked.clear()


@pytest.fixture(scope="module")
def unfinished(tar: bytes, stranger: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unfinished]:
    folder = tmp_path_factory.mktemp("unfinished")
    with serve(Host(tar)) as host:
        host.answer = after_probe(first(4, Call.honest, status(403)))
        with pytest.MonkeyPatch.context() as patch:
            small(patch, stranger)
            with pytest.raises(DownloadError):
                acquire(source_of(host, md5=None), folder, connections=1)
        host.answer = Call.honest
        assert done_in(folder) == [0, 1, 2, 3]
        yield Unfinished(host, read_json(folder / f"{NAME}.part.json"))


@given(data=st.data(), known=st.booleans())
@settings(max_examples=examples(10))
def test_any_set_of_done_segments_is_gone_on_from(
    unfinished: Unfinished, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, known: bool
) -> None:
    done = data.draw(st.sets(st.integers(0, unfinished.segments - 1)))
    folder, body = tmp_path_factory.mktemp("resume"), unfinished.host.body
    unfinished.lay(folder, done)
    found = acquire(source_of(unfinished.host, md5=md5(body) if known else None), folder)
    assert Path(found.location).read_bytes() == body
    assert unfinished.host.sent == len(body) - segment_bytes(done, len(body))
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "changes",
    [{"validator": '"older"'}, {"validator": None}, {"size": 10240}, {"segment": SEGMENT // 2}, {"url": "http://a/b"}],
    ids=str,
)
def test_a_record_of_another_file_is_not_resumed(
    unfinished: Unfinished, tmp_path: Path, changes: dict[str, Any]
) -> None:
    unfinished.lay(tmp_path, {0, 1, 2}, **changes)
    found = acquire(source_of(unfinished.host, md5=None), tmp_path)
    assert Path(found.location).read_bytes() == unfinished.host.body
    assert unfinished.host.sent == len(unfinished.host.body)


@pytest.mark.parametrize("record", ["", "{", "[]", "[1]", "5", "null", '{"done": [0, 1]}'])
def test_a_spoilt_record_is_not_resumed(unfinished: Unfinished, tmp_path: Path, record: str) -> None:
    unfinished.lay(tmp_path, set())
    (tmp_path / f"{NAME}.part.json").write_text(record)
    found = acquire(source_of(unfinished.host, md5=None), tmp_path)
    assert Path(found.location).read_bytes() == unfinished.host.body


@pytest.mark.parametrize("done", [5, None, "01", [[1]], [0, "a"], {"0": 1}], ids=str)
def test_a_record_that_does_not_say_what_is_done_is_not_resumed(
    unfinished: Unfinished, tmp_path: Path, done: Any
) -> None:
    unfinished.lay(tmp_path, set())
    (tmp_path / f"{NAME}.part.json").write_text(json.dumps(unfinished.record | {"done": done}))
    found = acquire(source_of(unfinished.host, md5=None), tmp_path)
    assert Path(found.location).read_bytes() == unfinished.host.body


def test_a_part_that_was_cut_short_is_not_resumed(unfinished: Unfinished, tmp_path: Path) -> None:
    unfinished.lay(tmp_path, {0, 1, 2, unfinished.segments - 1})
    os.truncate(tmp_path / f"{NAME}.part", SEGMENT)
    found = acquire(source_of(unfinished.host, md5=None), tmp_path)
    assert Path(found.location).read_bytes() == unfinished.host.body


def test_a_part_with_a_wrong_byte_is_fetched_anew(unfinished: Unfinished, tmp_path: Path) -> None:
    unfinished.lay(tmp_path, {0, 1, 2})
    part = tmp_path / f"{NAME}.part"
    part.write_bytes(flipped(part.read_bytes(), SEGMENT + 7))
    found = acquire(source_of(unfinished.host, md5=md5(unfinished.host.body)), tmp_path)
    assert Path(found.location).read_bytes() == unfinished.host.body


@pytest.mark.parametrize("known", [True, False])
def test_what_one_url_gave_is_used_at_another_only_if_the_md5_is_known(
    unfinished: Unfinished, tmp_path: Path, known: bool
) -> None:
    body = unfinished.host.body
    unfinished.lay(tmp_path, {0, 5, 6})
    with serve(Host(body, etag='"of the mirror"')) as mirror:
        found = acquire(source_of(mirror, md5=md5(body) if known else None), tmp_path)
    assert Path(found.location).read_bytes() == body
    assert mirror.sent == len(body) - (segment_bytes([0, 5, 6], len(body)) if known else 0)


def test_a_mirror_goes_on_from_where_the_host_failed(tmp_path: Path, tar: bytes) -> None:
    with serve(Host(tar)) as host, serve(Host(tar, etag='"of the mirror"')) as mirror:
        host.answer = after_probe(first(6, Call.honest, page))
        found = acquire(source_of(host, mirror, md5=md5(tar)), tmp_path, connections=1)
    assert Path(found.location).read_bytes() == tar
    assert found.origin == mirror.url
    assert mirror.sent == len(tar) - 6 * SEGMENT


def test_a_page_in_place_of_a_range_does_not_cost_what_was_done(tmp_path: Path, tar: bytes) -> None:
    with serve(Host(tar)) as host:
        host.answer = after_probe(first(6, Call.honest, page))
        portal = first(7, host.answer, page)
        host.answer = portal
        with pytest.raises(DownloadError, match="HTML page"):
            acquire(source_of(host, md5=None), tmp_path, connections=1)
        host.asked.clear()
        host.answer = Call.honest
        found = acquire(source_of(host, md5=None), tmp_path)
    assert Path(found.location).read_bytes() == tar
    assert host.sent == len(tar) - 6 * SEGMENT


def test_an_interrupt_keeps_what_was_done(tmp_path: Path, tar: bytes) -> None:
    def interrupt(what: str, done: int, total: int, unit: str) -> None:
        if done > 5 * SEGMENT:
            raise KeyboardInterrupt

    with serve(Host(tar)) as host:
        with pytest.raises(KeyboardInterrupt):
            acquire(source_of(host, md5=None), tmp_path, connections=1, progress=interrupt)
        assert done_in(tmp_path) == [0, 1, 2, 3, 4]
        host.asked.clear()
        found = acquire(source_of(host, md5=None), tmp_path)
    assert Path(found.location).read_bytes() == tar
    assert host.sent == len(tar) - 5 * SEGMENT


# -- servers that fail for a while ------------------------------------------------------------------------------------


def test_resets_every_few_tens_of_kib_do_not_end_it(tmp_path: Path, tar: bytes, monkeypatch: Any) -> None:
    def answer(call: Call) -> None:
        data = call.start()
        call.send(data[:40960])
        if len(data) > 40960:
            call.reset()

    monkeypatch.setattr(transfer, "SEGMENT", 10 * SEGMENT)
    with serve(Host(tar, after_probe(answer))) as host:
        found = acquire(source_of(host, md5=None), tmp_path)
    assert Path(found.location).read_bytes() == tar
    assert len(host.fetches) >= len(tar) // 40960


@pytest.mark.parametrize("when", [lambda a: a, after_probe], ids=["from the first", "midway"])
@pytest.mark.parametrize(
    "fault",
    [status(500), status(503), status(429), status(408), Call.reset, half_then(close), half_then(Call.reset)],
    ids=["500", "503", "429", "408", "reset", "cut short", "reset midway"],
)
def test_a_server_that_fails_a_few_times_is_asked_again(
    tmp_path: Path, tar: bytes, fault: Answer, when: Callable[[Answer], Answer]
) -> None:
    with serve(Host(tar, when(first(2, fault)))) as host, serve(Host(tar)) as mirror:
        found = acquire(source_of(host, mirror, md5=None), tmp_path)
    assert Path(found.location).read_bytes() == tar
    assert (found.origin, mirror.asked) == (host.url, [])


@pytest.mark.parametrize("fault", [Call.stall, half_then(Call.stall)], ids=["before headers", "midway"])
def test_a_stall_is_timed_out_and_tried_again(
    tmp_path: Path, tar: bytes, fault: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "TIMEOUT_S", 0.3)
    monkeypatch.setattr(transfer, "TRIES", 6)
    with serve(Host(tar, after_probe(first(3, fault)))) as host:
        found = acquire(source_of(host, md5=None), tmp_path)
    assert Path(found.location).read_bytes() == tar


def test_tries_wait_twice_as_long_each_time_with_jitter(
    tmp_path: Path, tar: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(transfer, "BACKOFF_S", 1.0)
    monkeypatch.setattr(transfer, "TRIES", 6)
    with serve(Host(tar, status(503))) as host, pytest.raises(DownloadError, match="6 times"):
        acquire(source_of(host, md5=None), tmp_path)
    assert len(host.asked) == 6
    shares = [wait / 2**n for n, wait in enumerate(waits)]
    assert len(set(shares)) == 5
    assert all(0.5 <= share <= 1.5 for share in shares)


@given(plan=st.lists(st.sampled_from(sorted(FAULTS)), max_size=12), ranges=st.booleans())
@settings(max_examples=examples(10))
def test_whatever_goes_wrong_for_a_while_the_file_is_right(
    tar: bytes, tmp_path_factory: pytest.TempPathFactory, plan: list[str], ranges: bool
) -> None:
    folder, todo = tmp_path_factory.mktemp("faults"), iter(plan)
    with pytest.MonkeyPatch.context() as patch, serve(Host(tar, ranges=ranges)) as host:
        patch.setattr(transfer, "TRIES", len(plan) + 1)
        patch.setattr(transfer, "BACKOFF_S", 0)
        host.answer = lambda call: FAULTS[next(todo, "none")](call)
        found = acquire(source_of(host, md5=None), folder)
    assert Path(found.location).read_bytes() == tar
    shutil.rmtree(folder)


class Crowded:
    """Answers so many requests at a time, and 503 to the others. One who gets through has what it asks in pieces."""

    def __init__(self, most: int, code: int = 503, **headers: str) -> None:
        self.most, self.busy, self.refusal = most, 0, status(code, **headers)
        self.refused, self.peak, self.changed = 0, 0, threading.Condition()

    def __call__(self, call: Call) -> None:
        with self.changed:
            full = self.busy >= self.most
            self.refused += full
            self.busy += not full
            self.changed.notify_all()
        if full:
            self.refusal(call)
            return
        try:
            data = call.start()
            with self.changed:  # the first ones last until others have been refused
                self.changed.wait_for(lambda: self.refused, 10)
            call.send(data[:-1])
        finally:
            with self.changed:
                self.busy -= 1
        call.send(data[-1:])  # whoever has all of it finds a place free


@pytest.mark.parametrize("code", [503, 429])
@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_server_that_allows_few_connections_gets_no_more_and_gives_the_file(
    tmp_path: Path, tar: bytes, most: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "TRIES", 2)
    crowded = Crowded(most, code)
    with serve(Host(tar, after_probe(crowded))) as host:
        found = acquire(source_of(host, md5=None), tmp_path, connections=8)
    assert Path(found.location).read_bytes() == tar
    assert host.sent < 2 * len(tar)
    assert crowded.refused <= 8


def test_two_archives_of_one_server_share_what_it_allows(
    tmp_path: Path, tar: bytes, other: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "TRIES", 2)
    with serve(Host(tar, after_probe(Crowded(1)), files={"/IXI-T2.tar": other})) as host:
        urls = {"IXI-T1.tar": host.url, "IXI-T2.tar": host.url.replace("T1", "T2")}
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(acquire, Source(name, (url,), None), tmp_path) for name, url in urls.items()]
            found = [Path(job.result().location).read_bytes() for job in jobs]
    assert found == [tar, other]


@pytest.mark.parametrize("length", [100, 3000, SEGMENT - 1])
@pytest.mark.parametrize("end", [close, Call.reset], ids=["close", "reset"])
def test_a_server_that_ends_each_connection_after_a_few_bytes_gives_the_file(
    tmp_path: Path, tar: bytes, length: int, end: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(call: Call) -> None:
        data = call.start()
        call.send(data[:length])
        if len(data) > length:
            end(call)

    monkeypatch.setattr(transfer, "TRIES", 20 if end is Call.reset else 2)  # a reset can cost what was not read yet
    size = min(len(tar), 40 * length)
    with serve(Host(tar[:size], after_probe(answer))) as host:
        found = acquire(source_of(host, md5=None), tmp_path)
    assert Path(found.location).read_bytes() == tar[:size]


def test_one_range_that_always_fails_ends_it_when_nothing_else_moves(tmp_path: Path, tar: bytes) -> None:
    others, sent, changed = set(range(-(-len(tar) // SEGMENT))) - {2}, Counter[str | None](), threading.Condition()

    def answer(call: Call) -> None:
        if (call.asked.range or "").startswith(f"bytes={2 * SEGMENT}-"):
            with changed:
                changed.wait_for(lambda: len(sent) == len(others), 10)
            call.reset()
            return
        call.honest()
        with changed:
            sent[call.asked.range] += 1
            changed.notify_all()

    with serve(Host(tar, after_probe(answer))) as host, pytest.raises(DownloadError, match="3 times at byte") as caught:
        acquire(source_of(host, md5=None), tmp_path)
    assert caught.value.transient
    assert set(done_in(tmp_path)) <= others
    assert len(done_in(tmp_path)) >= len(others) - 3  # of the other connections, which may have had a last byte to read


def http_date(seconds: float) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("said", "least", "most"),
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
def test_a_server_is_left_alone_for_as_long_as_it_asks_within_bounds(
    tmp_path: Path, tar: bytes, said: str | int, least: float, most: float, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`said`: as it stands in the header, or seconds from now, which are sent as a date."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(transfer, "BACKOFF_S", 1.0)
    value = said if isinstance(said, str) else http_date(said)
    with serve(Host(tar, first(1, status(code, retry_after=value)))) as host:
        acquire(source_of(host, md5=None), tmp_path)
    (wait,) = waits
    assert least <= wait <= most


def test_ranges_wait_as_long_as_the_server_asks(tmp_path: Path, tar: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(threading.Event, "wait", lambda self, timeout=None: waits.append(timeout or 0))
    with serve(Host(tar, after_probe(first(1, status(429, retry_after="7"))))) as host:
        found = acquire(source_of(host, md5=None), tmp_path, connections=1)
    assert Path(found.location).read_bytes() == tar
    assert 7 in waits


def test_after_a_failure_all_connections_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else eight connections that take turns at a busy server use up all tries in the time of one wait."""
    monkeypatch.setattr(transfer, "BACKOFF_S", 1000.0)
    monkeypatch.setattr(transfer, "MAX_WAIT_S", 1e6)
    tries = transfer._Tries(transfer._Server())
    assert tries.pause() == 0
    longest = 0.0  # waits are random: the second may end before the first
    for busy in (True, False):
        longest = max(longest, tries.failed(transfer.TransientError("failed", busy=busy), tries.begin()))
        assert 0.9 * longest < tries.pause() <= longest


def test_a_pause_that_the_server_asks_for_holds_for_all_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "MAX_WAIT_S", 1e6)
    tries = transfer._Tries(transfer._Server())
    began = tries.begin()
    tries.count(10**9)  # others bring bytes
    tries.failed(transfer.TransientError("503", busy=True, wait=1000), began)
    assert tries.pause() > 900


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_a_refusal_amid_the_ranges_is_tried_again(tmp_path: Path, tar: bytes, code: int) -> None:
    with serve(Host(tar, first(3, Call.honest, first(2, status(code))))) as host:
        found = acquire(source_of(host, md5=md5(tar)), tmp_path, connections=2)
    assert Path(found.location).read_bytes() == tar


def test_a_server_may_give_less_than_the_range_it_is_asked_for(tmp_path: Path, tar: bytes) -> None:
    def at_most_10_kb(call: Call) -> None:
        start, stop = (int(n) for n in (call.asked.range or "").removeprefix("bytes=").split("-"))
        stop = min(stop, start + 10_000 - 1)
        body, said = call.host.body[start : stop + 1], f"bytes {start}-{stop}/{len(call.host.body)}"
        call.plain(206, body, content_range=said, etag=call.host.etag or "")

    with serve(Host(tar, after_probe(at_most_10_kb))) as host:
        found = acquire(source_of(host, md5=md5(tar)), tmp_path)
    assert Path(found.location).read_bytes() == tar


# -- servers that do not give the file --------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["403", "HTML page midway", "500 always", "wrong byte"])
def test_a_url_that_does_not_give_the_file_is_left_for_the_mirror(tmp_path: Path, tar: bytes, what: str) -> None:
    fault = LASTING[what]
    with serve(Host(fault.spoil(tar), fault.answer, **fault.host)) as host, serve(Host(tar, etag='"m"')) as mirror:
        found = acquire(source_of(host, mirror, md5=md5(tar)), tmp_path)
    assert Path(found.location).read_bytes() == tar
    assert found.origin == mirror.url
    assert left_in(tmp_path) == {NAME, f"{NAME}.json"}


@pytest.mark.parametrize("what", LASTING)
def test_without_a_mirror_one_line_says_what_was_wrong(
    tmp_path: Path, tar: bytes, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = LASTING[what]
    for name, value in fault.constants.items():
        monkeypatch.setattr(transfer, name, value)
    with serve(Host(fault.spoil(tar), fault.answer, **fault.host)) as host:
        source = source_of(host, md5=md5(tar))
        with pytest.raises(DownloadError, match=f"{NAME}: .*{fault.reason}.*[Tt]ry again") as caught:
            acquire(source, tmp_path)
    assert_one_clear_line(str(caught.value), tmp_path, host.url, str(tmp_path / NAME))
    assert not (tmp_path / f"{NAME}.json").exists()


def test_a_first_block_that_drips_is_not_waited_for(
    tmp_path: Path, tar: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in DRIP.items():
        monkeypatch.setattr(transfer, name, value)
    with serve(Host(tar, drip)) as host, pytest.raises(DownloadError, match="slower than 1048576"):
        acquire(source_of(host, md5=None), tmp_path)
    assert host.fetches == []


def test_a_range_that_cannot_be_had_stops_the_others(tmp_path: Path, tar: bytes) -> None:
    def answer(call: Call) -> None:
        if call.asked.range == f"bytes={SEGMENT}-{2 * SEGMENT - 1}":
            call.plain(206, b"no", content_range="bytes 0-1/2")
        elif call.asked.range == f"bytes=0-{SEGMENT - 1}":
            data = call.start()
            for at in range(0, SEGMENT, 4096):
                call.send(data[at : at + 4096])
                call.host.closing.wait(0.02)
        else:
            call.honest()

    with serve(Host(tar, answer)) as host, pytest.raises(DownloadError, match="was given"):
        acquire(source_of(host, md5=None), tmp_path, connections=2)
    assert done_in(tmp_path) == []
    assert len(host.fetches) <= 2


def test_the_error_says_of_each_url_why_not(tmp_path: Path, tar: bytes) -> None:
    with serve(Host(tar, status(403))) as one, serve(Host(tar, page)) as two, serve(Host(tar, status(503))) as three:
        with pytest.raises(DownloadError) as caught:
            acquire(source_of(one, two, md5=md5(tar)), tmp_path)
        assert_one_clear_line(str(caught.value), tmp_path, f"{one.url}: 403", f"{two.url}: an HTML page")
        assert not caught.value.transient
        with pytest.raises(DownloadError) as caught:
            acquire(source_of(one, three, md5=md5(tar)), tmp_path)
        assert caught.value.transient


def test_a_host_that_is_not_there_is_left_for_the_mirror(tmp_path: Path, tar: bytes) -> None:
    with serve(Host(tar)) as gone:
        pass
    with serve(Host(tar)) as mirror:
        assert acquire(source_of(gone, mirror, md5=md5(tar)), tmp_path).origin == mirror.url


# -- certificates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("name", ["localhost", "elsewhere.example"])
def test_only_a_valid_certificate_is_accepted(
    tmp_path: Path, tar: bytes, authority: trustme.CA, monkeypatch: pytest.MonkeyPatch, trusted: bool, name: str
) -> None:
    if trusted:
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    else:
        monkeypatch.delenv("SSL_CERT_FILE")
    with serve(Host(tar), served_as(authority, name), "localhost") as host, serve(Host(tar)) as mirror:
        if trusted and name == "localhost":
            assert acquire(source_of(host, md5=None), tmp_path).origin == host.url
            return
        with pytest.raises(DownloadError, match="certificate is not valid") as caught:
            acquire(source_of(host, md5=md5(tar)), tmp_path)
        assert_one_clear_line(str(caught.value), tmp_path, host.url, "--insecure-host")
        assert acquire(source_of(host, mirror, md5=md5(tar)), tmp_path).origin == mirror.url
    assert host.asked == []


def test_insecure_hosts_lets_that_host_through_and_no_other(tmp_path: Path, tar: bytes, authority: trustme.CA) -> None:
    context = served_as(authority, "localhost", "127.0.0.1")
    with serve(Host(tar), context, "localhost") as named, serve(Host(tar), context, "127.0.0.1") as numbered:
        found = acquire(source_of(named, md5=None), tmp_path / "named", insecure_hosts=("localhost",))
        assert Path(found.location).read_bytes() == tar
        named.asked.clear()
        acquire(source_of(named, md5=None), tmp_path / "named", insecure_hosts=("localhost",))
        assert [a.method for a in named.asked] == ["HEAD"]
        with pytest.raises(DownloadError, match="certificate is not valid"):
            acquire(source_of(numbered, md5=None), tmp_path / "numbered", insecure_hosts=("localhost",))


@pytest.mark.parametrize("host", ["", "*", "*host", "localhost:1", "local host", "https://localhost"])
def test_what_is_not_the_name_of_one_host_turns_no_certificate_off(tmp_path: Path, host: str) -> None:
    with pytest.raises(DownloadError, match=f"--insecure-host {re.escape(repr(host))} is not the name") as caught:
        acquire(Source(NAME, ("https://localhost:9/IXI-T1.tar",), None), tmp_path, insecure_hosts=(host,))
    assert str(caught.value).isprintable()


def test_a_redirect_away_from_tls_is_not_followed(
    tmp_path: Path, tar: bytes, authority: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    with (
        serve(Host(tar)) as bare,
        serve(Host(b"", status(302, location=bare.url)), served_as(authority, "localhost"), "localhost") as host,
    ):
        with pytest.raises(DownloadError, match=f"from https to {bare.url}") as caught:
            acquire(source_of(host, md5=None), tmp_path)
        assert_one_clear_line(str(caught.value), tmp_path, host.url)
    assert bare.asked == []


# -- a file that changes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switch_at", [2, 5])
@pytest.mark.parametrize(
    ("etags", "honours_if_range", "length"),
    [
        (('"first"', '"second"'), True, "same"),
        (('"first"', '"second"'), True, "longer"),
        (('"first"', '"second"'), False, "same"),
        ((None, None), True, "same"),
        ((None, None), True, "longer"),
        (('W/"first"', 'W/"second"'), True, "same"),
    ],
)
def test_a_file_that_changes_midway_is_never_mixed(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tar: bytes,
    switch_at: int,
    honours_if_range: bool,
    etags: tuple[str | None, str | None],
    length: str,
) -> None:
    new: bytes = request.getfixturevalue({"same": "other", "longer": "longer"}[length])
    lock, calls = threading.Lock(), iter(range(1, 10**9))

    def answer(call: Call) -> None:
        with lock:
            if next(calls) == switch_at:
                host.body, host.etag = new, etags[1]
            data = call.start()
        call.send(data)

    with serve(Host(tar, answer, etags[0], honours_if_range=honours_if_range)) as host:
        for _ in range(2):
            try:
                found = acquire(source_of(host, md5=None), tmp_path)
            except DownloadError as error:
                assert_one_clear_line(str(error), tmp_path, host.url)
                continue
            break
    served_once = etags[0] is None or etags[0].startswith("W/")
    assert Path(found.location).read_bytes() == (tar if served_once and switch_at > 2 else new)


def node(call: Call, number: int) -> None:
    """Answer as one of several nodes, each of which has an ETag of its own."""
    with call.host.lock:
        call.host.etag = f'"node {number}"'
        data = call.start()
    call.send(data)


def by_turns() -> Answer:
    calls = iter(range(10**9))
    return lambda call: node(call, next(calls) % 2)


@pytest.mark.parametrize("honours_if_range", [True, False])
def test_nodes_with_etags_of_their_own_give_the_file_where_an_md5_judges(
    tmp_path: Path, tar: bytes, honours_if_range: bool
) -> None:
    with serve(Host(tar, by_turns(), honours_if_range=honours_if_range)) as host:
        found = acquire(source_of(host, md5=md5(tar)), tmp_path / "known")
        assert Path(found.location).read_bytes() == tar
        assert host.sent < 2 * len(tar)
        assert acquire(source_of(host, md5=md5(tar)), tmp_path / "known") == found
        with pytest.raises(DownloadError, match="changed while it was fetched, twice"):
            acquire(source_of(host, md5=None), tmp_path / "unknown")


def test_each_range_may_be_sent_to_another_node(tmp_path: Path, tar: bytes) -> None:
    with serve(Host(tar, etag='"one"')) as one, serve(Host(tar, etag='"two"')) as two:
        targets = itertools.cycle([one.url, two.url])
        with serve(Host(b"", lambda call: call.plain(302, location=next(targets)))) as host:
            found = acquire(source_of(host, md5=md5(tar)), tmp_path)
    assert Path(found.location).read_bytes() == tar
    assert one.sent + two.sent < 2 * len(tar)


def test_what_one_node_gave_before_a_stop_is_used_at_another(unfinished: Unfinished, tmp_path: Path) -> None:
    unfinished.lay(tmp_path, {0, 1, 5}, validator='"another node"')
    body = unfinished.host.body
    found = acquire(source_of(unfinished.host, md5=md5(body)), tmp_path)
    assert Path(found.location).read_bytes() == body
    assert unfinished.host.sent < len(body)


def test_a_mix_of_what_nodes_hold_is_fetched_again_from_scratch(tmp_path: Path, tar: bytes, other: bytes) -> None:
    """The file is replaced midway by the one whose MD5 is known."""
    calls = iter(range(10**9))

    def answer(call: Call) -> None:
        with call.host.lock:
            if next(calls) == 4:
                call.host.body, call.host.etag = tar, '"second"'
            data = call.start()
        call.send(data)

    with serve(Host(other, answer)) as host:
        found = acquire(source_of(host, md5=md5(tar)), tmp_path, connections=1)
    assert Path(found.location).read_bytes() == tar
    assert 2 * len(tar) <= host.sent < 3 * len(tar)


def test_a_node_that_always_holds_another_file_is_one_line(tmp_path: Path, tar: bytes, other: bytes) -> None:
    calls = iter(range(10**9))

    def answer(call: Call) -> None:
        with call.host.lock:
            stale = next(calls) % 2
            call.host.body, call.host.etag = (other if stale else tar), f'"{stale}"'
            data = call.start()
        call.send(data)

    with serve(Host(tar, answer)) as host, pytest.raises(DownloadError, match="changed while it was fetched") as caught:
        acquire(source_of(host, md5=md5(tar)), tmp_path)
    assert_one_clear_line(str(caught.value), tmp_path, host.url)


def test_an_etag_that_is_not_ascii_is_one_line_where_it_is_needed(tmp_path: Path, tar: bytes) -> None:
    with serve(Host(tar, strange_etag)) as host, pytest.raises(DownloadError, match="can't encode"):
        acquire(source_of(host, md5=None), tmp_path)


# -- a file that is here already --------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [True, False])
def test_a_verified_archive_costs_one_head_or_nothing_when_offline(tmp_path: Path, tar: bytes, known: bool) -> None:
    with serve(Host(tar)) as host:
        source = source_of(host, md5=md5(tar) if known else None)
        found = acquire(source, tmp_path)
        host.asked.clear()
        assert acquire(source, tmp_path) == found
        assert [a.method for a in host.asked] == ["HEAD"]
        host.asked.clear()
        assert acquire(source, tmp_path, offline=True) == found
        assert host.asked == []
    assert acquire(source, tmp_path) == found  # the host has gone


@pytest.mark.parametrize("fault", [drip_headers, status(302, location="http://a..b/")], ids=["drip", "redirect"])
def test_a_server_that_fails_at_the_head_leaves_the_verified_archive_in_use(
    tmp_path: Path, tar: bytes, fault: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(Host(tar)) as host:
        found = acquire(source_of(host, md5=None), tmp_path)
        monkeypatch.setattr(transfer, "TIMEOUT_S", 0.15)
        host.answer = fault
        assert acquire(source_of(host, md5=None), tmp_path) == found


def test_offline_with_nothing_there_is_an_error(tmp_path: Path, tar: bytes) -> None:
    with serve(Host(tar)) as host:
        with pytest.raises(DownloadError, match="without --offline") as caught:
            acquire(source_of(host, md5=md5(tar)), tmp_path, offline=True)
        assert_one_clear_line(str(caught.value), tmp_path)
        (tmp_path / NAME).write_bytes(flipped(tar, 600))
        with pytest.raises(DownloadError, match="not the right file"):
            acquire(source_of(host, md5=md5(tar)), tmp_path, offline=True)
        assert host.asked == []


@pytest.mark.parametrize("change", ["etag", "length"])
def test_a_changed_remote_is_fetched_again_unless_the_md5_is_the_published_one(
    tmp_path: Path, tar: bytes, other: bytes, longer: bytes, change: str
) -> None:
    with serve(Host(tar)) as host:
        kept = acquire(source_of(host, md5=md5(tar)), tmp_path / "kept")
        followed = acquire(source_of(host, md5=None), tmp_path / "followed")
        assert (kept.checked, followed.checked) == (True, False)
        host.body, host.etag = (other, '"second"') if change == "etag" else (longer, host.etag)
        host.asked.clear()
        assert acquire(source_of(host, md5=md5(tar)), tmp_path / "kept") == kept
        assert [a.method for a in host.asked] == ["HEAD"]
        acquire(source_of(host, md5=None), tmp_path / "followed")
    assert (tmp_path / "kept" / NAME).read_bytes() == tar
    assert (tmp_path / "followed" / NAME).read_bytes() == host.body


def test_a_changed_remote_that_fails_leaves_the_old_file_whole(tmp_path: Path, tar: bytes, other: bytes) -> None:
    with serve(Host(tar)) as host:
        acquire(source_of(host, md5=None), tmp_path)
        host.body, host.etag, host.answer = other, '"second"', after_probe(first(3, Call.honest, status(403)))
        with pytest.raises(DownloadError, match="403"):
            acquire(source_of(host, md5=None), tmp_path)
    assert (tmp_path / NAME).read_bytes() == tar


def test_a_file_touched_since_it_was_verified_is_not_trusted(tmp_path: Path, tar: bytes) -> None:
    with serve(Host(tar)) as host:
        source = source_of(host, md5=md5(tar))
        acquire(source, tmp_path)
        (tmp_path / NAME).write_bytes(flipped(tar, 500_000))
        found = acquire(source, tmp_path)
    assert Path(found.location).read_bytes() == tar


def test_the_file_of_one_unchecked_source_is_not_given_for_another(tmp_path: Path, tar: bytes, other: bytes) -> None:
    with serve(Host(tar, etag=None)) as one, serve(Host(other, etag=None)) as two:
        acquire(source_of(one, md5=None), tmp_path)
        with pytest.raises(DownloadError, match="without --offline"):
            acquire(source_of(two, md5=None), tmp_path, offline=True)
        found = acquire(source_of(two, md5=None), tmp_path)
    assert (found.origin, Path(found.location).read_bytes()) == (two.url, other)


def test_a_right_file_put_there_by_hand_is_adopted(
    tmp_path: Path, tar: bytes, unfinished: Unfinished, caplog: pytest.LogCaptureFixture
) -> None:
    unfinished.lay(tmp_path, {0, 1})
    (tmp_path / NAME).write_bytes(tar)
    source = source_of(unfinished.host, md5=md5(tar))
    found = acquire(source, tmp_path)
    assert (found.md5, found.checked) == (md5(tar), True)
    assert acquire(source, tmp_path) == found
    assert [a.method for a in unfinished.host.asked] == ["HEAD"]
    assert caplog.text == ""
    assert left_in(tmp_path) == {NAME, f"{NAME}.json"}


@pytest.mark.parametrize("record", ["", "[]", "null", '{"md5": 1}'])
def test_a_spoilt_record_of_a_right_file_is_made_again(
    unfinished: Unfinished, tmp_path: Path, tar: bytes, record: str
) -> None:
    (tmp_path / NAME).write_bytes(tar)
    (tmp_path / f"{NAME}.json").write_text(record)
    found = acquire(source_of(unfinished.host, md5=md5(tar)), tmp_path, offline=True)
    assert read_json(tmp_path / f"{NAME}.json")["stamp"] == found.stamp


def test_a_wrong_file_put_there_by_hand_is_replaced(tmp_path: Path, tar: bytes) -> None:
    (tmp_path / NAME).write_bytes(flipped(tar, 500_000))
    with serve(Host(tar)) as host:
        found = acquire(source_of(host, md5=md5(tar)), tmp_path)
    assert Path(found.location).read_bytes() == tar
    assert host.sent == len(tar)


# -- a person's own files ---------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path, tar: bytes, other: bytes) -> Path:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "IXI-T1.tar").write_bytes(tar)
    (folder / "IXI-T2.tar").write_bytes(other)
    return folder


def test_own_archives_are_used_where_they_lie(tmp_path: Path, own: Path, tar: bytes) -> None:
    got, seen = tmp_path / "got", Counter[str]()

    def count(what: str, done: int, total: int, unit: str) -> None:
        seen[what] += 1

    (own / "MD5SUMS").write_text("".join(f"{md5(p.read_bytes())}  {p.name}\n" for p in own.glob("*.tar")))
    sources = own_sources(str(own))
    found = {m: acquire(source, got, progress=count) for m, source in sources.items()}
    assert {m: f.location for m, f in found.items()} == {m: str(own / f"IXI-{m}.tar") for m in ("T1", "T2")}
    assert all(f.checked for f in found.values())
    assert found["T1"].md5 == md5(tar)
    assert left_in(got) == {"IXI-T1.tar.json", "IXI-T2.tar.json"}

    assert set(seen) == {"verify IXI-T1.tar", "verify IXI-T2.tar"}
    seen.clear()
    assert {m: acquire(source, got, progress=count, offline=True) for m, source in sources.items()} == found
    assert not seen  # nothing was read again

    stat = (own / NAME).stat()
    os.utime(own / NAME, ns=(stat.st_atime_ns, stat.st_mtime_ns - 10**9))
    assert acquire(sources["T1"], got, progress=count).md5 == md5(tar)
    assert seen["verify IXI-T1.tar"] > 0
    with open(own / NAME, "r+b") as file:
        file.seek(500_000)
        file.write(b"changed")
    os.utime(own / NAME, ns=(stat.st_atime_ns, stat.st_mtime_ns - 10**9))
    with pytest.raises(DownloadError, match="MD5SUMS"):
        acquire(sources["T1"], got)


def test_an_own_archive_without_md5sums_is_admitted_unchecked(tmp_path: Path, own: Path, tar: bytes) -> None:
    unchecked = acquire(own_sources(str(own))["T1"], tmp_path / "got")
    assert (unchecked.md5, unchecked.checked) == (md5(tar), False)
    (own / "MD5SUMS").write_text(f"{md5(tar)} *{NAME}\n{md5(b'')} *IXI-T2.tar\n")
    assert acquire(own_sources(str(own))["T1"], tmp_path / "got").checked


def test_an_own_archive_that_md5sums_contradicts_is_refused(tmp_path: Path, own: Path, other: bytes) -> None:
    source = own_sources(str(own))["T1"]
    acquire(source, tmp_path / "got")
    (own / "MD5SUMS").write_text(f"{md5(other)}  {NAME}\n{md5(other)}  IXI-T2.tar\n")
    with pytest.raises(DownloadError, match="MD5SUMS") as caught:
        acquire(own_sources(str(own))["T1"], tmp_path / "got")
    assert_one_clear_line(str(caught.value), tmp_path / "got", str(own / NAME), md5(other))


def test_an_own_archive_still_being_written_is_refused(tmp_path: Path, own: Path) -> None:
    def write_on(what: str, done: int, total: int, unit: str) -> None:
        if done <= total:
            with open(own / NAME, "ab") as file:
                file.write(b"more")

    with pytest.raises(DownloadError, match="changed while it was read"):
        acquire(own_sources(str(own))["T1"], tmp_path / "got", progress=write_on)
    assert left_in(tmp_path / "got") == set()


def test_an_own_archive_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="is not there; give a --source") as caught:
        acquire(own_sources(str(tmp_path / "none"))["T1"], tmp_path)
    assert_one_clear_line(str(caught.value), tmp_path, str(tmp_path / "none"))


@pytest.mark.parametrize("form", ["{}", "file://{}", "file://localhost{}"])
@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "device", "kernel"])
def test_an_own_archive_that_has_no_end_is_one_line(tmp_path: Path, own: Path, kind: str, form: str) -> None:
    (own / NAME).unlink()
    if kind.endswith("pipe"):
        os.mkfifo(own / ("pipe" if kind.startswith("link") else NAME))
    if kind != "pipe":
        (own / NAME).symlink_to({"device": "/dev/zero", "kernel": "/proc/self/clear_refs"}.get(kind, "pipe"))
    with pytest.raises(DownloadError, match=r"is (not a regular|an empty) file; give a --source") as caught:
        acquire(own_sources(form.format(own))["T1"], tmp_path / "got")
    assert_one_clear_line(str(caught.value), tmp_path / "got", str(own / NAME))


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_an_archive_that_grows_without_end_is_not_read_without_end(tmp_path: Path, own: Path, form: str) -> None:
    def write_on(what: str, done: int, total: int, unit: str) -> None:
        with open(own / NAME, "ab") as file:
            file.write(bytes(4 << 20))

    with pytest.raises(DownloadError, match="changed while it was read"):
        acquire(own_sources(form.format(own))["T1"], tmp_path / "got", progress=write_on)


def test_a_pipe_in_the_place_of_a_download_is_not_waited_for(tmp_path: Path, tar: bytes) -> None:
    os.mkfifo(tmp_path / NAME)
    with serve(Host(tar)) as host, pytest.raises(DownloadError, match="is not a regular file"):
        acquire(source_of(host, md5=md5(tar)), tmp_path)


def test_an_own_store_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"cannot read nosuch://store/IXI-T1.tar: .*nosuch") as caught:
        acquire(Source("IXI-T1.tar", ("nosuch://store/IXI-T1.tar",), None), tmp_path)
    assert_one_clear_line(str(caught.value), tmp_path)


@pytest.mark.parametrize("failures", [0, 2])
def test_md5sums_of_an_own_host_is_held_against_its_archives(tmp_path: Path, tar: bytes, failures: int) -> None:
    def answer(call: Call) -> None:
        call.plain(200, sums.encode()) if call.path == "/MD5SUMS" else call.honest()

    with serve(Host(tar, first(failures, status(503), answer))) as host:
        folder = host.url.rpartition("/")[0]
        sums = f"{md5(tar)}  IXI-T1.tar\n{md5(b'')}  IXI-T2.tar\n"
        sources = own_sources(folder)
        assert acquire(sources["T1"], tmp_path).checked
        with pytest.raises(DownloadError, match="MD5 is"):
            acquire(sources["T2"], tmp_path)
        host.asked.clear()
        assert own_sources(folder, offline=True)["T1"].md5 is None
        assert host.asked == []


def test_md5sums_is_read_whatever_its_server_calls_its_characters(tar: bytes) -> None:
    sums = f"{md5(tar)}  IXI-T1.tar\n{md5(tar)}  IXI-T2.tar\n".encode()
    with serve(Host(tar, lambda call: call.plain(200, sums, content_type="text/plain; charset=rot13"))) as host:
        assert own_sources(host.url)["T1"].md5 == md5(tar)


def test_md5sums_may_list_all_members_before_the_archives(tar: bytes) -> None:
    members = "".join(f"{n:032x}  IXI{n:03d}-Guys-{n:04d}-T1.nii.gz\n" for n in range(1500))
    sums = f"{members}{md5(tar)}  IXI-T1.tar\n{md5(tar)}  IXI-T2.tar\n".encode()
    with serve(Host(tar, lambda call: call.plain(200, sums))) as host:
        assert own_sources(host.url)["T1"].md5 == md5(tar)


def flood(call: Call) -> None:
    call.head(200, {"connection": "close"})
    while True:  # until the client goes
        call.send(b"#" * 65536)


def trickle(call: Call) -> None:
    call.head(200, {"connection": "close"})
    while not call.host.closing.wait(0.02):
        call.send(b"#")


@pytest.mark.parametrize("answer", [flood, trickle, drip_headers])
def test_md5sums_without_end_is_given_up(tar: bytes, answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in DRIP.items():
        monkeypatch.setattr(transfer, name, value)
    with serve(Host(tar, answer)) as host, pytest.raises(DownloadError, match=r"cannot use .*/MD5SUMS: "):
        own_sources(host.url)


def test_an_own_host_without_md5sums_is_admitted_unchecked(tmp_path: Path, tar: bytes) -> None:
    with serve(Host(tar, lambda call: call.plain(404) if call.path == "/MD5SUMS" else call.honest())) as host:
        source = own_sources(host.url)["T1"]
        assert source == source_of(host, md5=None)
        assert not acquire(source, tmp_path).checked


# -- the disk ---------------------------------------------------------------------------------------------------------


def test_too_little_disk_is_said_before_anything_is_fetched(
    tmp_path: Path, tar: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = len(tar) + transfer.SPARE_BYTES - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with serve(Host(tar)) as host, serve(Host(tar)) as mirror:
        source = source_of(host, mirror, md5=None)
        with pytest.raises(DownloadError, match=r"GB free, but IXI-T1.tar needs .* GB more") as caught:
            acquire(source, tmp_path)
        assert_one_clear_line(str(caught.value), tmp_path, str(tmp_path))
        assert (host.fetches, mirror.asked) == ([], [])
        assert all(p.stat().st_size == 0 for p in tmp_path.iterdir())
        free += 1
        acquire(source, tmp_path)


def test_what_is_there_already_needs_no_disk(
    unfinished: Unfinished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished.lay(tmp_path, {0, 1, 2})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=transfer.SPARE_BYTES + SEGMENT))
    acquire(source_of(unfinished.host, md5=None), tmp_path)


def test_a_full_disk_is_one_line_and_the_next_try_goes_on(
    tmp_path: Path, tar: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.pwrite

    def full(file: int, data: bytes, at: int) -> int:
        if at >= 7 * SEGMENT:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[:10_000], at)  # a disk may take less than it is given

    with serve(Host(tar)) as host:
        source = source_of(host, md5=None)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(DownloadError, match="No space left on device") as caught:
                acquire(source, tmp_path, connections=1)
        assert_one_clear_line(str(caught.value), tmp_path, str(tmp_path / NAME))
        assert done_in(tmp_path) == [0, 1, 2, 3, 4, 5, 6]
        host.asked.clear()
        assert Path(acquire(source, tmp_path).location).read_bytes() == tar
        assert host.sent == len(tar) - 7 * SEGMENT


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(DownloadError) as caught:
        acquire(Source(NAME, ("http://127.0.0.1:9/IXI-T1.tar",), md5(b"")), tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / NAME) in str(caught.value)


# -- the catalogue ----------------------------------------------------------------------------------------------------


def test_official_sources_have_their_md5_and_a_mirror() -> None:
    source = catalog.official(NAME)
    assert source.md5 == "34901a0593b41dd19c1a1f746eac2d58"
    assert source.over_http
    host, *mirrors = source.urls
    assert host.startswith("https://biomedic.doc.ic.ac.uk/")
    assert mirrors
    assert all(m.startswith("https://") and m.endswith(f"/{NAME}") and "biomedic" not in m for m in mirrors)


# -- the platform -----------------------------------------------------------------------------------------------------


def test_nothing_is_needed_that_only_linux_has(tmp_path: Path, tar: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fdatasync", "posix_fallocate", "posix_fadvise", "sched_getaffinity", "copy_file_range", "sendfile"):
        monkeypatch.delattr(os, name, raising=False)
    with serve(Host(tar)) as host:
        found = acquire(source_of(host, md5=None), tmp_path)
    assert Path(found.location).read_bytes() == tar
