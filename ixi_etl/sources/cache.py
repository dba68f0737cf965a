"""Download one file, or use the local copy: complete and verified, from the first URL that can provide it.

Only a file with the right MD5 gets the name `NAME`; `NAME.json` then records what was verified, so that the next
refresh need not read the file again. Until then, its bytes are in `NAME.part` (`ixi_etl.sources.partial`).
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import httpx

from ixi_etl.core.files import os_errors_as_user_errors, read_json, to_json, write_atomic
from ixi_etl.core.http_options import DEFAULT_HTTP, HttpOptions
from ixi_etl.core.progress import Progress, no_progress
from ixi_etl.core.storage import filesystem_of, fingerprint, naming_file
from ixi_etl.core.text import printable
from ixi_etl.errors import ArchiveError, DownloadError, IxiError, redacted
from ixi_etl.scans.survey import VolumeFile
from ixi_etl.scans.tar import describe_non_file, index_archive
from ixi_etl.sources.arrivals import Arrival
from ixi_etl.sources.catalog import Source, not_found
from ixi_etl.sources.http import HttpClient, RemoteFile, probe, validator_of
from ixi_etl.sources.partial import PartialFile, discard_partial
from ixi_etl.sources.prefix_hash import PrefixHash
from ixi_etl.sources.ranges import fetch_ranges, fetch_stream
from ixi_etl.sources.retries import ChangedError, RangeIgnoredError, TransientError, UnusableError, retry

log = logging.getLogger(__name__)

BLOCK_BYTES = 4 << 20  # of a file that is hashed


@dataclass(frozen=True)
class VerifiedFile:
    """A complete file whose MD5 was computed.

    Attributes:
        location: path (or object URL) to read it at.
        checked: whether its MD5 was compared with a published one.
        origin: the URL or path that it came from.
        validator: the ETag or date from its server, if any.
        fingerprint: identity of the file at `location` when it was hashed; another fingerprint means another file.
    """

    name: str
    location: str
    size: int
    md5: str
    checked: bool
    origin: str
    validator: str | None
    fingerprint: str

    @property
    def surveyed_as(self) -> str | tuple[VolumeFile, ...]:
        """What `survey` reads: the archive, or the files of a folder."""
        return self.location

    @property
    def files_sha256(self) -> str:
        """What stands for the MD5 if this is a folder of files; "" for an archive."""
        return ""

    def fingerprint_of(self, location: str) -> str:
        """The expected fingerprint of the file that holds a member."""
        return self.fingerprint

    def current_fingerprint(self) -> str:
        """What `fingerprint` would be now.

        Raises:
            FileNotFoundError: the file does not exist.
        """
        return fingerprint(self.location)


def acquire(
    source: Source,
    folder: Path,
    *,
    http: HttpOptions = DEFAULT_HTTP,
    progress: Progress = no_progress,
    arrival: Arrival | None = None,
) -> VerifiedFile:
    """Ensure that the file of `source` is available, complete and verified.

    A user's own file that is not served over HTTP is used in place. A file that was verified before costs one HEAD
    request, or none if `http.offline`.

    Args:
        folder: for downloads, and for the records of verified files.
        arrival: follows the download, if there is one.

    Raises:
        DownloadError: no URL provided the right file; the message gives the reason for each URL, and what to do.
    """
    path = folder / source.name
    location = str(path) if source.over_http else source.urls[0]
    existing = _read_record(folder, source.name, location)
    if existing and (existing.md5 == source.md5 if source.md5 else existing.origin in source.urls):
        existing = replace(existing, checked=existing.checked or source.md5 is not None)
        if http.offline or not source.over_http or _may_use_copy(existing, source, http):
            return existing
    with os_errors_as_user_errors(DownloadError), naming_file(path):
        folder.mkdir(parents=True, exist_ok=True)
        if not source.over_http:
            return _verify_in_place(source, folder, progress)
        if path.exists() and source.md5 and _hash_file(location, progress) == source.md5:
            discard_partial(path)
            return _write_record(folder, source, location, source.md5, source.urls[0], None)
        if http.offline:
            raise DownloadError(f"{path} is missing or not the right file; run once without --offline to fetch it")
        return _try_each_url(source, path, http, progress, arrival or Arrival(path))


def recorded_md5(folder: Path, name: str, location: str) -> str | None:
    """The MD5 that was computed of the file at `location`; None if it is unknown, or the file has changed since."""
    existing = _read_record(folder, name, location)
    return existing.md5 if existing else None


def _read_record(folder: Path, name: str, location: str) -> VerifiedFile | None:
    record = read_json(folder / f"{name}.json")
    with suppress(Exception):  # a damaged record, or an inaccessible file, counts as no record
        existing = VerifiedFile(**record)
        if existing.location == location and existing.fingerprint == fingerprint(location):
            return existing
    return None


def _write_record(
    folder: Path, source: Source, location: str, md5: str, origin: str, validator: str | None
) -> VerifiedFile:
    filesystem, path = filesystem_of(location)
    verified = VerifiedFile(
        name=source.name,
        location=location,
        size=filesystem.size(path),
        md5=md5,
        checked=source.md5 is not None,
        origin=origin,
        validator=validator,
        fingerprint=fingerprint(location),
    )
    write_atomic(folder / f"{source.name}.json", to_json(asdict(verified)))
    return verified


def _hash_file(location: str, progress: Progress, prefix: PrefixHash | None = None) -> str:
    """The MD5 of a file or object, in hex; the bytes of `prefix` are not read again.

    Raises:
        DownloadError: it is not a regular file, or it changed while it was read.
    """
    filesystem, path = filesystem_of(location)
    problem = describe_non_file(filesystem, path)
    if problem:
        raise DownloadError(f"{location} is {problem}; give a --source that has a file of this name")
    prefix = prefix or PrefixHash()
    size, done, digest = filesystem.size(path), prefix.size, prefix.digest
    label, before = f"verify {path.rpartition('/')[2].removesuffix('.part')}", fingerprint(location)
    with filesystem.open(path, "rb", block_size=BLOCK_BYTES) as file:
        file.seek(done)
        progress(label, done, size, "B")
        while done <= size and (block := file.read(BLOCK_BYTES)):  # stop even if the file keeps growing
            digest.update(block)
            done += len(block)
            progress(label, done, size, "B")
    if fingerprint(location) != before:
        raise changed_while_read(location)
    return digest.hexdigest()


def changed_while_read(location: str) -> DownloadError:
    return DownloadError(f"{location} changed while it was read; run again when it is whole")


def _verify_in_place(source: Source, folder: Path, progress: Progress) -> VerifiedFile:
    location = source.urls[0]
    try:
        before = fingerprint(location)
        md5 = _hash_file(location, progress)
    except FileNotFoundError:
        raise not_found(location) from None
    except IxiError as error:
        raise DownloadError(str(error)) from None
    except Exception as error:  # each fsspec store has its own; they quote URLs, so the traceback is suppressed
        raise DownloadError(f"cannot read {location}: {getattr(error, 'strerror', None) or error}") from None
    if source.md5 not in (None, md5):
        expected = f"{source.md5}, which is published or in the MD5SUMS beside it"
        raise DownloadError(f"{location}: MD5 is {md5}, not {expected}; fetch the file again")
    verified = _write_record(folder, source, location, md5, location, None)
    if verified.fingerprint != before:  # the record must describe the bytes that were hashed
        raise changed_while_read(location)
    return verified


def _may_use_copy(existing: VerifiedFile, source: Source, http: HttpOptions) -> bool:
    """Whether the verified copy may be used, after a HEAD request.

    Always with a known MD5, and if the request fails; otherwise if the server still has the same file.
    """
    url = existing.origin if existing.origin in source.urls else source.urls[0]
    try:
        with HttpClient(http) as client:
            response = client.head(url)
            response.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError, TransientError, UnusableError) as error:
        reason = printable(redacted(str(error).partition("\n")[0]))
        log.warning("%s did not answer (%s); using the verified copy %s", url, reason, existing.location)
        return True
    length = response.headers.get("content-length")
    same = length in (None, str(existing.size))
    if source.md5 is None:  # with an MD5, validators are ignored: the nodes of a server may have different ones
        same &= existing.validator in (None, validator_of(response) or existing.validator)
    elif not same:
        log.warning("%s now serves another file; keeping %s, which has the published MD5", url, existing.location)
    return same or source.md5 is not None


def _try_each_url(source: Source, path: Path, http: HttpOptions, progress: Progress, arrival: Arrival) -> VerifiedFile:
    """Download from the first URL that provides the right file."""
    reasons, transient = [], False
    for url in source.urls:
        try:
            with HttpClient(http) as client:
                return _download(client, url, source, path, progress, arrival)
        except UnusableError as error:
            log.warning("%s: %s", url, error)
            reasons.append(f"{url}: {error}")
            transient |= error.transient
    manual = f"download the file to {path} yourself"
    if source.md5 is None:
        manual = "download it yourself and give its folder as --source"
    raise DownloadError(f"cannot download {source.name}: {'; '.join(reasons)}. Try again later, or {manual}", transient)


def _download(
    client: HttpClient, url: str, source: Source, path: Path, progress: Progress, arrival: Arrival
) -> VerifiedFile:
    """Download a file from one URL and verify it.

    Repeats once if the file changed on the server, or if the MD5 is wrong because bytes of two files were mixed.
    """
    for _ in range(2):
        remote_file = retry(url, lambda: probe(client, url, source), client.http)
        with PartialFile(path, remote_file, client.http) as part:
            part.check_disk()
            try:
                prefix = _fetch(client, remote_file, source, part, progress, arrival)
            except ChangedError:
                continue  # the next probe decides whether the fetched bytes are still usable
            part.sync()
        md5 = _hash_file(str(part.path), progress, prefix)
        if source.md5 in (None, md5):
            os.replace(part.path, path)
            verified = _write_record(path.parent, source, str(path), md5, url, remote_file.validator)
            part.record.unlink(missing_ok=True)
            return verified
        arrival.reject()
        discard_partial(path)
        if not part.mixed:
            raise UnusableError(f"MD5 is {md5}, not {source.md5}")
    raise UnusableError("the file changed while it was fetched, twice")


def _fetch(
    client: HttpClient,
    remote_file: RemoteFile,
    source: Source,
    part: PartialFile,
    progress: Progress,
    arrival: Arrival,
) -> PrefixHash:
    """Fetch all bytes; return the MD5 of those that were hashed meanwhile."""
    if remote_file.ranges:
        prefix = PrefixHash()
        try:
            with prefix.following(part, arrival):
                fetch_ranges(client, remote_file, part, part.segments, 0, progress, arrival)
            return prefix
        except RangeIgnoredError:  # some servers and caches serve short ranges only, such as that of the probe
            log.warning("%s ignores byte ranges; fetching the whole file in one request", remote_file.url)
    retry(remote_file.url, lambda: _fetch_stream(client, remote_file, source, part, progress), client.http)
    return PrefixHash()  # a stream writes all segments again


def _fetch_stream(
    client: HttpClient, remote_file: RemoteFile, source: Source, part: PartialFile, progress: Progress
) -> None:
    """Fetch a file in one stream. A tar of unknown size and MD5 is complete only if it has an end mark."""
    fetch_stream(client, remote_file, part, progress)
    if source.md5 is None and remote_file.size is None and source.name.endswith(".tar"):
        try:
            index_archive(str(part.path))
        except ArchiveError:
            raise TransientError("the response is not a complete tar archive") from None
