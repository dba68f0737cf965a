"""Judge the alignment of the cut pairs: by the estimated error of the registration, and by similarity among pairs.

The similarity (NMI) of a well-aligned pair depends on the scanner and the protocol, so one limit cannot suit all. A
pair is compared with the pairs of its site; the fixed minimum only finds pairs that no scanner explains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ixi_etl.config import DatasetConfig
from ixi_etl.dataset.schema import pair_column

UNCERTAIN, DISSIMILAR = "registration_uncertain", "low_similarity"
NO_GAIN = "registration_no_gain"
"""Flag of a pair that the registration did not make more similar; set by `ixi_etl.pairing.slabs`."""

MIN_PAIRS = 20
"""Pairs of a site from which the spread of their NMIs is estimated."""

MAX_ROBUST_Z = 3.5
"""Usual limit for outliers by the median absolute deviation (Iglewicz and Hoaglin 1993)."""

_NORMAL_MAD = 0.6745  # median absolute deviation of a normal distribution, in standard deviations


@dataclass(frozen=True)
class Judgement:
    """What is wrong with the alignment of a pair.

    Attributes:
        reason: `registration_uncertain` or `low_similarity`.
        flag: the reason, with several moving modalities named after one of them: `pd_low_similarity`.
        detail: measured and allowed value, in words.
    """

    reason: str
    flag: str
    detail: str


def judge_alignments(
    records: Mapping[str, Mapping[str, Any]], sites: Mapping[str, str], dataset_config: DatasetConfig
) -> dict[str, list[Judgement]]:
    """Subject -> what is wrong with its alignments; subjects without a fault are left out.

    Args:
        records: subject -> cut record, of subjects that are not excluded.
        sites: subject -> site.
    """
    judged: dict[str, list[Judgement]] = {}
    for modality in dataset_config.moving:
        for subject, judgement in _judge_pairs(modality, records, sites, dataset_config):
            judged.setdefault(subject, []).append(judgement)
    return judged


def _judge_pairs(
    modality: str, records: Mapping[str, Mapping[str, Any]], sites: Mapping[str, str], dataset_config: DatasetConfig
) -> Iterator[tuple[str, Judgement]]:
    """(subject, judgement) of every fault in the alignment of one modality."""

    def named(column: str) -> str:
        return pair_column(dataset_config.moving, modality, column)

    def judgement(reason: str, detail: str) -> Judgement:
        return Judgement(reason, named(reason), detail if named(reason) == reason else f"{modality}: {detail}")

    similarity = {s: record[named("nmi_after")] for s, record in records.items() if named("nmi_after") in record}
    minima = _minimum_nmi(similarity, sites, dataset_config)
    for subject, nmi in similarity.items():
        record = records[subject]
        error_mm, limit_mm = record.get(named("registration_error_mm")), dataset_config.max_registration_error
        if named("registration_failed") in record.get("flags", "").split(","):
            yield subject, judgement(UNCERTAIN, "the registration failed")
        elif error_mm is not None and error_mm > limit_mm:
            detail = f"the registration may be off by {error_mm:.1f} mm; the maximum is {limit_mm:g} mm"
            yield subject, judgement(UNCERTAIN, detail)
        minimum, basis = minima[sites[subject]]
        if nmi < minimum:
            yield subject, judgement(DISSIMILAR, f"NMI is {nmi:.3f}; the minimum is {minimum:.3f} ({basis})")


def _minimum_nmi(
    similarity: Mapping[str, float], sites: Mapping[str, str], dataset_config: DatasetConfig
) -> dict[str, tuple[float, str]]:
    """Site -> the NMI below which a pair is dissimilar, and what it is based on; `similarity` is subject -> NMI."""
    minima = {}
    for site in set(sites.values()):
        values = np.array([nmi for subject, nmi in similarity.items() if sites[subject] == site])
        minimum, basis = dataset_config.min_nmi, "min_nmi"
        if len(values) >= MIN_PAIRS:
            median = float(np.median(values))
            deviation = float(np.median(np.abs(values - median))) / _NORMAL_MAD
            relative = round(median - MAX_ROBUST_Z * deviation, 9)
            if relative > minimum:
                minimum, basis = relative, f"{MAX_ROBUST_Z:g} robust standard deviations below the median of {site}"
        minima[site] = minimum, basis
    return minima
