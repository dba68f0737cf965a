"""HTTP requests: the client, the metadata of a remote file, and errors sorted by what to do next."""

from __future__ import annotations

import functools
import logging
import math
import netrc
import os
import re
import ssl
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from ixi_etl.core.http_options import HttpOptions
from ixi_etl.scans.tar import MAX_ARCHIVE_BYTES
from ixi_etl.sources.catalog import Source
from ixi_etl.sources.retries import ChangedError, TransientError, UnusableError

PROBE_RANGE = "bytes=0-511"
"""The first block of a tar, which shows whether it is one."""

MAX_SMALL_FILE = 8 << 20
"""Maximum bytes of a file that is read into memory. MD5SUMS of all members of IXI has 70 KB."""

for _logger in ("httpx", "httpcore"):  # they log every URL, including the signed URLs of redirects
    logging.getLogger(_logger).setLevel(logging.WARNING)


@dataclass(frozen=True)
class RemoteFile:
    """What a server reports about a file.

    Attributes:
        size: in bytes; None if unknown.
        validator: ETag or date for `If-Range`.
        ranges: whether the server serves byte ranges.
        has_md5: whether the MD5 of the complete file will be verified. Then ranges with different validators may be
            combined: the nodes of one server may have different ETags for the same bytes.
    """

    url: str
    size: int | None
    validator: str | None
    ranges: bool
    has_md5: bool = False


