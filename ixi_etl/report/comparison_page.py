"""Render `compared.html` of a version: its differences from the version before, and its checks over the last versions.

`report.html` of a version depends on the version alone. This page depends on the root, so it is a page of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ixi_etl.dataset.checks import Result, describe_limits, describe_value
from ixi_etl.report import page

DASH = "-"


def comparison_page(summary: Mapping[str, Any], compared: Mapping[str, Any]) -> str:
    """The page of a version. Equal arguments give equal text.

    Args:
        summary: the content of `dataset.json`.
        compared: that of `compared.json`.
    """
    return page.render_page(
        "compared.html",
        summary=summary,
        compared=compared,
        failures=check_rows(compared["failed"]),
        checks=check_rows(compared["checks"]),
        funnel=[
            {
                **{name: row[name] for name in ("step", "before", "now")},
                **{f"share {name}": f"{row[f'share_{name}']:.1%}" for name in ("before", "now")},
                "change": f"{row['change']:+.1%}",
            }
            for row in compared["funnel"]
        ],
        sites=[{"site": row["site"], **_counts(row)} for row in compared["sites"]],
        reasons=[{"reason": row["reason"], **_counts(row)} for row in compared["reasons"]],
        inputs=compared["inputs"],
        values=_value_rows(summary, compared),
        versions=len(compared["history"]),
        history=_history_rows(compared["history"]),
    )


def change_rows(summary: Mapping[str, Any], compared: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All differences from the version before as one table: what, before, now, change."""
    rows = [{"what": f"{row['step']}, subjects", **_counts(row)} for row in compared["funnel"]]
    rows += [{"what": f"site {row['site']}, used", **_counts(row)} for row in compared["sites"]]
    rows += [{"what": f"excluded, {row['reason']}", **_counts(row)} for row in compared["reasons"]]
    for row in _value_rows(summary, compared):
        rows.append({"what": f"check {row['check']}", **{name: row[name] for name in ("before", "now", "change")}})
    return rows


def _counts(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"before": row["before"], "now": row["now"], "change": f"{row['now'] - row['before']:+d}"}


def check_rows(results: Iterable[Result]) -> list[dict[str, Any]]:
    """One row per check for a page: name, value, limits, result in a word, and what it measures."""
    return [
        {
            "check": result["name"],
            "value": describe_value(result),
            "limit": describe_limits(result),
            "result": _word(result),
            "measures": result["what"],
        }
        for result in results
    ]


def _word(result: Mapping[str, Any]) -> str:
    if result["value"] is None:
        return "not applied"
    return "passed" if result["passed"] else "FAILED"


def _value_rows(summary: Mapping[str, Any], compared: Mapping[str, Any]) -> list[dict[str, Any]]:
    units = {result["name"]: result for result in summary["checks"]}
    return [
        {
            "check": row["check"],
            **{end: describe_value({**units[row["check"]], "value": row[end]}) for end in ("before", "now")},
            "change": DASH if row["change"] is None else f"{row['change']:+.4g}",
            "result": _word(units[row["check"]]),
        }
        for row in compared["values"]
    ]


def _history_rows(history: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per check, one column per version, the newest first. A value that failed says so."""
    newest_first = [*history][::-1]
    names = dict.fromkeys(name for version in newest_first for name in version["checks"])
    rows = []
    for name in names:
        row = {"check": name}
        for version in newest_first:
            found = version["checks"].get(name, {"value": None, "passed": True})
            value = DASH if found["value"] is None else f"{found['value']:.4g}"
            row[version["version"]] = value if found["passed"] else f"{value} FAILED"
        rows.append(row)
    return rows
