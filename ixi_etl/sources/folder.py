"""A user's folder of NIfTI files (`--source`), loose or in BIDS: found, named and hashed; they are read in place."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ixi_etl.core.extras import require_extra
from ixi_etl.core.files import os_errors_as_user_errors, read_json, to_json, write_atomic
from ixi_etl.core.progress import Progress, no_progress
from ixi_etl.core.storage import fingerprint, naming_file
from ixi_etl.core.text import printable
from ixi_etl.errors import DownloadError
from ixi_etl.scans.names import EXAMPLE, Namer, VolumeName, is_nifti_name, namer, plain_name, volume_name
from ixi_etl.scans.survey import VolumeFile
from ixi_etl.sources.cache import VerifiedFile, changed_while_read
from ixi_etl.sources.catalog import Source

log = logging.getLogger(__name__)

BIDS_MARK = "dataset_description.json"
"""A folder with this file is a BIDS dataset."""

BLOCK_BYTES = 4 << 20  # of a file that is hashed


@dataclass(frozen=True)
class FolderSource(Source):
    """The files of one modality in a folder; `urls` has the folder's path."""

    files: tuple[VolumeFile, ...] = ()


@dataclass(frozen=True)
class VerifiedFolder(VerifiedFile):
    """The files of one modality in a folder, each of them hashed. `md5` is empty.

    Attributes:
        digest: SHA-256 of the sorted lines "SHA-256  modality  subject_id  site  relative name" of the files.
        fingerprint: of all files together.
        fingerprints: path -> fingerprint of the file when it was hashed.
    """

    files: tuple[VolumeFile, ...] = ()
    digest: str = ""
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    @property
    def surveyed_as(self) -> tuple[VolumeFile, ...]:
        return self.files

    @property
    def files_sha256(self) -> str:
        return self.digest

    def fingerprint_of(self, location: str) -> str:
        return self.fingerprints[location]

    def current_fingerprint(self) -> str:
        return _combine({file.location: fingerprint(file.location) for file in self.files})


def find_volumes(folder: str, modalities: Sequence[str], patterns: Sequence[str]) -> dict[str, tuple[VolumeFile, ...]]:
    """Modality -> NIfTI files of a local folder and the folders in it, sorted by name.

    Names are read by `patterns`; without any, as those of BIDS if the folder has a `dataset_description.json`,
    otherwise as IXI's or plain ones (`names.plain_name`). Other files are skipped, with a warning. Ids that differ only
    in case are those of one subject.

    Raises:
        ConfigError: a template is invalid, or the folder is in BIDS and its reader is not installed.
        DownloadError: the folder cannot be listed, or a modality has no file.
    """
    is_bids = os.path.isfile(os.path.join(folder, BIDS_MARK)) and not patterns
    read_name = namer(patterns, bids_namer() if is_bids else plain_name)
    every = list_nifti_files(folder)
    names = [name for name in every if not is_bids or _is_raw_anatomy(name)]
    found: dict[str, list[VolumeFile]] = {m: [] for m in modalities}
    skipped, spelling = [], dict[str, str]()
    for name in names:
        volume = read_name(name) if printable(name) == name else None
        if volume is None:
            skipped.append(name)
            continue
        subject_id = spelling.setdefault(volume.subject_id.casefold(), volume.subject_id)
        if volume.modality in found:
            file = VolumeFile(os.path.join(folder, name), name, volume._replace(subject_id=subject_id))
            found[volume.modality].append(file)
            if not is_bids and not patterns and "_ses-" in name:
                raise DownloadError(
                    f"{file.location} is named as in BIDS, but {folder} has no {BIDS_MARK}; give the folder that has "
                    "it, or say which part is the session: --pattern 'sub-{subject}_ses-{session}_{modality}.nii.gz'"
                )
    expected = _expected_names(is_bids, patterns)
    for modality, files in found.items():
        if not files:
            others = sorted({m for m, of_one in found.items() if of_one})
            raise DownloadError(_nothing_found(folder, modality, names or every, others, expected))
    if skipped:
        log.warning(
            "%s: %d of %d NIfTI files are skipped, for example %r; %s",
            *(folder, len(skipped), len(names), printable(skipped[0]), expected.format(modalities[0])),
        )
    return {m: tuple(files) for m, files in found.items()}


def list_nifti_files(folder: str) -> list[str]:
    """Names of all `.nii` and `.nii.gz` files below a folder, relative to it and sorted.

    Hidden files and folders are left out, among them the `._*` of macOS. Links to folders are followed, each folder
    once.

    Raises:
        DownloadError: a folder cannot be listed.
    """
    with os_errors_as_user_errors(DownloadError):
        return sorted(_walk(folder))


def first_nifti_file(folder: str) -> str | None:
    """The first NIfTI file that is found below a folder; None if there is none, or the folder cannot be listed."""
    try:
        return next(_walk(folder), None)
    except OSError:
        return None


