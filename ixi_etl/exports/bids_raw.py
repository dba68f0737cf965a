"""A raw dataset of BIDS: the whole scans of all used subjects, byte for byte, under other names.

::

    DIR/sub-IXI002/anat/sub-IXI002_T1w.nii.gz    a member of an archive, or a file of a folder
    DIR/sub-IXI002/anat/sub-IXI002_T1w.json      its scanner, if the archive is IXI's
    DIR/dataset_description.json, participants.tsv, README.md, LICENSE

The SHA-256 of each scan is compared with the manifest. Files of a folder are hard-linked where the file system allows
it.
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from ixi_etl.config import SPLITS
from ixi_etl.core.files import to_json
from ixi_etl.core.progress import Progress
from ixi_etl.dataset.manifest import to_records
from ixi_etl.errors import ConfigError
from ixi_etl.exports.bids_dataset import (
    LICENCE_FILE,
    SUFFIXES,
    name_scans,
    scanner_of,
    size_of_tables,
    write_description,
    write_participants,
)
from ixi_etl.exports.layout import Layout, Row
from ixi_etl.exports.members import SourceScan, find_members
from ixi_etl.exports.selection import Selection, Subject
from ixi_etl.modalities import DATASETS

SIDECAR_BYTES = 1 << 10  # at most, for each scan


class BidsRaw(Layout):
    """The file of each scan as it is, and a sidecar where something is known of the scanner."""

    every_array: ClassVar[bool] = True
    licence_file: ClassVar[str] = LICENCE_FILE
    values: ClassVar[str] = "as in the scans that the version was made from"

    def __init__(self, selection: Selection, source: str | None = None) -> None:
        super().__init__(selection)
        self.source = source
        self.sites = {row["subject_id"]: row["site"] for row in to_records(selection.rows)}

    def check(self) -> None:
        if self.selection.metadata["name"] not in DATASETS:
            raise ConfigError(f"{self.selection.version} has no scans of heads; bids-raw needs a version of IXI")
        name_scans(self.sites)

    @cached_property
    def scans(self) -> dict[tuple[str, str], SourceScan]:
        """(Subject id, array) -> the whole scan."""
        return find_members(self.selection, self.source)

    @property
    def size_bytes(self) -> int:
        return sum(scan.size + SIDECAR_BYTES for scan in self.scans.values()) + size_of_tables(self.selection)

    def bytes_on_disk_of(self, folder: Path) -> int:
        device = folder.stat().st_dev
        return self.size_bytes - sum(scan.size for scan in self.scans.values() if scan.is_on(device))

    def write(self, folder: Path, progress: Progress) -> list[Row]:
        names = name_scans(self.sites)
        write_participants(folder, self.selection, names)
        modalities = ", ".join(map(str.upper, self.selection.names))
        write_description(folder, self.selection, f"whole scans of {modalities}", README, DatasetType="raw")
        for scan_name in names.values():
            (folder / scan_name.folder).mkdir(parents=True, exist_ok=True)

        def write_subject(subject: Subject) -> list[Row]:
            rows, scan_name = [], names[subject.subject_id]
            for name in subject.ranges:
                scan = self.scans[subject.subject_id, name]
                file = scan_name.file(f"{SUFFIXES[name]}{scan.suffix}")
                scan.place(folder / file)
                scanner = scanner_of(self.selection, name, self.sites[subject.subject_id])
                if scanner:
                    (folder / scan_name.file(f"{SUFFIXES[name]}.json")).write_text(to_json(scanner))
                rows.append(
                    {
                        "subject_id": subject.subject_id,
                        "person": subject.person,
                        "array": name,
                        "split": subject.split,
                        "file": file,
                        "member": scan.name,
                        "sha256": scan.sha256,
                    }
                )
            return rows

        return self.each_subject(write_subject, progress)

    @property
    def changes(self) -> str:
        return "none; the files have other names"

    def counts(self) -> dict[str, dict[str, int]]:
        subjects = Counter(subject.split for subject in self.selection.subjects)
        files = Counter(subject.split for subject in self.selection.subjects for _ in subject.ranges)
        splits = [*SPLITS, *(split for split in subjects if split not in SPLITS)]
        return {split: {"subjects": subjects[split], "files": files[split]} for split in splits}

    def describe(self) -> dict[str, Any]:
        return {"values": self.values, "orientation": "as in those scans"}


README = """
## Images

The whole scans of the subjects that the version uses, byte for byte as in the files that it was made from: not cut, not
resampled, not turned. Scans that the version excluded are not here; its manifest gives the reasons.
"""
