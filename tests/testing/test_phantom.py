"""Simulated archives: T1 and T2 never change; PD has the T2's grid; MRA covers a part of the head; motions are true."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from flows.cli.app import main
from ixi_etl.modalities import MODALITIES
from ixi_etl.pairing.geometry import Matrix, trilinear
from ixi_etl.scans.intensity import otsu_threshold
from ixi_etl.scans.nifti import Header, read_volume
from ixi_etl.testing import phantom

SHRINK = 8
WINDOW_MM = 12.5  # half of 20 slices of 1.25 mm


PINNED = {  # affine's row of z, slope, sum of the stored voxels
    ("T1", "IXI003-Guys-0811"): [0.750235, 7.460824, -0.195215, -125.514481, 1.0, 2772765.0],
    ("T2", "IXI003-Guys-0811"): [-0.049375, -0.008733, 9.999777, -79.097527, 1.7879704236984253, 4064156.0],
}


class Scan:
    """One simulated scan: its header, and its voxels [k, j, i] in scanner units."""

    def __init__(self, packed: bytes) -> None:
        self.header: Header
        self.header, self.stored = read_volume(packed)
        self.voxels = self.header.scaled(self.stored).astype(np.float32)
        assert self.header.affine is not None
        self.affine: Matrix = self.header.affine


def members(folder: Path, modality: str) -> dict[str, bytes]:
    """Name without modality -> bytes."""
    with tarfile.open(folder / f"IXI-{modality}.tar") as tar:
        return {name.rsplit("-", 1)[0]: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom")
    phantom.write_phantom(folder, subjects=3, seed=3, shrink=SHRINK, modalities=MODALITIES)
    return folder


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("default")
    phantom.write_phantom(folder, subjects=3, seed=3, shrink=SHRINK)
    return folder


@pytest.fixture(scope="module")
def truth(folder: Path) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = json.loads((folder / "truth.json").read_text())
    return found


def test_default_archives_are_those_of_earlier_releases(default: Path) -> None:
    """Pinned figures depend on each random number. Hashes would depend on the CPU and on the version of zlib."""
    assert sorted(path.name for path in default.iterdir()) == ["IXI-T1.tar", "IXI-T2.tar", "MD5SUMS", "truth.json"]
    assert set(json.loads((default / "truth.json").read_text())["IXI002-HH-0774"]) == {"motion_mm_ras"}
    found = {}
    for modality in ("T1", "T2"):
        for subject, packed in members(default, modality).items():
            if (modality, subject) in PINNED:
                scan = Scan(packed)
                found[modality, subject] = [*scan.affine[2], scan.header.slope, float(scan.stored.sum())]
    assert set(found) == set(PINNED)
    for key, figures in found.items():
        np.testing.assert_allclose(figures, PINNED[key], rtol=2e-6, atol=1e-6, err_msg=str(key))


def test_t1_and_t2_do_not_depend_on_the_other_modalities(default: Path, folder: Path) -> None:
    for modality in ("T1", "T2"):
        more = members(folder, modality)
        assert {name: more[name] for name in members(default, modality)} == members(default, modality)


def test_pd_has_the_grid_and_the_place_of_the_t2(folder: Path) -> None:
    t2, pd = members(folder, "T2"), members(folder, "PD")
    for subject in ("IXI002-HH-0774", "IXI005-IOP-0885", "IXI006-HH-0922"):
        one, other = Scan(t2[subject]), Scan(pd[subject])
        assert one.stored.shape == other.stored.shape
        np.testing.assert_array_equal(one.affine, other.affine)
        head = one.voxels > otsu_threshold(one.voxels)
        assert 0.3 < np.corrcoef(one.voxels[head], other.voxels[head])[0, 1] < 0.98  # a contrast of its own
        both = head & (other.voxels > otsu_threshold(other.voxels))
        assert both.sum() > 0.9 * head.sum()


def outside_mra(t2: Scan, mra: Scan, motion: Matrix) -> float:
    """The share of the T2's foreground in the middle slices that is outside the MRA's grid."""
    foreground = np.argwhere(t2.voxels > otsu_threshold(t2.voxels))[:, ::-1]
    middle = (t2.stored.shape[0] - 1) / 2
    foreground = foreground[np.abs(foreground[:, 2] - middle) * t2.header.spacing_mm[2] <= WINDOW_MM]
    matrix = np.linalg.inv(mra.affine) @ motion @ t2.affine
    voxels = foreground @ matrix[:3, :3].T + matrix[:3, 3]
    inside = (voxels >= -0.5) & (voxels <= np.array(mra.stored.shape[::-1]) - 0.5)
    return 1 - float(inside.all(axis=1).mean())


def test_the_mra_covers_the_middle_slices_of_most_subjects(folder: Path, truth: dict[str, dict[str, object]]) -> None:
    t2, mra = members(folder, "T2"), members(folder, "MRA")
    outside = {}
    for subject in set(truth) & set(mra) - {"IXI007-HH-0959"}:  # its T2 has a few thick slices
        scan = Scan(mra[subject])
        assert scan.stored.shape == (13, 64, 64)
        assert scan.header.orientation == "LAS"
        assert 13 * scan.header.spacing_mm[2] < 0.55 * 163  # a part of the T2's extent
        motion = np.array(truth[subject]["motions_mm_ras"]["MRA"])  # type: ignore[index]
        outside[subject] = outside_mra(Scan(t2[subject]), scan, motion)
    assert len(outside) == 7
    assert [subject for subject, share in outside.items() if share > 0.05] == ["IXI010-HH-1070"]
    assert outside["IXI010-HH-1070"] > 0.3


def test_arteries_are_bright_in_the_mra_and_tissue_is_dark(folder: Path) -> None:
    """At full resolution, arteries would be far brighter still."""
    voxels = Scan(members(folder, "MRA")["IXI002-HH-0774"]).voxels
    tissue = np.median(voxels[voxels > otsu_threshold(voxels)])
    bright = (voxels > 1.5 * tissue).mean()
    assert 0.0002 < bright < 0.02


def test_true_motions_align_the_scans(folder: Path, truth: dict[str, dict[str, object]]) -> None:
    """Moved by the true motion, T2 and MRA agree better than after a further displacement."""
    for scans in truth.values():
        motions = {m: np.array(matrix) for m, matrix in scans["motions_mm_ras"].items()}  # type: ignore[attr-defined]
        assert "T2" not in motions
        np.testing.assert_array_equal(motions["T1"], scans["motion_mm_ras"])
        np.testing.assert_array_equal(motions.get("PD", np.eye(4)), np.eye(4))
        if "MRA" in motions:
            moved = motions["MRA"] - np.eye(4)
            assert 0.2 < np.abs(moved[:3, 3]).max() <= 1.5
            np.testing.assert_allclose(motions["MRA"][:3, :3] @ motions["MRA"][:3, :3].T, np.eye(3), atol=1e-12)
    subject = "IXI003-Guys-0811"
    pair = {m: Scan(members(folder, m)[subject]) for m in ("T2", "MRA")}
    motion = np.array(truth[subject]["motions_mm_ras"]["MRA"])  # type: ignore[index]
    assert dissimilarity(pair, motion) < dissimilarity(pair, phantom.rigid((0, 0, 0), (0, 9, 0)) @ motion)
    assert dissimilarity(pair, motion) < dissimilarity(pair, phantom.rigid((0, 0, 0), (-9, 0, 0)) @ motion)


def dissimilarity(scans: dict[str, Scan], motion: Matrix) -> float:
    """Share of voxels inside the MRA's grid that are head in only one of T2 and MRA."""
    t2, mra = scans["T2"], scans["MRA"]
    shape = t2.stored.shape
    matrix = np.linalg.inv(mra.affine) @ motion @ t2.affine
    moved = trilinear(mra.voxels, matrix, shape)
    covered = trilinear(np.ones_like(mra.voxels), matrix, shape) > 0.5
    heads = [voxels > otsu_threshold(voxels) / 2 for voxels in (t2.voxels, moved)]
    return float((heads[0] ^ heads[1])[covered].mean())


