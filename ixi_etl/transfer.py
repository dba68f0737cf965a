"""The bytes of one file from one URL: what a server offers, its ranges in parallel, and the part that they fill.

`NAME.part` is written at any offset; `NAME.part.json` says which segments of it are done, so that a transfer goes on
from where it was after any kind of stop.
"""

from __future__ import annotations

import logging
import math
import netrc
import os
import random
import re
import shutil
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from ixi_etl.archive import MAX_FILE, escaped
from ixi_etl.catalog import Source
from ixi_etl.errors import DownloadError, redacted
from ixi_etl.files import Progress, read_json, sync, to_json, write_atomic
from ixi_etl.places import refuse_secret

T = TypeVar("T")
Pieces = Sequence[tuple[int, int]]  # start and stop, in bytes
Segment = tuple[int, int, int]  # the same with its index before

FIRST = "bytes=0-511"  # the range that shows what a file is
SEGMENT = 8 << 20  # bytes: the most that one connection has to fetch again after a kill
TRIES = 5  # that bring nothing, in a row, before a URL is given up
BACKOFF_S = 0.5  # doubled at each such try, with jitter
MAX_WAIT_S = 60.0  # however long a server asks to be left alone
TIMEOUT_S = 30.0
MIN_RATE = 1024  # bytes a second, over TIMEOUT_S; a slower connection counts as stalled, a slower file as not moving
SPARE_BYTES = 64 << 20  # of the disk, left free beside the download
GAP = 4096  # bytes between two members that are fetched rather than asked for twice; a tar has up to 1023
MAX_TEXT = 8 << 20  # bytes of a small file that are read; MD5SUMS of every member of IXI has 70 KB

for _logger in ("httpx", "httpcore"):  # they log every URL, redirects' signed ones, too
    logging.getLogger(_logger).setLevel(logging.WARNING)


class UnusableError(Exception):
    """This URL cannot give the file: try the next. `transient`: it might, later. `status`: the server's answer."""

    def __init__(self, message: str, transient: bool = False, status: int | None = None) -> None:
        super().__init__(escaped(redacted(message)))  # part of it is often a server's own words
        self.transient = transient
        self.status = status


class ChangedError(Exception):
    """The server no longer serves the file that was begun."""


class TransientError(Exception):
    """Worth another try. `busy`: the server asks for fewer requests. `wait`: seconds that it asks to be left alone."""

    def __init__(self, message: str, busy: bool = False, wait: float = 0) -> None:
        super().__init__(message)
        self.busy = busy
        self.wait = wait


@dataclass(frozen=True)
class Offer:
    """What a server says it has.

    Attributes:
        size: in bytes; None where the server does not say.
        validator: fit for If-Range.
        ranges: whether it gives ranges of bytes.
        judged: whether an MD5 will judge the bytes. Then it does not matter what ETag each of the server's nodes has.
    """

    url: str
    size: int | None
    validator: str | None
    ranges: bool
    judged: bool = False


# -- asking -----------------------------------------------------------------------------------------------------------


def open_client(insecure_hosts: tuple[str, ...], connections: int) -> httpx.Client:
    """To be closed. Of `insecure_hosts` the certificates are not looked at.

    Raises:
        DownloadError: one of those is not the name of a host; for httpx "" and "*" are all hosts.
    """
    for host in insecure_hosts:
        refuse_secret(host)
        if not re.fullmatch(r"[A-Za-z0-9._-]+", host):
            raise DownloadError(
                f"--insecure-host {host!r} is not the name of one host; give that alone, or leave it out"
            )
    return httpx.Client(
        headers={"accept-encoding": "identity", "user-agent": "ixi-etl"},
        follow_redirects=True,
        auth=_netrc(),
        timeout=TIMEOUT_S,
        limits=httpx.Limits(max_connections=connections + 1),
        mounts={f"https://{host}": httpx.HTTPTransport(verify=False) for host in insecure_hosts},
        event_hooks={"request": [_bound_headers], "response": [_stay_with_tls]},
    )


_headers_by = threading.local()


def _bound_headers(request: httpx.Request) -> None:
    """Let no answer's headers take longer than TIMEOUT_S: httpx counts from the last byte, so a drip has no end."""

    def trace(event: str, info: dict[str, Any]) -> None:
        if event.endswith("send_request_headers.started"):
            _headers_by.time = time.monotonic() + TIMEOUT_S
        elif event.endswith("receive_response_headers.complete"):
            _headers_by.time = float("inf")
        elif event.endswith(("connect_tcp.complete", "start_tls.complete")):
            stream = info["return_value"]
            stream.read = _in_time(stream.read)

    request.extensions["trace"] = trace


