"""The cut of many subjects: on threads of this machine, or on the workers of a Dask cluster."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ixi_etl.core.parallel import parallel_map
from ixi_etl.errors import DatasetError
from ixi_etl.pairing.cut import (
    CutJob,
    cut_subject,
    files_intact,
    picture_path,
    read_finished_record,
    read_member_checked,
    record_path,
    shard_path,
)
from ixi_etl.pairing.remote_cut import WorkFolder, cut_on_worker, fetch_staged, mark_folder
from ixi_etl.recipes.ixi_inputs import VOXEL_LIBRARIES, RefreshJob

Record = dict[str, Any]


def cut_batch(job: RefreshJob, batch: Sequence[CutJob], on_done: Callable[[int], None]) -> list[Record]:
    """Cut subjects, and return their records in the same order.

    Args:
        on_done: called with the number of finished subjects.

    Raises:
        DatasetError: an archive changed, or Dask's workers read other bytes or do not write where this machine reads.
    """
    config, work = job.config, job.work.resolve()
    cut_here = partial(cut_subject, dataset_config=config.dataset, work=work)
    if not config.dask:
        return parallel_map(cut_here, batch, workers=config.workers, on_done=on_done)
    unfinished = config.data_root.remote_unfinished
    folder = mark_folder(work, unfinished and unfinished / job.version)
    fetch_staged(folder)
    # Workers that do not share the folder cannot see what is finished, so this machine looks it up.
    here = [cut_job for cut_job in batch if folder.staging and read_finished_record(cut_job, work)]
    found = parallel_map(cut_here, here, workers=config.workers, on_done=on_done)
    records = {cut_job.subject_id: record for cut_job, record in zip(here, found, strict=True)}
    there = [cut_job for cut_job in batch if cut_job.subject_id not in records]
    if folder.staging:
        for cut_job in there:
            _remove_leftovers(cut_job, work)
    cut = parallel_map(
        partial(cut_on_worker, dataset_config=config.dataset, work=folder),
        [without_fingerprints(cut_job) for cut_job in there],
        workers=config.workers,
        address=config.dask,
        libraries=("ixi-etl", *VOXEL_LIBRARIES),
        on_done=lambda done: on_done(len(here) + done),
    )
    fetch_staged(folder)
    check_members(there, cut, work)
    _check_files(cut, folder)
    records |= {cut_job.subject_id: record for cut_job, record in zip(there, cut, strict=True)}
    return [records[cut_job.subject_id] for cut_job in batch]


def without_fingerprints(cut_job: CutJob) -> CutJob:
    """The job for a worker that may see the archives with other fingerprints, on another mount."""
    return replace(cut_job, members={m: replace(member, fingerprint="") for m, member in cut_job.members.items()})


def _remove_leftovers(cut_job: CutJob, work: Path) -> None:
    """Remove damaged files of a subject, in the place of which those on S3 would not be downloaded."""
    shards = [shard_path(work, cut_job.subject_id, m) for m in cut_job.members]
    for path in (record_path(work, cut_job.subject_id), picture_path(work, cut_job.subject_id), *shards):
        path.unlink(missing_ok=True)


def check_members(cut_jobs: Sequence[CutJob], records: Sequence[Mapping[str, Any]], work: Path) -> None:
    """Check that remote workers read what was hashed here: the same fingerprint, or else the same SHA-256.

    Raises:
        DatasetError: a worker read other bytes. Its records are removed.
    """
    differing = ""
    for cut_job, record in zip(cut_jobs, records, strict=True):
        for modality, worker_fingerprint in record["fingerprints"].items():
            member = cut_job.members[modality]
            if worker_fingerprint != member.fingerprint:
                data, _ = read_member_checked(member)
                if hashlib.sha256(data).hexdigest() != record[f"{modality.lower()}_sha256"]:
                    record_path(work, cut_job.subject_id).unlink(missing_ok=True)
                    differing = member.archive
    if differing:
        raise DatasetError(
            f"Dask's workers read other bytes in {differing} than this machine; make the copies equal and run again"
        )


def _check_files(records: Sequence[Mapping[str, Any]], folder: WorkFolder) -> None:
    """Check that the files written by remote workers are here, with the bytes that the workers wrote."""
    for record in records:
        if not files_intact(record, folder.path):
            names = ", ".join(record["files"])
            where = f"; give Dask's workers the AWS_... variables of this machine, for {folder.staging}"
            share = "; Dask's workers must share that folder"
            raise DatasetError(
                f"{names}: cut by a worker, but not whole in {folder.path}" + (where if folder.staging else share)
            )
