"""An opened version gives pandas, xarray, PyTorch and nibabel the same voxels, under the same names."""

from __future__ import annotations

import gzip
import itertools
import multiprocessing
import pickle
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import config_for

import ixi_etl
from ixi_etl.config import SPLITS
from ixi_etl.core import extras
from ixi_etl.dataset import manifest, metadata
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.dataset.store import open_arrays
from ixi_etl.errors import ConfigError, DatasetError, EmptySplitError, IxiError, MissingExtraError
from ixi_etl.loading.version import DatasetVersion
from ixi_etl.recipes.ixi import refresh
from ixi_etl.scans.tar import index_archive, read_member
from ixi_etl.testing.phantom import pack_nifti, write_tar

MARGIN, SLICES, WITHOUT_PD = 2, 4, "IXI003"


@pytest.fixture(scope="module")
def version(every_split: PublishedVersion) -> DatasetVersion:
    return ixi_etl.open_version(every_split.folder.parents[2])


def repacked(packed: bytes, slope: float) -> bytes:
    image = nib.Nifti1Image.from_bytes(gzip.decompress(packed))
    return bytes(pack_nifti(np.asarray(image.dataobj.get_unscaled()).T, image.affine, slope))


@pytest.fixture(scope="module")
def rich(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> DatasetVersion:
    """A version of three modalities with margin, scales, splits by file, its own normalisation, and a missing scan."""
    folder, root = tmp_path_factory.mktemp("archives"), tmp_path_factory.mktemp("rich")
    (folder / "IXI-T2.tar").symlink_to(archives / "IXI-T2.tar")
    for modality, origin, slope in (("T1", "T1", 0.003), ("PD", "T2", 1.0)):
        path = str(archives / f"IXI-{origin}.tar")
        members = [m for m in index_archive(path) if m.name.endswith(".nii.gz") and m.name.startswith("IXI0")]
        kept = [m for m in members if modality == "T1" or WITHOUT_PD not in m.name]
        packed = {m.name.replace(origin, modality): read_member(path, m.offset, m.size) for m in kept}
        write_tar(folder / f"IXI-{modality}.tar", {name: repacked(data, slope) for name, data in packed.items()})
    config = config_for(
        root,
        folder,
        modalities="T1,T2,PD",
        incomplete="keep",
        margin=MARGIN,
        slices=SLICES,
        split_by="file",
        split=(0.4, 0.3, 0.3),
        normalisation="mean",
        depth="any",
        pictures=False,
    )
    made = refresh(config)
    return ixi_etl.open_version(root, f"ixi-t1-pd-t2@{made.version[:6]}")


@pytest.fixture(params=["version", "rich"])
def any_version(request: pytest.FixtureRequest) -> DatasetVersion:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("how", ["latest", "prefix", "name", "path"])
def test_a_version_opens_by_every_name_that_the_commands_accept(how: str, every_split: PublishedVersion) -> None:
    root, name = every_split.folder.parents[2], every_split.version
    texts = {"latest": "latest", "prefix": name[:7], "name": f"ixi-t1-t2@{name}", "path": str(every_split.folder)}
    opened = ixi_etl.open_version("nowhere" if how == "path" else root, texts[how])
    assert (opened.folder, opened.name) == (every_split.folder, f"ixi-t1-t2@{name}")
    assert opened.metadata == metadata.read_metadata(every_split.folder)
    assert opened.manifest.equals(metadata.read_manifest(every_split.folder))


def test_it_shows_what_it_is(version: DatasetVersion) -> None:
    splits = version.metadata["splits"]
    counts = ", ".join(f"{splits[split]} {split}" for split in ("train", "val", "test"))
    total = f"{sum(splits.values())} of {len(version.manifest)} subjects used"
    assert repr(version) == f"<{version.name}: {total} ({counts}); t1, t2; {version.folder}>"


def test_importing_the_package_stays_cheap() -> None:
    code = "import sys, ixi_etl; print([m for m in ('numpy', 'pandas', 'zarr', 'xarray', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        ixi_etl.nonsense  # noqa: B018
    from ixi_etl import open_version

    assert "open_version" in ixi_etl.__all__
    assert open_version is ixi_etl.open_version


def test_xarray_labels_the_arrays_and_reads_them_when_they_are_used(any_version: DatasetVersion) -> None:
    data = any_version.xarray()
    used, arrays = manifest.used_rows(any_version.manifest), open_arrays(any_version.folder)
    names = [name for name in ("t1", "t2", "pd") if name in arrays]
    assert set(data.data_vars) == {*names, *(f"{name}_affine" for name in names)}
    assert data["subject"].to_numpy().tolist() == used["subject_id"].tolist()
    assert data["split"].to_numpy().tolist() == used["split"].tolist()
    assert data["site"].to_numpy().tolist() == used["site"].tolist()
    assert data["age"].dtype == np.float64
    assert data["sex"].dims == data["age"].dims == ("subject",)
    assert data.attrs.items() >= {("name", any_version.metadata["name"]), ("version", any_version.metadata["version"])}
    for name in names:
        assert data[name].dims == ("subject", "z", "y", "x")
        assert data[name].dtype == np.int16
        assert data[name].chunks[0] == (1,) * len(used)  # dask: nothing is read yet; a shard at a time
        assert data[name].chunks[1] == (arrays[name].shape[1],)
        np.testing.assert_array_equal(data[name], arrays[name])
        np.testing.assert_array_equal(data[f"{name}_affine"], arrays[f"{name}_affine"])
        np.testing.assert_array_equal(data[f"{name}_scale"], arrays[f"{name}_scale"])
        low_high = manifest.intensity_ranges(used, name)
        np.testing.assert_array_equal(np.transpose([data[f"{name}_low"], data[f"{name}_high"]]), low_high)


def test_xarray_converts_to_scanner_units(any_version: DatasetVersion) -> None:
    stored, units = any_version.xarray(), any_version.xarray(scanner_units=True)
    for name in ("t1", "t2"):
        expected = stored[name] * stored[f"{name}_scale"] + stored[f"{name}_offset"]
        assert (units[name].dtype, units[name].attrs["units"]) == (np.float32, "scanner units")
        np.testing.assert_array_equal(units[name], expected.astype(np.float32))
        relative = (stored[name] - stored[f"{name}_low"]) / (stored[f"{name}_high"] - stored[f"{name}_low"])
        again = (units[name] - units[f"{name}_low"]) / (units[f"{name}_high"] - units[f"{name}_low"])
        np.testing.assert_allclose(again, relative, atol=1e-5)
        assert not {f"{name}_scale", f"{name}_offset"} & set(units.coords)
    assert "scale" in stored["t1_scale"].attrs["long_name"]


def test_xarray_gives_the_split_of_each_slice_of_a_version_split_by_file(rich: DatasetVersion) -> None:
    data, used = rich.xarray(), manifest.used_rows(rich.manifest)
    assert data["slice_split"].dims == ("subject", "z")
    assert (data["t1_scale"] != 1).all()
    inside = data["slice_split"].isel(z=slice(MARGIN, MARGIN + SLICES)).to_numpy()
    assert [",".join(row) for row in inside] == used["slice_splits"].tolist()
    assert set(data["slice_split"].isel(z=[0, 1, -2, -1]).to_numpy().ravel()) == {""}
    assert np.isnan(data["pd_affine"].sel(subject=[s for s in data["subject"].values if WITHOUT_PD in s])).all()


DIRECTIONS = {"version": [None, "t2->t1"], "rich": [None, "t1+pd->t2", "pd->t1"]}


@pytest.mark.parametrize(("fixture", "direction"), [(name, d) for name, ds in DIRECTIONS.items() for d in ds])
def test_torch_gives_the_pairs_of_the_training_bit_for_bit(
    fixture: str, direction: str | None, torch: Any, request: pytest.FixtureRequest
) -> None:
    from model.data import load_pairs

    version = request.getfixturevalue(fixture)
    for split in SPLITS:
        pairs, items = load_pairs(version.folder, split, direction), version.torch(split, direction=direction)
        assert isinstance(items, torch.utils.data.Dataset)
        assert len(items) == len(pairs)
        sources, targets = pairs.normalised(torch.arange(len(pairs)))
        for n, item in enumerate(items):
            assert torch.equal(torch.cat([item[name] for name in pairs.direction.sources]), sources[n])
            assert torch.equal(item[pairs.direction.target], targets[n])
            assert item["subject_id"] == pairs.subjects[int(pairs.subject[n])]
            assert item["slice"] == int(pairs.position[n]) + pairs.margin
            assert set(item) == {*pairs.direction.sources, pairs.direction.target, "subject_id", "slice"}


def test_torch_applies_the_transform_to_each_item(version: DatasetVersion, torch: Any) -> None:
    plain, changed = version.torch("train"), version.torch("train", lambda item: (item["t1"] * 0, item["slice"]))
    assert len(changed) == len(plain)
    zero, z = changed[3]
    assert zero.shape == plain[3]["t1"].shape
    assert float(zero.abs().max()) == 0
    assert z == plain[3]["slice"] == 3
    assert torch.equal(plain[-1]["t2"], plain[len(plain) - 1]["t2"])
    with pytest.raises(IndexError):
        plain[len(plain)]


def test_workers_forked_after_a_read_give_the_same_items(version: DatasetVersion, torch: Any) -> None:
    items = version.torch("val")
    first = items[0]
    loader = torch.utils.data.DataLoader(
        items, batch_size=4, num_workers=2, multiprocessing_context="fork", timeout=120
    )
    batches = list(loader)
    assert torch.equal(batches[0]["t1"][0], first["t1"])
    assert torch.equal(torch.cat([batch["t2"] for batch in batches]), torch.stack([item["t2"] for item in items]))
    assert [s for batch in batches for s in batch["subject_id"]] == [item["subject_id"] for item in items]


def test_a_data_set_is_pickled_without_voxels(version: DatasetVersion, torch: Any) -> None:
    items = version.torch("train")
    before = items[1]
    packed = pickle.dumps(items)
    assert len(packed) < 10_000
    again = pickle.loads(packed)
    assert repr(again) == repr(items) == f"<train of {version.name}: {len(items)} slices of t1, t2>"
    assert all(torch.equal(a["t1"], b["t1"]) for a, b in zip(again, items, strict=True))
    assert torch.equal(again[1]["t1"], before["t1"])


@pytest.mark.stack  # seconds: each new process imports torch
@pytest.mark.parametrize("method", [m for m in multiprocessing.get_all_start_methods() if m != "fork"])
def test_workers_of_other_start_methods_give_the_same_items(method: str, version: DatasetVersion, torch: Any) -> None:
    items = version.torch("val")
    loader = torch.utils.data.DataLoader(items, batch_size=4, num_workers=1, multiprocessing_context=method)
    assert torch.equal(torch.cat([batch["t2"] for batch in loader]), torch.stack([item["t2"] for item in items]))


def test_nifti_gives_the_slab_with_its_affine_in_scanner_units(any_version: DatasetVersion, tmp_path: Path) -> None:
    arrays, data = open_arrays(any_version.folder), any_version.xarray(scanner_units=True)
    for row, subject in itertools.islice(enumerate(data["subject"].to_numpy()), 2):
        for modality in ("T1", "t2"):
            name = modality.lower()
            image = any_version.nifti(subject, modality)
            is_plain = float(arrays[f"{name}_scale"][row]) == 1
            assert image.get_data_dtype() == (np.int16 if is_plain else np.float32)
            assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
            assert image.header.get_xyzt_units()[0] == "mm"
            assert any_version.name in image.header["descrip"].item().decode()
            np.testing.assert_array_equal(image.affine, arrays[f"{name}_affine"][row])
            image.to_filename(tmp_path / "slab.nii.gz")
            written = nib.load(tmp_path / "slab.nii.gz")
            np.testing.assert_allclose(written.affine, image.affine, atol=1e-5)
            np.testing.assert_array_equal(np.asarray(written.dataobj).transpose(2, 1, 0), data[name][row])


def test_every_way_of_reading_gives_the_same_voxel(any_version: DatasetVersion, torch: Any) -> None:
    data, items = any_version.xarray(), any_version.torch("train")
    item = items[len(items) // 2]
    subject, z = item["subject_id"], item["slice"]
    one = data.sel(subject=subject).isel(z=z)
    low, high = float(one["t2_low"]), float(one["t2_high"])
    normalised = ((one["t2"].to_numpy() - low) / (high - low)).clip(0, 1) * 2 - 1
    np.testing.assert_allclose(item["t2"][0], normalised, atol=1e-5)
    in_units = one["t2"] * one["t2_scale"] + one["t2_offset"]
    image = any_version.nifti(subject, "T2")
    np.testing.assert_allclose(image.get_fdata()[:, :, z].T, in_units, rtol=1e-6)
    assert data["split"].sel(subject=subject) in ("train", "mixed")


def excluded(version: DatasetVersion) -> Any:
    return version.manifest[version.manifest["status"] == "excluded"].iloc[0]


def test_an_unknown_split_names_those_that_exist(version: DatasetVersion) -> None:
    with pytest.raises(ConfigError, match=r"@\w+ has no split holdout; its splits, with subjects: train \d+ \(\d+ sl"):
        version.torch("holdout")


def test_an_empty_split_names_those_that_are_not(published: PublishedVersion, tmp_path: Path, archives: Path) -> None:
    made = refresh(config_for(tmp_path, archives, split_by="order", split_counts=(2, 1, 0), pictures=False))
    message = r"split test of .* has no subject with t1, t2; subjects: train 2 \(24 slices\), val 1 .*, test 0 \(0 slic"
    with pytest.raises(EmptySplitError, match=message):
        ixi_etl.open_version(tmp_path, made.version).torch("test")


def test_an_excluded_subject_is_refused_with_its_reason(version: DatasetVersion) -> None:
    row = excluded(version)
    with pytest.raises(ConfigError) as caught:
        version.nifti(row["subject_id"], "T1")
    expected = f"{row['subject_id']} was excluded from {version.name}: {row['reason']} ({row['detail']})"
    assert str(caught.value) == expected


def test_unknown_subjects_modalities_and_directions_are_one_line_errors(
    version: DatasetVersion, rich: DatasetVersion
) -> None:
    subject = manifest.used_rows(version.manifest)["subject_id"].iloc[0]
    lacking = next(s for s in rich.manifest["subject_id"] if WITHOUT_PD in s)
    calls = {
        f"has no subject {subject[:-1]}Z; did you mean {subject}": lambda: version.nifti(subject[:-1] + "Z", "T1"),
        "has no subject ?; the column subject_id of its manifest has all": lambda: version.nifti("?", "T1"),
        f"{version.name} has no FLAIR; its arrays are t1, t2": lambda: version.nifti(subject, "FLAIR"),
        f"{lacking} has no PD in {rich.name}, but t1, t2": lambda: rich.nifti(lacking, "PD"),
        "direction 't1->pd' names pd": lambda: version.torch("train", direction="t1->pd"),
        "there is no version ffff": lambda: ixi_etl.open_version(version.folder.parents[2], "ffff"),
    }
    for message, call in calls.items():
        with pytest.raises(IxiError) as caught:
            call()
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("module", "extra"), [("xarray", "xarray"), ("torch", "train")])
def test_a_missing_library_is_one_line_that_names_the_extra(
    module: str, extra: str, version: DatasetVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_spec(name: str) -> ModuleSpec | None:
        return None if name in (module, "matplotlib") else ModuleSpec(name, None)

    monkeypatch.setattr(extras, "find_spec", find_spec)
    with pytest.raises(MissingExtraError, match=rf'installed \({module}\); run: pip install "ixi-etl\[{extra}\]"'):
        version.xarray() if module == "xarray" else version.torch("train")


def test_damage_is_named_when_it_is_met(refreshed: PublishedVersion, torch: Any) -> None:
    version = ixi_etl.open_version("nowhere", str(refreshed.folder))
    row = manifest.used_rows(version.manifest).iloc[0]
    shard = refreshed.folder / f"slices.zarr/t1/c/{row['store_row']}/0/0/0"
    intact = shard.read_bytes()
    shard.write_bytes(bytes(byte ^ 255 for byte in intact))
    for call in (lambda: version.nifti(row["subject_id"], "T1"), lambda: version.torch(row["split"])[0]):
        with pytest.raises(DatasetError, match=rf"cannot read .* of {row['subject_id']} .*verify --deep") as caught:
            call()
        assert "\n" not in str(caught.value)
    shard.unlink()
    with pytest.raises(DatasetError, match=f"{shard} is missing; `ixi-etl refresh.*` makes the version again"):
        ixi_etl.open_version("nowhere", str(refreshed.folder))
