"""Inflate gzip data in memory: the first bytes only, or all of it with CRC-32 and length checked."""

from __future__ import annotations

import deflate
import numpy as np
from isal import igzip_lib

from ixi_etl.errors import BadVolumeError

HEADER_BYTES = 540  # of NIfTI-2; NIfTI-1 has 348
PIECE_BYTES = 1 << 20  # inflated per call
MAX_DEFLATE_RATIO = 1032  # largest compression ratio of deflate


def is_gzip(data: bytes) -> bool:
    return data.startswith(b"\x1f\x8b")


def inflate_head(packed: bytes, size: int = HEADER_BYTES) -> bytes:
    """The first `size` inflated bytes of a gzip stream, or fewer if it is shorter.

    Raises:
        BadVolumeError: `unreadable`: not a gzip stream.
    """
    try:
        head: bytes = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP).decompress(packed, size)
    except igzip_lib.error as error:  # type: ignore[misc]  # the stub types it as a value
        raise BadVolumeError("unreadable", f"not a gzip file ({error})") from error
    return head


def inflate(packed: bytes, size: int) -> bytearray | memoryview:
    """Inflate a gzip file of exactly `size` bytes, with CRC-32 and length checked.

    libdeflate inflates the whole buffer in little more than half the time of a stream. It reads only the first of
    several concatenated gzip members and does not describe damage, so files that do not end with the trailer of the
    first member are passed to `inflate_in_pieces`.

    Raises:
        BadVolumeError: `corrupt_voxels`: truncated, damaged, or longer than `size`.
    """
    try:
        whole = deflate.gzip_decompress(packed, size)
    except deflate.DeflateError:
        return inflate_in_pieces(packed, size)
    trailer = deflate.crc32(whole).to_bytes(4, "little") + len(whole).to_bytes(4, "little")
    return whole if len(whole) == size and packed.endswith(trailer) else inflate_in_pieces(packed, size)


def inflate_in_pieces(packed: bytes, size: int) -> memoryview:
    """Inflate a gzip file with ISA-L, piece by piece into `size` bytes; it may have several concatenated members.

    Raises:
        BadVolumeError: `corrupt_voxels`, with a description.
    """
    whole, filled = np.empty(size, np.uint8).data, 0
    stream, rest = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP), packed
    while True:
        try:
            piece = stream.decompress(rest, PIECE_BYTES)
        except igzip_lib.error as error:  # type: ignore[misc]  # the stub types it as a value
            raise BadVolumeError("corrupt_voxels", f"the gzip stream is damaged ({error})") from error
        rest = b""  # the stream holds the input now
        if filled + len(piece) > size:
            problem = f"the gzip stream is damaged, or has more than the {size} bytes that the header requires"
            raise BadVolumeError("corrupt_voxels", problem)
        whole[filled : filled + len(piece)] = piece
        filled += len(piece)
        if stream.eof:
            rest = stream.unused_data
            if not is_gzip(rest):
                break
            stream = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
        elif not piece:
            raise BadVolumeError("corrupt_voxels", f"the gzip stream is truncated after {filled} of {size} bytes")
    if filled < size:
        raise BadVolumeError("corrupt_voxels", f"the gzip stream has {filled} bytes; the header requires {size}")
    return whole
