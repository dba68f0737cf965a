"""Serve byte ranges with latency from a separate process, and count the requests and bytes it answered."""

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
BLOCK = 1 << 20


class _Call(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder = Path()
    counts = {"requests": 0, "bytes": 0}  # noqa: RUF012 - one server per process
    lock = Lock()

    def do_GET(self) -> None:
        if self.path == "/counts":
            self._reply(200, json.dumps(self.counts).encode())
            return
        time.sleep(LATENCY_S)
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
            while start < stop:
                data = file.read(min(BLOCK, stop - start))
                start += len(data)
                with self.lock:
                    self.counts["bytes"] += len(data)
                self.wfile.write(data)

    do_HEAD = do_GET  # noqa: N815

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
def serving(folder: Path) -> Iterator[str]:
    """Serve `folder` during the block; yield the URL."""
    command = [sys.executable, "-m", "benchmarks.serving", str(folder)]
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
    _Call.folder = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Call)
    server.daemon_threads = True
    print(server.server_port, flush=True)
    server.serve_forever()
