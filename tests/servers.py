"""HTTP servers on loopback with programmable responses, which log their requests."""

from __future__ import annotations

import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import trustme

PROBE = "bytes=0-511"


@dataclass
class LoggedRequest:
    """A request, and the size of its response."""

    method: str
    path: str
    range: str | None
    if_range: str | None
    port: int  # of the client: one for each connection
    sent: int = 0  # bytes of the body
    status: int = 0


class Call(BaseHTTPRequestHandler):
    """A request in progress, with methods to answer it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise a body waits for the acknowledgement of its headers, up to 40 ms
    server: _Server
    logged: LoggedRequest

    @property
    def host(self) -> Host:
        return self.server.host

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:  # the client disconnected
            self.close_connection = True

    def do_GET(self) -> None:
        get = self.headers.get
        self.logged = LoggedRequest(self.command, self.path, get("range"), get("if-range"), self.client_address[1])
        self.host.requests.append(self.logged)
        self.host.answer(self)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.logged.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, data: bytes) -> None:
        if self.command != "HEAD":
            self.logged.sent += len(data)
            self.wfile.write(data)

    def plain(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.head(status, {"content-length": str(len(body))} | {k.replace("_", "-"): v for k, v in headers.items()})
        self.send(body)

    def start(self) -> bytes:
        """Send the headers of a correct response; return its body, which is not sent yet."""
        host, body = self.host, self.host.files.get(self.path, self.host.body)
        headers = {"etag": host.etag} if host.etag else {}
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.logged.range or "")
        current = not host.honours_if_range or self.logged.if_range in (None, host.etag)
        if not (found and host.ranges and current):
            if not host.sends_length:
                headers["connection"] = "close"
            self.head(200, headers | ({"content-length": str(len(body))} if host.sends_length else {}))
            return body
        start, stop = int(found[1]), min(int(found[2]) + 1, len(body))
        if start >= len(body):
            self.plain(416, content_range=f"bytes */{len(body)}")
            return b""
        headers |= {"content-range": f"bytes {start}-{stop - 1}/{len(body)}", "content-length": str(stop - start)}
        self.head(206, headers)
        return body[start:stop]

    def correct(self) -> None:
        self.send(self.start())
        if not self.host.sends_length:
            self.close_connection = True

    def reset(self) -> None:
        """End the connection with a TCP reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def stall(self) -> None:
        """Send nothing more while the server runs."""
        self.host.closing.wait()
        self.close_connection = True


Answer = Callable[[Call], None]


@dataclass
class Host:
    """A server of one file at every path except those of `files`. Tests may change its attributes while it runs."""

    body: bytes
    answer: Answer = Call.correct
    etag: str | None = '"first"'
    ranges: bool = True
    sends_length: bool = True
    honours_if_range: bool = True
    files: dict[str, bytes] = field(default_factory=dict)
    url: str = ""
    requests: list[LoggedRequest] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)  # for answers that modify the host

    @property
    def fetches(self) -> list[LoggedRequest]:
        """The requests for more than the first block."""
        return [a for a in self.requests if a.method == "GET" and a.range != PROBE]

    @property
    def sent(self) -> int:
        """Bytes of the file that were sent, except for the first block, which every download requests."""
        return sum(a.sent for a in self.fetches)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    host: Host

    def handle_error(self, request: object, client_address: object) -> None:
        pass


def served_as(authority: trustme.CA, *names: str) -> ssl.SSLContext:
    """For `serve`: a certificate for `names`, signed by `authority`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    return context


@contextmanager
def serve(host: Host, tls: ssl.SSLContext | None = None, name: str = "127.0.0.1") -> Iterator[Host]:
    """Run `host` on a free port of loopback while the block runs; sets its `url`, which ends in IXI-T1.tar."""
    with _Server(("127.0.0.1", 0), Call) as server:
        server.host = host
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        host.url = f"{'https' if tls else 'http'}://{name}:{server.server_port}/IXI-T1.tar"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield host
        finally:
            host.closing.set()
            server.shutdown()
            thread.join()
