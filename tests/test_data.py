"""What a training step sees: the right slices, normalised, augmented alike, in an order that the step alone decides."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="torch is not installed; pip install -c constraints.txt -e '.[train]'")

from ixi_etl import dataset, manifest  # noqa: E402
from ixi_etl.errors import DatasetError  # noqa: E402
from ixi_etl.publish import Refreshed  # noqa: E402
from ixi_etl.store import open_arrays  # noqa: E402
from model import data  # noqa: E402


def split_with_subjects(published: Refreshed) -> str:
    return str(max(dataset.read_facts(published.folder)["splits"].items(), key=lambda item: item[1])[0])


def test_a_split_is_read_as_it_is_stored(published: Refreshed) -> None:
    used = manifest.used(dataset.read_manifest(published.folder))
    arrays = open_arrays(published.folder)
    for split in used["split"].unique():
        pairs = data.load(published.folder, split)
        rows = used[used["split"] == split]
        assert pairs.subjects == rows["subject_id"].tolist()
        for name, held in (("t1", pairs.source), ("t2", pairs.target)):
            stored = np.concatenate([np.asarray(arrays[name][row]) for row in rows["store_row"]])
            assert held.dtype == torch.int16
            np.testing.assert_array_equal(held.numpy(), stored)


def test_no_subject_is_in_two_splits(published: Refreshed) -> None:
    splits = dataset.read_facts(published.folder)["splits"]
    held = [set(data.load(published.folder, split).subjects) for split in splits]
    assert sum(len(subjects) for subjects in held) == len(set.union(*held))


def test_the_other_direction_swaps_the_arrays(published: Refreshed) -> None:
    split = split_with_subjects(published)
    there, back = (data.load(published.folder, split, d) for d in ("t1->t2", "t2->t1"))
    assert torch.equal(there.source, back.target)
    assert torch.equal(there.target_range, back.source_range)


def test_the_percentiles_become_the_ends_of_the_range(published: Refreshed) -> None:
    split = split_with_subjects(published)
    pairs = data.load(published.folder, split)
    used = manifest.used(dataset.read_manifest(published.folder)).set_index("subject_id")
    for subject, name in enumerate(pairs.subjects):
        index = torch.nonzero(pairs.subject == subject).flatten()
        _, target = pairs.normalised(index)
        raw = pairs.target[index].numpy().astype(float)
        low, high = used.loc[name, "t2_p_low"], used.loc[name, "t2_p_high"]
        wanted = np.clip((raw - low) / (high - low) * 2 - 1, -1, 1)
        np.testing.assert_allclose(target[:, 0].numpy(), wanted, atol=1e-5)
        assert target.min() == -1
        assert target.max() == 1


@pytest.mark.parametrize(
    ("split", "direction", "line"),
    [
        ("nobody", None, "has no subject in split nobody"),
        ("train", "t1->pd", "direction 't1->pd' does not fit the dataset: it is t1->t2 or t2->t1"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(
    published: Refreshed, split: str, direction: str | None, line: str
) -> None:
    with pytest.raises(DatasetError, match=line) as error:
        data.load(published.folder, split, direction)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["deleted", "flipped"])
def test_a_shard_that_is_damaged_is_named_and_not_read(published: Refreshed, tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(published.folder, tmp_path / published.version))
    used = manifest.used(dataset.read_manifest(folder))
    row = used.loc[used["split"] == split_with_subjects(published), "store_row"].iloc[0]
    shard = folder / f"slices.zarr/t2/c/{row}/0/0/0"
    whole = shard.read_bytes()
    shard.unlink()  # which Zarr reads as zeros
    if damage == "flipped":
        middle = len(whole) // 2
        shard.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(DatasetError) as caught:
        data.load(folder, split_with_subjects(published))
    assert str(shard) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_split_that_does_not_fit_says_what_it_needs_and_what_is_there(
    published: Refreshed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
    with pytest.raises(DatasetError, match=r"needs 0\.00 GB in the memory of cpu, which has 0\.00 GB free"):
        data.load(published.folder, split_with_subjects(published))


@given(pairs=st.integers(1, 40), seed=st.integers(0, 2**64), start=st.integers(0, 200), count=st.integers(1, 90))
def test_the_order_is_passes_over_all_pairs_and_can_be_entered_anywhere(
    pairs: int, seed: int, start: int, count: int
) -> None:
    stream = data.indices(pairs, seed, 0, start + count)
    assert torch.equal(data.indices(pairs, seed, start, count), stream[start:])
    for at in range(0, len(stream) - pairs + 1, pairs):
        whole = stream[at : at + pairs]
        assert sorted(whole.tolist()) == list(range(pairs))


def test_passes_differ() -> None:
    first, second = data.indices(50, 0, 0, 100).split(50)
    assert not torch.equal(first, second)
    assert not torch.equal(first, data.indices(50, 1, 0, 50))


@given(
    kind=st.sampled_from(["none", "flip", "jitter"]),
    size=st.integers(32, 48),
    batch=st.integers(1, 4),
    first=st.integers(0, 1000),
)
def test_both_images_of_a_pair_are_changed_alike(kind: str, size: int, batch: int, first: int) -> None:
    image = torch.arange(batch * size * size, dtype=torch.float32).reshape(batch, 1, size, size)
    a, b = data.augment((image, -image), kind, 32, seed=0, first=first)  # type: ignore[arg-type]
    assert a.shape == (batch, 1, 32, 32)
    assert torch.equal(a, -b)
    again, _ = data.augment((image, -image), kind, 32, seed=0, first=first)  # type: ignore[arg-type]
    assert torch.equal(a, again)
    alone = [data.augment((image[n : n + 1],), kind, 32, seed=0, first=first + n)[0] for n in range(batch)]  # type: ignore[arg-type]
    assert torch.equal(a, torch.cat(alone))  # whatever else is in the batch
    if kind != "jitter":  # then it is a window of the image, or its mirror image, and nothing is interpolated
        for one, of in zip(a, image, strict=True):
            rows = one[0] if one[0, 0, 1] > one[0, 0, 0] else one[0].flip(1)
            top, left = divmod(int(rows[0, 0] - of.min()), size)
            assert torch.equal(rows, of[0, top : top + 32, left : left + 32])


def test_flips_and_crops_do_vary() -> None:
    image = torch.arange(40 * 40, dtype=torch.float32).reshape(1, 1, 40, 40)
    seen = [data.augment((image,), "flip", 32, seed=0, first=first)[0] for first in range(20)]
    assert len({int(s.min()) for s in seen}) > 5
    assert {bool(s[0, 0, 0, 1] > s[0, 0, 0, 0]) for s in seen} == {True, False}
    whole = [data.augment((image[..., :32, :32],), "none", 32, seed=0, first=first)[0] for first in range(5)]
    assert all(torch.equal(w, image[..., :32, :32]) for w in whole)


def test_jitter_enlarges_by_what_was_published() -> None:
    ramp = torch.linspace(0, 1, 256).repeat(256, 1)[None, None]
    (out,) = data.augment((ramp,), "jitter", 256, seed=0, first=0)
    slope = (out[0, 0, 0, 200] - out[0, 0, 0, 50]).abs() / 150
    assert float(slope) == pytest.approx(1 / 255 * 256 / 286, rel=1e-3)


def test_a_crop_larger_than_the_slices_is_refused() -> None:
    with pytest.raises(DatasetError, match="crops of 64 x 64 do not fit slices of 32 x 32; set a smaller side"):
        data.augment((torch.zeros(1, 1, 32, 32),), "none", 64, seed=0, first=0)


def test_what_is_normalised_is_not_changed_itself() -> None:
    for dtype in (torch.int16, torch.float32):
        stored = torch.tensor([[[0, 50, 100, 200]]], dtype=dtype)
        found = data.normalise(stored, torch.tensor([[0.0, 100.0]]))
        assert found.flatten().tolist() == [-1, 0, 1, 1]
        assert stored.flatten().tolist() == [0, 50, 100, 200]
