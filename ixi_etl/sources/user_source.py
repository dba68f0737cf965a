"""The user's own archives (`--source`): a folder, a tar file or a URL, with the `MD5SUMS` beside them."""

from __future__ import annotations

import logging
import os
import re
from contextlib import suppress
from pathlib import Path

from ixi_etl.core.http_options import DEFAULT_HTTP, HttpOptions
from ixi_etl.core.storage import filesystem_of, is_url
from ixi_etl.core.text import printable
from ixi_etl.errors import ArchiveError, ConfigError, DownloadError
from ixi_etl.modalities import DEFAULT_MODALITIES as MODALITIES
from ixi_etl.modalities import archive_name, modality_of
from ixi_etl.scans.tar import describe_non_file
from ixi_etl.sources.catalog import Source, basename, normalise_location, not_found
from ixi_etl.sources.http import MAX_SMALL_FILE, HttpClient, read_small_file
from ixi_etl.sources.md5sums import find_md5, parse_md5sums
from ixi_etl.sources.retries import UnusableError, retry

log = logging.getLogger(__name__)

_CHECKSUM_NAME = re.compile(r"(md5|sha\d|checksum)", re.IGNORECASE)


def find_archives(source: str) -> dict[str, str]:
    """Modality -> path or URL of a user's own archives; whether they exist is not checked.

    Args:
        source: a folder or URL that holds `IXI-T1.tar` and `IXI-T2.tar`, or one such tar; the other is beside it.

    Raises:
        ConfigError: the name of the tar does not contain a modality, or the location is invalid.
    """
    location = normalise_location(source)
    if location.endswith(".tar") and not os.path.isdir(location):
        folder, _, name = location.rpartition("/")
        modality = modality_of(name)
        if modality is None:
            raise ConfigError(f"{source}: cannot tell T1 from T2 by the name {name}; call it IXI-T1.tar or IXI-T2.tar")
        return {m: f"{folder}/{name.replace(modality, m)}" for m in MODALITIES}
    return {m: f"{location}/{archive_name(m)}" for m in MODALITIES}


def user_sources(location: str, http: HttpOptions = DEFAULT_HTTP) -> dict[str, Source]:
    """Modality -> a user's own archive, with its MD5 from an `MD5SUMS` file beside it, if that exists.

    Raises:
        ConfigError: the location is invalid.
        DownloadError: an archive is missing; or `MD5SUMS` exists, or may exist, without the MD5 of each archive.
    """
    locations = find_archives(location)
    for path in locations.values():
        if not is_url(path) and not Path(path).exists():
            raise not_found(path)
    md5sums = locations["T1"].rpartition("/")[0] + "/MD5SUMS"
    try:
        data = _read_md5sums(md5sums, http)
        entries = parse_md5sums(data or b"")
        md5s = {m: find_md5(basename(path), entries) for m, path in locations.items()}
    except (UnusableError, ArchiveError) as error:
        transient = isinstance(error, UnusableError) and error.transient
        advice = "try again later, or give --offline to use verified files" if transient else _HOW_TO_FIX
        raise DownloadError(f"cannot use {md5sums}: {error}; {advice}", transient) from None
    for m, path in locations.items():
        if data is not None and md5s[m] is None:
            raise DownloadError(f"{md5sums} has no line with the MD5 of {basename(path)}; {_HOW_TO_FIX}")
    if data is None and not is_url(md5sums):
        _warn_of_other_checksums(Path(md5sums))
    return {m: Source(archive_name(m), (path,), md5s[m]) for m, path in locations.items()}


_HOW_TO_WRITE = "write it with `md5sum *.tar > MD5SUMS`"
_HOW_TO_FIX = f"{_HOW_TO_WRITE}, or remove it to use the archives unchecked"


def _warn_of_other_checksums(md5sums: Path) -> None:
    """Warn if the folder has a file of checksums under another name than `MD5SUMS`: only that one is used."""
    others: list[str] = []
    with suppress(OSError):  # a folder whose files can be read but not listed
        others = sorted(path.name for path in md5sums.parent.iterdir() if _CHECKSUM_NAME.search(path.name))
    if others:
        log.warning(
            "%s does not exist, so the archives are used unchecked; %s is not read; %s",
            md5sums,
            printable(", ".join(others)),
            _HOW_TO_WRITE,
        )


def _read_md5sums(location: str, http: HttpOptions) -> bytes | None:
    """The content of `MD5SUMS`; None if it does not exist, or is on a server and `http.offline`.

    Raises:
        UnusableError: it cannot be read, or it is unknown whether it exists. The archives must not become unchecked
            because of that.
    """
    if location.startswith(("http://", "https://")):
        return None if http.offline else _read_md5sums_over_http(location, http)
    if not is_url(location) and not os.path.lexists(location):
        return None
    try:
        filesystem, path = filesystem_of(location)
        info = filesystem.info(path)
        problem = describe_non_file(filesystem, path) or ("not a file" if info["type"] != "file" else "")
        if not problem and info["size"] > MAX_SMALL_FILE:
            problem = f"more than {MAX_SMALL_FILE} bytes"
        data: bytes = b"" if problem else filesystem.cat_file(path)
    except FileNotFoundError:
        if is_url(location):
            return None
        raise UnusableError("a link to a missing file") from None
    except Exception as error:  # each fsspec store has its own; they quote URLs, so the traceback is suppressed
        transient = is_url(location) and not isinstance(error, PermissionError)
        message = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnusableError(message, transient) from None
    if problem:
        raise UnusableError(problem)
    return data


def _read_md5sums_over_http(url: str, http: HttpOptions) -> bytes | None:
    try:
        with HttpClient(http) as client:
            return retry(url, lambda: read_small_file(client, url), http)
    except UnusableError as error:
        if error.status in (404, 410):
            return None
        raise
