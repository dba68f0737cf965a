"""One subject: the T2 slab is the stored voxels, the T1 slab is on its planes, and each fault gives its reason."""

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
    place = str(folder / "members")
    if not Path(place).exists() or Path(place).read_bytes() != t1 + t2:  # else it keeps its fingerprint
        Path(place).write_bytes(t1 + t2)
    present = fingerprint(place)
    members = {"T1": MemberRef(place, 0, len(t1), present), "T2": MemberRef(place, len(t1), len(t2), present)}
    return cut_subject(CutJob("IXI002-Guys-0828", members, cut), config, folder)


def cut_arrays(
    folder: Path, record: dict[str, Any], pairing: str = "anatomical", names: tuple[str, ...] = ("t1", "t2")
) -> dict[str, NDArray[np.int16]]:
    """The voxels of a shard, read back as a reader would."""
    affine = {name: np.array(record["affines"][name]) for name in names}
    shards = {name: shard_path(folder, "IXI002-Guys-0828", name.upper()) for name in names}
    assemble(folder / "slices.zarr", [shards], [affine], tuple(record["slab_shape"]), pairing, {})
    arrays = open_arrays(folder)
    for name in names:
        np.testing.assert_array_equal(arrays[f"{name}_affine"][0], affine[name])
    return {name: np.asarray(arrays[name][0]) for name in names}


def centre_of(affine: NDArray[Any], shape: tuple[int, int, int]) -> NDArray[Any]:
    return affine[:3] @ [*((n - 1) / 2 for n in shape), 1]


