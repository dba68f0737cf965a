"""Cut one subject: its members in, a slab of each and a record out. This is the unit of parallel work.

The result depends only on the members and the configuration, so workers, order and restarts cannot change a byte. The
record is written last: a subject with a record is finished.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ixi_etl.config import DatasetConfig
from ixi_etl.core.files import os_errors_as_user_errors, read_json, sha256_file, to_json, write_atomic
from ixi_etl.core.storage import fingerprint, naming_file
from ixi_etl.dataset.normalisation import record_slab
from ixi_etl.dataset.schema import pair_column
from ixi_etl.dataset.store import write_shards
from ixi_etl.errors import BadVolumeError, DatasetError
from ixi_etl.pairing import pictures
from ixi_etl.pairing.slabs import (
    ScanVolume,
    anatomical_slabs,
    index_slab,
    nmi_within,
    usable_voxels,
    use_common_space,
)
from ixi_etl.scans import gunzip
from ixi_etl.scans.tar import MAX_MEMBER_BYTES, read_member

DIGEST_KEY = "record_sha256"


@dataclass(frozen=True)
class MemberRef:
    """The position of a member: archive (path or fsspec URL), first byte, length.

    Attributes:
        fingerprint: expected fingerprint of the archive while the member is read; "" if another machine reads it,
            where the file may have another fingerprint (times or inode on another mount).
    """

    archive: str
    offset: int
    size: int
    fingerprint: str = ""


@dataclass(frozen=True)
class CutJob:
    """A subject to cut, or only to hash if its headers have already excluded it.

    Attributes:
        members: modality -> member, for the modalities it has; empty if they were not fetched.
        is_candidate: whether its headers passed the screening.
        version: the name of the version, a hash of archives, configuration and code. A record made for another
            version is not reused.
    """

    subject_id: str
    members: Mapping[str, MemberRef]
    is_candidate: bool
    version: str = ""


def shard_path(work: Path, subject_id: str, modality: str) -> Path:
    return work / f"{subject_id}.{modality.lower()}.shard"


def picture_path(work: Path, subject_id: str) -> Path:
    return work / f"{subject_id}.jpg"


def record_path(work: Path, subject_id: str) -> Path:
    return work / f"{subject_id}.json"


def read_member_checked(member: MemberRef) -> tuple[bytes, str]:
    """Read a member; returns its bytes and the fingerprint of its archive.

    Raises:
        DatasetError: the archive changed during the read, is missing, or does not have `member.fingerprint`.
    """
    with naming_file(member.archive):
        try:
            before = fingerprint(member.archive)
            data = read_member(member.archive, member.offset, member.size)
            unchanged = fingerprint(member.archive) == before and member.fingerprint in ("", before)
        except FileNotFoundError:
            unchanged = False
    if not unchanged:
        raise archive_changed(member.archive)
    return data, before


def archive_changed(archive: str) -> DatasetError:
    return DatasetError(f"{archive} changed while it was read; run again when it is whole")


@os_errors_as_user_errors()  # here, so that Dask workers also report errors of their disks
def cut_subject(job: CutJob, dataset_config: DatasetConfig, work: Path) -> dict[str, Any]:
    """Cut one subject into `work` and return its record.

    The record holds the manifest columns, `affines`, the share of each slab's voxels that have its largest value
    (`at_largest_value`), `files` with their SHA-256, the version and archives that it was
    made for (`made_for`, `fingerprints`), and `record_sha256` of all other fields. An unusable subject gives a record
    with its reason; nothing about a volume raises.

    A record from an earlier run is reused if the archives have the same fingerprints as then, or else if the members
    have the same SHA-256.

    Raises:
        DatasetError: an archive changed after it was hashed.
    """
    finished = read_finished_record(job, work)
    members = {m: member for m, member in job.members.items() if member.size <= MAX_MEMBER_BYTES}  # larger: excluded
    if finished and finished["fingerprints"] == _current_fingerprints(members):
        return finished
    packed: dict[str, bytes] = {}  # the only references to the bytes, so that `_cut` can free them early
    fingerprints: dict[str, str] = {}
    for modality, member in members.items():
        packed[modality], fingerprints[modality] = read_member_checked(member)
    hashes = _hashes(packed)
    if finished and finished["fingerprints"].keys() == members.keys() and hashes.items() <= finished.items():
        return _write_record(job, finished | {"fingerprints": fingerprints}, work)
    return _cut_and_record(job, packed, hashes | {"fingerprints": fingerprints}, dataset_config, work)


@os_errors_as_user_errors()
def cut_unverified(
    job: CutJob, read: Callable[[str, MemberRef], bytes], dataset_config: DatasetConfig, work: Path
) -> None:
    """Cut one subject into `work`, unless it has a record, from archives that are not verified yet.

    The record has no fingerprints. `cut_subject` therefore reads the members of the verified archives, and reuses the
    record only if they have the SHA-256s in it.

    Args:
        read: returns the bytes of a member, given its modality and position.
    """
    if read_finished_record(job, work):
        return
    packed = {m: read(m, member) for m, member in job.members.items() if member.size <= MAX_MEMBER_BYTES}
    _cut_and_record(job, packed, _hashes(packed) | {"fingerprints": dict.fromkeys(packed, "")}, dataset_config, work)


def _hashes(packed: Mapping[str, bytes]) -> dict[str, Any]:
    return {f"{m.lower()}_sha256": hashlib.sha256(data).hexdigest() for m, data in packed.items()}


def _cut_and_record(
    job: CutJob, packed: dict[str, bytes], record: dict[str, Any], dataset_config: DatasetConfig, work: Path
) -> dict[str, Any]:
    """Cut a subject from its packed members; `record` has their hashes and the fingerprints of their archives."""
    # With a prefix, because a spreadsheet would read 12345e67 as a number.
    record |= {
        f"{m.lower()}_gzip_crc32": f"crc32:{data[-8:-4][::-1].hex()}" if gunzip.is_gzip(data) else ""
        for m, data in packed.items()
    }
    if job.is_candidate:
        try:
            _cut(job, packed, dataset_config, work, record)
        except BadVolumeError as error:
            record |= {"reason": error.reason, "detail": error.detail}
    return _write_record(job, record, work)


def _write_record(job: CutJob, record: Mapping[str, Any], work: Path) -> dict[str, Any]:
    complete = _with_digest({"made_for": _job_identity(job), **record})
    write_atomic(record_path(work, job.subject_id), to_json(complete))
    return complete


def _job_identity(job: CutJob) -> list[Any]:
    """Identifies the job in its record, because records of other versions or subjects may have been copied here."""
    return [job.version, job.subject_id, job.is_candidate]


def _current_fingerprints(members: Mapping[str, MemberRef]) -> dict[str, str]:
    """The fingerprints of the members' archives; raises `DatasetError` if they are not the expected ones."""
    fingerprints = {}
    for modality, member in members.items():
        try:
            fingerprints[modality] = fingerprint(member.archive)
        except FileNotFoundError:
            raise archive_changed(member.archive) from None
        if member.fingerprint not in ("", fingerprints[modality]):
            raise archive_changed(member.archive)
    return fingerprints


