"""One subject: two members in, two slabs and a record out. The unit of work that runs in parallel.

What a subject gives depends on nothing but its members and the configuration, so workers, order and restarts cannot
change a byte. The record is written last: a subject that has one is done.
"""

from __future__ import annotations

import hashlib
import json
import math
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ixi_etl import align, nifti, pictures, register
from ixi_etl.archive import MAX_MEMBER_BYTES, read_member
from ixi_etl.catalog import MODALITIES
from ixi_etl.config import DatasetConfig
from ixi_etl.errors import BadVolumeError, DatasetError
from ixi_etl.files import disk_errors_in_a_line, read_json, sha256_file, to_json, write_atomic
from ixi_etl.intensity import Steps, Stored, clip_spikes, otsu_threshold, to_int16
from ixi_etl.places import fingerprint, naming
from ixi_etl.store import write_shards

SEAL = "record_sha256"
MAX_OUTSIDE = 0.05  # of the T2 slab's foreground. The real pairs of docs/registration.md have 0.
MIN_COMMON = 0.5  # of the T2 slab's foreground: on less, two alignments are not compared by their NMI
MOST_IN_COMMON = 4096  # times a volume's range: of float32's 24 bits, 12 are left for what differs
UNCERTAIN_MM = 1.0  # between two alignments: twice the largest error of the search on real pairs, 0.52 mm


@dataclass(frozen=True)
class Part:
    """Where a member lies: archive (path or fsspec URL), first byte, length.

    Attributes:
        stamp: the fingerprint that the archive must have while the member is read; "" where a machine reads it that
            may see the file with another one (other times or inode on another mount).
    """

    archive: str
    offset: int
    size: int
    stamp: str = ""


@dataclass(frozen=True)
class Job:
    """A subject to cut, or only to hash where its headers have already put it out.

    Attributes:
        parts: modality -> member, for the modalities it has; none where it was not fetched.
        cut: whether it is still a candidate.
        version: the name of the version that it is cut for, a hash of archives, configuration and code: a record that
            was made for another one does not count.
    """

    subject_id: str
    parts: Mapping[str, Part]
    cut: bool
    version: str = ""


@dataclass
class Slab:
    """What is cut of one volume.

    Attributes:
        stored: its voxels [z, y, x] (`index`: [k, j, i]) as the store will hold them.
        affine: of the slab, to RAS mm.
        window: [start, stop) along the slice axis, None where the slab was resampled.
    """

    stored: Stored
    affine: align.Matrix
    window: tuple[int, int] | None


def shard_path(work: Path, subject_id: str, modality: str) -> Path:
    return work / f"{subject_id}.{modality.lower()}.shard"


def picture_path(work: Path, subject_id: str) -> Path:
    return work / f"{subject_id}.jpg"


def record_path(work: Path, subject_id: str) -> Path:
    return work / f"{subject_id}.json"


def read_part(part: Part) -> tuple[bytes, str]:
    """The bytes of a member, and the fingerprint that its archive had before and after they were read.

    Raises:
        DatasetError: the archive changed meanwhile, is gone, or is not the one that `part.stamp` is of.
    """
    with naming(part.archive):
        try:
            stamp = fingerprint(part.archive)
            data = read_member(part.archive, part.offset, part.size)
            same = fingerprint(part.archive) == stamp and part.stamp in ("", stamp)
        except FileNotFoundError:
            same = False
    if not same:
        raise archive_changed(part.archive)
    return data, stamp


def archive_changed(archive: str) -> DatasetError:
    return DatasetError(f"{archive} changed while it was read; run again when it is whole")


