"""What the checks of one version measure: subjects, sites, depths, alignment, split and intensities.

Each function returns a value with its limits; `checks_version.CHECKS` has their names, and the reasons of the limits.

Limits are shares of subjects where they can be. A share of a few subjects says little, so `at_most_share` always allows
`ALLOWED` of them. A check that a configuration turns off, such as that of the modal depth with `--depth any`, has no
value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from ixi_etl.config import SPLITS
from ixi_etl.dataset import manifest
from ixi_etl.dataset.alignment import DISSIMILAR, UNCERTAIN
from ixi_etl.dataset.checks import Measurement
from ixi_etl.dataset.schema import BEYOND_LIMIT, SCHEMAS, USED, is_absent, pair_column
from ixi_etl.dataset.splits import person_of

ALLOWED = 3  # subjects that any limit of a share allows
BELOW_HALF = 0.45  # which that allowance never exceeds
SATURATED = 0.001  # of a slab's voxels with its largest value
MIN_OF_SITE = 3  # subjects from which the loss of a site is judged
MOST = 0.5  # share of the subjects of a site, above which those that lack a scan make it a lost one
MIN_REGISTERED = 10  # subjects; of fewer, all may have heads that did not move
QUANTILES = {"min": 0.0, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}
LARGE_MOTION_MM, LARGE_MOTION_DEG = 15.0, 15.0
"""As of the flag `large_motion` (docs/registration.md)."""


@dataclass(frozen=True)
class VersionFacts:
    """What the checks of a version look at.

    Attributes:
        summary: the content of `dataset.json`.
        final: the final manifest.
        saturation: array -> share of the voxels of each of its slabs that have the slab's largest value.
    """

    summary: Mapping[str, Any]
    final: pd.DataFrame
    saturation: Mapping[str, list[float]]

    @property
    def config(self) -> Mapping[str, Any]:
        return dict(self.summary["inputs"]["config"])

    @property
    def reasons_of(self) -> Mapping[str, tuple[str, ...]]:
        """Step of the funnel -> reasons that exclude a subject there."""
        return SCHEMAS[self.summary["name"]].steps

    @property
    def arrays(self) -> tuple[str, ...]:
        return SCHEMAS[self.summary["name"]].arrays

    @property
    def moving(self) -> list[str]:
        return [name for name in self.arrays if name != self.summary["target"]]

    @cached_property
    def used(self) -> pd.DataFrame:
        return manifest.used_rows(self.final)

    @cached_property
    def asked_for(self) -> pd.DataFrame:
        """The subjects up to the last used one, if `--subjects` or `--split-counts` leaves out others after it.

        Subjects are used in the order of the manifest, so nobody asked for those after it, whatever their reason.
        """
        if not (self.final["reason"] == BEYOND_LIMIT).any():
            return self.final
        return self.final.iloc[: np.flatnonzero(self.final["status"] == USED)[-1] + 1]

    @cached_property
    def aligned(self) -> pd.DataFrame:
        """The used subjects, and those that only their alignment excludes.

        Without the latter, `--uncertain exclude` and `--low-similarity exclude` would leave no pair to fail a check.
        """
        found = self.asked_for
        return found[(found["status"] == USED) | found["reason"].isin((UNCERTAIN, DISSIMILAR))]

    def alignment(self, column: str) -> dict[str, pd.Series]:
        """Moving modality -> values of a column of the alignment of the aligned pairs, without missing ones."""
        named = {name: pair_column(self.moving, name, column) for name in self.moving}
        pairs = self.aligned
        values = {name: pairs.loc[~is_absent(pairs, name), each].dropna() for name, each in named.items()}
        return {name: found.astype(float) for name, found in values.items() if len(found)}


def at_most_share(share: float, subjects: int) -> float:
    """The limit of a share of `subjects`: `ALLOWED` of them are always allowed, if these are under half."""
    return max(share, min(ALLOWED / max(subjects, 1), BELOW_HALF))


def at_least_share(share: float, subjects: int) -> float:
    return 1 - at_most_share(1 - share, subjects)


def _quantiles(tables: Mapping[str, pd.Series]) -> dict[str, float]:
    """`T1 median` and so on of each modality."""
    return {
        f"{name.upper()} {label}": float(values.quantile(q))
        for name, values in tables.items()
        for label, q in QUANTILES.items()
    }


def measure_subjects(facts: VersionFacts) -> Measurement:
    by_site = facts.used["site"].value_counts().sort_index()
    return Measurement(len(facts.used), at_least=1, details={str(site): n for site, n in by_site.items() if site})


def measure_used_share(facts: VersionFacts) -> Measurement:
    found = facts.asked_for
    by_site = (found["status"] == USED).groupby(found["site"]).mean().drop("", errors="ignore")
    return Measurement(
        float((found["status"] == USED).mean()),
        at_least=0.2,
        details={str(site): share for site, share in by_site.items()},
    )


def measure_missing_scans(facts: VersionFacts) -> Measurement:
    return _share_excluded(facts.asked_for, facts.reasons_of["paired"], 0.25)


def _share_excluded(subjects: pd.DataFrame, reasons: Iterable[str], limit: float) -> Measurement:
    excluded = subjects["reason"].isin([*reasons])
    counts = subjects.loc[excluded, "reason"].value_counts().sort_index()
    return Measurement(
        float(excluded.mean()),
        at_most=at_most_share(limit, len(subjects)),
        details={str(reason): n for reason, n in counts.items()},
    )


def measure_technical_exclusions(facts: VersionFacts) -> Measurement:
    paired = facts.asked_for[~facts.asked_for["reason"].isin(facts.reasons_of["paired"])]
    technical = [*facts.reasons_of["readable"], *facts.reasons_of["cut"]]
    counts = paired.loc[paired["reason"].isin(technical), "reason"].value_counts().sort_index()
    return Measurement(
        float(counts.max()) / len(paired) if len(counts) else 0.0,
        at_most=at_most_share(0.05, len(paired)),
        details={str(reason): n for reason, n in counts.items()},
    )


def measure_lost_sites(facts: VersionFacts) -> Measurement:
    modal = {reason for step in ("modal depth", "modal grid") for reason in facts.reasons_of[step]}
    used, lost = set(facts.used["site"]), {}
    for site, reasons in facts.asked_for[facts.asked_for["site"] != ""].groupby("site")["reason"]:
        lacks_scan = reasons.isin(facts.reasons_of["paired"])
        is_incomplete = len(reasons) >= MIN_OF_SITE and lacks_scan.mean() > MOST
        kept = int((~lacks_scan & ~reasons.isin(modal)).sum())
        if is_incomplete or (kept >= MIN_OF_SITE and site not in used):
            lost[str(site)] = len(reasons)
    return Measurement(len(lost), at_most=0, details=lost)


def measure_modal_depth(facts: VersionFacts) -> Measurement:
    if facts.config["depth"] != "modal":
        return Measurement(None)
    shares, volumes = {}, []
    for modality, depth in facts.summary["modal_depth"].items():
        counts = {r["depth"]: r["all"] for r in facts.summary["histogram"] if r["modality"] == modality}
        shares[modality] = counts.get(depth, 0) / max(sum(counts.values()), 1)
        volumes.append(sum(counts.values()))
    return Measurement(min(shares.values()), at_least=at_least_share(0.4, min(volumes)), details=shares)


def measure_nmi(facts: VersionFacts) -> Measurement:
    found = facts.alignment("nmi_after")
    if facts.config["pairing"] == "index" or not found:
        return Measurement(None, details=_quantiles(found))
    lowest = min(float(values.median()) for values in found.values())
    return Measurement(lowest, at_least=facts.config["min_nmi"], details=_quantiles(found))


def measure_flagged_pairs(flag: str, limit: float, fewest: int = 1) -> Callable[[VersionFacts], Measurement]:
    """Measure the share of the registered subjects with a flag of the alignment, of any moving modality.

    Fewer than `fewest` of them are not judged.
    """

    def measure(facts: VersionFacts) -> Measurement:
        if not facts.alignment("motion_mm") or len(facts.aligned) < fewest:
            return Measurement(None)
        pairs = facts.aligned
        flagged = pairs["flags"].str.contains(rf"(?:^|,)(?:[a-z0-9]+_)?{flag}(?:,|$)")
        by_site = flagged.groupby(pairs["site"]).mean().drop("", errors="ignore")
        return Measurement(
            float(flagged.mean()),
            at_most=at_most_share(limit, len(pairs)),
            details={str(site): share for site, share in by_site.items()},
        )

    return measure


def measure_median_alignment(column: str, limit: float | None) -> Callable[[VersionFacts], Measurement]:
    """Measure the largest median of a column of the alignment, of any moving modality."""

    def measure(facts: VersionFacts) -> Measurement:
        found = facts.alignment(column)
        if not found:
            return Measurement(None)
        at_most = facts.config["max_registration_error"] if limit is None else limit
        largest = max(float(values.median()) for values in found.values())
        return Measurement(largest, at_most=at_most, details=_quantiles(found))

    return measure


def measure_split(facts: VersionFacts) -> Measurement:
    """Kish's effective number of persons takes persons with several scans into account (Survey Sampling, 1965)."""
    config, slices = facts.config, facts.summary.get("slices")
    counts = {name: (slices or facts.summary["splits"]).get(name, 0) for name in SPLITS}
    total = sum(counts.values())
    of_order = config.get("split_by") == "order"
    weights = config["split_counts"] if of_order else config["split"]
    asked = [weight / sum(weights) for weight in weights]
    scans = facts.used["subject_id"].map(person_of).value_counts()
    effective = float(scans.sum()) ** 2 / float((scans**2).sum())
    random_error = 4 * max(np.sqrt(p * (1 - p) / effective) for p in asked)
    allowed = 2 / total if slices else 0.0 if of_order else min(random_error, 1.0)
    off = {name: abs(counts[name] / total - p) for name, p in zip(SPLITS, asked, strict=True)}
    return Measurement(max(off.values()), at_most=allowed, details={name: n / total for name, n in counts.items()})


