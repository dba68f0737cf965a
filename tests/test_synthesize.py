"""A volume goes through the planes of the training and comes back to where it was; what is unlike is said."""

from __future__ import annotations

import gzip
import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed; pip install -c constraints.txt -e '.[train]'")

from conftest import SMALL_NETWORKS  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from profiles import examples  # noqa: E402
from strategies import ORIENTATIONS  # noqa: E402

from flows.cli import main  # noqa: E402
from ixi_etl import dataset, manifest  # noqa: E402
from ixi_etl.phantom import grid_affine, pack, rigid  # noqa: E402
from ixi_etl.publish import Refreshed  # noqa: E402
from ixi_etl.store import open_arrays  # noqa: E402
from model import checkpoint, data, export, planes, synthesize  # noqa: E402
from model.checkpoint import CheckpointError  # noqa: E402
from model.config import TrainConfig  # noqa: E402
from model.evaluate import BATCH, generated_by, load_generator  # noqa: E402
from model.planes import Planes  # noqa: E402
from model.run import prepare, train_run  # noqa: E402
from model.synthesize import SynthesisError, Trained  # noqa: E402

SMALL = SMALL_NETWORKS | {"steps": 2, "samples": 0}


@pytest.fixture(scope="module")
def root(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a run `a`, and without the dataset that it was trained on."""
    root = tmp_path_factory.mktemp("synthesis")
    shutil.copytree(trained / "runs", root / "runs")
    return root


@pytest.fixture(scope="module")
def loaded(root: Path) -> Trained:
    return synthesize.load(synthesize.find_generator(root, "a"))


def identity(shape: tuple[int, int] = (24, 24), spacing_mm: float = 2.0, low_high: tuple[float, float] = (0, 1)) -> Any:
    """What is trained to give back its source, on planes of that shape and spacing; targets lie in `low_high`."""
    wanted = Planes(
        shape=shape,
        spacing_mm=(spacing_mm, spacing_mm),
        slab_mm=14.0,
        slab_offset_mm=0.0,
        source_spacing_mm=(2.0, 2.0, 2.0),
        target_low_high=low_high,
        source_histogram=tuple(np.eye(planes.BINS)[20]),
        target_histogram=tuple(np.eye(planes.BINS)[1]),
    )
    return Trained(lambda source, _: source, wanted, ("t1", "t2"), "cpu", {"GeneratorSHA256": "0" * 64})


def head(shape_ijk: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """Smooth lopsided signal, [k, j, i], about the world's z axis, 0 to 1000, next to nothing 20 mm from it."""
    i, j, k = np.indices(shape_ijk)
    world = np.stack([i, j, k, np.ones(shape_ijk)], axis=-1) @ affine.T
    x, y, z = (world[..., n] for n in range(3))
    ball = np.exp(-((x / 10) ** 2 + (y / 12) ** 2 + (z / 60) ** 2))
    return (1000 * ball * (0.75 + 0.25 * np.sin(x / 9) * np.cos(y / 8 + z / 7))).astype(np.float32).T


def nifti_of(values: np.ndarray, affine: np.ndarray, qform: int = 2, sform: int = 1) -> bytes:
    """A plain NIfTI file of float32 [k, j, i], with codes of its own."""
    image = nib.Nifti1Image(values.T, affine)
    image.set_qform(affine, qform)
    image.set_sform(affine, sform)
    return bytes(image.to_bytes())


# -- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("orientation", "tilt_deg"),
    [*((orientation, 9) for orientation in ORIENTATIONS), ("RAS", 0), ("PSR", 0), ("LIA", 0)],
)
def test_an_identity_gives_back_the_input_however_it_is_stored(
    orientation: str, tilt_deg: float, tmp_path: Path
) -> None:
    shape = (28, 29, 30)
    affine = rigid((tilt_deg, -tilt_deg, tilt_deg / 2), (1, -2, 3)) @ grid_affine(shape, (2.1, 1.9, 2.2), orientation)
    values = head(shape, affine)
    source = tmp_path / "x-T1.nii"
    source.write_bytes(nifti_of(values, affine))
    made = identity((40, 40), 1.7)
    low, high = synthesize.synthesize_volume(made, values, affine).source_low_high
    out = synthesize.synthesize_file(identity((40, 40), 1.7, (low, high)), source, tmp_path / "out.nii.gz")
    before, after = nib.load(source), nib.load(out)
    np.testing.assert_array_equal(after.affine, before.affine)
    for what in ("qform", "sform"):
        (was, code), (now, new_code) = (getattr(i, f"get_{what}")(coded=True) for i in (before, after))
        np.testing.assert_array_equal(now, was)
        assert new_code == code
    assert after.shape == before.shape
    assert after.header.get_zooms() == before.header.get_zooms()
    assert after.get_data_dtype() == np.int16
    error = np.abs(after.get_fdata().T - values.clip(low, high))
    assert error.max() <= 45  # of 1000: what two linear interpolations take off a peak
    assert error.mean() <= 3