@disk_errors_in_a_line()  # here, so that a Dask worker, too, says what ails its disk
def cut_subject(job: Job, config: DatasetConfig, work: Path) -> dict[str, Any]:
    """Cut one subject into `work`, and return its record: manifest columns, `affines`, the `files` with SHA-256, for
    which version and of which archives it was made (`made_for`, `stamps`), and `record_sha256` of all that.

    A subject that cannot be used is a record with its reason; nothing about a volume raises. One that was done before,
    by a run that was killed, is not done again: at once where the archives have the fingerprints that they had then,
    else if the members have the same SHA-256.

    Raises:
        DatasetError: `work` is not there, on the machine that this runs on; or an archive is not what it was when it
            was hashed.
    """
    if not work.is_dir():
        raise DatasetError(f"{socket.gethostname()} has no folder {work}; Dask's workers must have it in common")
    done = _done_before(job, work)
    read = {m: part for m, part in job.parts.items() if part.size <= MAX_MEMBER_BYTES}  # who has larger ones is out
    if done and done["stamps"] == _stamps_now(read):
        return done
    packed: dict[str, bytes] = {}  # alone in holding the bytes: each worker lets go of them as soon as it can
    stamps: dict[str, str] = {}
    for modality, part in read.items():
        packed[modality], stamps[modality] = read_part(part)
    hashes = {f"{m.lower()}_sha256": hashlib.sha256(data).hexdigest() for m, data in packed.items()}
    if done and hashes.items() <= done.items():
        record = done | {"stamps": stamps}
    else:
        record = {"made_for": _made_for(job), "stamps": stamps, **hashes}
        # Not as bare digits: of 12345e67 a spreadsheet makes a number.
        record |= {
            f"{m.lower()}_gzip_crc32": f"crc32:{data[-8:-4][::-1].hex()}" if nifti.is_gzip(data) else ""
            for m, data in packed.items()
        }
        if job.cut:
            try:
                _cut(job, packed, config, work, record)
            except BadVolumeError as error:
                record |= {"reason": error.reason, "detail": error.detail}
    record = _sealed(record)
    write_atomic(record_path(work, job.subject_id), to_json(record))
    return record


def _made_for(job: Job) -> list[Any]:
    """What a record must be of. Records of other versions, or of other subjects, may have been copied here."""
    return [job.version, job.subject_id, job.cut]


def _stamps_now(parts: Mapping[str, Part]) -> dict[str, str]:
    """The fingerprints of the members' archives, where they are the expected ones."""
    stamps = {}
    for modality, part in parts.items():
        try:
            stamps[modality] = fingerprint(part.archive)
        except FileNotFoundError:
            raise archive_changed(part.archive) from None
        if part.stamp not in ("", stamps[modality]):
            raise archive_changed(part.archive)
    return stamps


def _done_before(job: Job, work: Path) -> dict[str, Any] | None:
    """The record of an earlier run, if it is whole, of this job, and its files are there."""
    done = read_json(record_path(work, job.subject_id))
    if not isinstance(done, dict) or done != _sealed(done) or done.get("made_for") != _made_for(job):
        return None
    return done if isinstance(done.get("stamps"), dict) and _still_there(done, job, work) else None


