"""Members that are broken or hostile: by name, with what must become of each, and mutated from a seed."""

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
    """A ball of many levels in noise, [k, j, i]."""
    shape = SHAPE_IJK[modality][::-1]
    rng = np.random.default_rng(len(modality) + ord(modality[-1]))
    radius = np.sqrt(sum(((n - (s - 1) / 2) / (s / 2)) ** 2 for n, s in zip(np.indices(shape), shape, strict=True)))
    return np.round(np.clip(1 - radius, 0, 1) * 2000 + rng.uniform(0, 400, shape)).astype("<i2")


GOOD = {m: pack_nifti(voxels_of(m), affine_of(m)) for m in ("T1", "T2")}
RAW = {m: gzip.decompress(packed) for m, packed in GOOD.items()}


def changed(modality: str, *changes: tuple[int, object, str]) -> bytes:
    """The good member with other values at these offsets of its header: (offset, values, dtype)."""
    raw = bytearray(RAW[modality])
    for at, values, dtype in changes:
        data = np.array(values, dtype).tobytes()
        raw[at : at + len(data)] = data
    return gzip.compress(bytes(raw), 1, mtime=0)


def stored_as(modality: str, dtype: str) -> bytes:
    import nibabel as nib

    image = nib.Nifti1Image(
        voxels_of(modality).T.astype(dtype), affine_of(modality), nib.Nifti1Header(endianness=dtype[0])
    )
    image.header.set_data_dtype(np.dtype(dtype))
    return gzip.compress(image.to_bytes(), 1, mtime=0)


def claiming(modality: str, shape_ijk: tuple[int, ...], dtype: tuple[int, int], zeros: int) -> bytes:
    """A header that claims such a shape, and then `zeros` bytes of zeros."""
    head = bytearray(RAW[modality][:352])
    head[40 : 40 + 2 * (len(shape_ijk) + 1)] = np.array([len(shape_ijk), *shape_ijk], "<i2").tobytes()
    head[70:74] = np.array(dtype, "<i2").tobytes()
    packer, block = zlib.compressobj(9, wbits=-15), bytes(1 << 20)
    parts = [packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)]
    parts += [packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)] * (zeros >> 20)  # each is the same bytes
    parts.append(packer.compress(bytes(zeros % len(block))) + packer.flush())
    crc = zlib.crc32(head)
    for _ in range(zeros >> 20):
        crc = zlib.crc32(block, crc)
    crc = zlib.crc32(bytes(zeros % len(block)), crc)
    return gzip.compress(b"")[:10] + b"".join(parts) + struct.pack("<II", crc, (len(head) + zeros) % (1 << 32))


def with_voxel(modality: str, value: float) -> bytes:
    stored = voxels_of(modality).astype("<f4")
    stored[12, 16, 16] = value
    return pack_nifti(stored, affine_of(modality))


