"""Read the members of a tar in place: nothing is ever unpacked, so no member's name can lead anywhere."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass

import fsspec

from ixi_etl.errors import ArchiveError

_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.DIRTYPE: "a folder",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


@dataclass(frozen=True)
class Member:
    """Where a member's bytes lie.

    Attributes:
        name: as stored in the tar; only ever compared and shown, never used as a path.
        offset: of its first byte in the archive.
        size: in bytes.
        problem: why it cannot be read in place ("" if it can).
    """

    name: str
    offset: int
    size: int
    problem: str = ""


def index_archive(location: str) -> list[Member]:
    """All members of the tar at a path or fsspec URL, in archive order; reads their 512-byte headers only.

    Raises:
        ArchiveError: not there, or not a tar.
    """
    filesystem, path = fsspec.url_to_fs(location)
    members = []
    try:
        length = filesystem.size(path)
        with filesystem.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                problem = "" if info.isreg() and not info.issparse() else _KINDS.get(info.type, "not a regular file")
                if info.isdir():
                    continue
                if not problem and info.offset_data + info.size > length:
                    problem = "cut short by the end of the archive"
                members.append(Member(info.name, info.offset_data, info.size, problem))
    except FileNotFoundError:
        raise ArchiveError(f"{location} is not there; --source wants a folder with IXI-T1.tar and IXI-T2.tar") from None
    except tarfile.TarError as error:
        raise ArchiveError(f"{location} is not a tar archive that can be read ({error}); fetch it again") from error
    except OSError as error:
        raise ArchiveError(f"cannot read {location}: {error.strerror or error}") from error
    return members


def read_member(location: str, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` of the archive at a path or fsspec URL; fewer where it ends before."""
    filesystem, path = fsspec.url_to_fs(location)
    data: bytes = filesystem.cat_file(path, start=offset, end=offset + size)
    return data
