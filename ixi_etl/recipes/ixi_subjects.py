"""How many subjects are cut, whether they suffice, and whether a split leaks persons."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from ixi_etl.config import DatasetConfig
from ixi_etl.core.text import quantity
from ixi_etl.dataset import manifest
from ixi_etl.dataset.splits import person_of, spread_subjects
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


def check_split_counts(subjects: pd.DataFrame, dataset_config: DatasetConfig) -> None:
    """Check that as many `subjects` are used, or candidates, as the split by order needs; none at all is another error.

    Raises:
        DatasetError: there are fewer.
    """
    left, counts = int((subjects["reason"] == "").sum()), dataset_config.split_counts
    if counts and 0 < left < sum(counts):
        found = subjects.loc[subjects["reason"] != "", "reason"].value_counts()
        excluded = f" (excluded: {', '.join(f'{n} {reason}' for reason, n in found.items())})" if len(found) else ""
        raise DatasetError(
            f"{quantity(left, 'subject')} can be used{excluded}, but --split-counts {dataset_config.shown_counts} "
            f"needs {sum(counts)}; give numbers that add up to at most {left}, or archives with more subjects"
        )


def warn_about_leaks(
    final: pd.DataFrame, records: Mapping[str, Mapping[str, Any]], dataset_config: DatasetConfig
) -> None:
    """Warn in one line if persons have slices in several splits, which a split by order or by file allows."""
    if dataset_config.split_by == "person":
        return
    used = manifest.used_rows(final)
    if dataset_config.split_by == "file":
        leaking = used.loc[used["leaks"] == 1, "subject_id"]
        if len(leaking):
            log.warning(
                "split by file: slices of %d of %s (%s) are in train and in test, so results on test are too good; "
                "--split-by person keeps persons apart",
                *(len(leaking), quantity(len(used), "subject")),
                quantity(len(set(leaking.map(person_of))), "person"),
            )
        return
    splits = {subject: [split] for subject, split in zip(used["subject_id"], used["split"], strict=True)}
    duplicates = manifest.find_equal_scans({subject: records[subject] for subject in splits})
    persons = sorted(set(map(person_of, spread_subjects(splits, duplicates))))
    if persons:
        log.warning(
            "split by order: scans of %s are in several splits (%s), so the splits are not independent",
            *(quantity(len(persons), "person"), ", ".join(persons)),
        )
