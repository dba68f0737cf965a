"""Serve byte ranges with latency from a separate process, and count the requests and bytes it answered.

All responses together can be limited to a rate, like a link that they share. Small ones need not queue behind large
ones, as on links with fair queueing. A rate above `LINK` stands for a link of that rate on which time runs faster, so
the latency is shorter by the same factor.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

LATENCY_S = 0.02
LINK = 100e6 / 8
"""Bytes per second of the link with this latency: 100 Mbit/s."""
BLOCK = 1 << 20
LIMITED_BLOCK = 64 << 10
SMALL = 16 << 10  # bytes of a response that need not queue


class _Call(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # as real servers do
    folder = Path()
    counts = {"requests": 0, "bytes": 0}  # noqa: RUF012 - one server per process
    lock = Lock()
    rate = 0.0  # bytes per second; 0 is unlimited
    free_at = 0.0  # time.monotonic() at which the link has sent all that it was given

    def do_GET(self) -> None:
        if self.path == "/counts":
            self._reply(200, json.dumps(self.counts).encode())
            return
        time.sleep(LATENCY_S * min(1, LINK / self.rate) if self.rate else LATENCY_S)
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            self._reply(404, b"")
            return
        size = path.stat().st_size
        requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range") or "")
        start, stop = (int(requested[1]), min(int(requested[2] or size - 1) + 1, size)) if requested else (0, size)
        self.send_response(206 if requested else 200)
        self.send_header("accept-ranges", "bytes")
        self.send_header("etag", f'"{size}"')
        self.send_header("content-length", str(stop - start))
        if requested:
            self.send_header("content-range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        with self.lock:
            self.counts["requests"] += 1
        if self.command == "HEAD":
            return
        with open(path, "rb") as file:
            file.seek(start)
            is_small = stop - start <= SMALL
            while start < stop:
                data = file.read(min(LIMITED_BLOCK if self.rate else BLOCK, stop - start))
                start += len(data)
                self._wait_for_link(len(data), is_small=is_small)
                with self.lock:
                    self.counts["bytes"] += len(data)
                self.wfile.write(data)

    do_HEAD = do_GET  # noqa: N815

    def _wait_for_link(self, size: int, *, is_small: bool) -> None:
        if not self.rate:
            return
        with self.lock:
            _Call.free_at = max(self.free_at, time.monotonic()) + size / self.rate
            wait = size / self.rate if is_small else self.free_at - time.monotonic()
        time.sleep(max(0.0, wait))

    def _reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:  # the client disconnected
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(folder: Path, rate: float = 0) -> Iterator[str]:
    """Serve `folder` during the block, at `rate` bytes per second if that is not 0; yield the URL."""
    command = [sys.executable, "-m", "benchmarks.serving", str(folder), str(rate)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.terminate()


def counts(url: str) -> dict[str, int]:
    with urllib.request.urlopen(f"{url}/counts") as answer:
        found: dict[str, int] = json.load(answer)
    return found


if __name__ == "__main__":
    _Call.folder, _Call.rate = Path(sys.argv[1]), float(sys.argv[2])
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Call)
    server.daemon_threads = True
    print(server.server_port, flush=True)
    server.serve_forever()
