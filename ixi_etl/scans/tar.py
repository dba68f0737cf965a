"""Index and read the members of a tar in place. Nothing is unpacked, so no member name is used as a path."""

from __future__ import annotations

import logging
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

from fsspec.implementations.local import LocalFileSystem

from ixi_etl.core.http_options import DEFAULT_HTTP, HttpOptions
from ixi_etl.core.storage import filesystem_of
from ixi_etl.core.text import printable, quantity
from ixi_etl.errors import ArchiveError, IxiError

MAX_MEMBER_BYTES = 256 << 20
"""A member is read into memory whole, and several at a time. A member of IXI has about 9 MB."""

MAX_ARCHIVE_BYTES = 1 << 40
"""A file that claims to be larger is not an archive."""

# Zeros fill the last record of a tar: 20 blocks by default, 2048 at most.
_RECORD, _MAX_RECORD = 20 * tarfile.BLOCKSIZE, 2048 * tarfile.BLOCKSIZE
logging.getLogger("fsspec.http").setLevel(logging.WARNING)  # it logs the URLs of redirects, which are often signed

_MEMBER_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.DIRTYPE: "a folder",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}

_EXTENDED_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_MAX_EXTENDED_HEADER = 16 << 10  # bytes of a long name or PAX header; tarfile needs time quadratic in it


