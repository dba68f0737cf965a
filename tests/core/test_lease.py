"""The lock of a folder on S3 has one holder on all machines, and a holder that lost it finds out.

A "machine" is a local folder: processes with the same one also share the kernel's lock.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from conftest import capture_logs, s3_environment

from ixi_etl.core import lease as lease_module
from ixi_etl.core import signals
from ixi_etl.core.conditional import put_if_unchanged, read_object
from ixi_etl.core.lease import DEFAULT_TIMES, LEASE, Lease, LeaseTimes, confirm_lease, lock_shared
from ixi_etl.core.storage import to_path
from ixi_etl.errors import LockedError

EXPIRED = LeaseTimes(lasts_s=-2.0)
"""A lease that has expired when it is written, as if its holder had been dead for long."""


def machine(tmp_path: Path, name: str) -> Path:
    (folder := tmp_path / name).mkdir(exist_ok=True)
    return folder


def stored(root: str) -> dict[str, Any]:
    found = read_object(to_path(root) / LEASE)
    assert found
    record: dict[str, Any] = json.loads(found.data)
    return record


def dead_process(root: str, local: Path, times: LeaseTimes = DEFAULT_TIMES) -> Lease:
    """A lease that nobody renews or releases."""
    lease = Lease(to_path(root), "--root", times)
    assert lease.acquire(local)
    return lease


def test_one_of_many_processes_gets_the_lock(s3_root: str, tmp_path: Path) -> None:
    count, refused = 12, threading.Semaphore(0)

    def try_to_hold(number: int) -> str:
        try:
            with lock_shared(machine(tmp_path, str(number)), s3_root):
                for _ in range(count - 1):
                    assert refused.acquire(timeout=60)
                return "held"
        except LockedError as error:
            refused.release()
            return str(error)

    with ThreadPoolExecutor(count) as pool:
        results = list(pool.map(try_to_hold, range(count)))
    assert results.count("held") == 1
    assert sum("is in use by process" in result for result in results) == count - 1


def test_the_second_machine_is_told_who_holds_it_and_until_when(s3_root: str, tmp_path: Path) -> None:
    holder = rf"{s3_root} is in use by process {os.getpid()} on {socket.gethostname()} since 20\S+"
    message = rf"{holder}; if that was killed, its lock expires at 20\S+\+00:00; wait, or choose another --root"
    with lock_shared(machine(tmp_path, "a"), s3_root):
        with pytest.raises(LockedError, match=message), lock_shared(machine(tmp_path, "b"), s3_root):
            pass
        confirm_lease(s3_root)
    with lock_shared(machine(tmp_path, "b"), s3_root):
        confirm_lease(s3_root)
    confirm_lease(s3_root)  # not held: nothing to confirm


def test_the_lock_is_released_after_an_error_and_before_a_signal_ends_the_process(s3_root: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside"), lock_shared(machine(tmp_path, "a"), s3_root):
        raise ValueError("inside")
    assert stored(s3_root)["released"]
    with lock_shared(machine(tmp_path, "a"), s3_root):
        assert not stored(s3_root)["released"]
        for callback in signals.at_end:
            callback()
        assert stored(s3_root)["released"]
        with pytest.raises(LockedError, match="was released"):  # the main thread may still run for a moment
            confirm_lease(s3_root)
    assert not signals.at_end


def test_the_lock_is_released_after_an_error_while_it_is_taken(
    s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(lease_module, "obeys_conditions", interrupt)
    with pytest.raises(KeyboardInterrupt), lock_shared(machine(tmp_path, "a"), s3_root):
        pass
    assert stored(s3_root)["released"]


def test_a_lock_is_taken_over_once_it_has_expired(s3_root: str, tmp_path: Path) -> None:
    dead_process(s3_root, machine(tmp_path, "a"), EXPIRED)
    with lock_shared(machine(tmp_path, "b"), s3_root):
        assert stored(s3_root)["lasts_s"] == 120


def test_a_process_of_the_same_machine_need_not_wait(s3_root: str, tmp_path: Path) -> None:
    """It holds the kernel's lock of the local folder, so the process before it has ended."""
    dead_process(s3_root, machine(tmp_path, "a"))
    with pytest.raises(LockedError), lock_shared(machine(tmp_path, "b"), s3_root):
        pass
    with lock_shared(machine(tmp_path, "a"), s3_root):
        confirm_lease(s3_root)


