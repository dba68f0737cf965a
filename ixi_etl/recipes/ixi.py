"""The refresh: IXI archives in, a published version out. The flow runs the same stages as Prefect tasks."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ixi_etl.config import DatasetConfig, RefreshConfig
from ixi_etl.core.files import os_errors_as_user_errors, write_atomic
from ixi_etl.core.lease import lock_data_root
from ixi_etl.core.progress import Progress, no_progress
from ixi_etl.dataset import manifest, metadata, publish, selection
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.dataset.schema import CANDIDATE, SCHEMAS, is_absent
from ixi_etl.dataset.splits import person_of
from ixi_etl.errors import DatasetError
from ixi_etl.pairing.cut import CutJob, archive_changed
from ixi_etl.recipes.ixi_cluster import cut_batch
from ixi_etl.recipes.ixi_inputs import DemographicsFile, Inputs, RefreshJob, create_cut_jobs
from ixi_etl.recipes.ixi_overlap import start_job
from ixi_etl.recipes.ixi_subjects import check_split_counts, cut_enough, warn_about_leaks
from ixi_etl.recipes.ixi_version import publish_version
from ixi_etl.scans.demographics import read_demographics
from ixi_etl.scans.survey import describe_skipped_members, modal_planes, survey

log = logging.getLogger(__name__)

ALWAYS_ALLOWED_UNREADABLE = 10  # subjects
BYTES_PER_VOXEL = 2  # int16
MAX_SUBJECTS_SHOWN = 5  # in a warning
UNREADABLE_REASONS = ("unreadable", "corrupt_voxels")

FLAGS_OF_THE_CUT = (manifest.DUPLICATE, manifest.GRID_DIFFERS)
"""Flags of `manifest.FLAGS` that need voxels, or all affines of a subject."""

UNCHECKED = "archive_unchecked"
"""Flag of subjects whose members were fetched singly, so that the MD5 of their archive was not checked."""


def refresh(config: RefreshConfig, progress: Progress = no_progress) -> PublishedVersion:
    """Make and publish the version of `config` and its archives, unless it is published already.

    Raises:
        IxiError: with a message that says what to do. Finished work is kept, and the next call continues from there.
    """
    with lock_data_root(config.data_root):
        job = start_job(config, progress)
        published = find_published(job)
        if published:
            return published
        survey_table = survey_archives(job)
        screened = select_subjects(job, survey_table)
        final, records = cut_subjects(job, survey_table, screened)
        return publish_version(job, survey_table, final, records)


@os_errors_as_user_errors()
def survey_archives(job: RefreshJob) -> pd.DataFrame:
    """The survey table of all members, unless it was made already to fetch some of them.

    Raises:
        DatasetError: an archive changed after it was hashed.
    """
    inputs = job.inputs
    if inputs.surveyed is not None:
        return inputs.surveyed
    _check_unchanged(inputs)
    try:
        return survey(inputs.locations, job.progress, patterns=job.config.pattern)
    finally:  # even if the survey fails, which may be because an archive is being replaced
        _check_unchanged(inputs)


@os_errors_as_user_errors()
def find_published(job: RefreshJob) -> PublishedVersion | None:
    """The version if it is published and intact, made the latest again; otherwise None."""
    return publish.find_published(job.config.data_root, job.version, job.inputs.origins)


def select_subjects(job: RefreshJob, survey_table: pd.DataFrame) -> pd.DataFrame:
    """Screen the subjects by their headers: one row per subject, a candidate or excluded.

    Raises:
        DatasetError: the demographics match no person in the archives.
    """
    dataset_config, inputs = job.config.dataset, job.inputs
    for sentence in describe_skipped_members(survey_table, inputs.archives, job.config.pattern):
        log.warning("%s", sentence)
    people = _read_people(inputs.demographics, survey_table) if inputs.demographics else None
    planes = modal_planes(survey_table)
    if dataset_config.pairing == "index" and len(set(planes.values())) > 1:
        slices = " and ".join(f"{m} slices are {plane}" for m, plane in planes.items())
        log.warning("index pairing: %s, so the two pictures of a pair show different planes of the head", slices)
    screened = selection.screen_headers(survey_table, dataset_config, people)
    _warn_about_flags(screened, [flag for flag in manifest.FLAGS if flag not in FLAGS_OF_THE_CUT])
    candidates = screened[screened["status"] == CANDIDATE]
    _check_modalities(candidates, dataset_config)
    check_split_counts(screened, dataset_config)
    return screened


def _check_modalities(subjects: pd.DataFrame, dataset_config: DatasetConfig) -> None:
    """Check that each modality has a scan, if there are any subjects: those that lack it may be kept."""
    absent = [m for m in dataset_config.modalities if len(subjects) and is_absent(subjects, m.lower()).all()]
    if absent:
        raise DatasetError(f"no subject that can be used has a {absent[0]}; leave {absent[0]} out of --modalities")


def _read_people(file: DemographicsFile, survey_table: pd.DataFrame) -> dict[str, dict[str, float | str]]:
    path, demographics = file.path, read_demographics(file.path, file.data)
    persons = {person_of(subject) for subject in survey_table["subject_id"] if subject}
    wanted, matched, message = demographics.match(persons)
    if not matched:
        raise DatasetError(f"{path}: {message}; give the table of these people, or omit --demographics")
    level = logging.INFO if matched == wanted and not demographics.unread else logging.WARNING
    log.log(level, "%s: %s", path, message)
    return demographics.people


def _warn_about_flags(manifest_table: pd.DataFrame, flags: Sequence[str]) -> None:
    for flag in flags:
        # With several moving modalities, a flag of the alignment of one of them is named after it.
        has_flag = manifest_table["flags"].str.contains(rf"(?:^|,)(?:[a-z0-9]+_)?{flag}(?:,|$)")
        subjects = manifest_table.loc[has_flag, "subject_id"].tolist()
        if subjects:
            shown = ", ".join(subjects[:MAX_SUBJECTS_SHOWN]) + (", ..." if len(subjects) > MAX_SUBJECTS_SHOWN else "")
            log.warning("%d flagged %s (%s): %s", len(subjects), flag, manifest.FLAGS[flag], shown)


@os_errors_as_user_errors()
def cut_subjects(
    job: RefreshJob, survey_table: pd.DataFrame, screened: pd.DataFrame
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Cut every candidate and hash every member.

    Returns:
        The final manifest, and subject_id -> record of `cut_subject`.

    Raises:
        DatasetError: too many subjects are unreadable or none is used, an archive changed, or Dask's workers cannot
            give their results to this machine.
    """
    config, inputs, work = job.config, job.inputs, job.work
    work.mkdir(parents=True, exist_ok=True)
    cut_jobs = create_cut_jobs(survey_table, screened, inputs, job.version)
    _check_disk(work, screened, config.dataset)
    finished = 0

    def cut(batch: Sequence[CutJob]) -> dict[str, dict[str, Any]]:
        nonlocal finished
        total = len(cut_jobs)
        results = cut_batch(job, batch, lambda done: job.progress("cut", finished + done, total, "subjects"))
        finished += len(batch)
        return {cut_job.subject_id: result for cut_job, result in zip(batch, results, strict=True)}

    records = cut_enough(cut_jobs, screened, config.dataset, cut)
    _check_unchanged(inputs)
    if inputs.are_members_only:
        for cut_job in cut_jobs:
            if cut_job.is_candidate:
                records[cut_job.subject_id] = _with_unchecked_flag(records[cut_job.subject_id])
    final = manifest.finalise(screened, records, config.dataset)
    _warn_about_flags(final, FLAGS_OF_THE_CUT)
    audit = job.staging / metadata.MANIFEST
    write_atomic(audit, SCHEMAS[config.dataset.name].to_csv(final))
    skipped = describe_skipped_members(survey_table, inputs.archives, config.pattern)
    _check_enough_subjects(final, config, audit, skipped)
    warn_about_leaks(final, records, config.dataset)
    return final, records


