"""Follow downloads while they run: what has arrived, and what each of them should fetch next.

`ranges.fetch_ranges` asks an `Arrival` which segments to fetch next, and tells it which are finished. Archives that
keep pace with each other receive the scans of a subject at about the same time.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ixi_etl.core.http_options import DEFAULT_HTTP, HttpOptions
from ixi_etl.sources.partial import PartialFile, Segment, part_path

POLL_S = 0.1


class Arrival:
    """A file that is being downloaded to `path`.

    Attributes:
        changed: notified of every change of this file, and of others that share it.
        url: where it comes from, once a download in byte ranges has started.
        whole: whether the file is complete and verified.
        rejected: whether a complete download, of one of its URLs, did not have the expected MD5.
    """

    def __init__(self, path: Path, changed: threading.Condition | None = None) -> None:
        self.path = path
        self.changed = changed or threading.Condition()
        self.url: str | None = None
        self.whole = self.rejected = False
        self._part: PartialFile | None = None
        self._ranks: Mapping[int, int] = {}  # segments are fetched by rank; those without one last
        self._companions: Sequence[Arrival] = ()
        self._http = DEFAULT_HTTP
        self._paces_until = -math.inf  # time.monotonic(); companions do not wait for a stalled or finished download

    @contextmanager
    def following(self, url: str, part: PartialFile, http: HttpOptions) -> Iterator[None]:
        """Follow a download in byte ranges during the block."""
        with self.changed:
            self.url, self._part, self._http = url, part, http
            self.received()
            self.advanced()
        try:
            yield
        except BaseException:
            with self.changed:
                self._part = None  # the next attempt may begin with an empty file
            raise
        finally:
            self._paces_until = -math.inf

    def received(self) -> None:
        """Report bytes: companions wait for this download for another timeout."""
        self._paces_until = time.monotonic() + self._http.timeout_s

    def advanced(self) -> None:
        """Report the start of the download, or a finished segment."""
        with self.changed:
            self.changed.notify_all()

    def take(self, queue: list[list[Segment]], halt: threading.Event) -> list[Segment]:
        """Remove and return the group of segments to fetch next; an empty list at the end, or if halted.

        Waits while this download is ahead of its companions.
        """
        with self.changed:
            while queue and self._is_ahead(len(queue)) and not halt.is_set():
                self.changed.wait(POLL_S)
            if not queue or halt.is_set():
                return []
            return queue.pop(min(range(len(queue)), key=lambda n: self._ranks.get(queue[n][0].index, math.inf)))

    def _is_ahead(self, queued: int) -> bool:
        """Whether the requested share of the file is two segments a connection beyond what a companion has."""
        assert self._part is not None
        total = len(self._part.segments)
        ahead = total - queued - 2 * self._http.connections
        return any(
            ahead * len(other.segments) > len(other.done) * total
            for companion in self._companions
            if (other := companion._part) and time.monotonic() < companion._paces_until
        )

    def fetch_first(self, bounds: Sequence[tuple[int, int]]) -> None:
        """Fetch the segments that hold these [start, stop) before all others, in this order."""
        with self.changed:
            if self._part:
                indices = [index for start, stop in bounds for index in self._segments_of(start, stop)]
                self._ranks = {index: rank for rank, index in reversed(list(enumerate(indices)))}

    def finish(self) -> None:
        with self.changed:
            self.whole = True
            self.changed.notify_all()

    def reject(self) -> None:
        with self.changed:
            self.rejected = True
            self.changed.notify_all()

    def _segments_of(self, start: int, stop: int) -> range:
        """Indices of the segments that hold the bytes [start, stop)."""
        assert self._part is not None
        step = self._part.segments[0].stop
        return range(start // step, -(-stop // step))

    def has(self, start: int, stop: int) -> bool:
        """Whether the bytes [start, stop) have arrived."""
        return self.whole or (self._part is not None and self._part.done.issuperset(self._segments_of(start, stop)))

    def read(self, start: int, size: int) -> bytes:
        """Read bytes that have arrived. They are not verified, unless the file is `whole`."""
        try:
            file = open(self.path if self.whole else part_path(self.path), "rb")  # noqa: SIM115 - closed below
        except FileNotFoundError:  # it was renamed a moment ago
            file = open(self.path, "rb")  # noqa: SIM115
        with file:
            file.seek(start)
            return file.read(size)


def keep_pace(arrivals: Sequence[Arrival]) -> None:
    """Make downloads wait for those of `arrivals` that are behind."""
    for arrival in arrivals:
        arrival._companions = [other for other in arrivals if other is not arrival]