def measure_leaking_persons(facts: VersionFacts) -> Measurement:
    if facts.config.get("split_by", "person") != "person":
        return Measurement(None)
    splits = facts.used.groupby(facts.used["subject_id"].map(person_of))["split"].nunique()
    return Measurement(int((splits > 1).sum()), at_most=0)


def measure_duplicate_scans(facts: VersionFacts) -> Measurement:
    flagged = facts.used["flags"].str.split(",").map(lambda flags: manifest.DUPLICATE in flags)
    return Measurement(float(flagged.mean()), at_most=at_most_share(0.05, len(flagged)))


def measure_saturated_slabs(facts: VersionFacts) -> Measurement:
    shares = {name: float(np.mean(np.array(found) > SATURATED)) for name, found in facts.saturation.items() if found}
    return Measurement(
        max(shares.values()),
        at_most=at_most_share(0.1, len(facts.used)),
        details={name.upper(): share for name, share in shares.items()},
    )


def _levels(facts: VersionFacts) -> dict[str, pd.Series]:
    """Array -> percentile 99.9 less 0.1 of each slab, in steps of its integers."""
    return {
        name: (facts.used[f"{name}_p_high"] - facts.used[f"{name}_p_low"]).dropna().astype(float)
        for name in facts.arrays
    }


def measure_intensity_levels(facts: VersionFacts) -> Measurement:
    found = _levels(facts)
    return Measurement(min(float(values.median()) for values in found.values()), at_least=32, details=_quantiles(found))


def measure_intensity_range(facts: VersionFacts) -> Measurement:
    ratios = {}
    for name, levels in _levels(facts).items():
        units = levels * facts.used.loc[levels.index, f"{name}_scale"].astype(float)
        ratios[name.upper()] = float(units.quantile(0.95) / units.quantile(0.05))
    return Measurement(max(ratios.values()), at_most=100, details=ratios)


def measure_known_ages(facts: VersionFacts) -> Measurement:
    if not facts.summary["inputs"].get("demographics_sha256"):
        return Measurement(None)
    return Measurement(float(facts.used["age"].notna().mean()), at_least=at_least_share(0.5, len(facts.used)))