class _CheckedTarInfo(tarfile.TarInfo):
    """Refuse impossible sizes, by which tarfile would read any number of bytes, or seek back in an endless loop."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        info = super().frombuf(buf, encoding, errors)
        if not 0 <= info.size < 1 << 62 or (info.type in _EXTENDED_HEADERS and info.size > _MAX_EXTENDED_HEADER):
            raise tarfile.ReadError(f"a member of {info.size} bytes, of type {info.type!r}")
        return info


@dataclass(frozen=True)
class Member:
    """A member of a tar: its name, and the position of its content.

    Attributes:
        name: as stored in the tar, with control characters escaped; compared and shown, never used as a path.
        offset: of its first byte in the archive.
        size: in bytes.
        problem: why it cannot be read in place ("" if it can).
        head: its first bytes, as many as requested.
    """

    name: str
    offset: int
    size: int
    problem: str = ""
    head: bytes = b""


def index_archive(
    location: str,
    head_bytes: int = 0,
    on_member: Callable[[float], None] = lambda _: None,
    http: HttpOptions = DEFAULT_HTTP,
) -> list[Member]:
    """All members of a tar, in archive order.

    Reads the 512-byte header of each together with its first bytes, so over a network each member costs one round trip.

    Args:
        location: path or fsspec URL.
        head_bytes: size of `Member.head`.
        on_member: called after each member with the fraction of the archive that was passed, 0 to 1.
        http: only its `insecure_hosts` and `timeout_s` apply; fsspec makes the requests.

    Raises:
        ArchiveError: the archive is missing, cannot be read, or is not a complete tar.
    """
    members = []
    try:
        filesystem, path = filesystem_of(location, **_fsspec_options(location, http))
        problem = describe_non_file(filesystem, path)
        if problem:
            raise ArchiveError(f"{location} is {problem}; give a --source that has a tar archive of this name")
        if location.startswith("https://") and filesystem.info(path).get("url", "").startswith("http://"):
            raise ArchiveError(f"{location} redirects from https to http, which anyone on the network path can change")
        # tarfile first reads the byte before a header; with this read-ahead, the header and the head arrive with it.
        window = {"block_size": tarfile.BLOCKSIZE + head_bytes, "cache_type": "readahead"}
        with (
            filesystem.open(path, "rb", **window) as file,
            tarfile.open(fileobj=file, mode="r:", tarinfo=_CheckedTarInfo) as tar,
        ):
            end = max(file.seek(0, os.SEEK_END), 1)
            for info in tar:
                if info.size < 0:  # from a PAX header
                    raise tarfile.ReadError(f"a member of {info.size} bytes at byte {info.offset}")
                if not info.name:  # from a long name of zeros
                    raise tarfile.ReadError(f"a member without a name at byte {info.offset}")
                if info.isdir():
                    continue
                problem = ""
                if not info.isreg() or info.issparse():
                    kind = _MEMBER_KINDS.get(info.type, "of an unsupported type")
                    problem = f"the member is {kind}; expected a regular file"
                if not problem and info.size > MAX_MEMBER_BYTES:
                    problem = f"the member has {info.size} bytes; the maximum is {MAX_MEMBER_BYTES}"
                name = printable(info.name)
                file.seek(info.offset_data)
                head = file.read(min(info.size, head_bytes))
                if not problem and len(head) < min(info.size, head_bytes):
                    raise tarfile.ReadError(f"cut short in the member at byte {info.offset}")
                members.append(Member(name, info.offset_data, info.size, problem, head))
                on_member(min(1.0, (info.offset_data + info.size) / end))
            _check_end(file, tar.offset, end, f"after {quantity(len(members), 'member')}")
            on_member(1.0)
    except FileNotFoundError as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error.__cause__):
            message = "its TLS certificate is not valid (--insecure-host HOST to accept it)"
            raise ArchiveError(f"cannot read {location}: {message}") from error
        advice = "give a --source folder or URL with IXI-T1.tar and IXI-T2.tar"
        raise ArchiveError(f"{location} is not there, or cannot be reached; {advice}") from None
    except (tarfile.TarError, RecursionError) as error:  # tarfile recurses for each extended header before a member
        raise ArchiveError(f"{location} is not a tar archive that can be read ({error}); fetch it again") from error
    except IxiError:
        raise
    except Exception as error:  # each fsspec store has its own; they quote URLs, so the traceback is suppressed
        message = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ArchiveError(f"cannot read {location}: {printable(message)}") from None
    return members


def describe_non_file(filesystem: Any, path: str) -> str:
    """Why a local path is not a regular file with content; "" if it is one, or does not exist.

    Reading a pipe, a device or a file of the kernel, or a link to one, may never end.
    """
    if not isinstance(filesystem, LocalFileSystem) or not os.path.exists(path):
        return ""
    if not os.path.isfile(path):
        return "not a regular file"
    size = os.path.getsize(path)  # files in /proc report 0
    return "an empty file" if size == 0 else f"a file of {size:.3g} bytes" if size > MAX_ARCHIVE_BYTES else ""


def _check_end(file: Any, at: int, end: int, where: str) -> None:
    """Check that the archive ends at byte `at`, where tarfile stopped: a block of zeros, then only padding.

    tarfile also stops at a damaged header, and at a hole that a download left. Such an archive is refused, because
    members in or behind the hole would have no row. So is a second archive in the same file (`cat a.tar b.tar`),
    which looks the same.

    Raises:
        tarfile.ReadError: it does not end there.
    """
    left = end - at
    file.seek(at)
    tail = file.read(min(left, _MAX_RECORD + 2 * tarfile.BLOCKSIZE))
    if tail[: tarfile.BLOCKSIZE] != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"damaged or cut short at byte {at}, {where}")
    zeros = len(tail) - len(tail.lstrip(b"\0"))
    if zeros < len(tail):
        raise tarfile.ReadError(
            f"its end mark is at byte {at}, {where}, but other bytes follow from byte {at + zeros}: a hole that a "
            "download left, or two archives in one file"
        )
    records = [_RECORD, *(size for n in range(12) if end % (size := tarfile.BLOCKSIZE << n) == 0)]
    if left >= max(records) + 2 * tarfile.BLOCKSIZE:
        raise tarfile.ReadError(
            f"its end mark is at byte {at}, {where}, but {left} bytes follow: an incomplete download"
        )


def _fsspec_options(location: str, http: HttpOptions) -> dict[str, Any]:
    """Options for fsspec: like downloads, obey proxies in the environment, `~/.netrc`, insecure hosts and timeouts."""
    url = urlsplit(location)
    if url.scheme not in ("http", "https"):
        return {}
    from aiohttp import ClientTimeout  # slow to import

    timeout = ClientTimeout(total=10 * http.timeout_s, sock_connect=http.timeout_s, sock_read=http.timeout_s)
    options = {"client_kwargs": {"trust_env": True, "timeout": timeout}}
    return options | ({"ssl": False} if url.hostname in http.insecure_hosts else {})


def read_member(location: str, offset: int, size: int) -> bytes:
    """Read `size` bytes at `offset` of the archive at a path or fsspec URL; fewer if the archive ends before."""
    filesystem, path = filesystem_of(location)
    data: bytes = filesystem.cat_file(path, start=offset, end=offset + size)
    return data
