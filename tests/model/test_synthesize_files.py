"""NIfTI files: outputs keep the geometry of their inputs; names, overwriting, errors and the command."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from heads import head, identity, nifti_of, t1, volume_of

from flows.cli import main
from ixi_etl.dataset import manifest, metadata
from ixi_etl.dataset.direction import Direction
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.errors import SynthesisError
from ixi_etl.testing.phantom import grid_affine, rigid
from model import outputs, synthesize, volumes

T1_TO_T2 = Direction(("t1",), "t2")


@pytest.mark.parametrize("kind", ["qform alone", "big-endian", "NIfTI-2", "different forms"])
def test_the_geometry_of_the_header_is_kept_exactly(kind: str, tmp_path: Path) -> None:
    shape = (20, 22, 18)
    affine = rigid((7, -3, 11), (1, 2, 3)) @ grid_affine(shape, (1.7, 1.9, 2.3), "PSR")
    image = (nib.Nifti2Image if kind == "NIfTI-2" else nib.Nifti1Image)(head(shape, affine).T, affine)
    if kind == "big-endian":
        image = nib.Nifti1Image(image.get_fdata(), affine, image.header.as_byteswapped(">"))
    image.set_qform(rigid((1, 0, 0), (0, 5, 0)) @ affine if kind == "different forms" else affine, 1)
    image.set_sform(affine, 0 if kind == "qform alone" else 4)
    image.header.set_xyzt_units("mm", "sec")
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"the name of a person"))
    image.header["aux_file"] = b"the name of a person"
    source = tmp_path / "x.nii"
    image.to_filename(source)
    out = volumes.synthesize_file(identity(low_high=(0, 1000)), source, tmp_path / "out.nii")
    before, after = nib.load(source).header, nib.load(out).header
    assert type(after) is type(before)
    assert after.endianness == before.endianness
    for name in ("pixdim", "qform_code", "sform_code", "quatern_b", "qoffset_x", "srow_x", "srow_z", "xyzt_units"):
        np.testing.assert_array_equal(after[name], before[name])
    assert b"the name of a person" not in out.read_bytes()
    assert nib.load(out).get_fdata().max() > 500


def with_sform(plain: bytes, sform: np.ndarray, code: int) -> bytes:
    """Replace the sform of a file."""
    header = nib.Nifti1Header(plain[:348])
    header.set_sform(sform, code)
    return bytes(header.binaryblock) + plain[348:]


def bad_inputs() -> dict[str, tuple[bytes, str]]:
    affine = grid_affine((20, 20, 20), (2, 2, 2), "LAS")
    values = head((20, 20, 20), affine)
    broken = values.copy()
    broken[3, 4, 5] = np.nan
    packed = gzip.compress(nifti_of(values, affine))
    return {
        "no orientation": (nifti_of(values, affine, 0, 0), "neither sform nor qform is set"),
        "four axes": (nifti_of(np.stack([values, values]), affine), "shape is 20 x 20 x 20 x 2"),
        "not finite": (nifti_of(broken, affine), "some voxels are NaN or infinite"),
        "empty": (nifti_of(values * 0, affine), "it is empty: it has no voxel above 0"),
        "empty and wide": (
            nifti_of(np.full((20, 60, 60), 5.0, np.float32), affine),
            "it is empty: it has no voxel above",
        ),
        "empty in the middle": (
            nifti_of(np.where(np.arange(20)[:, None, None] < 2, values, 0).astype(np.float32), affine),
            "it is empty: its middle 14 mm have no other value than 0",
        ),
        "in metres": (nifti_of(values, affine @ np.diag([1e-3, 1e-3, 1e-3, 1])), "the header's unit may be wrong"),
        "a mirrored sform": (
            with_sform(nifti_of(values, affine), np.diag([-1.0, 1, 1, 1]) @ affine, 1),
            "sform and qform contradict each other: they are mirror images",
        ),
        "a shifted sform": (
            with_sform(nifti_of(values, affine), rigid((0, 0, 0), (0, 5, 0)) @ affine, 2),
            "aligned space (code 2), but their positions of a voxel differ by 5 mm",
        ),
        "thick slices": (nifti_of(values, affine @ np.diag([1, 1, 10, 1])), "voxels of 2 x 2 x 20 mm"),
        "truncated": (packed[: len(packed) // 2], "is truncated"),
        "a plain file truncated": (nifti_of(values, affine)[:-1], "the header requires"),
        "not NIfTI": (b"<html>403 Forbidden</html>" * 40, "not a NIfTI file"),
    }


@pytest.mark.parametrize("kind", bad_inputs())
def test_an_unusable_input_is_a_one_line_error(kind: str, tmp_path: Path) -> None:
    contents, message = bad_inputs()[kind]
    path = tmp_path / "x.nii.gz"
    path.write_bytes(contents)
    with pytest.raises(SynthesisError) as error:
        volumes.synthesize_file(identity(), path, tmp_path / "out.nii.gz")
    assert str(error.value).startswith(f"{path} cannot be used: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == [path]


def test_scanner_space_is_preferred_to_another_space_with_a_warning(tmp_path: Path) -> None:
    affine = grid_affine((20, 20, 20), (2, 2, 2), "LAS")
    plain = nifti_of(head((20, 20, 20), affine), affine, qform=1)
    both = with_sform(plain, rigid((90, 0, 0), (0, 0, 0)) @ affine @ np.diag([1.1, 1.1, 1.1, 1]), 4)
    made = []
    for name, contents in (("plain", plain), ("both", both)):
        (tmp_path / f"{name}.nii").write_bytes(contents)
        out = volumes.synthesize_file(identity(), tmp_path / f"{name}.nii", tmp_path / f"{name}-T2.nii")
        made.append(nib.load(out))
        warnings = json.loads((tmp_path / f"{name}-T2.json").read_text())["Warnings"]
        assert any("two spaces, scanner (code 1) and MNI152 (code 4)" in text for text in warnings) == (name == "both")
    np.testing.assert_array_equal(made[0].dataobj, made[1].dataobj)
    np.testing.assert_array_equal(made[1].get_sform(), nib.Nifti1Header(both[:348]).get_sform())


@pytest.mark.parametrize(
    ("name", "warned"),
    [
        ("sub-01_T2w.nii.gz", True),
        ("IXI002-Guys-0828-T2.nii", True),
        ("t2 (1).nii.gz", True),
        ("IXI002-Guys-0828-T1.nii.gz", False),
        ("T1-on-T2-grid.nii", False),
        ("head.nii", False),
        ("CT2.nii", False),
    ],
)
def test_a_file_name_of_the_wrong_modality_gives_a_warning(name: str, warned: bool, tmp_path: Path) -> None:
    affine = grid_affine((20, 20, 20), (2, 2, 2), "LAS")
    (tmp_path / name).write_bytes(nifti_of(head((20, 20, 20), affine), affine))
    volumes.synthesize_file(identity(), tmp_path / name, tmp_path / "out.nii")
    warnings = json.loads((tmp_path / "out.json").read_text())["Warnings"]
    assert any("by its name it is a T2" in warning for warning in warnings) is warned


@pytest.mark.parametrize("trailing", [(), (1,), (1, 1), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_the_output_has_the_shape_of_the_input(trailing: tuple[int, ...], kind: Any, tmp_path: Path) -> None:
    affine = grid_affine((20, 22, 18), (2, 2, 2), "LAS")
    image = kind(head((20, 22, 18), affine).T.reshape((20, 22, 18, *trailing)), affine)
    source = tmp_path / "x.nii"
    image.to_filename(source)
    out = volumes.synthesize_file(identity(), source, tmp_path / "out.nii.gz")
    before, after = nib.load(source), nib.load(out)
    assert after.shape == before.shape
    assert after.header.get_zooms() == before.header.get_zooms()
    assert np.asanyarray(after.dataobj).shape == before.shape


@pytest.mark.parametrize("endianness", ["<", ">"])
@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
def test_dropped_header_extensions_are_recorded(name: str, endianness: str, tmp_path: Path) -> None:
    affine = grid_affine((20, 22, 18), (2, 2, 2), "LAS")
    image = nib.Nifti1Image(head((20, 22, 18), affine).T, affine)
    if endianness == ">":
        image = nib.Nifti1Image(image.get_fdata(), affine, image.header.as_byteswapped(">"))
    for code, text in ((6, b"the name of a person"), (44, b"{}" * 400)):
        image.header.extensions.append(nib.nifti1.Nifti1Extension(code, text))
    image.to_filename(tmp_path / name)
    out = volumes.synthesize_file(identity(), tmp_path / name, tmp_path / "out.nii")
    # nibabel writes sizes and codes of extensions in native byte order, independent of the header's.
    dropped = json.loads((tmp_path / "out.json").read_text())["HeaderExtensionsDropped"]
    assert dropped == [6, 44]
    assert not nib.load(out).header.extensions


def test_too_many_voxels_are_refused_before_they_are_inflated(tmp_path: Path) -> None:
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape((512, 512, 513))
    header.set_sform(np.eye(4), 1)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    path = tmp_path / "x.nii.gz"
    path.write_bytes(gzip.compress(header.binaryblock + bytes(4)) + bytes(200_000))
    with pytest.raises(SynthesisError, match=r"x.nii.gz cannot be used: it has 512 x 512 x 513 voxels; the limit is"):
        volumes.synthesize_file(identity(), path, tmp_path / "out.nii")


@pytest.mark.parametrize("low_high", [(0.0, 1.0), (-0.02, 0.5), (0.0, 250_000.0), (5e6, 5.1e6), (3.0, 1500.0)])
def test_target_units_are_kept_for_small_and_large_values(low_high: tuple[float, float], tmp_path: Path) -> None:
    grid = grid_affine((24, 24, 24), (2, 2, 2), "RAS")
    values = head((24, 24, 24), grid)
    (tmp_path / "a.nii.gz").write_bytes(nifti_of(values, grid))
    trained = identity(low_high=low_high)
    made = synthesize.synthesize_volume(trained, t1(values, grid))
    image = nib.load(volumes.synthesize_file(trained, tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"))
    assert image.get_data_dtype() == np.int16
    low, high = low_high
    error = 0.5001 if low_high == (3.0, 1500.0) else (high - low) / 60_000
    assert np.abs(image.get_fdata().T - made.values).max() <= error


@pytest.mark.parametrize(
    ("name", "renamed"),
    [
        ("IXI002-Guys-0828-T1.nii.gz", "IXI002-Guys-0828-T2.nii.gz"),
        ("sub-01_T1w.nii", "sub-01_T2w.nii"),
        ("t1.nii.gz", "T2.nii.gz"),
        ("head.nii.gz", "head-T2.nii.gz"),
        ("CT1.nii.gz", "CT1-T2.nii.gz"),
        ("X-T1.NII.GZ", "X-T2.nii.gz"),
        ("x.Nii", "x-T2.nii"),
        ("x-T1 (1).nii.gz", "x-T1 (1)-T2.nii.gz"),
    ],
)
def test_outputs_are_named_after_their_inputs(name: str, renamed: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    assert outputs.plan_outputs([tmp_path], tmp_path / "out", T1_TO_T2) == [
        ({"t1": tmp_path / name}, tmp_path / "out" / renamed)
    ]


def test_a_direction_is_not_interpreted_as_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "x-T1.nii").touch()
    ((_, out),) = outputs.plan_outputs([tmp_path / "x-T1.nii"], tmp_path / "out", Direction(("t1",), r"a\1"))
    assert out.name == r"x-A\1.nii"


def test_outputs_never_overwrite_an_input_or_each_other(tmp_path: Path) -> None:
    (tmp_path / "a-T1.nii").touch()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a-T1.nii").touch()
    with pytest.raises(SynthesisError, match="is an input, or would be written twice"):
        outputs.plan_outputs([tmp_path / "a-T1.nii"], tmp_path / "a-T1.nii", T1_TO_T2)
    with pytest.raises(SynthesisError, match="is an input, or would be written twice"):
        outputs.plan_outputs([tmp_path / "a-T1.nii", tmp_path / "b"], tmp_path / "out", T1_TO_T2)
    (tmp_path / "c").mkdir()
    with pytest.raises(SynthesisError, match="has no volume in it"):
        outputs.plan_outputs([tmp_path / "c"], tmp_path / "out", T1_TO_T2)
    (tmp_path / "c" / "a-T1.nii").touch()
    (tmp_path / "c" / "a-T1.nii.gz").touch()
    with pytest.raises(SynthesisError, match=r"a-T2.json is an input, or would be written twice"):
        outputs.plan_outputs([tmp_path / "c"], tmp_path / "out", T1_TO_T2)


def test_other_files_in_a_folder_are_skipped_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scans = tmp_path / "scans"
    (scans / "a-folder.nii.gz").mkdir(parents=True)
    (scans / "sub-01").mkdir()
    for name in ("a-T1.nii.gz", "B-T1.NII.GZ", "._a-T1.nii.gz", ".DS_Store", ".hidden.nii", "README.txt"):
        (scans / name).touch()
    (scans / "link-T1.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    os.mkfifo(scans / "pipe-T1.nii")
    (tmp_path / "0123").touch()
    (scans / "z-T1.nii.gz").symlink_to(tmp_path / "0123")  # as in a content-addressed store
    jobs = outputs.plan_outputs([scans], tmp_path / "out", T1_TO_T2)
    assert [out.name for _, out in jobs] == ["B-T2.nii.gz", "a-T2.nii.gz", "z-T2.nii.gz"]
    assert "skipped 3 hidden files (.DS_Store ...)" in caplog.text
    for name in ("a-folder.nii.gz", "link-T1.nii.gz", "pipe-T1.nii"):
        assert f"skipped {scans / name}" in caplog.text


def test_a_folder_without_volumes_suggests_a_folder_inside_it(tmp_path: Path) -> None:
    (tmp_path / "sub-01").mkdir()
    with pytest.raises(
        SynthesisError, match=r"has no volume in it .*; give one of the 1 folders in it, such as sub-01"
    ):
        outputs.plan_outputs([tmp_path], tmp_path / "out", T1_TO_T2)


def test_files_of_other_programs_are_not_overwritten(tmp_path: Path) -> None:
    affine = grid_affine((20, 22, 18), (2, 2, 2), "LAS")
    source = tmp_path / "a_T1w.nii.gz"
    source.write_bytes(gzip.compress(nifti_of(head((20, 22, 18), affine), affine)))
    jobs = outputs.plan_outputs([source], tmp_path, T1_TO_T2)
    volumes.synthesize(identity(), jobs)
    assert outputs.plan_outputs([source], tmp_path, T1_TO_T2) == jobs  # it may overwrite its own output
    (tmp_path / "a_T2w.json").write_text("{}")
    with pytest.raises(SynthesisError, match=r"a_T2w.json was not written by this command"):
        outputs.plan_outputs([source], tmp_path, T1_TO_T2)
    (tmp_path / "a_T2w.nii.gz").write_bytes(source.read_bytes())
    with pytest.raises(SynthesisError, match=r"a_T2w.nii.gz was not written by this command"):
        outputs.plan_outputs([source], tmp_path, T1_TO_T2)


@pytest.mark.parametrize("out", ["file/made", "file"])
def test_an_unwritable_output_folder_is_refused_before_any_work(out: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    jobs = [({"t1": tmp_path / "a-T1.nii"}, tmp_path / out / "a-T2.nii")]
    with pytest.raises(SynthesisError, match=r"cannot write to .*; give another -o"):
        volumes.synthesize(identity(), jobs)


def test_an_unreadable_input_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    affine = grid_affine((20, 22, 18), (2, 2, 2), "LAS")
    for name in ("a-T1.nii", "b-T1.nii"):
        (tmp_path / name).write_bytes(nifti_of(head((20, 22, 18), affine), affine))
    read = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path.name == "a-T1.nii":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    jobs = outputs.plan_outputs([tmp_path], tmp_path / "out", T1_TO_T2)
    with pytest.raises(SynthesisError, match=r"1 of 2 inputs could not be used; .*a-T1.nii .*: Permission denied"):
        volumes.synthesize(identity(), jobs)
    assert (tmp_path / "out" / "b-T2.nii").is_file()


@pytest.fixture(scope="module")
def root(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a run `a`, without its dataset."""
    root = tmp_path_factory.mktemp("synthesis")
    shutil.copytree(trained / "runs", root / "runs")
    return root