def _sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its own hash: its numbers go into the manifest, and nothing else would tell that one changed."""
    said = {key: value for key, value in record.items() if key != SEAL}
    return said | {SEAL: hashlib.sha256(to_json(said).encode()).hexdigest()}


def _cut(job: Job, packed: dict[str, bytes], config: DatasetConfig, work: Path, record: dict[str, Any]) -> None:
    """Cut both slabs and write them into `work`; what is found goes into `record` as it is found."""
    volumes = {m: _Volume(m, packed.pop(m)) for m in MODALITIES}
    _share_space(volumes)
    record["voxels_sha256"] = {m: volume.voxels_sha256 for m, volume in volumes.items()}
    if config.pairing == "index":
        slabs = {m: _index_slab(volume, config) for m, volume in volumes.items()}
        similarity = _nmi_within(_foreground(slabs["T2"]), slabs["T1"], slabs["T2"])
        record |= {"nmi_before": similarity, "nmi_after": similarity}
    else:
        slabs = _anatomical_slabs(volumes.pop("T1"), volumes.pop("T2"), config, record)
    voxels = _usable(slabs, record)
    for modality, slab in slabs.items():
        name = modality.lower()
        if slab.window:
            record |= {f"{name}_window_start": slab.window[0], f"{name}_window_stop": slab.window[1]}
    if record["nmi_after"] < config.min_nmi:
        if config.low_similarity == "exclude":
            detail = f"normalised mutual information is {record['nmi_after']:.3f}; {config.min_nmi:g} is the least"
            raise BadVolumeError("low_similarity", detail)
        record["flags"] = ",".join(filter(None, [record.get("flags"), "low_similarity"]))
    files = {}
    if config.pictures:
        middle = len(voxels["T2"]) // 2
        path = picture_path(work, job.subject_id)
        files[path.name] = pictures.save(pictures.pair_picture(voxels["T1"][middle], voxels["T2"][middle]), path)
    files |= write_shards({shard_path(work, job.subject_id, m): of for m, of in voxels.items()})
    affines = {m.lower(): slab.affine.tolist() for m, slab in slabs.items()}
    record |= {"affines": affines, "slab_shape": voxels["T2"].shape, "files": files}


def _still_there(record: Mapping[str, Any], job: Job, work: Path) -> bool:
    """Whether what an earlier run recorded is on the disk, whole: a power cut can lose what was written last."""
    try:
        whole = all(sha256_file(work / name) == digest for name, digest in record.get("files", {}).items())
    except OSError:
        return False
    return whole and ("files" in record or "reason" in record or not job.cut)


class _Volume:
    """An inflated volume: voxels as stored [k, j, i], and its header."""

    def __init__(self, modality: str, packed: bytes) -> None:
        self.modality = modality
        try:
            self.header, self.stored = nifti.read(packed)
        except BadVolumeError as error:
            raise BadVolumeError(error.reason, f"{modality}: {error.detail}") from error
        self.voxels_sha256 = hashlib.sha256(self.stored.view(np.uint8).data).hexdigest()
        self._move_to_zero()

    @property
    def affine(self) -> align.Matrix:
        assert self.header.affine is not None
        return align.rounded(self.header.affine)

    def _move_to_zero(self) -> None:
        """Take from the voxels what they all have in common, where float32 would hold little else of them."""
        if self.stored.dtype.itemsize < 4:
            return
        low, high = float(self.stored.min()), float(self.stored.max())
        if max(abs(low), abs(high)) / MOST_IN_COMMON > high - low > 0:
            self.stored = (self.stored - self.stored.min()).astype(np.float64)
            self.header.intercept += self.header.slope * low

    @cached_property
    def steps(self) -> Steps:
        """The values that it can have: of integers, and of floats that hold integers, multiples of its slope."""
        whole = self.stored.dtype.kind != "f" or bool((np.rint(self.stored) == self.stored).all())
        return Steps(abs(self.header.slope) if whole else 0.0, self.header.intercept)

    def store(self, stored: NDArray[Any], inside: NDArray[np.bool_] | None = None) -> Stored:
        """What the store will hold of a part of it, or of samples; 0 where these are not `inside` the volume."""
        values = self.header.scaled(stored)
        if inside is not None:
            values[~inside] = 0
        return to_int16(values, self.steps, inside)


def _share_space(volumes: Mapping[str, _Volume]) -> None:
    """Use the forms that selection chose, by the same rule."""
    spaces = nifti.choose_spaces(*(volume.header.forms for volume in volumes.values()))
    assert spaces is not None, "select let a pair through that has no space in common"
    for volume, space in zip(volumes.values(), spaces, strict=True):
        volume.header.use(space)


def _index_slab(volume: _Volume, config: DatasetConfig) -> Slab:
    """Slices as stored, whatever their plane: the published recipe."""
    window = config.window_in(len(volume.stored))
    assert window is not None, "select let a window through that does not fit"
    stored, affine = align.stored_slab(volume.stored, volume.affine, window)
    return Slab(volume.store(stored), affine, window)


def _axial_slab(t2: _Volume, config: DatasetConfig) -> Slab:
    """The T2's axial slices, never resampled."""
    window = config.window_in(align.axial_depth(t2.header.shape, t2.affine))
    assert window is not None, "select let a window through that does not fit"
    stored, affine = align.axial_slab(t2.stored, t2.affine, window)
    # A copy: what follows reads it over and over, a flipped view is read at half the speed, and any keeps the volume.
    return Slab(t2.store(stored.copy()), affine, window)


