"""The whole scans that a version was made from: found in the archives or the folder, checked, and copied or linked."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ixi_etl.core.files import read_json, sha256_file
from ixi_etl.core.storage import is_local, is_url, naming_file
from ixi_etl.dataset.manifest import to_records
from ixi_etl.errors import ConfigError, DatasetError
from ixi_etl.exports.selection import Selection
from ixi_etl.modalities import archive_name
from ixi_etl.scans.tar import index_archive, read_member
from ixi_etl.sources.folder import list_nifti_files
from ixi_etl.sources.user_source import find_archives, find_folder


@dataclass(frozen=True)
class SourceScan:
    """Where one scan is, and what it must be.

    Attributes:
        name: as in the manifest.
        sha256: as in the manifest.
        location: path or URL of the archive, or path of the file.
        offset, size: its bytes in the archive; of a file all of them.
        is_file: whether it is a file of its own.
        suffix: `.nii.gz`, or `.nii` if it is not compressed, whatever its name says.
    """

    name: str
    sha256: str
    location: str
    offset: int
    size: int
    is_file: bool
    suffix: str

    def is_on(self, device: int) -> bool:
        """Whether it is a file on a file system (`st_dev`), where `place` links to it and needs no space."""
        return self.is_file and os.stat(self.location).st_dev == device

    def place(self, target: Path) -> None:
        """Make `target` the scan: a hard link to a file where the file system allows it, otherwise a copy.

        Raises:
            DatasetError: its SHA-256 is not that of the manifest.
        """
        if self.is_file:
            try:
                os.link(os.path.realpath(self.location), target)  # a link to a symbolic link would be one too
            except OSError:  # another file system, or one without hard links, or a file of another user
                pass
            else:
                self._check(sha256_file(target))
                return
        with naming_file(self.location):
            data = read_member(self.location, self.offset, self.size)
        self._check(hashlib.sha256(data).hexdigest())
        with naming_file(target):
            target.write_bytes(data)

    def _check(self, found: str) -> None:
        if found != self.sha256:
            where = self.location if self.is_file else f"{self.name} in {self.location}"
            raise DatasetError(
                f"{where} has the SHA-256 {found[:12]}..., and the version was made from {self.sha256[:12]}...; "
                "give the files that it was made from as --source"
            )


Wanted = Sequence[tuple[str, Mapping[str, Any]]]
"""Subject id and row of the manifest of each subject that has a modality."""


def find_members(selection: Selection, source: str | None = None) -> dict[tuple[str, str], SourceScan]:
    """(Subject id, array name) -> its scan, of all subjects of the selection.

    Args:
        source: archives or a folder, as `--source` of a refresh; by default what a refresh into the version's root
            recorded: archives that it downloaded or read in place, or files of a folder.

    Raises:
        ConfigError: `source` is on a server.
        DatasetError: an archive or a file is missing.
        ArchiveError: an archive cannot be read.
    """
    modalities = [name.upper() for name in selection.names]
    folder = find_folder(source, modalities) if source else None
    archives = find_archives(source, modalities) if source and folder is None else {}
    for location in archives.values():
        if location.startswith(("http://", "https://")):
            raise ConfigError(f"{source} is on a server; give a local copy as --source")
    names = None if folder is None else set(list_nifti_files(folder))
    found: dict[tuple[str, str], SourceScan] = {}
    rows = list(zip(selection.subjects, to_records(selection.rows), strict=True))
    for name, modality in zip(selection.names, modalities, strict=True):
        wanted = [(subject.subject_id, row) for subject, row in rows if name in subject.ranges]
        if folder is not None and names is not None:
            members = {subject: row[f"{name}_member"] for subject, row in wanted}
            located = {subject: os.path.join(folder, member) for subject, member in members.items() if member in names}
            found |= _files(name, wanted, located, folder)
        elif modality in archives:
            found |= _in_archive(name, wanted, archives[modality])
        else:
            found |= _recorded(selection, name, modality, wanted)
    return found


def suffix_of(row: Mapping[str, Any], name: str) -> str:
    """`.nii.gz` or `.nii`, by the scan's content: only a gzip file has a CRC-32 in the manifest."""
    return ".nii.gz" if row[f"{name}_gzip_crc32"] else ".nii"


def _recorded(selection: Selection, name: str, modality: str, wanted: Wanted) -> dict[tuple[str, str], SourceScan]:
    """The scans where a refresh into the root of the version found them."""
    root = selection.folder.parent.parent.parent
    archives, advice = root / "archives", "give the archives or the folder that the version was made from as --source"
    if not is_local(selection.folder):
        raise DatasetError(f"{root} has no archives, only versions; {advice}")
    if selection.metadata["inputs"].get("files_sha256"):
        record = read_json(archives / f"{modality}.files.json")
        if not isinstance(record, dict):
            raise DatasetError(f"{archives} has no record of the files of {modality}; {advice}")
        by_hash = {entry[1]: location for location, entry in record.items()}
        hashes = {subject: row[f"{name}_sha256"] for subject, row in wanted}
        located = {subject: by_hash[digest] for subject, digest in hashes.items() if digest in by_hash}
        return _files(name, wanted, located, str(archives))
    record = read_json(archives / f"{archive_name(modality)}.json")
    if not isinstance(record, dict) or "location" not in record:
        raise DatasetError(f"{archives} has no whole {archive_name(modality)}; {advice}")
    return _in_archive(name, wanted, str(record["location"]))


def _files(name: str, wanted: Wanted, located: Mapping[str, str], where: str) -> dict[tuple[str, str], SourceScan]:
    """The scans that are files of their own, with the path of each that was found."""
    found = {}
    for subject_id, row in wanted:
        location, member = located.get(subject_id, ""), row[f"{name}_member"]
        if not os.path.isfile(location):
            raise DatasetError(f"{where} has no {member}; give the folder that has it as --source")
        size = os.path.getsize(location)
        found[subject_id, name] = SourceScan(
            member, row[f"{name}_sha256"], location, 0, size, is_file=True, suffix=suffix_of(row, name)
        )
    return found


def _in_archive(name: str, wanted: Wanted, location: str) -> dict[tuple[str, str], SourceScan]:
    """The scans that are members of an archive."""
    if not is_url(location) and not os.path.exists(location):
        raise DatasetError(f"{location} is not there; give the folder that has it as --source")
    places = {member.name: member for member in reversed(index_archive(location))}  # the first of each name
    found = {}
    for subject_id, row in wanted:
        member = places.get(row[f"{name}_member"])
        if member is None or member.problem:
            raise DatasetError(
                f"{location} has no {row[f'{name}_member']}; give what the version was made from as --source"
            )
        found[subject_id, name] = SourceScan(
            member.name,
            row[f"{name}_sha256"],
            location,
            member.offset,
            member.size,
            is_file=False,
            suffix=suffix_of(row, name),
        )
    return found
