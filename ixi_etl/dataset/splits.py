"""Assign persons to train, val and test."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

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


def assign_splits(
    persons: Iterable[str], duplicates: Iterable[list[tuple[str, str]]], dataset_config: DatasetConfig
) -> dict[str, str]:
    """Person -> split, with all persons who share a scan in one split.

    That is the first of train, val and test that any of them has, so that a person in train never moves to test because
    a copy of a scan appears.

    Args:
        persons: of the used subjects.
        duplicates: groups of (subject_id, modality) with equal voxels.
        dataset_config: the shares and the seed.
    """
    groups = {person: {person} for person in persons}
    for scans in duplicates:
        merged = set().union(*(groups[person_of(subject)] for subject, _ in scans))
        groups |= dict.fromkeys(merged, merged)
    return {
        p: min((split_of(other, dataset_config) for other in group), key=SPLITS.index) for p, group in groups.items()
    }