def command(root: Path, *arguments: Any, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), "--root", str(root)])
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def test_the_command_processes_files_and_folders_and_skips_unusable_inputs(
    archives: Path, published: PublishedVersion, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = manifest.used_rows(metadata.read_manifest(published.folder))["t1_member"].tolist()[:2]
    (tmp_path / "in").mkdir()
    for member in members:
        (tmp_path / "in" / member).write_bytes(volume_of(archives, member))
    first_input = tmp_path / "in" / members[0]
    code, out, _ = command(root, "synthesize", "a", first_input, "-o", tmp_path / "T2.nii.gz", capsys=capsys)
    assert (code, out.strip()) == (0, str(tmp_path / "T2.nii.gz"))
    first, made = nib.load(first_input), nib.load(tmp_path / "T2.nii.gz")
    assert made.shape == first.shape
    assert bytes(made.header["descrip"]).startswith(b"SYNTHETIC T2 of a T1, ixi-etl ")
    record = json.loads((tmp_path / "T2.json").read_text())
    assert record["Sources"] == [members[0]]
    assert str(tmp_path) not in (tmp_path / "T2.json").read_text()
    assert record["SkullStripped"] is False

    (tmp_path / "bad.nii").write_bytes(b"nothing")
    code, out, err = command(
        root, "synthesize", "latest", tmp_path / "in", tmp_path / "bad.nii", "-o", tmp_path / "all", capsys=capsys
    )
    assert code == 1
    assert "1 of 3 inputs could not be used; the first: " in err.splitlines()[-1]
    written = {p.name for p in (tmp_path / "all").glob("*.nii.gz")}
    assert written == {m.replace("T1", "T2") for m in members}
    assert (tmp_path / "all" / members[0].replace("T1", "T2")).read_bytes() == (tmp_path / "T2.nii.gz").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["zz", "x.nii", "-o", "y.nii"], "there is no run zz in"),
        (["a", "nowhere.nii", "-o", "y.nii"], "nowhere.nii does not exist"),
        (["a", "README.md", "-o", "y.nii"], "README.md is not a NIfTI file by its name"),
        (["a", "x.nii", "z.nii", "-o", "y.nii"], "is a single file, but there may be several outputs; give a folder"),
        (["a", "nowhere.nii", "-o", "nowhere.nii"], "nowhere.nii does not exist"),
        (["a", "x.nii", "-o", "y.nii", "--device", "cuda:9"], "device cuda:9 is not available"),
        (["a", "x.nii", "-o", "y.nii", "--device", "meta"], "device meta is not available"),
        (["a", "x.nii", "-o", "y.nii", "--seed", str(10**23)], "does not fit into 64 bits; give a smaller one"),
    ],
)
def test_errors_of_the_command_are_one_line(
    arguments: list[str], message: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = command(root, "synthesize", *arguments, capsys=capsys)
    assert (code, out) in ((1, ""), (2, ""), (6, ""))
    assert message in err
    assert err.count("\n") == 1
