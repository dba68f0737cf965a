"""NIfTI from bytes in memory, gzipped or plain: the header alone, or the voxels, checked to the last byte.

Legend: I, J, K are the voxel axes as stored (I fastest). An affine takes (i, j, k, 1) to RAS+ world points in mm.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any

import deflate
import nibabel as nib
import numpy as np
from isal import igzip_lib
from numpy.typing import NDArray

from ixi_etl.errors import BadVolumeError

HEADER_BYTES = 540  # NIfTI-2's; NIfTI-1's 348 lie within
MAX_VOLUME_BYTES = 512 << 20  # of voxels, in a file of a person's own: a bound of memory. An IXI volume has 20 MB
PIECE_BYTES = 1 << 20  # inflated at a time
MAX_DEFLATE_RATIO = 1032  # the most that deflate can shrink

SCANNER, ALIGNED = 1, 2
SPACES = {1: "scanner", 2: "aligned", 3: "Talairach", 4: "MNI152", 5: "template"}  # what a form's code stands for

MAX_FORM_ERROR_MM = 0.5
"""How far apart sform, qform and pixdim may put a voxel.

In 16 real scans that have both forms, an original IXI T1 among them, they put no voxel more than 0.004 mm apart.
Float32 quaternions can turn the far corner of such a grid by 0.3 mm. Half a voxel of IXI is 0.47 mm.
"""

MAX_QUATERNION_EXCESS = 1e-3  # of its squared length over 1; four decimals leave 2e-4, real scans 2e-8
SPACING_LIMITS_MM = 0.01, 100.0  # real scans of a head: 0.5 to 5; a factor of 1,000 is a wrong unit
_UNITS = {1: ("metres", 1e3), 3: ("micrometres", 1e-3)}  # in mm; other codes are read as mm, as other tools do


@dataclass(frozen=True)
class Form:
    """Where a header puts its voxels in one space.

    Attributes:
        affine: 4 x 4, voxel to RAS mm.
        spacing_mm: voxel size along I, J, K: the lengths of the affine's columns.
        orientation: axis codes as stored, for example `PSR`: I grows to the Posterior, J Superior, K Right.
        note: in words, what is unusual about it.
    """

    affine: NDArray[np.float64]
    spacing_mm: tuple[float, ...]
    orientation: str
    note: str = ""

    def to_record(self) -> dict[str, Any]:
        """The same as JSON holds it."""
        return asdict(self) | {"affine": self.affine.tolist()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Form:
        fields = {"affine": np.array(record["affine"]), "spacing_mm": tuple(record["spacing_mm"])}
        return cls(**{**record, **fields})


@dataclass
class Header:
    """What a NIfTI header says, as far as it could be read.

    Attributes:
        shape: (I, J, K); more axes where it is not 3-D. Trailing axes of length 1 are dropped.
        forms: code of a space (`SPACES`) -> the sform or qform in that space. Both are here where their codes differ.
        space: the code of the form that is used: the scanner's if there is one. `use` takes another one.
        spacing_mm, orientation, affine: of that form. Without a usable form the spacing is the pixdim.
        sform_code, qform_code: as stored.
        dtype: numpy's name with byte order, for example `<i2`.
        slope, intercept: stored value x slope + intercept = the scanner's units.
        voxel_offset: of the first voxel in the inflated file.
        description: the field `descrip`, free text.
        reason, problem: the first thing wrong with it, as a manifest reason and in words ("" if nothing is).
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
        """What is unusual about the forms, in words; "" if nothing is."""
        notes = [form.note for form in self.forms.values()]
        if len({id(form.affine) for form in self.forms.values()}) > 1:
            spaces = " and ".join(f"{space_name(code)} (code {code})" for code in sorted(self.forms))
            notes.insert(0, f"sform and qform are of two spaces, {spaces}")
        return "; ".join(filter(None, notes))

    def use(self, space: int) -> None:
        """Take affine, spacing and orientation from the form in another space."""
        form = self.forms[space]
        self.space, self.affine = space, form.affine
        self.spacing_mm, self.orientation = form.spacing_mm, form.orientation

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
    header.description = raw["descrip"].item().decode("latin-1")

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
    header.sform_code, header.qform_code = int(raw["sform_code"]), int(raw["qform_code"])
    _, unit_mm = _UNITS.get(int(raw["xyzt_units"]) & 7, ("mm", 1.0))
    header.spacing_mm = tuple(_exact(v) if unit_mm == 1 else _rounded(float(v) * unit_mm) for v in raw["pixdim"][1:4])
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

    if header.voxel_bytes > MAX_DEFLATE_RATIO * packed_size + (1 << 16):
        raise BadVolumeError(
            "unreadable", f"the header claims {header.voxel_bytes} bytes of voxels, of a member of {packed_size} bytes"
        )
    if header.voxel_bytes > MAX_VOLUME_BYTES:
        said = f"{header.voxel_bytes} bytes of voxels are too many: {MAX_VOLUME_BYTES >> 20} MiB are the most"
        raise BadVolumeError("grid_not_modal", said)

    header.forms = _forms(raw, shape, header.spacing_mm)
    header.use(min(header.forms))