def _with_unchecked_flag(record: dict[str, Any]) -> dict[str, Any]:
    return record | {"flags": manifest.join_flags(record.get("flags"), UNCHECKED)}


def _check_disk(work: Path, screened: pd.DataFrame, dataset_config: DatasetConfig) -> None:
    """Check that an uncompressed int16 slab per candidate and modality fits on the disk, less the existing shards."""
    shapes = screened.loc[screened["status"] == CANDIDATE, f"{dataset_config.reference.lower()}_shape"]
    shapes = shapes[: dataset_config.subject_limit]
    voxels = dataset_config.window_length * sum(math.prod(json.loads(shape)[:2]) for shape in shapes)
    existing = sum(path.stat().st_size for path in work.glob("*.shard"))
    needed_bytes = len(dataset_config.modalities) * BYTES_PER_VOXEL * voxels - existing
    free_bytes = shutil.disk_usage(work).free
    if needed_bytes > free_bytes:
        raise DatasetError(
            f"{work} has {free_bytes / 1e9:.2f} GB free, but the slabs need {needed_bytes / 1e9:.2f} GB; free some"
        )


def _check_unchanged(inputs: Inputs) -> None:
    """Check that the archives are those that were hashed, because their MD5s are part of the version's name."""
    for archive in inputs.archives.values():
        try:
            unchanged = archive.current_fingerprint() == archive.fingerprint
        except FileNotFoundError:
            unchanged = False
        if not unchanged:
            raise archive_changed(archive.location)


def _check_enough_subjects(final: pd.DataFrame, config: RefreshConfig, audit: Path, skipped: Sequence[str]) -> None:
    dataset_config, max_unreadable = config.dataset, config.max_unreadable
    paired = final[~final["reason"].isin(SCHEMAS[dataset_config.name].steps["paired"])]
    unreadable = paired[paired["reason"].isin(UNREADABLE_REASONS)]
    if len(unreadable) > max(max_unreadable * len(paired), ALWAYS_ALLOWED_UNREADABLE):
        raise DatasetError(
            f"{len(unreadable)} of {len(paired)} paired subjects are unreadable "
            f"({', '.join(unreadable['subject_id'])}); "
            f"{audit} lists the reasons; fetch the archives again, or raise --max-unreadable"
        )
    _check_modalities(manifest.used_rows(final), dataset_config)
    if manifest.used_rows(final).empty:
        if final.empty:
            raise DatasetError(f"the archives contain no subject: {'; '.join(skipped)}")
        reasons = ", ".join(f"{n} {reason}" for reason, n in final["reason"].value_counts().items())
        raise DatasetError("; ".join([f"no subject is left ({reasons})", *skipped, f"{audit} lists the reasons"]))
    check_split_counts(final, dataset_config)
