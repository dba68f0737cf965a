"""The lock of a root or run on S3: a lease, which its holder renews, and which expires if it does not.

The lease is the object `.lock.json` in the locked folder. A process creates it, or takes over one that is released or
expired, by a conditional write (`ixi_etl.core.conditional`), so of several processes one succeeds. While it works, a
thread renews the lease. A process that ends releases it by one more write; nothing is deleted, so no permission to
delete is needed, and nobody can delete the lease of another by mistake.

**Clocks.** A lease has expired if the server's `Date` is later than its `Last-Modified` by more than it lasts. Both are
the server's, so the clocks of the machines do not matter. (DynamoDB's lock client, which has no such time, watches for
the duration of a lease whether its version changes: https://aws.amazon.com/blogs/database/building-distributed-locks-\
with-the-dynamodb-lock-client/. That would delay each start after a kill by that time.) Taking over is conditional on
the ETag that was judged, so a holder that renews in between keeps its lease.

**Loss.** A holder that was suspended or cut off until its lease expired, and whose lease another process took over,
finds out at its next renewal, since the ETag has changed. `confirm_lease` renews at once: publishing calls it before
each step that others see.

**Same machine.** A process holds the kernel's lock on the local folder too (`lock_root`), and notes there the id of
its lease. Whoever gets the local lock knows that the process with that id has ended, however it ended, and takes
its lease over without waiting.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ixi_etl.core import signals
from ixi_etl.core.conditional import NoConditionsError, StoredObject, obeys_conditions, put_if_unchanged, read_object
from ixi_etl.core.files import lock_root, os_errors_as_user_errors, parse_json, read_json, to_json, write_atomic
from ixi_etl.core.storage import DataRoot, check_reachable, is_local, to_path
from ixi_etl.errors import LockedError

log = logging.getLogger(__name__)

LEASE = ".lock.json"
IDS = ".lease.json"
"""In the local folder: URL of a lease -> id of the last process that asked for it from here."""

ATTEMPTS = 10  # to write against other processes; each failure means that another one succeeded
CLOCK_STEP_S = 1.0  # the times of HTTP are whole seconds
RELEASE_S = 5.0  # to wait for the last write: the server may have gone


@dataclass(frozen=True)
class LeaseTimes:
    """How long a lease lasts without renewal, and how often it is renewed, in seconds."""

    lasts_s: float = 120.0
    renew_s: float = 30.0


DEFAULT_TIMES = LeaseTimes()

_held: dict[str, Lease] = {}
"""URL of a folder -> its lease, if this process holds it."""


class Lease:
    """The lease of one folder on S3, as this process sees it.

    Attributes:
        folder: the locked folder, on S3.
        path: of the lease.
    """

    def __init__(self, folder: Path, option: str, times: LeaseTimes) -> None:
        self.folder, self.path = folder, folder / LEASE
        self._option, self._times = option, times
        self._etag, self._renewals, self._lost = "", 0, ""
        self._mutex, self._ended = threading.Lock(), threading.Event()
        self._record = {
            "id": secrets.token_hex(16),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "lasts_s": times.lasts_s,
            "released": False,
        }

    def acquire(self, local: Path) -> bool:
        """Create the lease or take it over; False if the server has no conditional writes.

        Raises:
            LockedError: another process holds it.
        """
        noted = read_json(local / IDS)
        ids: dict[str, Any] = noted if isinstance(noted, dict) else {}
        write_atomic(local / IDS, to_json({**ids, str(self.path): self._record["id"]}))
        try:
            ended = str(ids.get(str(self.path), ""))
            if not any(self._try_to_acquire(ended) for _ in range(ATTEMPTS)):
                raise LockedError(f"{self.folder} is being locked by several processes; run again")
        except NoConditionsError:
            return False
        if obeys_conditions(self.path, self._content()):
            return True
        self.release()
        return False

    def _try_to_acquire(self, ended: str) -> bool:
        """One attempt; `ended` is the id of a process that has ended, or ""."""
        current = read_object(self.path)
        holder = _record_of(current)
        if current and holder["id"] == self._record["id"]:  # the answer to the write was lost
            self._etag = current.etag
            return True
        is_here = holder.get("host") == self._record["host"]  # a scratch folder may be a copy from another machine
        is_free = holder["released"] or (is_here and ended and holder["id"] == ended)
        if current and not (is_free or _has_expired(current, holder)):
            raise LockedError(
                f"{self.folder} is in use by {_describe(holder)}; if that was killed, its lock expires at "
                f"{_expiry(current, holder)}; wait, or choose another {self._option}"
            )
        self._etag = put_if_unchanged(self.path, self._content(), current.etag if current else None) or ""
        return bool(self._etag)

    def keep(self) -> None:
        """Renew the lease until it is released or lost."""
        while not self._ended.wait(self._times.renew_s):
            try:
                self.confirm()
            except LockedError as error:
                log.warning("%s", error)
                return
            except Exception as error:  # exceptions of botocore, aiohttp and fsspec
                if not self._ended.is_set():
                    log.warning("cannot renew the lock of %s yet (%s)", self.folder, error)

    def confirm(self) -> None:
        """Renew the lease now.

        Raises:
            LockedError: it was released or lost.
        """
        with self._mutex:
            if not self._lost:
                self._renewals += 1  # so that the content, and with it the ETag, changes
                self._lost = self._write()
            if self._lost:
                raise LockedError(self._lost)

    def _write(self) -> str:
        """Write the lease over the one that this process wrote last; returns why that is impossible, or ""."""
        holder: dict[str, Any] = {}
        for _ in range(ATTEMPTS):
            etag = put_if_unchanged(self.path, self._content(), self._etag)
            if etag:
                self._etag = etag
                return ""
            current = read_object(self.path)
            holder = _record_of(current)
            if current is None or holder["id"] != self._record["id"]:
                break
            self._etag = current.etag  # the answer to an earlier write was lost
        return (
            f"{self.folder} is now locked by {_describe(holder)}, because this process could not renew its lock in "
            "time; it will publish nothing more; run again to resume when the other has ended"
        )

    def release(self) -> None:
        """Mark the lease as free, unless it was lost. Errors are ignored: it then expires."""
        self._ended.set()
        writing = threading.Thread(target=self._write_released, name="release the lock", daemon=True)
        writing.start()
        writing.join(RELEASE_S)

    def _write_released(self) -> None:
        with self._mutex, suppress(Exception):
            if not self._lost:
                self._lost = f"the lock of {self.folder} was released"
                self._record["released"] = True
                current = read_object(self.path)  # a signal may come before the answer to the first write
                if current and _record_of(current)["id"] == self._record["id"]:
                    try:
                        put_if_unchanged(self.path, self._content(), current.etag)
                    except NoConditionsError:  # the server knows `If-None-Match` alone, so nobody relies on the lease
                        self.path.write_bytes(self._content())

    def _content(self) -> bytes:
        return to_json({**self._record, "renewals": self._renewals}).encode()


def _record_of(stored: StoredObject | None) -> dict[str, Any]:
    """The record in a lease; that of an unknown holder, which lasts as long as usual, if it is damaged."""
    found = parse_json(stored.data) if stored else None
    unknown = {"id": "", "released": False, "lasts_s": DEFAULT_TIMES.lasts_s}
    if isinstance(found, dict) and found.keys() >= unknown.keys() and isinstance(found["lasts_s"], int | float):
        return dict(found)
    return unknown


def _has_expired(stored: StoredObject, holder: dict[str, Any]) -> bool:
    return stored.age_s > float(holder["lasts_s"]) + CLOCK_STEP_S


def _expiry(stored: StoredObject, holder: dict[str, Any]) -> str:
    expires = stored.read_at + timedelta(seconds=holder["lasts_s"] + CLOCK_STEP_S - stored.age_s)
    return expires.isoformat(timespec="seconds")


def _describe(holder: dict[str, Any]) -> str:
    known = holder.keys() >= {"pid", "host", "since"}
    return "process {pid} on {host} since {since}".format(**holder) if known else "another process"


@contextmanager
def lock_shared(
    local: Path, shared: str | Path | None, option: str = "--root", times: LeaseTimes = DEFAULT_TIMES
) -> Iterator[None]:
    """Hold a local folder and, if it is on S3, the folder `shared`, for one process of all machines at a time.

    Args:
        shared: None, or a local path, if there is nothing on S3 to lock.
        option: command-line option that chooses the folder, for the error message.

    Where the server has no conditional writes, only processes with the same local folder see each other; a warning
    says so.

    Raises:
        LockedError: another process holds it; the message says which, since when, and when its lock expires.
        IxiError: the local folder cannot be written, or the bucket cannot be reached.
    """
    with lock_root(local, option):
        if shared is None or is_local(to_path(shared)):
            yield
            return
        with _hold_lease(to_path(shared), local, option, times):
            yield


@contextmanager
def _hold_lease(folder: Path, local: Path, option: str, times: LeaseTimes) -> Iterator[None]:
    check_reachable(str(folder))
    lease = Lease(folder, option, times)
    signals.at_end.append(lease.release)  # before it is taken: a signal may come meanwhile
    try:
        with os_errors_as_user_errors():
            is_held = lease.acquire(local)
        if is_held:
            _held[str(folder)] = lease
            threading.Thread(target=lease.keep, name="lock of S3", daemon=True).start()
        else:
            log.warning(
                "the server of %s has no conditional writes, so machines do not see each other's locks: let only one "
                "work there at a time",
                folder,
            )
        yield
    finally:
        signals.at_end.remove(lease.release)
        _held.pop(str(folder), None)
        lease.release()


def lock_data_root(data_root: DataRoot) -> AbstractContextManager[None]:
    """Hold a data root, and its scratch folder if it is on S3: see `lock_shared`."""
    return lock_shared(data_root.local, data_root.root)


def confirm_lease(folder: str | Path) -> None:
    """Renew the lease of a folder now, if this process holds one.

    Raises:
        LockedError: it was lost.
        OSError: the server cannot be reached.
    """
    lease = _held.get(str(to_path(folder)))
    if lease:
        lease.confirm()


def holds_lease(folder: str | Path) -> bool:
    """Whether this process holds, or held and lost, the lease of a folder; the server then obeys conditions."""
    return str(to_path(folder)) in _held