def _in_time(read: Callable[..., bytes]) -> Callable[..., bytes]:
    def read_in_time(*args: Any, **kwargs: Any) -> bytes:
        if time.monotonic() > _headers_by.time:
            raise TransientError(f"no whole answer in {TIMEOUT_S:g} s")
        return read(*args, **kwargs)

    return read_in_time


def _stay_with_tls(answer: httpx.Response) -> None:
    if answer.has_redirect_location and answer.url.scheme == "https":
        target = answer.url.join(answer.headers["location"])
        if target.scheme == "http":
            raise UnusableError(f"it leads from https to {target}, which anybody on the way can change")


def _netrc() -> httpx.Auth | None:
    """Names and passwords of hosts, where a person keeps them: each is told to its own host alone."""
    try:
        return httpx.NetRCAuth()
    except (OSError, netrc.NetrcParseError):
        return None


def probe(client: httpx.Client, url: str, source: Source) -> Offer:
    """Ask for the first block: is it there, is it a tar, how long is it, does the server give ranges?

    Raises:
        UnusableError, TransientError: it cannot be had, or not now.
    """
    with _get(client, url, {"range": FIRST}) as answer:
        head = b""
        for block in _not_too_slow(answer.iter_raw()):
            head += block
            if len(head) >= 512:
                break
        total = re.fullmatch(r"bytes 0-\d+/(\d{1,18})", answer.headers.get("content-range", ""))
        length = answer.headers.get("content-length")
        partial = answer.status_code == 206 and total is not None
        if source.name.endswith(".tar"):
            try:
                tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                page = head.lstrip()[:1] == b"<" or "html" in answer.headers.get("content-type", "")
                raise UnusableError("an HTML page in place of a tar" if page else "not a tar archive") from None
        size = int(total[1]) if partial and total else int(length) if answer.status_code == 200 and length else None
        if size == 0:
            raise UnusableError("an empty file")
        if size is not None and size > MAX_FILE:
            raise UnusableError(f"a file of {size:.3g} bytes; at most {MAX_FILE} are fetched")
        validator = validator_of(answer)
        whole_only = validator is None and source.md5 is None  # of a file that changes, ranges would make a mix
        return Offer(url, size, validator, ranges=partial and not whole_only, judged=source.md5 is not None)


def small_file(client: httpx.Client, url: str) -> bytes:
    """A file of at most MAX_TEXT bytes; raises what `probe` does."""
    data = bytearray()
    with _get(client, url, {}) as answer:
        for block in _not_too_slow(answer.iter_raw()):
            data += block
            if len(data) > MAX_TEXT:
                raise UnusableError(f"more than {MAX_TEXT} bytes")
        length = answer.headers.get("content-length", "")
        if length.isdecimal() and len(data) < int(length):
            raise TransientError("the connection ended early")
    return bytes(data)


def validator_of(answer: httpx.Response) -> str | None:
    """What If-Range may hold: a strong ETag, else the date."""
    etag: str = answer.headers.get("etag", "")
    date: str | None = answer.headers.get("last-modified")
    return etag if etag.startswith('"') else date


@contextmanager
def _get(client: httpx.Client, url: str, headers: dict[str, str]) -> Iterator[httpx.Response]:
    """A GET answered with 200 or 206, to be read inside; every failure is sorted into this module's own three."""
    try:
        with client.stream("GET", url, headers=headers) as answer:
            status, what = answer.status_code, f"{answer.status_code} {answer.reason_phrase}"
            if status == 416 and headers.get("range") not in (None, FIRST):
                raise ChangedError
            if status >= 500 or status in (408, 425, 429):
                raise TransientError(what, busy=status in (429, 503), wait=_retry_after(answer))
            if status not in (200, 206):
                raise UnusableError(what, status=status)
            yield answer
    except (httpx.TooManyRedirects, httpx.InvalidURL, httpx.UnsupportedProtocol, UnicodeError) as error:
        raise UnusableError(str(error)) from error
    except httpx.TransportError as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise UnusableError("its TLS certificate is not valid (--insecure-host HOST to go on)") from error
        raise TransientError(str(error) or type(error).__name__) from error