@pytest.mark.parametrize("kind", ["qform alone", "big-endian", "NIfTI-2", "unlike forms"])
def test_the_header_s_geometry_is_kept_to_the_bit(kind: str, tmp_path: Path) -> None:
    shape = (20, 22, 18)
    affine = rigid((7, -3, 11), (1, 2, 3)) @ grid_affine(shape, (1.7, 1.9, 2.3), "PSR")
    image = (nib.Nifti2Image if kind == "NIfTI-2" else nib.Nifti1Image)(head(shape, affine).T, affine)
    if kind == "big-endian":
        image = nib.Nifti1Image(image.get_fdata(), affine, image.header.as_byteswapped(">"))
    image.set_qform(rigid((1, 0, 0), (0, 5, 0)) @ affine if kind == "unlike forms" else affine, 1)
    image.set_sform(affine, 0 if kind == "qform alone" else 4)
    image.header.set_xyzt_units("mm", "sec")
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"the name of a person"))
    image.header["aux_file"] = b"the name of a person"
    source = tmp_path / "x.nii"
    image.to_filename(source)
    out = synthesize.synthesize_file(identity(low_high=(0, 1000)), source, tmp_path / "out.nii")
    before, after = nib.load(source).header, nib.load(out).header
    assert type(after) is type(before)
    assert after.endianness == before.endianness
    for name in ("pixdim", "qform_code", "sform_code", "quatern_b", "qoffset_x", "srow_x", "srow_z", "xyzt_units"):
        np.testing.assert_array_equal(after[name], before[name])
    assert b"the name of a person" not in out.read_bytes()
    assert nib.load(out).get_fdata().max() > 500


@settings(max_examples=examples(40))
@given(orientation=st.sampled_from(ORIENTATIONS), shape=st.tuples(*[st.integers(5, 24)] * 3))
def test_with_the_training_s_spacing_nothing_is_interpolated(orientation: str, shape: tuple[int, int, int]) -> None:
    affine = rigid((5, 4, -3), (2, 1, 0)) @ grid_affine(shape, (2.0, 2.0, 2.0), orientation)
    values = np.random.default_rng(0).uniform(0, 1000, shape[::-1]).astype(np.float32)
    made = identity()
    low, high = synthesize.synthesize_volume(made, values, affine).source_low_high
    again = synthesize.synthesize_volume(identity(low_high=(low, high)), values, affine)
    np.testing.assert_allclose(again.values, values.clip(low, high), atol=0.01)


def test_a_volume_wider_than_a_training_slice_is_centred_on_its_head() -> None:
    shape = (60, 24, 20)
    affine = grid_affine(shape, (2.0, 2.0, 2.0), "RAS")
    affine[0, 3] -= 25  # the head, at the world's origin, is far from the middle of the volume
    values = head(shape, affine)
    made = synthesize.synthesize_volume(identity(), values, affine)
    low, high = made.source_low_high
    again = synthesize.synthesize_volume(identity(low_high=(low, high)), values, affine)
    np.testing.assert_allclose(again.values[values > 200], values[values > 200].clip(low, high), atol=0.01)
    assert made.warnings == []
    too_small = synthesize.synthesize_volume(identity(shape=(8, 8)), values, affine)
    assert "of the head lies beyond the 16 x 16 mm of a training slice" in too_small.warnings[0]


