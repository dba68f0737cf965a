"""NIfTI from bytes in memory, gzipped or plain: the header alone, or the voxels, checked to the last byte.

Legend: I, J, K are the voxel axes as stored (I fastest). An affine takes (i, j, k, 1) to RAS+ world points in mm.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import deflate
import nibabel as nib
import numpy as np
from isal import igzip_lib
from numpy.typing import NDArray

from ixi_etl.errors import BadVolumeError

HEADER_BYTES = 540  # NIfTI-2's; NIfTI-1's 348 lie within
MAX_VOLUME_BYTES = 512 << 20  # of voxels, in a file of a person's own; an IXI volume has 20 MB
PIECE_BYTES = 1 << 20  # inflated at a time
MAX_DEFLATE_RATIO = 1032  # the most that deflate can shrink


@dataclass
class Header:
    """What a NIfTI header says, as far as it could be read.

    Attributes:
        shape: (I, J, K); more axes where it is not 3-D. Trailing axes of length 1 are dropped.
        spacing_mm: voxel size along I, J, K, from the header's pixdim.
        orientation: axis codes as stored, for example `PSR`: I grows to the Posterior, J Superior, K Right.
        affine: 4 x 4, voxel to RAS mm; the sform, else the qform.
        dtype: numpy's name with byte order, for example `<i2`.
        slope, intercept: stored value x slope + intercept = the scanner's units.
        voxel_offset: of the first voxel in the inflated file.
        reason, problem: the first thing wrong with it, as a manifest reason and in words ("" if nothing is).
    """

    shape: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    orientation: str = ""
    affine: NDArray[np.float64] | None = None
    dtype: str = ""
    slope: float = 1.0
    intercept: float = 0.0
    voxel_offset: int = 0
    reason: str = ""
    problem: str = ""

    @property
    def voxel_bytes(self) -> int:
        count = 1
        for n in self.shape:
            count *= n
        return count * np.dtype(self.dtype).itemsize

    def scaled(self, stored: NDArray[Any]) -> NDArray[Any]:
        """Stored values in the scanner's units; float64 unless nothing is to be done."""
        if (self.slope, self.intercept) == (1.0, 0.0):
            return stored
        scaled: NDArray[Any] = stored * np.float64(self.slope)
        scaled += self.intercept
        return scaled


def read(data: bytes) -> tuple[Header, NDArray[Any]]:
    """A whole file, gzipped or plain: its header, and its voxels as stored [k, j, i], all of them finite.

    Raises:
        BadVolumeError: it is no such volume, or damaged.
    """
    header = parse_header(head_of(data), len(data))
    if header.reason:
        raise BadVolumeError(header.reason, header.problem)
    size = header.voxel_offset + header.voxel_bytes
    if not is_gzip(data) and len(data) != size:
        raise BadVolumeError("corrupt_voxels", f"{len(data)} bytes; the header announces {size}")
    stored = voxels(inflate(data, size) if is_gzip(data) else data, header)
    if stored.dtype.kind == "f" and not np.isfinite(stored).all():
        raise BadVolumeError("corrupt_voxels", "voxels that are NaN or infinite")
    return header, stored


def is_gzip(data: bytes) -> bool:
    return data.startswith(b"\x1f\x8b")


def head_of(data: bytes) -> bytes:
    """The first bytes of a NIfTI file, gzipped or plain: all of its header.

    Raises:
        BadVolumeError: `unreadable`, a damaged gzip stream.
    """
    return inflate_head(data) if is_gzip(data) else data[:HEADER_BYTES]


def inflate_head(packed: bytes, size: int = HEADER_BYTES) -> bytes:
    """The first `size` bytes that a gzip stream holds; fewer where it is shorter.

    Raises:
        BadVolumeError: `unreadable`, not a gzip stream.
    """
    try:
        head: bytes = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP).decompress(packed, size)
    except igzip_lib.error as error:  # type: ignore[misc]  # its stub calls it a value
        raise BadVolumeError("unreadable", f"not a gzip file ({error})") from error
    return head


def inflate(packed: bytes, size: int) -> bytearray | memoryview:
    """All of a gzip file that holds `size` bytes, its CRC-32 and length checked.

    At one go by libdeflate, in little more than half the time that a stream takes. It reads the first of several
    members end to end, and says no more of a damaged one than that it is: what does not end with the trailer of the
    first is left to `inflate_in_pieces`. A member that stands there twice is read once.

    Raises:
        BadVolumeError: `corrupt_voxels`: cut short, damaged, or longer than `size`.
    """
    try:
        whole = deflate.gzip_decompress(packed, size)
    except deflate.DeflateError:
        return inflate_in_pieces(packed, size)
    trailer = deflate.crc32(whole).to_bytes(4, "little") + len(whole).to_bytes(4, "little")
    return whole if len(whole) == size and packed.endswith(trailer) else inflate_in_pieces(packed, size)


