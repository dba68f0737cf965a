"""Read the members of a tar in place: nothing is ever unpacked, so no member's name can lead anywhere."""

from __future__ import annotations

import logging
import os
import re
import tarfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

from fsspec.implementations.local import LocalFileSystem

from ixi_etl.errors import ArchiveError, IxiError
from ixi_etl.places import filesystem_of

MAX_MEMBER_BYTES = 256 << 20  # of an IXI archive about 9 MB; a member is read whole, and several at once
MAX_FILE = 1 << 40  # bytes of an archive; what is said to hold more is no archive
# The zeros at the end fill the last record: 20 blocks where tar is told nothing, up to 2048 where it is.
_RECORD, _MAX_RECORD = 20 * tarfile.BLOCKSIZE, 2048 * tarfile.BLOCKSIZE
logging.getLogger("fsspec.http").setLevel(logging.WARNING)  # it logs URLs of redirects, which are often signed

_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.DIRTYPE: "a folder",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}

_TEXTS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_MAX_TEXT = 16 << 10  # bytes of a long name or of what else is said of a member; tarfile takes their square in time


class _Info(tarfile.TarInfo):
    """Refuses what a header says before tarfile acts on it: it would read as many bytes, or go back for ever."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        info = super().frombuf(buf, encoding, errors)
        if not 0 <= info.size < 1 << 62 or (info.type in _TEXTS and info.size > _MAX_TEXT):
            raise tarfile.ReadError(f"a member of {info.size} bytes, of type {info.type!r}")
        return info


def escaped(text: str) -> str:
    """Somebody else's words, without the control characters by which they could steer a terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


@dataclass(frozen=True)
class Member:
    """Where a member's bytes lie.

    Attributes:
        name: as stored in the tar, its control characters escaped; compared and shown, never used as a path.
        offset: of its first byte in the archive.
        size: in bytes.
        problem: why it cannot be read in place ("" if it can).
        head: its first bytes, as many as were asked for.
    """

    name: str
    offset: int
    size: int
    problem: str = ""
    head: bytes = b""


def index_archive(
    location: str,
    heads: int = 0,
    on_member: Callable[[float], None] = lambda _: None,
    insecure_hosts: Collection[str] = (),
) -> list[Member]:
    """All members of the tar at a path or fsspec URL, in archive order.

    Reads their 512-byte headers and, at the same time, the first `heads` bytes of each: over a network one request a
    member, which costs its latency and nothing else. `on_member` is told how much of the archive was passed, 0 to 1.
    Of `insecure_hosts` the TLS certificates are not looked at.

    Raises:
        ArchiveError: not there, or not a tar.
    """
    members = []
    try:
        filesystem, path = filesystem_of(location, **_over_http(location, insecure_hosts))
        wrong = no_file(filesystem, path)
        if wrong:
            raise ArchiveError(f"{location} is {wrong}; give a --source that has a tar archive of this name")
        if location.startswith("https://") and filesystem.info(path).get("url", "").startswith("http://"):
            raise ArchiveError(f"{location} leads from https to http, which anybody on the way can change")
        # tarfile looks at the byte before a header first; what it then reads, and the head, come with that.
        window = {"block_size": tarfile.BLOCKSIZE + heads, "cache_type": "readahead"}
        with (
            filesystem.open(path, "rb", **window) as file,
            tarfile.open(fileobj=file, mode="r:", tarinfo=_Info) as tar,
        ):
            end = max(file.seek(0, os.SEEK_END), 1)
            for info in tar:
                if info.size < 0:  # a PAX header may say so, too
                    raise tarfile.ReadError(f"a member of {info.size} bytes at byte {info.offset}")
                if not info.name:  # zeros in the place of a long name
                    raise tarfile.ReadError(f"a member without a name at byte {info.offset}")
                if info.isdir():
                    continue
                problem = "" if info.isreg() and not info.issparse() else _KINDS.get(info.type, "not a regular file")
                if not problem and info.size > MAX_MEMBER_BYTES:
                    problem = f"a member of {info.size} bytes; at most {MAX_MEMBER_BYTES} are read"
                # A name that is no UTF-8 can be neither shown nor written down as it is.
                name = escaped(info.name.encode("utf-8", "backslashreplace").decode())
                file.seek(info.offset_data)
                head = file.read(min(info.size, heads))
                if not problem and len(head) < min(info.size, heads):
                    raise tarfile.ReadError(f"cut short in the member at byte {info.offset}")
                members.append(Member(name, info.offset_data, info.size, problem, head))
                on_member(min(1.0, (info.offset_data + info.size) / end))
            _check_end(file, tar.offset, end, f"after {len(members)} members")
            on_member(1.0)
    except FileNotFoundError as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error.__cause__):
            said = "its TLS certificate is not valid (--insecure-host HOST to go on)"
            raise ArchiveError(f"cannot read {location}: {said}") from error
        wanted = "--source wants a folder or URL with IXI-T1.tar and IXI-T2.tar"
        raise ArchiveError(f"{location} is not there, or cannot be reached; {wanted}") from None
    except (tarfile.TarError, RecursionError) as error:  # tarfile goes a level deeper with each header before a member
        raise ArchiveError(f"{location} is not a tar archive that can be read ({error}); fetch it again") from error
    except IxiError:
        raise
    except Exception as error:  # each kind of store has its own; they quote URLs, so none is shown with its trace
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ArchiveError(f"cannot read {location}: {escaped(said)}") from None
    return members


