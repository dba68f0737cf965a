"""Headers that disagree: each case has a reason or a flag in the manifest, with the line that a user sees."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import config_for
from headers import GRID, MIRROR, MNI, SHAPE, with_forms

from ixi_etl.config import DatasetConfig
from ixi_etl.dataset import metadata
from ixi_etl.dataset.manifest import FLAGS, to_records
from ixi_etl.dataset.selection import screen_headers
from ixi_etl.recipes.ixi import refresh
from ixi_etl.scans.survey import survey
from ixi_etl.testing.phantom import PhantomSubject, pack_nifti, rigid, simulate, write_tar

SHIFTED = rigid((0, 0, 0), (0, 5, 0)) @ GRID  # by five voxels
THICK = GRID @ np.diag([1, 1, 1.5, 1])
IXI = (GRID, 1, GRID, 1)  # sform, its code, qform, its code


def screen(t1: tuple[Any, ...], t2: tuple[Any, ...], folder: Path) -> dict[str, Any]:
    """The manifest's row of a pair with these forms."""
    for modality, forms in (("T1", t1), ("T2", t2)):
        packed = gzip.compress(with_forms(*forms) + bytes(2 * int(np.prod(SHAPE))))
        write_tar(folder / f"IXI-{modality}.tar", {f"IXI002-Guys-0828-{modality}.nii.gz": packed})
    table = survey({m: str(folder / f"IXI-{m}.tar") for m in ("T1", "T2")})
    (row,) = to_records(screen_headers(table, DatasetConfig(slices=6)))
    return row


@pytest.mark.parametrize(
    ("t1", "t2", "detail"),
    {
        "sform and qform are shifted": (
            (SHIFTED, 1, GRID, 1),
            IXI,
            "T1: sform and qform contradict each other: both are in scanner space (code 1), but their positions of a "
            "voxel differ by 5 mm",
        ),
        "sform and qform of the T2 are shifted": ((*IXI,), (SHIFTED, 1, GRID, 1), "T2: sform and qform contradict"),
        "the sform is not the pixdim": (
            (THICK, 1, None, 0),
            IXI,
            "T1: the sform (scanner space, code 1) has voxels of 0.9375 x 0.9375 x 1.875 mm, at angles of 90.0, 90.0, "
            "90.0 degrees; the pixdim gives 0.9375 x 0.9375 x 1.25 mm, at right angles",
        ),
        "an aligned sform is not the pixdim": (IXI, (THICK, 2, None, 0), "the pixdim gives 0.9375 x 0.9375 x 1.25 mm"),
        "scanner and template": (
            IXI,
            (GRID, 4, None, 0),
            "T2: no common space with the T1: the affine is in MNI152 (code 4), the T1's in scanner (code 1)",
        ),
        "no code in one scan": (
            (GRID, 0, GRID, 0),
            IXI,
            "T1: neither sform nor qform is set, so the orientation is unknown",
        ),
        "no code in both": ((GRID, 0, GRID, 0), (GRID, 0, GRID, 0), "T1: neither sform nor qform is set"),
        "left and right in the sform": (
            (MIRROR @ GRID, 1, GRID, 1),
            IXI,
            "T1: sform and qform contradict each other: they are mirror images",
        ),
        "left and right in the aligned sform of the T2": (IXI, (MIRROR @ GRID, 2, GRID, 1), "mirror images"),
    }.values(),
)
def test_disagreeing_headers_exclude_the_pair(
    t1: tuple[Any, ...], t2: tuple[Any, ...], detail: str, tmp_path: Path
) -> None:
    row = screen(t1, t2, tmp_path)
    assert (row["status"], row["reason"]) == ("excluded", "bad_affine")
    assert detail in row["detail"]


@pytest.mark.parametrize(
    ("t1", "t2", "flags"),
    {
        "as in IXI": (IXI, IXI, ""),
        "qform only": ((None, 0, GRID, 1), (None, 0, GRID, 1), ""),
        "sform only": ((GRID, 1, None, 0), (GRID, 1, None, 0), ""),
        "sform in one, qform in the other": ((GRID, 1, None, 0), (None, 0, GRID, 1), ""),
        "equal forms with two codes": ((GRID, 1, GRID, 2), (GRID, 2, GRID, 1), ""),
        "scanner and aligned": ((GRID, 1, None, 0), (GRID, 2, None, 0), "unlike_spaces"),
        "an aligned form beside the scanner's": ((SHIFTED, 2, GRID, 1), IXI, "forms_differ"),
        "a template beside the scanner": (IXI, (MNI @ GRID, 4, GRID, 1), "forms_differ"),
        "templates": ((MNI @ GRID, 4, None, 0), (MNI @ GRID, 4, None, 0), "template_space,affine_not_pixdim"),
    }.values(),
)
def test_pairs_with_a_common_space_are_used_and_flagged(
    t1: tuple[Any, ...], t2: tuple[Any, ...], flags: str, tmp_path: Path
) -> None:
    row = screen(t1, t2, tmp_path)
    assert (row["status"], row["flags"]) == ("candidate", flags)
    assert set(filter(None, flags.split(","))) <= set(FLAGS)


@pytest.mark.stack  # the registrations take 20 seconds; test_register checks single steps
def test_a_flip_that_no_header_shows_excludes_the_pair(tmp_path: Path) -> None:
    """Registration finds it: the mirror image of the T1 fits the T2 better."""
    members: dict[str, dict[str, bytes]] = {"T1": {}, "T2": {}}
    for number, flipped in ((2, None), (3, "T1"), (4, "T2")):
        for modality, packed in simulate(PhantomSubject(number, "Guys", seed=11, shrink=2))[0].items():
            if modality == flipped:
                image = nib.Nifti1Image.from_bytes(gzip.decompress(packed))
                packed = pack_nifti(np.asarray(image.dataobj).T, MIRROR @ image.affine)
            members[modality][f"IXI{number:03d}-Guys-{number}-{modality}.nii.gz"] = packed
    for modality, named in members.items():
        write_tar(tmp_path / f"IXI-{modality}.tar", named)
    done = refresh(config_for(tmp_path / "root", tmp_path, depth="any", registration="rigid", pictures=False))
    good, *flipped_pairs = to_records(metadata.read_manifest(done.folder))
    assert good["status"] == "used"
    for row in flipped_pairs:
        assert (row["status"], row["reason"]) == ("excluded", "bad_affine")
        assert row["detail"].endswith("fits the T2 better: one of the headers exchanges left and right")
