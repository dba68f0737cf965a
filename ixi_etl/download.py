"""Get one file whole and verified, or some members of an archive, from the first source that can give it.

Only a file whose MD5 is right gets the name `NAME`; `NAME.json` then records what was verified, so that the next
refresh need not read the file again. Until then its bytes lie in `NAME.part` (`transfer`).
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import httpx

from ixi_etl.archive import escaped, index_archive, no_file
from ixi_etl.catalog import Source, archive_name, basename, md5_of, own_archives, parse_md5sums
from ixi_etl.errors import ArchiveError, DownloadError, IxiError, redacted
from ixi_etl.files import Progress, read_json, silent, to_json, write_atomic
from ixi_etl.places import filesystem_of, fingerprint, is_url
from ixi_etl.transfer import (
    MAX_TEXT,
    ChangedError,
    Offer,
    Part,
    Pieces,
    TransientError,
    UnusableError,
    discard,
    fetch_ranges,
    fetch_stream,
    open_client,
    probe,
    retried,
    small_file,
    validator_of,
)

log = logging.getLogger(__name__)

REQUEST = 32 << 20  # bytes: members that lie side by side are asked for together, up to so many


@dataclass(frozen=True)
class Acquired:
    """A file that is here, whole and verified.

    Attributes:
        location: path (or object URL) to read it at.
        checked: whether its MD5 was held against one that somebody else had published.
        origin: the URL or path it came from.
        validator: the ETag or date its server gave it, if any.
        stamp: identity of the file at `location` when it was hashed; another stamp means another file.
    """

    name: str
    location: str
    size: int
    md5: str
    checked: bool
    origin: str
    validator: str | None
    stamp: str


def acquire(
    source: Source,
    folder: Path,
    *,
    connections: int = 4,
    offline: bool = False,
    insecure_hosts: tuple[str, ...] = (),
    progress: Progress = silent,
) -> Acquired:
    """Make sure that the file of `source` is here, whole and verified.

    A file of a person's own that is not served over HTTP is used where it lies. A file already verified costs one HEAD
    request, or none when `offline`. `folder` holds the downloads, and a record of each file that was verified.

    Raises:
        DownloadError: nothing gave the right file; the message says of each URL why not, and what to do.
    """
    path = folder / source.name
    location = str(path) if source.over_http else source.urls[0]
    known = _recorded(folder, source.name, location)
    if known and (known.md5 == source.md5 if source.md5 else known.origin in source.urls):
        known = replace(known, checked=known.checked or source.md5 is not None)
        if offline or not source.over_http or _still_served(known, source, insecure_hosts):
            return known
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not source.over_http:
            return _verify_in_place(source, folder, progress)
        if path.exists() and source.md5 and _md5(location, progress) == source.md5:
            discard(path)
            return _record(folder, source, location, source.md5, source.urls[0], None)
        if offline:
            raise DownloadError(f"{path} is not there, or not the right file; run once without --offline to fetch it")
        return _from_first(source, path, connections, insecure_hosts, progress)
    except OSError as error:
        raise DownloadError(
            f"cannot read or write {path}: {error.strerror or error}; mend that and run again: it goes on from there"
        ) from error


# -- some members alone -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remote:
    """An archive elsewhere that answers, and gives byte ranges."""

    source: Source
    offer: Offer

    @property
    def url(self) -> str:
        return self.offer.url


def find_remote(source: Source, insecure_hosts: tuple[str, ...] = ()) -> Remote:
    """The first of a source's URLs that has the archive and gives ranges of it.

    Raises:
        DownloadError: none does, or the source is a file of a person's own, which is read where it lies anyway.
    """
    if not source.over_http:
        raise DownloadError(f"{source.urls[0]} is read where it lies; leave out --fetch members")
    reasons, transient = [], False
    for url in source.urls:
        try:
            with open_client(insecure_hosts, 1) as client:
                offer = retried(url, lambda: probe(client, url, source))  # noqa: B023 - called at once
                offer = replace(offer, judged=False)  # the MD5 is of the whole archive
                if not offer.ranges or offer.validator is None:  # no MD5 will find a mix of two archives
                    raise UnusableError("gives no byte ranges that can be trusted; fetch the whole archives")
                return Remote(source, offer)
        except UnusableError as error:
            reasons.append(f"{url}: {error}")
            transient |= error.transient
    raise DownloadError(f"could not ask for {source.name}: {'; '.join(reasons)}", transient)


def fetch_members(
    remote: Remote,
    folder: Path,
    members: Pieces,
    wanted: Iterable[int],
    *,
    connections: int = 4,
    insecure_hosts: tuple[str, ...] = (),
    progress: Progress = silent,
) -> Acquired:
    """Fetch the `wanted` ones (by index) of an archive's `members`, given as (start, stop) in bytes.

    They come to lie where they lie in the archive, in a file `NAME.members.part` with holes elsewhere, which is read as
    the archive is. What an earlier call fetched of the same archive is not fetched again. Its MD5 cannot be checked.

    Raises:
        DownloadError: the archive changed meanwhile, or could not be read, or the disk is full.
    """
    path, offer = folder / f"{remote.source.name}.members", remote.offer
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open_client(insecure_hosts, connections) as client, Part(path, offer, members) as part:
            chosen = [part.segments[index] for index in wanted]
            part.needed = sum(stop - start for _, start, stop in chosen)
            part.check_disk()
            fetch_ranges(client, offer, part, chosen, REQUEST, connections, progress)
            part.sync()
    except ChangedError:
        raise DownloadError(f"{remote.url} changed while its members were fetched; run again", transient=True) from None
    except UnusableError as error:
        raise DownloadError(f"could not get members of {remote.url}: {error}", error.transient) from error
    except OSError as error:
        raise DownloadError(
            f"cannot write {path}: {error.strerror or error}; mend that and run again: it goes on from there"
        ) from error
    location = str(part.path)
    size = offer.size or 0
    return Acquired(path.stem, location, size, "", False, remote.url, offer.validator, fingerprint(location))


def own_sources(place: str, *, offline: bool = False, insecure_hosts: tuple[str, ...] = ()) -> dict[str, Source]:
    """Modality -> a person's own archive, with the MD5 that an `MD5SUMS` beside it says, if there is one.

    Raises:
        DownloadError: an archive is not there; or MD5SUMS is, or may be, and does not say the MD5 of each archive.
    """
    places = own_archives(place)
    for path in places.values():
        if not is_url(path) and not Path(path).exists():
            raise _not_there(path)
    beside = places["T1"].rpartition("/")[0] + "/MD5SUMS"
    try:
        data = _md5sums(beside, offline, insecure_hosts)
        listed = parse_md5sums(data or b"")
        md5s = {m: md5_of(basename(path), listed) for m, path in places.items()}
    except (UnusableError, ArchiveError) as error:
        transient = isinstance(error, UnusableError) and error.transient
        what = "try again later, or give --offline to use what was verified" if transient else _MEND
        raise DownloadError(f"cannot use {beside}: {error}; {what}", transient) from None
    for m, path in places.items():
        if data is not None and md5s[m] is None:
            raise DownloadError(f"{beside} has no line with the MD5 of {basename(path)}; {_MEND}")
    return {m: Source(archive_name(m), (path,), md5s[m]) for m, path in places.items()}


_MEND = "write it with `md5sum *.tar > MD5SUMS`, or remove it to use the archives unchecked"


def _md5sums(beside: str, offline: bool, insecure_hosts: tuple[str, ...]) -> bytes | None:
    """What MD5SUMS holds; None where it is known not to be there, or where its server may not be asked.

    Raises:
        UnusableError: it cannot be read, so nobody knows what it says, or whether it is there.
    """
    if beside.startswith(("http://", "https://")):
        return None if offline else _md5sums_over_http(beside, insecure_hosts)
    if not is_url(beside) and not os.path.lexists(beside):
        return None
    try:
        filesystem, path = filesystem_of(beside)
        info = filesystem.info(path)
        wrong = no_file(filesystem, path) or ("not a file" if info["type"] != "file" else "")
        if not wrong and info["size"] > MAX_TEXT:
            wrong = f"more than {MAX_TEXT} bytes"
        data: bytes = b"" if wrong else filesystem.cat_file(path)
    except FileNotFoundError:
        if is_url(beside):
            return None
        raise UnusableError("a link to nothing") from None
    except Exception as error:  # each kind of store has its own; they quote URLs, so none is shown with its trace
        later = is_url(beside) and not isinstance(error, PermissionError)
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnusableError(said, transient=later) from None
    if wrong:
        raise UnusableError(wrong)
    return data


def _md5sums_over_http(url: str, insecure_hosts: tuple[str, ...]) -> bytes | None:
    try:
        with open_client(insecure_hosts, 1) as client:
            return retried(url, lambda: small_file(client, url))
    except UnusableError as error:
        if error.status in (404, 410):
            return None
        raise


# -- what is known of a file ------------------------------------------------------------------------------------------


def _recorded(folder: Path, name: str, location: str) -> Acquired | None:
    record = read_json(folder / f"{name}.json")
    with suppress(Exception):  # a spoilt record, or a file that cannot be looked at: the same as no record
        known = Acquired(**record)
        if known.location == location and known.stamp == fingerprint(location):
            return known
    return None


def _record(folder: Path, source: Source, location: str, md5: str, origin: str, validator: str | None) -> Acquired:
    filesystem, path = filesystem_of(location)
    found = Acquired(
        name=source.name,
        location=location,
        size=filesystem.size(path),
        md5=md5,
        checked=source.md5 is not None,
        origin=origin,
        validator=validator,
        stamp=fingerprint(location),
    )
    write_atomic(folder / f"{source.name}.json", to_json(asdict(found)))
    return found


def _md5(location: str, progress: Progress) -> str:
    filesystem, path = filesystem_of(location)
    wrong = no_file(filesystem, path)
    if wrong:
        raise DownloadError(f"{location} is {wrong}; give a --source that has a file of this name")
    size, done, digest = filesystem.size(path), 0, hashlib.md5(usedforsecurity=False)
    what, stamp = f"verify {path.rpartition('/')[2].removesuffix('.part')}", fingerprint(location)
    with filesystem.open(path, "rb", block_size=4 << 20) as file:
        while done <= size and (block := file.read(4 << 20)):
            digest.update(block)
            done += len(block)
            progress(what, done, size, "B")
    if fingerprint(location) != stamp:
        raise DownloadError(f"{location} changed while it was read; run again when it is whole")
    return digest.hexdigest()


def _not_there(location: str) -> DownloadError:
    return DownloadError(f"{location} is not there; give a --source that has {basename(location)}")


def _verify_in_place(source: Source, folder: Path, progress: Progress) -> Acquired:
    location = source.urls[0]
    try:
        stamp = fingerprint(location)
        md5 = _md5(location, progress)
    except FileNotFoundError:
        raise _not_there(location) from None
    except IxiError as error:
        raise DownloadError(str(error)) from None
    except Exception as error:  # each kind of store has its own; they quote URLs, so none is shown with its trace
        raise DownloadError(f"cannot read {location}: {getattr(error, 'strerror', None) or error}") from None
    if source.md5 not in (None, md5):
        right = f"{source.md5}, as its publisher or MD5SUMS beside it says"
        raise DownloadError(f"{location}: MD5 is {md5}, not {right}; fetch the file again")
    found = _record(folder, source, location, md5, location, None)
    if found.stamp != stamp:  # the record must be of the bytes that were hashed
        raise DownloadError(f"{location} changed while it was read; run again when it is whole")
    return found


def _still_served(known: Acquired, source: Source, insecure_hosts: tuple[str, ...]) -> bool:
    """Whether the server, asked with one HEAD, still has the file we hold. Without an answer: taken as yes."""
    url = known.origin if known.origin in source.urls else source.urls[0]
    try:
        with open_client(insecure_hosts, 1) as client:
            answer = client.head(url)
            answer.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError, TransientError, UnusableError) as error:
        reason = escaped(redacted(str(error).partition("\n")[0]))
        log.warning("%s did not answer (%s); using the verified copy in %s", url, reason, known.location)
        return True
    length = answer.headers.get("content-length")
    same = length in (None, str(known.size))
    if source.md5 is None:  # else the MD5 decides, and each node of a server may call the same bytes otherwise
        same &= known.validator in (None, validator_of(answer) or known.validator)
    elif not same:
        log.warning("%s now serves another file; keeping %s, whose MD5 is the published one", url, known.location)
    return same or source.md5 is not None


# -- one URL after another --------------------------------------------------------------------------------------------


def _from_first(
    source: Source, path: Path, connections: int, insecure_hosts: tuple[str, ...], progress: Progress
) -> Acquired:
    """Download from the first URL that gives the right file."""
    reasons, transient = [], False
    for url in source.urls:
        try:
            with open_client(insecure_hosts, connections) as client:
                return _download(client, url, source, path, connections, progress)
        except UnusableError as error:
            log.warning("%s: %s", url, error)
            reasons.append(f"{url}: {error}")
            transient |= error.transient
    by_hand = f"put the file at {path} by hand" if source.md5 else "fetch it by hand and give its folder as --source"
    raise DownloadError(f"could not get {source.name}: {'; '.join(reasons)}. Try again later, or {by_hand}", transient)


def _stream_whole(client: httpx.Client, offer: Offer, source: Source, part: Part, progress: Progress) -> None:
    """A tar of which nobody has said the length or the MD5 shows only by its end that all of it came."""
    fetch_stream(client, offer, part, progress)
    if source.md5 is None and offer.size is None and source.name.endswith(".tar"):
        try:
            index_archive(str(part.path))
        except ArchiveError:
            raise TransientError("what came is no whole tar archive") from None


def _download(
    client: httpx.Client, url: str, source: Source, path: Path, connections: int, progress: Progress
) -> Acquired:
    for _ in range(2):  # once more if the file changed, or if it was put together from bytes of more than one
        offer = retried(url, lambda: probe(client, url, source))
        with Part(path, offer) as part:
            part.check_disk()
            try:
                if offer.ranges:
                    fetch_ranges(client, offer, part, part.segments, 0, connections, progress)
                else:
                    retried(url, lambda: _stream_whole(client, offer, source, part, progress))  # noqa: B023 - called at once
            except ChangedError:
                continue  # what the server offers now says whether what is here is still of use
            part.sync()
        md5 = _md5(str(part.path), progress)
        if source.md5 in (None, md5):
            os.replace(part.path, path)
            found = _record(path.parent, source, str(path), md5, url, offer.validator)
            part.record.unlink(missing_ok=True)
            return found
        discard(path)
        if not part.mixed:
            raise UnusableError(f"MD5 is {md5}, not {source.md5}")
    raise UnusableError("the file changed while it was fetched, twice")
