"""Fetch the bytes of a file: its missing segments in parallel range requests, or the whole file in one stream.

A resumed download fetches the wanted segments that are not in `PartialFile.done`, which `partial` reads from its
record. The record marks single segments as done; one request fetches a group of adjacent segments. An `Arrival` decides
which group is next.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx

from ixi_etl.core.progress import Progress
from ixi_etl.sources.arrivals import Arrival
from ixi_etl.sources.http import HttpClient, RemoteFile, body_blocks, get, validator_of
from ixi_etl.sources.partial import PartialFile, Segment
from ixi_etl.sources.retries import (
    ChangedError,
    RangeIgnoredError,
    RetryPolicy,
    ServerLoad,
    TransientError,
    UnusableError,
    server_load,
)

MAX_GAP = 4096
"""Bytes between two segments that are fetched and discarded to save a request; between two members of a tar are up to
1,023."""


def fetch_ranges(
    client: HttpClient,
    remote_file: RemoteFile,
    part: PartialFile,
    wanted: Sequence[Segment],
    max_request_bytes: int,
    progress: Progress,
    arrival: Arrival,
) -> None:
    """Fetch the wanted segments that are not done, over parallel connections; the first failure stops all of them.

    Adjacent segments share a request of up to `max_request_bytes`. `progress` counts bytes. `arrival` chooses the
    order; it learns of all received bytes and finished segments.

    Raises:
        ChangedError: the server serves another file now.
        RangeIgnoredError: the server answered with the whole file.
        UnusableError: a response is not the requested range, or all tries are used up.
    """
    part.truncate(remote_file.size or 0)  # at once: `PartialFile` does not resume a part of another length
    http = client.http
    with (
        server_load(remote_file.url) as server,
        ThreadPoolExecutor(http.connections) as pool,
        arrival.following(remote_file.url, part, http),
    ):
        download = _RangeDownload(client, remote_file, part, wanted, server, progress, arrival)
        queue = list(_coalesce_ranges(download.missing, max_request_bytes))
        jobs = [pool.submit(download.fetch_from, queue) for _ in range(min(http.connections, len(queue)))]
        try:
            for job in jobs:
                job.result()
        finally:
            download.halt.set()
            pool.shutdown(cancel_futures=True)


def _coalesce_ranges(segments: Sequence[Segment], max_request_bytes: int) -> Iterator[list[Segment]]:
    """Group segments that (almost) touch, up to `max_request_bytes` per group; a larger segment is a group alone."""
    group: list[Segment] = []
    for segment in segments:
        if group and (segment.start - group[-1].stop > MAX_GAP or segment.stop - group[0].start > max_request_bytes):
            yield group
            group = []
        group.append(segment)
    if group:
        yield group


class _RangeDownload:
    """The state that the connections of one `fetch_ranges` call share.

    Attributes:
        missing: the wanted segments that are not done.
        halt: set to stop all connections.
    """

    def __init__(
        self,
        client: HttpClient,
        remote_file: RemoteFile,
        part: PartialFile,
        wanted: Sequence[Segment],
        server: ServerLoad,
        progress: Progress,
        arrival: Arrival,
    ) -> None:
        self.missing = [segment for segment in wanted if segment.index not in part.done]
        self.halt = threading.Event()
        self._client, self._remote_file, self._part, self._server = client, remote_file, part, server
        self._policy, self._arrival = RetryPolicy(server, client.http), arrival
        self._progress, self._progress_lock = progress, threading.Lock()
        self._wanted_bytes = _total_bytes(wanted)
        self._fetched_bytes = self._wanted_bytes - _total_bytes(self.missing)
        self._report(0)

    def fetch_from(self, queue: list[list[Segment]]) -> None:
        """Fetch groups of adjacent segments, with retries, until the queue is empty; a failure halts all others."""
        try:
            while group := self._arrival.take(queue, self.halt):
                self._fetch(group)
        except BaseException:
            self.halt.set()
            raise

    def _fetch(self, group: Sequence[Segment]) -> None:
        offset, stop, unfinished = group[0].start, group[-1].stop, list(group)
        while offset < stop and not self.halt.is_set():
            start = offset
            try:
                with self._server.request(self.halt):
                    self.halt.wait(self._policy.remaining_pause())
                    if self.halt.is_set():
                        return
                    attempt = self._policy.start_attempt()
                    for block in _range_blocks(self._client, self._remote_file, self._part, offset, stop):
                        self._part.write(block, offset)
                        self._count(group, offset, offset + len(block))
                        offset += len(block)
                        while unfinished and unfinished[0].stop <= offset:
                            self._part.mark_done(unfinished.pop(0))
                            self._arrival.advanced()
                        if self.halt.is_set():
                            return
            except (TransientError, UnusableError) as error:
                failure = error
                if isinstance(failure, UnusableError):
                    if failure.status is None:
                        raise
                    # The server has just served this file, so a status such as 403 or 404 may be temporary.
                    failure = TransientError(str(failure))
                try:
                    wait = self._policy.record_failure(failure, attempt, offset - start)
                except UnusableError as given_up:
                    raise UnusableError(f"{given_up} at byte {offset}", transient=True) from None
                self.halt.wait(wait)

    def _count(self, group: Sequence[Segment], start: int, stop: int) -> None:
        """Count the bytes [start, stop) as received; the progress excludes gaps between segments."""
        self._arrival.received()
        self._policy.add_saved(stop - start)
        self._server.add_received(stop - start)
        self._report(sum(max(0, min(stop, segment.stop) - max(start, segment.start)) for segment in group))

    def _report(self, new_bytes: int) -> None:
        with self._progress_lock:
            self._fetched_bytes += new_bytes
            self._progress(_progress_label(self._part), self._fetched_bytes, self._wanted_bytes, "B")


def _total_bytes(segments: Sequence[Segment]) -> int:
    return sum(segment.stop - segment.start for segment in segments)


def _progress_label(part: PartialFile) -> str:
    return f"download {part.path.name.removesuffix('.part')}"


def _range_blocks(
    client: HttpClient, remote_file: RemoteFile, part: PartialFile, start: int, stop: int
) -> Iterator[bytes]:
    """The bytes [start, stop) in blocks, from one request."""
    headers = {"range": f"bytes={start}-{stop - 1}"}
    if remote_file.validator and not remote_file.has_md5:
        headers["if-range"] = remote_file.validator
    with get(client, remote_file.url, headers) as response:
        changed = remote_file.validator and validator_of(response) not in (None, remote_file.validator)
        if response.status_code == 200 and _is_whole_file(response, remote_file):
            raise RangeIgnoredError
        if response.status_code == 200 or (changed and not remote_file.has_md5):
            raise ChangedError
        if changed:
            part.mixed = True
        received = response.headers.get("content-range", "none")
        match = re.fullmatch(rf"bytes {start}-(\d{{1,18}})/{remote_file.size}", received)
        if not match or not start <= int(match[1]) < stop:
            raise UnusableError(f"requested bytes {start}-{stop - 1}/{remote_file.size}, received {received}")
        end = int(match[1]) + 1  # a server may send less than the requested range
        remaining = end - start
        for block in body_blocks(client, response):
            remaining -= len(block)
            if remaining < 0:
                raise UnusableError("more bytes than the requested range")
            yield block
        if remaining:
            raise TransientError("the connection ended early")
        if end < stop:
            raise TransientError("the server sent only a part of the range")


def _is_whole_file(response: httpx.Response, remote_file: RemoteFile) -> bool:
    """Whether a response with status 200 is the file whose download was started.

    With an MD5 its length suffices, because the nodes of a server may have different validators.
    """
    same_version = remote_file.has_md5 or validator_of(response) == remote_file.validator
    return same_version and response.headers.get("content-length") in (None, str(remote_file.size))


def fetch_stream(client: HttpClient, remote_file: RemoteFile, part: PartialFile, progress: Progress) -> None:
    """Fetch the whole file in one request, from a server without ranges.

    Raises:
        UnusableError: the URL cannot provide the file.
        TransientError: the request failed, or the response is too short.
    """
    offset, size = 0, remote_file.size
    with server_load(remote_file.url) as server, get(client, remote_file.url, {}) as response:
        for block in body_blocks(client, response):
            part.write(block, offset)
            offset += len(block)
            server.add_received(len(block))
            progress(_progress_label(part), offset, size or offset, "B")
    if size is not None and offset != size:
        raise TransientError(f"received {offset} of {size} bytes")
    part.truncate(offset)
