"""Headers and voxels from bytes: nothing hangs, and every error is a manifest reason."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable
from itertools import pairwise

import nibabel as nib
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from profiles import examples
from strategies import affines as any_affine
from strategies import shapes

from ixi_etl.dataset.manifest import REASONS
from ixi_etl.errors import BadVolumeError
from ixi_etl.scans import affines, gunzip, nifti
from ixi_etl.testing.phantom import pack_nifti

VOLUME = np.random.default_rng(1).integers(0, 3000, (6, 7, 8)).astype("<i2")
PACKED = pack_nifti(VOLUME, np.diag([1.0, 2.0, 3.0, 1.0]), slope=1.5, intercept=-3.0)
RAW = gzip.decompress(PACKED)


def changed(offset: int, data: bytes) -> bytes:
    """RAW with other bytes at an offset."""
    return RAW[:offset] + data + RAW[offset + len(data) :]


@given(st.data(), shapes, st.sampled_from(["<i2", ">i2", "u1", "<f4", "<f8", "<u2", "<i4"]))
def test_header_agrees_with_nibabel(data: st.DataObject, shape: tuple[int, int, int], dtype: str) -> None:
    affine = data.draw(any_affine(shape))
    image = nib.Nifti1Image(np.zeros(shape, dtype), affine, nib.Nifti1Header(endianness=dtype[0].replace("u", "<")))
    image.header.set_data_dtype(dtype)
    header = nifti.parse_header(image.to_bytes(), 10**6)
    assert (header.reason, header.problem) == ("", "")
    assert header.shape == shape
    assert np.dtype(header.dtype) == image.get_data_dtype()
    assert header.orientation == "".join(nib.aff2axcodes(image.affine))
    np.testing.assert_allclose(header.affine, image.affine, atol=1e-5)
    np.testing.assert_allclose(header.spacing_mm, image.header.get_zooms(), rtol=1e-6)
    assert header.voxel_offset == 352


@given(arrays(np.float64, (3, 3), elements=st.floats(-2, 2).map(lambda x: round(x, 2))))
@example(np.array([[1, 1, 0], [-1, 1, 0], [0, 0, 1]], float))  # two axes halfway between two directions
@example(np.array([[2, 2, 2], [0, 1, 0], [0, 0, 1]], float))  # three axes closest to one direction
def test_axis_codes_equal_nibabel(columns: NDArray[np.float64]) -> None:
    lengths = np.linalg.norm(columns, axis=0)
    assume(lengths.min() > 1e-3 and abs(np.linalg.det(columns / lengths)) > 0.1)  # others are rejected
    affine = nib.affines.from_matvec(columns, [1.0, 2.0, 3.0])
    rotation, volume = affines.nearest_orthogonal(columns / lengths)
    assert volume == pytest.approx(abs(np.linalg.det(columns / lengths)))
    assert affines.axis_codes(affine, rotation) == nib.aff2axcodes(affine)


def test_nifti_2_is_read() -> None:
    image = nib.Nifti2Image(VOLUME.T, np.diag([1.0, 2.0, 3.0, 1.0]))
    raw = image.to_bytes()
    header = nifti.parse_header(raw, 10**6)
    assert header.reason == ""
    np.testing.assert_array_equal(nifti.stored_voxels(raw, header), VOLUME)


def test_slope_and_voxels_equal_nibabel() -> None:
    header = nifti.parse_header(RAW, len(PACKED))
    stored = nifti.stored_voxels(gunzip.inflate(PACKED, header.voxel_offset + header.voxel_bytes), header)
    expected = nib.Nifti1Image.from_bytes(RAW).get_fdata()
    np.testing.assert_array_equal(stored.T * header.slope + header.intercept, expected)


@pytest.mark.parametrize("slope", [0.0, np.nan])
def test_a_slope_of_zero_or_nan_means_no_scaling(slope: float) -> None:
    header = nifti.parse_header(changed(112, np.array([slope, 7], "<f4").tobytes()), len(PACKED))
    assert (header.reason, header.slope, header.intercept) == ("", 1.0, 0.0)


def test_trailing_axes_of_one_are_dropped() -> None:
    header = nifti.parse_header(changed(40, np.array([5, 8, 7, 6, 1, 1], "<i2").tobytes()), len(PACKED))
    assert (header.reason, header.shape) == ("", (8, 7, 6))


NAN = np.full(12, np.nan, "<f4").tobytes()
NO_SFORM = changed(252, b"\1\0\0\0")
HEADER_4D = changed(40, np.array([4, 8, 7, 3, 2], "<i2").tobytes())
COMPLEX = changed(70, np.array([32, 64], "<i2").tobytes())
INVALID = {
    "empty": (b"", "unreadable"),
    "not NIfTI": (b"<html>" * 100, "unreadable"),
    "Analyze": (changed(344, b"\0\0\0\0"), "unreadable"),
    "header of a pair": (changed(344, b"ni1\0"), "unreadable"),
    "truncated": (RAW[:200], "unreadable"),
    "voxels inside the header": (changed(108, np.array([8], "<f4").tobytes()), "unreadable"),
    "voxels at NaN": (changed(108, NAN[:4]), "unreadable"),
    "infinite slope": (changed(112, np.array([np.inf, 0], "<f4").tobytes()), "unreadable"),
    "10^12 voxels": (changed(40, np.array([3, 10000, 10000, 10000], "<i2").tobytes()), "unreadable"),
    "4-D, infinite slope": (
        HEADER_4D[:112] + np.array([np.inf, 0], "<f4").tobytes() + HEADER_4D[120:],
        "unreadable",
    ),
    "complex, voxels inside the header": (COMPLEX[:108] + np.array([8], "<f4").tobytes() + COMPLEX[112:], "unreadable"),
    "2-D": (changed(40, np.array([2, 8, 42], "<i2").tobytes()), "not_3d"),
    "4-D": (changed(40, np.array([4, 8, 7, 3, 2], "<i2").tobytes()), "not_3d"),
    "7-D": (changed(40, np.array([7, 2, 2, 2, 2, 2, 2, 2], "<i2").tobytes()), "not_3d"),
    "no dimensions": (changed(40, b"\0\0"), "not_3d"),
    "negative length": (changed(40, np.array([3, -8, 7, 6], "<i2").tobytes()), "not_3d"),
    "length of zero": (changed(40, np.array([3, 8, 0, 6], "<i2").tobytes()), "not_3d"),
    "complex": (changed(70, np.array([32, 64], "<i2").tobytes()), "unsupported_dtype"),
    "RGB": (changed(70, np.array([128, 24], "<i2").tobytes()), "unsupported_dtype"),
    "unknown dtype": (changed(70, np.array([77, 16], "<i2").tobytes()), "unsupported_dtype"),
    "zero spacing": (changed(80, np.array([0, 2, 3], "<f4").tobytes()), "bad_affine"),
    "negative spacing": (changed(80, np.array([-1, 2, 3], "<f4").tobytes()), "bad_affine"),
    "NaN spacing": (changed(84, NAN[:4]), "bad_affine"),
    "NaN sform": (changed(280, NAN[:48]), "bad_affine"),
    "singular sform": (changed(280, np.zeros(12, "<f4").tobytes()), "bad_affine"),
    "flat sform": (changed(312, np.array([0, 1e-6, 0, 0], "<f4").tobytes()), "bad_affine"),
    "no orientation": (changed(252, b"\0\0\0\0"), "bad_affine"),
    "NaN qform alone": (NO_SFORM[:256] + NAN[:12] + NO_SFORM[268:], "bad_affine"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_headers_get_their_reason(case: str) -> None:
    raw, reason = INVALID[case]
    header = nifti.parse_header(raw, len(PACKED))
    assert header.reason == reason
    assert "\n" not in header.problem
    assert header.problem


def test_the_qform_is_used_without_an_sform() -> None:
    header = nifti.parse_header(NO_SFORM, len(PACKED))
    assert header.reason == ""
    np.testing.assert_allclose(header.affine, np.diag([1.0, 2.0, 3.0, 1.0]), atol=1e-6)


@given(st.integers(0, 347), st.binary(min_size=1, max_size=8))
@settings(max_examples=examples(300))
def test_damaged_headers_never_raise(at: int, data: bytes) -> None:
    header = nifti.parse_header(changed(at, data)[: len(RAW)], len(PACKED))
    assert header.reason in ("", *REASONS)


@given(st.binary(max_size=600))
def test_arbitrary_bytes_are_unreadable_or_not_3d(head: bytes) -> None:
    assert nifti.parse_header(head, len(head)).reason in ("unreadable", "not_3d")


@given(st.integers(0, len(PACKED) - 1))
def test_a_truncated_stream_is_detected(at: int) -> None:
    with pytest.raises(BadVolumeError) as caught:
        gunzip.inflate(PACKED[:at], len(RAW))
    assert caught.value.reason == "corrupt_voxels"


@given(st.integers(0, len(PACKED) - 1), st.integers(1, 255))
@settings(max_examples=examples(400))
def test_a_damaged_byte_never_changes_a_voxel_silently(at: int, bits: int) -> None:
    damaged = bytearray(PACKED)
    damaged[at] ^= bits
    try:
        inflated = gunzip.inflate(bytes(damaged), len(RAW))
    except BadVolumeError as error:
        assert error.reason == "corrupt_voxels"
    else:  # the byte is in the gzip header's time or system field
        assert inflated == RAW


def outcome(inflate: Callable[[bytes, int], bytearray | memoryview], packed: bytes, size: int) -> bytes | str:
    """The inflated bytes, or the problem."""
    try:
        return bytes(inflate(packed, size))
    except BadVolumeError as error:
        return f"{error.reason}: {error.detail}"


@st.composite
def gzip_files(draw: st.DrawFn) -> bytes:
    """One to three gzip members with parts of RAW, at any level, with or without a name and trailing bytes."""
    ends = sorted(draw(st.lists(st.integers(0, len(RAW)), max_size=2)))
    parts = [RAW[a:b] for a, b in pairwise([0, *ends, len(RAW)])]
    levels, names = st.integers(0, 9), st.sampled_from(["", "a.nii"])
    file = io.BytesIO()
    for part in parts:
        with gzip.GzipFile(draw(names), "wb", draw(levels), file, mtime=0) as member:
            member.write(part)
    return file.getvalue() + draw(st.sampled_from([b"", bytes(512), b"\x1f", b"\x1f\x8b", b"\x1f\x8b\x08", b"<html>"]))


@given(gzip_files(), st.integers(-1, 1), st.none() | st.tuples(st.integers(0, 2000), st.integers(0, 255)), st.data())
@settings(max_examples=examples(150))
def test_both_inflate_functions_agree(
    packed: bytes, extra: int, damage: tuple[int, int] | None, data: st.DataObject
) -> None:
    if damage:
        at, byte = damage
        packed = packed[: at % len(packed)] + bytes([byte]) + packed[at % len(packed) + 1 :]
    packed = packed[: data.draw(st.just(len(packed)) | st.integers(0, len(packed)))]
    size = len(RAW) + extra
    assert outcome(gunzip.inflate, packed, size) == outcome(gunzip.inflate_in_pieces, packed, size)


def test_an_intact_file_is_inflated_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gunzip, "inflate_in_pieces", lambda packed, size: pytest.fail("the file was inflated twice"))
    assert gunzip.inflate(PACKED, len(RAW)) == RAW


def test_a_repeated_gzip_member_is_read_once() -> None:
    assert gunzip.inflate(PACKED + PACKED, len(RAW)) == RAW


def test_a_gzip_bomb_stops_at_the_announced_size() -> None:
    bomb = gzip.compress(bytes(64 << 20), mtime=0)
    with pytest.raises(BadVolumeError, match="damaged, or has more than the 1000 bytes"):
        gunzip.inflate(bomb, 1000)
    assert len(gunzip.inflate_head(bomb)) == gunzip.HEADER_BYTES


def test_concatenated_streams_are_one_file() -> None:
    parts = gzip.compress(RAW[:300], mtime=0) + gzip.compress(RAW[300:], mtime=0)
    assert gunzip.inflate(parts, len(RAW)) == RAW


def test_missing_bytes_are_detected() -> None:
    with pytest.raises(BadVolumeError, match=f"has {len(RAW)} bytes; the header requires {len(RAW) + 1}"):
        gunzip.inflate(PACKED, len(RAW) + 1)


@pytest.mark.parametrize("level", [1, 6, 9])
def test_streams_of_any_compression_level_are_read(level: int) -> None:
    packer = zlib.compressobj(level, wbits=31)
    assert gunzip.inflate(packer.compress(RAW) + packer.flush(), len(RAW)) == RAW


def test_an_error_survives_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(BadVolumeError("not_3d", "shape is 2")))
    assert (error.reason, error.detail) == ("not_3d", "shape is 2")