def _retry_after(answer: httpx.Response) -> float:
    """Seconds that the server asks to be left alone: given as such, or as a date; 0 where it says nothing."""
    said = answer.headers.get("retry-after", "").strip()
    if re.fullmatch("[0-9]+", said):
        return float(said)
    try:
        now = parsedate_to_datetime(answer.headers["date"]) if "date" in answer.headers else datetime.now(UTC)
        return max(0.0, (parsedate_to_datetime(said) - now).total_seconds())
    except (TypeError, ValueError, OverflowError):  # no date, or one with a time zone and one without
        return 0.0


class _Server:
    """A server, as all downloads of this process see it that are under way: bytes, requests in hand, and its limit."""

    def __init__(self) -> None:
        self.users = 0
        self.moved = 0
        self._active = 0
        self._most = math.inf
        self._changed = threading.Condition()

    @contextmanager
    def request(self, halt: threading.Event | None = None) -> Iterator[None]:
        """Wait for a turn: no more requests at a time than the server bears."""
        with self._changed:
            while self._active >= self._most and not (halt and halt.is_set()):
                self._changed.wait(0.1)
            self._active += 1
        try:
            yield
        except TransientError as error:
            with self._changed:
                if error.busy:
                    self._most = max(1, min(self._most, self._active - 1))
            raise
        finally:
            with self._changed:
                self._active -= 1
                self._changed.notify_all()

    def count(self, bytes_: int) -> None:
        with self._changed:
            self.moved += bytes_


_servers: dict[str, _Server] = {}
_servers_lock = threading.Lock()


@contextmanager
def _server_of(url: str) -> Iterator[_Server]:
    key = urlsplit(url).netloc
    with _servers_lock:
        server = _servers.setdefault(key, _Server())
        server.users += 1
    try:
        yield server
    finally:
        with _servers_lock:
            server.users -= 1
            if not server.users:
                del _servers[key]


class _Tries:
    """When to try again, and when to give up: after TRIES failures in a row between which nothing moved."""

    def __init__(self, server: _Server) -> None:
        self.failures = 0
        self._server = server
        self._own = 0  # bytes that need not be fetched again
        self._paused_until = 0.0
        self._lock = threading.Lock()
        self._mark()

    def count(self, bytes_: int) -> None:
        with self._lock:
            self._own += bytes_

    def pause(self) -> float:
        """Seconds to wait before a try begins. A failure with nothing gained makes every connection wait.

        Otherwise many connections would use up all tries in the time of one wait.
        """
        return max(0.0, self._paused_until - time.monotonic())

    def begin(self) -> tuple[int, float]:
        """What `failed` must know of the start of a try: how many had failed, and the time."""
        return self.failures, time.monotonic()

    def failed(self, error: TransientError, began: tuple[int, float], gained: int = 0) -> float:
        """Seconds to wait before the next try. `began`: what `begin` gave when the failed one began.

        Tries that go on side by side and fail together count as one, and while others bring bytes none counts. Where
        the server is busy, those may be bytes of another file. A try that itself `gained` bytes is repeated at once.

        Raises:
            UnusableError: it is enough.
        """
        with self._lock:
            moved = self._server.moved - self._others_at if error.busy else self._own - self._own_at
            now, (failures_before, since) = time.monotonic(), began
            # What a try gained counts even where another one, which failed a moment before, has counted it already.
            if moved > MIN_RATE * (now - self._since) or gained > MIN_RATE * (now - since):
                self.failures = 0
                self._mark()
            elif failures_before == self.failures:
                self.failures += 1
                self._mark()
                if self.failures >= TRIES:
                    raise UnusableError(f"{error}, {TRIES} times", transient=True) from None
            failures = self.failures
            jitter = random.uniform(0.5, 1.5)  # noqa: S311 - no secret  # nosec B311
            at_once = gained and not failures and not error.busy
            backoff = 0.0 if at_once else BACKOFF_S * 2 ** max(failures - 1, 0) * jitter
            wait = min(max(backoff, error.wait), MAX_WAIT_S)
            if failures or error.wait:
                self._paused_until = max(self._paused_until, now + wait)
            return wait

    def _mark(self) -> None:
        self._since, self._own_at, self._others_at = time.monotonic(), self._own, self._server.moved


def retried(url: str, call: Callable[[], T]) -> T:
    """What `call`, which asks `url`, gives as soon as it ends without a `TransientError`.

    Raises:
        UnusableError: after TRIES of those; also what else `call` raises.
    """
    with _server_of(url) as server:
        tries = _Tries(server)
        while True:
            try:
                with server.request():
                    began = tries.begin()
                    return call()
            except TransientError as error:
                wait = tries.failed(error, began)
            time.sleep(wait)


