"""Broken and hostile archive members: named ones with the expected reason, and others mutated from a seed."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterator
from functools import cache

import numpy as np

from ixi_etl.testing.phantom import grid_affine, pack_nifti

SHAPE_IJK = {"T1": (32, 32, 24), "T2": (32, 32, 24)}
STORED_AS = {"T1": "PSR", "T2": "LAS"}
SPACING_MM = (7.5, 7.5, 9.6)


def affine_of(modality: str) -> np.ndarray:
    return grid_affine(SHAPE_IJK[modality], SPACING_MM, STORED_AS[modality])


def voxels_of(modality: str) -> np.ndarray:
    """A ball with a radial gradient in noise: int16 [k, j, i]."""
    shape = SHAPE_IJK[modality][::-1]
    rng = np.random.default_rng(len(modality) + ord(modality[-1]))
    radius = np.sqrt(sum(((n - (s - 1) / 2) / (s / 2)) ** 2 for n, s in zip(np.indices(shape), shape, strict=True)))
    return np.round(np.clip(1 - radius, 0, 1) * 2000 + rng.uniform(0, 400, shape)).astype("<i2")


VALID = {m: pack_nifti(voxels_of(m), affine_of(m)) for m in ("T1", "T2")}
INFLATED = {m: gzip.decompress(packed) for m, packed in VALID.items()}


def with_fields(modality: str, *fields: tuple[int, object, str]) -> bytes:
    """The valid member with other header fields: (offset, values, dtype)."""
    raw = bytearray(INFLATED[modality])
    for at, values, dtype in fields:
        data = np.array(values, dtype).tobytes()
        raw[at : at + len(data)] = data
    return gzip.compress(bytes(raw), 1, mtime=0)


def with_dtype(modality: str, dtype: str) -> bytes:
    """The valid member with its voxels stored as `dtype`."""
    import nibabel as nib

    image = nib.Nifti1Image(
        voxels_of(modality).T.astype(dtype), affine_of(modality), nib.Nifti1Header(endianness=dtype[0])
    )
    image.header.set_data_dtype(np.dtype(dtype))
    return gzip.compress(image.to_bytes(), 1, mtime=0)


def with_claimed_shape(modality: str, shape_ijk: tuple[int, ...], dtype: tuple[int, int], zeros: int) -> bytes:
    """A header with this shape and dtype (NIfTI code, bits a voxel), and then `zeros` bytes of zeros."""
    header = bytearray(INFLATED[modality][:352])
    header[40 : 40 + 2 * (len(shape_ijk) + 1)] = np.array([len(shape_ijk), *shape_ijk], "<i2").tobytes()
    header[70:74] = np.array(dtype, "<i2").tobytes()
    packer, block = zlib.compressobj(9, wbits=-15), bytes(1 << 20)
    parts = [packer.compress(header) + packer.flush(zlib.Z_FULL_FLUSH)]
    parts += [packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)] * (
        zeros >> 20
    )  # equal blocks pack to equal bytes
    parts.append(packer.compress(bytes(zeros % len(block))) + packer.flush())
    crc = zlib.crc32(header)
    for _ in range(zeros >> 20):
        crc = zlib.crc32(block, crc)
    crc = zlib.crc32(bytes(zeros % len(block)), crc)
    return gzip.compress(b"")[:10] + b"".join(parts) + struct.pack("<II", crc, (len(header) + zeros) % (1 << 32))


def with_voxel(modality: str, value: float) -> bytes:
    stored = voxels_of(modality).astype("<f4")
    stored[12, 16, 16] = value
    return pack_nifti(stored, affine_of(modality))


@cache
def named_members() -> dict[str, tuple[str, bytes, str]]:
    """Defect -> its modality, the member, and the expected reason ("": the member is used)."""
    return {
        "10^12 voxels": ("T1", with_fields("T1", (40, [3, 10000, 10000, 10000], "<i2")), "unreadable"),
        "32767^7 voxels": ("T2", with_fields("T2", (40, [7] + [32767] * 7, "<i2")), "not_3d"),
        "gzip bomb": ("T1", with_claimed_shape("T1", SHAPE_IJK["T1"], (4, 16), 1 << 30), "corrupt_voxels"),
        "gzip bomb of a claimed size": (
            "T1",
            with_claimed_shape("T1", (4700, 4700, 24), (2, 8), 4700 * 4700 * 24),
            "grid_not_modal",
        ),
        "gzip bomb of a large size": (
            "T1",
            with_claimed_shape("T1", (768, 768, 24), (2, 8), 768 * 768 * 24),
            "empty_image",
        ),
        "more bytes than are read": (
            "T2",
            with_claimed_shape("T2", (1024, 1024, 33), (64, 64), 1024 * 1024 * 33 * 8),
            "depth_not_modal",
        ),
        "a side longer than is read": (
            "T2",
            with_claimed_shape("T2", (22000, 60, 24), (4, 16), 22000 * 60 * 24 * 2),
            "grid_not_modal",
        ),
        "more slices than are read": (
            "T1",
            with_claimed_shape("T1", (32, 32, 30000), (4, 16), 32 * 32 * 30000 * 2),
            "depth_not_modal",
        ),
        "7-D": ("T1", with_fields("T1", (40, [7, 2, 2, 2, 2, 2, 2, 2], "<i2")), "not_3d"),
        "zero spacing": ("T2", with_fields("T2", (80, [0.0, 1, 1], "<f4")), "bad_affine"),
        "negative spacing": ("T1", with_fields("T1", (80, [-1.0, 1, 1], "<f4")), "bad_affine"),
        "NaN spacing": ("T2", with_fields("T2", (84, [np.nan], "<f4")), "bad_affine"),
        "NaN voxels": ("T2", with_voxel("T2", np.nan), "corrupt_voxels"),
        "infinite voxels": ("T1", with_voxel("T1", -np.inf), "corrupt_voxels"),
        "huge voxels": ("T2", with_voxel("T2", 3e38), "intensity_range"),
        "big-endian": ("T1", with_dtype("T1", ">i2"), ""),
        "float64": ("T2", with_dtype("T2", "<f8"), ""),
        "uint8": ("T2", with_dtype("T2", "|u1"), ""),
        "complex": ("T1", with_fields("T1", (70, [32, 64], "<i2")), "unsupported_dtype"),
        "RGB": ("T2", with_fields("T2", (70, [128, 24], "<i2")), "unsupported_dtype"),
        "float128": ("T2", with_fields("T2", (70, [1536, 128], "<i2")), "unsupported_dtype"),
        "Analyze": ("T1", with_fields("T1", (344, [0], "<i4")), "unreadable"),
        "missing sform": ("T2", with_fields("T2", (254, [0], "<i2")), ""),
        "neither sform nor qform": ("T1", with_fields("T1", (252, [0, 0], "<i2")), "bad_affine"),
        "singular affine": ("T1", with_fields("T1", (280, [0.0] * 12, "<f4")), "bad_affine"),
        "NaN affine": ("T2", with_fields("T2", (280, [np.nan] * 12, "<f4")), "bad_affine"),
        "slope of 10^38": ("T2", with_fields("T2", (112, [1e38, 0], "<f4")), "intensity_range"),
        "empty file": ("T1", b"", "unreadable"),
        "cut short": ("T2", VALID["T2"][:5000], "corrupt_voxels"),
    }


HEADER_FIELDS = [
    *((at, "<i2") for at in (*range(40, 56, 2), 70, 72, 252, 254)),
    *((at, "<f4") for at in (*range(76, 124, 4), *range(256, 328, 4))),
    (0, "<i4"),
    (344, "<i4"),
]
EXTREME_VALUES = (
    0,
    -1,
    1,
    2,
    3,
    7,
    8,
    24,
    127,
    255,
    256,
    32767,
    -32768,
    1e-38,
    -1e-3,
    1e38,
    np.nan,
    np.inf,
    -np.inf,
    352,
    1e6,
)


def mutated_member(seed: int) -> tuple[str, bytes]:
    """A modality and a member: the valid one with changes of its header or its gzip stream."""
    rng = np.random.default_rng(seed)
    modality = ("T1", "T2")[seed % 2]
    kind = rng.integers(6)
    if kind <= 1:  # header fields with extreme values
        raw = bytearray(INFLATED[modality])
        for _ in range(rng.integers(1, 4)):
            at, dtype = HEADER_FIELDS[rng.integers(len(HEADER_FIELDS))]
            value = EXTREME_VALUES[rng.integers(len(EXTREME_VALUES))]
            if dtype != "<f4":
                value = int(np.clip(np.nan_to_num(value), np.iinfo(dtype).min, np.iinfo(dtype).max))
            data = np.array(value, dtype).tobytes()
            raw[at : at + len(data)] = data
        return modality, gzip.compress(bytes(raw), 1, mtime=0)
    if kind == 2:  # random bytes of the header
        raw = bytearray(INFLATED[modality])
        for at in rng.integers(0, 352, rng.integers(1, 9)):
            raw[at] = rng.integers(256)
        return modality, gzip.compress(bytes(raw), 1, mtime=0)
    packed = bytearray(VALID[modality])
    if kind == 3:  # random bytes of the stream, in half of the cases of its first 64 bytes
        for at in rng.integers(0, len(packed) if rng.random() < 0.5 else 64, rng.integers(1, 5)):
            packed[at] ^= int(rng.integers(1, 256))
    elif kind == 4:  # truncated, without its start, with a part missing or repeated, or doubled
        a, b = sorted(rng.integers(0, len(packed), 2))
        packed = [packed[:a], packed[a:], packed[:a] + packed[b:], packed[:b] + packed[a:], packed + packed][
            rng.integers(5)
        ]
    else:  # random bytes after it, in its place, before it, or after its gzip header
        junk = rng.bytes(int(rng.integers(1, 5000)))
        packed = [packed + junk, junk, junk + packed, packed[:18] + junk][rng.integers(4)]
    return modality, bytes(packed)


def pair_members(number: int, modality: str, member: bytes) -> Iterator[tuple[str, str, bytes]]:
    """(modality, name, bytes) of a subject's members: `member` in its modality, a valid one in the other."""
    for m, valid in VALID.items():
        yield m, f"IXI{number}-Guys-{number}-{m}.nii.gz", member if m == modality else valid
