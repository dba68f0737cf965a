"""Correct and faulty responses of servers, and helpers for tests that download small files from them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from servers import PROBE, Answer, Call, Host

from ixi_etl.config import RefreshConfig
from ixi_etl.core.files import read_json
from ixi_etl.core.http_options import HttpOptions
from ixi_etl.core.progress import Progress, no_progress
from ixi_etl.sources import cache
from ixi_etl.sources.catalog import Source
from ixi_etl.testing.phantom import write_tar

NAME = "IXI-T1.tar"
SEGMENT = 1 << 16

HTTP = HttpOptions(tries=3, backoff_s=0.0005, timeout_s=20.0, min_rate=1, segment_bytes=SEGMENT)
"""Options for files of a few hundred KB."""


class SegmentedConfig(RefreshConfig):
    """A refresh that downloads in segments of `segment_bytes`, so that small archives have many."""

    segment_bytes: int = SEGMENT

    @property
    def http(self) -> HttpOptions:
        return replace(super().http, segment_bytes=self.segment_bytes)


def acquire(source: Source, folder: Path, *, progress: Progress = no_progress, **options: Any) -> cache.VerifiedFile:
    """`cache.acquire` with the options `HTTP`, changed by `options`."""
    return cache.acquire(source, folder, http=replace(HTTP, **options), progress=progress)


def source_of(*hosts: Host, md5: str | None) -> Source:
    return Source(NAME, tuple(host.url for host in hosts), md5)


def finished_segments(folder: Path) -> list[int]:
    return list((read_json(folder / f"{NAME}.part.json") or {}).get("done", []))


def names_in(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def make_tar(folder: Path, seed: int, length: int = 600_000) -> bytes:
    write_tar(folder / NAME, {"IXI002-Guys-0828-T1.nii.gz": random.Random(seed).randbytes(length)})
    return (folder / NAME).read_bytes()


def segment_bytes(done: set[int] | list[int], size: int) -> int:
    """Total size of some segments of a file of `size` bytes."""
    return sum(min(SEGMENT, size - i * SEGMENT) for i in done)


@dataclass
class Unfinished:
    """An interrupted download: the server, and the record of its finished segments."""

    host: Host
    record: dict[str, Any]
    segments: int = field(init=False)

    def __post_init__(self) -> None:
        self.segments = -(-len(self.host.body) // SEGMENT)

    def restore(self, folder: Path, done: set[int], **changes: Any) -> None:
        """Write a `.part` file in which only the segments `done` are correct, and its record, with `changes`."""
        body, wrong = self.host.body, b"\xa5" * SEGMENT
        parts = [body[i * SEGMENT : (i + 1) * SEGMENT] if i in done else wrong for i in range(self.segments)]
        (folder / f"{NAME}.part").write_bytes(b"".join(parts)[: len(body)])
        (folder / f"{NAME}.part.json").write_text(json.dumps(self.record | {"done": sorted(done)} | changes))
        self.host.requests.clear()


def isolate_network(patch: pytest.MonkeyPatch, authorities: str) -> None:
    """Ignore proxies, and trust only the certificates of a file of authorities."""
    patch.setenv("SSL_CERT_FILE", authorities)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        patch.delenv(name, raising=False)


# -- responses ---------------------------------------------------------------------------------------------------------


def status(code: int, **headers: str) -> Answer:
    return lambda call: call.plain(code, b"no", **headers)


def page(call: Call) -> None:
    call.plain(200, b"<!DOCTYPE html>\n<html><body>Please sign in</body></html>" * 20, content_type="text/html")


def crop(length: int, end: Answer) -> Answer:
    """Send the first `length` bytes of each response; end the connection if the response is longer."""

    def answer(call: Call) -> None:
        data = call.start()
        call.send(data[:length])
        if len(data) > length:
            end(call)

    return answer


def half_then(end: Answer) -> Answer:
    def answer(call: Call) -> None:
        data = call.start()
        call.send(data[: len(data) // 2])
        end(call)

    return answer


def close(call: Call) -> None:
    call.close_connection = True


def drip(call: Call) -> None:
    for i in range(len(data := call.start())):
        call.send(data[i : i + 1])
        if call.host.closing.wait(0.01):
            break


def redirect_to_self(call: Call) -> None:
    call.plain(302, location=call.path)


def wrong_range(change: Callable[[int, int, int], str]) -> Answer:
    def answer(call: Call) -> None:
        start, stop = (int(n) for n in (call.logged.range or PROBE).removeprefix("bytes=").split("-"))
        content_range = change(start, stop, len(call.host.body))
        call.plain(206, call.host.body[start : stop + 1], content_range=content_range, etag=call.host.etag or "")

    return answer


def empty_range(call: Call) -> None:
    start, stop = (call.logged.range or "").removeprefix("bytes=").split("-")
    call.plain(206, content_range=f"bytes {start}-{stop}/{len(call.host.body)}", etag=call.host.etag or "")


def half_of_unknown_length(call: Call) -> None:
    call.head(200, {"connection": "close"})
    call.send(call.host.body[: len(call.host.body) // 2])
    call.close_connection = True


def drip_headers(call: Call) -> None:
    call.wfile.write(b"HTTP/1.1 200 OK\r\nx: ")
    while not call.host.closing.wait(0.02):
        call.wfile.write(b"a")


def endless_hints(call: Call) -> None:
    while not call.host.closing.wait(0.02):
        call.wfile.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")


def escape_sequence_in_status(call: Call) -> None:
    call.wfile.write(b"HTTP/1.1 403 \x1b[31mNo\r\ncontent-length: 0\r\n\r\n")


def non_ascii_etag(call: Call) -> None:
    call.plain(206, call.host.body[:512], content_range=f"bytes 0-511/{len(call.host.body)}", etag='"\xff"')


def after_probe(answer: Answer) -> Answer:
    return lambda call: call.correct() if call.logged.range == PROBE else answer(call)


def first(n: int, faulty: Answer, then: Answer = Call.correct) -> Answer:
    """Answer the first `n` requests with one response, later ones with another."""
    calls = iter(range(10**9))
    return lambda call: (faulty if next(calls) < n else then)(call)


def flip_bit(data: bytes, offset: int) -> bytes:
    return data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]


@dataclass
class Fault:
    """A server that never provides the right file.

    Attributes:
        answer: its response.
        reason: pattern of the error message.
        options: changes of `HTTP`.
        host: arguments of `Host`.
        spoil: damages the served file.
    """

    answer: Answer
    reason: str
    options: dict[str, Any] = field(default_factory=dict)
    host: dict[str, Any] = field(default_factory=dict)
    spoil: Callable[[bytes], bytes] = bytes


QUICK: dict[str, Any] = {"timeout_s": 0.5, "tries": 1}  # a correct response takes less, also on a busy machine
DRIP: dict[str, Any] = QUICK | {"min_rate": 1 << 20}
PERMANENT_FAULTS = {
    "403": Fault(status(403), "403 Forbidden"),
    "404": Fault(status(404), "404 Not Found"),
    "410": Fault(status(410), "410 Gone"),
    "403 midway": Fault(after_probe(first(3, Call.correct, status(403))), "403 Forbidden"),
    "500 always": Fault(status(500), "500 Internal Server Error, 3 times"),
    "429 always": Fault(after_probe(status(429)), "429 Too Many Requests, 3 times"),
    "HTML page": Fault(page, "an HTML page in place of a tar"),
    "HTML page midway": Fault(first(5, Call.correct, page), "an HTML page in place of a tar"),
    "not a tar": Fault(Call.correct, "not a tar archive", spoil=lambda tar: tar[::-1]),
    "empty file": Fault(Call.correct, "416", spoil=lambda tar: b""),
    "redirect loop": Fault(redirect_to_self, "redirects"),
    "redirect to an empty label": Fault(status(302, location="http://a..b/"), "label empty or too long"),
    "redirect to a long label": Fault(status(302, location=f"http://{'a' * 70}/"), "label too long"),
    "an ETag that is not ASCII": Fault(non_ascii_etag, "requested bytes .* received"),
    "escape sequence in the status": Fault(escape_sequence_in_status, r"403 \\x1b\[31mNo"),
    "redirect to FTP": Fault(status(302, location="ftp://127.0.0.1/IXI-T1.tar"), "protocol"),
    "wrong byte": Fault(Call.correct, "MD5 is [0-9a-f]{32}, not", spoil=lambda tar: flip_bit(tar, 500_000)),
    "wrong byte in a stream": Fault(Call.correct, "MD5 is", host={"ranges": False}, spoil=lambda t: flip_bit(t, 9999)),
    "wrong length": Fault(Call.correct, "MD5 is [0-9a-f]{32}, not", spoil=lambda tar: tar + bytes(10240)),
    "short, unknown length": Fault(
        Call.correct, "MD5 is", host={"ranges": False, "sends_length": False}, spoil=lambda tar: tar[:-20480]
    ),
    "another range": Fault(
        after_probe(wrong_range(lambda start, stop, size: f"bytes {start + 512}-{stop + 512}/{size}")),
        "requested bytes .* received",
    ),
    "a size that would fill the disk": Fault(
        wrong_range(lambda start, stop, size: f"bytes {start}-{stop}/{10**15}"), r"a file of 1e\+15 bytes"
    ),
    "a size of zero": Fault(wrong_range(lambda start, stop, size: f"bytes {start}-{stop}/0"), "an empty file"),
    "a size of 5000 digits": Fault(wrong_range(lambda start, stop, size: f"bytes {start}-{stop}/{'9' * 5000}"), "MD5"),
    "another size": Fault(
        after_probe(wrong_range(lambda start, stop, size: f"bytes {start}-{stop}/{size + 1}")),
        "requested bytes .* received",
    ),
    "stream cut short": Fault(after_probe(half_then(close)), "3 times", host={"ranges": False}),
    "stream cut short, unknown length": Fault(
        after_probe(half_of_unknown_length), r"received \d+ of \d+ bytes, 3 times", host={"ranges": False}
    ),
    "empty ranges": Fault(after_probe(empty_range), "ended early, 3 times at byte"),
    "ranges cut at once": Fault(after_probe(Call.reset), "3 times at byte"),
    "headers that drip": Fault(drip_headers, "no complete response headers in 0.5 s, 1 times", QUICK),
    "headers that drip midway": Fault(
        after_probe(drip_headers), "no complete response headers in 0.5 s, 1 times", QUICK
    ),
    "endless hints": Fault(endless_hints, "no complete response headers in 0.5 s, 1 times", QUICK),
    "stall": Fault(Call.stall, "timed out, 1 times", QUICK),
    "stall midway": Fault(after_probe(Call.stall), "timed out, 1 times", QUICK),
    "slow drip": Fault(after_probe(drip), "slower than 1048576 bytes per second, 1 times", DRIP),
    "slow drip of a stream": Fault(after_probe(drip), "slower than 1048576", DRIP, host={"ranges": False}),
}


TEMPORARY_FAULTS: dict[str, Answer] = {
    "none": Call.correct,
    "503": status(503),
    "reset": Call.reset,
    "reset midway": half_then(Call.reset),
    "cut short": half_then(close),
}


def assert_one_clear_line(message: str, folder: Path, *texts: str) -> None:
    """An error message is one line with the name of the file and `texts`, and no file got the final name."""
    assert message.isprintable()
    assert all(text in message for text in (NAME, *texts))
    assert not (folder / NAME).exists()
