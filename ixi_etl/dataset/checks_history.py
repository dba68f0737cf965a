"""A version compared with the last one before it that has the same options, and its checks over the last versions.

The comparison depends on the root, whose history another root does not have. So it is no part of `dataset.json`: it is
in `compared.json` and `compared.html` beside it, which no hash covers but their own (docs/decisions/0016).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ixi_etl.core.files import to_json, write_atomic
from ixi_etl.core.storage import DataRoot
from ixi_etl.dataset import manifest
from ixi_etl.dataset.checks import Check, Measurement, Result, failed, run_checks
from ixi_etl.dataset.compare import differences
from ixi_etl.dataset.metadata import (
    COMPARED,
    COMPARED_PAGE,
    PAGE_DIGEST,
    read_manifest,
    read_metadata,
    read_pointer,
    with_digest,
)
from ixi_etl.dataset.versions import log, published_versions
from ixi_etl.errors import DatasetError

VERSIONS_SHOWN = 10
"""Versions in the history, this one included."""


@dataclass(frozen=True)
class Described:
    """What is compared of a version: the content of `dataset.json`, and excluded subjects by reason."""

    summary: Mapping[str, Any]
    reasons: Mapping[str, int]

    @property
    def used_by_site(self) -> dict[str, int]:
        return dict(self.summary["funnel"]["used"]["sites"])


@dataclass(frozen=True)
class HistoryFacts:
    """What the checks of a comparison look at; `before` is None for the first version of a root."""

    now: Described
    before: Described | None
    max_change: float
    funnel: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "funnel", compare_funnels(self.before, self.now))

    @property
    def have_same_options(self) -> bool:
        """Whether the options of the version before are the same: others change the funnel, and are no fault."""
        return self.before is not None and _have_same_options(self.before.summary, self.now.summary)


def describe(summary: Mapping[str, Any], final: pd.DataFrame) -> Described:
    counts = final.loc[final["reason"] != "", "reason"].value_counts()
    return Described(summary, {str(reason): int(counts[reason]) for reason in manifest.exclusions(final).index})


def compare_funnels(before: Described | None, now: Described) -> list[dict[str, Any]]:
    """One row per step of the funnel: step, subjects and their share before and now, and the change of the share.

    The share is that of the subjects found. Of the step `found` itself, it is that of the subjects found before.
    """
    if before is None:
        return []
    old, new = ({step: n["all"] for step, n in each.summary["funnel"].items()} for each in (before, now))
    rows = []
    for step in [step for step in new if step in old]:
        found_now, base = (new["found"], old["found"]) if step != "found" else (old["found"], old["found"])
        shares = old[step] / max(base, 1), new[step] / max(found_now, 1)
        change = round(shares[1] - shares[0], 6)
        row = {"step": step, "before": old[step], "now": new[step]}
        rows.append(row | {"share_before": round(shares[0], 6), "share_now": round(shares[1], 6), "change": change})
    return rows


def _funnel_change(facts: HistoryFacts) -> Measurement:
    if not facts.have_same_options:
        return Measurement(None)
    changes = {row["step"]: row["change"] for row in facts.funnel}
    return Measurement(max(map(abs, changes.values()), default=None), at_most=facts.max_change, details=changes)


def _sites_gone(facts: HistoryFacts) -> Measurement:
    if facts.before is None or not facts.have_same_options:
        return Measurement(None)
    now, before = facts.now.used_by_site, facts.before.used_by_site
    gone = {site: n for site, n in before.items() if n and not now.get(site)}
    return Measurement(len(gone), at_most=0, details=gone)


CHECKS = (
    Check(
        "funnel_change",
        "Largest change of the share of subjects left at any step of the funnel, since the last version with the "
        "same options.",
        "share",
        "at most `--max-change`, by default 0.1",
        "the same archives and options give the same funnel; a tenth is more than any site's odd scans",
        _funnel_change,
    ),
    Check(
        "sites_gone",
        "Number of sites with used subjects in the last version with the same options, and none now.",
        "sites",
        "at most 0",
        "a small site may be less than `--max-change`",
        _sites_gone,
    ),
)
"""The checks against the last version with the same options; without one, they have no values."""


def find_before(data_root: DataRoot, summary: Mapping[str, Any]) -> tuple[Path, Described] | None:
    """The folder and content of the version that another one is compared with; None for the first version of a root.

    It is the last one with the same options, or the last one if no other has them. A damaged version, or one of a
    release with other columns, is not compared with.

    Args:
        summary: the content of `dataset.json` of the other one, which is to be published.

    Raises:
        OSError: a version cannot be read now, such as after an error of S3. If it were passed over, its successor might
            not be held. Nothing is lost: the next refresh continues with the finished work.
    """
    latest = (read_pointer(data_root) or {}).get("version")
    names = [name for name in published_versions(data_root) if name != summary["version"]]
    names.sort(key=lambda name: name == latest)
    last = None
    for name in reversed(names):
        folder = data_root.version(name)
        try:
            described = read_metadata(folder)
            is_same = _have_same_options(described, summary)
            if last and not is_same:
                continue
            before = describe(described, read_manifest(folder, validate=False))
            compare_funnels(before, before)
        except DatasetError as error:
            log.warning("%s; it is not compared with", error)
            continue
        except (KeyError, TypeError) as error:
            log.warning("%s has no %s; it is not compared with", folder, error)
            continue
        if is_same:
            return folder, before
        last = folder, before
    return last


def _have_same_options(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return bool(one["inputs"]["config"] == other["inputs"]["config"])


def compare(
    data_root: DataRoot, summary: Mapping[str, Any], final: pd.DataFrame, mode: str, max_change: float
) -> dict[str, Any]:
    """The content of `compared.json` of a version that is about to be published.

    Args:
        summary: the content of `dataset.json`, with its `checks`.
        final: the final manifest.
        mode: `block` or `warn`, of `--checks`.
        max_change: the limit of `funnel_change`.
    """
    found, now = find_before(data_root, summary), describe(summary, final)
    folder, before = found or (None, None)
    facts = HistoryFacts(now, before, max_change)
    checks = run_checks(CHECKS, facts)
    failures = failed([*summary["checks"], *checks])
    old = before.summary if before else {}
    return {
        "name": summary["name"],
        "version": summary["version"],
        "before": folder.name if folder else None,
        "same_options": facts.have_same_options,
        "mode": mode,
        "failed": failures,
        "held_by": [result["name"] for result in failures] if mode == "block" else [],
        "checks": checks,
        "inputs": _changed_inputs(old, summary) if before else [],
        "funnel": facts.funnel,
        "sites": _changes(before.used_by_site, now.used_by_site, "site") if before else [],
        "reasons": _changes(before.reasons, now.reasons, "reason") if before else [],
        "values": changed_values(old.get("checks", []), summary["checks"]) if before else [],
        "history": _history(data_root, summary),
    }


def _changes(before: Mapping[str, int], now: Mapping[str, int], label: str) -> list[dict[str, Any]]:
    names = list(dict.fromkeys([*before, *now]))
    rows = ((name, before.get(name, 0), now.get(name, 0)) for name in names)
    return [{label: name, "before": old, "now": new, "change": new - old} for name, old, new in rows]


def _changed_inputs(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[dict[str, Any]]:
    table = differences(*({"inputs": json.loads(to_json(each["inputs"]))} for each in (old, new)))
    return manifest.to_records(table.rename(columns={"old": "before", "new": "now"}))


def changed_values(old: list[Result], new: list[Result]) -> list[dict[str, Any]]:
    """One row per check of the version: value before and now, their difference, and whether each passed."""
    known = {result["name"]: result for result in old}
    rows = []
    for result in new:
        was = known.get(result["name"], {"value": None, "passed": None})
        both = was["value"] is not None and result["value"] is not None
        rows.append(
            {
                "check": result["name"],
                "before": was["value"],
                "now": result["value"],
                "change": round(result["value"] - was["value"], 6) if both else None,
                "passed_before": was["passed"],
                "passed_now": result["passed"],
            }
        )
    return rows


def _history(data_root: DataRoot, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The last versions in the order of their publication, this one last: version, and the results of its checks."""
    names = [name for name in published_versions(data_root) if name != summary["version"]]
    rows = []
    for name in names[-(VERSIONS_SHOWN - 1) :]:
        try:
            rows.append(_history_row(read_metadata(data_root.version(name))))
        except DatasetError:  # `find_before` warned
            continue
    return [*rows, _history_row(summary)]


def _history_row(summary: Mapping[str, Any]) -> dict[str, Any]:
    results = {r["name"]: {"value": r["value"], "passed": r["passed"]} for r in summary.get("checks", [])}
    return {"version": summary["version"], "checks": results}


def write_comparison(folder: Path, content: Mapping[str, Any], page: str) -> None:
    """Write `compared.html`, and `compared.json` with the SHA-256 of both."""
    write_atomic(folder / COMPARED_PAGE, page)
    digest = {PAGE_DIGEST: hashlib.sha256(page.encode()).hexdigest()}
    write_atomic(folder / COMPARED, to_json(with_digest({**content, **digest})))
