"""The exceptions that a person can act on. Anything else that is raised is a bug."""

from __future__ import annotations

import re

_URL = re.compile(r"""([A-Za-z][A-Za-z0-9+.-]+:/+)([^\s'"<>]+)""")


def redacted(text: str) -> str:
    """`text` without what URLs in it may keep secret: user names, passwords, keys, queries and fragments."""
    return _URL.sub(lambda url: url[1] + _redacted_rest(url[1].lower(), url[2]), text)


def _redacted_rest(scheme: str, rest: str) -> str:
    if scheme == "file:///":
        return rest
    host, slash, path = rest.partition("/")
    # A key may hold a slash itself (s3://KEY:SEC/RET@bucket): then what looks like the host cannot be one.
    is_host = r"[a-z0-9._-]*" if scheme.startswith("s3") else r"[^:]*(:\d{1,5})?|\[[0-9A-Fa-f:.]+\](:\d{1,5})?"
    if "@" in host:
        rest = "***" + host[host.rindex("@") :] + slash + path
    elif "@" in path and not re.fullmatch(is_host, re.split("[?#]", host)[0]):
        rest = "***" + rest[rest.rindex("@") :]
    return re.sub(r"([?#])[^?#].*?([:;,.)\]]*)$", r"\1***\2", rest)


class IxiError(Exception):
    """Something a person can mend; the message is one line that says what, where and what to do.

    URLs in the message are redacted, as others' errors, which it may quote, hold links that are signed.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class DownloadError(IxiError):
    """No source gave the right bytes.

    Attributes:
        transient: whether the same might work later (a time-out, a 503), so that a scheduler does well to try again.
    """

    def __init__(self, message: str, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class ArchiveError(IxiError):
    """A file is not a tar archive that can be read."""


class DatasetError(IxiError):
    """A dataset version is missing, damaged or cannot be made."""


class LockedError(IxiError):
    """Another process works on the same root."""


class StoppedError(IxiError):
    """Somebody asked a job to stop; it has saved all that it needs to go on.

    Attributes:
        number: of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class BadVolumeError(IxiError):
    """One volume cannot be used: becomes a manifest row, never the end of a run.

    Attributes:
        reason: one of `ixi_etl.schema.REASONS`.
        detail: the same in words.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # an exception with two arguments pickles only so
        return type(self), (self.reason, self.detail)