@settings(max_examples=examples(15))
@given(st.data(), st.tuples(*[st.integers(12, 20)] * 3), st.tuples(*[st.integers(12, 20)] * 3))
def test_anatomical_slabs_are_the_stored_t2_and_the_t1_at_the_same_place(
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
        got = cut_arrays(Path(name), record)
    assert "reason" not in record
    image1, image2 = (
        nib.Nifti1Image.from_bytes(gzip.decompress(pack_nifti(s, a, slope, i)))
        for s, a, i in ((stored1, affine1, 30.0), (stored2, affine2, 0.0))
    )
    # the T2: reoriented by nibabel, sliced, nothing else
    start, stop = record["t2_window_start"], record["t2_window_stop"]
    upright = nib.as_closest_canonical(image2)
    np.testing.assert_array_equal(got["t2"], np.rint(upright.get_fdata()).transpose(2, 1, 0)[start:stop])
    assert (stop - start, start) == (6, (upright.shape[2] - 6) // 2)
    # the T1: scipy's order-1 samples of nibabel's voxels through the recorded matrix
    motion, slab_affine = np.array(json.loads(record["t2_to_t1_ras_mm"])), np.array(record["affines"]["t1"])
    np.testing.assert_array_equal(record["affines"]["t1"], record["affines"]["t2"])
    ijk = world_of(np.linalg.inv(image1.affine) @ motion @ slab_affine, got["t1"].shape)
    clear = (np.minimum(np.abs(ijk), np.abs(ijk - (np.array(shape1) - 1))) > 1e-4).all(axis=-1)
    want = map_coordinates(image1.get_fdata(), np.moveaxis(ijk, -1, 0), order=1, mode="constant")
    assert np.abs(got["t1"] - want)[clear].max() <= 0.51


@settings(max_examples=examples(10))
@given(st.data(), st.tuples(*[st.integers(12, 20)] * 3), st.integers(1, 12))
def test_index_slabs_are_the_stored_slices_exactly(
    data: st.DataObject, shape: tuple[int, int, int], slices: int
) -> None:
    affine1, affine2 = data.draw(affines(shape)), data.draw(affines(shape))
    start = data.draw(st.integers(0, shape[2] - slices))
    config = DatasetConfig(pairing="index", window=(start, start + slices))
    stored1, stored2 = textured(shape[::-1]), textured(shape[::-1], seed=1)
    with tempfile.TemporaryDirectory() as name:
        record = cut(Path(name), pack_nifti(stored1, affine1), pack_nifti(stored2, affine2), config)
        assume(record.get("reason") != "intensity_range")
        got = cut_arrays(Path(name), record, "index")
    np.testing.assert_array_equal(got["t1"], stored1[start : start + slices])
    np.testing.assert_array_equal(got["t2"], stored2[start : start + slices])
    moved = np.float32(affine1).astype(float) @ np.array([0, 0, start, 1])
    np.testing.assert_allclose(np.array(record["affines"]["t1"])[:, 3], moved, atol=1e-4)
    assert "t2_to_t1_ras_mm" not in record


def test_extreme_voxels_do_not_become_the_whole_foreground() -> None:
    voxels = np.random.default_rng(0).integers(0, 1000, (12, 40, 40)).astype(np.int16)
    heads = []
    for spike in (500, 32767, -32768):
        voxels[0, 0, :3] = spike
        slab = slabs.Slab(to_int16(voxels, Quantisation(1.0, 0.0)), np.eye(4), None)
        heads.append(slabs.foreground_mask(slab)[1:])
    assert all((head == heads[0]).mean() > 0.95 for head in heads)


def test_record_has_hashes_windows_and_percentiles(tmp_path: Path) -> None:
    record = cut(tmp_path, T1, T2)
    got = cut_arrays(tmp_path, record)
    assert record["t1_sha256"] == hashlib.sha256(T1).hexdigest()
    assert record["t2_sha256"] == hashlib.sha256(T2).hexdigest()
    assert (record["t2_window_start"], record["t2_window_stop"]) == (4, 10)
    assert "t1_window_start" not in record
    for name in ("t1", "t2"):
        assert [record[f"{name}_p_low"], record[f"{name}_p_high"]] == np.percentile(got[name], [0.1, 99.9]).tolist()


def replaced(values: NDArray[Any], value: float) -> NDArray[Any]:
    values = values.copy()
    values[values.shape[0] // 2, 5, 5] = value
    return values


def packed_as(values: NDArray[Any], affine: NDArray[Any] = T2_GRID[0]) -> bytes:
    return pack_nifti(values.astype("<f8"), affine)


STORED2 = textured(T2_GRID[1], seed=1)
SCALED = {  # what is stored of a T2: the voxels as in the file, their dtype, slope, intercept; and the scale, offset
    "few levels": (STORED2 // 30, "<i2", 1.0, 0.0, 1.0, 0.0),
    "a mask": (STORED2 % 2, "|u1", 1.0, 0.0, 1.0, 0.0),
    "whole numbers as floats": (STORED2 // 30, "<f4", 1.0, 0.0, 1.0, 0.0),
    "a whole slope": (STORED2 // 30, "<i2", 2.0, -7.0, 1.0, 0.0),
    "a slope as IXI has": (STORED2, "<i2", 1.75, 0.0, 1.0, 0.0),
    "negative values": (STORED2 - 1500, "<i2", 1.0, 0.0, 1.0, 0.0),
    "uint16 to 65535": (STORED2.astype("<u2") * 21 + 2000, "<u2", 1.0, 0.0, 1.0, None),
    "int32, far up": (STORED2.astype("<i4") + 1_000_000_000, "<i4", 1.0, 0.0, 1.0, None),
    "a small slope": (STORED2, "<i2", 0.01, 0.0, 0.01, 0.0),
    "a small slope and few levels": (STORED2 // 300, "<i2", 0.01, 5.0, 0.01, 5.0),
    "a negative slope": (STORED2, "<i2", -0.01, 0.0, 0.01, 0.0),
    "a slope that leads to 1e5": (STORED2, "<i2", 32.5, 0.0, 32.5, 0.0),
    "a large intercept": (STORED2, "<i2", 1.0, 1e6, 1.0, 1e6),
    "half a unit beside": (STORED2 // 30, "<i2", 1.0, 0.5, 1.0, 0.5),
    "floats from 0 to 1": (STORED2 / 2999.7, "<f4", 1.0, 0.0, None, None),
    "doubles from -1 to 1": (STORED2 / 1500.3 - 1, "<f8", 1.0, 0.0, None, None),
    "large floats": (STORED2 * 1e20 / 3, "<f4", 1.0, 0.0, None, None),
    "tiny floats": (STORED2 * 1e-20 / 3, "<f4", 1.0, 0.0, None, None),
}


@pytest.mark.parametrize("pairing", ["anatomical", "index"])
@pytest.mark.parametrize("what", SCALED)
def test_the_quantisation_depends_on_the_rounding_loss(what: str, pairing: Any, tmp_path: Path) -> None:
    stored, dtype, slope, intercept, scale, offset = SCALED[what]
    stored = stored.astype(dtype)
    t1 = pack_nifti(textured(T2_GRID[1]), T2_GRID[0])  # on the same grid, so that pairs by index can be made of it
    record = cut(
        tmp_path, t1, pack_nifti(stored, T2_GRID[0], slope, intercept), DatasetConfig(pairing=pairing, slices=6)
    )
    assert "reason" not in record
    got = cut_arrays(tmp_path, record, pairing, ("t2",))["t2"]
    assert scale is None or record["t2_scale"] == pytest.approx(scale)
    assert offset is None or record["t2_offset"] == pytest.approx(offset)
    want = stored.astype(float) * np.float32(slope) + intercept
    want = want[4:10, :, ::-1] if pairing == "anatomical" else want[4:10]
    spread = np.subtract(*np.percentile(want, [99.9, 0.1]))
    loss = np.abs(got * record["t2_scale"] + record["t2_offset"] - want).max()
    if slope == 1.75:
        assert loss <= 0.5  # as it always was
    elif stored.dtype.kind == "f" and scale is None:
        assert loss < spread / 100_000
    else:
        assert loss < 1e-6 * spread  # every stored integer can be had back
    assert [record["t2_p_low"], record["t2_p_high"]] == np.percentile(got, [0.1, 99.9]).tolist()


@pytest.mark.parametrize("what", SCALED)
def test_an_interpolated_t1_loses_no_more_than_its_own_rounding_did(what: str, tmp_path: Path) -> None:
    stored, dtype, slope, intercept, _, _ = SCALED[what]
    stored = stored.astype(dtype)
    beside = T2_GRID[0].copy()
    beside[:3, 3] += T2_GRID[0][:3, 0] / 2  # half a voxel to the Left, along i
    record = cut(tmp_path, pack_nifti(stored, beside, slope, intercept), T2)
    assert "reason" not in record
    got = cut_arrays(tmp_path, record, names=("t1",))["t1"] * record["t1_scale"] + record["t1_offset"]
    values = stored.astype(float) * np.float32(slope) + intercept
    want = ((values[:, :, 1:] + values[:, :, :-1]) / 2)[4:10, :, ::-1]
    spread = np.subtract(*np.percentile(want, [99.9, 0.1]))
    own = abs(slope) / 2 if (stored == np.rint(stored)).all() and spread < 1e9 * abs(slope) else spread / 50_000
    loss = np.abs(got[:, :, :-1] - want).max()  # the last column is outside
    assert loss <= max(own, spread / 512 if record["t1_scale"] == 1 else 0) * 1.0001
    outside = 0 if values.min() < spread else want.min()
    np.testing.assert_allclose(got[:, :, -1], outside, atol=max(own, 1e-9 * spread))


flipped = bytearray(T1)
flipped[len(T1) // 2] ^= 0xFF
FAULTS = {
    "truncated": (T1[: len(T1) // 2], T2, "corrupt_voxels", "T1"),
    "flipped byte": (bytes(flipped), T2, "corrupt_voxels", "T1"),
    "both damaged": (bytes(flipped), T2[:-4], "corrupt_voxels", "T1"),
    "CRC cut off": (T1, T2[:-4], "corrupt_voxels", "T2"),
    "bytes behind the voxels": (gzip.compress(gzip.decompress(T1) + bytes(9)), T2, "corrupt_voxels", "T1"),
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
    "T1 is too wide, T2 is empty": (
        packed_as((textured(T1_GRID[1]) / 1500 - 1) * 1.6e308, T1_GRID[0]),
        pack_nifti(np.zeros(T2_GRID[1], "<i2"), T2_GRID[0]),
        "empty_image",
        "T2",
    ),
    "next to nothing in it": (
        T1,
        pack_nifti(replaced(np.zeros(T2_GRID[1], "<i2"), 900), T2_GRID[0]),
        "empty_image",
        "T2",
    ),
    "the same of floats": (T1, packed_as(replaced(np.full(T2_GRID[1], 0.25), 1e5)), "empty_image", "T2"),
    "next to nothing in the T1": (
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
    "elsewhere": (pack_nifti(textured(T1_GRID[1]), rigid((0, 0, 0), (0, 0, 60)) @ T1_GRID[0]), T2, "outside_fov", "T2"),
    "infinite after scaling": (T1, pack_nifti(textured(T2_GRID[1]), T2_GRID[0], slope=3e38), "intensity_range", "T2"),
    "as wide as float64": (T1, packed_as((textured(T2_GRID[1]) / 1500 - 1) * 1.6e308), "intensity_range", "T2"),
    "T1 as wide as float64": (
        packed_as((textured(T1_GRID[1]) / 1500 - 1) * 1.6e308, T1_GRID[0]),
        T2,
        "intensity_range",
        "T1",
    ),
    "header changed since the survey": (gzip.compress(b"<html>" * 99), T2, "unreadable", "T1"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_each_fault_is_a_record_with_its_reason(what: str, tmp_path: Path) -> None:
    t1, t2, reason, modality = FAULTS[what]
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
    got = cut_arrays(tmp_path, cut(tmp_path, *members))
    plain = tmp_path / "plain"
    plain.mkdir()
    want = cut_arrays(plain, cut(plain, T1, T2))
    for name in ("t1", "t2"):
        np.testing.assert_array_equal(got[name], want[name])


def test_an_excluded_subject_is_hashed_but_not_cut(tmp_path: Path) -> None:
    record = cut(tmp_path, T1, b"no volume", cut=False)
    hashes = {f"{m}_{column}" for m in ("t1", "t2") for column in ("sha256", "gzip_crc32")}
    assert set(record) == hashes | {"made_for", "fingerprints", "record_sha256"}
    assert record["t1_gzip_crc32"] == f"crc32:{zlib.crc32(gzip.decompress(T1)):08x}"
    assert record["t2_gzip_crc32"] == ""  # no gzip file has no trailer
    assert not list(tmp_path.glob("*.shard"))


@pytest.fixture(scope="module")
def cut_before(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with the cut pair, and its record; tests only read it."""
    folder = tmp_path_factory.mktemp("before")
    return folder, cut(folder, T1, T2)


@pytest.fixture
def first(cut_before: tuple[Path, dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    """The record of the pair, already cut in `tmp_path`."""
    folder, record = cut_before
    shutil.copytree(folder, tmp_path, ignore=shutil.ignore_patterns("members"), dirs_exist_ok=True)
    (tmp_path / "members").symlink_to(folder / "members")  # which keeps its fingerprint
    return record


def test_a_finished_subject_is_not_cut_again(tmp_path: Path) -> None:
    first = cut(tmp_path, T1, T2)
    shard = shard_path(tmp_path, "IXI002-Guys-0828", "T1")
    before = shard.stat().st_mtime_ns
    assert cut(tmp_path, T1, T2) == json.loads(json.dumps(first))
    assert shard.stat().st_mtime_ns == before


@pytest.mark.parametrize("loss", ["shard gone", "shard cut short", "picture gone"])
def test_a_record_with_missing_files_is_not_reused(loss: str, first: dict[str, Any], tmp_path: Path) -> None:
    shard = shard_path(tmp_path, "IXI002-Guys-0828", "T2")
    whole = shard.read_bytes()
    if loss == "shard cut short":
        shard.write_bytes(whole[:1000])
    else:
        (shard if loss == "shard gone" else tmp_path / "IXI002-Guys-0828.jpg").unlink()
    assert cut(tmp_path, T1, T2) == first
    assert shard.read_bytes() == whole
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
def test_an_edited_record_is_not_reused(change: dict[str, Any], first: dict[str, Any], tmp_path: Path) -> None:
    path = record_path(tmp_path, "IXI002-Guys-0828")
    whole = path.read_text()
    path.write_text(to_json(json.loads(whole) | change))
    assert cut(tmp_path, T1, T2) == first
    assert path.read_text() == whole


@pytest.mark.parametrize(
    "text", ['{"made_for": "half', "[]", "{}", "5", "[" * 200_000, '{"a":' * 900 + "1" + "}" * 900, "1" * 5000]
)
def test_an_invalid_record_is_not_reused(text: str, first: dict[str, Any], tmp_path: Path) -> None:
    record_path(tmp_path, "IXI002-Guys-0828").write_text(text)
    assert cut(tmp_path, T1, T2) == first


# -- memory -----------------------------------------------------------------------------------------------------------


def test_volumes_are_freed_before_their_slabs_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []

    def watched(*arguments: Any) -> dict[str, str]:
        held.append(tracemalloc.get_traced_memory()[0])
        return write_shards(*arguments)

    monkeypatch.setattr("ixi_etl.pairing.cut.write_shards", watched)
    grids = [(grid_affine((80, 80, 60), (1, 1, 1), "RAS"), (60, 80, 80))] * 2
    t1, t2 = (pack_nifti(textured(shape, seed=seed), affine) for seed, (affine, shape) in enumerate(grids))
    cut(tmp_path, t1, t2, CONFIG)  # what is imported where it is used
    record_path(tmp_path, "IXI002-Guys-0828").unlink()
    tracemalloc.start()
    try:
        cut(tmp_path, t1, t2, CONFIG)
    finally:
        tracemalloc.stop()
    assert held[-1] < 2 * 60 * 80 * 80  # bytes of one of them
