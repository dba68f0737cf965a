"""A download in parallel ranges, or in one stream from a server without ranges."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path
from typing import Any

import pytest
from answers import (
    NAME,
    SEGMENT,
    acquire,
    after_probe,
    assert_one_clear_line,
    close,
    finished_segments,
    first,
    half_of_unknown_length,
    half_then,
    md5,
    names_in,
    source_of,
)
from servers import PROBE, Answer, Call, Host, serve
from starlette.staticfiles import StaticFiles

from ixi_etl.errors import DownloadError
from ixi_etl.sources.catalog import Source
from ixi_etl.testing.loopback import serve_folder

pytest_plugins = ["downloads"]
pytestmark = pytest.mark.usefixtures("isolated_network")


class Watched(StaticFiles):
    """Starlette's static file server; it answers the first four range requests when all four have arrived."""

    requests: list[dict[str, Any]]
    four: asyncio.Barrier

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = {k.decode(): v.decode() for k, v in scope["headers"]}
        entry = {"method": scope["method"], "port": scope["client"][1], "sent": 0, **headers}
        self.requests.append(entry)
        if entry.get("range") != PROBE and sum(r.get("range") != PROBE for r in self.requests) <= 4:
            async with asyncio.timeout(30):
                await self.four.wait()

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                entry["etag"] = dict(message["headers"])[b"etag"].decode()
            entry["sent"] += len(message.get("body", b""))
            await send(message)

        await super().__call__(scope, receive, counted)


def test_whole_file_is_downloaded_in_four_parallel_ranges(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tar: bytes
) -> None:
    monkeypatch.setattr(Watched, "requests", [], raising=False)
    monkeypatch.setattr(Watched, "four", asyncio.Barrier(4), raising=False)
    monkeypatch.setattr("starlette.staticfiles.StaticFiles", Watched)
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / NAME).write_bytes(tar)
    events: list[tuple[str, int, int, str]] = []
    with serve_folder(tmp_path / "served") as url:
        source = Source(NAME, (f"{url}/{NAME}",), md5(tar))
        found = acquire(source, tmp_path / "downloaded", progress=lambda *args: events.append(args))
    assert Path(found.location) == tmp_path / "downloaded" / NAME
    assert Path(found.location).read_bytes() == tar
    assert (found.size, found.md5, found.checked, found.origin) == (len(tar), md5(tar), True, source.urls[0])
    assert names_in(tmp_path / "downloaded") == {NAME, f"{NAME}.json"}

    ranges = [r for r in Watched.requests if r.get("range") != PROBE]
    assert len({r["port"] for r in ranges}) == 4
    assert {(r["method"], r.get("if-range")) for r in ranges} == {("GET", None)}  # the MD5 is verified
    assert found.validator == ranges[0]["etag"]
    assert sum(r["sent"] for r in ranges) == len(tar)
    assert max(r["sent"] for r in ranges) == SEGMENT

    fetched = [done for what, done, _, _ in events if what == f"download {NAME}"]
    assert fetched == sorted(fetched)
    assert (fetched[0], fetched[-1]) == (0, len(tar))
    assert (f"verify {NAME}", len(tar), len(tar), "B") in events


def test_server_may_send_less_than_the_requested_range(tmp_path: Path, tar: bytes) -> None:
    def at_most_10_kb(call: Call) -> None:
        start, stop = (int(n) for n in (call.logged.range or "").removeprefix("bytes=").split("-"))
        stop = min(stop, start + 10_000 - 1)
        body, content_range = call.host.body[start : stop + 1], f"bytes {start}-{stop}/{len(call.host.body)}"
        call.plain(206, body, content_range=content_range, etag=call.host.etag or "")

    with serve(Host(tar, after_probe(at_most_10_kb))) as host:
        found = acquire(source_of(host, md5=md5(tar)), tmp_path)
    assert Path(found.location).read_bytes() == tar


def test_failed_range_stops_the_others(tmp_path: Path, tar: bytes) -> None:
    def answer(call: Call) -> None:
        if call.logged.range == f"bytes={SEGMENT}-{2 * SEGMENT - 1}":
            call.plain(206, b"no", content_range="bytes 0-1/2")
        elif call.logged.range == f"bytes=0-{SEGMENT - 1}":
            data = call.start()
            for offset in range(0, SEGMENT, 4096):
                call.send(data[offset : offset + 4096])
                call.host.closing.wait(0.02)
        else:
            call.correct()

    with serve(Host(tar, answer)) as host, pytest.raises(DownloadError, match=r"requested bytes .* received"):
        acquire(source_of(host, md5=None), tmp_path, connections=2)
    assert finished_segments(tmp_path) == []
    assert len(host.fetches) <= 2


