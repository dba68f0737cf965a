"""The T2 slab has the stored voxels, the T1 slab is on its planes, and each fault gives its reason."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import tempfile
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from profiles import examples
from scipy.ndimage import map_coordinates
from strategies import affines, world_of

from ixi_etl.config import DatasetConfig
from ixi_etl.core.files import to_json
from ixi_etl.core.storage import fingerprint
from ixi_etl.dataset.store import assemble, open_arrays, write_shards
from ixi_etl.pairing import slabs
from ixi_etl.pairing.cut import CutJob, MemberRef, cut_subject, record_path, shard_path
from ixi_etl.scans.intensity import Quantisation, to_int16
from ixi_etl.testing.phantom import grid_affine, pack_nifti, rigid

RNG = np.random.default_rng(5)
T1_GRID = (grid_affine((24, 24, 20), (3, 3, 4), "PSR"), (20, 24, 24))
T2_GRID = (grid_affine((26, 22, 14), (2.5, 2.5, 4), "LAS"), (14, 22, 26))
CONFIG = DatasetConfig(slices=6, registration="none")


def textured(shape_kji: tuple[int, ...], dtype: str = "<i2", seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).integers(0, 3000, shape_kji).astype(dtype)


T1 = pack_nifti(textured(T1_GRID[1]), T1_GRID[0])
T2 = pack_nifti(textured(T2_GRID[1], seed=1), T2_GRID[0])


def cut(folder: Path, t1: bytes, t2: bytes, config: DatasetConfig = CONFIG, cut: bool = True) -> dict[str, Any]:
    path = folder / "members"
    if not path.exists() or path.read_bytes() != t1 + t2:  # an unchanged file keeps its fingerprint
        path.write_bytes(t1 + t2)
    archive, stamp = str(path), fingerprint(str(path))
    members = {"T1": MemberRef(archive, 0, len(t1), stamp), "T2": MemberRef(archive, len(t1), len(t2), stamp)}
    return cut_subject(CutJob("IXI002-Guys-0828", members, cut), config, folder)


def cut_arrays(
    folder: Path, record: dict[str, Any], pairing: str = "anatomical", names: tuple[str, ...] = ("t1", "t2")
) -> dict[str, NDArray[np.int16]]:
    """The voxels of the shards, read from a store that is assembled from them."""
    affine = {name: np.array(record["affines"][name]) for name in names}
    shards = {name: shard_path(folder, "IXI002-Guys-0828", name.upper()) for name in names}
    assemble(folder / "slices.zarr", list(shards), [shards], [affine], tuple(record["slab_shape"]), pairing, {})
    arrays = open_arrays(folder)
    for name in names:
        np.testing.assert_array_equal(arrays[f"{name}_affine"][0], affine[name])
    return {name: np.asarray(arrays[name][0]) for name in names}


def centre_of(affine: NDArray[Any], shape: tuple[int, int, int]) -> NDArray[Any]:
    return affine[:3] @ [*((n - 1) / 2 for n in shape), 1]


@settings(max_examples=examples(15))
@given(st.data(), st.tuples(*[st.integers(12, 20)] * 3), st.tuples(*[st.integers(12, 20)] * 3))
def test_anatomical_slabs_are_the_stored_t2_and_the_t1_at_the_same_positions(
    data: st.DataObject, shape1: tuple[int, int, int], shape2: tuple[int, int, int]
) -> None:
    affine2 = data.draw(affines(shape2))
    affine1 = data.draw(affines(shape1)) @ np.diag([2.5, 2.5, 2.5, 1])  # wide enough to hold most of the T2's slab
    affine1[:3, 3] += affine2[:3] @ [*((n - 1) / 2 for n in shape2), 1] - affine1[:3] @ [
        *((n - 1) / 2 for n in shape1),
        1,
    ]
    slope = data.draw(st.sampled_from([1.0, 1.75]))
    stored1, stored2 = textured(shape1[::-1]), textured(shape2[::-1], seed=1)
    with tempfile.TemporaryDirectory() as name:
        record = cut(Path(name), pack_nifti(stored1, affine1, slope, 30.0), pack_nifti(stored2, affine2, slope))
        assume(record.get("reason") not in ("outside_fov", "intensity_range", "empty_image"))
        actual = cut_arrays(Path(name), record)
    assert "reason" not in record
    image1, image2 = (
        nib.Nifti1Image.from_bytes(gzip.decompress(pack_nifti(s, a, slope, i)))
        for s, a, i in ((stored1, affine1, 30.0), (stored2, affine2, 0.0))
    )
    # the T2: only reoriented by nibabel and sliced
    start, stop = record["t2_window_start"], record["t2_window_stop"]
    canonical = nib.as_closest_canonical(image2)
    np.testing.assert_array_equal(actual["t2"], np.rint(canonical.get_fdata()).transpose(2, 1, 0)[start:stop])
    assert (stop - start, start) == (6, (canonical.shape[2] - 6) // 2)
    # the T1: scipy's order-1 samples of nibabel's voxels through the recorded matrix
    motion, slab_affine = np.array(json.loads(record["t2_to_t1_ras_mm"])), np.array(record["affines"]["t1"])
    np.testing.assert_array_equal(record["affines"]["t1"], record["affines"]["t2"])
    ijk = world_of(np.linalg.inv(image1.affine) @ motion @ slab_affine, actual["t1"].shape)
    off_edge = (np.minimum(np.abs(ijk), np.abs(ijk - (np.array(shape1) - 1))) > 1e-4).all(axis=-1)
    expected = map_coordinates(image1.get_fdata(), np.moveaxis(ijk, -1, 0), order=1, mode="constant")
    assert np.abs(actual["t1"] - expected)[off_edge].max() <= 0.51


@settings(max_examples=examples(10))
@given(st.data(), st.tuples(*[st.integers(12, 20)] * 3), st.integers(1, 12))
def test_index_slabs_are_exactly_the_stored_slices(
    data: st.DataObject, shape: tuple[int, int, int], slices: int
) -> None:
    affine1, affine2 = data.draw(affines(shape)), data.draw(affines(shape))
    start = data.draw(st.integers(0, shape[2] - slices))
    config = DatasetConfig(pairing="index", window=(start, start + slices))
    stored1, stored2 = textured(shape[::-1]), textured(shape[::-1], seed=1)
    with tempfile.TemporaryDirectory() as name:
        record = cut(Path(name), pack_nifti(stored1, affine1), pack_nifti(stored2, affine2), config)
        assume(record.get("reason") != "intensity_range")
        actual = cut_arrays(Path(name), record, "index")
    np.testing.assert_array_equal(actual["t1"], stored1[start : start + slices])
    np.testing.assert_array_equal(actual["t2"], stored2[start : start + slices])
    origin = np.float32(affine1).astype(float) @ np.array([0, 0, start, 1])
    np.testing.assert_allclose(np.array(record["affines"]["t1"])[:, 3], origin, atol=1e-4)
    assert "t2_to_t1_ras_mm" not in record


def test_extreme_voxels_do_not_become_the_whole_foreground() -> None:
    voxels = np.random.default_rng(0).integers(0, 1000, (12, 40, 40)).astype(np.int16)
    masks = []
    for spike in (500, 32767, -32768):
        voxels[0, 0, :3] = spike
        slab = slabs.Slab(to_int16(voxels, Quantisation(1.0, 0.0)), np.eye(4), None)
        masks.append(slab.foreground[1:])
    assert all((mask == masks[0]).mean() > 0.95 for mask in masks)


def test_record_has_hashes_windows_and_percentiles(tmp_path: Path) -> None:
    record = cut(tmp_path, T1, T2)
    actual = cut_arrays(tmp_path, record)
    assert record["t1_sha256"] == hashlib.sha256(T1).hexdigest()
    assert record["t2_sha256"] == hashlib.sha256(T2).hexdigest()
    assert (record["t2_window_start"], record["t2_window_stop"]) == (4, 10)
    assert "t1_window_start" not in record
    for name in ("t1", "t2"):
        assert [record[f"{name}_p_low"], record[f"{name}_p_high"]] == np.percentile(actual[name], [0.1, 99.9]).tolist()


def test_record_has_the_share_of_clipped_voxels_of_the_stored_slabs(tmp_path: Path) -> None:
    clipped = pack_nifti(np.minimum(textured(T2_GRID[1], seed=1), 2000), T2_GRID[0])
    record = cut(tmp_path, T1, clipped)
    shares = {name: np.mean(slab == slab.max()) for name, slab in cut_arrays(tmp_path, record).items()}
    assert record["at_largest_value"] == pytest.approx(shares)
    assert shares["t1"] < 0.001 < 0.3 < shares["t2"]


def replaced(values: NDArray[Any], value: float) -> NDArray[Any]:
    values = values.copy()
    values[values.shape[0] // 2, 5, 5] = value
    return values


def packed_as(values: NDArray[Any], affine: NDArray[Any] = T2_GRID[0]) -> bytes:
    return pack_nifti(values.astype("<f8"), affine)


STORED2 = textured(T2_GRID[1], seed=1)
SCALED = {  # voxels, dtype, slope and intercept of a T2's file; the expected scale and offset, or None
    "few levels": (STORED2 // 30, "<i2", 1.0, 0.0, 1.0, 0.0),
    "a mask": (STORED2 % 2, "|u1", 1.0, 0.0, 1.0, 0.0),
    "whole numbers as floats": (STORED2 // 30, "<f4", 1.0, 0.0, 1.0, 0.0),
    "a whole slope": (STORED2 // 30, "<i2", 2.0, -7.0, 1.0, 0.0),
    "a slope of IXI": (STORED2, "<i2", 1.75, 0.0, 1.0, 0.0),
    "negative values": (STORED2 - 1500, "<i2", 1.0, 0.0, 1.0, 0.0),
    "uint16 to 65535": (STORED2.astype("<u2") * 21 + 2000, "<u2", 1.0, 0.0, 1.0, None),
    "int32 around 1e9": (STORED2.astype("<i4") + 1_000_000_000, "<i4", 1.0, 0.0, 1.0, None),
    "a small slope": (STORED2, "<i2", 0.01, 0.0, 0.01, 0.0),
    "a small slope and few levels": (STORED2 // 300, "<i2", 0.01, 5.0, 0.01, 5.0),
    "a negative slope": (STORED2, "<i2", -0.01, 0.0, 0.01, 0.0),
    "a slope that gives values of 1e5": (STORED2, "<i2", 32.5, 0.0, 32.5, 0.0),
    "a large intercept": (STORED2, "<i2", 1.0, 1e6, 1.0, 1e6),
    "an intercept of half a unit": (STORED2 // 30, "<i2", 1.0, 0.5, 1.0, 0.5),
    "floats from 0 to 1": (STORED2 / 2999.7, "<f4", 1.0, 0.0, None, None),
    "doubles from -1 to 1": (STORED2 / 1500.3 - 1, "<f8", 1.0, 0.0, None, None),
    "large floats": (STORED2 * 1e20 / 3, "<f4", 1.0, 0.0, None, None),
    "tiny floats": (STORED2 * 1e-20 / 3, "<f4", 1.0, 0.0, None, None),
}


@pytest.mark.parametrize("pairing", ["anatomical", "index"])
@pytest.mark.parametrize("case", SCALED)
def test_the_quantisation_depends_on_the_rounding_loss(case: str, pairing: Any, tmp_path: Path) -> None:
    stored, dtype, slope, intercept, scale, offset = SCALED[case]
    stored = stored.astype(dtype)
    t1 = pack_nifti(textured(T2_GRID[1]), T2_GRID[0])  # on the grid of the T2, as pairing by index needs
    config = DatasetConfig(pairing=pairing, slices=6, registration="none")
    record = cut(tmp_path, t1, pack_nifti(stored, T2_GRID[0], slope, intercept), config)
    assert "reason" not in record
    actual = cut_arrays(tmp_path, record, pairing, ("t2",))["t2"]
    assert scale is None or record["t2_scale"] == pytest.approx(scale)
    assert offset is None or record["t2_offset"] == pytest.approx(offset)
    expected = stored.astype(float) * np.float32(slope) + intercept
    expected = expected[4:10, :, ::-1] if pairing == "anatomical" else expected[4:10]
    spread = np.subtract(*np.percentile(expected, [99.9, 0.1]))
    loss = np.abs(actual * record["t2_scale"] + record["t2_offset"] - expected).max()
    if slope == 1.75:
        assert loss <= 0.5  # rounding to whole units
    elif stored.dtype.kind == "f" and scale is None:
        assert loss < spread / 100_000
    else:
        assert loss < 1e-6 * spread  # every stored integer can be recovered
    assert [record["t2_p_low"], record["t2_p_high"]] == np.percentile(actual, [0.1, 99.9]).tolist()


@pytest.mark.parametrize("case", SCALED)
def test_an_interpolated_t1_loses_no_more_than_the_rounding_of_its_file(case: str, tmp_path: Path) -> None:
    stored, dtype, slope, intercept, _, _ = SCALED[case]
    stored = stored.astype(dtype)
    shifted = T2_GRID[0].copy()
    shifted[:3, 3] += T2_GRID[0][:3, 0] / 2  # half a voxel to the left, along i
    record = cut(tmp_path, pack_nifti(stored, shifted, slope, intercept), T2)
    assert "reason" not in record
    actual = cut_arrays(tmp_path, record, names=("t1",))["t1"] * record["t1_scale"] + record["t1_offset"]
    values = stored.astype(float) * np.float32(slope) + intercept
    expected = ((values[:, :, 1:] + values[:, :, :-1]) / 2)[4:10, :, ::-1]
    spread = np.subtract(*np.percentile(expected, [99.9, 0.1]))
    rounding = abs(slope) / 2 if (stored == np.rint(stored)).all() and spread < 1e9 * abs(slope) else spread / 50_000
    loss = np.abs(actual[:, :, :-1] - expected).max()  # the last column is outside
    assert loss <= max(rounding, spread / 512 if record["t1_scale"] == 1 else 0) * 1.0001
    outside = 0 if values.min() < spread else expected.min()
    np.testing.assert_allclose(actual[:, :, -1], outside, atol=max(rounding, 1e-9 * spread))


flipped = bytearray(T1)
flipped[len(T1) // 2] ^= 0xFF
FAULTS = {
    "truncated": (T1[: len(T1) // 2], T2, "corrupt_voxels", "T1"),
    "flipped byte": (bytes(flipped), T2, "corrupt_voxels", "T1"),
    "both damaged": (bytes(flipped), T2[:-4], "corrupt_voxels", "T1"),
    "truncated CRC": (T1, T2[:-4], "corrupt_voxels", "T2"),
    "bytes after the voxels": (gzip.compress(gzip.decompress(T1) + bytes(9)), T2, "corrupt_voxels", "T1"),
    "NaN voxel": (pack_nifti(replaced(textured(T1_GRID[1], "<f4"), np.nan), T1_GRID[0]), T2, "corrupt_voxels", "T1"),
    "infinite voxel": (
        T1,
        pack_nifti(replaced(textured(T2_GRID[1], "<f8"), np.inf), T2_GRID[0]),
        "corrupt_voxels",
        "T2",
    ),
    "zeros": (T1, pack_nifti(np.zeros(T2_GRID[1], "<i2"), T2_GRID[0]), "empty_image", "T2"),
    "constant": (
        pack_nifti(np.full(T1_GRID[1], 9, "<i2"), grid_affine((24, 24, 20), (9, 9, 9), "PSR")),
        T2,
        "empty_image",
        "T1",
    ),
    "both empty": (
        pack_nifti(np.zeros(T1_GRID[1], "<i2"), T1_GRID[0]),
        pack_nifti(np.zeros(T2_GRID[1], "<i2"), T2_GRID[0]),
        "empty_image",
        "T1",
    ),
    "T1 range too wide, T2 empty": (
        packed_as((textured(T1_GRID[1]) / 1500 - 1) * 1.6e308, T1_GRID[0]),
        pack_nifti(np.zeros(T2_GRID[1], "<i2"), T2_GRID[0]),
        "empty_image",
        "T2",
    ),
    "one voxel differs": (
        T1,
        pack_nifti(replaced(np.zeros(T2_GRID[1], "<i2"), 900), T2_GRID[0]),
        "empty_image",
        "T2",
    ),
    "one float voxel differs": (T1, packed_as(replaced(np.full(T2_GRID[1], 0.25), 1e5)), "empty_image", "T2"),
    "one voxel of the T1 differs": (
        pack_nifti(replaced(np.full(T1_GRID[1], 70, "<i2"), 90), grid_affine((24, 24, 20), (9, 9, 9), "PSR")),
        T2,
        "empty_image",
        "T1",
    ),
    "one voxel 10,000 times as bright": (
        T1,
        packed_as(replaced(textured(T2_GRID[1]) / 3000, 1e4)),
        "intensity_range",
        "T2",
    ),
    "no overlap": (
        pack_nifti(textured(T1_GRID[1]), rigid((0, 0, 0), (0, 0, 60)) @ T1_GRID[0]),
        T2,
        "outside_fov",
        "T2",
    ),
    "infinite after scaling": (T1, pack_nifti(textured(T2_GRID[1]), T2_GRID[0], slope=3e38), "intensity_range", "T2"),
    "range of float64": (T1, packed_as((textured(T2_GRID[1]) / 1500 - 1) * 1.6e308), "intensity_range", "T2"),
    "T1 range of float64": (
        packed_as((textured(T1_GRID[1]) / 1500 - 1) * 1.6e308, T1_GRID[0]),
        T2,
        "intensity_range",
        "T1",
    ),
    "header changed since the survey": (gzip.compress(b"<html>" * 99), T2, "unreadable", "T1"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_each_fault_is_recorded_with_its_reason(case: str, tmp_path: Path) -> None:
    t1, t2, reason, modality = FAULTS[case]
    record = cut(tmp_path, t1, t2)
    assert record["reason"] == reason
    assert modality in record["detail"]
    assert "\n" not in record["detail"]
    assert record["t2_sha256"] == hashlib.sha256(t2).hexdigest()
    assert not list(tmp_path.glob("*.shard"))


@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<u2", "<i4", "<f4", ">f4", "<f8", "<i8"])
def test_every_supported_dtype_gives_the_same_slabs(dtype: str, tmp_path: Path) -> None:
    header = nib.Nifti1Header(endianness=dtype[0])
    header.set_data_dtype(dtype)
    members = []
    for grid, seed in ((T1_GRID, 0), (T2_GRID, 1)):
        image = nib.Nifti1Image(textured(grid[1], dtype, seed).T, grid[0], header)
        members.append(gzip.compress(image.to_bytes()))
    actual = cut_arrays(tmp_path, cut(tmp_path, *members))
    plain = tmp_path / "plain"
    plain.mkdir()
    expected = cut_arrays(plain, cut(plain, T1, T2))
    for name in ("t1", "t2"):
        np.testing.assert_array_equal(actual[name], expected[name])


def test_an_excluded_subject_is_hashed_but_not_cut(tmp_path: Path) -> None:
    record = cut(tmp_path, T1, b"no volume", cut=False)
    hashes = {f"{m}_{column}" for m in ("t1", "t2") for column in ("sha256", "gzip_crc32")}
    assert set(record) == hashes | {"made_for", "fingerprints", "record_sha256"}
    assert record["t1_gzip_crc32"] == f"crc32:{zlib.crc32(gzip.decompress(T1)):08x}"
    assert record["t2_gzip_crc32"] == ""  # not a gzip file, so it has no trailer
    assert not list(tmp_path.glob("*.shard"))


@pytest.fixture(scope="module")
def cut_before(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with the cut pair, and its record; tests only read it."""
    folder = tmp_path_factory.mktemp("before")
    return folder, cut(folder, T1, T2)