def test_planes_without_a_head_are_left_empty() -> None:
    affine = grid_affine((24, 24, 20), (2.0, 2.0, 2.0), "RAS")
    values = head((24, 24, 20), affine)
    values[15:] *= 0.1  # the air above it is noisy
    made = identity(low_high=(10, 20))
    seen: list[int] = []

    def invents(source: Any, position: Any) -> Any:
        seen.extend(position.tolist())
        return torch.ones_like(source)

    got = synthesize.synthesize_volume(replace(made, method=invents), values, affine).values
    assert seen == list(range(15))
    assert (got[:15] == 20).all()
    assert (got[15:] == 10).all()


@pytest.mark.parametrize("direction", ["t1->t2", "t2->t1"])
def test_evaluation_and_synthesis_generate_the_same_slices(
    direction: str, published: Refreshed, tmp_path: Path
) -> None:
    """Put through as a file, a slab of the store becomes what evaluation generates from it, on the same planes."""
    (tmp_path / "datasets").symlink_to(published.folder.parents[1])
    run = prepare(tmp_path, TrainConfig.model_validate(SMALL | {"direction": direction}), "a")
    path = train_run(run)
    made = synthesize.load(path)
    source, _ = made.direction
    pairs = data.load(published.folder, "train", direction)
    rows = manifest.used(dataset.read_manifest(published.folder))
    row = rows[rows["subject_id"] == pairs.subjects[0]].iloc[0]
    arrays = open_arrays(published.folder)
    slab, affine = (np.asarray(arrays[name][row["store_row"]]) for name in (source, f"{source}_affine"))
    index = torch.nonzero(pairs.subject == 0).flatten()
    method = generated_by(load_generator(path)[0])
    with torch.no_grad():
        wanted = torch.cat([method(pairs.normalised(part)[0], part) for part in index.split(BATCH)])[:, 0].numpy()
    stored = tmp_path / "slab.nii.gz"
    stored.write_bytes(pack(slab, affine))
    low, high = made.planes.target_low_high
    out = synthesize.synthesize_file(made, stored, tmp_path / "out.nii")
    np.testing.assert_allclose(nib.load(out).get_fdata().T, (wanted + 1) / 2 * (high - low) + low, atol=0.51)
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["SourceRange"] == pytest.approx([row[f"{source}_p_low"], row[f"{source}_p_high"]])


# -- what the run says of its training --------------------------------------------------------------------------------


def test_the_run_says_on_which_planes_it_was_trained(loaded: Trained, published: Refreshed) -> None:
    table = manifest.used(dataset.read_manifest(published.folder))
    rows = table[table["split"] == "train"]
    wanted = loaded.planes
    slices, height, width = open_arrays(published.folder)["t2"].shape[1:]
    assert wanted.shape == (height, width)
    assert wanted.spacing_mm == pytest.approx((3.75, 3.75))  # the phantom's, a quarter of IXI's resolution
    assert wanted.slab_mm == pytest.approx(slices * 5)
    assert wanted.source_spacing_mm == pytest.approx((4.8, 3.75, 3.75))  # sagittal slices of 4.8 mm
    assert wanted.target_low_high == pytest.approx((rows["t2_p_low"].median(), rows["t2_p_high"].median()))
    assert sum(wanted.source_histogram) == pytest.approx(1, abs=1e-4)
    assert planes.distance(wanted.source_histogram, wanted.target_histogram) > 0.05


def test_the_slab_lies_where_the_training_s_window_lay(published: Refreshed, loaded: Trained) -> None:
    row = manifest.used(dataset.read_manifest(published.folder)).iloc[0]
    depth = json.loads(row["t2_shape"])[2]
    slab = planes.slab_of(loaded.planes, depth, 5.0)
    assert (slab.start, slab.stop) == (row["t2_window_start"], row["t2_window_stop"])
    higher = loaded.planes.model_copy(update={"slab_offset_mm": loaded.planes.slab_offset_mm + 10})
    assert planes.slab_of(higher, depth, 5.0).start == slab.start + 2
    assert planes.slab_of(loaded.planes, 3, 5.0) == slice(0, 3)


# -- refusals and warnings --------------------------------------------------------------------------------------------