def no_file(filesystem: Any, path: str) -> str:
    """What is there in place of a file with bytes and an end; "" where there is one, or nothing at all.

    Pipes, devices and files of the kernel, and links to them, would be waited for without end.
    """
    if not isinstance(filesystem, LocalFileSystem) or not os.path.exists(path):
        return ""
    if not os.path.isfile(path):
        return "not a regular file"
    size = os.path.getsize(path)  # in /proc it is 0, whatever comes out
    return "an empty file" if size == 0 else f"a file of {size:.3g} bytes" if size > MAX_FILE else ""


def _check_end(file: Any, at: int, end: int, where: str) -> None:
    """Whether an archive ends at byte `at`, where tarfile stopped: there is a block of zeros, and no more but padding.

    tarfile takes a damaged header for the end, and a hole that a download left, too. What stands behind a hole is not
    read: members inside it would have no row. Nor is a second archive, which looks the same (`cat a.tar b.tar`).

    Raises:
        tarfile.ReadError: it does not.
    """
    left = end - at
    file.seek(at)
    tail = file.read(min(left, _MAX_RECORD + 2 * tarfile.BLOCKSIZE))
    if tail[: tarfile.BLOCKSIZE] != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"damaged or cut short at byte {at}, {where}")
    zeros = len(tail) - len(tail.lstrip(b"\0"))
    if zeros < len(tail):
        raise tarfile.ReadError(
            f"its end is marked at byte {at}, {where}, but other bytes follow from byte {at + zeros}: a hole that a "
            "download left, or two archives in one file"
        )
    records = [_RECORD, *(size for n in range(12) if end % (size := tarfile.BLOCKSIZE << n) == 0)]
    if left >= max(records) + 2 * tarfile.BLOCKSIZE:
        raise tarfile.ReadError(
            f"its end is marked at byte {at}, {where}, but {left} bytes follow: a download that did not end"
        )


def _over_http(location: str, insecure_hosts: Collection[str]) -> dict[str, Any]:
    """Options for fsspec, by which it obeys proxies in the environment and ~/.netrc, as downloads do."""
    url = urlsplit(location)
    if url.scheme not in ("http", "https"):
        return {}
    return {"client_kwargs": {"trust_env": True}} | ({"ssl": False} if url.hostname in insecure_hosts else {})


def read_member(location: str, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` of the archive at a path or fsspec URL; fewer where it ends before."""
    filesystem, path = filesystem_of(location)
    data: bytes = filesystem.cat_file(path, start=offset, end=offset + size)
    return data
