"""The table of faults and their outcomes that `make faults` prints."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import pytest

Row = Callable[[str, int, str, str], None]


@pytest.fixture
def row(record_property: Callable[[str, object], None]) -> Row:
    """Record a row of the table: fault, tries, outcome, data lost. A test records only what it asserted."""

    def record(fault: str, count: int, outcome: str, lost: str = "none") -> None:
        record_property("fault", [fault, count, outcome, lost])

    return record


@pytest.hookimpl(tryfirst=True, wrapper=True)
def pytest_terminal_summary(terminalreporter: Any) -> Generator[None]:
    """Print the table before pytest's summary, so that failures stay at the end."""
    _print_table(terminalreporter)
    return (yield)


def _print_table(terminalreporter: Any) -> None:
    """Print the recorded rows, and a row for each test that failed or was skipped."""
    rows: list[list[Any]] = []
    for kind in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(kind, ()):
            if kind == "passed":
                rows += [value for name, value in report.user_properties if name == "fault"]
            elif "faults" in getattr(report, "keywords", ()):  # reports of skipped or broken modules have no keywords
                rows.append([report.nodeid.rpartition("::")[2], 0, kind.upper(), "?" if kind == "failed" else "none"])
    if not rows:
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("fault", "tries", "outcome", "data lost", title="Faults", box=box.SIMPLE_HEAD, title_justify="left")
    table.columns[1].justify = "right"
    for fault, count, outcome, lost in sorted(rows, key=lambda r: str(r[0])):
        table.add_row(fault, f"{count:,}", outcome, lost)
    Console(width=150).print(table)
