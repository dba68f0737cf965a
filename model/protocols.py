"""Protocols that score one subject's generated slices: this project's own, and those of publications.

They differ in normalisation, crop, mask, data range, SSIM and averaging, so their figures cannot be compared with each
other. docs/protocols.md defines each one and says how to add another. Imports torch and scikit-image only to score.

Legend: Z slices of one subject; H, W are height and width. Images are float32 (Z, H, W) in [0, 1].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ixi_etl.config import nearest_name
from ixi_etl.errors import ConfigError
from ixi_etl.modalities import DATASETS
from model.scores import (
    Images,
    as_float64,
    average_maps,
    center_crop,
    error_maps,
    ms_ssim,
    psnr_of_slices,
    score_subjects,
    ssim_3d,
    ssim_of_slices,
)

Scores = dict[str, dict[str, NDArray[np.float64]]]
"""Mask -> measure -> values (Z,) of slices, or (1,) of the subject for a measure in `Protocol.pooled`."""

DOCS = "docs/protocols.md"
CROP = (256, 152)  # of SynDiff: rows and columns


class Measure(NamedTuple):
    """How a measure is shown: title and decimal places; and whether a larger value is better."""

    title: str
    digits: int
    larger_is_better: bool = True


MEASURES = {
    "psnr": Measure("PSNR, dB", 2),
    "ssim": Measure("SSIM", 3),
    "mae": Measure("MAE", 4, larger_is_better=False),
    "ms_ssim": Measure("MS-SSIM", 3),
    "ssim_3d": Measure("3-D SSIM", 3),
    "nmae": Measure("NMAE", 4, larger_is_better=False),
    "mse": Measure("MSE", 5, larger_is_better=False),
}
"""Every measure of any protocol."""

MAIN_MEASURES = ("psnr", "ssim", "mae")
"""Those of `ours` that are validated during training, and shown by subject on the page of a run."""


@dataclass(frozen=True)
class Subject:
    """What a protocol is given of one subject.

    Attributes:
        generated, target: (Z, H, W).
        sources: name -> (Z, H, W), the first source first.
        target_name: of the array, for example `t2`.
        head: (Z, H, W) bool, pixels above Otsu's threshold of the subject's slab in a source or in the target.
        positions: (Z,) index of each slice in the slab.
    """

    generated: Images
    target: Images
    sources: Mapping[str, Images]
    target_name: str
    head: NDArray[np.bool_]
    positions: NDArray[np.int64]


class Protocol(ABC):
    """One way to score a subject, and to average over a split.

    Attributes:
        name: on the command line and in tables.
        title: for people.
        definition: one sentence.
        source: publication, repository and commit.
        masks: name -> meaning.
        data_range: that of its measures, in words.
        averaged_over: what the mean and the standard deviation of a split are taken over. A subject's score is always
            the mean of its values that are not NaN.
        ddof: of that standard deviation: 1 for a sample, 0 for a population.
        pooled: measures that have one value for a subject and none for slices, so only means over subjects.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    definition: ClassVar[str]
    source: ClassVar[str]
    masks: ClassVar[Mapping[str, str]]
    data_range: ClassVar[str]
    averaged_over: ClassVar[Literal["subjects", "slices"]]
    ddof: ClassVar[Literal[0, 1]]
    pooled: ClassVar[frozenset[str]] = frozenset()

    @property
    def link(self) -> str:
        """Where the definition is."""
        return f"{DOCS}#{self.name}"

    @abstractmethod
    def score(self, subject: Subject) -> Scores:
        """Values of each measure under each mask; NaN where one is not defined, such as of a blank slice."""


class Ours(Protocol):
    name = "ours"
    title = "This project"
    definition = (
        "PSNR from the mean squared error over all pixels of a subject, SSIM with a Gaussian window of sigma 1.5, both "
        "with data range 1, on images normalised once for each slab; then the mean over subjects."
    )
    source = "this project; SSIM of Wang et al. 2004, MS-SSIM of Wang et al. 2003"
    masks: ClassVar[Mapping[str, str]] = {
        "whole": "every pixel",
        "head": "over Otsu's threshold in a source or in the target",
    }
    data_range = "1"
    averaged_over = "subjects"
    ddof = 1
    pooled = frozenset({"psnr", "ssim", "mae", "ssim_3d", "nmae"})

    def score(self, subject: Subject) -> Scores:
        import torch

        generated, target = (torch.from_numpy(x).unsqueeze(1) for x in (subject.generated, subject.target))
        maps = error_maps(generated, target)
        same = torch.zeros(len(target), dtype=torch.long)
        scores: Scores = {}
        for mask, inside in (("whole", None), ("head", torch.from_numpy(subject.head).unsqueeze(1))):
            by_subject = score_subjects(average_maps(maps, inside), same, 1)
            scores[mask] = {measure: values.numpy() for measure, values in by_subject.items()}
        total = subject.target.sum(dtype=np.float64)
        error = np.abs(subject.generated - subject.target).sum(dtype=np.float64)
        is_slab = (np.diff(subject.positions) == 1).all()
        scores["whole"] |= {
            "ms_ssim": ms_ssim(generated, target),
            "ssim_3d": np.array([ssim_3d(subject.generated, subject.target) if is_slab else np.nan]),
            "nmae": np.array([error / total]),
        }
        return scores


