"""Published preparations of IXI by name, as near as this project comes to them, and all deviations from them.

A preset of `ixi-etl refresh` sets the fields of a preparation. `deviations` says what a version does otherwise than
published: what the preparation never does, and each field that its user changed. docs/protocols.md lists them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ixi_etl.config import DatasetConfig


@dataclass(frozen=True)
class Preparation:
    """How one publication prepared IXI.

    Attributes:
        fields: field of `DatasetConfig` -> value.
        source: repository and commit, and issues of its tracker, in which the statements were read.
        deviations: what is done otherwise than published, or is not published; one sentence each.
    """

    fields: dict[str, Any]
    source: str
    deviations: tuple[str, ...]


_AUDIT = (
    "A subject whose scans fail a check of this project is passed over, and the next one is taken; no publication "
    "names such checks."
)
_ONE_SHAPE = (
    "A subject whose reference has another slice size than most is passed over, because all slabs of a store have one "
    "shape; published arrays are padded to one size."
)
_PADDING = "Slices are stored in the size of the reference's scan; they are padded when they are used or exported."
_REGISTRATION = (
    "The affine registration has 12 parameters, as FLIRT's has with -dof 12, but maximises Mattes mutual information "
    "with 48 bins, not normalised mutual information with 256, and starts from the alignment of the headers, where "
    "FLIRT searches from -180 to 180 degrees."
)
_INTERPOLATION = "The moving scan is interpolated linearly, once; FLIRT's command has -interp spline."

PREPARATIONS = {
    "syndiff": Preparation(
        fields={
            "reference": "T1",
            "registration": "affine",
            "slices": 100,
            "slice_rule": "area",
            "depth": "any",
            "split_counts": (25, 5, 10),
            "subjects": 40,
            "normalisation": "mean",
        },
        source="icon-lab/SynDiff at 8e5064e (README.md, dataset.py), its issues 13, 24 and 31",
        deviations=(
            _REGISTRATION,
            _INTERPOLATION,
            "All subjects are registered; published training data may be unregistered, as SynDiff trains on unpaired "
            "images.",
            "The slices are the 100 adjacent ones with the largest area of head (Otsu's threshold), scalp and neck "
            "included; published are about 100 slices that contain brain, chosen by eye.",
            "The first 25 of the 40 subjects are train, the next 5 val, the last 10 test; published are the numbers, "
            "and that the 40 are the first in order, not which of them are in which split.",
            "The first 40 subjects are counted among those with a T1 and a T2; SynDiff also used the PD, so its 40 "
            "probably have all three.",
            _AUDIT,
            _ONE_SHAPE,
            "A volume's mean and maximum are those of the stored slices, after registration; published is the mean of "
            "the volume. As published, the maximum is over all subjects, so those of the test split set the range of "
            "the others.",
            _PADDING,
        ),
    ),
    "selfrdb": Preparation(
        fields={
            "reference": "T1",
            "registration": "affine",
            "slices": 100,
            "slice_rule": "area",
            "depth": "any",
            "split_counts": (25, 5, 10),
            "subjects": 40,
            "normalisation": "range",
        },
        source="icon-lab/SelfRDB at 6262ede (README.md, datasets.py, data/create_brats_dataset.py), its issue 4",
        deviations=(
            "The preparation of IXI is not published: neither subjects nor registration nor slices. The authors refer "
            "to their script for BraTS (issue 4). This preset follows it where it can, and otherwise SynDiff, which is "
            "of the same laboratory.",
            "The first 40 subjects are split 25, 5 and 10 in order; the script for BraTS shuffles all subjects with "
            "seed 42 and takes the first 40 of them.",
            "The T2 is registered onto the T1 as for SynDiff; the script for BraTS needs no registration.",
            _REGISTRATION,
            _INTERPOLATION,
            "The slices are the 100 adjacent ones with the largest area of head (Otsu's threshold); the script for "
            "BraTS takes slices 27 to 126 of volumes in a template's space, which have no counterpart in IXI.",
            "Each slab is scaled by its own least and largest value; the script for BraTS scales each slice by its "
            "own, so that the brightness of a tissue changes from slice to slice.",
            _AUDIT,
            _ONE_SHAPE,
            _PADDING,
        ),
    ),
    "moschetto": Preparation(
        fields={
            "slices": 1,
            "depth": "any",
            "split_by": "file",
            "split": (0.8, 0.05, 0.15),
            "split_seed": 42,
            "normalisation": "range",
        },
        source="AndreaMoschetto/medical-I2I-benchmark at 8e592a6 (README.md, src/t1t2converter/datasets.py, scripts/"
        "pix2pix_t1t2.py)",
        deviations=(
            "The repository has no code that makes its images, and names no registration. Its scripts pad images by 5 "
            "pixels left and right and 3 above and below, for a network with five halvings, which needs multiples of "
            "32: 182 x 218 becomes 192 x 224. That is the axial size of the MNI152 grid of 1 mm, so the images were "
            "probably registered to MNI152, and perhaps skull-stripped. This is inferred, not published.",
            "Slices are those of the T2 as scanned, with the T1 registered onto it by a rigid motion, not slices of "
            "MNI152; the head keeps its skull.",
            "The slice is the middle one of each T2 volume; that the images are central axial slices is not in the "
            "repository's code.",
            "The subjects are those of IXI; the README names IXI, HCP and CamCAN, and its loader shuffles the files of "
            "one folder, so the shuffled list was probably that of all three.",
            "The files are sorted by subject before they are shuffled; the repository sorts them by name, and does not "
            "publish the names.",
            "Each slice is scaled by its own least and largest value, and stored in 16 bits; the published images are "
            "PNG files that are read as 8 bits, and how they were scaled is not published.",
            _AUDIT,
            _ONE_SHAPE,
        ),
    ),
}
"""Name of a published preparation -> what it is."""

PRESETS: dict[str, dict[str, Any]] = {
    "paired": {},
    "paper": {"pairing": "index"},
    **{name: {**preparation.fields, "preparation": name} for name, preparation in PREPARATIONS.items()},
}
"""Preset of a refresh -> fields that it sets. `paired`, the defaults, is recommended; `paper` is the recipe that this
project follows."""


def configure(preset: str, given: Mapping[str, Any]) -> DatasetConfig:
    """The configuration of a preset with the fields that a user `given` changes.

    Raises:
        pydantic.ValidationError: the fields contradict each other.
    """
    fields = {**PRESETS[preset], **given}
    if given.get("split_by", "order") != "order" and "split_counts" not in given:
        fields.pop("split_counts", None)  # only a split by order has them, and no option removes them
    return DatasetConfig.model_validate(fields)


NO_DEVIATION = frozenset({"preparation", "pictures"})
"""Fields that change no slab and no split."""


def deviations(dataset_config: DatasetConfig) -> list[str]:
    """What a version does otherwise than the publication of its `preparation`; empty if it follows none.

    The last sentences name the fields that differ from those of the preset: "slices is 10, not 100".
    """
    if dataset_config.preparation == "none":
        return []
    published = DatasetConfig.model_validate(PRESETS[dataset_config.preparation])
    changed = [
        f"{name} is {_shown(getattr(dataset_config, name))}, not {_shown(getattr(published, name))}."
        for name in DatasetConfig.model_fields
        if name not in NO_DEVIATION and getattr(dataset_config, name) != getattr(published, name)
    ]
    return [*PREPARATIONS[dataset_config.preparation].deviations, *changed]


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else "none" if value is None else str(value)
