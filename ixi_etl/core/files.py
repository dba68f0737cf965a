"""Files: atomic writes, JSON, SHA-256, user errors from OS errors, and the lock of a root."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ixi_etl.core.storage import is_local, naming_file, read_bytes
from ixi_etl.core.text import printable
from ixi_etl.errors import IxiError, LockedError

SYNCED_AT_ONCE = 8  # files


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write so that a reader sees the old file or the new one, even if this process is killed."""
    content = data.encode() if isinstance(data, str) else data
    if not is_local(path):  # S3 replaces objects atomically
        with naming_file(path):
            path.write_bytes(content)
        return
    part = path.with_name(f".{path.name}.part")
    with naming_file(part), open(part, "wb") as file:
        file.write(content)
        file.flush()
        fsync(file.fileno())
    os.replace(part, path)


SYNC_REFUSED = {
    getattr(errno, name)
    for name in ("EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EPERM", "EACCES", "EBADF", "EISDIR")
    if hasattr(errno, name)
}
"""Errors of file systems that cannot sync folders, or anything. Errors of the disk (EIO, ENOSPC) are not among them."""


def fsync(handle: int) -> None:
    """Wait until written data are on the disk. Network and FUSE file systems may be unable to; that is ignored."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in SYNC_REFUSED:
            raise


def fsync_path(path: Path) -> None:
    """Sync a file, or the names in a folder, by path."""
    with naming_file(path):
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError as error:  # a folder may be writable but not readable
            if error.errno not in SYNC_REFUSED:
                raise
            return
        try:
            fsync(handle)
        finally:
            os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Sync a folder and all that is in it. Several files at a time, because a disk writes what waits together."""
    with ThreadPoolExecutor(SYNCED_AT_ONCE) as pool:
        list(pool.map(fsync_path, (folder, *folder.rglob("*"))))


@contextmanager
def os_errors_as_user_errors(error_type: type[IxiError] = IxiError) -> Iterator[None]:
    """Convert an `OSError` to a user error: a disk that is full, read-only or disconnected is not a bug.

    Combine it with `naming_file`, so that the message always names a file.

    Raises:
        IxiError: of type `error_type`.
    """
    try:
        yield
    except OSError as error:
        names = [os.fsdecode(n) for n in (error.filename, error.filename2) if isinstance(n, str | bytes | os.PathLike)]
        reason = error.strerror or " ".join(map(str, error.args)) or type(error).__name__
        message = printable(": ".join(filter(None, [" -> ".join(names), reason])))
        raise error_type(f"cannot read or write {message}; fix that, and run again to resume") from error


def to_json(value: Any) -> str:
    """Serialise to the canonical JSON of this project: sorted keys, so equal values have equal bytes."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """The value in a JSON file, or None if the file is missing or `to_json` could not have written it."""
    try:
        return parse_json(read_bytes(path))
    except (FileNotFoundError, NotADirectoryError):
        return None


def parse_json(data: bytes) -> Any:
    """The value in JSON text, or None if `to_json` could not have written it."""
    try:
        value = json.loads(data)
        to_json(value)  # rejects NaN, and nesting deeper than Python's recursion limit
    except (ValueError, RecursionError):  # ValueError is also raised for an integer of over 4,300 digits
        return None
    return value


def sha256_file(path: Path) -> str:
    with naming_file(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def lock_root(root: Path, option: str = "--root") -> Iterator[None]:
    """Hold `root` for one process at a time. The kernel releases the lock when the process ends, even by a kill.

    Args:
        option: command-line option that chooses the folder, for the error message.

    Raises:
        LockedError: another process holds it; the message says which, and since when.
        IxiError: `root` cannot be written.
    """
    holder_file = root / ".lock.json"
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / ".lock")
        lock.acquire(blocking=False)
    except Timeout:
        holder = read_json(holder_file)
        is_valid = isinstance(holder, dict) and holder.keys() >= {"pid", "host", "since"}
        who = "process {pid} on {host} since {since}".format(**holder) if is_valid else "another process"
        raise LockedError(f"{root} is in use by {who}; wait for it to end, or choose another {option}") from None
    except OSError as error:
        reason = error.strerror or str(error)  # includes file systems without locks
        raise IxiError(f"cannot write to {root}, or lock it: {reason}; choose another {option}") from error
    try:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        write_atomic(holder_file, to_json({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
        yield
    finally:
        with suppress(OSError):  # keep the error that ended the block, such as a lost disk
            holder_file.unlink(missing_ok=True)
        lock.release()
