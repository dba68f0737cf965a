"""Get one file whole and verified, in parallel byte ranges, from the first source that can give it.

Bytes arrive in `NAME.part`; `NAME.part.json` says which segments of it are done, so that a download goes on from where
it was after any kind of stop. Only a file whose MD5 is right gets the name `NAME`; `NAME.json` then records what was
verified, so that the next refresh need not read the file again.
"""

from __future__ import annotations

import hashlib
import logging
import netrc
import os
import random
import re
import shutil
import tarfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import fsspec
import httpx

from ixi_etl.catalog import Source, archive_name, basename, own_archives, parse_md5sums
from ixi_etl.errors import DownloadError
from ixi_etl.files import Progress, read_json, silent, to_json, write_atomic
from ixi_etl.places import is_url

T = TypeVar("T")
Pieces = Sequence[tuple[int, int]]  # start and stop, in bytes
Segment = tuple[int, int, int]  # the same with its index before
log = logging.getLogger(__name__)

SEGMENT = 8 << 20  # bytes: the most that one connection has to fetch again after a kill
TRIES = 5  # that bring nothing, in a row, before a URL is given up
BACKOFF_S = 0.5  # doubled at each such try, with jitter
TIMEOUT_S = 30.0
MIN_RATE = 1024  # bytes a second, over TIMEOUT_S; a slower connection counts as stalled
SPARE_BYTES = 64 << 20  # of the disk, left free beside the download
REQUEST = 32 << 20  # bytes: members that lie side by side are asked for together, up to so many
GAP = 4096  # bytes between two members that are fetched rather than asked for twice; a tar has up to 1023
ENOUGH = 1 << 15  # bytes; a try that brings less (MIN_RATE brings less in TIMEOUT_S) counts as bringing nothing


@dataclass(frozen=True)
class Acquired:
    """A file that is here, whole and verified.

    Attributes:
        location: path (or object URL) to read it at.
        checked: whether its MD5 was held against one that somebody else had published.
        origin: the URL or path it came from.
        validator: the ETag or date its server gave it, if any.
        stamp: identity of the file at `location` when it was hashed; another stamp means another file.
    """

    name: str
    location: str
    size: int
    md5: str
    checked: bool
    origin: str
    validator: str | None
    stamp: str


