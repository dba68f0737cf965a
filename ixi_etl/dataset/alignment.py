"""Judge the alignment of the cut pairs: by the estimated error of the registration, and by similarity among pairs.

The similarity (NMI) of a well-aligned pair depends on the scanner and the protocol, so one limit cannot suit all. A
pair is compared with the pairs of its site; the fixed minimum only finds pairs that no scanner explains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ixi_etl.config import DatasetConfig

UNCERTAIN, DISSIMILAR = "registration_uncertain", "low_similarity"

MIN_PAIRS = 20
"""Pairs of a site from which the spread of their NMIs is estimated."""

MAX_ROBUST_Z = 3.5
"""Usual limit for outliers by the median absolute deviation (Iglewicz and Hoaglin 1993)."""

_NORMAL_MAD = 0.6745  # median absolute deviation of a normal distribution, in standard deviations


@dataclass(frozen=True)
class Judgement:
    """What is wrong with the alignment of a pair.

    Attributes:
        flag: `registration_uncertain` or `low_similarity`; also a reason for exclusion.
        detail: measured and allowed value, in words.
    """

    flag: str
    detail: str


def judge_alignments(
    records: Mapping[str, Mapping[str, Any]], sites: Mapping[str, str], dataset_config: DatasetConfig
) -> dict[str, list[Judgement]]:
    """Subject -> what is wrong with its alignment; subjects without a fault are left out.

    Args:
        records: subject -> cut record, of pairs that are not excluded.
        sites: subject -> site.
    """
    minima = _minimum_nmi(records, sites, dataset_config)
    judged: dict[str, list[Judgement]] = {}
    for subject, record in records.items():
        error_mm, limit_mm = record.get("registration_error_mm"), dataset_config.max_registration_error
        if "registration_failed" in record.get("flags", ""):
            judged.setdefault(subject, []).append(Judgement(UNCERTAIN, "the registration failed"))
        elif error_mm is not None and error_mm > limit_mm:
            detail = f"the registration may be off by {error_mm:.1f} mm; the maximum is {limit_mm:g} mm"
            judged.setdefault(subject, []).append(Judgement(UNCERTAIN, detail))
        minimum, basis = minima[sites[subject]]
        if record["nmi_after"] < minimum:
            detail = f"NMI is {record['nmi_after']:.3f}; the minimum is {minimum:.3f} ({basis})"
            judged.setdefault(subject, []).append(Judgement(DISSIMILAR, detail))
    return judged


def _minimum_nmi(
    records: Mapping[str, Mapping[str, Any]], sites: Mapping[str, str], dataset_config: DatasetConfig
) -> dict[str, tuple[float, str]]:
    """Site -> the NMI below which a pair is dissimilar, and what it is based on."""
    minima = {}
    for site in set(sites.values()):
        values = np.array([record["nmi_after"] for subject, record in records.items() if sites[subject] == site])
        minimum, basis = dataset_config.min_nmi, "min_nmi"
        if len(values) >= MIN_PAIRS:
            median = float(np.median(values))
            deviation = float(np.median(np.abs(values - median))) / _NORMAL_MAD
            relative = round(median - MAX_ROBUST_Z * deviation, 9)
            if relative > minimum:
                minimum, basis = relative, f"{MAX_ROBUST_Z:g} robust standard deviations below the median of {site}"
        minima[site] = minimum, basis
    return minima
