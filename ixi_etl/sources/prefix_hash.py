"""Compute the MD5 of a download while it arrives, so that little is left to read after its last byte."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

from ixi_etl.sources.arrivals import Arrival
from ixi_etl.sources.partial import PartialFile


class PrefixHash:
    """The MD5 of the first bytes of a file.

    Attributes:
        digest: of the bytes hashed so far.
        size: their number.
    """

    def __init__(self) -> None:
        self.digest = hashlib.md5(usedforsecurity=False)
        self.size = 0

    @contextmanager
    def following(self, part: PartialFile, arrival: Arrival) -> Iterator[None]:
        """Hash the segments, in the order of the file, as they are finished during the block.

        A finished segment must not be written again. A disk error ends this; whoever hashes the rest meets it too.
        """
        ended = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(self._follow, part, arrival, ended)
            try:
                yield
            finally:
                ended.set()
                arrival.advanced()
        running.result()

    def _follow(self, part: PartialFile, arrival: Arrival, ended: threading.Event) -> None:
        def has_arrived(index: int) -> bool:
            with arrival.changed:
                arrival.changed.wait_for(lambda: ended.is_set() or index in part.done)
            return not ended.is_set()

        # Without a buffer, which would read ahead, beyond what has arrived.
        with suppress(OSError), open(part.path, "rb", buffering=0) as file:
            for segment in part.segments:
                if not has_arrived(segment.index):
                    return
                data = file.read(segment.stop - segment.start)
                self.digest.update(data)
                self.size += len(data)