class SynDiff(Protocol):
    name = "syndiff"
    title = "SynDiff"
    definition = (
        "Each slice is divided by its own maximum and cropped about its centre to 256 x 152; PSNR with the maximum of "
        "the generated slice after the crop; mean over slices. It publishes no SSIM code: SSIM is scikit-image's "
        "default here, with the maximum of the target as data range."
    )
    source = "Özbey et al. 2023, icon-lab/SynDiff 8e5064e, test.py"
    masks: ClassVar[Mapping[str, str]] = {"whole": "every pixel of the crop"}
    data_range = "PSNR: maximum of the generated slice; SSIM: maximum of the target slice"
    averaged_over = "slices"
    ddof = 0

    def score(self, subject: Subject) -> Scores:
        generated, target = (
            center_crop(x / x.max((1, 2), keepdims=True), *CROP) for x in as_float64(subject.generated, subject.target)
        )
        psnr = psnr_of_slices(generated, target, generated.max((1, 2)))
        return {"whole": {"psnr": psnr, "ssim": ssim_of_slices(generated, target, target.max((1, 2)))}}


class SelfRDB(Protocol):
    name = "selfrdb"
    title = "SelfRDB"
    definition = (
        "Each slice is divided by its own mean; PSNR and scikit-image's default SSIM with the maximum of the target as "
        "data range; mean over the slices of a subject, then mean and population standard deviation over subjects. Its "
        "SSIM is in per cent, here it is a share."
    )
    source = "Arslan et al. 2024, icon-lab/SelfRDB 6262ede, utils.compute_metrics"
    masks: ClassVar[Mapping[str, str]] = {
        "whole": "every pixel",
        "foreground": "both images times the mask of a T1 above 0.1, before they are divided by their means",
    }
    data_range = "maximum of the target slice"
    averaged_over = "subjects"
    ddof = 0

    def score(self, subject: Subject) -> Scores:
        generated, target = as_float64(subject.generated, subject.target)
        scans = {**subject.sources, subject.target_name: subject.target}
        (reference,) = as_float64(scans.get("t1", next(iter(subject.sources.values()))))
        low, high = (extreme((1, 2), keepdims=True) for extreme in (reference.min, reference.max))
        mask = (reference - low) / (high + 1e-8) > 0.1
        return {
            "whole": self._score(generated, target),
            "foreground": self._score(generated * mask, target * mask),
        }

    @staticmethod
    def _score(generated: Images, target: Images) -> dict[str, NDArray[np.float64]]:
        generated, target = (np.abs(x) / np.abs(x).mean((1, 2), keepdims=True) for x in (generated, target))
        largest = target.max((1, 2))
        return {"psnr": psnr_of_slices(generated, target, largest), "ssim": ssim_of_slices(generated, target, largest)}


class Moschetto(Protocol):
    name = "moschetto"
    title = "Moschetto et al."
    definition = (
        "Each slice is clipped to its own percentiles 5 and 99.5 and scaled to [0, 1]; scikit-image's default SSIM "
        "with data range 1, and PSNR after each slice is masked by its own triangle threshold; MSE before the scaling; "
        "mean over slices, with the population standard deviation."
    )
    source = "Moschetto et al. 2025, arXiv 2507.14575, AndreaMoschetto/medical-I2I-benchmark 8e592a6, utils.py"
    masks: ClassVar[Mapping[str, str]] = {
        "whole": "every pixel",
        "foreground": "each image times its own mask, above the triangle threshold of itself",
    }
    data_range = "1"
    averaged_over = "slices"
    ddof = 0

    def score(self, subject: Subject) -> Scores:
        from skimage.filters import threshold_triangle

        scaled, masked, clipped = [], [], []
        for images in as_float64(subject.generated, subject.target):
            low, high = np.percentile(images, (5, 99.5), axis=(1, 2), keepdims=True)
            clipped.append(np.clip(images, low, high))
            low, high = (extreme((1, 2), keepdims=True) for extreme in (clipped[-1].min, clipped[-1].max))
            scaled.append((clipped[-1] - low) / (high - low + 1e-8))
            masked.append(np.stack([x * (x > threshold_triangle(x)) for x in scaled[-1]]))
        (generated, target), (masked_generated, masked_target) = scaled, masked
        one = np.ones(len(target))
        mse = ((clipped[0] - clipped[1]) ** 2).mean((1, 2))
        return {
            "whole": {"ssim": ssim_of_slices(generated, target, one), "mse": mse},
            "foreground": {
                "psnr": psnr_of_slices(masked_generated, masked_target, one),
                "ssim": ssim_of_slices(masked_generated, masked_target, one),
            },
        }


PROTOCOLS: dict[str, Protocol] = {p.name: p for p in (Ours(), SynDiff(), SelfRDB(), Moschetto())}


def protocols_for(dataset: str) -> tuple[str, ...]:
    """Names of the protocols that fit a dataset: those of publications are for heads, so digits have only `ours`."""
    return tuple(PROTOCOLS) if dataset in DATASETS else ("ours",)


def parse_protocols(text: str) -> tuple[str, ...]:
    """Names of protocols from text such as `ours,syndiff`, in the order of `PROTOCOLS`.

    Raises:
        ConfigError: a protocol does not exist, or none is named.
    """
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    unknown = next((name for name in names if name not in PROTOCOLS), None)
    if unknown is not None or not names:
        near = nearest_name(unknown, list(PROTOCOLS)) if unknown else None
        problem = f"there is no protocol {unknown}" if unknown else "--protocol names none"
        raise ConfigError(f"{problem}; " + (f"did you mean {near}?" if near else f"there are {', '.join(PROTOCOLS)}"))
    return tuple(name for name in PROTOCOLS if name in names)
