"""A derivative dataset of BIDS: the slabs of all used subjects, as NIfTI.

::

    DIR/sub-IXI002/anat/sub-IXI002_desc-slab_T2w.nii.gz             the reference, cut from its scan
    DIR/sub-IXI002/anat/sub-IXI002_space-T2w_desc-slab_T1w.nii.gz   on the planes of the reference
    DIR/sub-IXI002/anat/*.json                                      how each was made, and from what
    DIR/dataset_description.json, participants.tsv, descriptions.tsv, README.md, LICENSE

Voxels and values are those of the store, in scanner units. `Sources` of the sidecars names the whole scans as
`bids:raw:...`, where `raw` is `sourcedata/raw` of this dataset: the place of a `bids-raw` export of the same version.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from ixi_etl.core.files import to_json
from ixi_etl.core.progress import Progress
from ixi_etl.core.text import quantity
from ixi_etl.dataset.manifest import GRID_DIFFERS, to_records
from ixi_etl.dataset.schema import pair_column
from ixi_etl.exports.bids_dataset import (
    LICENCE_FILE,
    SUFFIXES,
    ScanName,
    name_scans,
    scanner_of,
    size_of_tables,
    write_description,
    write_participants,
)
from ixi_etl.exports.layout import Row
from ixi_etl.exports.members import suffix_of
from ixi_etl.exports.selection import Selection, Subject
from ixi_etl.exports.volumes import Volumes, save_volume
from ixi_etl.modalities import DATASETS, ECHOES, moving
from ixi_etl.scans.nifti import pack_like

SLAB = "slab"
RAW = "sourcedata/raw"
SIDECAR_BYTES = 2 << 10  # at most, for each image

NOT_REGISTERED = {
    "registration_failed": "the registration failed",
    "registration_no_gain": "the registration did not make the pair more similar",
}
"""Flag of a pair that keeps the alignment of its headers -> why."""


class Bids(Volumes):
    """One image for each scan of a subject, with a sidecar."""

    name: ClassVar[str] = "bids"
    every_array: ClassVar[bool] = True
    licence_file: ClassVar[str] = LICENCE_FILE

    def __init__(self, selection: Selection) -> None:
        super().__init__(selection)
        self.reference = selection.direction.target
        self.manifest = {row["subject_id"]: row for row in to_records(selection.rows)}

    def check(self) -> None:
        super().check()
        name_scans(self.manifest)

    @property
    def size_bytes(self) -> int:
        depth, height, width = self.selection.shape
        images = sum(len(subject.ranges) for subject in self.selection.subjects)
        return images * (2 * depth * height * width + 4096 + SIDECAR_BYTES) + size_of_tables(self.selection)

    def write(self, folder: Path, progress: Progress) -> list[Row]:
        names = name_scans(self.manifest)
        write_participants(folder, self.selection, names)
        suffix, depth = SUFFIXES[self.reference], self.selection.shape[0]
        what = (
            f"{quantity(depth, 'slice')} of each scan, without margins, on the planes of the {self.reference.upper()}"
        )
        write_description(
            folder,
            self.selection,
            f"slabs of {', '.join(map(str.upper, self.selection.names))}",
            README.format(what=what, suffix=suffix, raw=RAW),
            DatasetType="derivative",
            DatasetLinks={"raw": RAW},
        )
        described = pd.DataFrame([{"desc_id": f"desc-{SLAB}", "description": what}])
        described.to_csv(folder / "descriptions.tsv", sep="\t", index=False, lineterminator="\n")
        for name in names.values():
            (folder / name.folder).mkdir(parents=True, exist_ok=True)

        def write_subject(subject: Subject) -> list[Row]:
            rows, head, row = [], self.header(subject), self.manifest[subject.subject_id]
            scan = names[subject.subject_id]
            for name in subject.ranges:
                file = scan.file(f"{self._ending(name)}.nii.gz")
                stored = self.selection.stored(subject, name)
                plain = pack_like(head, stored, self.selection.version, *subject.scales[name])
                save_volume(folder / file, plain)
                sidecar = folder / scan.file(f"{self._ending(name)}.json")
                sidecar.write_text(to_json(self._sidecar(name, row, scan)))
                place = {"split": subject.split, "slice": self.selection.margin, "slices": depth, "index": 0}
                rows.append(self.row(subject, name, self.role(name), file, **place))
            return rows

        return self.each_subject(write_subject, progress)

    def _ending(self, name: str) -> str:
        """The name of an image after participant and session, without its extension."""
        space = "" if name == self.reference else f"space-{SUFFIXES[self.reference]}_"
        return f"{space}desc-{SLAB}_{SUFFIXES[name]}"

    def _sidecar(self, name: str, row: Mapping[str, Any], scan: ScanName) -> dict[str, Any]:
        """How an image was made, from the subject's row of the manifest."""
        raw = {each: f"bids:raw:{scan.file(SUFFIXES[each] + suffix_of(row, each))}" for each in (name, self.reference)}
        if self._is_cut(name, row):
            start, stop = (int(row[f"{self.reference}_window_{end}"]) for end in ("start", "stop"))
            margin = self.selection.margin
            how = f"slices {start + margin} to {stop - margin - 1} of the scan, from inferior, not interpolated"
        else:
            how = f"interpolated once (trilinear) onto the planes of the {self.reference.upper()}"
            how += f", {self._alignment(name, row)}"
        sources = [raw[name]] if name == self.reference else [raw[name], raw[self.reference]]
        slab = f"bids::{scan.file(self._ending(self.reference))}.nii.gz"
        return {
            "Description": f"Slab of the {name.upper()}: {how}. Axes are turned to RAS+.",
            "SkullStripped": False,
            "Sources": sources,
            "SpatialReference": raw[name] if name == self.reference else slab,
        } | scanner_of(self.selection, name, row["site"])

    def _is_cut(self, name: str, row: Mapping[str, Any]) -> bool:
        """Whether an image is slices of its scan: of the reference, or of an echo that has the reference's grid."""
        is_echo = {name.upper(), self.reference.upper()} <= ECHOES and not self._config.get("register_echoes")
        return name == self.reference or (is_echo and not self._has_flag(name, row, GRID_DIFFERS))

    def _alignment(self, name: str, row: Mapping[str, Any]) -> str:
        """What aligned an interpolated image with the reference."""
        registration = self._config.get("registration", "none")
        if registration == "none":
            return "by the headers alone"
        for flag, why in NOT_REGISTERED.items():
            if self._has_flag(name, row, flag):
                return f"by the headers alone ({why})"
        return f"after {registration} registration"

    @property
    def _config(self) -> Mapping[str, Any]:
        """The configuration of the version."""
        config: Mapping[str, Any] = self.selection.metadata["inputs"]["config"]
        return config

    def _has_flag(self, name: str, row: Mapping[str, Any], flag: str) -> bool:
        """Whether the pair of an image and the reference has a flag."""
        others = moving(*DATASETS[self.selection.metadata["name"]])
        return pair_column(others, name.upper(), flag) in row["flags"].split(",")


README = """
## Images

{what}.
The images of a scan session have one grid: voxel axes x to the right, y to anterior, z to superior, the affine in mm.
Values are in scanner units (slope and intercept in the header). Nothing was skull-stripped or normalised.

- `desc-slab`: the slices that were cut (`descriptions.tsv`).
- `space-{suffix}`: on the slices of the person's own {suffix} image; the sidecar says whether it was interpolated.
  An image without `space-` is in its own space.
- `Sources` in the sidecars names the whole scans as `bids:raw:...`, in `{raw}` of this dataset.
  They are not part of it: `ixi-etl export-dataset VERSION --format bids-raw -o {raw}` writes them there.
"""