@pytest.fixture
def first_record(cut_before: tuple[Path, dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    """The record of the pair, already cut in `tmp_path`."""
    folder, record = cut_before
    shutil.copytree(folder, tmp_path, ignore=shutil.ignore_patterns("members"), dirs_exist_ok=True)
    (tmp_path / "members").symlink_to(folder / "members")  # a link keeps the fingerprint
    return record


def test_a_finished_subject_is_not_cut_again(tmp_path: Path) -> None:
    record = cut(tmp_path, T1, T2)
    shard = shard_path(tmp_path, "IXI002-Guys-0828", "T1")
    before = shard.stat().st_mtime_ns
    assert cut(tmp_path, T1, T2) == json.loads(json.dumps(record))
    assert shard.stat().st_mtime_ns == before


@pytest.mark.parametrize("loss", ["shard missing", "shard truncated", "picture missing"])
def test_a_record_with_missing_files_is_not_reused(loss: str, first_record: dict[str, Any], tmp_path: Path) -> None:
    shard = shard_path(tmp_path, "IXI002-Guys-0828", "T2")
    original = shard.read_bytes()
    if loss == "shard truncated":
        shard.write_bytes(original[:1000])
    else:
        (shard if loss == "shard missing" else tmp_path / "IXI002-Guys-0828.jpg").unlink()
    assert cut(tmp_path, T1, T2) == first_record
    assert shard.read_bytes() == original
    assert (tmp_path / "IXI002-Guys-0828.jpg").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"t1_p_low": 1.0},
        {"reason": "outside_fov", "detail": "x"},
        {"files": []},
        {"files": None},
        {"affines": "x"},
        {"slab_shape": [1]},
        {"flags": 5},
        {"record_sha256": None},
    ],
    ids=str,
)
def test_an_edited_record_is_not_reused(change: dict[str, Any], first_record: dict[str, Any], tmp_path: Path) -> None:
    path = record_path(tmp_path, "IXI002-Guys-0828")
    original = path.read_text()
    path.write_text(to_json(json.loads(original) | change))
    assert cut(tmp_path, T1, T2) == first_record
    assert path.read_text() == original


