"""Bad servers: each ends in the right archive or in one clear line, never in a wrong archive under the final name."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from answers import (
    LASTING,
    NAME,
    Fault,
    after_probe,
    assert_one_clear_line,
    close,
    first,
    make_tar,
    md5,
    small,
    status,
)
from faults_table import Row
from servers import Answer, Call, Host, serve

from ixi_etl.catalog import Source
from ixi_etl.download import acquire
from ixi_etl.errors import DownloadError

pytestmark = pytest.mark.faults


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, stranger: str) -> None:
    small(monkeypatch, stranger)


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_tar(tmp_path_factory.mktemp("tar"), 11)


def every(length: int, end: Answer) -> Answer:
    """Right bytes, but no more than so many to a connection."""

    def answer(call: Call) -> None:
        data = call.start()
        call.send(data[:length])
        if len(data) > length:
            end(call)

    return after_probe(answer)


def no_ranges(call: Call) -> None:
    call.plain(200, call.host.body)


PASSING: dict[str, Callable[[], Answer]] = {
    "reset every 40 KiB": lambda: every(40 << 10, Call.reset),
    "cut short every 40 KiB": lambda: every(40 << 10, close),
    "500s for a while": lambda: after_probe(first(2, status(500))),
    "503 and a reset for a while": lambda: first(1, status(503), first(1, Call.reset)),
    "no ranges": lambda: no_ranges,
}
"""What is got over without a mirror."""

ISSUE: dict[str, str] = {
    "403, then mirror": "403",
    "500s": "500 always",
    "stall": "stall",
    "stall midway": "stall midway",
    "a wrong Content-Range": "another range",
    "a wrong size in Content-Range": "another size",
    "a truncated body with 200": "stream cut short",
    "a truncated body with 200 of no said length": "short, length not said",
    "an HTML page": "HTML page",
    "an HTML page midway": "HTML page midway",
    "a redirect loop": "redirect loop",
    "a slow drip": "slow drip",
    "wrong length": "wrong length",
    "right length with a flipped byte": "wrong byte",
}
"""What does not pass -> its name in `answers.LASTING`."""


class Watch(threading.Thread):
    """Looks at the final name all the time: what stands there is right, or nothing does."""

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
    assert watch.wrong == 0, "a wrong archive stood under the final name"


@pytest.mark.parametrize("what", PASSING)
def test_bad_server_passing(what: str, watched: Watch, tar: bytes, monkeypatch: pytest.MonkeyPatch, row: Row) -> None:
    count = 20
    monkeypatch.setattr("ixi_etl.transfer.TRIES", 10)  # a reset can cost what had come, and was not read yet
    for n in range(count):
        with serve(Host(tar, PASSING[what]())) as host:
            source = Source(NAME, (host.url,), md5(tar) if n % 2 else None)
            acquire(source, watched.path.parent, connections=1 + n % 4)
        assert watched.path.read_bytes() == tar
        for path in watched.path.parent.iterdir():
            path.unlink()
    row(f"server: {what}", count, "the right archive", "none")


@pytest.mark.parametrize("what", ISSUE)
def test_bad_server(what: str, watched: Watch, tar: bytes, monkeypatch: pytest.MonkeyPatch, row: Row) -> None:
    """With a mirror and without, from the first request or from a later one."""
    fault: Fault = LASTING[ISSUE[what]]
    for name, value in fault.constants.items():
        monkeypatch.setattr(f"ixi_etl.transfer.{name}", value)
    rng, count, outcomes = random.Random(what), 10, Counter[str]()
    for n in range(count):
        answer = first(rng.randrange(8), Call.honest, fault.answer) if fault.answer is not Call.honest else Call.honest
        with serve(Host(fault.spoil(tar), answer, **fault.host)) as host, serve(Host(tar, etag='"m"')) as mirror:
            urls = (host.url, mirror.url) if n % 2 else (host.url,)
            try:
                found = acquire(Source(NAME, urls, md5(tar)), watched.path.parent)
                assert Path(found.location).read_bytes() == tar
                outcomes["the right archive"] += 1
            except DownloadError as error:
                assert n % 2 == 0, "the mirror was not asked"
                assert_one_clear_line(str(error), watched.path.parent, host.url)
                outcomes["one line"] += 1
        for path in watched.path.parent.iterdir():
            path.unlink()
    row(f"server: {what}", count, ", ".join(f"{n} {what}" for what, n in sorted(outcomes.items())), "none")


def test_bad_server_mirror(watched: Watch, tar: bytes, row: Row) -> None:
    """Whatever a server does from the first request on, the mirror gives the file, and nothing else is left."""
    for fault in LASTING.values():
        with pytest.MonkeyPatch.context() as patch, serve(Host(tar, etag='"m"')) as mirror:
            for name, value in fault.constants.items():
                patch.setattr(f"ixi_etl.transfer.{name}", value)
            with serve(Host(fault.spoil(tar), fault.answer, **fault.host)) as host:
                found = acquire(Source(NAME, (host.url, mirror.url), md5(tar)), watched.path.parent)
        assert (found.origin, watched.path.read_bytes()) == (mirror.url, tar)
        assert {p.name for p in watched.path.parent.iterdir()} == {NAME, f"{NAME}.json"}
        for path in watched.path.parent.iterdir():
            path.unlink()
    row("server: whatever lasts, and a mirror", len(LASTING), "the right archive", "none")


@pytest.mark.parametrize("length", ["the same", "another"])
def test_bad_server_changes(length: str, watched: Watch, tar: bytes, tmp_path: Path, row: Row) -> None:
    """The file changes between ranges: with an ETag and without a known MD5, it is one or the other, never a mix."""
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
    said = ", ".join(f"{n} {what}" for what, n in sorted(outcomes.items()))
    row(f"server: the file changes to {length} length", count, said, "none")
