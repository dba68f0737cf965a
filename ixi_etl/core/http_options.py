"""Options of all HTTP requests."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ixi_etl.core.storage import reject_url_credentials
from ixi_etl.errors import ConfigError


@dataclass(frozen=True)
class HttpOptions:
    """How files are requested over HTTP. The defaults suit archives of several GB on public servers.

    Attributes:
        connections: parallel range requests for each archive. One connection rarely fills a fast link, and servers
            refuse many.
        insecure_hosts: hosts whose TLS certificate is not verified.
        offline: make no request; use only files that were verified before.
        tries: consecutive failed requests, with no data received in between, after which a URL is given up.
        backoff_s: seconds to wait after the first failure. Doubled after each further one, with jitter, so that
            clients do not return to a busy server all at once.
        max_wait_s: longest wait in seconds, even if a `Retry-After` header asks for more, so that one server cannot
            delay a refresh for hours.
        timeout_s: seconds to wait for a connection, for all headers of a response, and for each block of its body.
        min_rate: bytes per second, measured over `timeout_s`. A slower response is treated as stalled, because a
            server that sends a byte now and then would never time out.
        segment_bytes: bytes of one range request, which is also the most that each connection has to fetch again
            after a kill.

    Raises:
        ConfigError: an entry of `insecure_hosts` is not one host name. httpx would take "" and "*" as all hosts.
    """

    connections: int = 4
    insecure_hosts: tuple[str, ...] = ()
    offline: bool = False
    tries: int = 5
    backoff_s: float = 0.5
    max_wait_s: float = 60.0
    timeout_s: float = 30.0
    min_rate: int = 1024
    segment_bytes: int = 8 << 20

    def __post_init__(self) -> None:
        for host in self.insecure_hosts:
            reject_url_credentials(host)
            if not re.fullmatch(r"[A-Za-z0-9._-]+", host):
                raise ConfigError(f"--insecure-host {host!r} is not the name of one host; give one name, or omit it")


DEFAULT_HTTP = HttpOptions()
