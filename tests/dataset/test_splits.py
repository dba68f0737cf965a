"""Splits by order and by file, as in publications; and persons who end up in several splits."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from ixi_etl.config import DatasetConfig
from ixi_etl.dataset.splits import group_persons, leaking_subjects, split_files, split_in_order, spread_subjects


def test_the_first_subjects_are_train_then_val_then_test() -> None:
    assert split_in_order(6, (3, 1, 2)) == ["train"] * 3 + ["val"] + ["test"] * 2
    assert split_in_order(2, (3, 1, 2)) == ["train"] * 2


def published_split(names: list[str], seed: int) -> dict[str, str]:
    """The published rule: sort the names of all files, shuffle them, and take 80% and 5% from the front."""
    files = sorted(names)
    random.seed(seed)
    random.shuffle(files)
    train, val = int(len(files) * 0.80), int(len(files) * 0.05)
    return {name: "train" if n < train else "val" if n < train + val else "test" for n, name in enumerate(files)}


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 100))
def test_files_are_split_as_published(subjects: int, slices: int, seed: int) -> None:
    config = DatasetConfig(split_by="file", split=(0.8, 0.05, 0.15), split_seed=seed)
    names = [f"IXI{subject:03d}-{number:03d}.png" for subject in range(subjects) for number in range(slices)]
    expected = published_split(names, seed)
    found = split_files(subjects, slices, config)
    assert [split for row in found for split in row] == [expected[name] for name in names]


def test_persons_with_slices_in_several_splits_are_found() -> None:
    splits = {
        "IXI001-Guys-1": ["train", "test"],
        "IXI002-HH-1": ["train"],
        "IXI002-HH-2": ["test"],  # a second scan of the same person
        "IXI003-HH-1": ["train", "val"],
        "IXI004-HH-1": ["train"],
        "IXI005-HH-1": ["test"],
        "IXI006-HH-1": ["test"],
    }
    on_both_sides = ["IXI001-Guys-1", "IXI002-HH-1", "IXI002-HH-2"]
    assert leaking_subjects(splits, []) == on_both_sides
    assert spread_subjects(splits, []) == [*on_both_sides, "IXI003-HH-1"]
    shared = [[("IXI004-HH-1", "T1"), ("IXI005-HH-1", "T1")]]
    assert leaking_subjects(splits, shared) == [*on_both_sides, "IXI004-HH-1", "IXI005-HH-1"]


def test_persons_who_share_scans_are_one_group() -> None:
    scans = [[("a-1", "T1"), ("b-1", "T1")], [("b-1", "T2"), ("c-1", "T2")]]
    groups = group_persons(["a", "b", "c", "d"], scans)
    assert groups["a"] == groups["c"] == {"a", "b", "c"}
    assert groups["d"] == {"d"}
