"""Read NIfTI files from bytes in memory, gzipped or plain: the header alone, or header and checked voxels.

Legend: I, J, K are the voxel axes as stored (I fastest). An affine maps (i, j, k, 1) to RAS+ world points in mm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from ixi_etl.errors import BadVolumeError
from ixi_etl.scans.affines import (
    LENGTH_UNITS,
    Form,
    forms_differ,
    read_forms,
    round_to_six_digits,
    shortest_double,
    space_name,
)
from ixi_etl.scans.gunzip import HEADER_BYTES, MAX_DEFLATE_RATIO, inflate, inflate_head, is_gzip

MAX_VOLUME_BYTES = 512 << 20  # of voxels; bounds memory for users' own files. An IXI volume has 20 MB


@dataclass
class Header:
    """The content of a NIfTI header, as far as it could be read.

    Attributes:
        shape: (I, J, K), with more axes if it is not 3-D. Trailing axes of length 1 are dropped.
        forms: code of a space (`SPACES`) -> the form in that space: sform and qform if their codes differ, else one.
        space: the code of the form in use: scanner space if available. `use` selects another one.
        spacing_mm, orientation, affine: of the form in use. Without a usable form, the spacing is the pixdim.
        sform_code, qform_code: as stored.
        dtype: numpy's name with byte order, for example `<i2`.
        slope, intercept: stored value x slope + intercept = scanner units.
        voxel_offset: of the first voxel in the inflated file.
        description: the field `descrip`, free text.
        reason, problem: the first problem, as a manifest reason and in words; "" for a valid header.
    """

    shape: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    orientation: str = ""
    affine: NDArray[np.float64] | None = None
    forms: dict[int, Form] = field(default_factory=dict)
    space: int = 0
    sform_code: int = 0
    qform_code: int = 0
    dtype: str = ""
    slope: float = 1.0
    intercept: float = 0.0
    voxel_offset: int = 0
    description: str = ""
    reason: str = ""
    problem: str = ""

    @property
    def note(self) -> str:
        """What is unusual about the forms, in words; "" if nothing."""
        notes = [form.note for form in self.forms.values()]
        if self.forms and forms_differ(self.forms):
            spaces = " and ".join(f"{space_name(code)} (code {code})" for code in sorted(self.forms))
            notes.insert(0, f"sform and qform describe two spaces, {spaces}")
        return "; ".join(filter(None, notes))

    def use(self, space: int) -> None:
        """Use affine, spacing and orientation of the form in `space`."""
        form = self.forms[space]
        self.space, self.affine = space, form.affine
        self.spacing_mm, self.orientation = form.spacing_mm, form.orientation

    @property
    def voxel_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def scaled(self, stored: NDArray[Any]) -> NDArray[Any]:
        """Stored values converted to scanner units: float64, or `stored` itself if slope is 1 and intercept 0."""
        if (self.slope, self.intercept) == (1.0, 0.0):
            return stored
        scaled: NDArray[Any] = stored * np.float64(self.slope)
        scaled += self.intercept
        return scaled


def read_volume(data: bytes) -> tuple[Header, NDArray[Any]]:
    """Read a whole file, gzipped or plain: its header, and its voxels as stored [k, j, i], all finite.

    Raises:
        BadVolumeError: the file is not a usable volume, or it is damaged.
    """
    header = parse_header(read_head(data), len(data))
    if header.reason:
        raise BadVolumeError(header.reason, header.problem)
    size = header.voxel_offset + header.voxel_bytes
    if not is_gzip(data) and len(data) != size:
        raise BadVolumeError("corrupt_voxels", f"the file has {len(data)} bytes; the header requires {size}")
    stored = stored_voxels(inflate(data, size) if is_gzip(data) else data, header)
    if stored.dtype.kind == "f" and not np.isfinite(stored).all():
        raise BadVolumeError("corrupt_voxels", "some voxels are NaN or infinite")
    return header, stored


def read_head(data: bytes) -> bytes:
    """The first bytes of a NIfTI file, gzipped or plain, which contain the whole header.

    Raises:
        BadVolumeError: `unreadable`: the gzip stream is damaged.
    """
    return inflate_head(data) if is_gzip(data) else data[:HEADER_BYTES]


def parse_header(head: bytes, packed_size: int) -> Header:
    """Parse a NIfTI-1 or NIfTI-2 header. Problems are reported in the result; nothing is raised.

    `packed_size` is the length of the gzip file; a header that claims more voxels than it could hold is rejected.
    """
    header = Header()
    try:
        _parse_into(header, head, packed_size)
    except BadVolumeError as error:
        header.reason, header.problem = error.reason, error.detail
    return header


def _parse_into(header: Header, head: bytes, packed_size: int) -> None:
    raw = _raw_header(head)
    header.description = raw["descrip"].item().decode("latin-1")

    # By the standard, a slope of 0 or NaN means no scaling.
    slope, intercept = float(raw["scl_slope"]), float(raw["scl_inter"])
    if slope == slope and slope != 0:
        if not (math.isfinite(slope) and math.isfinite(intercept)):
            raise BadVolumeError("unreadable", f"slope is {slope} and intercept {intercept}; both must be finite")
        header.slope, header.intercept = slope, intercept

    offset = float(raw["vox_offset"])
    smallest = 352 if len(raw.binaryblock) == 348 else 544
    if not smallest <= offset <= 1 << 20:
        raise BadVolumeError("unreadable", f"vox_offset is {offset:g}; expected {smallest} to {1 << 20}")
    header.voxel_offset = int(offset)

    ndim = int(raw["dim"][0])
    if not 1 <= ndim <= 7:
        raise BadVolumeError("not_3d", f"the header gives {ndim} dimensions; expected 3")
    shape = tuple(int(n) for n in raw["dim"][1 : ndim + 1])
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    header.shape = shape
    header.sform_code, header.qform_code = int(raw["sform_code"]), int(raw["qform_code"])
    _, unit_mm = LENGTH_UNITS.get(int(raw["xyzt_units"]) & 7, ("mm", 1.0))
    header.spacing_mm = tuple(
        shortest_double(v) if unit_mm == 1 else round_to_six_digits(float(v) * unit_mm) for v in raw["pixdim"][1:4]
    )
    if len(shape) != 3 or min(shape) < 1:
        raise BadVolumeError(
            "not_3d", f"shape is {' x '.join(map(str, shape))}; expected three dimensions of 1 voxel or more"
        )

    code = int(raw["datatype"])
    try:
        dtype = np.dtype(raw.get_data_dtype())
    except (nib.spatialimages.HeaderDataError, KeyError):
        raise BadVolumeError("unsupported_dtype", f"datatype code {code} is unknown") from None
    header.dtype = dtype.str
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise BadVolumeError("unsupported_dtype", f"voxels are {dtype}; expected integers or floats of at most 64 bits")

    if header.voxel_bytes > MAX_DEFLATE_RATIO * packed_size + (1 << 16):
        problem = f"the header claims {header.voxel_bytes} voxel bytes; the member of {packed_size} bytes is too small"
        raise BadVolumeError("unreadable", problem)
    if header.voxel_bytes > MAX_VOLUME_BYTES:
        problem = f"{header.voxel_bytes} bytes of voxels; the maximum is {MAX_VOLUME_BYTES >> 20} MiB"
        raise BadVolumeError("grid_not_modal", problem)

    header.forms = read_forms(raw, shape, header.spacing_mm)
    header.use(min(header.forms))


def _raw_header(head: bytes) -> nib.Nifti1Header:
    """The header; raises `BadVolumeError` if it is neither NIfTI-1 nor NIfTI-2."""
    if head[344:348] in (b"n+1\0", b"n+1 ") and len(head) >= 348:
        return nib.Nifti1Header(head[:348], check=False)
    if head[4:8] == b"n+2\0" and len(head) >= 540:
        return nib.Nifti2Header(head[:540], check=False)
    raise BadVolumeError("unreadable", f"not a NIfTI file (it begins with {head[:16]!r})")


def stored_voxels(inflated: bytes | bytearray | memoryview, header: Header) -> NDArray[np.generic]:
    """Stored voxels [k, j, i], without slope and intercept: a view of `inflated` in its byte order."""
    i, j, k = header.shape
    flat = np.frombuffer(inflated, np.dtype(header.dtype), i * j * k, header.voxel_offset)
    return flat.reshape(k, j, i)


def pack_like(
    head: bytes, values: NDArray[np.int16], description: str, slope: float = 1.0, intercept: float = 0.0
) -> bytes:
    """Write an uncompressed NIfTI file of `values` [k, j, i] on the grid of another volume, given by its `head`.

    Affines and their codes, spacing, units, byte order and trailing axes of length 1 are copied bit for bit. All other
    fields and extensions are left out, because they may identify the person.

    Args:
        head: first bytes of the other volume, as returned by `read_head`.
        values: int16 [k, j, i]; values x slope + intercept are in scanner units.
        description: free text, truncated to 80 bytes.
    """
    source = _raw_header(head)
    header = type(source)(endianness=source.endianness)
    header.set_data_dtype(np.int16)
    header.set_data_shape([*values.shape[::-1], *source["dim"][4 : int(source["dim"][0]) + 1].tolist()])
    for name in _GEOMETRY_FIELDS:
        header[name] = source[name]
    header["vox_offset"] = len(header.binaryblock) + 4  # the last four say that no extension follows
    header["magic"] = source["magic"]
    header["scl_slope"], header["scl_inter"] = slope, intercept
    header["descrip"] = description.encode("ascii", "replace")[:80]
    stored = values.astype(values.dtype.newbyteorder(header.endianness))
    return b"".join((bytes(header.binaryblock), bytes(4), np.ascontiguousarray(stored).data))


def extension_codes(data: bytes, header: Header) -> list[int]:
    """Codes of the extensions between a file's header and its voxels, in order. Invalid data ends the list."""
    head = inflate_head(data, header.voxel_offset) if is_gzip(data) else data[: header.voxel_offset]
    raw = _raw_header(head)
    position, codes = len(raw.binaryblock), []
    if len(head) < position + 4 or not head[position]:
        return []
    position += 4
    while position + 8 <= len(head):
        size, code = np.frombuffer(head, np.dtype(np.int32).newbyteorder(raw.endianness), 2, position).tolist()
        if size < 8:
            break
        codes.append(code)
        position += size
    return codes


_GEOMETRY_FIELDS = (
    *("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)
