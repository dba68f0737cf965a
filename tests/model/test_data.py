"""A training step gets the right slices, normalised and augmented, in an order that depends only on seed and step."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ixi_etl.dataset import manifest, metadata
from ixi_etl.dataset.normalisation import normalise
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.dataset.store import open_arrays
from ixi_etl.errors import ConfigError, DatasetError
from model import augmentation, data


def split_with_subjects(published: PublishedVersion) -> str:
    return str(max(metadata.read_metadata(published.folder)["splits"].items(), key=lambda item: item[1])[0])


def test_a_split_keeps_its_stored_values_and_order(published: PublishedVersion) -> None:
    used = manifest.used_rows(metadata.read_manifest(published.folder))
    arrays = open_arrays(published.folder)
    for split in used["split"].unique():
        pairs = data.load_pairs(published.folder, split)
        rows = used[used["split"] == split]
        assert pairs.subjects == rows["subject_id"].tolist()
        for name, loaded in (("t1", pairs.sources[0].stored), ("t2", pairs.target.stored)):
            stored = np.stack([np.asarray(arrays[name][row]) for row in rows["store_row"]])
            assert loaded.dtype == torch.int16
            np.testing.assert_array_equal(loaded.numpy(), stored)


def test_no_subject_is_in_two_splits(published: PublishedVersion) -> None:
    splits = metadata.read_metadata(published.folder)["splits"]
    loaded = [set(data.load_pairs(published.folder, split).subjects) for split in splits]
    assert sum(len(subjects) for subjects in loaded) == len(set.union(*loaded))


def test_the_other_direction_swaps_the_arrays(published: PublishedVersion) -> None:
    split = split_with_subjects(published)
    forward, backward = (data.load_pairs(published.folder, split, d) for d in ("t1->t2", "t2->t1"))
    assert torch.equal(forward.sources[0].stored, backward.target.stored)
    assert torch.equal(forward.target.low_high, backward.sources[0].low_high)


def test_the_percentiles_are_mapped_to_minus_one_and_one(published: PublishedVersion) -> None:
    split = split_with_subjects(published)
    pairs = data.load_pairs(published.folder, split)
    used = manifest.used_rows(metadata.read_manifest(published.folder)).set_index("subject_id")
    for subject, name in enumerate(pairs.subjects):
        index = torch.nonzero(pairs.subject == subject).flatten()
        _, target = pairs.normalised(index)
        raw = pairs.target.stored[subject].numpy().astype(float)
        low, high = used.loc[name, "t2_p_low"], used.loc[name, "t2_p_high"]
        wanted = np.clip((raw - low) / (high - low) * 2 - 1, -1, 1)
        np.testing.assert_allclose(target[:, 0].numpy(), wanted, atol=1e-5)
        assert target.min() == -1
        assert target.max() == 1


@pytest.mark.parametrize(
    ("split", "direction", "message"),
    [
        ("holdout", None, "has no subject in split holdout"),
        ("train", "t1->pd", "direction 't1->pd' names pd; the arrays of ixi-t1-t2 are t1, t2: use for example t1->t2"),
    ],
)
def test_an_empty_split_and_an_unknown_array_are_one_line_errors(
    published: PublishedVersion, split: str, direction: str | None, message: str
) -> None:
    with pytest.raises((ConfigError, DatasetError), match=message) as error:
        data.load_pairs(published.folder, split, direction)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["deleted", "flipped"])
def test_a_damaged_or_missing_shard_is_named(published: PublishedVersion, tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(published.folder, tmp_path / published.version))
    used = manifest.used_rows(metadata.read_manifest(folder))
    row = used.loc[used["split"] == split_with_subjects(published), "store_row"].iloc[0]
    shard = folder / f"slices.zarr/t2/c/{row}/0/0/0"
    original = shard.read_bytes()
    shard.unlink()  # Zarr reads a missing shard as zeros
    if damage == "flipped":
        middle = len(original) // 2
        shard.write_bytes(original[:middle] + bytes([original[middle] ^ 1]) + original[middle + 1 :])
    with pytest.raises(DatasetError) as caught:
        data.load_pairs(folder, split_with_subjects(published))
    assert str(shard) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_split_larger_than_memory_states_both_sizes(
    published: PublishedVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
    with pytest.raises(DatasetError, match=r"needs 0\.00 GB in the memory of cpu, which has 0\.00 GB free"):
        data.load_pairs(published.folder, split_with_subjects(published))


@given(pairs=st.integers(1, 40), seed=st.integers(0, 2**64), start=st.integers(0, 200), count=st.integers(1, 90))
def test_the_order_consists_of_passes_over_all_pairs_and_can_start_anywhere(
    pairs: int, seed: int, start: int, count: int
) -> None:
    stream = augmentation.batch_indices(pairs, seed, 0, start + count)
    assert torch.equal(augmentation.batch_indices(pairs, seed, start, count), stream[start:])
    for begin in range(0, len(stream) - pairs + 1, pairs):
        one_pass = stream[begin : begin + pairs]
        assert sorted(one_pass.tolist()) == list(range(pairs))


def test_passes_and_seeds_have_different_orders() -> None:
    first, second = augmentation.batch_indices(50, 0, 0, 100).split(50)
    assert not torch.equal(first, second)
    assert not torch.equal(first, augmentation.batch_indices(50, 1, 0, 50))


@given(
    kind=st.sampled_from(["none", "flip", "jitter"]),
    size=st.integers(32, 48),
    batch=st.integers(1, 4),
    first=st.integers(0, 1000),
)
def test_both_images_of_a_pair_are_augmented_alike(kind: str, size: int, batch: int, first: int) -> None:
    image = torch.arange(batch * size * size, dtype=torch.float32).reshape(batch, 1, size, size)
    a, b = augmentation.augment((image, -image), kind, (32, 32), seed=0, first=first)  # type: ignore[arg-type]
    assert a.shape == (batch, 1, 32, 32)
    assert torch.equal(a, -b)
    again, _ = augmentation.augment((image, -image), kind, (32, 32), seed=0, first=first)  # type: ignore[arg-type]
    assert torch.equal(a, again)
    alone = [
        augmentation.augment((image[n : n + 1],), kind, (32, 32), seed=0, first=first + n)[0] for n in range(batch)
    ]  # type: ignore[arg-type]
    assert torch.equal(a, torch.cat(alone))  # independent of the rest of the batch
    if kind != "jitter":  # a crop of the image or of its mirror image, without interpolation
        for crop, original in zip(a, image, strict=True):
            rows = crop[0] if crop[0, 0, 1] > crop[0, 0, 0] else crop[0].flip(1)
            top, left = divmod(int(rows[0, 0] - original.min()), size)
            assert torch.equal(rows, original[0, top : top + 32, left : left + 32])


def test_flips_and_crops_vary() -> None:
    image = torch.arange(40 * 40, dtype=torch.float32).reshape(1, 1, 40, 40)
    seen = [augmentation.augment((image,), "flip", (32, 32), seed=0, first=first)[0] for first in range(20)]
    assert len({int(s.min()) for s in seen}) > 5
    assert {bool(s[0, 0, 0, 1] > s[0, 0, 0, 0]) for s in seen} == {True, False}
    uncropped = [
        augmentation.augment((image[..., :32, :32],), "none", (32, 32), seed=0, first=first)[0] for first in range(5)
    ]
    assert all(torch.equal(w, image[..., :32, :32]) for w in uncropped)


def test_jitter_enlarges_by_the_published_factor() -> None:
    ramp = torch.linspace(0, 1, 256).repeat(256, 1)[None, None]
    (out,) = augmentation.augment((ramp,), "jitter", (256, 256), seed=0, first=0)
    slope = (out[0, 0, 0, 200] - out[0, 0, 0, 50]).abs() / 150
    assert float(slope) == pytest.approx(1 / 255 * 256 / 286, rel=1e-3)


def test_a_crop_larger_than_the_slices_is_refused() -> None:
    with pytest.raises(ConfigError, match="crops of 64 x 64 do not fit slices of 32 x 32; set a smaller side"):
        augmentation.augment((torch.zeros(1, 1, 32, 32),), "none", (64, 64), seed=0, first=0)


def test_normalise_does_not_change_its_input() -> None:
    for dtype in (torch.int16, torch.float32):
        stored = torch.tensor([[[[0, 50, 100, 200]]]], dtype=dtype)
        found = normalise(stored, torch.tensor([[0.0, 100.0]]))
        assert found.flatten().tolist() == [-1, 0, 1, 1]
        assert stored.flatten().tolist() == [0, 50, 100, 200]