def read_finished_record(job: CutJob, work: Path) -> dict[str, Any] | None:
    """The record of an earlier run, if it is undamaged, of this job, and its files exist."""
    record = read_json(record_path(work, job.subject_id))
    if not isinstance(record, dict) or record != _with_digest(record) or record.get("made_for") != _job_identity(job):
        return None
    is_complete = "files" in record or "reason" in record or not job.is_candidate
    is_usable = is_complete and isinstance(record.get("fingerprints"), dict) and files_intact(record, work)
    return record if is_usable else None


def _with_digest(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its own SHA-256. Its numbers go into the manifest, and nothing else would detect a change."""
    content = {key: value for key, value in record.items() if key != DIGEST_KEY}
    return content | {DIGEST_KEY: hashlib.sha256(to_json(content).encode()).hexdigest()}


def _cut(
    job: CutJob, packed: dict[str, bytes], dataset_config: DatasetConfig, work: Path, record: dict[str, Any]
) -> None:
    """Cut all slabs and write them into `work`. Results go into `record` as they are found, even if this raises."""
    reference = dataset_config.reference
    volumes = {m: ScanVolume(m, packed.pop(m)) for m in dataset_config.modalities if m in packed}
    use_common_space(volumes)
    record["voxels_sha256"] = {m: volume.voxels_sha256 for m, volume in volumes.items()}
    if dataset_config.pairing == "index":
        slabs = {m: index_slab(volume, dataset_config) for m, volume in volumes.items()}
        for modality in [m for m in dataset_config.moving if m in slabs]:
            similarity = nmi_within(slabs[reference].foreground, slabs[modality], slabs[reference])
            columns = (pair_column(dataset_config.moving, modality, c) for c in ("nmi_before", "nmi_after"))
            record |= dict.fromkeys(columns, similarity)
    else:
        slabs = anatomical_slabs(volumes, dataset_config, record)
    voxels = usable_voxels(slabs, record)
    for modality, slab in slabs.items():
        name = modality.lower()
        record |= record_slab(modality, slab.stored.voxels, slab.stored.scale, slab.stored.offset, dataset_config)
        if slab.window:
            record |= {f"{name}_window_start": slab.window[0], f"{name}_window_stop": slab.window[1]}
    files = {}
    if dataset_config.pictures:
        slices = {m: slab[len(slab) // 2] for m, slab in voxels.items()}
        path = picture_path(work, job.subject_id)
        shown = pictures.pair_picture([slices[m] for m in dataset_config.moving if m in slices], slices[reference])
        files[path.name] = pictures.save_picture(shown, path)
    files |= write_shards({shard_path(work, job.subject_id, m): slab for m, slab in voxels.items()})
    record |= {
        "affines": {m.lower(): slab.affine.tolist() for m, slab in slabs.items()},
        "at_largest_value": {m.lower(): float(np.mean(slab == slab.max())) for m, slab in voxels.items()},
        "slab_shape": voxels[reference].shape,
        "files": files,
    }


def files_intact(record: Mapping[str, Any], work: Path) -> bool:
    """Whether the files of a record are on the disk, undamaged: a power cut can lose the last writes."""
    try:
        return all(sha256_file(work / name) == digest for name, digest in record.get("files", {}).items())
    except OSError:
        return False
