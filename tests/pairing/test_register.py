"""Registration finds and corrects motion between the scans; failures are flagged and never raise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import config_for
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from profiles import examples
from scipy.ndimage import zoom
from scipy.spatial.transform import Rotation
from strategies import world_of

from ixi_etl.config import DatasetConfig
from ixi_etl.dataset import manifest, metadata
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.dataset.store import open_arrays
from ixi_etl.pairing import geometry, heads, register, slabs
from ixi_etl.pairing.cut import CutJob, MemberRef, cut_subject, picture_path
from ixi_etl.pairing.geometry import trilinear
from ixi_etl.pairing.similarity import nmi
from ixi_etl.recipes.ixi import refresh
from ixi_etl.scans import gunzip, intensity, nifti
from ixi_etl.testing.phantom import PhantomSubject, grid_affine, pack_nifti, rigid, simulate, write_phantom

SHRINK = 2  # voxels of about 2 mm; at IXI's own grid, registration is measured in docs/registration.md


def scan_of(packed: bytes) -> heads.Volume:
    header = nifti.parse_header(gunzip.inflate_head(packed), len(packed))
    assert header.affine is not None
    return heads.Volume(
        nifti.stored_voxels(gunzip.inflate(packed, header.voxel_offset + header.voxel_bytes), header), header.affine
    )


@pytest.fixture(scope="module")
def still() -> tuple[heads.Volume, heads.Volume]:
    packed, motions = simulate(PhantomSubject(2, "Guys", seed=11, shrink=SHRINK))
    np.testing.assert_array_equal(motions["T1"], np.eye(4))
    return scan_of(packed["T1"]), scan_of(packed["T2"])


def error_mm(found: np.ndarray, true: np.ndarray, t2: heads.Volume) -> float:
    """Target registration error: mean distance over the middle slices' voxels."""
    slab, affine = geometry.axial_slab(t2.voxels, t2.affine, (25, 40))
    points = world_of(affine, slab.shape).reshape(-1, 3)
    difference = found - true
    return float(np.linalg.norm(points @ difference[:3, :3].T + difference[:3, 3], axis=1).mean())


MOTION = rigid((-3, 2, -4), (-3, 4, 2))
MOTIONS = [
    rigid((0, 0, 0), (0, 0, 0)),
    rigid((0, 0, 0), (3, -2, 4)),
    rigid((4, -3, 5), (0, 0, 0)),
    rigid((2, 2, 2), (6, 0, -5)),
]


def displaced(t2: heads.Volume, motion: np.ndarray) -> heads.Volume:
    """The T2 with a header that gives another position."""
    return heads.Volume(t2.voxels, np.linalg.inv(motion) @ t2.affine)


@pytest.fixture(scope="module")
def found(still: tuple[heads.Volume, heads.Volume]) -> register.Registration:
    """The estimate of `MOTION`."""
    t1, t2 = still
    return register.register(t1, displaced(t2, MOTION))


def test_known_motion_is_found(found: register.Registration, still: tuple[heads.Volume, heads.Volume]) -> None:
    assert error_mm(found.fixed_to_moving, MOTION, displaced(still[1], MOTION)) < 0.3


@pytest.mark.stack  # each takes seconds
@pytest.mark.parametrize("number", range(len(MOTIONS)))
def test_several_motions_are_found(number: int, still: tuple[heads.Volume, heads.Volume]) -> None:
    motion, (t1, t2) = MOTIONS[number], still
    moved = displaced(t2, motion)
    assert error_mm(register.register(t1, moved).fixed_to_moving, motion, moved) < 0.3


def test_a_search_can_find_an_affine_matrix(still: tuple[heads.Volume, heads.Volume]) -> None:
    """The T2's header is stretched by 3 and -2 per cent, and sheared."""
    t1, t2 = still
    stretch = np.eye(4)
    stretch[:3, :3] = [[1.03, 0.01, 0], [0, 0.98, 0], [0, 0, 1]]
    moved = displaced(t2, stretch)
    moving, fixed = heads.prepare(t1), heads.prepare(moved)
    found, _ = register._search(heads.FINE, fixed, moving, np.eye(4), is_affine=True)
    assert error_mm(np.eye(4), stretch, moved) > 1.0
    assert error_mm(found, stretch, moved) < 0.2


