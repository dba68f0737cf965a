"""Faulty servers: each ends in the right archive or in one clear line, never in a wrong archive with the final name."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from answers import (
    NAME,
    PERMANENT_FAULTS,
    Fault,
    acquire,
    after_probe,
    assert_one_clear_line,
    close,
    crop,
    first,
    isolate_network,
    make_tar,
    md5,
    status,
)
from faults_table import Row
from servers import Answer, Call, Host, serve

from ixi_etl.errors import DownloadError
from ixi_etl.sources.catalog import Source

pytestmark = pytest.mark.faults


@pytest.fixture(autouse=True)
def _isolated_network(monkeypatch: pytest.MonkeyPatch, stranger: str) -> None:
    isolate_network(monkeypatch, stranger)


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_tar(tmp_path_factory.mktemp("tar"), 11)


def no_ranges(call: Call) -> None:
    call.plain(200, call.host.body)


PASSING: dict[str, Callable[[], Answer]] = {
    "reset every 40 KiB": lambda: after_probe(crop(40 << 10, Call.reset)),
    "cut short every 40 KiB": lambda: after_probe(crop(40 << 10, close)),
    "500s for a while": lambda: after_probe(first(2, status(500))),
    "503 and a reset for a while": lambda: first(1, status(503), first(1, Call.reset)),
    "no ranges": lambda: no_ranges,
}
"""Faults that a download overcomes without a mirror."""

ISSUE: dict[str, str] = {
    "403, then mirror": "403",
    "500s": "500 always",
    "stall": "stall",
    "stall midway": "stall midway",
    "a wrong Content-Range": "another range",
    "a wrong size in Content-Range": "another size",
    "a truncated body with 200": "stream cut short",
    "a truncated body with 200 of unknown length": "short, unknown length",
    "an HTML page": "HTML page",
    "an HTML page midway": "HTML page midway",
    "a redirect loop": "redirect loop",
    "a slow drip": "slow drip",
    "wrong length": "wrong length",
    "right length with a flipped byte": "wrong byte",
}
"""Permanent fault -> its name in `answers.PERMANENT_FAULTS`."""


class Watch(threading.Thread):
    """Check continuously that only the right file ever has the final name."""

    def __init__(self, path: Path, right: str) -> None:
        super().__init__(daemon=True)
        self.path, self.right, self.wrong, self.stop = path, right, 0, threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.002):
            try:
                self.wrong += md5(self.path.read_bytes()) != self.right
            except FileNotFoundError:
                continue


@pytest.fixture
def watched(tmp_path: Path, tar: bytes) -> Iterator[Watch]:
    watch = Watch(tmp_path / "got" / NAME, md5(tar))
    watch.start()
    yield watch
    watch.stop.set()
    watch.join()
    assert watch.wrong == 0, "a wrong archive had the final name"


@pytest.mark.parametrize("what", PASSING)
def test_bad_server_passing(what: str, watched: Watch, tar: bytes, row: Row) -> None:
    count = 20
    for n in range(count):
        with serve(Host(tar, PASSING[what]())) as host:
            source = Source(NAME, (host.url,), md5(tar) if n % 2 else None)
            # 10 tries, because a reset can discard bytes that were not read yet.
            acquire(source, watched.path.parent, connections=1 + n % 4, tries=10)
        assert watched.path.read_bytes() == tar
        for path in watched.path.parent.iterdir():
            path.unlink()
    row(f"server: {what}", count, "the right archive", "none")


@pytest.mark.parametrize("what", ISSUE)
def test_bad_server(what: str, watched: Watch, tar: bytes, row: Row) -> None:
    """With a mirror and without, from the first request or from a later one."""
    fault: Fault = PERMANENT_FAULTS[ISSUE[what]]
    rng, count, outcomes = random.Random(what), 10, Counter[str]()
    for n in range(count):
        answer = (
            first(rng.randrange(8), Call.correct, fault.answer) if fault.answer is not Call.correct else Call.correct
        )
        with serve(Host(fault.spoil(tar), answer, **fault.host)) as host, serve(Host(tar, etag='"m"')) as mirror:
            urls = (host.url, mirror.url) if n % 2 else (host.url,)
            try:
                found = acquire(Source(NAME, urls, md5(tar)), watched.path.parent, **fault.options)
                assert Path(found.location).read_bytes() == tar
                outcomes["the right archive"] += 1
            except DownloadError as error:
                assert n % 2 == 0, "the mirror got no request"
                assert_one_clear_line(str(error), watched.path.parent, host.url)
                outcomes["one line"] += 1
        for path in watched.path.parent.iterdir():
            path.unlink()
    row(f"server: {what}", count, ", ".join(f"{n} {what}" for what, n in sorted(outcomes.items())), "none")


def test_bad_server_mirror(watched: Watch, tar: bytes, row: Row) -> None:
    """Whatever the first server does, the mirror provides the file, and nothing else remains."""
    for fault in PERMANENT_FAULTS.values():
        with (
            serve(Host(tar, etag='"m"')) as mirror,
            serve(Host(fault.spoil(tar), fault.answer, **fault.host)) as host,
        ):
            source = Source(NAME, (host.url, mirror.url), md5(tar))
            found = acquire(source, watched.path.parent, **fault.options)
        assert (found.origin, watched.path.read_bytes()) == (mirror.url, tar)
        assert {p.name for p in watched.path.parent.iterdir()} == {NAME, f"{NAME}.json"}
        for path in watched.path.parent.iterdir():
            path.unlink()
    row("server: any permanent fault, and a mirror", len(PERMANENT_FAULTS), "the right archive", "none")


@pytest.mark.parametrize("length", ["the same", "another"])
def test_bad_server_changes(length: str, watched: Watch, tar: bytes, tmp_path: Path, row: Row) -> None:
    """The file changes between ranges: with an ETag and without an MD5, the result is one of the files, never a mix."""
    (tmp_path / "other").mkdir()
    new = make_tar(tmp_path / "other", 12, 600_000 if length == "the same" else 700_000)
    count, outcomes = 20, Counter[str]()
    for n in range(count):
        lock, calls = threading.Lock(), iter(range(10**6))

        def answer(call: Call, lock: threading.Lock = lock, calls: Iterator[int] = calls, switch: int = n) -> None:
            with lock:
                if next(calls) == switch + 1:
                    call.host.body, call.host.etag = new, '"second"'
                data = call.start()
            call.send(data)

        folder = tmp_path / f"{n}"
        with serve(Host(tar, answer)) as host:
            try:
                found = Path(acquire(Source(NAME, (host.url,), None), folder).location).read_bytes()
                assert found in (tar, new), "a mix of two files"
                outcomes["the old one" if found == tar else "the new one"] += 1
            except DownloadError as error:
                assert_one_clear_line(str(error), folder, host.url)
                outcomes["one line"] += 1
    text = ", ".join(f"{n} {what}" for what, n in sorted(outcomes.items()))
    row(f"server: the file changes to {length} length", count, text, "none")
