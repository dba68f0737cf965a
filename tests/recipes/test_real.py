"""Tests on real scans, if available (`../shared`): an original IXI T1 is paired, and real pairs are registered."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import map_coordinates
from strategies import world_of

from ixi_etl.config import MIN_NMI, DatasetConfig, RefreshConfig
from ixi_etl.dataset import manifest, metadata, verify
from ixi_etl.dataset.store import open_arrays
from ixi_etl.pairing.cut import CutJob, MemberRef, cut_subject
from ixi_etl.recipes.ixi import refresh
from ixi_etl.testing.phantom import pack_nifti, rigid, write_tar

REAL = Path(__file__).resolve().parents[3] / "shared" / "real"
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not REAL.is_dir(),
        reason="needs real scans, which cannot be in the repository; test_cut checks the same with small volumes",
    ),
]
SUBJECT = "IXI533-Guys-1066"
MOTION = rigid((1.5, -1, 2), (1.5, -2, 1))  # of the head between the scans: maps the T2's world to the T1's


def t2_grid() -> np.ndarray:
    """The affine of an IXI-like T2 of 256 x 256 x 130, centred on the T1: LAS, oblique by 6 degrees."""
    real = nib.load(REAL / "ixi" / "IXI002_T2_facemask_resampled.nii.gz")
    assert (real.shape, nib.aff2axcodes(real.affine)) == ((256, 256, 130), ("L", "A", "S"))
    affine = np.array(real.affine)
    t1 = nib.load(REAL / "ixi" / f"{SUBJECT}-T1.nii.gz")
    middle = [(n - 1) / 2 for n in t1.shape]
    affine[:3, 3] += t1.affine[:3] @ [*middle, 1] - affine[:3] @ [127.5, 127.5, 64.5, 1]
    return affine


def test_an_original_ixi_t1_with_111_grey_levels_is_used(tmp_path: Path) -> None:
    packed = (REAL / "ixi" / f"{SUBJECT}-T1.nii.gz").read_bytes()
    image = nib.Nifti1Image.from_bytes(gzip.decompress(packed))
    voxels = np.asarray(image.dataobj).astype(float)
    assert len(np.unique(voxels)) == 111
    grid = t2_grid()
    points = world_of(np.linalg.inv(image.affine) @ MOTION @ grid, (130, 256, 256))
    head = map_coordinates(voxels, np.moveaxis(points, -1, 0), order=1)
    contrast = np.where(head < 6, head, np.clip(75 - 0.7 * head, 0, None)) * 9  # dark where the T1 is bright, air black
    source = tmp_path / "source"
    source.mkdir()
    write_tar(source / "IXI-T1.tar", {f"{SUBJECT}-T1.nii.gz": packed})
    write_tar(source / "IXI-T2.tar", {f"{SUBJECT}-T2.nii.gz": pack_nifti(contrast.round().astype("<i2"), grid)})
    done = refresh(RefreshConfig(root=str(tmp_path / "root"), source=str(source)))
    (row,) = manifest.to_records(manifest.used_rows(metadata.read_manifest(done.folder)))
    assert (row["t1_scale"], row["t1_offset"], row["t2_scale"]) == (1, 0, 1)
    assert row["flags"] == ""
    assert verify.verify(done.folder, deep=True) == []
    arrays = open_arrays(done.folder)
    slab = np.asarray(arrays["t1"][0])
    found, affine = np.array(json.loads(row["t2_to_t1_ras_mm"])), np.asarray(arrays["t1_affine"][0])
    head_points = world_of(affine, slab.shape)[slab > 10]
    assert np.linalg.norm(head_points @ (found - MOTION)[:3, :3].T + (found - MOTION)[:3, 3], axis=1).mean() < 0.3
    points = world_of(np.linalg.inv(image.affine) @ found @ affine, slab.shape)
    want = map_coordinates(voxels, np.moveaxis(points, -1, 0), order=1)
    assert np.abs(slab - want).max() <= 0.51  # half a unit, from rounding as the scanner does
    with Image.open(done.folder / metadata.PICTURES / f"{SUBJECT}.jpg") as picture:
        assert picture.size == (3 * 256, 256)


PAIRS = {  # by IXI-like name: p01s1 and p01s2 are two sessions of one person
    "IXI001-OMS-0001": ("oms_p01s1_T1W", "oms_p01s1_T2W"),
    "IXI001-OMS-0002": ("oms_p01s2_T1W", "oms_p01s2_T2W"),
    "IXI003-OMS-0003": ("oms_p03s2_T1W", "oms_p03s2_T2W"),
    "IXI004-OMS-0004": ("oms_p04s1_T1W", "oms_p04s1_T2W"),
    "IXI007-OMSMNI-0005": ("omsmni_p07_T1", "omsmni_p07_T2"),
    "IXI019-OMSMNI-0006": ("omsmni_p19_T1", "omsmni_p19_T2"),
    "IXI020-MNI-0007": ("mni2009c_2mm_T1w", "mni2009c_2mm_T2w"),
}


def read_pair(name: str) -> bytes:
    return (REAL / "pairs" / f"{name}.nii.gz").read_bytes()


def test_a_refresh_of_real_pairs_accounts_for_every_subject(tmp_path: Path) -> None:
    """The T2s have four grids; three sessions share the most common one. The T1s of IXI have no T2 here."""
    members = {
        m: {f"{subject}-{m}.nii.gz": read_pair(names[i]) for subject, names in PAIRS.items()}
        for i, m in enumerate(("T1", "T2"))
    }
    for path in (REAL / "ixi").glob("*-T1*.nii.gz"):
        members["T1"][path.name.removeprefix("ccl_").replace("_ds", "")] = path.read_bytes()
    source = tmp_path / "source"
    source.mkdir()
    for modality, named in members.items():
        write_tar(source / f"IXI-{modality}.tar", named)
    dataset = DatasetConfig(depth="any", slices=6)
    done = refresh(RefreshConfig(root=str(tmp_path / "root"), source=str(source), dataset=dataset))
    table = metadata.read_manifest(done.folder).set_index("subject_id")
    assert table["reason"].value_counts().to_dict() == {"missing_t2": 6, "grid_not_modal": 4, "": 3}
    used = table[table["status"] == "used"]
    assert list(used.index) == ["IXI001-OMS-0002", "IXI003-OMS-0003", "IXI004-OMS-0004"]
    assert (used["registration_error_mm"] < 0.6).all()
    assert (used["flags"] == "").all()
    assert used["motion_mm"].round(1).tolist() == [1.1, 5.5, 0.5]  # as ANTs finds
    assert verify.verify(done.folder, deep=True) == []


@pytest.mark.parametrize(("t1", "t2"), PAIRS.values(), ids=PAIRS)
def test_real_pairs_are_registered_without_a_flag(t1: str, t2: str, tmp_path: Path) -> None:
    paths = {"T1": REAL / "pairs" / f"{t1}.nii.gz", "T2": REAL / "pairs" / f"{t2}.nii.gz"}
    members = {m: MemberRef(str(path), 0, path.stat().st_size) for m, path in paths.items()}
    record = cut_subject(CutJob("IXI001-Guys-1", members, True), DatasetConfig(slices=6), tmp_path)
    assert "reason" not in record
    assert record["flags"] in ("", "registration_no_gain")
    assert record["nmi_after"] > MIN_NMI
    assert record["registration_error_mm"] < 0.6


@pytest.mark.parametrize("swapped", [0, 1])
def test_a_real_pair_whose_left_and_right_are_exchanged_is_excluded(swapped: int, tmp_path: Path) -> None:
    members = {}
    for number, name in enumerate(PAIRS["IXI004-OMS-0004"]):
        image = nib.load(REAL / "pairs" / f"{name}.nii.gz")
        affine = np.diag([-1.0, 1, 1, 1]) @ image.affine if number == swapped else image.affine
        path = tmp_path / f"{name}.nii.gz"
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), path)
        members[("T1", "T2")[number]] = MemberRef(str(path), 0, path.stat().st_size)
    record = cut_subject(CutJob("IXI004-OMS-0004", members, True), DatasetConfig(slices=6), tmp_path)
    assert record["reason"] == "bad_affine"
    assert "exchanges left and right" in record["detail"]
