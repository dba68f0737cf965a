"""A volume is resampled to the training's planes and back to its own grid; unusual inputs give warnings."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import SMALL_NETWORKS
from heads import head, identity, nifti_of, t1, volume_of
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples
from strategies import ORIENTATIONS

from ixi_etl.dataset import manifest, metadata
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.dataset.store import open_arrays
from ixi_etl.errors import CheckpointError, SynthesisError
from ixi_etl.testing.phantom import grid_affine, pack_nifti, rigid
from model import checkpoint, data, export, planes, synthesize, volumes
from model.config import TrainConfig
from model.generator import BATCH, as_predictor, load_generator
from model.jobs import prepare_run, train_run
from model.synthesize import Trained

SMALL = SMALL_NETWORKS | {"steps": 2, "samples": 0}


@pytest.fixture(scope="module")
def root(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a run `a`, without its dataset."""
    root = tmp_path_factory.mktemp("synthesis")
    shutil.copytree(trained / "runs", root / "runs")
    return root


@pytest.fixture(scope="module")
def loaded(root: Path) -> Trained:
    return synthesize.load_trained(synthesize.find_generator(root, "a"))


@pytest.mark.parametrize(
    ("orientation", "tilt_deg"),
    [*((orientation, 9) for orientation in ORIENTATIONS), ("RAS", 0), ("PSR", 0), ("LIA", 0)],
)
def test_an_identity_generator_returns_the_input_for_every_orientation(
    orientation: str, tilt_deg: float, tmp_path: Path
) -> None:
    shape = (28, 29, 30)
    affine = rigid((tilt_deg, -tilt_deg, tilt_deg / 2), (1, -2, 3)) @ grid_affine(shape, (2.1, 1.9, 2.2), orientation)
    values = head(shape, affine)
    source = tmp_path / "x-T1.nii"
    source.write_bytes(nifti_of(values, affine))
    trained = identity((40, 40), 1.7)
    low, high = synthesize.synthesize_volume(trained, t1(values, affine)).source_low_high["t1"]
    out = volumes.synthesize_file(identity((40, 40), 1.7, (low, high)), source, tmp_path / "out.nii.gz")
    before, after = nib.load(source), nib.load(out)
    np.testing.assert_array_equal(after.affine, before.affine)
    for form in ("qform", "sform"):
        (old, old_code), (new, new_code) = (getattr(i, f"get_{form}")(coded=True) for i in (before, after))
        np.testing.assert_array_equal(new, old)
        assert new_code == old_code
    assert after.shape == before.shape
    assert after.header.get_zooms() == before.header.get_zooms()
    assert after.get_data_dtype() == np.int16
    error = np.abs(after.get_fdata().T - values.clip(low, high))
    assert error.max() <= 45  # of 1000: two linear interpolations flatten peaks
    assert error.mean() <= 3


@settings(max_examples=examples(40))
@given(orientation=st.sampled_from(ORIENTATIONS), shape=st.tuples(*[st.integers(5, 24)] * 3))
def test_a_volume_with_the_training_spacing_is_not_interpolated(orientation: str, shape: tuple[int, int, int]) -> None:
    affine = rigid((5, 4, -3), (2, 1, 0)) @ grid_affine(shape, (2.0, 2.0, 2.0), orientation)
    values = np.random.default_rng(0).uniform(0, 1000, shape[::-1]).astype(np.float32)
    trained = identity()
    low, high = synthesize.synthesize_volume(trained, t1(values, affine)).source_low_high["t1"]
    again = synthesize.synthesize_volume(identity(low_high=(low, high)), t1(values, affine))
    np.testing.assert_allclose(again.values, values.clip(low, high), atol=0.01)


def test_a_volume_wider_than_a_training_slice_is_centred_on_its_head() -> None:
    shape = (60, 24, 20)
    affine = grid_affine(shape, (2.0, 2.0, 2.0), "RAS")
    affine[0, 3] -= 25  # the head, at the world's origin, is far from the middle of the volume
    values = head(shape, affine)
    made = synthesize.synthesize_volume(identity(), t1(values, affine))
    low, high = made.source_low_high["t1"]
    again = synthesize.synthesize_volume(identity(low_high=(low, high)), t1(values, affine))
    np.testing.assert_allclose(again.values[values > 200], values[values > 200].clip(low, high), atol=0.01)
    assert made.warnings == []
    too_small = synthesize.synthesize_volume(identity(shape=(8, 8)), t1(values, affine))
    assert "of the head is outside the 16 x 16 mm of a training slice" in too_small.warnings[0]


