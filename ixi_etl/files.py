"""Small things about files: written whole or not at all, hashed, and one writer to a root."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ixi_etl.errors import IxiError, LockedError
from ixi_etl.places import is_local, naming, printable

Progress = Callable[[str, int, int, str], None]
"""Called as (what, done, total, unit) while a stage goes on; unit is `B` for bytes or a plural noun."""


def silent(what: str, done: int, total: int, unit: str) -> None:
    """A `Progress` that shows nothing."""


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write so that a reader sees the old file or the new one, whatever stops this process."""
    if not is_local(path):  # S3 has no other way
        with naming(path):
            path.write_bytes(data.encode() if isinstance(data, str) else data)
        return
    part = path.with_name(f".{path.name}.part")
    with naming(part), open(part, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        sync(file.fileno())
    os.replace(part, path)


SYNC_REFUSED = {
    getattr(errno, name)
    for name in ("EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EPERM", "EACCES", "EBADF", "EISDIR")
    if hasattr(errno, name)
}
"""What file systems answer that cannot sync a folder, or anything. A disk's own errors (EIO, ENOSPC) are others."""


def sync(handle: int) -> None:
    """Wait until what was written is on the disk, where the file system can say so; network and FUSE ones may not."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in SYNC_REFUSED:
            raise


def sync_path(path: Path) -> None:
    """The same of a file, or of the names in a folder, that is not open."""
    with naming(path):
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError as error:  # a folder may be writable and not readable
            if error.errno not in SYNC_REFUSED:
                raise
            return
        try:
            sync(handle)
        finally:
            os.close(handle)


@contextmanager
def disk_errors_in_a_line() -> Iterator[None]:
    """What a disk does (it is full, read-only, taken away) is no bug: it becomes an `IxiError`."""
    try:
        yield
    except OSError as error:
        names = [os.fsdecode(n) for n in (error.filename, error.filename2) if isinstance(n, str | bytes | os.PathLike)]
        reason = error.strerror or " ".join(map(str, error.args)) or type(error).__name__
        said = printable(": ".join(filter(None, [" -> ".join(names), reason])))
        raise IxiError(f"cannot read or write {said}; mend that and run again: it goes on from there") from error


def to_json(value: Any) -> str:
    """The one form in which this project writes JSON: sorted keys, so equal values are equal bytes."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """What a JSON file holds, or None where there is no such file, or what `to_json` could not have written."""
    try:
        with naming(path):
            return parse_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None


def parse_json(data: bytes) -> Any:
    """What the text of a JSON file holds, or None where `to_json` could not have written that."""
    try:
        value = json.loads(data)
        to_json(value)  # whoever hashes it must not find NaN in it, or more brackets than Python nests
    except (ValueError, RecursionError):  # an integer of 5,000 digits, too
        return None
    return value


def sha256_file(path: Path) -> str:
    with naming(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def lock_root(root: Path, option: str = "--root") -> Iterator[None]:
    """Hold `root` for one process at a time; the kernel lets go when that dies, however it dies.

    `option` is what a person gives to choose another folder.

    Raises:
        LockedError: with who holds it, since when.
        IxiError: `root` cannot be written.
    """
    note = root / ".lock.json"
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / ".lock")
        lock.acquire(blocking=False)
    except Timeout:
        holder = read_json(note)
        known = isinstance(holder, dict) and holder.keys() >= {"pid", "host", "since"}
        who = "process {pid} on {host} since {since}".format(**holder) if known else "another process"
        raise LockedError(f"{root} is in use by {who}; wait for it to end, or choose another {option}") from None
    except OSError as error:
        reason = error.strerror or str(error)  # the file system may also be one that has no locks
        raise IxiError(f"cannot write to {root}, or lock it: {reason}; choose another {option}") from error
    try:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        write_atomic(note, to_json({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
        yield
    finally:
        with suppress(OSError):  # the disk may be gone; what ended the work is the error to report
            note.unlink(missing_ok=True)
        lock.release()