def _walk(top: str) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise error

    visited = set()
    for folder, folders, files in os.walk(top, onerror=fail, followlinks=True):
        found = os.stat(folder)
        if (found.st_dev, found.st_ino) in visited:
            folders.clear()
            continue
        visited.add((found.st_dev, found.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and is_nifti_name(name):
                yield os.path.relpath(os.path.join(folder, name), top)


def bids_namer() -> Namer:
    """Reads names of BIDS, such as `sub-01_ses-2_acq-fast_T1w.nii.gz`. The id of a subject is `01-2`, or `01`.

    Raises:
        MissingExtraError: ancpbids is not installed.
    """
    require_extra("bids")
    from ancpbids.utils import parse_bids_name

    def read(name: str) -> VolumeName | None:
        found = parse_bids_name(name)
        if found is None or not found["entities"].get("sub"):
            return None
        entities = "".join(f"{key}-{value}_" for key, value in found["entities"].items())
        if f"{entities}{found['suffix']}{found['extension']}" != name.rpartition("/")[2]:
            return None  # it has a part that the parser dropped, as in sub-01-02_T1w.nii.gz
        return volume_name(found["entities"]["sub"], "", found["entities"].get("ses", ""), found["suffix"])

    return read


def _is_raw_anatomy(name: str) -> bool:
    """Whether a file of a BIDS dataset is an anatomical scan, not a derivative or source data."""
    folders = name.split("/")[:-1]
    return len(folders) > 1 and folders[0].startswith("sub-") and folders[-1] == "anat"


def _expected_names(is_bids: bool, patterns: Sequence[str]) -> str:
    """What the files should be called; `{}` stands for the modality."""
    if patterns:
        return f"they do not fit --pattern {' or '.join(patterns)}".replace("{", "{{").replace("}", "}}")
    example = "sub-01/anat/sub-01_{}w.nii.gz (BIDS)" if is_bids else "IXI002-Guys-0828-{0}.nii.gz or NAME_{0}.nii.gz"
    escaped = EXAMPLE.replace("{", "{{").replace("}", "}}")
    return f"a volume is called {example}; say with --pattern how yours are named, such as {escaped}"


def _nothing_found(folder: str, modality: str, names: Sequence[str], others: Sequence[str], expected: str) -> str:
    if not names:
        return f"{folder} has no archive IXI-{modality}.tar and no NIfTI file (.nii, .nii.gz); give another --source"
    has = f", only {' and '.join(others)}," if others else ""
    example = printable(names[0])
    return (
        f"{folder} has no volume of {modality}{has} among {len(names)} NIfTI files, for example {example!r}: "
        f"{expected.format(modality)}, or choose other --modalities"
    )


def acquire_folder(source: FolderSource, records: Path, progress: Progress = no_progress) -> VerifiedFolder:
    """Hash the files of a folder, except those that were hashed before and have not changed.

    Args:
        records: folder for the record of hashes.

    Raises:
        DownloadError: a file cannot be read, or changed while it was read.
    """
    record = records / f"{source.name}.json"
    modality = source.files[0].volume.modality
    with os_errors_as_user_errors(DownloadError), naming_file(record):
        records.mkdir(parents=True, exist_ok=True)
        known = _read_record(record)
        hashes: dict[str, tuple[str, str]] = {}
        sizes = {file.location: _size_of(file.location) for file in source.files}
        done, total = 0, sum(sizes.values())
        for file in source.files:
            before = fingerprint(file.location)
            recorded = known.get(file.location)
            if recorded is None or recorded[0] != before:
                recorded = (before, _sha256(file.location, sizes[file.location]))
            if fingerprint(file.location) != before:
                raise changed_while_read(file.location)
            hashes[file.location] = recorded
            done += sizes[file.location]
            progress(f"verify {modality}", done, total, "B")
        if hashes != known:
            write_atomic(record, to_json(hashes))
    lines = sorted(
        f"{hashes[file.location][1]}  {modality}  {file.volume.subject_id}  {file.volume.site}  {file.name}\n"
        for file in source.files
    )
    fingerprints = {location: of_file for location, (of_file, _) in hashes.items()}
    return VerifiedFolder(
        name=source.name,
        location=source.urls[0],
        size=total,
        md5="",
        checked=False,
        origin=source.urls[0],
        validator=None,
        fingerprint=_combine(fingerprints),
        files=source.files,
        digest=hashlib.sha256("".join(lines).encode()).hexdigest(),
        fingerprints=fingerprints,
    )


def _combine(fingerprints: Mapping[str, str]) -> str:
    text = "".join(f"{location}\n{of_file}\n" for location, of_file in sorted(fingerprints.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def _read_record(record: Path) -> dict[str, tuple[str, str]]:
    """Path -> (fingerprint, SHA-256) of the files that were hashed before; empty if the record is damaged."""
    content = read_json(record)
    if not isinstance(content, dict):
        return {}
    return {
        location: (entry[0], entry[1])
        for location, entry in content.items()
        if isinstance(entry, list) and len(entry) == 2 and all(isinstance(text, str) for text in entry)
    }


def _size_of(location: str) -> int:
    try:
        found = os.stat(location)
    except FileNotFoundError:
        advice = "fetch what it points to (git annex get, datalad get), or remove it"
        what = "is a broken link" if os.path.islink(location) else "is not there any more"
        raise DownloadError(f"{location} {what}; {advice if os.path.islink(location) else 'run again'}") from None
    if not stat.S_ISREG(found.st_mode):  # reading a pipe or a device may never end
        raise DownloadError(f"{location} is not a regular file; remove it, or give another --source")
    return found.st_size


def _sha256(location: str, size: int) -> str:
    """The SHA-256 of a file, in hex; of a little more than `size` bytes if the file keeps growing."""
    digest, done = hashlib.sha256(), 0
    with naming_file(location), open(location, "rb") as file:
        while done <= size and (block := file.read(BLOCK_BYTES)):
            digest.update(block)
            done += len(block)
    return digest.hexdigest()
