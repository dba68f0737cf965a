"""Contradictory headers are rejected or flagged; a pair is read in a space that both scans have."""

from __future__ import annotations

import gzip
import io
import json
import logging
import tarfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import config_for
from headers import GRID, MIRROR, MNI, SHAPE, SHEAR, SPACING, with_forms
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples
from strategies import affines

from ixi_etl.dataset import metadata
from ixi_etl.dataset.manifest import DUPLICATE
from ixi_etl.pairing.geometry import Matrix
from ixi_etl.recipes.ixi import refresh
from ixi_etl.scans import gunzip, nifti
from ixi_etl.scans.affines import MAX_FORM_ERROR_MM, Form, choose_spaces
from ixi_etl.scans.nifti import parse_header
from ixi_etl.scans.survey import survey
from ixi_etl.testing.phantom import grid_affine, pack_nifti, rigid, write_tar


def read(*forms: Any, **fields: Any) -> nifti.Header:
    return parse_header(with_forms(*forms, **fields), 10**6)


def stretched(*factors: float) -> Matrix:
    return GRID @ np.diag([*factors, 1.0])


@pytest.mark.parametrize(
    ("forms", "message"),
    {
        "mirrored": ((MIRROR @ GRID, 1, GRID, 1), "mirror image"),
        "mirrored, in two spaces": ((MIRROR @ GRID, 2, GRID, 1), "mirror image"),
        "mirrored in a template": ((MIRROR @ MNI @ GRID, 4, GRID, 1), "mirror image"),
        "qfac of 0": ((GRID, 1, GRID, 1, {"qfac": 0}), "mirror image"),
        "rotated": (
            (rigid((3, 0, 0), (0, 0, 0)) @ GRID, 1, GRID, 1),
            r"scanner space \(code 1\), but their positions",
        ),
        "rotated by 180 degrees": ((rigid((180, 0, 0), (0, 0, 0)) @ GRID, 1, GRID, 1), "contradict"),
        "shifted by 5 mm": (
            (rigid((0, 0, 0), (0, 5, 0)) @ GRID, 1, GRID, 1),
            "a voxel differ by 5 mm",
        ),
        "shifted by 1 mm": (
            (rigid((0, 0, 0), (1, 0, 0)) @ GRID, 1, GRID, 1),
            "a voxel differ by 1 mm",
        ),
        "shifted in one template": ((rigid((0, 0, 0), (0, 5, 0)) @ GRID, 4, GRID, 4), r"MNI152 space \(code 4\)"),
        "thicker than the pixdim": ((stretched(1, 1, 1.5), 1, None, 0), "1.875 mm, .* the pixdim gives .* 1.25 mm"),
        "thicker than pixdim and qform": ((stretched(1, 1, 1.5), 1, GRID, 1), "the pixdim gives"),
        "thinner in plane": ((stretched(0.98, 0.98, 1), 1, None, 0), "the pixdim gives"),
        "sheared": ((GRID @ SHEAR, 1, None, 0), "at angles of 78.7"),
        "quaternion too long": ((None, 0, GRID, 1, {"quatern_b": 1.5}), "quaternion has length"),
        "quaternion too long, with an sform": ((GRID, 1, GRID, 1, {"quatern_b": 1.5}), "quaternion has length"),
        "rows of zeros, with a qform": ((np.diag([0, 0, 0, 1.0]), 1, GRID, 1), "sform is singular"),
        "millimetres labelled as metres": ((GRID, 1, GRID, 1, {"xyzt_units": 1}), "given in metres, is 937.5"),
        "micrometres without a unit": ((None, 0, stretched(1e3, 1e3, 1e3), 1), "unit may be wrong"),
        "pixdim of 0": ((GRID, 1, None, 0, {"pixdim": (0, 1, 1)}), "spacing is 0 x 1 x 1"),
        "pixdim below 0": ((GRID, 1, None, 0, {"pixdim": (1, -1, 1)}), "spacing is 1 x -1 x 1"),
    }.values(),
)
@pytest.mark.parametrize("nifti2", [False, True])
def test_a_contradictory_header_is_rejected_with_its_problem(
    forms: tuple[Any, ...], message: str, nifti2: bool
) -> None:
    fields = forms[4] if len(forms) > 4 else {}
    header = read(*forms[:4], nifti2=nifti2, **fields)
    assert header.reason == "bad_affine"
    assert pd.Series([header.problem]).str.contains(message).all(), header.problem


