"""The store is plain Zarr v3 that other libraries can open, and its bytes depend on the voxels alone."""

from __future__ import annotations

import multiprocessing
import warnings
from pathlib import Path

import numpy as np
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from profiles import examples

from ixi_etl.core.files import sha256_file
from ixi_etl.dataset import manifest
from ixi_etl.dataset.metadata import read_manifest
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.dataset.store import STORE, assemble, open_arrays, write_shards

slab_shapes = st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 40))


@settings(max_examples=examples(12))
@given(st.data(), slab_shapes, st.integers(1, 4))
def test_arrays_read_back_as_written(
    tmp_path_factory: object, data: st.DataObject, shape: tuple[int, ...], n: int
) -> None:
    folder: Path = tmp_path_factory.mktemp("s")  # type: ignore[attr-defined]
    values = st.integers(-32768, 32767)
    slabs = [data.draw(arrays(np.int16, shape, elements=values).filter(np.any)) for _ in range(n)]
    affine = np.arange(16.0).reshape(4, 4)
    write_shards({folder / f"{row}.shard": slab for row, slab in enumerate(slabs)})
    shards = [{"t1": folder / f"{row}.shard"} for row in range(n)]
    assemble(folder / STORE, ["t1"], shards, [{"t1": affine * row} for row in range(n)], shape, "anatomical", {"a": 1})
    fast = open_arrays(folder)
    plain = zarr.open_group(folder / STORE, mode="r")
    for store in (fast, plain):
        np.testing.assert_array_equal(store["t1"][:], np.stack(slabs))
        np.testing.assert_array_equal(store["t1_affine"][:], np.stack([affine * row for row in range(n)]))


def test_equal_slabs_give_equal_bytes_and_no_leftovers(tmp_path: Path) -> None:
    slab = np.random.default_rng(0).integers(-999, 999, (20, 256, 256)).astype(np.int16)
    digests = {}
    for paths in ("0", "12", "345"):  # independent of the slabs written with it
        digests |= write_shards({tmp_path / f"{n}.shard": slab for n in paths})
    assert digests == {f"{n}.shard": sha256_file(tmp_path / f"{n}.shard") for n in range(6)}
    assert len({(tmp_path / f"{n}.shard").read_bytes() for n in range(6)}) == 1
    assert len(list(tmp_path.iterdir())) == 6


def test_xarray_opens_the_store_with_named_dimensions_and_no_warning(published: PublishedVersion) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = xr.open_zarr(published.folder / STORE)
    assert data["t1"].dims == data["t2"].dims == ("subject", "z", "y", "x")
    assert data["t1"].shape == (6, 12, 64, 64)
    assert data["t1_affine"].dims == ("subject", "world", "voxel")
    table = manifest.used_rows(read_manifest(published.folder))
    assert data.attrs["subject_id"] == table["subject_id"].tolist()
    assert "simulated" in data.attrs["credit"]
    assert data["subject"].to_numpy().tolist() == table["subject_id"].tolist()
    subject = table["subject_id"].iloc[2]
    np.testing.assert_array_equal(data["t1"].sel(subject=subject), data["t1"][2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = zarr.open_group(published.folder / STORE, mode="r")
        assert plain["subject"][:].tolist() == table["subject_id"].tolist()
    np.testing.assert_array_equal(data["t2"][2].values, open_arrays(published.folder)["t2"][2])


def test_a_chunk_is_a_slice_and_a_shard_is_a_subject_with_checksums(published: PublishedVersion) -> None:
    array = zarr.open_group(published.folder / STORE, mode="r")["t1"]
    assert isinstance(array, zarr.Array)
    assert (array.chunks, array.shards) == ((1, 1, 64, 64), (1, 12, 64, 64))
    assert array.dtype == np.int16
    assert "crc32c" in str(array.metadata.to_dict()["codecs"])


def slab_sum(folder: Path) -> int:
    return int(np.asarray(open_arrays(folder)["t1"][0]).sum())


def test_a_process_forked_after_a_read_can_read(published: PublishedVersion) -> None:
    """zarrs decodes several chunks on threads that a forked process lacks: it would wait for them for ever."""
    expected = slab_sum(published.folder)
    pool = multiprocessing.get_context("fork").Pool(1)
    try:
        assert pool.apply_async(slab_sum, [published.folder]).get(timeout=60) == expected
    finally:
        pool.terminate()