class _UnusableError(Exception):
    """This URL cannot give the file: try the next. `transient`: it might, later."""

    def __init__(self, message: str, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class _ChangedError(Exception):
    """The server no longer serves the file that was begun."""


class _TransientError(Exception):
    """Worth another try."""


@dataclass(frozen=True)
class _Offer:
    """What a server says it has; `size` is None where it does not say, `validator` is fit for If-Range."""

    url: str
    size: int | None
    validator: str | None
    ranges: bool


def acquire(
    source: Source,
    folder: Path,
    *,
    connections: int = 4,
    offline: bool = False,
    insecure_hosts: tuple[str, ...] = (),
    progress: Progress = silent,
) -> Acquired:
    """Make sure that the file of `source` is here, whole and verified.

    A file of a person's own that is not served over HTTP is used where it lies. A file already verified costs one HEAD
    request, or none when `offline`. `folder` holds the downloads, and a record of each file that was verified.

    Raises:
        DownloadError: nothing gave the right file; the message says of each URL why not, and what to do.
    """
    path = folder / source.name
    location = str(path) if source.over_http else source.urls[0]
    known = _recorded(folder, source.name, location)
    if known and (known.md5 == source.md5 if source.md5 else known.origin in source.urls):
        known = replace(known, checked=known.checked or source.md5 is not None)
        if offline or not source.over_http or _still_served(known, source, insecure_hosts):
            return known
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not source.over_http:
            return _verify_in_place(source, folder, progress)
        if path.exists() and source.md5 and _md5(location, progress) == source.md5:
            _discard(path)
            return _record(folder, source, location, source.md5, source.urls[0], None)
        if offline:
            raise DownloadError(f"{path} is not there, or not the right file; run once without --offline to fetch it")
        return _from_first(source, path, connections, insecure_hosts, progress)
    except OSError as error:
        raise DownloadError(
            f"cannot read or write {path}: {error.strerror or error}; mend that and run again: it goes on from there"
        ) from error


# -- some members alone -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remote:
    """An archive elsewhere that answers, and gives byte ranges."""

    source: Source
    offer: _Offer

    @property
    def url(self) -> str:
        return self.offer.url


def find_remote(source: Source, insecure_hosts: tuple[str, ...] = ()) -> Remote:
    """The first of a source's URLs that has the archive and gives ranges of it.

    Raises:
        DownloadError: none does, or the source is a file of a person's own, which is read where it lies anyway.
    """
    if not source.over_http:
        raise DownloadError(f"{source.urls[0]} is read where it lies; leave out --fetch members")
    reasons, transient = [], False
    for url in source.urls:
        try:
            with _client(insecure_hosts, 1) as client:
                offer = _retried(lambda: _probe(client, url, source))  # noqa: B023 - called at once
                if not offer.ranges:
                    raise _UnusableError("gives no byte ranges that can be trusted; fetch the whole archives")
                return Remote(source, offer)
        except _UnusableError as error:
            reasons.append(f"{url}: {error}")
            transient |= error.transient
    raise DownloadError(f"could not ask for {source.name}: {'; '.join(reasons)}", transient)


def fetch_members(
    remote: Remote,
    folder: Path,
    members: Pieces,
    wanted: Iterable[int],
    *,
    connections: int = 4,
    insecure_hosts: tuple[str, ...] = (),
    progress: Progress = silent,
) -> Acquired:
    """Fetch the `wanted` ones (by index) of an archive's `members`, given as (start, stop) in bytes.

    They come to lie where they lie in the archive, in a file `NAME.members.part` with holes elsewhere, which is read as
    the archive is. What an earlier call fetched of the same archive is not fetched again. Its MD5 cannot be checked.

    Raises:
        DownloadError: the archive changed meanwhile, or could not be read, or the disk is full.
    """
    path, offer = folder / f"{remote.source.name}.members", remote.offer
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _client(insecure_hosts, connections) as client, _Part(path, offer, False, members) as part:
            chosen = [part.segments[index] for index in wanted]
            part.needed = sum(stop - start for _, start, stop in chosen)
            part.check_disk()
            _fetch_ranges(client, offer, part, chosen, REQUEST, connections, progress)
            part.sync()
    except _ChangedError:
        raise DownloadError(f"{remote.url} changed while its members were fetched; run again", transient=True) from None
    except _UnusableError as error:
        raise DownloadError(f"could not get members of {remote.url}: {error}", error.transient) from error
    except OSError as error:
        raise DownloadError(
            f"cannot write {path}: {error.strerror or error}; mend that and run again: it goes on from there"
        ) from error
    location = str(part.path)
    size = offer.size or 0
    return Acquired(path.stem, location, size, "", False, remote.url, offer.validator, _stamp(location))


def own_sources(place: str, *, offline: bool = False, insecure_hosts: tuple[str, ...] = ()) -> dict[str, Source]:
    """Modality -> a person's own archive, with the MD5 that an `MD5SUMS` beside it says, if there is one."""
    places = own_archives(place)
    for path in places.values():
        if not is_url(path) and not Path(path).exists():
            raise _not_there(path)
    sums: dict[str, str] = {}
    beside = places["T1"].rpartition("/")[0] + "/MD5SUMS"
    if not beside.startswith(("http://", "https://")):
        with suppress(Exception):  # each kind of store has its own; what ails it is said when the archive is read
            filesystem, path = fsspec.url_to_fs(beside)
            sums = parse_md5sums(filesystem.cat_file(path).decode("utf-8", "replace"))
    elif not offline:
        try:
            with _client(insecure_hosts, 1) as client:
                sums = parse_md5sums(_retried(lambda: _text(client, beside)))
        except _UnusableError as error:
            if error.transient:
                log.warning("%s: %s; going on unchecked", beside, error)
    return {m: Source(archive_name(m), (p,), sums.get(basename(p))) for m, p in places.items()}


# -- what is known of a file ------------------------------------------------------------------------------------------


def _stamp(location: str) -> str:
    """Identity of a file's present content, without reading it (size, times, inode; the ETag of an object)."""
    filesystem, path = fsspec.url_to_fs(location)
    return str(filesystem.ukey(path))


def _recorded(folder: Path, name: str, location: str) -> Acquired | None:
    record = read_json(folder / f"{name}.json")
    with suppress(Exception):  # a spoilt record, or a file that cannot be looked at: the same as no record
        known = Acquired(**record)
        if known.location == location and known.stamp == _stamp(location):
            return known
    return None


def _record(folder: Path, source: Source, location: str, md5: str, origin: str, validator: str | None) -> Acquired:
    filesystem, path = fsspec.url_to_fs(location)
    found = Acquired(
        name=source.name,
        location=location,
        size=filesystem.size(path),
        md5=md5,
        checked=source.md5 is not None,
        origin=origin,
        validator=validator,
        stamp=_stamp(location),
    )
    write_atomic(folder / f"{source.name}.json", to_json(asdict(found)))
    return found


def _md5(location: str, progress: Progress) -> str:
    filesystem, path = fsspec.url_to_fs(location)
    size, done, digest = filesystem.size(path), 0, hashlib.md5(usedforsecurity=False)
    what, stamp = f"verify {path.rpartition('/')[2].removesuffix('.part')}", _stamp(location)
    with filesystem.open(path, "rb", block_size=4 << 20) as file:
        while block := file.read(4 << 20):
            digest.update(block)
            done += len(block)
            progress(what, done, size, "B")
    if _stamp(location) != stamp:
        raise DownloadError(f"{location} changed while it was read; run again when it is whole")
    return digest.hexdigest()


def _not_there(location: str) -> DownloadError:
    return DownloadError(f"{location} is not there; give a --source that has {basename(location)}")


def _verify_in_place(source: Source, folder: Path, progress: Progress) -> Acquired:
    location = source.urls[0]
    try:
        md5 = _md5(location, progress)
    except FileNotFoundError:
        raise _not_there(location) from None
    except DownloadError:
        raise
    except Exception as error:  # each kind of store has its own
        raise DownloadError(f"cannot read {location}: {getattr(error, 'strerror', None) or error}") from error
    if source.md5 not in (None, md5):
        right = f"{source.md5}, as its publisher or MD5SUMS beside it says"
        raise DownloadError(f"{location}: MD5 is {md5}, not {right}; fetch the file again")
    return _record(folder, source, location, md5, location, None)


def _still_served(known: Acquired, source: Source, insecure_hosts: tuple[str, ...]) -> bool:
    """Whether the server, asked with one HEAD, still has the file we hold. Without an answer: taken as yes."""
    url = known.origin if known.origin in source.urls else source.urls[0]
    try:
        with _client(insecure_hosts, 1) as client:
            answer = client.head(url)
            answer.raise_for_status()
    except httpx.HTTPError as error:
        reason = str(error).partition("\n")[0]
        log.warning("%s did not answer (%s); using the verified copy in %s", url, reason, known.location)
        return True
    length = answer.headers.get("content-length")
    same = known.validator in (None, _validator(answer) or known.validator) and length in (None, str(known.size))
    if not same and source.md5:
        log.warning("%s now serves another file; keeping %s, whose MD5 is the published one", url, known.location)
    return same or source.md5 is not None


# -- one URL ----------------------------------------------------------------------------------------------------------


def _client(insecure_hosts: tuple[str, ...], connections: int) -> httpx.Client:
    return httpx.Client(
        headers={"accept-encoding": "identity", "user-agent": "ixi-etl"},
        follow_redirects=True,
        auth=_netrc(),
        timeout=TIMEOUT_S,
        limits=httpx.Limits(max_connections=connections + 1),
        mounts={f"https://{host}": httpx.HTTPTransport(verify=False) for host in insecure_hosts},
    )


def _netrc() -> httpx.Auth | None:
    """Names and passwords of hosts, where a person keeps them: each is told to its own host alone."""
    try:
        return httpx.NetRCAuth()
    except (OSError, netrc.NetrcParseError):
        return None


def _from_first(
    source: Source, path: Path, connections: int, insecure_hosts: tuple[str, ...], progress: Progress
) -> Acquired:
    """Download from the first URL that gives the right file."""
    reasons, transient = [], False
    for url in source.urls:
        try:
            with _client(insecure_hosts, connections) as client:
                return _download(client, url, source, path, connections, progress)
        except _UnusableError as error:
            log.warning("%s: %s", url, error)
            reasons.append(f"{url}: {error}")
            transient |= error.transient
    by_hand = f"put the file at {path} by hand" if source.md5 else "fetch it by hand and give its folder as --source"
    raise DownloadError(f"could not get {source.name}: {'; '.join(reasons)}. Try again later, or {by_hand}", transient)


def _download(
    client: httpx.Client, url: str, source: Source, path: Path, connections: int, progress: Progress
) -> Acquired:
    for _ in range(2):  # once more if the file changed, or if the first time went on from wrong bytes
        offer = _retried(lambda: _probe(client, url, source))
        with _Part(path, offer, any_origin=source.md5 is not None) as part:
            part.check_disk()
            try:
                if offer.ranges:
                    _fetch_ranges(client, offer, part, part.segments, 0, connections, progress)
                else:
                    _retried(lambda: _fetch_stream(client, offer, part, progress))  # noqa: B023 - called at once
            except _ChangedError:
                continue  # what the server offers now says whether what is here is still of use
            part.sync()
        md5 = _md5(str(part.path), progress)
        if source.md5 in (None, md5):
            os.replace(part.path, path)
            found = _record(path.parent, source, str(path), md5, url, offer.validator)
            part.record.unlink(missing_ok=True)
            return found
        _discard(path)
        if not part.resumed:
            raise _UnusableError(f"MD5 is {md5}, not {source.md5}")
    raise _UnusableError("the file changed while it was fetched, twice")


def _probe(client: httpx.Client, url: str, source: Source) -> _Offer:
    """Ask for the first block: is it there, is it a tar, how long is it, does the server give ranges?"""
    with _get(client, url, {"range": "bytes=0-511"}) as answer:
        head = b""
        for block in _not_too_slow(answer.iter_raw()):
            head += block
            if len(head) >= 512:
                break
        total = re.fullmatch(r"bytes 0-\d+/(\d+)", answer.headers.get("content-range", ""))
        length = answer.headers.get("content-length")
        partial = answer.status_code == 206 and total is not None
        if source.name.endswith(".tar"):
            try:
                tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                page = head.lstrip()[:1] == b"<" or "html" in answer.headers.get("content-type", "")
                raise _UnusableError("an HTML page in place of a tar" if page else "not a tar archive") from None
        size = int(total[1]) if partial and total else int(length) if answer.status_code == 200 and length else None
        validator = _validator(answer)
        whole_only = validator is None and source.md5 is None  # of a file that changes, ranges would make a mix
        return _Offer(url, size, validator, ranges=partial and not whole_only)


def _text(client: httpx.Client, url: str) -> str:
    with _get(client, url, {}) as answer:
        answer.read()
        return answer.text


def _validator(answer: httpx.Response) -> str | None:
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
            if status == 416 and "if-range" in headers:
                raise _ChangedError
            if status >= 500 or status in (408, 425, 429):
                raise _TransientError(what)
            if status not in (200, 206):
                raise _UnusableError(what)
            yield answer
    except (httpx.TooManyRedirects, httpx.InvalidURL, httpx.DecodingError, httpx.UnsupportedProtocol) as error:
        raise _UnusableError(str(error)) from error
    except httpx.TransportError as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise _UnusableError("its TLS certificate is not valid (--insecure-host HOST to go on)") from error
        raise _TransientError(str(error) or type(error).__name__) from error


def _backoff(failures: int) -> None:
    jitter = random.uniform(0.5, 1.5)  # noqa: S311 - no secret  # nosec B311
    time.sleep(BACKOFF_S * 2 ** (failures - 1) * jitter)


def _retried(call: Callable[[], T]) -> T:
    for failures in range(1, TRIES + 1):
        try:
            return call()
        except _TransientError as error:
            last = error
            if failures < TRIES:
                _backoff(failures)
    raise _UnusableError(f"{last}, {TRIES} times", transient=True)


# -- the bytes --------------------------------------------------------------------------------------------------------


def _discard(path: Path) -> None:
    """Forget what has been fetched of the file that is to be `path`."""
    path.with_name(f"{path.name}.part.json").unlink(missing_ok=True)
    path.with_name(f"{path.name}.part").unlink(missing_ok=True)


_under_way: set[_Part] = set()
_under_way_lock = threading.Lock()


class _Part:
    """`NAME.part`, written at any offset, and the record of which segments of it are done."""

    def __init__(self, path: Path, offer: _Offer, any_origin: bool, pieces: Pieces | None = None) -> None:
        """Go on with what is there, if it is of the file offered. `any_origin`: an MD5 will judge the sum anyway.

        `pieces` are the segments, as (start, stop) in bytes; without them the file is cut into such of equal size.
        """
        self.path = path.with_name(f"{path.name}.part")
        self.record = path.with_name(f"{path.name}.part.json")
        self._size = self.needed = offer.size or 0
        self._state = {"url": offer.url, "validator": offer.validator, "size": offer.size, "segment": SEGMENT}
        even = [(a, min(a + SEGMENT, self._size)) for a in range(0, self._size, SEGMENT)]
        self.segments = [(i, *piece) for i, piece in enumerate(even if pieces is None else pieces)]
        self._lock = threading.Lock()
        old = read_json(self.record) or {}
        differs = {key for key, value in self._state.items() if old.get(key) != value}
        usable = not differs or (any_origin and "url" in differs and differs <= {"url", "validator"})
        if not (usable and offer.ranges and self.path.exists() and self.path.stat().st_size == offer.size):
            _discard(path)
            old = {}
        self.done: set[int] = set(old.get("done", ()))
        self.resumed = bool(self.done)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        with _under_way_lock:
            _under_way.add(self)

    def __enter__(self) -> _Part:
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
        os.fdatasync(self._file)  # before the record says so
        with self._lock:
            self.done.add(segment)
            write_atomic(self.record, to_json(self._state | {"done": sorted(self.done)}))

    def truncate(self, size: int) -> None:
        os.ftruncate(self._file, size)

    def sync(self) -> None:
        os.fsync(self._file)


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


def _fetch_ranges(
    client: httpx.Client,
    offer: _Offer,
    part: _Part,
    wanted: Sequence[Segment],
    together: int,
    connections: int,
    progress: Progress,
) -> None:
    """Fetch the wanted segments that are not done, `connections` at a time; the first failure stops all of them."""
    todo = [s for s in wanted if s[0] not in part.done]
    size = sum(stop - start for _, start, stop in wanted)
    have = size - sum(stop - start for _, start, stop in todo)
    what = f"download {part.path.name.removesuffix('.part')}"
    halt, lock = threading.Event(), threading.Lock()

    def fetch(run: list[Segment]) -> None:
        left = list(run)

        def arrived(before: int, at: int) -> None:
            nonlocal have
            gained = sum(max(0, min(at, stop) - max(before, start)) for _, start, stop in run)  # not the gaps
            with lock:
                have += gained
                progress(what, have, size, "B")
            while left and left[0][2] <= at:
                part.finish(left.pop(0)[0])

        try:
            _fetch_run(client, offer, part, run[0][1], run[-1][2], halt, arrived)
        except BaseException:
            halt.set()
            raise

    part.truncate(offer.size or 0)  # at once: a part of another length is of another file, or was cut short
    progress(what, have, size, "B")
    with ThreadPoolExecutor(connections) as pool:
        jobs = [pool.submit(fetch, run) for run in _neighbours(todo, together)]
        try:
            for job in jobs:
                job.result()
        finally:
            halt.set()
            pool.shutdown(cancel_futures=True)


def _fetch_run(
    client: httpx.Client,
    offer: _Offer,
    part: _Part,
    at: int,
    stop: int,
    halt: threading.Event,
    arrived: Callable[[int, int], None],
) -> None:
    failures = 0
    while at < stop and not halt.is_set():
        begun = at
        try:
            for block in _range_blocks(client, offer, at, stop):
                part.write(block, at)
                at += len(block)
                arrived(at - len(block), at)
                if halt.is_set():
                    return
        except _TransientError as error:
            failures = 1 if at - begun >= ENOUGH else failures + 1
            if failures >= TRIES:
                raise _UnusableError(f"{error}, {TRIES} times at byte {at}", transient=True) from error
            _backoff(failures)


def _range_blocks(client: httpx.Client, offer: _Offer, start: int, stop: int) -> Iterator[bytes]:
    headers = {"range": f"bytes={start}-{stop - 1}"}
    if offer.validator:
        headers["if-range"] = offer.validator
    with _get(client, offer.url, headers) as answer:
        if answer.status_code == 200 or (offer.validator and _validator(answer) not in (None, offer.validator)):
            raise _ChangedError
        if answer.headers.get("content-range") != f"bytes {start}-{stop - 1}/{offer.size}":
            got = answer.headers.get("content-range")
            raise _UnusableError(f"asked for bytes {start}-{stop - 1}/{offer.size}, was given {got}")
        left = stop - start
        for block in _not_too_slow(answer.iter_raw()):
            left -= len(block)
            if left < 0:
                raise _UnusableError("more bytes than the range that was asked for")
            yield block
        if left:
            raise _TransientError("the connection ended early")


def _not_too_slow(blocks: Iterator[bytes]) -> Iterator[bytes]:
    since, bytes_since = time.monotonic(), 0
    for block in blocks:
        yield block
        bytes_since += len(block)
        elapsed = time.monotonic() - since
        if elapsed > TIMEOUT_S:
            if bytes_since < MIN_RATE * elapsed:
                raise _TransientError(f"slower than {MIN_RATE} bytes a second")
            since, bytes_since = time.monotonic(), 0


def _fetch_stream(client: httpx.Client, offer: _Offer, part: _Part, progress: Progress) -> None:
    """The whole file in one piece, from a server without ranges."""
    at = 0
    what = f"download {part.path.name.removesuffix('.part')}"
    with _get(client, offer.url, {}) as answer:
        for block in _not_too_slow(answer.iter_raw()):
            part.write(block, at)
            at += len(block)
            progress(what, at, offer.size or at, "B")
    if offer.size is not None and at != offer.size:
        raise _TransientError(f"{at} bytes came, {offer.size} were announced")
    part.truncate(at)