def test_planes_without_a_head_are_left_empty() -> None:
    affine = grid_affine((24, 24, 20), (2.0, 2.0, 2.0), "RAS")
    values = head((24, 24, 20), affine)
    values[15:] *= 0.1  # noisy air above the head
    trained = identity(low_high=(10, 20))
    seen: list[int] = []

    def draws_everywhere(source: Any, position: Any) -> Any:
        seen.extend(position.tolist())
        return torch.ones_like(source)

    got = synthesize.synthesize_volume(replace(trained, predict=draws_everywhere), t1(values, affine)).values
    assert seen == list(range(15))
    assert (got[:15] == 20).all()
    assert (got[15:] == 10).all()


@pytest.mark.parametrize("direction", ["t1->t2", "t2->t1"])
def test_evaluation_and_synthesis_generate_the_same_slices(
    direction: str, published: PublishedVersion, tmp_path: Path
) -> None:
    """Synthesis of a slab of the store, written as a file, equals what evaluation generates from it."""
    (tmp_path / "datasets").symlink_to(published.folder.parents[1])
    run = prepare_run(tmp_path, TrainConfig.model_validate(SMALL | {"direction": direction}), "a")
    path = train_run(run)
    trained = synthesize.load_trained(path)
    (source,) = trained.direction.sources
    pairs = data.load_pairs(published.folder, "train", direction)
    rows = manifest.used_rows(metadata.read_manifest(published.folder))
    row = rows[rows["subject_id"] == pairs.subjects[0]].iloc[0]
    arrays = open_arrays(published.folder)
    slab, affine = (np.asarray(arrays[name][row["store_row"]]) for name in (source, f"{source}_affine"))
    index = torch.nonzero(pairs.subject == 0).flatten()
    method = as_predictor(load_generator(path)[0])
    with torch.no_grad():
        wanted = torch.cat([method(pairs.normalised(part)[0], part) for part in index.split(BATCH)])[:, 0].numpy()
    stored = tmp_path / "slab.nii.gz"
    stored.write_bytes(pack_nifti(slab, affine))
    low, high = trained.planes.target_low_high
    out = volumes.synthesize_file(trained, stored, tmp_path / "out.nii")
    np.testing.assert_allclose(nib.load(out).get_fdata().T, (wanted + 1) / 2 * (high - low) + low, atol=0.51)
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["SourceRange"] == pytest.approx([row[f"{source}_p_low"], row[f"{source}_p_high"]])


def test_the_generator_records_its_training_planes(loaded: Trained, published: PublishedVersion) -> None:
    table = manifest.used_rows(metadata.read_manifest(published.folder))
    rows = table[table["split"] == "train"]
    wanted = loaded.planes
    slices, height, width = open_arrays(published.folder)["t2"].shape[1:]
    assert wanted.shape == (height, width)
    assert wanted.spacing_mm == pytest.approx((3.75, 3.75))  # the phantom's, a quarter of IXI's resolution
    assert wanted.slab_mm == pytest.approx(slices * 5)
    (source,) = wanted.sources
    assert source.spacing_mm == pytest.approx((4.8, 3.75, 3.75))  # sagittal slices of 4.8 mm
    assert wanted.slice_mm == pytest.approx(5)
    assert wanted.target_low_high == pytest.approx((rows["t2_p_low"].median(), rows["t2_p_high"].median()))
    assert sum(source.histogram) == pytest.approx(1, abs=1e-4)
    assert planes.histogram_distance(source.histogram, wanted.target_histogram) > 0.05


def test_the_slab_is_at_the_position_of_the_training_window(published: PublishedVersion, loaded: Trained) -> None:
    row = manifest.used_rows(metadata.read_manifest(published.folder)).iloc[0]
    depth = json.loads(row["t2_shape"])[2]
    slab = planes.trained_slab(loaded.planes, depth, 5.0)
    assert (slab.start, slab.stop) == (row["t2_window_start"], row["t2_window_stop"])
    higher = loaded.planes.model_copy(update={"slab_offset_mm": loaded.planes.slab_offset_mm + 10})
    assert planes.trained_slab(higher, depth, 5.0).start == slab.start + 2
    assert planes.trained_slab(loaded.planes, 3, 5.0) == slice(0, 3)