@pytest.mark.parametrize("sends_length", [True, False])
def test_server_without_ranges_sends_one_stream(tmp_path: Path, tar: bytes, sends_length: bool) -> None:
    with serve(Host(tar, ranges=False, sends_length=sends_length)) as host:
        found = acquire(source_of(host, md5=None), tmp_path)
    assert Path(found.location).read_bytes() == tar
    assert [r.sent for r in host.fetches] == [len(tar)]


def whole_file_beyond(length: int) -> Answer:
    """Serve a range of up to `length` bytes, and the whole file if more is requested, as some caches do."""

    def answer(call: Call) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", call.logged.range or "")
        if found and int(found[2]) - int(found[1]) >= length:
            call.logged.range = None
        call.correct()

    return answer


@pytest.mark.parametrize(("has_md5", "etag"), [(True, '"a"'), (True, None), (False, '"a"'), (False, None)])
def test_a_server_that_serves_only_short_ranges_sends_one_stream(
    tmp_path: Path, tar: bytes, has_md5: bool, etag: str | None
) -> None:
    with serve(Host(tar, whole_file_beyond(512), etag=etag)) as host:
        found = acquire(source_of(host, md5=md5(tar) if has_md5 else None), tmp_path)
    assert Path(found.location).read_bytes() == tar


def test_a_stream_replaces_the_finished_segments(tmp_path: Path, tar: bytes) -> None:
    answer = after_probe(first(2, Call.correct, then=whole_file_beyond(512)))
    with serve(Host(tar, answer)) as host:
        found = acquire(source_of(host, md5=None), tmp_path, connections=1)
    assert Path(found.location).read_bytes() == tar


def test_truncated_stream_is_restarted(tmp_path: Path, tar: bytes) -> None:
    answer = after_probe(first(2, half_then(close)))
    with serve(Host(tar, answer, ranges=False)) as host:
        found = acquire(source_of(host, md5=None), tmp_path)
    assert Path(found.location).read_bytes() == tar


def test_restarted_stream_keeps_no_bytes_of_the_first_attempt(tmp_path: Path, tar: bytes, longer: bytes) -> None:
    def answer(call: Call) -> None:
        call.head(200, {"connection": "close"})
        call.send(longer[:-512])
        call.stall()

    with serve(Host(tar, after_probe(first(1, answer)), ranges=False, sends_length=False)) as host:
        found = acquire(source_of(host, md5=None), tmp_path, timeout_s=0.3, tries=6)
    assert Path(found.location).read_bytes() == tar


def test_truncated_stream_of_unknown_length_is_restarted(tmp_path: Path, tar: bytes) -> None:
    answer = after_probe(first(2, half_of_unknown_length))
    with serve(Host(tar, answer, ranges=False, sends_length=False)) as host:
        found = acquire(source_of(host, md5=None), tmp_path)
    assert Path(found.location).read_bytes() == tar


def test_stream_of_unknown_length_that_is_always_truncated_gets_no_final_name(tmp_path: Path, tar: bytes) -> None:
    with serve(Host(tar, after_probe(half_of_unknown_length), ranges=False, sends_length=False)) as host:
        with pytest.raises(DownloadError, match="not a complete tar archive, 3 times") as caught:
            acquire(source_of(host, md5=None), tmp_path)
        assert_one_clear_line(str(caught.value), tmp_path, host.url)
        host.answer = Call.correct
        found = acquire(source_of(host, md5=None), tmp_path)
    assert Path(found.location).read_bytes() == tar


def test_download_needs_no_linux_only_function(tmp_path: Path, tar: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fdatasync", "posix_fallocate", "posix_fadvise", "sched_getaffinity", "copy_file_range", "sendfile"):
        monkeypatch.delattr(os, name, raising=False)
    with serve(Host(tar)) as host:
        found = acquire(source_of(host, md5=None), tmp_path)
    assert Path(found.location).read_bytes() == tar
