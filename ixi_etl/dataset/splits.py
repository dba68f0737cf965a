"""Assign persons, subjects or slices to train, val and test."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence

from ixi_etl.config import SPLITS, DatasetConfig


def person_of(subject_id: str) -> str:
    """The person of a subject: `IXI002` of `IXI002-Guys-0828`. Two scans of one person share it."""
    return subject_id.partition("-")[0]


def split_of(person: str, dataset_config: DatasetConfig) -> str:
    """The split of one person (`IXI002`), from a hash of the person and the split seed.

    So a refresh never moves a person, as long as seed and shares stay the same; `assign_splits` makes one exception.
    """
    digest = hashlib.sha256(f"{dataset_config.split_seed}:{person}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    train, val, _ = dataset_config.split
    return SPLITS[0] if position < train else SPLITS[1] if position < train + val else SPLITS[2]


def group_persons(persons: Iterable[str], duplicates: Iterable[list[tuple[str, str]]]) -> dict[str, frozenset[str]]:
    """Person -> all persons who share a scan with this one, directly or through others; at least the person.

    Args:
        persons: of the used subjects.
        duplicates: groups of (subject_id, modality) with equal voxels.
    """
    groups = {person: frozenset({person}) for person in persons}
    for scans in duplicates:
        merged = frozenset().union(*(groups[person_of(subject)] for subject, _ in scans))
        groups |= dict.fromkeys(merged, merged)
    return groups


def assign_splits(
    persons: Iterable[str], duplicates: Iterable[list[tuple[str, str]]], dataset_config: DatasetConfig
) -> dict[str, str]:
    """Person -> split, with all persons who share a scan in one split; arguments as of `group_persons`.

    That is the first of train, val and test that any of them has, so that a person in train never moves to test because
    a copy of a scan appears.
    """
    return {
        person: min((split_of(other, dataset_config) for other in group), key=SPLITS.index)
        for person, group in group_persons(persons, duplicates).items()
    }


def split_in_order(subjects: int, counts: Sequence[int]) -> list[str]:
    """The split of each of `subjects` in order: the first `counts[0]` train, then val, then test."""
    splits = [name for name, count in zip(SPLITS, counts, strict=True) for _ in range(count)]
    return splits[:subjects]


def split_files(subjects: int, slices: int, dataset_config: DatasetConfig) -> list[list[str]]:
    """The split of each slice of each subject, as if each slice were a file: [subject][slice].

    All files, sorted by subject, then by slice, are shuffled. The first n x share, rounded down, are train, the next
    val, likewise, and the rest test. So one subject can have slices in train and in test.
    """
    files = [(subject, number) for subject in range(subjects) for number in range(slices)]
    random.Random(dataset_config.split_seed).shuffle(files)  # noqa: S311  # nosec B311 - as published, no secret
    train, val = (int(len(files) * share) for share in dataset_config.split[:2])
    splits = [[SPLITS[2]] * slices for _ in range(subjects)]
    for position, (subject, number) in enumerate(files[: train + val]):
        splits[subject][number] = SPLITS[0] if position < train else SPLITS[1]
    return splits


def spread_subjects(
    splits: Mapping[str, Iterable[str]], duplicates: Iterable[list[tuple[str, str]]], among: Iterable[str] = SPLITS
) -> list[str]:
    """Subjects of the persons with slices in more than one of the splits `among`, in order.

    Those who share a scan count as one person, so all their subjects are listed, also one with slices in one split.

    Args:
        splits: subject_id -> splits of its slices.
        duplicates: groups of (subject_id, modality) with equal voxels.
    """
    groups = group_persons(map(person_of, splits), duplicates)
    found: dict[frozenset[str], set[str]] = {}
    for subject, names in splits.items():
        found.setdefault(groups[person_of(subject)], set()).update(set(names) & set(among))
    return [subject for subject in splits if len(found[groups[person_of(subject)]]) > 1]


def leaking_subjects(splits: Mapping[str, Iterable[str]], duplicates: Iterable[list[tuple[str, str]]]) -> list[str]:
    """`spread_subjects` in train and in test."""
    return spread_subjects(splits, duplicates, among=(SPLITS[0], SPLITS[2]))