def test_differences_below_the_tolerance_are_ignored() -> None:
    near = rigid((0, 0, 0), (0, 0.9 * MAX_FORM_ERROR_MM, 0)) @ GRID
    header = read(near, 1, GRID, 1)
    assert (header.reason, header.note) == ("", "")
    np.testing.assert_allclose(header.affine, near, atol=1e-4)


@settings(max_examples=examples(60))
@given(affines(SHAPE))
def test_forms_written_by_one_tool_agree(affine: Matrix) -> None:
    header = read(affine, 1, affine, 1)
    assert (header.reason, header.note, list(header.forms)) == ("", "", [1])
    assert header.spacing_mm == tuple(float(str(v)) for v in np.linalg.norm(affine[:3, :3], axis=0).astype("f4"))


@settings(max_examples=examples(60))
@given(affines(SHAPE), st.tuples(*[st.floats(0.7, 1.4)] * 3), st.sampled_from([2, 3, 4, 5, 9]))
def test_spacing_and_orientation_match_the_affine(affine: Matrix, scale: Any, code: int) -> None:
    header = read(affine @ np.diag([*scale, 1]), code, affine, 1)
    for space, form in header.forms.items():
        header.use(space)
        assert header.affine is form.affine
        np.testing.assert_allclose(header.spacing_mm, np.linalg.norm(header.affine[:3, :3], axis=0), rtol=1e-5)
        assert header.orientation == "".join(nib.aff2axcodes(header.affine))


def test_scanner_space_is_preferred_and_the_note_names_both_spaces() -> None:
    header = read(MNI @ GRID, 4, GRID, 1)
    assert (header.reason, header.space, sorted(header.forms)) == ("", 1, [1, 4])
    np.testing.assert_allclose(header.affine, GRID, atol=1e-3)
    assert header.spacing_mm == SPACING
    assert "two spaces, scanner (code 1) and MNI152 (code 4)" in header.note


@pytest.mark.parametrize("qfac", [0, 1, 2.5])
def test_a_qfac_of_0_means_1(qfac: float) -> None:
    upright = rigid((6, 2, -3), (3, -2, 8)) @ grid_affine(SHAPE, SPACING, "RAS")
    header = read(None, 0, upright, 1, qfac=qfac)
    np.testing.assert_allclose(header.affine, upright, atol=1e-3)
    assert (header.reason, header.orientation) == ("", "RAS")


def test_a_rounded_quaternion_is_accepted() -> None:
    half_turn = grid_affine(SHAPE, SPACING, "LPS")
    header = read(None, 0, half_turn, 1, quatern_d=1.0002)
    np.testing.assert_allclose(header.affine, half_turn, atol=1e-3)


@pytest.mark.parametrize(("unit", "scale"), [(0, 1.0), (2, 1.0), (10, 1.0), (1, 1e-3), (11, 1e3)])
def test_length_units_are_respected(unit: int, scale: float) -> None:
    scaled = np.diag([scale, scale, scale, 1.0]) @ GRID
    for forms in ((scaled, 1, scaled, 1), (None, 0, scaled, 1), (scaled, 1, None, 0)):
        header = read(*forms, xyzt_units=unit, pixdim=np.multiply(SPACING, scale))
        assert header.reason == ""
        np.testing.assert_allclose(header.affine, GRID, atol=1e-3)
        np.testing.assert_allclose(header.spacing_mm, SPACING, rtol=1e-6)


def test_a_form_with_a_code_of_0_or_less_is_ignored() -> None:
    for code in (0, -1):
        header = read(MIRROR @ GRID, code, GRID, 1)
        assert (header.reason, list(header.forms)) == ("", [1])


