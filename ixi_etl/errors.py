"""Every error that a user can correct, with the exit code of the command line. Any other exception is a bug.

::

    Exception
    └── IxiError                1   the base class; its message says what is wrong, where, and what to do
        ├── ConfigError         2   an option, a URL or a setting is invalid (Typer's own usage errors also exit with 2)
        │   └── MissingExtraError   an optional dependency is not installed
        ├── DownloadError       3   no source gave the right bytes
        ├── LockedError         4   another process is working on the same root
        ├── ServerError         5   the Prefect server or the Hugging Face Hub does not answer as it should
        ├── DeviceError         6   the requested device does not exist
        ├── ArchiveError        1   a file is not a readable tar archive
        ├── DatasetError        1   a dataset version is missing, damaged or cannot be made
        │   └── EmptySplitError     a version has no subject in a split
        ├── CheckpointError     1   a checkpoint is damaged, missing, or of another training run
        ├── TrainingError       1   a training run cannot continue
        ├── SynthesisError      1   a generator cannot be applied to a volume
        ├── ExportError         1   a generator cannot be exported
        ├── BadVolumeError      -   one volume is unusable: becomes an excluded row of the manifest, never an exit
        └── StoppedError    128+n   a job was stopped by signal n, after it had saved its state
"""

from __future__ import annotations

import re
from typing import ClassVar

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
    """A user-correctable error. The message is one line that says what is wrong, where, and what to do.

    URLs in the message are redacted, because a quoted error of a library may contain signed links.

    Attributes:
        exit_code: of the command line when this error ends it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class ConfigError(IxiError):
    """An option, a URL or a setting is invalid."""

    exit_code = 2


class MissingExtraError(ConfigError):
    """An optional dependency is not installed."""


class DownloadError(IxiError):
    """No source gave the right bytes.

    Attributes:
        transient: whether a later attempt may succeed (a timeout, a 503), so that a scheduler should retry.
    """

    exit_code = 3

    def __init__(self, message: str, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class ArchiveError(IxiError):
    """A file is not a readable tar archive."""


class DatasetError(IxiError):
    """A dataset version is missing, damaged or cannot be made."""


class EmptySplitError(DatasetError):
    """A version has no subject in a split."""


class LockedError(IxiError):
    """Another process is working on the same root."""

    exit_code = 4


class ServerError(IxiError):
    """The Prefect server or the Hugging Face Hub does not answer as it should."""

    exit_code = 5


class DeviceError(IxiError):
    """The requested device does not exist."""

    exit_code = 6


class CheckpointError(IxiError):
    """A checkpoint is damaged, missing, or of another training run."""


class TrainingError(IxiError):
    """A training run cannot continue."""


class SynthesisError(IxiError):
    """A generator cannot be applied to a volume."""


class ExportError(IxiError):
    """A generator cannot be exported, or the export does not compute what the generator computes."""


class StoppedError(IxiError):
    """A job was stopped by a signal, after it had saved its state.

    Attributes:
        number: of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number
        self.exit_code = 128 + number  # type: ignore[misc]  # of each instance


class BadVolumeError(IxiError):
    """One volume is unusable: it becomes an excluded row of the manifest and never ends a run.

    Attributes:
        reason: one of `ixi_etl.dataset.schema.REASONS`.
        detail: the same in words.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # an exception with two arguments pickles only so
        return type(self), (self.reason, self.detail)
