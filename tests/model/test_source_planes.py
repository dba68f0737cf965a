"""Synthesis from several volumes registers them to the first, and gives each plane its neighbours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from heads import head, identity, nifti_of

from ixi_etl.dataset.direction import Direction
from ixi_etl.errors import CheckpointError, SynthesisError
from ixi_etl.pairing import heads, register
from ixi_etl.pairing.register import Registration, mean_distance
from ixi_etl.testing import phantom
from ixi_etl.testing.phantom import grid_affine, rigid
from model import checkpoint, outputs, planes, source_planes, synthesize, volumes
from model.config import TrainConfig
from model.generator import build_generator
from model.planes import BINS, PlaneSummary
from model.source_planes import Alignment, Scan
from model.synthesize import Trained

SHAPE = (20, 22, 18)
AFFINE = grid_affine(SHAPE, (2, 2, 2), "LAS")


def takes(
    *sources: str, channel: int = 0, neighbours: int = 0, slice_mm: float = 2.0, low_high: tuple[float, float] = (0, 1)
) -> Trained:
    """A generator of these sources that returns a channel of its input."""
    one = identity(low_high=low_high)
    summary = one.planes.model_copy(update={"sources": one.planes.sources * len(sources), "slice_mm": slice_mm})
    trained: Trained = replace(
        one,
        predict=lambda source, _: source[:, channel : channel + 1],
        planes=summary,
        direction=Direction(sources, "mra"),
        neighbours=neighbours,
    )
    return trained


@pytest.mark.parametrize(("slice_mm", "steps"), [(2.0, 1.0), (4.0, 2.0), (3.0, 1.5)])
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_neighbours_are_at_the_distance_of_the_training_slices_and_repeated_at_the_ends(
    slice_mm: float, steps: float, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    values = random.uniform(100, 1000, SHAPE[::-1]).astype(np.float32)
    scans = {"t1": Scan(values, AFFINE)}
    plain = synthesize.synthesize_volume(takes("t1"), scans)
    low_high = plain.source_low_high["t1"]
    monkeypatch.setattr(synthesize, "BLOCK_PIXELS", 1)  # blocks of few planes
    trained = takes("t1", channel=1 + offset, neighbours=1, slice_mm=slice_mm, low_high=low_high)
    made = synthesize.synthesize_volume(trained, scans)
    at = np.clip(np.arange(SHAPE[2]) + offset * steps, 0, SHAPE[2] - 1)
    below, share = np.floor(at).astype(int), (at % 1)[:, None, None]
    expected = values[below] * (1 - share) + values[np.ceil(at).astype(int)] * share
    np.testing.assert_allclose(made.values, expected.clip(*low_high), atol=0.05)


def write_phantom_pair(folder: Path) -> tuple[dict[str, Path], Any]:
    """The T1 and the T2 of a simulated head that moved between the scans, and the matrix from T2 to T1."""
    packed, motion = phantom.simulate(phantom.PhantomSubject(11, "HH", seed=3, moved=True, shrink=4))
    paths = {name.lower(): folder / f"x_{name}w.nii.gz" for name in ("T1", "T2")}
    for name, path in paths.items():
        path.write_bytes(packed[name.upper()])
    return paths, motion


def test_a_moved_scan_is_registered_to_the_first_and_its_motion_recorded(tmp_path: Path) -> None:
    paths, motions = write_phantom_pair(tmp_path)
    trained = takes("t1", "t2", low_high=(0, 1000))
    trained = replace(trained, planes=trained.planes.model_copy(update={"shape": (64, 64), "spacing_mm": (3.75, 3.75)}))
    out = volumes.synthesize_file(trained, dict(reversed(paths.items())), tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(nib.load(out).affine, nib.load(paths["t2"]).affine)
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["SourceModalities"] == ["t2", "t1"]
    found = record["Registration"]["t1"]
    points = np.stack(np.meshgrid(*[np.linspace(-60, 60, 5)] * 3), -1).reshape(-1, 3)
    assert mean_distance(np.array(found["Matrix"]), motions["T1"], points) < 1.5
    assert found["Registered"]
    assert found["EstimatedError"] < 1.5
    assert found["Motion"] > 2


ECHOES = ("t2", "pd")


def aligned(first: str, shift_mm: float = 0.0) -> Alignment:
    """The alignment of two volumes on one grid with that called `first`, the second displaced in its header."""
    values = head(SHAPE, AFFINE)
    scans = [Scan(values, AFFINE), Scan(values, rigid((0, 0, 0), (0, shift_mm, 0)) @ AFFINE)]
    stack = source_planes.Planes(*planes.resampling_grid(takes("t1").planes, values.shape, AFFINE, [np.ones(1)] * 3))
    return source_planes.align((first, scans[0]), scans[1], stack, slice(4, 12))


@pytest.mark.parametrize(
    ("names", "shift_mm", "is_echo"),
    [(("t2", "pd"), 0, True), (("pd", "t2"), 0.3, True), (("t2", "pd"), 3, False), (("t1", "pd"), 0, False)],
)
def test_only_echoes_on_one_grid_are_used_as_they_are(names: tuple[str, str], shift_mm: float, is_echo: bool) -> None:
    """As in a refresh: a small difference of the headers moves no voxel."""
    values = head(SHAPE, AFFINE)
    shifted = Scan(values, rigid((0, 0, 0), (0, shift_mm, 0)) @ AFFINE)
    echo = source_planes.echo_of((names[0], Scan(values, AFFINE)), (names[1], shifted))
    assert (echo is not None) == is_echo
    if echo is not None:
        np.testing.assert_allclose(echo.affine, AFFINE, atol=1e-8)


def test_a_registration_that_does_not_help_or_fails_leaves_the_alignment_of_the_headers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong = rigid((20, 0, 0), (0, 8, 0))
    monkeypatch.setattr(register, "register", lambda *_: Registration(wrong, wrong))
    found = aligned("t1")
    np.testing.assert_array_equal(found.first_to_own, np.eye(4))
    assert not found.is_registered
    assert found.error_mm is not None
    assert found.warning == f"the estimated error of its alignment with the t1 is {found.error_mm:.1f} mm"
    assert found.error_mm > 5
    monkeypatch.setattr(register, "register", lambda *_: Registration(np.eye(4), np.eye(4)))
    unmoved = aligned("t1")  # the head did not move
    assert (unmoved.is_registered, unmoved.error_mm, unmoved.warning) == (False, 0, "")

    def fails(*_: Any) -> None:
        raise heads.RegistrationError("nothing overlaps")

    monkeypatch.setattr(register, "register", fails)
    found = aligned("t1")
    assert "could not be registered (nothing overlaps)" in found.warning
    monkeypatch.setattr(register, "register", lambda *_: Registration(wrong, wrong, is_mirrored=True))
    with pytest.raises(SynthesisError, match="its mirror image fits the t1 better"):
        aligned("t1")


def test_messages_name_the_source(tmp_path: Path) -> None:
    values = head(SHAPE, AFFINE)
    for name in ("a_T2w.nii", "a_PDw.nii"):
        (tmp_path / name).write_bytes(nifti_of(values, AFFINE))
    swapped = {"t2": tmp_path / "a_PDw.nii", "pd": tmp_path / "a_T2w.nii"}
    volumes.synthesize_file(takes(*ECHOES), swapped, tmp_path / "out.nii")
    warnings = json.loads((tmp_path / "out.json").read_text())["Warnings"]
    assert "t2: by its name it is a PD, and the generator takes a T2; is it the right file?" in warnings
    assert "pd: by its name it is a T2, and the generator takes a PD; is it the right file?" in warnings
    empty = {"t2": Scan(values, AFFINE), "pd": Scan(np.zeros_like(values), AFFINE)}
    with pytest.raises(SynthesisError, match=r"^pd: it is empty"):
        synthesize.synthesize_volume(takes(*ECHOES), empty)
    other = {"t2": Scan(values, AFFINE), "pd": Scan(values, AFFINE @ np.diag([1, 1, 10, 1]))}
    with pytest.raises(SynthesisError, match=r"^pd: voxels of 2 x 2 x 20 mm"):
        synthesize.synthesize_volume(takes(*ECHOES), other)


@pytest.mark.parametrize(
    ("direction", "inputs", "sources", "message"),
    [
        ("t1+pd->t2", ["a.nii"], [], "a.nii: the generator takes t1 and pd; give --source t1=FILE --source pd=FILE"),
        ("t1+pd->t2", [], [], "there is no input; the generator takes t1 and pd; give --source t1=FILE"),
        ("t1->t2", [], [], "there is no input; give volumes or folders, or --source t1=FILE"),
        ("t1+pd->t2", [], ["t1=a.nii"], "takes t1 and pd, and pd is missing; give --source pd=FILE"),
        ("t1+pd->t2", [], ["t1=a.nii", "t2=b.nii"], "the generator takes t1 and pd, not t2"),
        ("t1+pd->t2", [], ["t1=a.nii", "t1=b.nii"], "--source t1=b.nii: t1 is given twice"),
        ("t1+pd->t2", [], ["a.nii"], "--source a.nii: give NAME=FILE, for example --source t1=T1.nii.gz"),
        ("t1->t2", ["a.nii"], ["t1=b.nii"], "a.nii and --source t1=b.nii: give either inputs or sources"),
        ("t1+pd->t2", [], ["t1=a.nii", "pd=none.nii"], "none.nii does not exist"),
    ],
)
def test_wrong_sources_are_one_line_errors(
    direction: str, inputs: list[str], sources: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.nii").touch()
    with pytest.raises(SynthesisError) as error:
        outputs.plan_outputs([Path(name) for name in inputs], Path("out"), Direction.parse(direction), sources)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_sources_become_one_job_named_after_the_first(tmp_path: Path) -> None:
    for name in ("a_PD.nii.gz", "a_T1.nii.gz"):
        (tmp_path / name).touch()
    given = [f"{name}={tmp_path}/a_{name.upper()}.nii.gz" for name in ("pd", "t1")]
    ((files, out),) = outputs.plan_outputs([], tmp_path / "out", Direction.parse("t1+pd->t2"), given)
    assert list(files) == ["pd", "t1"]
    assert out == tmp_path / "out" / "a_T2.nii.gz"


def test_planes_of_older_files_describe_a_single_source(tmp_path: Path) -> None:
    shares = [1.0] + [0.0] * (BINS - 1)
    older = {
        "shape": [32, 32],
        "spacing_mm": [1.0, 1.0],
        "slab_mm": 25.0,
        "slab_offset_mm": 0.0,
        "source_spacing_mm": [1.2, 0.9, 0.9],
        "target_low_high": [0.0, 900.0],
        "source_histogram": shares,
        "target_histogram": shares,
    }
    summary = PlaneSummary.model_validate(older)
    (source,) = summary.sources
    assert (source.spacing_mm, source.histogram, summary.slice_mm) == ((1.2, 0.9, 0.9), tuple(shares), None)
    assert PlaneSummary.model_validate(summary.model_dump(mode="json")) == summary
    for settings in ({"neighbours": 1}, {"direction": "t1+pd->t2"}):  # which no older version could train
        config = TrainConfig.model_validate(
            {"side": 32, "width": 4, "dataset": "ixi-t1-t2@01", "direction": "t1->t2"} | settings
        )
        path = tmp_path / "generator.safetensors"
        record = {"step": 1, "config": config.model_dump(mode="json"), "validation": {}, "planes": older}
        checkpoint.save(path, build_generator(config).state_dict(), record)
        with pytest.raises(CheckpointError, match=r"the planes in .* do not fit its direction"):
            synthesize.load_trained(path)


def test_a_plane_with_a_head_in_any_source_is_generated() -> None:
    values = head(SHAPE, AFFINE)
    half = [values.copy(), values.copy()]
    half[0][:9], half[1][9:] = 0, 0
    seen: list[int] = []

    def recorded(source: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        seen.extend(position.tolist())
        return source[:, :1]

    trained = replace(takes(*ECHOES), predict=recorded)
    synthesize.synthesize_volume(trained, {name: Scan(v, AFFINE) for name, v in zip(ECHOES, half, strict=True)})
    assert seen == list(range(SHAPE[2]))
