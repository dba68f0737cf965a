"""Tests on real scans, if available (`../shared`): an original IXI T1 is paired, and real pairs are similar."""

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
    pytest.mark.standin,
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


@pytest.mark.parametrize(
    ("t1", "t2"),
    [
        *((f"oms_{visit}_T1W", f"oms_{visit}_T2W") for visit in ("p01s1", "p01s2", "p03s2", "p04s1")),
        *((f"omsmni_{subject}_T1", f"omsmni_{subject}_T2") for subject in ("p07", "p19")),
        ("mni2009c_2mm_T1w", "mni2009c_2mm_T2w"),
    ],
)
def test_real_pairs_are_registered_and_not_flagged_as_dissimilar(t1: str, t2: str, tmp_path: Path) -> None:
    paths = {"T1": REAL / "pairs" / f"{t1}.nii.gz", "T2": REAL / "pairs" / f"{t2}.nii.gz"}
    members = {m: MemberRef(str(path), 0, path.stat().st_size) for m, path in paths.items()}
    record = cut_subject(CutJob("IXI001-Guys-1", members, True), DatasetConfig(slices=6), tmp_path)
    assert "reason" not in record
    assert record["flags"] in ("", "registration_no_gain")
    assert record["nmi_after"] > MIN_NMI
