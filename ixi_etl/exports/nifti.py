"""NIfTI files for nnU-Net and its forks for image translation, and for MONAI.

::

    DIR/Dataset901_T1/imagesTr/<subject>_0000.nii.gz   the sources of train and val, a channel each; imagesTs: of test
    DIR/Dataset901_T1/labelsTr/<subject>.nii.gz        1 in every voxel
    DIR/Dataset901_T1/dataset.json, splits_final.json  of nnU-Net; the split of the version, by subject
    DIR/Dataset902_T2/...                              the same for the target
    DIR/datalist.json                                  pairs of image and label, for MONAI's `load_decathlon_datalist`

nnU-Net takes only whole numbers as labels. Its forks for translation (Phyrise/nnUNet_translation) therefore preprocess
sources and targets as the images of two data sets, with a mask of 1 as labels, and then use the preprocessed targets as
labels of the first.

Values are the scanner's: stored int16, with its scale and offset as slope and intercept. nnU-Net and MONAI normalise
themselves, and scaled or clipped values could not be turned back. At most two voxels of a slab differ from the store
(`mark_corners`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ixi_etl.core.files import to_json
from ixi_etl.core.progress import Progress
from ixi_etl.exports.layout import Row, folder_name
from ixi_etl.exports.selection import Selection, Subject
from ixi_etl.exports.volumes import Volumes, save_volume
from ixi_etl.scans.nifti import pack_like

FIRST_ID = 901  # nnU-Net keeps 1 to 10 for the data sets of the Medical Segmentation Decathlon


class Nifti(Volumes):
    """One file for each subject and modality."""

    name: ClassVar[str] = "nifti"

    def __init__(self, selection: Selection) -> None:
        super().__init__(selection)
        sources, target = selection.direction
        self.datasets = {
            f"Dataset{FIRST_ID + n}_{'_'.join(map(folder_name, names))}": names
            for n, names in enumerate((sources, (target,)))
        }
        """Name of each data set -> the arrays that are its channels."""

    @property
    def size_bytes(self) -> int:
        depth, height, width = self.selection.shape
        subjects, slab = self.selection.subjects, 2 * depth * height * width
        masks = len(self.datasets) * sum(subject.split != "test" for subject in subjects)
        # A mask has a single value, and compresses to a thousandth.
        return len(subjects) * len(self.selection.names) * (slab + 4096) + masks * (slab // 100 + 4096)

    def write(self, folder: Path, progress: Progress) -> list[Row]:
        subjects = self.selection.subjects
        fold = {split: [s.subject_id for s in subjects if s.split == split] for split in ("train", "val")}
        for dataset, names in self.datasets.items():
            for part in ("imagesTr", "imagesTs", "labelsTr"):
                (folder / dataset / part).mkdir(parents=True)
            described = {
                "channel_names": {str(n): folder_name(name) for n, name in enumerate(names)},
                "labels": {"background": 0, "everywhere": 1},
                "numTraining": sum(map(len, fold.values())),
                "file_ending": ".nii.gz",
                "name": f"{self.selection.version}, {self.selection.direction}",
                "licence": self.selection.metadata.get("licence", ""),
                "reference": self.selection.metadata.get("credit", ""),
            }
            (folder / dataset / "dataset.json").write_text(to_json(described))
            (folder / dataset / "splits_final.json").write_text(to_json([fold]))
        (folder / "datalist.json").write_text(to_json(self._datalist()))
        return self.each_subject(lambda subject: self._write_subject(folder, subject), progress)

    def _files(self, subject: Subject) -> dict[str, str]:
        """Array name -> its file, relative to the folder of the export."""
        part = "imagesTs" if subject.split == "test" else "imagesTr"
        return {
            name: f"{dataset}/{part}/{subject.subject_id}_{channel:04d}.nii.gz"
            for dataset, names in self.datasets.items()
            for channel, name in enumerate(names)
        }

    def _datalist(self) -> dict[str, Any]:
        """MONAI's list of pairs. `image` is a list if there are several sources, which MONAI reads as channels."""
        lists: dict[str, list[dict[str, Any]]] = {"training": [], "validation": [], "test": []}
        keys = dict(zip(("train", "val", "test"), lists, strict=True))
        for subject in self.selection.subjects:
            *sources, target = self._files(subject).values()
            image = sources[0] if len(sources) == 1 else sources
            lists[keys[subject.split]].append({"image": image, "label": target})
        return {"name": f"{self.selection.version}, {self.selection.direction}", **lists}

    def _write_subject(self, folder: Path, subject: Subject) -> list[Row]:
        rows, depth = [], self.selection.shape[0]
        head = self.header(subject)
        for name, file in self._files(subject).items():
            stored = self.selection.stored(subject, name).astype(np.int16, copy=False)
            values = mark_corners(stored, *subject.scales[name])
            save_volume(folder / file, pack_like(head, values, self.selection.version, *subject.scales[name]))
            place = {"split": subject.split, "slice": self.selection.margin, "slices": depth, "index": 0}
            rows.append(self.row(subject, name, self.role(name), file, **place))
        if subject.split != "test":
            mask = pack_like(head, np.ones(self.selection.shape, np.int16), "1 in every voxel, for nnU-Net")
            for dataset in self.datasets:
                save_volume(folder / dataset / "labelsTr" / f"{subject.subject_id}.nii.gz", mask)
        return rows

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"corners": "not 0, so that nothing crops"}


def mark_corners(stored: NDArray[np.int16], scale: float, offset: float) -> NDArray[np.int16]:
    """A copy of a slab [z, y, x] whose first and last voxel are not 0 in scanner units, but one stored unit more.

    nnU-Net crops each data set to the box of its voxels that are not 0. The boxes of a resampled scan and of the
    reference differ, so source and target would lose their common grid.
    """
    values = stored.copy()
    for corner in ((0, 0, 0), (-1, -1, -1)):
        values[corner] += values[corner] * scale + offset == 0
    return values
