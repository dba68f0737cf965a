"""Decide when to retry a request, and how many requests to send to a server at a time."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

from ixi_etl.core.http_options import HttpOptions
from ixi_etl.core.text import printable
from ixi_etl.errors import redacted

T = TypeVar("T")


class UnusableError(Exception):
    """This URL cannot provide the file: try the next URL.

    Attributes:
        transient: whether the URL may provide the file later.
        status: HTTP status of the response, if that is the reason.
    """

    def __init__(self, message: str, transient: bool = False, status: int | None = None) -> None:
        super().__init__(printable(redacted(message)))  # may quote text from the server
        self.transient = transient
        self.status = status


class ChangedError(Exception):
    """The server no longer serves the file whose download was started."""


class RangeIgnoredError(Exception):
    """The server answered a range request with the whole file, as HTTP allows."""


class TransientError(Exception):
    """A request failed, and may succeed if repeated.

    Attributes:
        busy: whether the server asks for fewer requests.
        wait_s: seconds that the server asks to wait (`Retry-After`).
    """

    def __init__(self, message: str, busy: bool = False, wait_s: float = 0) -> None:
        super().__init__(message)
        self.busy = busy
        self.wait_s = wait_s


class ServerLoad:
    """Requests to one server and bytes received from it, over all downloads of this process.

    Attributes:
        users: downloads that use the server now.
        received_bytes: since the first of them started.
    """

    def __init__(self) -> None:
        self.users = 0
        self.received_bytes = 0
        self._active_requests = 0
        self._max_requests = math.inf
        self._changed = threading.Condition()

    @contextmanager
    def request(self, halt: threading.Event | None = None) -> Iterator[None]:
        """Hold one request slot; wait for it while the server has as many requests as it accepts, unless halted."""
        with self._changed:
            while self._active_requests >= self._max_requests and not (halt and halt.is_set()):
                self._changed.wait(0.1)
            self._active_requests += 1
        try:
            yield
        except TransientError as error:
            with self._changed:
                if error.busy:
                    self._max_requests = max(1, min(self._max_requests, self._active_requests - 1))
            raise
        finally:
            with self._changed:
                self._active_requests -= 1
                self._changed.notify_all()

    def add_received(self, size: int) -> None:
        with self._changed:
            self.received_bytes += size


_servers: dict[str, ServerLoad] = {}
_servers_lock = threading.Lock()


@contextmanager
def server_load(url: str) -> Iterator[ServerLoad]:
    """The shared `ServerLoad` of the server of a URL; forgotten when its last user leaves the block."""
    key = urlsplit(url).netloc
    with _servers_lock:
        server = _servers.setdefault(key, ServerLoad())
        server.users += 1
    try:
        yield server
    finally:
        with _servers_lock:
            server.users -= 1
            if not server.users:
                del _servers[key]


class Attempt(NamedTuple):
    """The start of one attempt, by which `RetryPolicy.record_failure` judges its failure."""

    failures_before: int
    started: float  # time.monotonic()


class RetryPolicy:
    """When to retry, and when to give up: after `HttpOptions.tries` consecutive failures without progress.

    All connections of one download share a policy.
    """

    def __init__(self, server: ServerLoad, http: HttpOptions) -> None:
        self.failures = 0
        self._http = http
        self._server = server
        self._saved_bytes = 0  # need not be fetched again
        self._paused_until = 0.0
        self._lock = threading.Lock()
        self._start_period()

    def add_saved(self, size: int) -> None:
        with self._lock:
            self._saved_bytes += size

    def remaining_pause(self) -> float:
        """Seconds to wait before an attempt starts.

        A failure without progress pauses all connections. Otherwise, many connections would use up all tries during
        one wait.
        """
        return max(0.0, self._paused_until - time.monotonic())

    def start_attempt(self) -> Attempt:
        return Attempt(self.failures, time.monotonic())

    def record_failure(self, error: TransientError, attempt: Attempt, saved: int = 0) -> float:
        """Seconds to wait before the next attempt, after `attempt` failed, having saved `saved` bytes.

        Parallel attempts that fail together count as one failure, and failures do not count while other connections
        make progress. If the server is busy, progress of other files counts too. An attempt that saved bytes is
        repeated at once.

        Raises:
            UnusableError: all tries are used up.
        """
        http = self._http
        with self._lock:
            if error.busy:
                moved = self._server.received_bytes - self._received_before
            else:
                moved = self._saved_bytes - self._saved_before
            now = time.monotonic()
            # The attempt's own bytes count, even if an attempt that failed a moment before has started a new period.
            progressed = moved > http.min_rate * (now - self._period_start)
            if progressed or saved > http.min_rate * (now - attempt.started):
                self.failures = 0
                self._start_period()
            elif attempt.failures_before == self.failures:
                self.failures += 1
                self._start_period()
                if self.failures >= http.tries:
                    raise UnusableError(f"{error}, {http.tries} times", transient=True) from None
            failures = self.failures
            jitter = random.uniform(0.5, 1.5)  # noqa: S311 - no secret  # nosec B311
            at_once = saved and not failures and not error.busy
            backoff = 0.0 if at_once else http.backoff_s * 2 ** max(failures - 1, 0) * jitter
            wait = min(max(backoff, error.wait_s), http.max_wait_s)
            if failures or error.wait_s:
                self._paused_until = max(self._paused_until, now + wait)
            return wait

    def _start_period(self) -> None:
        """Measure progress from now on."""
        self._period_start = time.monotonic()
        self._saved_before = self._saved_bytes
        self._received_before = self._server.received_bytes


def retry(url: str, call: Callable[[], T], http: HttpOptions) -> T:
    """Call `call`, which requests `url`, until it raises no `TransientError`.

    Raises:
        UnusableError: after `http.tries` of those. Other exceptions of `call` propagate.
    """
    with server_load(url) as server:
        policy = RetryPolicy(server, http)
        while True:
            try:
                with server.request():
                    attempt = policy.start_attempt()
                    return call()
            except TransientError as error:
                wait = policy.record_failure(error, attempt)
            time.sleep(wait)
