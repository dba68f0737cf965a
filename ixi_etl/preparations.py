"""Published preparations of IXI by name, as near as this project comes to them, and all deviations from them.

A preset of `ixi-etl refresh` sets the fields of a preparation. `deviations` lists how a version differs from the
publication: what the preparation never does, and each field that its user changed. docs/protocols.md lists them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ixi_etl.config import DatasetConfig


@dataclass(frozen=True)
class Deviation:
    """One way in which a preset differs from its publication, or what is not published.

    Attributes:
        sentence: the text that is recorded.
        fields: what it describes; a version for which one of these was changed does not have this deviation.
    """

    sentence: str
    fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preparation:
    """How one publication prepared IXI.

    Attributes:
        fields: field of `DatasetConfig` -> value.
        source: repository and commit, and issues of its tracker, in which the statements were read.
        deviations: how it differs from the publication.
    """

    fields: dict[str, Any]
    source: str
    deviations: tuple[Deviation, ...]


_AUDIT = Deviation(
    "A subject whose scans fail a check of this project is passed over, and the next one is taken; the publications "
    "mention no checks."
)
_ONE_SHAPE = Deviation(
    "A subject whose reference has another slice size than most is passed over, because all slabs of a store have one "
    "shape; published arrays are padded to one size."
)
_PADDING = Deviation(
    "Slices are stored in the size of the reference's scan; they are padded when they are used or exported."
)
_REGISTRATION = Deviation(
    "The affine registration has 12 parameters, as FLIRT's has with -dof 12, but maximises Mattes mutual information "
    "with 48 bins, not normalised mutual information with 256, and starts from the alignment of the headers, where "
    "FLIRT searches from -180 to 180 degrees.",
    ("registration",),
)
_INTERPOLATION = Deviation(
    "The moving scan is interpolated linearly, once; FLIRT's command has -interp spline.", ("pairing",)
)

_ON_THE_T1: dict[str, Any] = {
    "reference": "T1",
    "registration": "affine",
    "slices": 100,
    "slice_rule": "area",
    "depth": "any",
    "split_counts": (25, 5, 10),
}
"""The fields of SynDiff, which SelfRDB, of the same laboratory, shares as far as is known."""

PREPARATIONS = {
    "syndiff": Preparation(
        fields=_ON_THE_T1 | {"normalisation": "mean"},
        source="icon-lab/SynDiff at 8e5064e (README.md, dataset.py), its issues 13, 24, 28 and 31",
        deviations=(
            _REGISTRATION,
            _INTERPOLATION,
            Deviation(
                "All subjects are registered; published training data may be unregistered, as SynDiff trains on "
                "unpaired images.",
                ("registration",),
            ),
            Deviation(
                "Slices are the adjacent ones with the largest area of head (Otsu's threshold), scalp and neck "
                "included; published are about 100 axial slices with brain tissue, and no rule by which they were "
                "selected.",
                ("slice_rule", "window"),
            ),
            Deviation(
                "The first subjects are train, the next val, the last test; published are the numbers 25, 5 and 10, "
                "and that the 40 are the first in order, not which of them are in which split.",
                ("split_by",),
            ),
            Deviation(
                "The first subjects are counted among those with a T1 and a T2; SynDiff also used the PD, so its 40 "
                "probably have all three.",
                ("modalities",),
            ),
            _AUDIT,
            _ONE_SHAPE,
            Deviation(
                "A volume's mean and maximum are those of the stored slices, after registration; published is the "
                "mean of the volume. As published, the maximum is over all subjects, so those of the test split set "
                "the range of the others.",
                ("normalisation",),
            ),
            _PADDING,
        ),
    ),
    "selfrdb": Preparation(
        fields=_ON_THE_T1 | {"normalisation": "range"},
        source="icon-lab/SelfRDB at 6262ede (README.md, datasets.py, data/create_brats_dataset.py), its issue 4",
        deviations=(
            Deviation(
                "The preparation of IXI is not published: neither subjects nor registration nor slices. The authors "
                "refer to their script for BraTS (issue 4). This preset follows it where it can, and otherwise "
                "SynDiff, which is of the same laboratory.",
            ),
            Deviation(
                "The first subjects are train, the next val, the last test; the script for BraTS shuffles all "
                "subjects with seed 42, and takes 25, 5 and 10 from the front.",
                ("split_by",),
            ),
            Deviation(
                "The T2 is registered onto the T1 as for SynDiff; the script for BraTS needs no registration.",
                ("reference", "registration"),
            ),
            _REGISTRATION,
            _INTERPOLATION,
            Deviation(
                "Slices are the adjacent ones with the largest area of head (Otsu's threshold); the script for BraTS "
                "takes slices 27 to 126 of volumes in a template's space, which have no counterpart in IXI.",
                ("slice_rule", "window"),
            ),
            Deviation(
                "Each slab is scaled by its own least and largest value; the script for BraTS scales each slice by "
                "its own, so that the brightness of a tissue changes from slice to slice.",
                ("normalisation",),
            ),
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
            Deviation(
                "The repository has no code that makes its images, and names no registration. Its scripts pad images "
                "by 5 pixels left and right and 3 above and below, for a network with five halvings, which needs "
                "multiples of 32: 182 x 218 becomes 192 x 224. That is the axial size of the MNI152 grid of 1 mm, so "
                "the images were probably registered to MNI152, and perhaps skull-stripped. This is inferred, not "
                "published.",
            ),
            Deviation(
                "Slices are those of the T2 as scanned, with the T1 registered onto it by a rigid motion, not slices "
                "of MNI152; the head keeps its skull.",
                ("reference", "registration"),
            ),
            Deviation(
                "The slice is the middle one of each T2 volume; that the images are central axial slices is not in "
                "the repository's code.",
                ("reference", "slices", "slice_rule", "window"),
            ),
            Deviation(
                "The subjects are those of IXI; the README names IXI, HCP and CamCAN, and its loader shuffles the "
                "files of one folder, so the shuffled list was probably that of all three.",
            ),
            Deviation(
                "The files are sorted by subject before they are shuffled; the repository sorts them by name, and "
                "does not publish the names.",
                ("split_by",),
            ),
            Deviation(
                "Each slice is scaled by its own least and largest value, and stored in 16 bits; the published images"
                " are PNG files that are read as 8 bits, and how they were scaled is not published.",
                ("normalisation", "slices", "window"),
            ),
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

    Fields of the preset that these exclude are left out, because no option removes them.

    Raises:
        pydantic.ValidationError: the fields contradict each other.
    """
    fields = dict(PRESETS[preset])
    if given.get("split_by", "order") != "order" and (counts := fields.pop("split_counts", None)):
        fields["subjects"] = sum(counts)
    if given.get("split_counts") is not None:
        fields.pop("split_by", None)
    if given.get("pairing") == "index":
        fields.pop("registration", None)
    if given.get("pairing") == "index" or given.get("window", "middle") != "middle":
        fields.pop("slice_rule", None)
    return DatasetConfig.model_validate({**fields, **given})


NO_DEVIATION = frozenset({"preparation", "pictures"})
"""Fields that change no slab and no split."""


def deviations(dataset_config: DatasetConfig) -> list[str]:
    """How a version differs from the publication of its `preparation`; empty if it follows none.

    The last sentences name the fields that differ from those of the preset: "slices is 10, not 100".
    """
    if dataset_config.preparation == "none":
        return []
    published = DatasetConfig.model_validate(PRESETS[dataset_config.preparation])
    changed = {}
    for name in DatasetConfig.model_fields.keys() - NO_DEVIATION:
        is_limit = name == "subjects" and dataset_config.split_counts is None  # which limit the subjects, too
        value, wanted = (getattr(each, "subject_limit" if is_limit else name) for each in (dataset_config, published))
        if value != wanted:
            changed[name] = f"{name} is {_shown(value)}, not {_shown(wanted)}."
    fixed = PREPARATIONS[dataset_config.preparation].deviations
    return [
        *(deviation.sentence for deviation in fixed if changed.keys().isdisjoint(deviation.fields)),
        *(changed[name] for name in DatasetConfig.model_fields if name in changed),
    ]


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else "none" if value is None else str(value)