@cache
def named() -> dict[str, tuple[str, bytes, str]]:
    """What is wrong -> the modality it is wrong in, the member, and the reason it must have ("": it is to be used)."""
    return {
        "10^12 voxels": ("T1", changed("T1", (40, [3, 10000, 10000, 10000], "<i2")), "unreadable"),
        "32767^7 voxels": ("T2", changed("T2", (40, [7] + [32767] * 7, "<i2")), "not_3d"),
        "gzip bomb": ("T1", claiming("T1", SHAPE_IJK["T1"], (4, 16), 1 << 30), "corrupt_voxels"),
        "gzip bomb of a claimed size": (
            "T1",
            claiming("T1", (4700, 4700, 24), (2, 8), 4700 * 4700 * 24),
            "grid_not_modal",
        ),
        "gzip bomb of a large size": (
            "T1",
            claiming("T1", (768, 768, 24), (2, 8), 768 * 768 * 24),
            "empty_image",
        ),
        "more bytes than are read": (
            "T2",
            claiming("T2", (1024, 1024, 33), (64, 64), 1024 * 1024 * 33 * 8),
            "depth_not_modal",
        ),
        "a side longer than is read": (
            "T2",
            claiming("T2", (22000, 60, 24), (4, 16), 22000 * 60 * 24 * 2),
            "grid_not_modal",
        ),
        "more slices than are read": (
            "T1",
            claiming("T1", (32, 32, 30000), (4, 16), 32 * 32 * 30000 * 2),
            "depth_not_modal",
        ),
        "7-D": ("T1", changed("T1", (40, [7, 2, 2, 2, 2, 2, 2, 2], "<i2")), "not_3d"),
        "zero spacing": ("T2", changed("T2", (80, [0.0, 1, 1], "<f4")), "bad_affine"),
        "negative spacing": ("T1", changed("T1", (80, [-1.0, 1, 1], "<f4")), "bad_affine"),
        "NaN spacing": ("T2", changed("T2", (84, [np.nan], "<f4")), "bad_affine"),
        "NaN voxels": ("T2", with_voxel("T2", np.nan), "corrupt_voxels"),
        "infinite voxels": ("T1", with_voxel("T1", -np.inf), "corrupt_voxels"),
        "huge voxels": ("T2", with_voxel("T2", 3e38), "intensity_range"),
        "big-endian": ("T1", stored_as("T1", ">i2"), ""),
        "float64": ("T2", stored_as("T2", "<f8"), ""),
        "uint8": ("T2", stored_as("T2", "|u1"), ""),
        "complex": ("T1", changed("T1", (70, [32, 64], "<i2")), "unsupported_dtype"),
        "RGB": ("T2", changed("T2", (70, [128, 24], "<i2")), "unsupported_dtype"),
        "float128": ("T2", changed("T2", (70, [1536, 128], "<i2")), "unsupported_dtype"),
        "Analyze": ("T1", changed("T1", (344, [0], "<i4")), "unreadable"),
        "missing sform": ("T2", changed("T2", (254, [0], "<i2")), ""),
        "neither sform nor qform": ("T1", changed("T1", (252, [0, 0], "<i2")), "bad_affine"),
        "singular affine": ("T1", changed("T1", (280, [0.0] * 12, "<f4")), "bad_affine"),
        "NaN affine": ("T2", changed("T2", (280, [np.nan] * 12, "<f4")), "bad_affine"),
        "slope of 10^38": ("T2", changed("T2", (112, [1e38, 0], "<f4")), "intensity_range"),
        "empty file": ("T1", b"", "unreadable"),
        "cut short": ("T2", GOOD["T2"][:5000], "corrupt_voxels"),
    }


FIELDS = [
    *((at, "<i2") for at in (*range(40, 56, 2), 70, 72, 252, 254)),
    *((at, "<f4") for at in (*range(76, 124, 4), *range(256, 328, 4))),
    (0, "<i4"),
    (344, "<i4"),
]
NASTY = (0, -1, 1, 2, 3, 7, 8, 24, 127, 255, 256, 32767, -32768, 1e-38, -1e-3, 1e38, np.nan, np.inf, -np.inf, 352, 1e6)


def mutated(seed: int) -> tuple[str, bytes]:
    """The modality and the member of a seed: a good one with a header, or a stream, that was tampered with."""
    rng = np.random.default_rng(seed)
    modality = ("T1", "T2")[seed % 2]
    kind = rng.integers(6)
    if kind <= 1:  # fields that mean something get values that mean trouble
        raw = bytearray(RAW[modality])
        for _ in range(rng.integers(1, 4)):
            at, dtype = FIELDS[rng.integers(len(FIELDS))]
            value = NASTY[rng.integers(len(NASTY))]
            if dtype != "<f4":
                value = int(np.clip(np.nan_to_num(value), np.iinfo(dtype).min, np.iinfo(dtype).max))
            data = np.array(value, dtype).tobytes()
            raw[at : at + len(data)] = data
        return modality, gzip.compress(bytes(raw), 1, mtime=0)
    if kind == 2:  # any bytes of the header
        raw = bytearray(RAW[modality])
        for at in rng.integers(0, 352, rng.integers(1, 9)):
            raw[at] = rng.integers(256)
        return modality, gzip.compress(bytes(raw), 1, mtime=0)
    packed = bytearray(GOOD[modality])
    if kind == 3:  # any bytes of the stream, those of its beginning more often
        for at in rng.integers(0, len(packed) if rng.random() < 0.5 else 64, rng.integers(1, 5)):
            packed[at] ^= int(rng.integers(1, 256))
    elif kind == 4:  # cut, torn apart, or doubled
        a, b = sorted(rng.integers(0, len(packed), 2))
        packed = [packed[:a], packed[a:], packed[:a] + packed[b:], packed[:b] + packed[a:], packed + packed][
            rng.integers(5)
        ]
    else:  # more behind it, or something else
        junk = rng.bytes(int(rng.integers(1, 5000)))
        packed = [packed + junk, junk, junk + packed, packed[:18] + junk][rng.integers(4)]
    return modality, bytes(packed)


def pairs(number: int, modality: str, member: bytes) -> Iterator[tuple[str, str, bytes]]:
    """(modality, name, bytes) of a subject, of whom one member is the given one and the other is good."""
    for m, good in GOOD.items():
        yield m, f"IXI{number}-Guys-{number}-{m}.nii.gz", member if m == modality else good
