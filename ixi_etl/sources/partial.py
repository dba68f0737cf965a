"""A partial download: `NAME.part`, written at any offset, and `NAME.part.json`, the record of its finished segments.

`PartialFile` finds the segments that an earlier download finished; `ranges.fetch_ranges` fetches the others.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ixi_etl.core.files import fsync, read_json, to_json, write_atomic
from ixi_etl.core.http_options import HttpOptions
from ixi_etl.errors import DownloadError
from ixi_etl.sources.http import RemoteFile

SegmentBounds = Sequence[tuple[int, int]]
"""[start, stop) of each segment of a file, in bytes."""

SPARE_BYTES = 64 << 20
"""Bytes of the disk to leave free."""


@dataclass(frozen=True)
class Segment:
    """A part of a file that is recorded as done as a whole: its index, and [start, stop) in bytes.

    One request can fetch a group of several segments (`ranges`).
    """

    index: int
    start: int
    stop: int


def part_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.part.json")


def discard_partial(path: Path) -> None:
    """Remove the partial download of `path`."""
    _record_path(path).unlink(missing_ok=True)
    part_path(path).unlink(missing_ok=True)


_open_parts: set[PartialFile] = set()
_open_parts_lock = threading.Lock()


def bytes_to_come() -> int:
    """Bytes of disk space to leave free for all open partial downloads, and to spare."""
    with _open_parts_lock:
        return sum(part.missing_bytes() for part in _open_parts) + SPARE_BYTES


class PartialFile:
    """An open partial download.

    Attributes:
        path: of the `.part` file.
        record: path of the record.
        segments: of the whole file.
        done: indices of the finished segments.
        mixed: whether its bytes may come from more than one file.
        needed_bytes: bytes that will be stored; less than the size if only some segments are wanted.
    """

    def __init__(
        self, path: Path, remote_file: RemoteFile, http: HttpOptions, bounds: SegmentBounds | None = None
    ) -> None:
        """Open the partial download of `path`, and resume an earlier one of the same remote file.

        If the MD5 will be verified, a download from another URL is resumed too. Segments without given `bounds` have
        `http.segment_bytes` each.
        """
        self.path, self.record = part_path(path), _record_path(path)
        size = self.needed_bytes = remote_file.size or 0
        step = http.segment_bytes
        if bounds is None:
            bounds = [(start, min(start + step, size)) for start in range(0, size, step)]
        self.segments = [Segment(index, start, stop) for index, (start, stop) in enumerate(bounds)]
        self._state = {
            "url": remote_file.url,
            "validator": remote_file.validator,
            "size": remote_file.size,
            "segment": step,
        }
        self._lock = threading.Lock()
        self.done = self._find_resumable(remote_file)
        if not self.done:
            discard_partial(path)
        self.mixed = bool(self.done)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        with _open_parts_lock:
            _open_parts.add(self)

    def _find_resumable(self, remote_file: RemoteFile) -> set[int]:
        """The segments that an earlier download of the same file finished."""
        record = read_json(self.record)
        if not isinstance(record, dict) or not isinstance(record.get("done"), list):
            return set()
        if not {type(index) for index in record["done"]} <= {int}:
            return set()
        differences = {key for key, value in self._state.items() if record.get(key) != value}
        same = not differences or (remote_file.has_md5 and differences <= {"url", "validator"})
        if not (same and remote_file.ranges and self.path.exists() and self.path.stat().st_size == remote_file.size):
            return set()
        return set(record["done"])

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with _open_parts_lock:
            _open_parts.discard(self)
        os.close(self._file)

    def missing_bytes(self) -> int:
        """Bytes that still need disk space."""
        return max(0, self.needed_bytes - os.fstat(self._file).st_blocks * 512)

    def check_disk(self) -> None:
        """Raise `DownloadError` if the disk cannot hold this and all other open partial downloads."""
        need = bytes_to_come()
        free = shutil.disk_usage(self.path.parent).free
        if need > free:
            raise DownloadError(
                f"{self.path.parent} has {free / 1e9:.2f} GB free, but the downloads in progress, one of them "
                f"{self.path.stem}, need {need / 1e9:.2f} GB more; free some, or choose another --root"
            )

    def write(self, data: bytes, offset: int) -> None:
        while data:
            written = os.pwrite(self._file, data, offset)
            data, offset = data[written:], offset + written

    def mark_done(self, segment: Segment) -> None:
        fsync(self._file)  # before the record, which must never be ahead of the data
        with self._lock:
            self.done.add(segment.index)
            write_atomic(self.record, to_json(self._state | {"done": sorted(self.done)}))

    def truncate(self, size: int) -> None:
        os.ftruncate(self._file, size)

    def sync(self) -> None:
        fsync(self._file)