def _raw_header(head: bytes) -> nib.Nifti1Header:
    """Raises `BadVolumeError` if it is neither NIfTI-1's nor NIfTI-2's."""
    if head[344:348] in (b"n+1\0", b"n+1 ") and len(head) >= 348:
        return nib.Nifti1Header(head[:348], check=False)
    if head[4:8] == b"n+2\0" and len(head) >= 540:
        return nib.Nifti2Header(head[:540], check=False)
    raise BadVolumeError("unreadable", f"not a NIfTI file (it begins with {head[:16]!r})")


def _forms(raw: nib.Nifti1Header, shape: tuple[int, ...], pixdim_mm: tuple[float, ...]) -> dict[int, Form]:
    """The forms that are set, by the code of their space.

    A header that contradicts itself is refused, as nobody can know which half of it is right: other tools differ
    (nibabel and FSL take the sform, ITK and ANTs often the qform and the pixdim). Forms of unlike codes may differ:
    they are of two spaces. But no space mirrors a head.

    Raises:
        BadVolumeError: `bad_affine`, and what is wrong.
    """
    unit, unit_mm = _UNITS.get(int(raw["xyzt_units"]) & 7, ("mm", 1.0))
    _check_spacing("the spacing" if unit == "mm" else f"the spacing, given in {unit},", pixdim_mm)
    found: dict[str, tuple[int, NDArray[np.float64]]] = {}
    for kind, read_form in (("sform", _sform), ("qform", _qform)):
        code = int(raw[f"{kind}_code"])
        if code > 0:
            affine = read_form(raw)
            affine[:3] *= unit_mm
            if not np.isfinite(affine).all():
                raise BadVolumeError("bad_affine", f"the {kind} has values that are not finite")
            found[kind] = code, affine
    if not found:
        raise BadVolumeError("bad_affine", "neither sform nor qform is set, so its orientation is unknown")
    apart = _furthest_mm(found["sform"][1] - found["qform"][1], shape) if len(found) == 2 else math.inf
    if apart <= MAX_FORM_ERROR_MM:  # one and the same, but for rounding; and a qform has the pixdim and right angles
        form = _form("sform", found["sform"][1], pixdim_mm)
        return {code: form for code, _ in found.values()}
    forms = {}
    for kind, (code, affine) in found.items():
        form = _form(kind, affine, pixdim_mm)
        note = ""
        if _stretch_mm(affine, shape, pixdim_mm) > MAX_FORM_ERROR_MM:
            note = f"the {kind} ({space_name(code)} space, code {code}) has voxels of {_voxel_words(affine)}"
            note += f"; the pixdim says {_by(pixdim_mm)} mm, at right angles"
            if code == SCANNER:  # which turns and shifts; so what else this one does is wrong, or the pixdim is
                raise BadVolumeError("bad_affine", note)
        forms[kind] = code, replace(form, note=note)
    if len(found) == 2:
        (s_code, sform), (q_code, qform) = found["sform"], found["qform"]
        if np.linalg.det(sform[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0:
            raise BadVolumeError("bad_affine", "sform and qform contradict each other: one is the other's mirror image")
        if s_code == q_code:
            said = f"sform and qform contradict each other: both are in {space_name(s_code)} space (code {s_code})"
            raise BadVolumeError("bad_affine", f"{said}, but put a voxel {apart:.3g} mm apart")
    return dict(forms.values())


def _sform(raw: nib.Nifti1Header) -> NDArray[np.float64]:
    return np.asarray(raw.get_sform(), np.float64)


def _qform(raw: nib.Nifti1Header) -> NDArray[np.float64]:
    """As the standard has it. nibabel's own refuses a qfac (pixdim[0]) of 0, which means 1."""
    vector = np.array([raw["quatern_b"], raw["quatern_c"], raw["quatern_d"]], np.float64)
    square = float(vector @ vector)
    if not square <= 1 + MAX_QUATERNION_EXCESS:
        raise BadVolumeError("bad_affine", f"the qform's quaternion is {square**0.5:g} long, 1 is the most")
    affine = np.eye(4)
    affine[:3, :3] = nib.quaternions.quat2mat([math.sqrt(max(0.0, 1 - square)), *vector])
    affine[:3, :3] *= np.asarray(raw["pixdim"][1:4], np.float64)
    if raw["pixdim"][0] < 0:
        affine[:3, 2] *= -1
    affine[:3, 3] = raw["qoffset_x"], raw["qoffset_y"], raw["qoffset_z"]
    return affine


def _check_spacing(what: str, spacing_mm: Iterable[float]) -> None:
    low, high = SPACING_LIMITS_MM
    if not all(low < mm < high for mm in spacing_mm):
        raise BadVolumeError("bad_affine", f"{what} is {_by(spacing_mm)} mm; is the header's spacing in mm?")


def _form(kind: str, affine: NDArray[np.float64], pixdim_mm: tuple[float, ...]) -> Form:
    lengths = np.sqrt((affine[:3, :3] ** 2).sum(axis=0)).tolist()
    # The volume of a voxel beside that of the box of its edges: 1 for right angles, 0 for a flat one.
    if min(lengths) == 0 or abs(np.linalg.det(affine[:3, :3])) < 0.1 * math.prod(lengths):
        raise BadVolumeError("bad_affine", f"the {kind} is singular: {json.dumps(affine[:3, :3].round(4).tolist())}")
    _check_spacing(f"the {kind}'s spacing", lengths)
    directions = axis_codes(affine)
    if None in directions:
        raise BadVolumeError("bad_affine", f"the {kind} leaves an axis without direction")
    is_pixdim = all(abs(a / b - 1) < 1e-5 for a, b in zip(lengths, pixdim_mm, strict=True))  # but for rounding
    spacing = pixdim_mm if is_pixdim else tuple(_rounded(mm) for mm in lengths)
    return Form(affine, spacing, "".join(directions))


def _voxel_words(affine: NDArray[np.float64]) -> str:
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    cosines = (affine[:3, :3] / lengths).T @ (affine[:3, :3] / lengths)
    angles = [math.degrees(math.acos(float(np.clip(cosines[a, b], -1, 1)))) for a, b in ((0, 1), (0, 2), (1, 2))]
    return f"{_by(lengths)} mm, at angles of {', '.join(f'{angle:.1f}' for angle in angles)} degrees"


def _furthest_mm(difference: NDArray[np.float64], shape: tuple[int, ...]) -> float:
    """The largest distance that a difference of two affines makes anywhere in a volume: at one of its corners."""
    moved = (_CORNERS * np.subtract(shape, 1)) @ difference[:3, :3].T + difference[:3, 3]
    return math.sqrt(float((moved**2).sum(axis=1).max()))


_CORNERS = np.array([*product((0.0, 1.0), repeat=3)])


def _stretch_mm(affine: NDArray[np.float64], shape: tuple[int, ...], pixdim_mm: tuple[float, ...]) -> float:
    """How far an affine puts a voxel from where a rotation of the pixdim's grid about the volume's centre would."""
    u, _, vt = np.linalg.svd(affine[:3, :3] @ np.diag(1 / np.array(pixdim_mm)))
    difference = np.zeros((4, 4))
    difference[:3, :3] = affine[:3, :3] - u @ vt @ np.diag(pixdim_mm)
    difference[:3, 3] = -difference[:3, :3] @ ((np.array(shape) - 1) / 2)
    return _furthest_mm(difference, shape)


def space_name(code: int) -> str:
    return SPACES.get(code, "unknown")


def choose_spaces(t1: Mapping[int, Form], t2: Mapping[int, Form]) -> tuple[int, int] | None:
    """In which spaces the two scans of a person can be laid over each other, by their `forms`; None if in none.

    The first space that both have, the scanner's before all others. `Aligned` may stand for the scanner's where it
    keeps the pixdim: nibabel writes that code for any affine that it is given. Nothing else stands for another space.
    """
    shared = set(t1) & set(t2)
    if shared:
        return min(shared), min(shared)
    first, second = min(t1), min(t2)
    near = max(first, second) <= ALIGNED and not (t1[first].note or t2[second].note)
    return (first, second) if near else None


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


def pack_like(
    head: bytes, values: NDArray[np.int16], description: str, slope: float = 1.0, intercept: float = 0.0
) -> bytes:
    """A plain NIfTI file of `values` [k, j, i] on the grid of the volume that `head` is of.

    Affines and their codes, spacing, units, byte order and trailing axes of length 1 are copied bit for bit; values x
    slope + intercept are in the scanner's units. `description` is cut to 80 bytes. What else a header or its extensions
    hold is not taken along: it may name the person.
    """
    theirs = _raw_header(head)
    ours = type(theirs)(endianness=theirs.endianness)
    ours.set_data_dtype(np.int16)
    ours.set_data_shape([*values.shape[::-1], *theirs["dim"][4 : int(theirs["dim"][0]) + 1].tolist()])
    for name in _GEOMETRY:
        ours[name] = theirs[name]
    ours["vox_offset"] = len(ours.binaryblock) + 4  # of which four say that no extension follows
    ours["magic"] = theirs["magic"]
    ours["scl_slope"], ours["scl_inter"] = slope, intercept
    ours["descrip"] = description.encode("ascii", "replace")[:80]
    stored = values.astype(values.dtype.newbyteorder(ours.endianness))
    return b"".join((bytes(ours.binaryblock), bytes(4), np.ascontiguousarray(stored).data))


def extension_codes(data: bytes, header: Header) -> list[int]:
    """The codes of the extensions between a file's header and its voxels, in order.

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


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _by(numbers: Iterable[float]) -> str:
    return " x ".join(f"{n:.4g}" for n in numbers)
