"""Cut on a Dask worker: in the folder of the refresh if the worker shares it, otherwise through S3.

A worker that does not share the folder cuts into a temporary one and uploads shards, picture and, last, the cut record
to the root's staging on S3. The refresh downloads them, so that all later stages find the folder as they always do. A
refresh that was killed finds in the staging what workers finished.
"""

from __future__ import annotations

import secrets
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ixi_etl.config import DatasetConfig
from ixi_etl.core.files import os_errors_as_user_errors, write_atomic
from ixi_etl.core.progress import no_progress
from ixi_etl.core.storage import check_reachable, file_sizes, filesystem_of, is_url, naming_file, to_path, upload_folder
from ixi_etl.errors import ConfigError, DatasetError
from ixi_etl.pairing.cut import CutJob, cut_subject, record_path

MARK = ".shared"
"""File in the folder of finished subjects by which a worker recognises it."""


@dataclass(frozen=True)
class WorkFolder:
    """The folder of finished subjects, as a worker may or may not see it.

    Attributes:
        path: on the machine of the refresh.
        mark: the content of its file `MARK`; who reads it there shares the folder.
        staging: URL of the folder on S3 for workers that do not; None if the root is local.
    """

    path: Path
    mark: str
    staging: str | None

    @property
    def is_shared(self) -> bool:
        """Whether this process sees the folder of the refresh, and not none or another one at the same path."""
        try:
            return (self.path / MARK).read_text() == self.mark
        except (OSError, UnicodeDecodeError):
            return False


def mark_folder(path: Path, staging: Path | None) -> WorkFolder:
    """Write the file `MARK`, unless an earlier refresh did: a network file system may show its old content for long."""
    mark = path / MARK
    if not mark.exists():
        write_atomic(mark, secrets.token_hex(16))
    return WorkFolder(path, mark.read_text(), str(staging) if staging else None)


STAGED = (".json", ".jpg", ".shard")
"""Suffixes of the files that `cut_subject` writes."""


@os_errors_as_user_errors()
def cut_on_worker(job: CutJob, dataset_config: DatasetConfig, work: WorkFolder) -> dict[str, Any]:
    """Cut one subject where the refresh will find it, and return its record: see `cut_subject`.

    Raises:
        DatasetError: this machine shares no folder with the refresh and has no way through S3, or cannot read the
            archives, or an archive changed after it was hashed.
        ConfigError: this machine cannot reach the root on S3.
    """
    if work.is_shared:
        return cut_subject(job, dataset_config, work.path)
    host = socket.gethostname()
    if work.staging is None:
        raise DatasetError(
            f"the Dask worker {host} does not see the folder {work.path} of the refresh; let both share it (the "
            "root, or --scratch), or put the root on S3"
        )
    try:
        check_reachable(work.staging)
    except ConfigError as error:
        raise ConfigError(f"the Dask worker {host}: {error}") from error
    for member in job.members.values():
        if not is_url(member.archive) and not Path(member.archive).exists():
            raise DatasetError(
                f"the Dask worker {host} does not see {member.archive}; workers that share no folder with the refresh "
                "read archives on S3: copy them (and MD5SUMS) there, and give --source s3://BUCKET/FOLDER"
            )
    with tempfile.TemporaryDirectory(prefix="ixi-cut-") as name:
        folder = Path(name)
        record = cut_subject(job, dataset_config, folder)
        last = record_path(folder, job.subject_id).name
        upload_folder(folder, to_path(work.staging), last=last, progress=no_progress)
    return record


def fetch_staged(work: WorkFolder) -> None:
    """Download from the staging on S3 what is not in the folder yet, records last: they mark finished subjects."""
    if work.staging is None:
        return
    filesystem, top = filesystem_of(work.staging)
    sizes = file_sizes(to_path(work.staging))
    # Names in a bucket are not trusted: with `..` or a folder in it, one would lead out of the work folder.
    ours = [name for name in sizes if "/" not in name and Path(name).suffix in STAGED]
    missing = [name for name in ours if not _has(work.path / name, sizes[name])]
    records = [name for name in missing if name.endswith(".json")]
    with naming_file(work.staging):
        for names in (sorted(set(missing) - set(records)), records):
            filesystem.get([f"{top}/{name}" for name in names], [str(work.path / name) for name in names])


def _has(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
