"""How many subjects are cut, whether they suffice, and whether a split leaks persons."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from ixi_etl.config import SPLITS, DatasetConfig
from ixi_etl.dataset import manifest
from ixi_etl.dataset.splits import spread_persons
from ixi_etl.errors import DatasetError
from ixi_etl.pairing.cut import CutJob

log = logging.getLogger(__name__)

Records = dict[str, dict[str, Any]]


def cut_enough(
    cut_jobs: Sequence[CutJob],
    screened: pd.DataFrame,
    dataset_config: DatasetConfig,
    cut: Callable[[Sequence[CutJob]], Records],
) -> Records:
    """Cut the candidates in order until `subject_limit` of them can be used or none is left; only hash all others.

    Without a limit all are cut at once. The result does not depend on the number of workers.

    Args:
        cut: jobs -> subject_id -> record of `cut_subject`.
    """
    limit = dataset_config.subject_limit
    if limit is None:
        return cut(cut_jobs)
    records: Records = {}
    waiting = [job for job in cut_jobs if job.is_candidate]
    missing = limit
    while waiting and missing > 0:
        records |= cut(waiting[:missing])
        waiting = waiting[missing:]
        missing = limit - len(manifest.usable_subjects(screened, records, dataset_config))
    rest = [replace(job, is_candidate=False) for job in cut_jobs if job.subject_id not in records]
    return records | cut(rest)


def check_split_counts(subjects: int, dataset_config: DatasetConfig, audit: str) -> None:
    """Check that there are as many subjects as the split by order needs; `audit` says where the excluded are listed.

    Raises:
        DatasetError: there are fewer.
    """
    counts = dataset_config.split_counts
    if counts and subjects < sum(counts):
        raise DatasetError(
            f"{subjects} subjects can be used, but split_counts {dataset_config.shown_counts} need {sum(counts)}; give "
            f"--split-counts that add up to at most {subjects}, or more subjects ({audit})"
        )


def warn_about_leaks(
    final: pd.DataFrame, records: Mapping[str, Mapping[str, Any]], dataset_config: DatasetConfig
) -> None:
    """Warn in one line if persons have slices in several splits, which a split by order or by file allows."""
    if dataset_config.split_by == "person":
        return
    splits = manifest.splits_of_subjects(manifest.used_rows(final))
    duplicates = manifest.find_equal_scans({subject: records[subject] for subject in splits})
    if dataset_config.split_by == "file":
        leaking = [subject for subject, names in splits.items() if {"train", "test"} <= names]
        persons = spread_persons(splits, duplicates, among=("train", "test"))
        if persons:
            log.warning(
                "split by file: %d of %d subjects (%d persons) have slices in train and in test, so results on test "
                "are too good; --split-by person keeps persons apart",
                *(len(leaking), len(splits), len(persons)),
            )
        return
    persons = spread_persons(splits, duplicates, among=SPLITS)
    if persons:
        log.warning(
            "split by order: %d persons have scans in several splits (%s), so the splits are not independent",
            *(len(persons), ", ".join(persons)),
        )
