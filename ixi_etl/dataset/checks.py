"""Named checks of a version: whether its data are as healthy data are, each with a value, limits and their reason.

`verify` finds a version whose bytes are damaged. These checks find bytes that are intact and data that are not: a site
that lost all its scans, pairs that are not aligned, a split that is far off. `dataset.json` holds the results under
`checks`. They depend on the version alone, so that equal versions have equal results; `checks_history` compares a
version with the one before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ixi_etl.core.storage import read_bytes
from ixi_etl.dataset.metadata import COMPARED, parse_with_digest, read_metadata

DECIMALS = 6
"""Values and limits are rounded to these before they are compared, so that a page shows what was compared."""

Result = dict[str, Any]
"""`name`, `what`, `unit`, `value`, `at_least`, `at_most`, `passed` and `details` of a check. If it does not apply, the
value is None, and it passes."""


@dataclass(frozen=True)
class Measurement:
    """What a check found.

    Attributes:
        value: the number that is judged; None if the check does not apply.
        at_least, at_most: its limits, which may depend on the number of subjects; None for no limit.
        details: further numbers, which are not judged, such as counts by site or quantiles.
    """

    value: float | None
    at_least: float | None = None
    at_most: float | None = None
    details: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """A named check.

    Attributes:
        what: what it measures, in one sentence.
        unit: of the value.
        limit: its limits in words.
        why: the source or reason of the limits.
        measure: the function that measures it.
    """

    name: str
    what: str
    unit: str
    limit: str
    why: str
    measure: Callable[[Any], Measurement]


def run_checks(checks: Sequence[Check], facts: Any) -> list[Result]:
    """Measure and judge all `checks`, each of which gets `facts`; equal facts give equal results."""
    measured = {check.name: _rounded(check.measure(facts)) for check in checks}
    failed = find_failures(measured)
    return [
        {
            "name": check.name,
            "what": check.what,
            "unit": check.unit,
            "value": found.value,
            "at_least": found.at_least,
            "at_most": found.at_most,
            "passed": check.name not in failed,
            "details": dict(found.details),
        }
        for check, found in ((check, measured[check.name]) for check in checks)
    ]


def find_failures(measured: Mapping[str, Measurement]) -> set[str]:
    """Names of the checks whose value is beyond a limit, from one lazy validation by a pandera schema of all limits.

    The schema is made here, because importing pandera takes a second.
    """
    import pandera.errors
    import pandera.pandas as pa

    columns = {}
    for name, found in measured.items():
        limits = [pa.Check.ge(found.at_least)] if found.at_least is not None else []
        limits += [pa.Check.le(found.at_most)] if found.at_most is not None else []
        columns[name] = pa.Column(float, limits, nullable=True)  # null: the check does not apply
    table = pd.DataFrame({name: [found.value] for name, found in measured.items()}, dtype=float)
    try:
        pa.DataFrameSchema(columns).validate(table, lazy=True)
    except pandera.errors.SchemaErrors as error:
        return {str(name) for name in error.failure_cases["column"]}
    return set()


def _rounded(found: Measurement) -> Measurement:
    def to_decimals(value: float | None) -> float | None:
        if value is None or pd.isna(value):
            return None
        return value if isinstance(value, int) else round(float(value), DECIMALS)

    details = {name: to_decimals(value) for name, value in found.details.items()}
    value, at_least, at_most = map(to_decimals, (found.value, found.at_least, found.at_most))
    known = {name: number for name, number in details.items() if number is not None}
    return Measurement(value, at_least, at_most, known)


def failed(results: Iterable[Result]) -> list[Result]:
    return [result for result in results if not result["passed"]]


def describe_value(result: Result) -> str:
    """The value with its unit, for people; a dash if the check does not apply."""
    if result["value"] is None:
        return "-"
    return f"{result['value']:.4g}" + ("" if result["unit"] in ("share", "NMI") else f" {result['unit']}")


def describe_limits(result: Result) -> str:
    """The limits in words: `at least 0.2`."""
    limits = [
        f"{end.replace('_', ' ')} {result[end]:.4g}" for end in ("at_least", "at_most") if result[end] is not None
    ]
    return ", ".join(limits) or "none"


def describe_failure(result: Result) -> str:
    """A failed check in one line: `nmi: 0.03, limit at least 0.06`."""
    return f"{result['name']}: {describe_value(result)}, limit {describe_limits(result)}"


def all_results(folder: Path, described: Mapping[str, Any]) -> list[Result]:
    """The results of a published version, given its folder and `dataset.json`: its own, and those of its comparison."""
    return [*described.get("checks", ()), *_read_compared(folder).get("checks", ())]


def failed_checks(folder: Path) -> list[Result]:
    """The failed checks of a published version, its own and those of its comparison; [] for one without checks.

    If `compared.json` is missing or damaged, they are the version's own, which `dataset.json` has.

    Raises:
        DatasetError: `dataset.json` is needed, and missing or damaged.
    """
    compared = _read_compared(folder)
    return list(compared["failed"]) if compared else failed(read_metadata(folder).get("checks", ()))


def held_by(folder: Path) -> list[str]:
    """Names of the failed checks that hold the hand-off of a version to training; [] if it is free.

    A version is held if it was published under `--checks block` with a failed check; `compared.json` says so. If that
    file is missing or damaged, nobody knows whether it was `--checks warn`, so any failed check of the version's own
    holds it. Versions of an ixi-etl before these checks, and of other datasets than IXI, have no checks, and are free.

    Raises:
        DatasetError: as of `failed_checks`.
    """
    compared = _read_compared(folder)
    return list(compared["held_by"]) if compared else [result["name"] for result in failed_checks(folder)]


def _read_compared(folder: Path) -> dict[str, Any]:
    """The content of `compared.json`; {} if it is missing or damaged."""
    path = folder / COMPARED
    try:
        data = read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return parse_with_digest(data) or {}
