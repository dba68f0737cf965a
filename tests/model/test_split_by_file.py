"""In a version that is split by file, each split has its own slices of a subject."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from altered import alter_version
from conftest import SLICES, SMALL_NETWORKS
from hypothesis import given
from hypothesis import strategies as st

from ixi_etl.config import SPLITS
from ixi_etl.core.files import read_json
from ixi_etl.dataset import manifest, metadata
from ixi_etl.dataset.direction import Direction
from ixi_etl.dataset.normalisation import normalise
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.dataset.schema import MIXED, USED
from ixi_etl.dataset.store import open_arrays
from ixi_etl.errors import EmptySplitError
from model import data, planes, samples
from model.baselines import MEAN_TARGET, baselines
from model.config import TrainConfig
from model.data import Pairs, Slabs
from model.jobs import evaluate_run, prepare_run, train_run

HEIGHT, WIDTH = 3, 2


def with_slice_splits(table: pd.DataFrame, by_subject: list[list[str]]) -> pd.DataFrame:
    """The manifest with the splits of the slices of each used subject."""
    changed, rows = table.assign(slice_splits=""), table.index[table["status"] == USED]
    changed.loc[rows, "slice_splits"] = [",".join(names) for names in by_subject]
    changed.loc[rows, "split"] = [names[0] if len(set(names)) == 1 else MIXED for names in by_subject]
    changed.loc[rows, "leaks"] = [int({"train", "test"} <= set(names)) for names in by_subject]
    return changed.astype({"leaks": "Int64"})


def shuffle_slices(table: pd.DataFrame) -> pd.DataFrame:
    """Assign slices to splits at random, except that slice 5 is never in `train`, and all others of the first are."""
    rng, by_subject = np.random.default_rng(0), []
    for n in range(int((table["status"] == USED).sum())):
        names = ["train"] * SLICES if n == 0 else rng.choice(SPLITS, SLICES).tolist()
        by_subject.append([*names[:5], "test" if n else "val", *names[6:]])
    return with_slice_splits(table, by_subject)


@pytest.fixture(scope="module")
def by_file(published: PublishedVersion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("by_file")
    return alter_version(published.folder, root, shuffle_slices, split_by="file")


def slices_of(folder: Path, split: str) -> list[tuple[str, int, int]]:
    """Subject, store row and slice of each pair of a split, one by one from the manifest."""
    used = manifest.used_rows(metadata.read_manifest(folder))
    found = []
    for row in used.to_dict("records"):
        for z, name in enumerate(row["slice_splits"].split(",")):
            if name == split:
                found.append((row["subject_id"], int(row["store_row"]), z))
    return found


def test_a_version_that_leaks_is_loaded_with_one_warning(by_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    data._warn_of_leaks.cache_clear()
    for split in ("train", "val", "test"):
        data.load_pairs(by_file, split)
    leaking = metadata.read_metadata(by_file)["leaking_subjects"]
    (message,) = [message for message in caplog.messages if "split by file" in message]
    assert message.endswith(f"split by file: slices of {leaking} subjects are in train and in test")


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_has_exactly_its_slices(by_file: Path, split: str) -> None:
    pairs, wanted = data.load_pairs(by_file, split), slices_of(by_file, split)
    found = [(pairs.subjects[s], z) for s, z in zip(pairs.subject.tolist(), pairs.position.tolist(), strict=True)]
    assert found == [(subject, z) for subject, _, z in wanted]
    assert len(pairs) == len(wanted) == data.count_pairs(by_file, split, pairs.direction)
    assert set(pairs.subjects) == {subject for subject, _, _ in wanted}  # none that has no slice here
    arrays, used = open_arrays(by_file), manifest.used_rows(metadata.read_manifest(by_file))
    for images, name in zip(pairs.normalised(torch.arange(len(pairs))), ("t1", "t2"), strict=True):
        for image, (_, row, z) in zip(images[:, 0].numpy(), wanted, strict=True):
            low, high = used.iloc[row][[f"{name}_p_low", f"{name}_p_high"]]
            stored = np.asarray(arrays[name][row])[z].astype(float)
            np.testing.assert_allclose(image, np.clip((stored - low) / (high - low), 0, 1) * 2 - 1, atol=1e-5)


def test_every_slice_is_in_one_split(by_file: Path, published: PublishedVersion) -> None:
    counts = [len(data.load_pairs(by_file, split)) for split in SPLITS]
    assert min(counts) > 0
    assert sum(counts) == SLICES * len(manifest.used_rows(metadata.read_manifest(published.folder)))


masks = st.integers(1, 4).flatmap(
    lambda slices: st.lists(
        st.lists(st.booleans(), min_size=slices, max_size=slices).filter(any), min_size=1, max_size=4
    )
)


@given(mask=masks, margin=st.integers(0, 2), neighbours=st.integers(0, 2), picked=st.randoms(use_true_random=False))
def test_kept_slices_have_their_own_neighbours_and_subjects(
    mask: list[list[bool]], margin: int, neighbours: int, picked: object
) -> None:
    """Each pair equals what a plain loop over subjects and slices finds; so do the pairs of some of the subjects."""
    subjects, slices = len(mask), len(mask[0])
    depth = slices + 2 * margin
    code = 10 * torch.arange(subjects)[:, None] + torch.arange(depth)
    source, target = (
        Slabs((n + code)[..., None, None].expand(-1, -1, HEIGHT, WIDTH).short(), torch.tensor([[0.0, 1e3]] * subjects))
        for n in (0, 100)
    )
    kept = torch.from_numpy(np.flatnonzero(mask))
    names = [str(n) for n in range(subjects)]
    pairs = Pairs(Direction(("s",), "t"), names, (source,), target, "lower", "train", neighbours, margin, kept)
    chosen = sorted(picked.sample(range(subjects), picked.randint(1, subjects)))  # type: ignore[attr-defined]
    for part, members in ((pairs, range(subjects)), (pairs.of_subjects(torch.tensor(chosen), "test"), chosen)):
        expected = [(s, z) for s in members for z in range(slices) if mask[s][z]]
        assert len(part) == len(expected)
        assert part.subjects == [str(s) for s in members]
        assert part.split == ("train" if part is pairs else "test")
        images = part.normalised(torch.arange(len(part)))
        sources, targets = (((image + 1) * 500).round().long()[..., 0, 0].tolist() for image in images)
        for n, (s, z) in enumerate(expected):
            assert (part.subjects[int(part.subject[n])], int(part.position[n])) == (str(s), z)
            assert targets[n] == [100 + 10 * s + z + margin]
            around = [min(max(z + margin + k, 0), depth - 1) for k in range(-neighbours, neighbours + 1)]
            assert sources[n] == [10 * s + k for k in around]


def test_the_mean_target_counts_the_slices_of_each_position(by_file: Path) -> None:
    train = data.load_pairs(by_file, "train")
    _, target = train.normalised(torch.arange(len(train)))
    counts = torch.bincount(train.position, minlength=SLICES)
    assert counts[5] == 0  # no training slice there
    assert len(set(counts.tolist())) > 2
    mean = baselines(train)[MEAN_TARGET](torch.zeros(1, 1, 1, 1), torch.arange(SLICES))
    for position in range(SLICES):
        own = target[train.position == position] if counts[position] else target
        torch.testing.assert_close(mean[position], own.mean(0), atol=1e-5, rtol=0)


def test_samples_show_the_slice_nearest_to_the_middle(by_file: Path) -> None:
    for split in SPLITS:
        pairs = data.load_pairs(by_file, split)
        shown = samples.choose_slices(pairs, len(pairs.subjects))
        assert pairs.subject[shown].tolist() == list(range(len(pairs.subjects)))
        for n in shown.tolist():
            of_subject = pairs.position[pairs.subject == pairs.subject[n]]
            assert abs(int(pairs.position[n]) - SLICES // 2) == int((of_subject - SLICES // 2).abs().min())


def test_histograms_are_of_whole_slabs_as_those_of_new_volumes_are(by_file: Path) -> None:
    train = data.load_pairs(by_file, "train")
    summary = planes.summarise(by_file, train)
    assert summary is not None
    assert summary.slab_mm == pytest.approx(SLICES * 5)
    shares = [
        planes.histogram(normalise(slab[None], low_high[None])[0].numpy())
        for slab, low_high in zip(train.target.stored, train.target.low_high, strict=True)
    ]
    np.testing.assert_allclose(summary.target_histogram, np.mean(shares, axis=0), atol=1e-5)


def test_a_split_by_file_is_trained_on_sampled_and_evaluated(by_file: Path) -> None:
    config = TrainConfig(**{**SMALL_NETWORKS, "steps": 2, "samples": 1, "neighbours": 1, "batch_size": 2})
    run = prepare_run(by_file.parents[2], config, "a")
    train_run(run)
    evaluate_run(run)
    scores = pd.read_csv(run.folder / "evaluation-test.csv")
    assert set(scores["subject_id"]) == {subject for subject, _, _ in slices_of(by_file, "test")}
    assert scores.loc[scores["protocol"] == "ours", "mae"].notna().all()
    assert len(pd.read_csv(run.folder / "validation.csv")) == 1
    held_out = {f"{subject}-{z}-target.png" for subject, _, z in slices_of(by_file, "val")}
    drawn = {p.name for p in (run.folder / "samples" / "step-00000002").glob("*-target.png")}
    assert drawn <= held_out
    assert drawn
    assert read_json(run.folder / "config.json")["config"]["dataset"].endswith(by_file.name)


def test_an_empty_split_by_file_states_the_subjects_of_each_split(by_file: Path, tmp_path: Path) -> None:
    def no_validation(table: pd.DataFrame) -> pd.DataFrame:
        joined = table.loc[table["status"] == USED, "slice_splits"].str.replace("val", "train")
        return with_slice_splits(table, [names.split(",") for names in joined])

    folder = alter_version(by_file, tmp_path, no_validation)
    counts = [len(data.load_pairs(folder, split).subjects) for split in ("train", "test")]
    message = (
        rf"no subject in split val \(it has {counts[0]} train, 0 val, {counts[1]} test\); try another --split-seed"
    )
    with pytest.raises(EmptySplitError, match=message):
        data.load_pairs(folder, "val")