def test_a_copy_of_the_scratch_folder_on_another_machine_has_to_wait(
    s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead_process(s3_root, machine(tmp_path, "a"))
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    with pytest.raises(LockedError, match="is in use by process"), lock_shared(machine(tmp_path, "a"), s3_root):
        pass


def test_a_lost_lock_is_noticed_and_not_released(s3_root: str, tmp_path: Path) -> None:
    with lock_shared(machine(tmp_path, "a"), s3_root, times=EXPIRED):
        other = dead_process(s3_root, machine(tmp_path, "b"))
        for _ in range(2):
            with pytest.raises(
                LockedError, match=rf"now locked by process {os.getpid()} on .*time; it will publish nothing more; run"
            ):
                confirm_lease(s3_root)
    assert not stored(s3_root)["released"]
    other.confirm()
    (to_path(s3_root) / LEASE).unlink()
    with pytest.raises(LockedError, match="now locked by another process"):
        other.confirm()


def test_a_held_lock_is_renewed(s3_root: str, tmp_path: Path) -> None:
    with lock_shared(machine(tmp_path, "a"), s3_root, times=LeaseTimes(renew_s=0.01)):
        renewed = threading.Event()
        while stored(s3_root)["renewals"] < 3:
            renewed.wait(0.01)
        assert stored(s3_root)["lasts_s"] == 120


@pytest.mark.parametrize("note", ["[1]", '{"id": 1}', "", "[" * 200_000, '{"lasts_s":"a","released":0,"id":""}'])
def test_a_damaged_lock_belongs_to_somebody_until_it_expires(note: str, s3_root: str, tmp_path: Path) -> None:
    (to_path(s3_root) / LEASE).write_bytes(note.encode())
    with pytest.raises(LockedError, match="by another process"), lock_shared(machine(tmp_path, "b"), s3_root):
        pass


def test_a_local_folder_needs_no_lock_on_s3(tmp_path: Path) -> None:
    with lock_shared(tmp_path, tmp_path):
        assert not (tmp_path / ".lease.json").exists()
        confirm_lease(tmp_path)


def test_an_object_is_written_only_as_it_was_seen(s3_root: str) -> None:
    path = to_path(s3_root) / "object"
    assert read_object(path) is None
    assert put_if_unchanged(path, b"0", '"0123"') is None
    first = put_if_unchanged(path, b"1", None)
    assert first
    assert put_if_unchanged(path, b"2", None) is None
    second = put_if_unchanged(path, b"2", first)
    assert second
    assert put_if_unchanged(path, b"3", first) is None
    found = read_object(path)
    assert found
    assert (found.data, found.etag) == (b"2", second)
    assert -1 <= found.age_s < 60


# -- servers that behave otherwise -------------------------------------------------------------------------------------


@contextmanager
def in_front_of_s3(behaviour: str) -> Iterator[None]:
    """A server that passes requests on, except that it treats writes with conditions in another way.

    It `ignores` or `refuses` the conditions, `refuses if-match` alone, or `repeats` each write.
    A write is repeated by a client that did not get the answer to the first one.
    """
    upstream = urlsplit(os.environ["AWS_ENDPOINT_URL"]).netloc

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = dict(self.headers.items())
            conditions = [name for name in headers if name.lower() in ("if-match", "if-none-match")]
            is_write = self.command == "PUT" and bool(conditions)
            refused = {"refuses": conditions, "refuses if-match": [n for n in conditions if n.lower() == "if-match"]}
            if is_write and refused.get(behaviour):
                error = b"<Error><Code>NotImplemented</Code><Message>A header is not implemented</Message></Error>"
                self.answer(501, {}, error)
                return
            if is_write and behaviour == "ignores":
                headers = {name: value for name, value in headers.items() if name not in conditions}
            for _ in range(2 if is_write and behaviour == "repeats" else 1):
                connection = http.client.HTTPConnection(upstream)
                connection.request(self.command, self.path, body, headers)
                response = connection.getresponse()
                data = response.read()
                connection.close()
            self.answer(response.status, dict(response.getheaders()), data)

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = pass_on  # noqa: N815

        def answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
            self.send_response_only(status)
            kept = {n: v for n, v in headers.items() if n.lower() not in ("connection", "content-length")}
            for name, value in (kept | {"Content-Length": str(len(data))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with s3_environment({"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}):
            yield
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("behaviour", ["ignores", "refuses", "refuses if-match"])
def test_a_server_without_conditional_writes_leaves_the_local_lock(
    behaviour: str, s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("ixi_etl"), "propagate", True)  # a command of another test may have set it
    with in_front_of_s3(behaviour), capture_logs(logging.WARNING) as records:
        with lock_shared(machine(tmp_path, "a"), s3_root):
            with pytest.raises(LockedError, match=r"/a is in use by"), lock_shared(machine(tmp_path, "a"), s3_root):
                pass
            with lock_shared(machine(tmp_path, "b"), s3_root):
                confirm_lease(s3_root)
        warnings = [r.getMessage() for r in records if r.name.startswith("ixi_etl")]
    assert len(warnings) == 2  # one for each that was locked
    assert "has no conditional writes, so machines do not see each other's locks" in warnings[0]
    lease = read_object(to_path(s3_root) / LEASE)
    assert lease is None or json.loads(lease.data)["released"]


def test_a_repeated_write_counts_as_the_one_that_succeeded(s3_root: str, tmp_path: Path) -> None:
    with in_front_of_s3("repeats"), lock_shared(machine(tmp_path, "a"), s3_root):
        for _ in range(3):
            confirm_lease(s3_root)
        with pytest.raises(LockedError, match="is in use by"), lock_shared(machine(tmp_path, "b"), s3_root):
            pass