def test_with_oddities_some_subjects_lack_a_scan_and_each_fault_is_alone(folder: Path) -> None:
    found = {m: set(members(folder, m)) - {"README.txt"} for m in MODALITIES}
    everyone = set.union(*found.values())
    lacking = {m: everyone - found[m] for m in MODALITIES}
    assert lacking == {
        "T1": {"IXI902-Guys-9020"},
        "T2": {"IXI901-Guys-9010"},
        "PD": {"IXI008-HH-0996"},
        "MRA": {"IXI009-HH-1033"},
    }
    good = members(folder, "PD")["IXI002-HH-0774"]
    cut_short = members(folder, "PD")["IXI910-Guys-9100"]
    assert good.startswith(cut_short)
    assert len(cut_short) < len(good)


def test_without_oddities_every_subject_has_every_modality(tmp_path: Path) -> None:
    phantom.write_phantom(tmp_path, subjects=1, shrink=SHRINK, oddities=False, modalities=("T2", "PD"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["IXI-PD.tar", "IXI-T2.tar", "MD5SUMS", "truth.json"]
    assert list(members(tmp_path, "T2")) == list(members(tmp_path, "PD"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--modalities", "T1,DTI"], "there is no modality DTI; the modalities are T1, T2, PD, MRA"),
        (["--modalities", "T2"], "give two or more modalities"),
        (["--modalities", "t1 t2,t2"], "T1, T2, T2: give different ones"),
    ],
)
def test_unusable_modalities_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["simulate", str(tmp_path / "sim"), *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "sim").exists()