# -- pairs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("t1", "t2", "spaces"),
    [
        ([1], [1], (1, 1)),
        ([1, 4], [1], (1, 1)),
        ([1], [1, 4], (1, 1)),
        ([2, 4], [1, 4], (4, 4)),
        ([4], [4], (4, 4)),
        ([7], [7], (7, 7)),
        ([1, 2], [2], (2, 2)),
        ([1], [2], (1, 2)),
        ([2], [1, 4], (2, 1)),
        ([1], [4], None),
        ([4], [1, 2], None),
        ([2], [5], None),
        ([3], [4], None),
        ([1], [7], None),
    ],
)
def test_pairs_are_read_in_a_common_space(t1: list[int], t2: list[int], spaces: tuple[int, int] | None) -> None:
    form = Form(GRID, SPACING, "LAS")
    assert choose_spaces(dict.fromkeys(t1, form), dict.fromkeys(t2, form)) == spaces


def test_a_stretched_aligned_form_does_not_replace_scanner_space() -> None:
    plain, other = Form(GRID, SPACING, "LAS"), Form(GRID, SPACING, "LAS", "stretched")
    assert choose_spaces({1: plain}, {2: other}) is None
    assert choose_spaces({2: plain}, {2: other}) == (2, 2)


def scans(archives: Path) -> list[dict[str, bytes]]:
    """The intact pairs of the phantom, in order."""
    found: dict[str, dict[str, bytes]] = {}
    for modality in ("T1", "T2"):
        with tarfile.open(archives / f"IXI-{modality}.tar") as tar:
            for member in tar:
                packed = tar.extractfile(member)
                assert packed is not None
                found.setdefault(member.name.rpartition("-")[0], {})[modality] = packed.read()
    return [found[name] for name in sorted(found) if name.startswith("IXI00")]


def with_moved_sform(packed: bytes, motion: Matrix, **codes: int) -> bytes:
    """The same voxels with a moved sform and other `codes`; the qform stays."""
    raw = bytearray(gzip.decompress(packed))
    header = nib.Nifti1Header(bytes(raw[:348]))
    header.set_sform(motion @ header.get_sform(), int(header["sform_code"]))
    for name, code in codes.items():
        header[name] = code
    raw[:348] = header.binaryblock
    return gzip.compress(bytes(raw), 2, mtime=0)


@pytest.fixture(scope="module")
def mixed(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, Any, str]:
    """A version with pairs in many spaces and with duplicates: manifest, stored arrays, and log text."""
    one, two, three, four = scans(archives)[:4]
    pairs = {
        "IXI100-A-1": (one["T1"], one["T2"]),
        # The same T1, with an sform in MNI152 space and a qform in scanner space.
        "IXI101-A-1": (with_moved_sform(one["T1"], MNI, sform_code=4), one["T2"]),
        "IXI200-A-1": (with_moved_sform(two["T1"], MNI, sform_code=4, qform_code=0), two["T2"]),
        "IXI201-A-1": (
            with_moved_sform(two["T1"], MNI, sform_code=4, qform_code=0),
            with_moved_sform(two["T2"], MNI, sform_code=4, qform_code=0),
        ),
        "IXI300-A-1": (three["T1"], with_moved_sform(three["T2"], np.eye(4), sform_code=2, qform_code=0)),
        "IXI301-A-1": (with_moved_sform(three["T1"], MIRROR), three["T2"]),
        # Two files of the same T1, with T2s of two persons.
        "IXI400-A-1": (gzip.compress(gzip.decompress(four["T1"]), 9), four["T2"]),
        "IXI401-A-1": (four["T1"], scans(archives)[4]["T2"]),
        "IXI500-A-1": (scans(archives)[5]["T1"], scans(archives)[5]["T2"]),
    }
    folder = tmp_path_factory.mktemp("mixed")
    for index, modality in enumerate(("T1", "T2")):
        write_tar(folder / f"IXI-{modality}.tar", {f"{s}-{modality}.nii.gz": pair[index] for s, pair in pairs.items()})
    log_stream = io.StringIO()
    handler = logging.StreamHandler(log_stream)
    logging.getLogger("ixi_etl").addHandler(handler)
    try:
        done = refresh(config_for(folder / "root", folder, depth="any", pictures=False))
    finally:
        logging.getLogger("ixi_etl").removeHandler(handler)
    from ixi_etl.dataset.store import open_arrays

    stored = {name: np.asarray(array[:]) for name, array in open_arrays(done.folder).items()}
    return metadata.read_manifest(done.folder).set_index("subject_id"), stored, log_stream.getvalue()