@pytest.mark.parametrize("spike", [32767, pytest.param(-32768, marks=pytest.mark.stack)])
def test_extreme_voxels_do_not_affect_registration(spike: int, still: tuple[heads.Volume, heads.Volume]) -> None:
    t1, t2 = (heads.Volume(scan.voxels.copy(), scan.affine) for scan in still)
    for scan in (t1, t2):
        scan.voxels[scan.voxels.shape[0] // 2, 5, 5:25] = spike
    moved = displaced(t2, MOTION)
    assert error_mm(register.register(t1, moved).fixed_to_moving, MOTION, moved) < 0.3


def test_averaged_blocks_keep_their_position(still: tuple[heads.Volume, heads.Volume]) -> None:
    for scan in still:
        voxels, affine = heads.averaged(scan, 8.0)
        factors = np.round(8 / np.linalg.norm(scan.affine[:3, :3], axis=0)).astype(int)
        i, j, k = factors
        assert voxels[1, 2, 3] == pytest.approx(scan.voxels[k : 2 * k, 2 * j : 3 * j, 3 * i : 4 * i].mean(), rel=1e-6)
        middle = factors * (3, 2, 1) + (factors - 1) / 2
        np.testing.assert_allclose(affine @ [3, 2, 1, 1], scan.affine @ [*middle, 1], atol=1e-6)
        assert voxels.shape == tuple(np.array(scan.voxels.shape) // factors[::-1])


def test_the_estimated_error_is_small_for_a_good_registration(
    found: register.Registration, still: tuple[heads.Volume, heads.Volume]
) -> None:
    slab, affine = geometry.axial_slab(still[1].voxels, still[1].affine, (25, 40))
    points = world_of(affine, slab.shape).reshape(-1, 3)
    assert found.error_mm(points, found.fixed_to_moving) < 1


def test_the_estimated_error_of_another_alignment_is_its_distance(
    found: register.Registration, still: tuple[heads.Volume, heads.Volume]
) -> None:
    points = np.random.default_rng(0).normal(0, 50, (100, 3))
    shifted = rigid((0, 0, 0), (3, 0, 4)) @ found.check
    assert found.error_mm(points, shifted) == pytest.approx(5, abs=1e-6)
    assert replace(found, disagreement_mm=7.0).error_mm(points, shifted) == 7


@pytest.mark.faults  # takes seconds
def test_a_header_that_exchanges_left_and_right_is_found(
    found: register.Registration, still: tuple[heads.Volume, heads.Volume]
) -> None:
    t1, t2 = still
    flipped = heads.Volume(t1.voxels, np.diag([-1.0, 1, 1, 1]) @ t1.affine)
    assert register.register(flipped, t2).is_mirrored
    assert not found.is_mirrored


def test_a_mirror_image_that_does_not_fit_either_is_no_exchange(
    still: tuple[heads.Volume, heads.Volume], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with scans of two people: the mirror image is a little more similar, but two searches disagree."""
    both = [heads.prepare(scan) for scan in reversed(still)]
    ends = iter([np.eye(4), rigid((0, 0, 0), (4, 0, 0))])
    monkeypatch.setattr(register, "_search", lambda *_, **__: (next(ends), 1.1))
    assert not register._fits_better_mirrored(*both, np.eye(4), similarity=1.0, is_poor=False)
    ends = iter([np.eye(4)] * 2)
    assert register._fits_better_mirrored(*both, np.eye(4), similarity=1.0, is_poor=False)
    ends = iter([np.eye(4)])
    assert not register._fits_better_mirrored(*both, np.eye(4), similarity=1.09, is_poor=False)


@pytest.mark.faults  # takes seconds
def test_more_starts_are_tried_if_two_searches_disagree(
    still: tuple[heads.Volume, heads.Volume], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first search is made to fail by 20 mm; the result is right all the same."""
    t1, t2 = still
    moved, search, calls = displaced(t2, MOTION), register._search, []

    def mislead(level: heads.Level, *arguments: Any, **options: Any) -> tuple[np.ndarray, float]:
        calls.append(level)
        if len(calls) == 1:
            return rigid((0, 0, 15), (20, 0, 0)), 0.0
        return search(level, *arguments, **options)

    monkeypatch.setattr(register, "_search", mislead)
    found = register.register(t1, moved)
    assert calls.count(heads.COARSE) >= 11
    assert error_mm(found.fixed_to_moving, MOTION, moved) < 0.3
    assert found.disagreement_mm > 15


@pytest.mark.parametrize(("slope", "intercept"), [(-1, 0), (2e-6, 1)])
def test_scale_and_sign_of_the_intensities_do_not_matter(
    slope: float, intercept: float, found: register.Registration, still: tuple[heads.Volume, heads.Volume]
) -> None:
    """With the last case, float32 has fewer values in the range of the head than the histogram has bins."""
    t1, t2 = still
    scaled = (t2.voxels * slope + intercept).astype(np.float32)
    rescaled = register.register(t1, displaced(heads.Volume(scaled, t2.affine), MOTION))
    assert error_mm(rescaled.fixed_to_moving, MOTION, displaced(t2, MOTION)) < 0.5  # the last case rounds the values
    assert not rescaled.is_mirrored


# -- similarity -------------------------------------------------------------------------------------------------------

images = arrays(np.int16, 4000, elements=st.integers(-500, 500)).filter(lambda a: a.min() != a.max())


@settings(max_examples=examples(40))
@given(images, st.integers(0, 2**32 - 1))
def test_nmi_is_between_0_and_1_symmetric_and_1_with_itself(a: np.ndarray, seed: int) -> None:
    b = np.random.default_rng(seed).normal(size=a.size)
    assert 0 <= nmi(a, b) <= 1
    assert nmi(a, b) == pytest.approx(nmi(b, a))
    if len(np.unique(np.clip(a, *np.percentile(a, (0.5, 99.5))))) > 1:
        assert nmi(a, a) == pytest.approx(1)
        assert nmi(a, 4.0 * a) == pytest.approx(1)  # a factor that moves no value into another bin


@settings(max_examples=examples(20))
@given(st.integers(0, 2**32 - 1), st.sampled_from([np.int16, np.uint16, np.int32]), st.floats(1, 3e4))
def test_nmi_by_histogram_equals_nmi_of_the_values(seed: int, dtype: type, spread: float) -> None:
    rng, limits = np.random.default_rng(seed), np.iinfo(np.int16)
    a = np.clip(rng.normal(0, spread, intensity.COUNT_ABOVE), limits.min, limits.max) + (
        32768 if dtype is np.uint16 else 0
    )
    b = np.round(a / 3 + rng.normal(0, spread / 9, a.size)).clip(limits.min, limits.max).astype(np.int16)
    a = a.astype(dtype)
    assert intensity.prefers_counting(a)
    assert nmi(a, b) == pytest.approx(nmi(a.astype(float), b.astype(float)), rel=1e-12)


def test_nmi_of_a_hand_computed_case() -> None:
    """A determines B, and B determines half of A: I = H(B) = log 2, H(A) = log 4: 2 log 2 / log 8 = 2/3."""
    a, b = np.repeat([0.0, 1, 2, 3], 500), np.repeat([0.0, 0, 1, 1], 500)
    assert nmi(a, b) == pytest.approx(2 / 3)
    assert nmi(a, np.tile([0.0, 1.0], 1000)) == pytest.approx(0)


@pytest.mark.parametrize(
    ("a", "b"), [(np.zeros(9), np.arange(9)), (np.arange(9), np.full(9, 3)), (np.zeros(0), np.zeros(0))]
)
def test_nmi_of_a_flat_image_is_0(a: np.ndarray, b: np.ndarray) -> None:
    assert nmi(a, b) == 0


@given(st.tuples(*[st.floats(-20, 20)] * 3), st.tuples(*[st.floats(-20, 20)] * 3))
def test_motion_is_the_angle_and_the_mean_displacement(angles: tuple[float, ...], shift: tuple[float, ...]) -> None:
    matrix = rigid(angles, shift)
    np.testing.assert_allclose(matrix[:3, :3], Rotation.from_euler("xyz", angles, degrees=True).as_matrix(), atol=1e-9)
    points = np.random.default_rng(0).normal(0, 50, (200, 3))
    mm, deg = register.measure_motion(matrix, points)
    assert deg == pytest.approx(np.degrees(Rotation.from_matrix(matrix[:3, :3]).magnitude()), abs=1e-4)
    assert mm == pytest.approx(np.linalg.norm(points @ matrix[:3, :3].T + shift - points, axis=1).mean(), abs=1e-6)


# -- pairs ------------------------------------------------------------------------------------------------------------

CONFIG = DatasetConfig(slices=6, pictures=False)
GRID1, GRID2 = grid_affine((24, 24, 20), (5, 5, 6), "PSR"), grid_affine((26, 22, 14), (4, 4, 5), "LAS")


def blobs(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return (zoom(np.random.default_rng(seed).random((4, 4, 4)), [n / 4 for n in shape], order=1) * 2000).astype("<i2")


T1, T2 = pack_nifti(blobs((20, 24, 24), 0), GRID1), pack_nifti(blobs((14, 22, 26), 1), GRID2)


def cut(folder: Path, t1: bytes, t2: bytes, config: DatasetConfig = CONFIG) -> dict[str, Any]:
    (folder / "members").write_bytes(t1 + t2)
    members = {
        "T1": MemberRef(str(folder / "members"), 0, len(t1)),
        "T2": MemberRef(str(folder / "members"), len(t1), len(t2)),
    }
    return cut_subject(CutJob("IXI002-Guys-0828", members, True), config, folder)


def test_scans_without_overlap_are_flagged(tmp_path: Path) -> None:
    record = cut(tmp_path, T1, pack_nifti(blobs((14, 22, 26), 1), rigid((0, 0, 0), (0, 0, 900)) @ GRID2))
    assert (record["reason"], record["flags"]) == ("outside_fov", "registration_failed")


def test_a_constant_image_is_flagged(tmp_path: Path) -> None:
    record = cut(tmp_path, T1, pack_nifti(np.full((14, 22, 26), 7, "<i2"), GRID2))
    assert (record["reason"], record["flags"]) == ("empty_image", "registration_failed")


def moved_pair(motion: Any, widen: float = 1.6, header: Any = None) -> tuple[bytes, bytes]:
    """Two contrasts of one head. `motion` maps the T2's world to the T1's; `header` displaces the T1's affine."""
    head, head_affine = blobs((40, 44, 44), 3), grid_affine((44, 44, 40), (6, 6, 6), "RAS")
    grid = GRID1 @ np.diag([1, 1, widen, 1])
    grid[:3, 3] = GRID1[:3] @ [0, 0, 9.5, 1] - grid[:3, :3] @ [0, 0, 9.5]  # k runs from left to right
    t1 = trilinear(head, np.linalg.inv(head_affine) @ grid, (20, 24, 24))
    t2 = 2500 - trilinear(head, np.linalg.inv(head_affine) @ motion @ GRID2, (14, 22, 26))
    return pack_nifti(t1.astype("<i2"), grid if header is None else header @ grid), pack_nifti(t2.astype("<i2"), GRID2)


def cut_with(found: Any, folder: Path, patch: pytest.MonkeyPatch, pair: tuple[bytes, bytes]) -> dict[str, Any]:
    """The record of a pair whose registration returns or raises `found`."""

    def fake_register(t1: Any, t2: Any, *, is_affine: bool) -> Any:
        if isinstance(found, Exception):
            raise found
        return register.Registration(found, found)

    patch.setattr(register, "register", fake_register)
    return cut(folder, *pair)


SHIFTED, TURNED = rigid((0, 0, 0), (6, 0, 0)), rigid((0, 0, 16), (0, 0, 0))
FAR = rigid((0, 0, 0), (22, 0, 0))


@pytest.mark.parametrize(
    ("motion", "widen", "flags", "reason"),
    [
        (SHIFTED, 1.6, "", ""),
        (FAR, 1.6, "large_motion", ""),
        (TURNED, 1.6, "large_motion", ""),
        (SHIFTED, 0.92, "registration_leaves_fov", "outside_fov"),
        (FAR, 1.0, "large_motion,registration_leaves_fov", "outside_fov"),
    ],
)
def test_a_motion_that_increases_nmi_is_applied(
    motion: Any, widen: float, flags: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = cut_with(motion, tmp_path, monkeypatch, moved_pair(motion, widen))
    assert (record["flags"], record.get("reason", "")) == (flags, reason)
    assert json.loads(record["t2_to_t1_ras_mm"]) == motion.tolist()
    assert record["nmi_after"] > record["nmi_before"]


def test_a_motion_that_brings_the_head_into_the_field_of_view_is_applied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their headers, the scans overlap too little to compare NMIs."""
    header = rigid((0, 0, 0), (0, 70, 0))
    record = cut_with(header, tmp_path, monkeypatch, moved_pair(np.eye(4), header=header))
    assert (record["flags"], record.get("reason")) == ("large_motion", None)
    assert record["nmi_after"] > 0.2


@pytest.mark.parametrize(
    ("found", "flags"),
    [
        (np.eye(4), "registration_no_gain"),
        (rigid((0, 0, 0), (0.4, 0, 0)), "registration_no_gain"),
        (SHIFTED, "registration_no_gain"),
        (TURNED, "registration_no_gain"),
        # This motion leaves almost no overlap to compare.
        (rigid((0, 0, 0), (80, 0, 0)), "registration_no_gain"),
        (heads.RegistrationError("all samples map outside"), "registration_failed"),
    ],
)
def test_a_motion_without_gain_is_discarded_and_flagged(
    found: Any, flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = cut_with(found, tmp_path, monkeypatch, moved_pair(np.eye(4)))
    assert record["flags"] == flags
    assert json.loads(record["t2_to_t1_ras_mm"]) == np.eye(4).tolist()
    assert (record["motion_mm"], record["motion_deg"]) == (0, 0)
    assert record["nmi_after"] == record["nmi_before"]
    assert "reason" not in record


def test_a_mirrored_pair_is_excluded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirrored = register.Registration(np.eye(4), np.eye(4), is_mirrored=True)
    monkeypatch.setattr(register, "register", lambda t1, t2, is_affine: mirrored)
    record = cut(tmp_path, *moved_pair(np.eye(4)))
    assert record["reason"] == "bad_affine"
    assert "one of the headers exchanges left and right" in record["detail"]


def test_similarities_are_compared_on_the_same_voxels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part of the head that the motion moves out of the T1's grid counts for neither NMI."""
    masks = []

    def record_mask(mask: Any, a: Any, b: Any) -> float:
        masks.append(mask)
        return nmi_within(mask, a, b)

    nmi_within = slabs.nmi_within
    monkeypatch.setattr(slabs, "nmi_within", record_mask)
    cut_with(SHIFTED, tmp_path, monkeypatch, moved_pair(SHIFTED, widen=0.92))
    before, after = masks[-2:]
    np.testing.assert_array_equal(before, after)


def test_errors_of_the_registration_library_are_registration_errors() -> None:
    far = heads.Volume(blobs((20, 24, 24), 0), rigid((0, 0, 0), (0, 0, 9000)) @ GRID1)
    flat = heads.Volume(np.zeros((20, 24, 24), "<i2"), GRID1)
    t2 = heads.Volume(blobs((14, 22, 26), 1), GRID2)
    for t1 in (far, flat):
        with pytest.raises(heads.RegistrationError):
            register.register(t1, t2)


# -- refreshes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moving")
    write_phantom(folder, subjects=2, seed=4, oddities=False, shrink=SHRINK)
    return folder


@pytest.mark.stack
def test_a_refresh_finds_the_motion_of_every_subject(moving: Path, tmp_path: Path) -> None:
    config = config_for(tmp_path, moving, registration="rigid", slices=20)
    done = refresh(config)
    truth = json.loads((moving / "truth.json").read_text())
    table = manifest.used_rows(metadata.read_manifest(done.folder))
    assert len(table) == 2
    moved = 0
    arrays_ = open_arrays(done.folder)
    for row in manifest.to_records(table):
        true = np.array(truth[row["subject_id"]]["motion_mm_ras"])
        difference = np.array(json.loads(row["t2_to_t1_ras_mm"])) - true
        points = world_of(np.asarray(arrays_["t2_affine"][row["store_row"]]), (20, 128, 128)).reshape(-1, 3)
        assert np.linalg.norm(points @ difference[:3, :3].T + difference[:3, 3], axis=1).mean() < 0.3
        if not np.array_equal(true, np.eye(4)):
            moved += 1
            assert row["nmi_after"] > row["nmi_before"]
            assert row["motion_mm"] > 0.5
    assert moved >= 1


@pytest.mark.stack  # half a minute on two cores; `make test` checks the same without registration
def test_workers_and_repeats_do_not_change_registered_bytes(moving: Path, tmp_path: Path) -> None:
    config = config_for(tmp_path, moving, registration="rigid", slices=20)
    done = refresh(config)
    again = refresh(config.model_copy(update={"root": tmp_path / "other", "workers": 1}))
    files = [p.relative_to(done.folder) for p in sorted(done.folder.rglob("*")) if p.is_file()]
    assert [(done.folder / f).read_bytes() for f in files] == [(again.folder / f).read_bytes() for f in files]


def test_each_used_subject_has_a_picture_and_the_worst_are_on_a_sheet(moving: Path, tmp_path: Path) -> None:
    from PIL import Image

    done = refresh(config_for(tmp_path, moving, slices=20))
    used = manifest.used_rows(metadata.read_manifest(done.folder))
    names = sorted(p.name for p in (done.folder / metadata.PICTURES).iterdir())
    assert names == sorted([*(f"{s}.jpg" for s in used["subject_id"]), "worst.jpg"])
    with Image.open(done.folder / metadata.PICTURES / names[0]) as picture:
        assert picture.size == (3 * 128, 128)
    assert picture_path(tmp_path, "x").suffix == ".jpg"


def test_depth_any_keeps_subjects_that_the_modal_rule_excludes(
    published: PublishedVersion, archives: Path, tmp_path: Path
) -> None:
    modal = metadata.read_manifest(published.folder)
    all_depths = metadata.read_manifest(refresh(config_for(tmp_path, archives, depth="any", pictures=False)).folder)
    assert not (all_depths["reason"] == "depth_not_modal").any()
    gained = set(manifest.used_rows(all_depths)["subject_id"]) - set(manifest.used_rows(modal)["subject_id"])
    assert {s.split("-")[1] for s in gained} == {"IOP", "HH"}
    thick = all_depths.set_index("subject_id").loc["IXI010-HH-1070"]
    assert (thick["reason"], "mm" in thick["detail"] or "does not fit" in thick["detail"]) == ("grid_not_modal", True)


def test_index_pairs_are_never_registered() -> None:
    assert DatasetConfig(pairing="index").registration == "none"
    with pytest.raises(ValueError, match="registration must be none"):
        DatasetConfig(pairing="index", registration="rigid")
