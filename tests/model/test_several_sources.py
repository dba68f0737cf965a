"""A generator of several sources and neighbouring slices gets the right slices: in training, evaluation, synthesis."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import SMALL_NETWORKS, config_for
from hypothesis import given
from hypothesis import strategies as st
from markup import page_of
from torch import Tensor

from flows.cli import main
from ixi_etl.dataset import manifest, metadata
from ixi_etl.dataset.direction import Direction
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.dataset.store import open_arrays
from ixi_etl.errors import ConfigError, EmptySplitError
from ixi_etl.recipes.ixi import refresh
from ixi_etl.scans.tar import index_archive, read_member
from ixi_etl.testing.phantom import pack_nifti, write_tar
from model import augmentation, data, evaluate, export, planes, synthesize, volumes
from model.baselines import MAPPING, baselines
from model.config import TrainConfig
from model.data import Pairs, Slabs
from model.generator import BATCH, as_predictor, load_generator
from model.jobs import evaluate_run, prepare_run, train_run
from model.networks import PatchDiscriminator, UNetGenerator
from model.run import Run

MARGIN, SLICES = 2, 4


def invert(packed: bytes) -> bytes:
    """A volume with the opposite contrast, on the same grid."""
    image = nib.Nifti1Image.from_bytes(gzip.decompress(packed))
    voxels = np.asarray(image.dataobj)
    return bytes(pack_nifti((voxels.max() - voxels.T).astype(np.int16), image.affine))


@pytest.fixture(scope="module")
def three(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> PublishedVersion:
    """A version of T1, T2 and PD, with margin, in which one used subject of the training split has no PD."""
    folder = tmp_path_factory.mktemp("archives")
    for modality in ("T1", "T2"):
        (folder / f"IXI-{modality}.tar").symlink_to(archives / f"IXI-{modality}.tar")
    t2 = str(archives / "IXI-T2.tar")
    members = {m.name: m for m in index_archive(t2) if m.name.endswith(".nii.gz") and m.name[:4] == "IXI0"}
    kept = {name: invert(read_member(t2, m.offset, m.size)) for name, m in members.items() if "IXI003" not in name}
    write_tar(folder / "IXI-PD.tar", {name.replace("T2", "PD"): data for name, data in kept.items()})
    settings = {"modalities": "T1,T2,PD", "incomplete": "keep", "margin": MARGIN, "slices": SLICES, "pictures": False}
    root = tmp_path_factory.mktemp("three")
    return refresh(config_for(root, folder, **settings, depth="any", split=(0.4, 0.3, 0.3)))


def rows_of(version: PublishedVersion, split: str) -> Any:
    used = manifest.used_rows(metadata.read_manifest(version.folder))
    return used[used["split"] == split]


# -- configuration and networks ---------------------------------------------------------------------------------------


def test_sources_and_target_are_another_way_to_give_the_direction() -> None:
    config = TrainConfig.model_validate({"sources": ["t1", "pd"], "target": "t2", "neighbours": 1})
    assert config == TrainConfig(direction="t1+pd->t2", neighbours=1)
    assert TrainConfig.model_validate({"sources": "t1", "target": "t2"}).direction == "t1->t2"
    assert config.channels == tuple((name, offset) for name in ("t1", "pd") for offset in (-1, 0, 1))
    assert (config.input_channels, TrainConfig().input_channels) == (6, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sources": ["t1"]}, "give both sources and target"),
        ({"target": "t2"}, "give both sources and target"),
        ({"sources": [], "target": "t2"}, "give both sources and target"),
        ({"sources": [1], "target": "t2"}, "give both sources and target"),
        ({"sources": ["t1"], "target": "t2", "direction": "t1->t2"}, "give either direction, or sources and target"),
        ({"neighbours": 9}, "less than or equal to 8"),
        ({"source": "t1"}, "there is no field source"),
    ],
)
def test_incomplete_or_double_directions_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.model_validate(given)


def test_an_older_configuration_keeps_its_run_id() -> None:
    fields = {"dataset": "ixi-t1-t2@2e65679f5fa3", "direction": "t1->t2", "side": 64, "width": 8}
    config = TrainConfig(**fields, discriminator_width=8, device="cpu", precision="fp32", steps=6)  # type: ignore[arg-type]
    assert config.run_id == "ixi-t1-t2-2e65679f5fa3-c4344306"  # made before there were neighbours
    assert config.model_copy(update={"neighbours": 1}).run_id != config.run_id


def test_only_the_first_layers_see_the_channels() -> None:
    networks = [(UNetGenerator(32, 4, in_channels=n), PatchDiscriminator(4, source_channels=n)) for n in (1, 6)]
    one, six = ([{k: v.shape for k, v in n.state_dict().items()} for n in pair] for pair in networks)
    for name, before, after in (("down.0.0.weight", 1, 6), ("layers.0.weight", 2, 7)):
        assert [s.pop(name) for s in one + six if name in s] == [(4, before, 4, 4), (4, after, 4, 4)]
    assert one == six


# -- data -------------------------------------------------------------------------------------------------------------


def coded_pairs(subjects: int, depth: int, margin: int, neighbours: int, sources: int = 2) -> Pairs:
    """Pairs whose slices have one value each: 100 x array + 10 x subject + slice, of a range of 0 to 1000."""
    code = torch.arange(subjects)[:, None] * 10 + torch.arange(depth)
    arrays = [
        Slabs((100 * n + code)[..., None, None].expand(-1, -1, 2, 2).short(), torch.tensor([[0.0, 1000.0]] * subjects))
        for n in range(sources + 1)
    ]
    direction = Direction(tuple(f"s{n}" for n in range(sources)), "t")
    names = [str(n) for n in range(subjects)]
    return Pairs(direction, names, tuple(arrays[:-1]), arrays[-1], "lower", "train", neighbours, margin)


@given(
    subjects=st.integers(1, 4), slices=st.integers(1, 4), margin=st.integers(0, 2), neighbours=st.integers(0, 3),
    sources=st.integers(1, 3),
)  # fmt: skip
def test_channels_are_ordered_by_source_then_by_slice_and_margins_are_never_targets(
    subjects: int, slices: int, margin: int, neighbours: int, sources: int
) -> None:
    depth = slices + 2 * margin
    pairs = coded_pairs(subjects, depth, margin, neighbours, sources)
    assert len(pairs) == subjects * slices
    source, target = (((image + 1) * 500).round().long() for image in pairs.normalised(torch.arange(len(pairs))))
    for n in range(len(pairs)):
        subject, z = n // slices, n % slices + margin
        assert (int(pairs.subject[n]), int(pairs.position[n])) == (subject, z - margin)
        around = [min(max(z + offset, 0), depth - 1) for offset in range(-neighbours, neighbours + 1)]
        expected = [100 * array + 10 * subject + near for array in range(sources) for near in around]
        assert source[n, :, 0, 0].tolist() == expected
        assert target[n, :, 0, 0].tolist() == [100 * sources + 10 * subject + z]
        assert pairs.centres(source)[n, :, 0, 0].tolist() == [100 * a + 10 * subject + z for a in range(sources)]


def test_all_channels_are_augmented_alike() -> None:
    image = torch.rand(3, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    for kind in ("none", "flip", "jitter"):
        several, one = augmentation.augment((torch.cat([image, -image], 1), image), kind, (32, 32), seed=0, first=5)  # type: ignore[arg-type]
        assert torch.equal(several, torch.cat([one, -one], 1))


def test_subjects_without_one_of_the_arrays_are_left_out(
    three: PublishedVersion, caplog: pytest.LogCaptureFixture
) -> None:
    rows = rows_of(three, "train")
    incomplete = rows[rows["pd_member"] == ""]["subject_id"].tolist()
    assert len(incomplete) == 1
    assert set(data.load_pairs(three.folder, "train", "t1->t2").subjects) == set(rows["subject_id"])
    with caplog.at_level(logging.INFO, "model"):
        pairs = data.load_pairs(three.folder, "train", "t1+pd->t2", neighbours=1)
    assert set(pairs.subjects) == set(rows["subject_id"]) - set(incomplete)
    assert "subjects without one of t1, pd, t2" in caplog.text
    assert (pairs.slices, pairs.margin, len(pairs.sources)) == (SLICES, MARGIN, 2)
    row = rows.set_index("subject_id").loc[pairs.subjects[0], "store_row"]
    for name, slabs in zip(("t1", "pd", "t2"), (*pairs.sources, pairs.target), strict=True):
        np.testing.assert_array_equal(slabs.stored[0].numpy(), np.asarray(open_arrays(three.folder)[name][row]))


def test_a_split_in_which_no_subject_is_complete_is_empty(
    three: PublishedVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    described, table = data.verify.read_verified(three.folder)
    table["pd_member"] = ""
    monkeypatch.setattr("model.data.verify.read_verified", lambda _folder: (described, table))
    with pytest.raises(EmptySplitError, match=r"no subject in split train of .* has all of pd, t2"):
        data.load_pairs(three.folder, "train", "pd->t2")


@pytest.mark.parametrize(
    ("direction", "problem"),
    [
        ("t1+mra->t2", "'t1+mra->t2' names mra"),
        ("t1+t1->t2", "'t1+t1->t2' names t1 twice"),
        ("t1+t2->t2", "'t1+t2->t2' names t2 twice"),
        ("t1", "'t1' is not SOURCE->TARGET or SOURCE+SOURCE->TARGET"),
        ("->t2", "'->t2' is not SOURCE->TARGET"),
    ],
)
def test_a_direction_that_does_not_fit_names_the_arrays(direction: str, problem: str, three: PublishedVersion) -> None:
    with pytest.raises(ConfigError) as error:
        data.load_pairs(three.folder, "train", direction)
    assert problem in str(error.value)
    assert "the arrays of ixi-t1-pd-t2 are t1, t2, pd: use for example t1->t2" in str(error.value)


# -- baselines and masks ----------------------------------------------------------------------------------------------


def random_pairs(sources: list[Tensor], target: Tensor) -> Pairs:
    """Pairs of images (N, H, W) of integers from 0 to 255, whose bins are these integers."""
    slabs = [Slabs(image[None].short(), torch.tensor([[0.0, 255.0]])) for image in (*sources, target)]
    names = ("t1", "pd")[: len(sources)]
    return Pairs(Direction(names, "t2"), ["a"], tuple(slabs[:-1]), slabs[-1], "lower")


def images(seed: int, largest: int, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, largest, (4, 8, 8), generator=generator) for _ in range(count)]


def mapped(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """Predictions of the intensity mapping and targets, in [-1, 1]."""
    source, target = pairs.normalised(torch.arange(len(pairs)))
    return baselines(pairs)[MAPPING](source, pairs.position).numpy(), target.numpy()


def test_the_mapping_of_one_source_is_the_mean_target_at_each_intensity() -> None:
    source, target, _ = images(0, 200)
    found, wanted = mapped(random_pairs([source], target))
    for value in source.unique():
        at = (source == value)[:, None].numpy()
        np.testing.assert_allclose(found[at], wanted[at].mean(), atol=1e-6)


def test_the_mapping_of_two_sources_is_the_best_sum_of_a_function_of_each() -> None:
    t1, pd, target = images(1, 12)
    target = target * 10 + t1**2 // 2 + 5 * pd
    found, wanted = mapped(random_pairs([t1, pd], target))
    design = np.concatenate([np.eye(12)[image.flatten().numpy()] for image in (t1, pd)], axis=1)
    best = design @ np.linalg.lstsq(design, wanted.flatten(), rcond=None)[0]
    np.testing.assert_allclose(found.flatten(), best, atol=1e-5)


def test_the_mapping_of_two_equal_sources_is_that_of_one() -> None:
    source, target, _ = images(2, 50)
    both, one = mapped(random_pairs([source, source], target))[0], mapped(random_pairs([source], target))[0]
    np.testing.assert_allclose(both, one, atol=1e-5)


def test_each_source_is_a_baseline_of_its_own_and_part_of_the_head() -> None:
    pairs = coded_pairs(2, 6, 1, 1)
    found = baselines(pairs)
    assert list(found) == ["s0 as it is", "s1 as it is", "mean training target", "intensity mapping"]
    source, _ = pairs.normalised(torch.arange(len(pairs)))
    for n, name in enumerate(("s0 as it is", "s1 as it is")):
        assert torch.equal(found[name](source, pairs.position)[:, 0], source[:, 1 + 3 * n])
    one, _, blank = images(3, 200)
    bright = torch.zeros_like(one)
    bright[:, :4], blank[:] = 200, 0
    blank[:, 7, 7] = 1
    table = evaluate.measure(random_pairs([blank, bright], blank), {"a": lambda s, _: torch.full_like(s[:, :1], -1.0)})
    # The head is the bright half of the second source, and one pixel of the others.
    head = table[table["mask"] == "head"]["mae"].item()
    assert head == pytest.approx((1 / 255) / 33, rel=1e-3)


# -- a whole run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(three: PublishedVersion) -> Run:
    """A trained and evaluated run from PD and T2, echoes of one scan, to T1, with neighbours."""
    settings = SMALL_NETWORKS | {"steps": 2, "batch_size": 2, "samples": 1, "ema": 0.9, "augment": "flip"}
    direction = {"sources": ["pd", "t2"], "target": "t1", "neighbours": 1}
    config = TrainConfig.model_validate(settings | direction | {"dataset": "ixi-t1-pd-t2@latest"})
    prepared = prepare_run(three.folder.parents[2], config, "several")
    train_run(prepared)
    evaluate_run(prepared, split="train")
    return prepared


def test_a_run_records_its_channels_and_shows_every_source(run: Run) -> None:
    from model import checkpoint

    recorded = checkpoint.read_metadata(run.generator)
    assert recorded["channels"] == [[name, offset] for name in ("pd", "t2") for offset in (-1, 0, 1)]
    summary = planes.parse(run.generator, recorded)
    assert summary is not None
    assert (len(summary.sources), summary.slice_mm, summary.slab_mm) == (2, 5, (SLICES + 2 * MARGIN) * 5)
    drawn = {path.name.rpartition("-")[2] for path in (run.folder / "samples" / "step-00000002").iterdir()}
    assert drawn == {"pd.png", "t2.png", "target.png", "generated.png", "error.png"}
    page = (run.folder / "report.html").read_text()
    captions = [element.text for element in page_of(page).iter("figcaption")]
    assert captions[:3] == ["source pd", "source t2", "target"]
    assert "pix2pix, pd+t2-&gt;t1, neighbours 1, on" in page
    methods = {row["method"] for row in json.loads((run.folder / "evaluation-train.json").read_text())["summary"]}
    assert methods == {"generated", "pd as it is", "t2 as it is", "mean training target", "intensity mapping"}


def write_slabs(run: Run, subject: str, names: tuple[str, ...], folder: Path) -> dict[str, Path]:
    """The stored slabs of a subject as files, in scanner units."""
    arrays = open_arrays(run.version)
    row = manifest.used_rows(metadata.read_manifest(run.version)).set_index("subject_id").loc[subject]
    paths = {}
    for name in names:
        slab, affine = (np.asarray(arrays[key][row["store_row"]]) for key in (name, f"{name}_affine"))
        assert row[f"{name}_scale"] == 1
        paths[name] = folder / f"slab_{name}.nii.gz"
        paths[name].write_bytes(pack_nifti(slab, affine))
    return paths


def test_synthesis_from_several_files_generates_the_slices_of_evaluation(run: Run, tmp_path: Path) -> None:
    pairs = data.load_pairs(run.version, "train", run.config.direction, neighbours=1)
    index = torch.nonzero(pairs.subject == 0).flatten()
    method = as_predictor(load_generator(run.generator)[0])
    with torch.no_grad():
        wanted = torch.cat([method(pairs.normalised(part)[0], part) for part in index.split(BATCH)])[:, 0].numpy()
    trained = synthesize.load_trained(run.generator)
    low, high = trained.planes.target_low_high
    paths = write_slabs(run, pairs.subjects[0], ("t2", "pd"), tmp_path)
    for files in (paths, dict(reversed(paths.items()))):  # the order of files is not that of channels
        out = volumes.synthesize_file(trained, files, tmp_path / "out.nii")
        made = nib.load(out).get_fdata().T[MARGIN:-MARGIN]
        np.testing.assert_allclose(made, (wanted + 1) / 2 * (high - low) + low, atol=0.51)
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["Sources"] == ["slab_pd.nii.gz", "slab_t2.nii.gz"]
    assert record["SourceModalities"] == list(record["SourceRange"]) == ["pd", "t2"]
    assert record["Generator"]["Direction"] == "pd+t2->t1"
    assert record["Registration"]["t2"]["Registered"] is False  # echoes on one grid


def test_the_command_takes_a_file_of_each_source(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subject = data.load_pairs(run.version, "train", run.config.direction).subjects[0]
    paths = write_slabs(run, subject, ("t2", "pd"), tmp_path)
    given = [f"--source={name}={path}" for name, path in paths.items()]
    with pytest.raises(SystemExit) as ended:
        main(["synthesize", "several", *given, "-o", str(tmp_path / "made"), "--root", str(run.folder.parents[1])])
    assert not ended.value.code, capsys.readouterr().err
    assert capsys.readouterr().out.strip() == str(tmp_path / "made" / "slab_T1.nii.gz")
    image = nib.load(tmp_path / "made" / "slab_T1.nii.gz")
    assert bytes(image.header["descrip"]).startswith(b"SYNTHETIC T1 of T2 and PD, ixi-etl ")


def test_an_export_describes_the_channels_of_its_input(run: Run, tmp_path: Path) -> None:
    export.export(run.generator, "safetensors", tmp_path)
    (described,) = json.loads((tmp_path / "config.json").read_text())["inputs"]
    assert described["shape"][:2] == ["batch", 6]
    assert described["channels"][3:] == [{"source": "t2", "slice_offset": n} for n in (-1, 0, 1)]


@pytest.mark.stack  # the export takes seconds
def test_an_onnx_file_has_an_input_for_each_source(run: Run, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install -c constraints.txt -e '.[export]'")
    path, difference = export.export(run.generator, "onnx", tmp_path)
    assert difference <= export.TOLERANCE
    session = onnxruntime.InferenceSession(path)
    height, width = open_arrays(run.version)["t1"].shape[2:]
    assert {i.name: i.shape[1:] for i in session.get_inputs()} == {key: [3, height, width] for key in ("pd", "t2")}
    source = torch.rand(2, 6, height, width) * 2 - 1
    (found,) = session.run(["generated"], {"pd": source[:, :3].numpy(), "t2": source[:, 3:].numpy()})
    with torch.no_grad():
        wanted = load_generator(run.generator)[0].forward_padded(source).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)