def _anatomical_slabs(t1: _Volume, t2: _Volume, config: DatasetConfig, record: dict[str, Any]) -> dict[str, Slab]:
    """Both slabs on the T2's planes, the T1 interpolated once; how they were aligned goes into `record`."""
    target = _axial_slab(t2, config)
    rigid = config.registration == "rigid"
    if not rigid:
        del t2  # a volume is let go as soon as it can be: each worker has its own
    foreground = _foreground(target)
    t2_to_t1 = np.eye(4)
    chosen, inside = _resampled_slab(t1, target, t2_to_t1)
    if not rigid:
        del t1
    similarity = _nmi_within(foreground & inside, chosen, target)
    record["nmi_before"] = similarity
    if rigid:
        points = align.world_points(foreground, target.affine)
        try:
            found = register.register(register.Scan(t1.stored, t1.affine), register.Scan(t2.stored, t2.affine))
        except register.RegistrationError:
            flags = ["registration_failed"]
        else:
            candidate, candidate_inside = _resampled_slab(t1, target, found)
            common = foreground & inside & candidate_inside
            outside_before, outside_after = (_share_outside(foreground, of) for of in (inside, candidate_inside))
            if 1 - _share_outside(foreground, common) >= MIN_COMMON:  # similarities of other voxels mean nothing
                before, after = (_nmi_within(common, slab, target) for slab in (chosen, candidate))
                is_better = after > before
            else:
                before, after = similarity, _nmi_within(foreground & candidate_inside, candidate, target)
                is_better = outside_after < outside_before
            flags = _registration_flags(is_better, *register.motion_of(found, points))
            if is_better:
                if outside_after > MAX_OUTSIDE >= outside_before:
                    flags.append("registration_leaves_fov")
                chosen, inside, t2_to_t1, similarity = candidate, candidate_inside, found, after
                record["nmi_before"] = before
        motion_mm, motion_deg = register.motion_of(t2_to_t1, points)
        record |= {"motion_mm": motion_mm, "motion_deg": motion_deg, "flags": ",".join(flags)}
    record |= {"t2_to_t1_ras_mm": json.dumps(t2_to_t1.tolist()), "nmi_after": similarity}
    outside = _share_outside(foreground, inside)
    if outside > MAX_OUTSIDE:
        raise BadVolumeError("outside_fov", f"{outside:.1%} of the T2 slab's foreground lies outside the T1's grid")
    return {"T1": chosen, "T2": target}


def _registration_flags(is_kept: bool, motion_mm: float, motion_deg: float) -> list[str]:
    """What the manifest says of the motion that was found, kept or not."""
    if is_kept:
        is_large = motion_mm > register.MAX_MOTION_MM or motion_deg > register.MAX_MOTION_DEG
        return ["large_motion"] if is_large else []
    return ["registration_no_gain"] + ["alignment_uncertain"] * (motion_mm > UNCERTAIN_MM)


def _foreground(slab: Slab) -> NDArray[np.bool_]:
    """The head, by Otsu's threshold. A few voxels of an artefact, far brighter than all others, would be all of it."""
    stored = slab.stored
    threshold = otsu_threshold(clip_spikes(stored.voxels, stored.p_low, stored.p_high))
    found: NDArray[np.bool_] = stored.voxels > math.floor(threshold)
    return found


def _share_outside(foreground: NDArray[np.bool_], inside: NDArray[np.bool_]) -> float:
    return float(np.count_nonzero(foreground & ~inside)) / max(int(np.count_nonzero(foreground)), 1)


def _nmi_within(mask: NDArray[np.bool_], a: Slab, b: Slab) -> float:
    """Of the values as they will be stored."""
    return register.nmi(*(slab.stored.voxels[mask].astype(np.int32) for slab in (a, b)))


def _resampled_slab(t1: _Volume, target: Slab, t2_to_t1: align.Matrix) -> tuple[Slab, NDArray[np.bool_]]:
    """The T1 interpolated onto exactly the target's planes, and where its grid reaches; beyond it 0."""
    matrix = align.sampling_matrix(target.affine, t1.affine, t2_to_t1)
    samples, inside = align.resample(t1.stored, matrix, target.stored.voxels.shape)
    return Slab(t1.store(samples, inside), target.affine, None), inside


def _usable(slabs: Mapping[str, Slab], record: dict[str, Any]) -> dict[str, NDArray[np.int16]]:
    """The voxels of both slabs; their scales and percentiles go into `record`.

    Raises:
        BadVolumeError: one cannot be used; the reasons in their order, T1 before T2.
    """
    for reason in ("empty_image", "intensity_range"):
        for modality, slab in slabs.items():
            if slab.stored.reason == reason:
                raise BadVolumeError(reason, f"{modality}: {slab.stored.problem}")
    for modality, slab in slabs.items():
        for column in ("p_low", "p_high", "scale", "offset"):
            record[f"{modality.lower()}_{column}"] = getattr(slab.stored, column)
    return {modality: slab.stored.voxels for modality, slab in slabs.items()}
