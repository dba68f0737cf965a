"""The user's own files (`--source`): archives, with the `MD5SUMS` beside them, or a folder of NIfTI files."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ixi_etl.core.http_options import DEFAULT_HTTP, HttpOptions
from ixi_etl.core.storage import filesystem_of, is_url
from ixi_etl.core.text import printable
from ixi_etl.errors import ArchiveError, ConfigError, DownloadError
from ixi_etl.modalities import DEFAULT_MODALITIES, archive_name, modality_of, renamed
from ixi_etl.scans.survey import VolumeFile
from ixi_etl.scans.tar import describe_non_file
from ixi_etl.sources.catalog import Source, basename, normalise_location, not_found
from ixi_etl.sources.folder import FolderSource, find_volumes, first_nifti_file
from ixi_etl.sources.http import MAX_SMALL_FILE, HttpClient, read_small_file
from ixi_etl.sources.md5sums import find_md5, parse_md5sums
from ixi_etl.sources.retries import UnusableError, retry

log = logging.getLogger(__name__)

_CHECKSUM_NAME = re.compile(r"(md5|sha\d|checksum)", re.IGNORECASE)


def find_archives(source: str, modalities: Sequence[str] = DEFAULT_MODALITIES) -> dict[str, str]:
    """Modality -> path or URL of a user's own archives; whether they exist is not checked.

    Args:
        source: a folder or URL that holds `IXI-T1.tar`, `IXI-T2.tar` and so on, or one such tar; the others are beside
            it.
        modalities: those wanted.

    Raises:
        ConfigError: the name of the tar does not contain a modality, or the location is invalid.
    """
    location = normalise_location(source)
    if location.endswith(".tar") and not os.path.isdir(location):
        folder, _, name = location.rpartition("/")
        modality = modality_of(name)
        if modality is None:
            names = " or ".join(map(archive_name, modalities))
            raise ConfigError(f"{source}: cannot tell {' from '.join(modalities)} by the name {name}; call it {names}")
        return {m: f"{folder}/{renamed(name, m)}" for m in modalities}
    return {m: f"{location}/{archive_name(m)}" for m in modalities}


def find_inputs(
    source: str, modalities: Sequence[str] = DEFAULT_MODALITIES, patterns: Sequence[str] = ()
) -> dict[str, str] | dict[str, tuple[VolumeFile, ...]]:
    """Modality -> archive, as from `find_archives`; or its NIfTI files, in a local folder without such an archive.

    Raises:
        ConfigError: the location or a template is invalid.
        DownloadError: the folder has neither.
    """
    folder = find_folder(source, modalities)
    return find_archives(source, modalities) if folder is None else find_volumes(folder, modalities, patterns)


def find_folder(source: str, modalities: Sequence[str] = DEFAULT_MODALITIES) -> str | None:
    """The path of a source that is a local folder of NIfTI files; None if it is, or holds, archives.

    Raises:
        ConfigError: the location is invalid.
    """
    archives = find_archives(source, modalities)
    location = normalise_location(source)
    holds_archives = is_url(location) or not os.path.isdir(location) or any(map(os.path.lexists, archives.values()))
    return None if holds_archives else location


def user_sources(
    location: str,
    http: HttpOptions = DEFAULT_HTTP,
    modalities: Sequence[str] = DEFAULT_MODALITIES,
    patterns: Sequence[str] = (),
) -> dict[str, Source]:
    """Modality -> a user's own archive, with its MD5 from an `MD5SUMS` file beside it, if that exists; or NIfTI files.

    Raises:
        ConfigError: the location or a template is invalid.
        DownloadError: an archive is missing; or `MD5SUMS` exists, or may exist, without the MD5 of each archive; or no
            NIfTI file is a volume of a modality.
    """
    locations: dict[str, str] = {}
    files: dict[str, Source] = {}
    for m, found in find_inputs(location, modalities, patterns).items():
        if isinstance(found, str):
            locations[m] = found
        else:
            files[m] = FolderSource(f"{m}.files", (normalise_location(location),), None, found)
    return files or _archive_sources(locations, http)


def _archive_sources(locations: dict[str, str], http: HttpOptions) -> dict[str, Source]:
    for path in locations.values():
        if not is_url(path) and not Path(path).exists():
            raise DownloadError(f"{not_found(path)}{_describe_loose_files(os.path.dirname(path))}")
    md5sums = next(iter(locations.values())).rpartition("/")[0] + "/MD5SUMS"
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


def _describe_loose_files(folder: str) -> str:
    """Why NIfTI files of a folder with an archive are not used, for a message; "" if there are none."""
    name = first_nifti_file(folder)
    return f", or move the archives: beside them, NIfTI files such as {printable(name)} are not read" if name else ""


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
