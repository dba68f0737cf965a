"""Fetch selected members of a remote archive with range requests, instead of the whole archive."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ixi_etl.core.files import os_errors_as_user_errors
from ixi_etl.core.http_options import DEFAULT_HTTP, HttpOptions
from ixi_etl.core.progress import Progress, no_progress
from ixi_etl.core.storage import fingerprint, naming_file
from ixi_etl.errors import ConfigError, DownloadError
from ixi_etl.sources.arrivals import Arrival
from ixi_etl.sources.cache import VerifiedFile
from ixi_etl.sources.catalog import Source
from ixi_etl.sources.http import HttpClient, RemoteFile, probe
from ixi_etl.sources.partial import PartialFile, SegmentBounds
from ixi_etl.sources.ranges import fetch_ranges
from ixi_etl.sources.retries import ChangedError, RangeIgnoredError, UnusableError, retry

MAX_REQUEST_BYTES = 32 << 20
"""Adjacent members share a request of up to this size."""


@dataclass(frozen=True)
class RemoteArchive:
    """An archive on a server that serves byte ranges of it."""

    source: Source
    remote_file: RemoteFile

    @property
    def url(self) -> str:
        return self.remote_file.url


def find_remote(source: Source, http: HttpOptions = DEFAULT_HTTP) -> RemoteArchive:
    """Find the first URL of a source that serves byte ranges of the archive.

    Raises:
        DownloadError: no URL does.
        ConfigError: the source is not served over HTTP; its members are read in place anyway.
    """
    if not source.over_http:
        raise ConfigError(f"{source.urls[0]} is read in place; omit --fetch members")
    reasons, transient = [], False
    for url in source.urls:
        try:
            with HttpClient(http) as client:
                remote_file = retry(url, lambda: probe(client, url, source), http)  # noqa: B023 - called at once
            remote_file = replace(remote_file, has_md5=False)  # the MD5 is of the whole archive
            if not remote_file.ranges or remote_file.validator is None:  # no MD5 would reveal a mix of two archives
                raise UnusableError("serves no byte ranges with an ETag or date; fetch the whole archives")
            return RemoteArchive(source, remote_file)
        except UnusableError as error:
            reasons.append(f"{url}: {error}")
            transient |= error.transient
    raise DownloadError(f"cannot request {source.name}: {'; '.join(reasons)}", transient)


def fetch_members(
    remote: RemoteArchive,
    folder: Path,
    members: SegmentBounds,
    wanted: Iterable[int],
    *,
    http: HttpOptions = DEFAULT_HTTP,
    progress: Progress = no_progress,
) -> VerifiedFile:
    """Fetch the members `wanted` (indices) of the archive's `members`, given as [start, stop) in bytes.

    They are stored at their offsets in a sparse file `NAME.members.part`, which is read like the archive. Members that
    an earlier call fetched of the same archive are not fetched again. The MD5 of the archive cannot be verified.

    Raises:
        DownloadError: the archive changed, or could not be read, or the disk is full.
    """
    path, remote_file = folder / f"{remote.source.name}.members", remote.remote_file
    with os_errors_as_user_errors(DownloadError), naming_file(path):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with HttpClient(http) as client, PartialFile(path, remote_file, http, members) as part:
                segments = [part.segments[index] for index in wanted]
                part.needed_bytes = sum(segment.stop - segment.start for segment in segments)
                part.check_disk()
                fetch_ranges(client, remote_file, part, segments, MAX_REQUEST_BYTES, progress, Arrival(path))
                part.sync()
        except ChangedError:
            message = f"{remote.url} changed while its members were fetched; run again"
            raise DownloadError(message, transient=True) from None
        except RangeIgnoredError:
            message = f"{remote.url} ignores byte ranges, so members cannot be fetched alone; fetch the whole archives"
            raise DownloadError(message) from None
        except UnusableError as error:
            raise DownloadError(f"cannot fetch members of {remote.url}: {error}", error.transient) from error
        return VerifiedFile(
            name=path.stem,
            location=str(part.path),
            size=remote_file.size or 0,
            md5="",
            checked=False,
            origin=remote.url,
            validator=remote_file.validator,
            fingerprint=fingerprint(str(part.path)),
        )