def inflate_in_pieces(packed: bytes, size: int) -> memoryview:
    """The same by ISA-L, a piece at a time into memory of `size` bytes, of members end to end, too.

    Raises:
        BadVolumeError: `corrupt_voxels`, and what is wrong.
    """
    whole, filled = np.empty(size, np.uint8).data, 0
    stream, rest = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP), packed
    while True:
        try:
            piece = stream.decompress(rest, PIECE_BYTES)
        except igzip_lib.error as error:  # type: ignore[misc]  # its stub calls it a value
            raise BadVolumeError("corrupt_voxels", f"the gzip stream is damaged ({error})") from error
        rest = b""  # the stream has it
        if filled + len(piece) > size:
            raise BadVolumeError("corrupt_voxels", f"damaged, or more than the {size} bytes that the header announces")
        whole[filled : filled + len(piece)] = piece
        filled += len(piece)
        if stream.eof:
            rest = stream.unused_data
            if not is_gzip(rest):
                break
            stream = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
        elif not piece:
            raise BadVolumeError("corrupt_voxels", f"the gzip stream is cut short after {filled} of {size} bytes")
    if filled < size:
        raise BadVolumeError("corrupt_voxels", f"{filled} bytes of the {size} that the header announces")
    return whole


def parse_header(head: bytes, packed_size: int) -> Header:
    """Read a NIfTI-1 or NIfTI-2 header; what is wrong with it is said in the result, nothing is raised.

    `packed_size` is the length of the gzip file: a header that claims more voxels than that could hold is refused.
    """
    header = Header()
    try:
        _fill(header, head, packed_size)
    except BadVolumeError as error:
        header.reason, header.problem = error.reason, error.detail
    return header


def _fill(header: Header, head: bytes, packed_size: int) -> None:
    raw = _raw_header(head)

    # As the standard has it: a slope of 0 or NaN means that no scaling is given.
    slope, intercept = float(raw["scl_slope"]), float(raw["scl_inter"])
    if slope == slope and slope != 0:
        if not np.isfinite([slope, intercept]).all():
            raise BadVolumeError("unreadable", f"slope {slope} and intercept {intercept} are not finite")
        header.slope, header.intercept = slope, intercept

    offset = float(raw["vox_offset"])
    smallest = 352 if len(raw.binaryblock) == 348 else 544
    if not smallest <= offset <= 1 << 20:
        raise BadVolumeError("unreadable", f"voxels are said to begin at byte {offset:g}")
    header.voxel_offset = int(offset)

    ndim = int(raw["dim"][0])
    if not 1 <= ndim <= 7:
        raise BadVolumeError("not_3d", f"the header gives {ndim} dimensions")
    shape = tuple(int(n) for n in raw["dim"][1 : ndim + 1])
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    header.shape = shape
    header.spacing_mm = tuple(_exact(v) for v in raw["pixdim"][1:4])
    if len(shape) != 3 or min(shape) < 1:
        raise BadVolumeError("not_3d", f"shape is {' x '.join(map(str, shape))}")

    code = int(raw["datatype"])
    try:
        dtype = np.dtype(raw.get_data_dtype())
    except (nib.spatialimages.HeaderDataError, KeyError):
        raise BadVolumeError("unsupported_dtype", f"datatype code {code} is unknown") from None
    header.dtype = dtype.str
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise BadVolumeError("unsupported_dtype", f"voxels are {dtype}; integers and floats up to 64 bits can be read")

    if header.voxel_bytes > MAX_VOLUME_BYTES or header.voxel_bytes > MAX_DEFLATE_RATIO * packed_size + (1 << 16):
        raise BadVolumeError(
            "unreadable", f"the header claims {header.voxel_bytes} bytes of voxels, of a member of {packed_size} bytes"
        )

    header.affine, header.orientation = _affine(raw)


def _raw_header(head: bytes) -> nib.Nifti1Header:
    """Raises `BadVolumeError` if it is neither NIfTI-1's nor NIfTI-2's."""
    if head[344:348] in (b"n+1\0", b"n+1 ") and len(head) >= 348:
        return nib.Nifti1Header(head[:348], check=False)
    if head[4:8] == b"n+2\0" and len(head) >= 540:
        return nib.Nifti2Header(head[:540], check=False)
    raise BadVolumeError("unreadable", f"not a NIfTI file (it begins with {head[:16]!r})")