def test_a_pair_is_never_compared_in_two_spaces(mixed: Any) -> None:
    table, stored, log_text = mixed
    assert table.loc["IXI101-A-1", "status"] == "used"
    rows = table["store_row"]
    for name in ("t1", "t2", "t1_affine", "t2_affine"):
        expected, actual = (stored[name][int(rows[s])] for s in ("IXI100-A-1", "IXI101-A-1"))
        np.testing.assert_allclose(expected, actual, atol=1.001 if name in ("t1", "t2") else 1e-3)
    assert table.loc["IXI200-A-1", "reason"] == "bad_affine"
    assert "the affine is in scanner (code 1), the T1's in MNI152 (code 4)" in table.loc["IXI200-A-1", "detail"]
    assert "mirror image" in table.loc["IXI301-A-1", "detail"]
    flags = table["flags"].str.split(",")
    assert flags["IXI101-A-1"] == ["forms_differ", DUPLICATE]
    assert set(flags["IXI201-A-1"]) == {"template_space", "affine_not_pixdim"}
    assert flags["IXI300-A-1"] == ["unlike_spaces"]
    assert flags["IXI500-A-1"] == [""]
    assert "1 flagged unlike_spaces" in log_text
    assert "IXI300-A-1" in log_text


def test_manifest_spacings_match_the_stored_affines(mixed: Any) -> None:
    table, stored, _ = mixed
    for _, row in table[table["status"] == "used"].iterrows():
        spacing_mm = np.linalg.norm(stored["t2_affine"][int(row["store_row"])][:3, :3], axis=0)
        np.testing.assert_allclose(json.loads(row["t2_spacing_mm"]), spacing_mm, rtol=1e-5)


def test_equal_scans_are_flagged_and_their_persons_share_a_split(mixed: Any) -> None:
    table, _, log_text = mixed
    copies = table.index[table["flags"].str.contains(DUPLICATE)].tolist()
    assert copies == ["IXI100-A-1", "IXI101-A-1", "IXI400-A-1", "IXI401-A-1"]
    for one, other in (copies[:2], copies[2:]):
        assert table.loc[one, "split"] == table.loc[other, "split"]
    assert f"4 flagged {DUPLICATE} (the same voxels" in log_text


def test_the_survey_reports_forms_and_notes(archives: Path, tmp_path: Path) -> None:
    packed = with_moved_sform(scans(archives)[0]["T1"], MNI, sform_code=4)
    write_tar(tmp_path / "IXI-T1.tar", {"IXI101-A-1-T1.nii.gz": packed})
    (row,) = survey({"T1": str(tmp_path / "IXI-T1.tar")}).to_dict("records")
    assert (row["space"], row["sform_code"], row["qform_code"]) == (1, 4, 1)
    assert sorted(json.loads(row["forms"])) == ["1", "4"]
    assert "two spaces" in row["note"]


REAL = Path(__file__).parents[3] / "shared" / "real"


@pytest.mark.skipif(
    not REAL.is_dir(),
    reason="needs real scans, which are not part of the project; the tests above check the same on synthetic headers",
)
def test_headers_of_real_scans_are_consistent() -> None:
    for path in sorted(REAL.rglob("*.nii.gz")):
        header = parse_header(gunzip.inflate_head(path.read_bytes()[:4096]), path.stat().st_size)
        assert (header.reason, header.note) == ("", ""), path.name
        np.testing.assert_allclose(header.affine, nib.load(path).affine, atol=1e-4)


def test_packed_phantoms_have_one_form() -> None:
    header = parse_header(gunzip.inflate_head(pack_nifti(np.zeros(SHAPE[::-1], "<i2"), GRID)), 10**6)
    assert (list(header.forms), header.spacing_mm) == ([1], SPACING)