class HttpClient(httpx.Client):
    """A client that applies `HttpOptions`, reads credentials from `~/.netrc`, and refuses redirects from https to http.

    Attributes:
        http: the options.
    """

    def __init__(self, http: HttpOptions) -> None:
        self.http = http
        super().__init__(
            headers={"accept-encoding": "identity", "user-agent": "ixi-etl"},
            follow_redirects=True,
            auth=_netrc_auth(),
            timeout=http.timeout_s,
            verify=_trusted(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")),
            limits=httpx.Limits(max_connections=http.connections + 1),
            mounts={f"https://{host}": httpx.HTTPTransport(verify=False) for host in http.insecure_hosts},
            event_hooks={"request": [_HeaderTimeLimit(http.timeout_s)], "response": [_forbid_https_downgrade]},
        )


@functools.cache
def _trusted(_file: str | None, _folder: str | None) -> ssl.SSLContext:
    """The certificates that httpx trusts, given the variables that it looks at. Reading them takes 20 ms a client."""
    return httpx.create_ssl_context()


class _HeaderTimeLimit(threading.local):
    """A request hook that limits the time to receive all headers of a response.

    The timeouts of httpx apply to each read. A server that sends its headers byte by byte, or "103 Early Hints"
    without end, would block a scheduled refresh forever. httpx has no option for this, so the `read` method of each
    new connection is wrapped through the `trace` extension. The deadline is per thread, because a connection serves
    one request of one thread at a time.
    """

    deadline = math.inf

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s

    def __call__(self, request: httpx.Request) -> None:
        request.extensions["trace"] = self._trace

    def _trace(self, event: str, info: dict[str, Any]) -> None:
        if event.endswith("send_request_headers.started"):
            self.deadline = time.monotonic() + self._limit_s
        elif event.endswith("receive_response_headers.complete"):
            self.deadline = math.inf
        elif event.endswith(("connect_tcp.complete", "start_tls.complete")):
            stream = info["return_value"]
            stream.read = functools.partial(self._read, stream.read)

    def _read(self, read: Callable[..., bytes], *args: Any, **kwargs: Any) -> bytes:
        if time.monotonic() > self.deadline:
            raise TransientError(f"no complete response headers in {self._limit_s:g} s")
        return read(*args, **kwargs)


def _forbid_https_downgrade(response: httpx.Response) -> None:
    if response.has_redirect_location and response.url.scheme == "https":
        target = response.url.join(response.headers["location"])
        if target.scheme == "http":
            raise UnusableError(f"it redirects from https to {target}, which anyone on the network path can change")


def _netrc_auth() -> httpx.Auth | None:
    """The user's credentials; httpx sends each to its own host only."""
    try:
        return httpx.NetRCAuth()
    except (OSError, netrc.NetrcParseError):
        return None


def probe(client: HttpClient, url: str, source: Source) -> RemoteFile:
    """Request the first block, to learn whether the file exists and is a tar, its size, and whether ranges work.

    Raises:
        UnusableError: the URL cannot provide the file.
        TransientError: the request failed and may succeed later.
    """
    with get(client, url, {"range": PROBE_RANGE}) as response:
        head = b""
        for block in body_blocks(client, response):
            head += block
            if len(head) >= 512:
                break
        headers = response.headers
        total = re.fullmatch(r"bytes 0-\d+/(\d{1,18})", headers.get("content-range", ""))
        length = headers.get("content-length")
        partial = response.status_code == 206 and total is not None
        if source.name.endswith(".tar"):
            try:
                tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                is_html = head.lstrip()[:1] == b"<" or "html" in headers.get("content-type", "")
                raise UnusableError("an HTML page in place of a tar" if is_html else "not a tar archive") from None
        size = int(total[1]) if partial and total else int(length) if response.status_code == 200 and length else None
        if size == 0:
            raise UnusableError("an empty file")
        if size is not None and size > MAX_ARCHIVE_BYTES:
            raise UnusableError(f"a file of {size:.3g} bytes; at most {MAX_ARCHIVE_BYTES} are fetched")
        validator, has_md5 = validator_of(response), source.md5 is not None
        # Without a validator and an MD5, ranges of a file that changes would be mixed unnoticed.
        return RemoteFile(url, size, validator, partial and (validator is not None or has_md5), has_md5)


def read_small_file(client: HttpClient, url: str) -> bytes:
    """Read a file of at most `MAX_SMALL_FILE` bytes.

    Raises:
        UnusableError: the file is larger, or the URL cannot provide it.
        TransientError: the request failed and may succeed later.
    """
    data = bytearray()
    with get(client, url, {}) as response:
        for block in body_blocks(client, response):
            data += block
            if len(data) > MAX_SMALL_FILE:
                raise UnusableError(f"more than {MAX_SMALL_FILE} bytes")
        length = response.headers.get("content-length", "")
        if length.isdecimal() and len(data) < int(length):
            raise TransientError("the connection ended early")
    return bytes(data)


def validator_of(response: httpx.Response) -> str | None:
    """The value for `If-Range`: a strong ETag, otherwise the date."""
    etag: str = response.headers.get("etag", "")
    date: str | None = response.headers.get("last-modified")
    return etag if etag.startswith('"') else date


@contextmanager
def get(client: HttpClient, url: str, headers: dict[str, str]) -> Iterator[httpx.Response]:
    """Send a GET request and yield a response with status 200 or 206.

    Every failure, including one while the body is read in the block, is translated to one of three exceptions.

    Raises:
        ChangedError: the server has no such range any more.
        TransientError: the request failed and may succeed later.
        UnusableError: the URL cannot provide the file.
    """
    try:
        with client.stream("GET", url, headers=headers) as response:
            status, message = response.status_code, f"{response.status_code} {response.reason_phrase}"
            if status == 416 and headers.get("range") not in (None, PROBE_RANGE):
                raise ChangedError
            if status >= 500 or status in (408, 425, 429):
                raise TransientError(message, busy=status in (429, 503), wait_s=_retry_after(response))
            if status not in (200, 206):
                raise UnusableError(message, status=status)
            yield response
    except (httpx.TooManyRedirects, httpx.InvalidURL, httpx.UnsupportedProtocol, UnicodeError) as error:
        raise UnusableError(str(error)) from error
    except httpx.TransportError as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise UnusableError("its TLS certificate is not valid (--insecure-host HOST to accept it)") from error
        raise TransientError(str(error) or type(error).__name__) from error


def _retry_after(response: httpx.Response) -> float:
    """Seconds in the `Retry-After` header, which holds a number or a date; 0 without a valid one."""
    value = response.headers.get("retry-after", "").strip()
    if re.fullmatch("[0-9]+", value):
        return float(value)
    try:
        date = response.headers.get("date")
        now = parsedate_to_datetime(date) if date is not None else datetime.now(UTC)
        return max(0.0, (parsedate_to_datetime(value) - now).total_seconds())
    except (TypeError, ValueError, OverflowError):  # no date, or only one of the two has a time zone
        return 0.0


def body_blocks(client: HttpClient, response: httpx.Response) -> Iterator[bytes]:
    """The blocks of a response's body.

    Raises:
        TransientError: they arrive at less than `HttpOptions.min_rate`.
    """
    http, period_start, period_bytes = client.http, time.monotonic(), 0
    for block in response.iter_raw():
        yield block
        period_bytes += len(block)
        elapsed = time.monotonic() - period_start
        if elapsed > http.timeout_s:
            if period_bytes < http.min_rate * elapsed:
                raise TransientError(f"slower than {http.min_rate} bytes per second")
            period_start, period_bytes = time.monotonic(), 0
