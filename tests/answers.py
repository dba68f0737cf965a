"""What servers answer, honest and otherwise, and the small downloads on which that is tried."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from servers import PROBE, Answer, Call

from ixi_etl import transfer
from ixi_etl.phantom import write_tar

NAME = "IXI-T1.tar"
SEGMENT = 1 << 16


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def make_tar(folder: Path, seed: int, length: int = 600_000) -> bytes:
    write_tar(folder / NAME, {"IXI002-Guys-0828-T1.nii.gz": random.Random(seed).randbytes(length)})
    return (folder / NAME).read_bytes()


def small(patch: pytest.MonkeyPatch, stranger: str) -> None:
    """Segments, waits and limits for files of a few hundred KB. `stranger`: the authorities to trust."""
    patch.setenv("SSL_CERT_FILE", stranger)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        patch.delenv(name, raising=False)
    patch.setattr(transfer, "SEGMENT", SEGMENT)
    patch.setattr(transfer, "BACKOFF_S", 0.0005)
    patch.setattr(transfer, "TIMEOUT_S", 20.0)
    patch.setattr(transfer, "MIN_RATE", 1)
    patch.setattr(transfer, "TRIES", 3)


# -- ways to answer ---------------------------------------------------------------------------------------------------


def status(code: int, **headers: str) -> Answer:
    return lambda call: call.plain(code, b"no", **headers)


def page(call: Call) -> None:
    call.plain(200, b"<!DOCTYPE html>\n<html><body>Please sign in</body></html>" * 20, content_type="text/html")


def half_then(end: Answer) -> Answer:
    def answer(call: Call) -> None:
        data = call.start()
        call.send(data[: len(data) // 2])
        end(call)

    return answer


def close(call: Call) -> None:
    call.close_connection = True


def drip(call: Call) -> None:
    for at in range(len(data := call.start())):
        call.send(data[at : at + 1])
        if call.host.closing.wait(0.01):
            break


def redirect_to_self(call: Call) -> None:
    call.plain(302, location=call.path)


def wrong_range(change: Callable[[int, int, int], str]) -> Answer:
    def answer(call: Call) -> None:
        start, stop = (int(n) for n in (call.asked.range or PROBE).removeprefix("bytes=").split("-"))
        said = change(start, stop, len(call.host.body))
        call.plain(206, call.host.body[start : stop + 1], content_range=said, etag=call.host.etag or "")

    return answer


def empty_range(call: Call) -> None:
    start, stop = (call.asked.range or "").removeprefix("bytes=").split("-")
    call.plain(206, content_range=f"bytes {start}-{stop}/{len(call.host.body)}", etag=call.host.etag or "")


def half_of_who_knows(call: Call) -> None:
    call.head(200, {"connection": "close"})
    call.send(call.host.body[: len(call.host.body) // 2])
    call.close_connection = True


def drip_headers(call: Call) -> None:
    call.wfile.write(b"HTTP/1.1 200 OK\r\nx: ")
    while not call.host.closing.wait(0.02):
        call.wfile.write(b"a")


def hint_for_ever(call: Call) -> None:
    while not call.host.closing.wait(0.02):
        call.wfile.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")


def red_letters(call: Call) -> None:
    call.wfile.write(b"HTTP/1.1 403 \x1b[31mNo\r\ncontent-length: 0\r\n\r\n")


def strange_etag(call: Call) -> None:
    call.plain(206, call.host.body[:512], content_range=f"bytes 0-511/{len(call.host.body)}", etag='"\xff"')


def after_probe(answer: Answer) -> Answer:
    return lambda call: call.honest() if call.asked.range == PROBE else answer(call)


def first(n: int, faulty: Answer, then: Answer = Call.honest) -> Answer:
    """Answer the first `n` requests so, the others otherwise."""
    calls = iter(range(10**9))
    return lambda call: (faulty if next(calls) < n else then)(call)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@dataclass
class Fault:
    answer: Answer
    reason: str
    constants: dict[str, float] = field(default_factory=dict)
    host: dict[str, Any] = field(default_factory=dict)
    spoil: Callable[[bytes], bytes] = bytes


QUICK: dict[str, float] = {"TIMEOUT_S": 0.5, "TRIES": 1}  # an honest answer takes less, also on a busy machine
DRIP: dict[str, float] = QUICK | {"MIN_RATE": 1 << 20}
LASTING = {
    "403": Fault(status(403), "403 Forbidden"),
    "404": Fault(status(404), "404 Not Found"),
    "410": Fault(status(410), "410 Gone"),
    "403 midway": Fault(after_probe(first(3, Call.honest, status(403))), "403 Forbidden"),
    "500 always": Fault(status(500), "500 Internal Server Error, 3 times"),
    "429 always": Fault(after_probe(status(429)), "429 Too Many Requests, 3 times"),
    "HTML page": Fault(page, "an HTML page in place of a tar"),
    "HTML page midway": Fault(first(5, Call.honest, page), "an HTML page in place of a tar"),
    "not a tar": Fault(Call.honest, "not a tar archive", spoil=lambda tar: tar[::-1]),
    "empty file": Fault(Call.honest, "416", spoil=lambda tar: b""),
    "redirect loop": Fault(redirect_to_self, "redirects"),
    "redirect to an empty label": Fault(status(302, location="http://a..b/"), "label empty or too long"),
    "redirect to a long label": Fault(status(302, location=f"http://{'a' * 70}/"), "label too long"),
    "an ETag that is not ASCII": Fault(strange_etag, "was given"),
    "words that steer a terminal": Fault(red_letters, r"403 \\x1b\[31mNo"),
    "redirect to FTP": Fault(status(302, location="ftp://127.0.0.1/IXI-T1.tar"), "protocol"),
    "wrong byte": Fault(Call.honest, "MD5 is [0-9a-f]{32}, not", spoil=lambda tar: flipped(tar, 500_000)),
    "wrong byte in a stream": Fault(Call.honest, "MD5 is", host={"ranges": False}, spoil=lambda t: flipped(t, 9999)),
    "wrong length": Fault(Call.honest, "MD5 is [0-9a-f]{32}, not", spoil=lambda tar: tar + bytes(10240)),
    "short, length not said": Fault(
        Call.honest, "MD5 is", host={"ranges": False, "says_length": False}, spoil=lambda tar: tar[:-20480]
    ),
    "another range": Fault(
        after_probe(wrong_range(lambda start, stop, size: f"bytes {start + 512}-{stop + 512}/{size}")), "was given"
    ),
    "a size that would fill the memory": Fault(
        wrong_range(lambda start, stop, size: f"bytes {start}-{stop}/{10**15}"), r"a file of 1e\+15 bytes"
    ),
    "a size of nothing": Fault(wrong_range(lambda start, stop, size: f"bytes {start}-{stop}/0"), "an empty file"),
    "a size of 5000 digits": Fault(wrong_range(lambda start, stop, size: f"bytes {start}-{stop}/{'9' * 5000}"), "MD5"),
    "another size": Fault(
        after_probe(wrong_range(lambda start, stop, size: f"bytes {start}-{stop}/{size + 1}")), "was given"
    ),
    "stream cut short": Fault(after_probe(half_then(close)), "3 times", host={"ranges": False}),
    "stream cut short, length not said": Fault(
        after_probe(half_of_who_knows), "announced, 3 times", host={"ranges": False}
    ),
    "empty ranges": Fault(after_probe(empty_range), "ended early, 3 times at byte"),
    "ranges cut at once": Fault(after_probe(Call.reset), "3 times at byte"),
    "headers that drip": Fault(drip_headers, "no whole answer in 0.5 s, 1 times", QUICK),
    "headers that drip midway": Fault(after_probe(drip_headers), "no whole answer in 0.5 s, 1 times", QUICK),
    "hints for ever": Fault(hint_for_ever, "no whole answer in 0.5 s, 1 times", QUICK),
    "stall": Fault(Call.stall, "timed out, 1 times", QUICK),
    "stall midway": Fault(after_probe(Call.stall), "timed out, 1 times", QUICK),
    "slow drip": Fault(after_probe(drip), "slower than 1048576 bytes a second, 1 times", DRIP),
    "slow drip of a stream": Fault(after_probe(drip), "slower than 1048576", DRIP, host={"ranges": False}),
}


FAULTS: dict[str, Answer] = {
    "none": Call.honest,
    "503": status(503),
    "reset": Call.reset,
    "reset midway": half_then(Call.reset),
    "cut short": half_then(close),
}


def assert_one_clear_line(message: str, folder: Path, *said: str) -> None:
    assert message.isprintable()
    assert all(text in message for text in (NAME, *said))
    assert not (folder / NAME).exists()
