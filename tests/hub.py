"""A server on loopback that speaks the calls of the Hugging Face Hub that a push makes, and keeps what arrives.

Calls: create a repository, validate the YAML of a card, ask how to upload each file, upload large files (Git LFS, basic
transfer), commit. As on the Hub, files with some endings are large, and the others are sent inside the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_" + "s3cret" * 6  # must not appear in any output or file
LARGE = (".safetensors", ".onnx", ".jpg")


@dataclass
class Hub:
    """What the server received. `refuse` is a status that it answers to every request with, after authentication."""

    url: str = ""
    refuse: int = 0
    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)  # kind and name -> the request that made it
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # the same -> path -> content
    objects: dict[str, bytes] = field(default_factory=dict)  # SHA-256 -> content
    requests: list[str] = field(default_factory=list)
    commits: list[list[str]] = field(default_factory=list)


class _Call(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _answer(self) -> None:
        hub = self.server.hub
        body = self._read()
        hub.requests.append(f"{self.command} {self.path}")
        if self.command == "PUT":  # the storage of large files: no token, its addresses are signed
            oid = self.path.rpartition("/")[2]
            assert hashlib.sha256(body).hexdigest() == oid
            assert "authorization" not in self.headers
            hub.objects[oid] = body
            return self._send(200, {})
        if self.headers.get("authorization") != f"Bearer {TOKEN}" and self.path != "/api/validate-yaml":
            return self._send(401, {"error": "Invalid username or password."})
        if hub.refuse:
            return self._send(hub.refuse, {"error": "not you"})
        return self._send(*self._route(hub, body))

    def _read(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    do_GET = do_POST = do_PUT = _answer  # noqa: N815

    def _route(self, hub: Hub, body: bytes) -> tuple[int, Any]:
        if self.path == "/api/validate-yaml":
            return self._validate(json.loads(body))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            key = f"{asked.get('type', 'model')}s/{asked['organization']}/{asked['name']}"
            if key in hub.repositories:
                return 409, {"error": "You already created this repo", "url": f"{hub.url}/{key}"}
            hub.repositories[key] = asked
            hub.files[key] = {}
            return 200, {"url": f"{hub.url}/{key.removeprefix('models/')}"}
        if match := re.fullmatch(r"/api/((?:model|dataset)s/[^/]+/[^/]+)/preupload/main", self.path):
            asked = json.loads(body)["files"]
            modes = {f["path"]: "lfs" if f["path"].endswith(LARGE) and f["size"] else "regular" for f in asked}
            return 200, {"files": [{"path": k, "uploadMode": v, "shouldIgnore": False} for k, v in modes.items()]}
        if match := re.fullmatch(r"/(?:datasets/)?[^/]+/[^/]+\.git/info/lfs/objects/batch", self.path):
            objects = json.loads(body)["objects"]
            for each in objects:
                if each["oid"] not in hub.objects:  # otherwise there is nothing to do
                    each["actions"] = {"upload": {"href": f"{hub.url}/objects/{each['oid']}"}}
            return 200, {"transfer": "basic", "objects": objects}
        if match := re.fullmatch(r"/api/((?:model|dataset)s/[^/]+/[^/]+)/commit/main", self.path):
            return self._commit(hub, match[1], [json.loads(line) for line in body.splitlines()])
        return 404, {"error": "Repository not found"}

    @staticmethod
    def _validate(asked: dict[str, str]) -> tuple[int, Any]:
        if not asked["content"].startswith("---\n"):
            return 200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        head = yaml.safe_load(asked["content"].split("---\n")[1])
        problems = [] if isinstance(head, dict) and head.get("license") else [{"message": "no license"}]
        return (400 if problems else 200), {"errors": problems, "warnings": []}

    @staticmethod
    def _commit(hub: Hub, key: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        written = {}
        for line in lines[1:]:
            value = line["value"]
            written[value["path"]] = (
                base64.b64decode(value["content"]) if line["key"] == "file" else hub.objects[value["oid"]]
            )
        hub.files[key] |= written
        hub.commits.append(sorted(written))
        return 200, {"commitUrl": f"{hub.url}/{key}/commit/{'0' * 40}", "commitOid": "0" * 40}

    def _send(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Run an empty Hub on a free port of loopback while the block runs."""
    with _Server(("127.0.0.1", 0), _Call) as server:
        server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server.hub
        finally:
            server.shutdown()
            thread.join()