def test_another_spacing_gives_a_warning(tmp_path: Path) -> None:
    affine = grid_affine((20, 20, 10), (2, 2, 4), "LAS")
    made = synthesize.synthesize_volume(identity(), t1(head((20, 20, 10), affine), affine))
    assert made.warnings[0].startswith("voxels of 2 x 2 x 4 mm (along x, y, z) are far from the 2 x 2 x 2 mm")


def test_only_a_scan_of_the_wrong_modality_gives_a_warning(
    archives: Path, published: PublishedVersion, loaded: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for row in manifest.used_rows(metadata.read_manifest(published.folder)).itertuples():
        for member, wrong in ((row.t1_member, False), (row.t2_member, True)):
            path = tmp_path / str(member)
            path.write_bytes(volume_of(archives, str(member)))
            out = volumes.synthesize_file(loaded, path, tmp_path / "out.nii.gz")
            warnings = json.loads(out.with_name("out.json").read_text())["Warnings"]
            assert any("looks more like a T2 than a T1" in warning for warning in warnings) is wrong, member
    assert "is it the right file?" in caplog.text


@pytest.mark.parametrize(
    ("pairing", "message"), [("index", "was trained on slices paired by index"), ("digits", "was trained on digits")]
)
def test_a_generator_not_trained_on_axial_planes_is_refused(
    pairing: str, message: str, archives: Path, tmp_path: Path, root: Path
) -> None:
    path = root / "runs" / "a" / "generator.safetensors"
    weights, recorded = checkpoint.load(path)
    if pairing == "digits":
        recorded["config"]["dataset"] = "digits@0123"
        recorded["planes"] = None
        path = tmp_path / "generator.safetensors"
        checkpoint.save(path, weights, recorded)
    else:
        from conftest import config_for

        from ixi_etl.recipes.ixi import refresh

        refresh(config_for(tmp_path, archives, pairing="index"))
        path = train_run(prepare_run(tmp_path, TrainConfig.model_validate(SMALL), "a"))
    with pytest.raises(SynthesisError, match=message):
        synthesize.load_trained(path)


@pytest.mark.parametrize(
    ("to_source", "to_target", "warned"),
    [(0.5, 0.02, True), (0.1, 0.04, True), (0.06, 0.04, False), (0.9, 0.3, False), (0.02, 0.5, False)],
)
def test_only_histograms_near_the_targets_give_a_warning(
    to_source: float, to_target: float, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A T1 of another protocol is far from both histograms, and often nearer to the T2s'."""
    trained = identity()
    distances = {trained.planes.sources[0].histogram: to_source, trained.planes.target_histogram: to_target}
    monkeypatch.setattr(planes, "histogram_distance", lambda _, other: distances[other])
    affine = grid_affine((20, 20, 20), (2, 2, 2), "LAS")
    warnings = synthesize.synthesize_volume(trained, t1(head((20, 20, 20), affine), affine)).warnings
    assert any("looks more like a T2 than a T1" in warning for warning in warnings) is warned


def test_only_planes_with_a_head_are_generated_and_no_batch_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (12, 12, 200)
    affine = grid_affine(shape, (2, 2, 2), "LAS")
    values = head(shape, affine)
    values[:80] = values[120:] = 0
    batches = []

    def recorded(source: Any, _: Any) -> Any:
        batches.append(len(source))
        return source

    monkeypatch.setattr(synthesize, "BLOCK_PIXELS", 1)
    made = synthesize.synthesize_volume(replace(identity(), predict=recorded), t1(values, affine))
    assert 0 < min(batches) <= max(batches) <= BATCH
    assert sum(batches) <= 40
    assert not made.values[:80].any()


@pytest.mark.parametrize("orientation", ["LAS", "PSR", "RSA", "LPI", "AIR"])
def test_the_result_does_not_depend_on_the_block_size(orientation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (41, 43, 47)
    affine = rigid((9, -4, 6), (1, -2, 3)) @ grid_affine(shape, (2.1, 1.9, 2.2), orientation)
    values = head(shape, affine)
    trained = identity((40, 40), 1.7, (0, 1000))
    one_block = synthesize.synthesize_volume(trained, t1(values, affine))
    sizes = []
    resample = synthesize.geometry.resample

    def recorded(volume: Any, matrix: Any, size: tuple[int, ...]) -> Any:
        sizes.append(size)
        return resample(volume, matrix, size)

    monkeypatch.setattr(synthesize.geometry, "resample", recorded)
    monkeypatch.setattr(synthesize, "BLOCK_PIXELS", 1)
    blocks = synthesize.synthesize_volume(trained, t1(values, affine))
    np.testing.assert_allclose(blocks.values, one_block.values, atol=2e-3)
    assert blocks.source_low_high == one_block.source_low_high
    assert blocks.warnings == one_block.warnings
    assert len(sizes) > 5
    assert max(np.prod(size) for size in sizes) <= BATCH * 47**2  # for any number of planes


@pytest.mark.parametrize("slope", [1.0, 2.0, -0.5])
def test_slope_and_intercept_change_only_the_units(slope: float) -> None:
    shape = (20, 22, 18)
    affine = grid_affine(shape, (2, 2, 2), "LAS")
    units = np.rint(head(shape, affine)).astype(np.int16)
    stored = ((units - 7) / slope).astype(np.float32)
    plain = synthesize.synthesize_volume(identity(low_high=(0, 1000)), t1(units, affine))
    scaled = synthesize.synthesize_volume(identity(low_high=(0, 1000)), t1(stored, affine, (slope, 7.0)))
    assert scaled.source_low_high["t1"] == pytest.approx(plain.source_low_high["t1"], abs=0.01)
    np.testing.assert_allclose(scaled.values, plain.values, atol=0.1)


@pytest.mark.parametrize("direction", ["x->/../../PWNED/EVIL", "t1->t2/..", r"t1->\1", "t1", "->t2", None])
def test_a_generator_cannot_choose_where_outputs_are_written(direction: str | None, root: Path, tmp_path: Path) -> None:
    path = with_metadata(root, tmp_path, config={"direction": direction})
    with pytest.raises(CheckpointError, match=r"the direction in .* cannot be used: .* is not SOURCE->TARGET"):
        synthesize.load_trained(path)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [0, 0]},
        {"shape": [-5, 32]},
        {"shape": [200_000, 200_000]},
        {"spacing_mm": [0, 0]},
        {"spacing_mm": [float("nan")] * 2},
        {"sources": [{"spacing_mm": [0, 0, 0], "histogram": [0] * 32}]},
        {"sources": []},
        {"sources": None},
        {"slab_mm": float("nan")},
        {"slab_mm": 0},
        {"slab_offset_mm": float("inf")},
        {"target_low_high": [float("nan"), 1]},
        {"target_low_high": [0, 1e308]},
        {"target_histogram": [1]},
    ],
    ids=str,
)
def test_invalid_planes_are_a_one_line_error(change: dict[str, Any], root: Path, tmp_path: Path) -> None:
    path = with_metadata(root, tmp_path, planes=change)
    for use in (synthesize.load_trained, lambda path: export.export(path, "safetensors", tmp_path / "out")):
        with pytest.raises(CheckpointError, match=r"the planes in .* cannot be used: ") as error:
            use(path)
        assert "\n" not in str(error.value)


def with_metadata(root: Path, folder: Path, **changes: dict[str, Any]) -> Path:
    """A copy of the generator of run `a` with changed metadata."""
    weights, recorded = checkpoint.load(root / "runs" / "a" / "generator.safetensors")
    recorded |= {name: recorded[name] | change for name, change in changes.items()}
    checkpoint.save(folder / "hostile.safetensors", weights, recorded)
    return folder / "hostile.safetensors"


def test_the_seed_reproduces_dropout(root: Path, tmp_path: Path) -> None:
    affine = grid_affine((40, 40, 12), (3.75, 3.75, 5), "LAS")
    values = head((40, 40, 12), affine @ np.diag([0.3, 0.3, 0.5, 1]))
    path = synthesize.find_generator(root, "a")

    def made(**options: Any) -> np.ndarray:
        loaded = synthesize.load_trained(path, **options)
        return synthesize.synthesize_volume(loaded, t1(values, affine)).values

    assert np.array_equal(made(), made(seed=1))
    assert np.array_equal(made(dropout=True, seed=1), made(dropout=True, seed=1))
    assert not np.array_equal(made(dropout=True, seed=1), made(dropout=True, seed=2))
