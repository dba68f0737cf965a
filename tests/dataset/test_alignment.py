"""Pairs whose registration is uncertain, or whose similarity stands out, are flagged or excluded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from survey_tables import CUT, pair, table_of

from ixi_etl.config import DatasetConfig
from ixi_etl.dataset import manifest, selection
from ixi_etl.dataset.alignment import MIN_PAIRS, judge_alignments

CONFIG = DatasetConfig()


def record(nmi: float = 0.2, error_mm: float | None = 0.3, flags: str = "") -> dict[str, Any]:
    return {"nmi_after": nmi, "registration_error_mm": error_mm, "flags": flags}


def flags_of(records: list[dict[str, Any]], config: DatasetConfig = CONFIG, site: str = "HH") -> list[list[str]]:
    """The flags of each record."""
    by_subject = {f"IXI{n:03d}": r for n, r in enumerate(records)}
    judged = judge_alignments(by_subject, dict.fromkeys(by_subject, site), config)
    return [[j.flag for j in judged.get(subject, [])] for subject in by_subject]


@pytest.mark.parametrize(
    ("found", "flags"),
    [
        (record(), []),
        (record(error_mm=1.0), []),
        (record(error_mm=1.1), ["registration_uncertain"]),
        (record(error_mm=None), []),  # not registered
        (record(flags="registration_failed"), ["registration_uncertain"]),
        (record(nmi=0.06), []),
        (record(nmi=0.059), ["low_similarity"]),
        (record(nmi=0.01, error_mm=9), ["registration_uncertain", "low_similarity"]),
    ],
)
def test_a_pair_is_judged_by_its_error_and_its_similarity(found: dict[str, Any], flags: list[str]) -> None:
    assert flags_of([found]) == [flags]


def test_a_pair_far_below_the_pairs_of_its_site_is_dissimilar() -> None:
    usual = [record(nmi) for nmi in np.linspace(0.18, 0.22, MIN_PAIRS - 1)]
    assert flags_of([*usual, record(0.1)])[-1] == ["low_similarity"]
    assert flags_of([*usual[1:], record(0.1)])[-1] == []  # too few pairs to know the spread


def test_each_site_has_its_own_limit() -> None:
    records = {f"IXI{n:03d}": record(0.2 + n / 1000) for n in range(20)}
    records |= {f"IXI{n:03d}": record(0.1 + n / 1000) for n in range(20, 40)}
    sites = {subject: "HH" if int(subject[3:]) < 20 else "IOP" for subject in records}
    assert judge_alignments(records, sites, CONFIG) == {}
    assert list(judge_alignments(records, dict.fromkeys(records, "HH"), CONFIG)) == []  # two clusters: a wide spread


@given(st.lists(st.floats(0.07, 0.4), min_size=MIN_PAIRS, max_size=60))
def test_no_pair_above_the_median_is_dissimilar(similarities: list[float]) -> None:
    flags = flags_of([record(nmi) for nmi in similarities])
    assert not any(f for f, nmi in zip(flags, similarities, strict=True) if nmi >= float(np.median(similarities)))


@pytest.mark.parametrize("rule", ["flag", "exclude"])
@pytest.mark.parametrize(
    ("option", "found", "reason", "detail"),
    [
        (
            "uncertain",
            {"registration_error_mm": 2.25},
            "registration_uncertain",
            "may be off by 2.2 mm; the maximum is 1 mm",
        ),
        ("low_similarity", {"nmi_after": 0.01}, "low_similarity", "NMI is 0.010; the minimum is 0.060 (min_nmi)"),
    ],
)
def test_such_pairs_are_flagged_or_excluded(
    rule: str, option: str, found: dict[str, Any], reason: str, detail: str
) -> None:
    subject = "IXI002-Guys-0828"
    table = table_of(pair(subject))
    config = DatasetConfig.model_validate({option: rule})
    records = {subject: CUT | {"nmi_after": 0.2, "registration_error_mm": 0.1} | found}
    (row,) = manifest.to_records(manifest.finalise(selection.screen_headers(table, config), records, config))
    assert reason in row["flags"]
    assert row["status"] == ("used" if rule == "flag" else "excluded")
    assert row["reason"] == ("" if rule == "flag" else reason)
    assert detail in row["detail"] or rule == "flag"
