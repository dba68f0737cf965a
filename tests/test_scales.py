"""Slabs with a scale of their own: whoever reads the store gets what they would of the same scans in other units."""

from __future__ import annotations

import gzip
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from conftest import config_for

from ixi_etl import dataset, manifest, publish, report
from ixi_etl.files import to_json
from ixi_etl.phantom import write_tar
from ixi_etl.publish import Refreshed
from ixi_etl.refresh import refresh
from ixi_etl.store import STORE, open_arrays

UNIT = np.float32(2.0**-10)  # of the new scanner, in units of the old one


@pytest.fixture(scope="module")
def rescaled(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Refreshed:
    """The version of the same archives in other units, so small that whole ones would lose the picture."""
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


def test_the_same_subjects_are_used_and_verify(rescaled: Refreshed, published: Refreshed) -> None:
    here, there = (manifest.used(dataset.read_manifest(v.folder)) for v in (rescaled, published))
    assert here["subject_id"].tolist() == there["subject_id"].tolist()
    assert (here[["t1_scale", "t2_scale"]] < 0.01).all(axis=None)
    assert (there[["t1_scale", "t2_scale", "t1_offset", "t2_offset"]] == [1, 1, 0, 0]).all(axis=None)
    np.testing.assert_allclose(here["nmi_after"], there["nmi_after"], atol=0.01)
    for version in (rescaled, published):
        assert dataset.verify(version.folder, deep=True) == []


def test_xarray_gives_the_scanner_s_units(rescaled: Refreshed, published: Refreshed) -> None:
    here, there = (xr.open_zarr(version.folder / STORE) for version in (rescaled, published))
    for name in ("t1", "t2"):
        units = here[name] * here[f"{name}_scale"] + here[f"{name}_offset"]
        assert units.dims == here[name].dims
        assert float(abs(units / float(UNIT) - there[name]).max()) <= 2  # half a step of each, whose slope is up to 2.4


def test_training_sees_the_same_pictures_and_its_planes_are_in_units(rescaled: Refreshed, published: Refreshed) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from model import data, planes

    pairs = [data.load(version.folder, "train") for version in (rescaled, published)]
    for here, there in zip(*(of.normalised(torch.arange(len(of))) for of in pairs), strict=True):
        assert float((here - there).abs().max()) < 0.02
    here, there = (planes.describe(v.folder, of) for v, of in zip((rescaled, published), pairs, strict=True))
    assert here is not None
    assert there is not None
    assert np.array(here.target_low_high) / UNIT == pytest.approx(there.target_low_high, abs=2)


def test_the_report_is_in_units(rescaled: Refreshed) -> None:
    used = manifest.used(dataset.read_manifest(rescaled.folder))
    high = used["t2_p_high"] * used["t2_scale"] + used["t2_offset"]
    assert high.max() < 10
    page = report.dataset_report(dataset.read_facts(rescaled.folder), dataset.read_manifest(rescaled.folder), {})
    row = page[page.index("T2, percentile 99.9</t") :][:300]
    assert f"{high.quantile(0.5):.3g}" in row


def test_a_scale_that_is_not_the_manifest_s_is_found(rescaled: Refreshed, tmp_path: Path) -> None:
    folder = tmp_path / rescaled.folder.name
    shutil.copytree(rescaled.folder, folder)
    zarr.open_array(str(folder / STORE / "t2_scale"), mode="r+")[0] = 7.0
    facts = dataset.read_facts(folder) | {"files": publish.list_files(folder)}  # whoever did it also mended the list
    (folder / dataset.FACTS).write_text(to_json(dataset.with_digest(facts)))
    assert any("array t2_scale is not the manifest's column" in problem for problem in dataset.verify(folder))
    assert float(open_arrays(folder)["t2_scale"][0]) == 7.0