# -- the bytes --------------------------------------------------------------------------------------------------------


def discard(path: Path) -> None:
    """Forget what has been fetched of the file that is to be `path`."""
    path.with_name(f"{path.name}.part.json").unlink(missing_ok=True)
    path.with_name(f"{path.name}.part").unlink(missing_ok=True)


_under_way: set[Part] = set()
_under_way_lock = threading.Lock()


class Part:
    """`NAME.part`, written at any offset, and the record of which segments of it are done."""

    def __init__(self, path: Path, offer: Offer, pieces: Pieces | None = None) -> None:
        """Go on with what is there, if it is of the file offered; from whichever URL, where an MD5 will judge the sum.

        `pieces` are the segments, as (start, stop) in bytes; without them the file is cut into such of equal size.
        """
        self.path = path.with_name(f"{path.name}.part")
        self.record = path.with_name(f"{path.name}.part.json")
        self._size = self.needed = offer.size or 0
        self._state = {"url": offer.url, "validator": offer.validator, "size": offer.size, "segment": SEGMENT}
        even = [(a, min(a + SEGMENT, self._size)) for a in range(0, self._size, SEGMENT)]
        self.segments = [(i, *piece) for i, piece in enumerate(even if pieces is None else pieces)]
        self._lock = threading.Lock()
        old = read_json(self.record)
        if not (
            isinstance(old, dict) and isinstance(old.get("done"), list) and {type(n) for n in old["done"]} <= {int}
        ):
            old = {}
        differs = {key for key, value in self._state.items() if old.get(key) != value}
        usable = not differs or (offer.judged and differs <= {"url", "validator"})
        if not (usable and offer.ranges and self.path.exists() and self.path.stat().st_size == offer.size):
            discard(path)
            old = {}
        self.done: set[int] = set(old.get("done", ()))
        self.mixed = bool(self.done)  # maybe of more than one file
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        with _under_way_lock:
            _under_way.add(self)

    def __enter__(self) -> Part:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with _under_way_lock:
            _under_way.discard(self)
        os.close(self._file)

    def missing(self) -> int:
        """Bytes that are still to come, and to find room."""
        return max(0, self.needed - os.fstat(self._file).st_blocks * 512)

    def check_disk(self) -> None:
        with _under_way_lock:  # two archives at once must fit together
            need = sum(part.missing() for part in _under_way) + SPARE_BYTES
        free = shutil.disk_usage(self.path.parent).free
        if need > free:
            raise DownloadError(
                f"{self.path.parent} has {free / 1e9:.2f} GB free, but {self.path.stem} needs {need / 1e9:.2f} GB "
                "more; free some, or choose another --root"
            )

    def write(self, data: bytes, at: int) -> None:
        while data:
            n = os.pwrite(self._file, data, at)
            data, at = data[n:], at + n

    def finish(self, segment: int) -> None:
        sync(self._file)  # before the record says so
        with self._lock:
            self.done.add(segment)
            write_atomic(self.record, to_json(self._state | {"done": sorted(self.done)}))

    def truncate(self, size: int) -> None:
        os.ftruncate(self._file, size)

    def sync(self) -> None:
        sync(self._file)


def _neighbours(segments: Sequence[Segment], together: int) -> Iterator[list[Segment]]:
    """Segments that (almost) touch, as many together as make a request of `together` bytes; each alone at the least."""
    run: list[Segment] = []
    for segment in segments:
        if run and (segment[1] - run[-1][2] > GAP or segment[2] - run[0][1] > together):
            yield run
            run = []
        run.append(segment)
    if run:
        yield run


