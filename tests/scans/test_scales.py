"""Slabs with a scale give readers of the store the same images as scans in other units."""

from __future__ import annotations

import gzip
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from conftest import config_for

from ixi_etl.core.files import to_json
from ixi_etl.dataset import manifest, metadata, publish, verify
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.dataset.store import STORE, open_arrays
from ixi_etl.recipes.ixi import refresh
from ixi_etl.report import dataset_report
from ixi_etl.testing.phantom import write_tar

UNIT = np.float32(2.0**-10)  # the unit of the rescaled archives, in units of the original ones


@pytest.fixture(scope="module")
def rescaled(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> PublishedVersion:
    """The version of the same archives in units so large that rounding to whole units would lose the image."""
    source = tmp_path_factory.mktemp("rescaled")
    for modality in ("T1", "T2"):
        with tarfile.open(archives / f"IXI-{modality}.tar") as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
        for name, packed in members.items():
            try:
                raw = bytearray(gzip.decompress(packed))
            except (OSError, EOFError):
                continue
            if len(raw) > 352:
                slope = np.frombuffer(raw[112:116], "<f4")[0]
                raw[112:116] = np.array((slope or 1) * UNIT, "<f4").tobytes()
                members[name] = gzip.compress(bytes(raw), 1, mtime=0)
        write_tar(source / f"IXI-{modality}.tar", members)
    return refresh(config_for(tmp_path_factory.mktemp("root"), source))


def test_rescaled_archives_give_the_same_subjects_and_verify(
    rescaled: PublishedVersion, published: PublishedVersion
) -> None:
    small, original = (manifest.used_rows(metadata.read_manifest(v.folder)) for v in (rescaled, published))
    assert small["subject_id"].tolist() == original["subject_id"].tolist()
    assert (small[["t1_scale", "t2_scale"]] < 0.01).all(axis=None)
    assert (original[["t1_scale", "t2_scale", "t1_offset", "t2_offset"]] == [1, 1, 0, 0]).all(axis=None)
    np.testing.assert_allclose(small["nmi_after"], original["nmi_after"], atol=0.01)
    for version in (rescaled, published):
        assert verify.verify(version.folder, deep=True) == []


def test_xarray_values_convert_to_scanner_units(rescaled: PublishedVersion, published: PublishedVersion) -> None:
    small, original = (xr.open_zarr(version.folder / STORE) for version in (rescaled, published))
    for name in ("t1", "t2"):
        units = small[name] * small[f"{name}_scale"] + small[f"{name}_offset"]
        assert units.dims == small[name].dims
        # Each may differ by half a rounding step; slopes are up to 2.4.
        assert float(abs(units / float(UNIT) - original[name]).max()) <= 2


def test_training_sees_the_same_slices_and_planes_are_in_scanner_units(
    torch: Any, rescaled: PublishedVersion, published: PublishedVersion
) -> None:
    from model import data, planes

    pairs = [data.load_pairs(version.folder, "train") for version in (rescaled, published)]
    for small, original in zip(*(split.normalised(torch.arange(len(split))) for split in pairs), strict=True):
        assert float((small - original).abs().max()) < 0.02
    small, original = (planes.summarise(v.folder, split) for v, split in zip((rescaled, published), pairs, strict=True))
    assert small is not None
    assert original is not None
    assert np.array(small.target_low_high) / UNIT == pytest.approx(original.target_low_high, abs=2)


def test_the_report_is_in_scanner_units(rescaled: PublishedVersion) -> None:
    used = manifest.used_rows(metadata.read_manifest(rescaled.folder))
    high = used["t2_p_high"] * used["t2_scale"] + used["t2_offset"]
    assert high.max() < 10
    page = dataset_report.dataset_report(
        metadata.read_metadata(rescaled.folder), metadata.read_manifest(rescaled.folder), {}
    )
    row = page[page.index("T2, percentile 99.9</t") :][:300]
    assert f"{high.quantile(0.5):.3g}" in row


def test_a_scale_that_differs_from_the_manifest_is_detected(rescaled: PublishedVersion, tmp_path: Path) -> None:
    folder = tmp_path / rescaled.folder.name
    shutil.copytree(rescaled.folder, folder)
    zarr.open_array(str(folder / STORE / "t2_scale"), mode="r+")[0] = 7.0
    # As if the list of files had been updated too.
    record = metadata.read_metadata(folder) | {"files": publish.list_files(folder)}
    (folder / metadata.METADATA).write_text(to_json(metadata.with_digest(record)))
    assert any("array t2_scale differs from the manifest's column" in problem for problem in verify.verify(folder))
    assert float(open_arrays(folder)["t2_scale"][0]) == 7.0