def _affine(raw: nib.Nifti1Header) -> tuple[NDArray[np.float64], str]:
    """The affine, and the direction in which each voxel axis runs, `RAS` and so on."""
    spacing = np.asarray(raw["pixdim"][1:4], np.float64)
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise BadVolumeError("bad_affine", f"spacing is {' x '.join(f'{s:g}' for s in spacing)} mm")
    if raw["sform_code"] > 0:
        kind, affine = "sform", raw.get_sform()
    elif raw["qform_code"] > 0:
        kind = "qform"
        try:
            affine = raw.get_qform()
        except (nib.spatialimages.HeaderDataError, ValueError) as error:
            raise BadVolumeError("bad_affine", f"the qform cannot be read ({error})") from error
    else:
        raise BadVolumeError("bad_affine", "neither sform nor qform is set, so its orientation is unknown")
    affine = np.asarray(affine, np.float64)
    if not np.isfinite(affine).all():
        raise BadVolumeError("bad_affine", f"the {kind} has values that are not finite")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    # The volume of a voxel beside that of the box of its edges: 1 for right angles, 0 for a flat one.
    if not (lengths.min() > 1e-3 and lengths.max() < 1e3) or abs(np.linalg.det(affine[:3, :3] / lengths)) < 0.1:
        raise BadVolumeError("bad_affine", f"the {kind} is singular: {json.dumps(affine[:3, :3].round(4).tolist())}")
    directions = axis_codes(affine)
    if None in directions:
        raise BadVolumeError("bad_affine", f"the {kind} leaves an axis without direction")
    return affine, "".join(directions)


def axis_codes(affine: NDArray[np.float64]) -> tuple[str, ...]:
    """What `nibabel.aff2axcodes` says of an affine that is not singular, in an eighth of the time.

    The rotation nearest to the affine is that of its polar decomposition. Where two voxel axes lean to the same world
    axis, nibabel decides.
    """
    u, _, vt = np.linalg.svd(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))
    rotation = u @ vt
    axes = np.abs(rotation).argmax(axis=0).tolist()
    if len(set(axes)) < 3:
        return tuple(nib.aff2axcodes(affine))
    return tuple("LPIRAS"[world + 3 * (rotation[world, voxel] > 0)] for voxel, world in enumerate(axes))


def voxels(inflated: bytes | bytearray | memoryview, header: Header) -> NDArray[np.generic]:
    """The stored voxels, [k, j, i], without slope and intercept; a view of `inflated`, in its own byte order."""
    i, j, k = header.shape
    flat = np.frombuffer(inflated, np.dtype(header.dtype), i * j * k, header.voxel_offset)
    return flat.reshape(k, j, i)


def pack_like(head: bytes, values: NDArray[np.int16], description: str) -> bytes:
    """A plain NIfTI file of `values` [k, j, i] on the grid of the volume that `head` is of.

    Affines and their codes, spacing, units, byte order and trailing axes of length 1 are copied bit for bit; values are
    the scanner's units, so there is no slope. `description` is cut to 80 bytes. What else a header or its extensions
    hold is not taken along: it may name the person.
    """
    theirs = _raw_header(head)
    ours = type(theirs)(endianness=theirs.endianness)
    ours.set_data_dtype(np.int16)
    ours.set_data_shape([*values.shape[::-1], *theirs["dim"][4 : int(theirs["dim"][0]) + 1].tolist()])
    for field in _GEOMETRY:
        ours[field] = theirs[field]
    ours["vox_offset"] = len(ours.binaryblock) + 4  # of which four say that no extension follows
    ours["magic"] = theirs["magic"]
    ours["scl_slope"], ours["scl_inter"] = 1, 0
    ours["descrip"] = description.encode("ascii", "replace")[:80]
    stored = values.astype(values.dtype.newbyteorder(ours.endianness))
    return b"".join((bytes(ours.binaryblock), bytes(4), np.ascontiguousarray(stored).data))


def extension_codes(data: bytes, header: Header) -> list[int]:
    """The codes of the extensions between a file's header and its voxels; [] where there are none.

    Whatever makes no sense there ends the list: nothing but these codes is made of it.
    """
    head = inflate_head(data, header.voxel_offset) if is_gzip(data) else data[: header.voxel_offset]
    raw = _raw_header(head)
    at, codes = len(raw.binaryblock), []
    if len(head) < at + 4 or not head[at]:
        return []
    at += 4
    while at + 8 <= len(head):
        size, code = np.frombuffer(head, np.dtype(np.int32).newbyteorder(raw.endianness), 2, at).tolist()
        if size < 8:
            break
        codes.append(code)
        at += size
    return codes


_GEOMETRY = (
    *("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


def _exact(value: np.floating) -> float:
    """The double that float32 `value` prints as, so that 1.2 is 1.2 and not 1.2000000476837158."""
    return float(str(value))