@pytest.mark.parametrize(
    "text", ['{"made_for": "half', "[]", "{}", "5", "[" * 200_000, '{"a":' * 900 + "1" + "}" * 900, "1" * 5000]
)
def test_an_invalid_record_is_not_reused(text: str, first_record: dict[str, Any], tmp_path: Path) -> None:
    record_path(tmp_path, "IXI002-Guys-0828").write_text(text)
    assert cut(tmp_path, T1, T2) == first_record


# -- memory -----------------------------------------------------------------------------------------------------------


def test_volumes_are_freed_before_their_slabs_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced_bytes = []

    def measure_and_write(*arguments: Any) -> dict[str, str]:
        traced_bytes.append(tracemalloc.get_traced_memory()[0])
        return write_shards(*arguments)

    monkeypatch.setattr("ixi_etl.pairing.cut.write_shards", measure_and_write)
    grids = [(grid_affine((80, 80, 60), (1, 1, 1), "RAS"), (60, 80, 80))] * 2
    t1, t2 = (pack_nifti(textured(shape, seed=seed), affine) for seed, (affine, shape) in enumerate(grids))
    cut(tmp_path, t1, t2, CONFIG)  # a first run, which imports modules on use
    record_path(tmp_path, "IXI002-Guys-0828").unlink()
    tracemalloc.start()
    try:
        cut(tmp_path, t1, t2, CONFIG)
    finally:
        tracemalloc.stop()
    assert traced_bytes[-1] < 2 * 60 * 80 * 80  # the bytes of one volume
