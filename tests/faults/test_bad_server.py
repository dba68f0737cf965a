"""A download from a faulty server ends in the right archive or in one clear line, never in a wrong archive."""

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
def _isolated_network(monkeypatch: pytest.MonkeyPatch, unrelated_ca: str) -> None:
    isolate_network(monkeypatch, unrelated_ca)


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_tar(tmp_path_factory.mktemp("tar"), 11)


def ignore_ranges(call: Call) -> None:
    call.plain(200, call.host.body)


RECOVERABLE: dict[str, Callable[[], Answer]] = {
    "reset every 40 KiB": lambda: after_probe(crop(40 << 10, Call.reset)),
    "cut short every 40 KiB": lambda: after_probe(crop(40 << 10, close)),
    "500s for a while": lambda: after_probe(first(2, status(500))),
    "503 and a reset for a while": lambda: first(1, status(503), first(1, Call.reset)),
    "no ranges": lambda: ignore_ranges,
}
"""Faults that a download overcomes without a mirror."""

PERMANENT: dict[str, str] = {
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
"""Name in the table -> name in `answers.PERMANENT_FAULTS`."""


class Watcher(threading.Thread):
    """Count in a loop how often a file other than the right one has the final name."""

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
def watcher(tmp_path: Path, tar: bytes) -> Iterator[Watcher]:
    watcher = Watcher(tmp_path / "downloads" / NAME, md5(tar))
    watcher.start()
    yield watcher
    watcher.stop.set()
    watcher.join()
    assert watcher.wrong == 0, "a wrong archive had the final name"


@pytest.mark.parametrize("fault_name", RECOVERABLE)
def test_a_download_recovers_without_a_mirror(fault_name: str, watcher: Watcher, tar: bytes, row: Row) -> None:
    count = 20
    for n in range(count):
        with serve(Host(tar, RECOVERABLE[fault_name]())) as host:
            source = Source(NAME, (host.url,), md5(tar) if n % 2 else None)
            # 10 tries, because a reset can discard bytes that were not read yet.
            acquire(source, watcher.path.parent, connections=1 + n % 4, tries=10)
        assert watcher.path.read_bytes() == tar
        for path in watcher.path.parent.iterdir():
            path.unlink()
    row(f"server: {fault_name}", count, "the right archive", "none")


@pytest.mark.parametrize("fault_name", PERMANENT)
def test_a_permanent_fault_is_one_line_unless_there_is_a_mirror(
    fault_name: str, watcher: Watcher, tar: bytes, row: Row
) -> None:
    """With a mirror and without, from the first request or from a later one."""
    fault: Fault = PERMANENT_FAULTS[PERMANENT[fault_name]]
    rng, count, outcomes = random.Random(fault_name), 10, Counter[str]()
    for n in range(count):
        answer = (
            first(rng.randrange(8), Call.correct, fault.answer) if fault.answer is not Call.correct else Call.correct
        )
        with serve(Host(fault.spoil(tar), answer, **fault.host)) as host, serve(Host(tar, etag='"m"')) as mirror:
            urls = (host.url, mirror.url) if n % 2 else (host.url,)
            try:
                found = acquire(Source(NAME, urls, md5(tar)), watcher.path.parent, **fault.options)
                assert Path(found.location).read_bytes() == tar
                outcomes["the right archive"] += 1
            except DownloadError as error:
                assert n % 2 == 0, "the mirror got no request"
                assert_one_clear_line(str(error), watcher.path.parent, host.url)
                outcomes["one line"] += 1
        for path in watcher.path.parent.iterdir():
            path.unlink()
    text = ", ".join(f"{n} {outcome}" for outcome, n in sorted(outcomes.items()))
    row(f"server: {fault_name}", count, text, "none")


def test_a_mirror_provides_the_file_after_any_permanent_fault(watcher: Watcher, tar: bytes, row: Row) -> None:
    """No other file remains in the folder."""
    for fault in PERMANENT_FAULTS.values():
        with (
            serve(Host(tar, etag='"m"')) as mirror,
            serve(Host(fault.spoil(tar), fault.answer, **fault.host)) as host,
        ):
            source = Source(NAME, (host.url, mirror.url), md5(tar))
            found = acquire(source, watcher.path.parent, **fault.options)
        assert (found.origin, watcher.path.read_bytes()) == (mirror.url, tar)
        assert {p.name for p in watcher.path.parent.iterdir()} == {NAME, f"{NAME}.json"}
        for path in watcher.path.parent.iterdir():
            path.unlink()
    row("server: any permanent fault, and a mirror", len(PERMANENT_FAULTS), "the right archive", "none")


@pytest.mark.parametrize("length", ["the same", "another"])
def test_a_file_that_changes_during_a_download_is_never_mixed(
    length: str, watcher: Watcher, tar: bytes, tmp_path: Path, row: Row
) -> None:
    """With an ETag and without an MD5, the result is one of the two files."""
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
    text = ", ".join(f"{n} {outcome}" for outcome, n in sorted(outcomes.items()))
    row(f"server: the file changes to {length} length", count, text, "none")