def fetch_ranges(
    client: httpx.Client,
    offer: Offer,
    part: Part,
    wanted: Sequence[Segment],
    together: int,
    connections: int,
    progress: Progress,
) -> None:
    """Fetch the wanted segments that are not done, `connections` at a time; the first failure stops all of them.

    Segments that touch are asked for together, up to `together` bytes. `progress` is told bytes.

    Raises:
        ChangedError: the server has another file by now.
        UnusableError: it gave what was not asked for, or nothing TRIES times in a row.
    """
    todo = [s for s in wanted if s[0] not in part.done]
    size = sum(stop - start for _, start, stop in wanted)
    have = size - sum(stop - start for _, start, stop in todo)
    what = f"download {part.path.name.removesuffix('.part')}"
    halt, lock = threading.Event(), threading.Lock()

    def fetch(run: list[Segment]) -> None:
        left = list(run)

        def arrived(before: int, at: int) -> None:
            nonlocal have
            tries.count(at - before)
            server.count(at - before)
            gained = sum(max(0, min(at, stop) - max(before, start)) for _, start, stop in run)  # not the gaps
            with lock:
                have += gained
                progress(what, have, size, "B")
            while left and left[0][2] <= at:
                part.finish(left.pop(0)[0])

        try:
            _fetch_run(client, offer, part, run[0][1], run[-1][2], server, tries, halt, arrived)
        except BaseException:
            halt.set()
            raise

    part.truncate(offer.size or 0)  # at once: a part of another length is of another file, or was cut short
    progress(what, have, size, "B")
    with _server_of(offer.url) as server, ThreadPoolExecutor(connections) as pool:
        tries = _Tries(server)
        jobs = [pool.submit(fetch, run) for run in _neighbours(todo, together)]
        try:
            for job in jobs:
                job.result()
        finally:
            halt.set()
            pool.shutdown(cancel_futures=True)


def _fetch_run(
    client: httpx.Client,
    offer: Offer,
    part: Part,
    at: int,
    stop: int,
    server: _Server,
    tries: _Tries,
    halt: threading.Event,
    arrived: Callable[[int, int], None],
) -> None:
    while at < stop and not halt.is_set():
        start = at
        try:
            with server.request(halt):
                halt.wait(tries.pause())
                if halt.is_set():
                    return
                began = tries.begin()
                for block in _range_blocks(client, offer, part, at, stop):
                    part.write(block, at)
                    at += len(block)
                    arrived(at - len(block), at)
                    if halt.is_set():
                        return
        except (TransientError, UnusableError) as caught:
            error = caught
            if isinstance(error, UnusableError):
                if error.status is None:
                    raise
                error = TransientError(str(error))  # such as 403 or 404: the server has just given parts of this file
            try:
                halt.wait(tries.failed(error, began, at - start))
            except UnusableError as given_up:
                raise UnusableError(f"{given_up} at byte {at}", transient=True) from None


def _range_blocks(client: httpx.Client, offer: Offer, part: Part, start: int, stop: int) -> Iterator[bytes]:
    headers = {"range": f"bytes={start}-{stop - 1}"}
    if offer.validator and not offer.judged:
        headers["if-range"] = offer.validator
    with _get(client, offer.url, headers) as answer:
        other = offer.validator and validator_of(answer) not in (None, offer.validator)
        if answer.status_code == 200 or (other and not offer.judged):
            raise ChangedError
        if other:
            part.mixed = True
        got = answer.headers.get("content-range", "none")
        given = re.fullmatch(rf"bytes {start}-(\d{{1,18}})/{offer.size}", got)
        if not given or not start <= int(given[1]) < stop:
            raise UnusableError(f"asked for bytes {start}-{stop - 1}/{offer.size}, was given {got}")
        end = int(given[1]) + 1  # a server may give less than the range that it was asked for
        left = end - start
        for block in _not_too_slow(answer.iter_raw()):
            left -= len(block)
            if left < 0:
                raise UnusableError("more bytes than the range that was asked for")
            yield block
        if left:
            raise TransientError("the connection ended early")
        if end < stop:
            raise TransientError("only a part of the range was given")


def _not_too_slow(blocks: Iterator[bytes]) -> Iterator[bytes]:
    since, bytes_since = time.monotonic(), 0
    for block in blocks:
        yield block
        bytes_since += len(block)
        elapsed = time.monotonic() - since
        if elapsed > TIMEOUT_S:
            if bytes_since < MIN_RATE * elapsed:
                raise TransientError(f"slower than {MIN_RATE} bytes a second")
            since, bytes_since = time.monotonic(), 0


def fetch_stream(client: httpx.Client, offer: Offer, part: Part, progress: Progress) -> None:
    """The whole file in one piece, from a server without ranges.

    Raises:
        UnusableError, TransientError: it cannot be had, or came short.
    """
    at = 0
    what = f"download {part.path.name.removesuffix('.part')}"
    with _server_of(offer.url) as server, _get(client, offer.url, {}) as answer:
        for block in _not_too_slow(answer.iter_raw()):
            part.write(block, at)
            at += len(block)
            server.count(len(block))
            progress(what, at, offer.size or at, "B")
    if offer.size is not None and at != offer.size:
        raise TransientError(f"{at} bytes came, {offer.size} were announced")
    part.truncate(at)