def contradicting(plain: bytes, sform: np.ndarray, code: int) -> bytes:
    """The same file with another sform."""
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
        "not finite": (nifti_of(broken, affine), "voxels that are NaN or infinite"),
        "empty": (nifti_of(values * 0, affine), "it is empty: it has no voxel above 0"),
        "empty and wide": (
            nifti_of(np.full((20, 60, 60), 5.0, np.float32), affine),
            "it is empty: it has no voxel above",
        ),
        "empty in the middle": (
            nifti_of(np.where(np.arange(20)[:, None, None] < 2, values, 0).astype(np.float32), affine),
            "it is empty: its middle 14 mm hold no other value than 0",
        ),
        "in metres": (nifti_of(values, affine @ np.diag([1e-3, 1e-3, 1e-3, 1])), "is the header's spacing in mm?"),
        "a mirrored sform": (
            contradicting(nifti_of(values, affine), np.diag([-1.0, 1, 1, 1]) @ affine, 1),
            "sform and qform contradict each other: one is the other's mirror image",
        ),
        "a shifted sform": (
            contradicting(nifti_of(values, affine), rigid((0, 0, 0), (0, 5, 0)) @ affine, 2),
            "aligned space (code 2), but put a voxel 5 mm apart",
        ),
        "thick slices": (nifti_of(values, affine @ np.diag([1, 1, 10, 1])), "voxels of 2 x 2 x 20 mm"),
        "cut short": (packed[: len(packed) // 2], "is cut short"),
        "a plain file cut short": (nifti_of(values, affine)[:-1], "the header announces"),
        "not NIfTI": (b"<html>403 Forbidden</html>" * 40, "not a NIfTI file"),
    }


@pytest.mark.parametrize("what", bad_inputs())
def test_what_cannot_be_used_is_refused_in_one_line(what: str, tmp_path: Path) -> None:
    contents, said = bad_inputs()[what]
    path = tmp_path / "x.nii.gz"
    path.write_bytes(contents)
    with pytest.raises(SynthesisError) as error:
        synthesize.synthesize_file(identity(), path, tmp_path / "out.nii.gz")
    assert str(error.value).startswith(f"{path} cannot be used: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == [path]


def test_another_spacing_is_warned_of(tmp_path: Path) -> None:
    affine = grid_affine((20, 20, 10), (2, 2, 4), "LAS")
    made = synthesize.synthesize_volume(identity(), head((20, 20, 10), affine), affine)
    assert made.warnings[0].startswith("voxels of 2 x 2 x 4 mm (along x, y, z) are far from the 2 x 2 x 2 mm")


def test_a_template_beside_the_scanner_is_warned_of_and_the_scanner_s_planes_are_used(tmp_path: Path) -> None:
    affine = grid_affine((20, 20, 20), (2, 2, 2), "LAS")
    plain = nifti_of(head((20, 20, 20), affine), affine, qform=1)
    both = contradicting(plain, rigid((90, 0, 0), (0, 0, 0)) @ affine @ np.diag([1.1, 1.1, 1.1, 1]), 4)
    made = []
    for name, contents in (("plain", plain), ("both", both)):
        (tmp_path / f"{name}.nii").write_bytes(contents)
        out = synthesize.synthesize_file(identity(), tmp_path / f"{name}.nii", tmp_path / f"{name}-T2.nii")
        made.append(nib.load(out))
        warnings = json.loads((tmp_path / f"{name}-T2.json").read_text())["Warnings"]
        assert any("two spaces, scanner (code 1) and MNI152 (code 4)" in said for said in warnings) == (name == "both")
    np.testing.assert_array_equal(made[0].dataobj, made[1].dataobj)
    np.testing.assert_array_equal(made[1].get_sform(), nib.Nifti1Header(both[:348]).get_sform())


def volume_of(folder: Path, name: str) -> bytes:
    import tarfile

    with tarfile.open(folder / f"IXI-{name[-9:-7]}.tar") as tar:
        member = tar.extractfile(name)
        assert member is not None
        return member.read()


def test_the_wrong_modality_is_suspected_and_the_right_one_is_not(
    archives: Path, published: Refreshed, loaded: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for row in manifest.used(dataset.read_manifest(published.folder)).itertuples():
        for member, wrong in ((row.t1_member, False), (row.t2_member, True)):
            path = tmp_path / str(member)
            path.write_bytes(volume_of(archives, str(member)))
            out = synthesize.synthesize_file(loaded, path, tmp_path / "out.nii.gz")
            said = json.loads(out.with_name("out.json").read_text())["Warnings"]
            assert any("looks more like a T2 than a T1" in line for line in said) is wrong, member
    assert "is it the right file?" in caplog.text


@pytest.mark.parametrize(
    ("pairing", "line"), [("index", "was trained on slices paired by index"), ("digits", "was trained on digits")]
)
def test_a_run_on_no_planes_of_a_head_is_refused(
    pairing: str, line: str, archives: Path, tmp_path: Path, root: Path
) -> None:
    path = root / "runs" / "a" / "generator.safetensors"
    weights, facts = checkpoint.load(path)
    if pairing == "digits":
        facts["config"]["dataset"] = "digits@0123"
        facts["planes"] = None
        path = tmp_path / "generator.safetensors"
        checkpoint.save(path, weights, facts)
    else:
        from conftest import config_for

        from ixi_etl.refresh import refresh

        refresh(config_for(tmp_path, archives, pairing="index"))
        path = train_run(prepare(tmp_path, TrainConfig.model_validate(SMALL), "a"))
    with pytest.raises(SynthesisError, match=line):
        synthesize.load(path)


@pytest.mark.parametrize(
    ("to_source", "to_target", "warned"),
    [(0.5, 0.02, True), (0.1, 0.04, True), (0.06, 0.04, False), (0.9, 0.3, False), (0.02, 0.5, False)],
)
def test_only_what_is_near_to_the_targets_is_called_one_of_them(
    to_source: float, to_target: float, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A T1 of another protocol is far from both histograms, and often nearer to that of the T2s."""
    made = identity()
    distances = {made.planes.source_histogram: to_source, made.planes.target_histogram: to_target}
    monkeypatch.setattr(planes, "distance", lambda _, other: distances[other])
    affine = grid_affine((20, 20, 20), (2, 2, 2), "LAS")
    warnings = synthesize.synthesize_volume(made, head((20, 20, 20), affine), affine).warnings
    assert any("looks more like a T2 than a T1" in line for line in warnings) is warned


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
def test_a_name_that_says_the_wrong_modality_is_warned_of(name: str, warned: bool, tmp_path: Path) -> None:
    affine = grid_affine((20, 20, 20), (2, 2, 2), "LAS")
    (tmp_path / name).write_bytes(nifti_of(head((20, 20, 20), affine), affine))
    synthesize.synthesize_file(identity(), tmp_path / name, tmp_path / "out.nii")
    said = json.loads((tmp_path / "out.json").read_text())["Warnings"]
    assert any("by its name it is a T2" in line for line in said) is warned


def test_a_generator_is_shown_planes_with_a_head_and_no_empty_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (12, 12, 200)
    affine = grid_affine(shape, (2, 2, 2), "LAS")
    values = head(shape, affine)
    values[:80] = values[120:] = 0
    batches = []

    def recorded(source: Any, _: Any) -> Any:
        batches.append(len(source))
        return source

    monkeypatch.setattr(synthesize, "BLOCK_PIXELS", 1)
    made = synthesize.synthesize_volume(replace(identity(), method=recorded), values, affine)
    assert 0 < min(batches) <= max(batches) <= BATCH
    assert sum(batches) <= 40
    assert not made.values[:80].any()


# -- blocks, scales, shapes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", ["LAS", "PSR", "RSA", "LPI", "AIR"])
def test_blocks_of_planes_give_what_all_planes_at_once_give(orientation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (41, 43, 47)
    affine = rigid((9, -4, 6), (1, -2, 3)) @ grid_affine(shape, (2.1, 1.9, 2.2), orientation)
    values = head(shape, affine)
    made = identity((40, 40), 1.7, (0, 1000))
    whole = synthesize.synthesize_volume(made, values, affine)
    sizes = []
    resample = synthesize.align.resample

    def recorded(volume: Any, matrix: Any, size: tuple[int, ...]) -> Any:
        sizes.append(size)
        return resample(volume, matrix, size)

    monkeypatch.setattr(synthesize.align, "resample", recorded)
    monkeypatch.setattr(synthesize, "BLOCK_PIXELS", 1)
    blocks = synthesize.synthesize_volume(made, values, affine)
    np.testing.assert_allclose(blocks.values, whole.values, atol=2e-3)
    assert blocks.source_low_high == whole.source_low_high
    assert blocks.warnings == whole.warnings
    assert len(sizes) > 5
    assert max(np.prod(size) for size in sizes) <= BATCH * 47**2  # however many planes there are


@pytest.mark.parametrize("slope", [1.0, 2.0, -0.5])
def test_the_header_s_scale_changes_nothing_but_the_units(slope: float) -> None:
    shape = (20, 22, 18)
    affine = grid_affine(shape, (2, 2, 2), "LAS")
    units = np.rint(head(shape, affine)).astype(np.int16)
    stored = ((units - 7) / slope).astype(np.float32)
    plain = synthesize.synthesize_volume(identity(low_high=(0, 1000)), units, affine)
    scaled = synthesize.synthesize_volume(identity(low_high=(0, 1000)), stored, affine, scale=(slope, 7.0))
    assert scaled.source_low_high == pytest.approx(plain.source_low_high, abs=0.01)
    np.testing.assert_allclose(scaled.values, plain.values, atol=0.1)


@pytest.mark.parametrize("trailing", [(), (1,), (1, 1), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_the_output_has_the_input_s_shape(trailing: tuple[int, ...], kind: Any, tmp_path: Path) -> None:
    affine = grid_affine((20, 22, 18), (2, 2, 2), "LAS")
    image = kind(head((20, 22, 18), affine).T.reshape((20, 22, 18, *trailing)), affine)
    source = tmp_path / "x.nii"
    image.to_filename(source)
    out = synthesize.synthesize_file(identity(), source, tmp_path / "out.nii.gz")
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
    out = synthesize.synthesize_file(identity(), tmp_path / name, tmp_path / "out.nii")
    # nibabel writes the sizes and codes of extensions in the machine's own order, whatever the header's is.
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
    with pytest.raises(SynthesisError, match=r"x.nii.gz cannot be used: it has 512 x 512 x 513 voxels; 134217728 are"):
        synthesize.synthesize_file(identity(), path, tmp_path / "out.nii")


# -- files and the command --------------------------------------------------------------------------------------------


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
    assert synthesize.plan([tmp_path], tmp_path / "out", ("t1", "t2")) == [
        (tmp_path / name, tmp_path / "out" / renamed)
    ]


def test_a_direction_is_taken_as_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "x-T1.nii").touch()
    ((_, out),) = synthesize.plan([tmp_path / "x-T1.nii"], tmp_path / "out", ("t1", r"a\1"))
    assert out.name == r"x-A\1.nii"


@pytest.mark.parametrize("direction", ["x->/../../PWNED/EVIL", "t1->t2/..", r"t1->\1", "t1", "->t2", None])
def test_a_generator_cannot_say_where_outputs_are_written(direction: str | None, root: Path, tmp_path: Path) -> None:
    path = with_facts(root, tmp_path, config={"direction": direction})
    with pytest.raises(CheckpointError, match=r"the direction in .* cannot be used: .* is not SOURCE->TARGET"):
        synthesize.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [0, 0]},
        {"shape": [-5, 32]},
        {"shape": [200_000, 200_000]},
        {"spacing_mm": [0, 0]},
        {"spacing_mm": [float("nan")] * 2},
        {"source_spacing_mm": [0, 0, 0]},
        {"slab_mm": float("nan")},
        {"slab_mm": 0},
        {"slab_offset_mm": float("inf")},
        {"target_low_high": [float("nan"), 1]},
        {"target_low_high": [0, 1e308]},
        {"source_histogram": [1]},
    ],
    ids=str,
)
def test_planes_that_cannot_be_are_refused_in_a_line(change: dict[str, Any], root: Path, tmp_path: Path) -> None:
    path = with_facts(root, tmp_path, planes=change)
    for use in (synthesize.load, lambda path: export.export(path, "safetensors", tmp_path / "out")):
        with pytest.raises(CheckpointError, match=r"the planes in .* cannot be used: ") as error:
            use(path)
        assert "\n" not in str(error.value)


def with_facts(root: Path, folder: Path, **changes: dict[str, Any]) -> Path:
    """A copy of the generator of run `a` whose facts are changed."""
    weights, facts = checkpoint.load(root / "runs" / "a" / "generator.safetensors")
    facts |= {name: facts[name] | change for name, change in changes.items()}
    checkpoint.save(folder / "hostile.safetensors", weights, facts)
    return folder / "hostile.safetensors"


def command(root: Path, *arguments: Any, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), "--root", str(root)])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def test_the_command_takes_files_and_folders_and_leaves_out_what_it_cannot_use(
    archives: Path, published: Refreshed, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = manifest.used(dataset.read_manifest(published.folder))["t1_member"].tolist()[:2]
    (tmp_path / "in").mkdir()
    for member in members:
        (tmp_path / "in" / member).write_bytes(volume_of(archives, member))
    one = tmp_path / "in" / members[0]
    code, out, _ = command(root, "synthesize", "a", one, "-o", tmp_path / "T2.nii.gz", capsys=capsys)
    assert (code, out.strip()) == (0, str(tmp_path / "T2.nii.gz"))
    first, made = nib.load(one), nib.load(tmp_path / "T2.nii.gz")
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
    there = {p.name for p in (tmp_path / "all").glob("*.nii.gz")}
    assert there == {m.replace("T1", "T2") for m in members}
    assert (tmp_path / "all" / members[0].replace("T1", "T2")).read_bytes() == (tmp_path / "T2.nii.gz").read_bytes()


def test_dropout_is_noise_that_its_seed_repeats(root: Path, tmp_path: Path) -> None:
    affine = grid_affine((40, 40, 12), (3.75, 3.75, 5), "LAS")
    values = head((40, 40, 12), affine @ np.diag([0.3, 0.3, 0.5, 1]))
    path = synthesize.find_generator(root, "a")

    def made(**options: Any) -> np.ndarray:
        loaded = synthesize.load(path, **options)
        return synthesize.synthesize_volume(loaded, values, affine).values

    assert np.array_equal(made(), made(seed=1))
    assert np.array_equal(made(dropout=True, seed=1), made(dropout=True, seed=1))
    assert not np.array_equal(made(dropout=True, seed=1), made(dropout=True, seed=2))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["zz", "x.nii", "-o", "y.nii"], "there is no run zz in"),
        (["a", "nowhere.nii", "-o", "y.nii"], "nowhere.nii is not there"),
        (["a", "README.md", "-o", "y.nii"], "README.md is no NIfTI file by its name"),
        (["a", "x.nii", "z.nii", "-o", "y.nii"], "is one file, and there may be several to write; give a folder"),
        (["a", "nowhere.nii", "-o", "nowhere.nii"], "nowhere.nii is not there"),
        (["a", "x.nii", "-o", "y.nii", "--device", "cuda:9"], "device cuda:9 is not to be had here"),
        (["a", "x.nii", "-o", "y.nii", "--device", "meta"], "device meta is not to be had here"),
        (["a", "x.nii", "-o", "y.nii", "--seed", str(10**23)], "is no number of 64 bits; give a smaller one"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], line: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = command(root, "synthesize", *arguments, capsys=capsys)
    assert (code, out) == (1, "")
    assert line in err
    assert err.count("\n") == 1


def test_nothing_is_written_over_an_input_or_twice(tmp_path: Path) -> None:
    (tmp_path / "a-T1.nii").touch()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a-T1.nii").touch()
    direction = ("t1", "t2")
    with pytest.raises(SynthesisError, match="is an input, or would be written twice"):
        synthesize.plan([tmp_path / "a-T1.nii"], tmp_path / "a-T1.nii", direction)
    with pytest.raises(SynthesisError, match="is an input, or would be written twice"):
        synthesize.plan([tmp_path / "a-T1.nii", tmp_path / "b"], tmp_path / "out", direction)
    (tmp_path / "c").mkdir()
    with pytest.raises(SynthesisError, match="has no volume in it"):
        synthesize.plan([tmp_path / "c"], tmp_path / "out", direction)
    (tmp_path / "c" / "a-T1.nii").touch()
    (tmp_path / "c" / "a-T1.nii.gz").touch()
    with pytest.raises(SynthesisError, match=r"a-T2.json is an input, or would be written twice"):
        synthesize.plan([tmp_path / "c"], tmp_path / "out", direction)


def test_what_is_no_volume_in_a_folder_is_passed_over_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scans = tmp_path / "scans"
    (scans / "a-folder.nii.gz").mkdir(parents=True)
    (scans / "sub-01").mkdir()
    for name in ("a-T1.nii.gz", "B-T1.NII.GZ", "._a-T1.nii.gz", ".DS_Store", ".hidden.nii", "README.txt"):
        (scans / name).touch()
    (scans / "link-T1.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    os.mkfifo(scans / "pipe-T1.nii")
    (tmp_path / "0123").touch()
    (scans / "z-T1.nii.gz").symlink_to(tmp_path / "0123")  # as a content-addressed store has it: the link's name counts
    jobs = synthesize.plan([scans], tmp_path / "out", ("t1", "t2"))
    assert [out.name for _, out in jobs] == ["B-T2.nii.gz", "a-T2.nii.gz", "z-T2.nii.gz"]
    assert "3 hidden files are passed over (.DS_Store ...)" in caplog.text
    for name in ("a-folder.nii.gz", "link-T1.nii.gz", "pipe-T1.nii"):
        assert f"{scans / name} is passed over" in caplog.text


def test_a_folder_of_folders_names_one_to_give(tmp_path: Path) -> None:
    (tmp_path / "sub-01").mkdir()
    with pytest.raises(
        SynthesisError, match=r"has no volume in it .*; give one of the 1 folders in it, such as sub-01"
    ):
        synthesize.plan([tmp_path], tmp_path / "out", ("t1", "t2"))


def test_what_another_program_wrote_is_not_overwritten(tmp_path: Path) -> None:
    affine = grid_affine((20, 22, 18), (2, 2, 2), "LAS")
    source = tmp_path / "a_T1w.nii.gz"
    source.write_bytes(gzip.compress(nifti_of(head((20, 22, 18), affine), affine)))
    jobs = synthesize.plan([source], tmp_path, ("t1", "t2"))
    synthesize.synthesize(identity(), jobs)
    assert synthesize.plan([source], tmp_path, ("t1", "t2")) == jobs  # its own work may be done again
    (tmp_path / "a_T2w.json").write_text("{}")
    with pytest.raises(SynthesisError, match=r"a_T2w.json is there, and no work of this command"):
        synthesize.plan([source], tmp_path, ("t1", "t2"))
    (tmp_path / "a_T2w.nii.gz").write_bytes(source.read_bytes())
    with pytest.raises(SynthesisError, match=r"a_T2w.nii.gz is there, and no work of this command"):
        synthesize.plan([source], tmp_path, ("t1", "t2"))


@pytest.mark.parametrize("out", ["file/made", "file"])
def test_an_output_folder_that_cannot_be_written_is_one_line_before_any_work(out: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    jobs = [(tmp_path / "a-T1.nii", tmp_path / out / "a-T2.nii")]
    with pytest.raises(SynthesisError, match=r"cannot write to .*; give another -o"):
        synthesize.synthesize(identity(), jobs)


def test_an_input_that_cannot_be_read_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    affine = grid_affine((20, 22, 18), (2, 2, 2), "LAS")
    for name in ("a-T1.nii", "b-T1.nii"):
        (tmp_path / name).write_bytes(nifti_of(head((20, 22, 18), affine), affine))
    read = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path.name == "a-T1.nii":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    jobs = synthesize.plan([tmp_path], tmp_path / "out", ("t1", "t2"))
    with pytest.raises(SynthesisError, match=r"1 of 2 inputs could not be used; .*a-T1.nii .*: Permission denied"):
        synthesize.synthesize(identity(), jobs)
    assert (tmp_path / "out" / "b-T2.nii").is_file()


@pytest.mark.parametrize("low_high", [(0.0, 1.0), (-0.02, 0.5), (0.0, 250_000.0), (5e6, 5.1e6), (3.0, 1500.0)])
def test_a_target_s_units_are_kept_however_small_or_large(low_high: tuple[float, float], tmp_path: Path) -> None:
    grid = grid_affine((24, 24, 24), (2, 2, 2), "RAS")
    values = head((24, 24, 24), grid)
    (tmp_path / "a.nii.gz").write_bytes(nifti_of(values, grid))
    trained = identity(low_high=low_high)
    made = synthesize.synthesize_volume(trained, values, grid)
    image = nib.load(synthesize.synthesize_file(trained, tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"))
    assert image.get_data_dtype() == np.int16
    low, high = low_high
    error = 0.5001 if low_high == (3.0, 1500.0) else (high - low) / 60_000
    assert np.abs(image.get_fdata().T - made.values).max() <= error
