"""Run the benchmark and print its table: ``make bench`` all rows, ``make bench ONLY=survey,refresh`` some rows,
``make bench QUICK=1`` small inputs and one run, as a trial, ``make bench ARCHIVES=folder`` refreshes of these too.

Each time is a median over runs that alternate between ours and the peers', each in its own process.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import history, machine
from benchmarks.measure import Row, Settings
from benchmarks.rows import ROWS

COLUMNS = ("what", "peer", "ours", "peer's", "ratio", "target", "reached", "note")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"only these rows, separated by commas: {', '.join(ROWS)}")
    parser.add_argument("--quick", action="store_true", help="small inputs, one run")
    parser.add_argument("--runs", type=int, default=5, help="runs of each case")
    default = Path(tempfile.gettempdir()) / "ixi-etl-bench"
    parser.add_argument("--folder", type=Path, default=default, help="folder for inputs (kept) and scratch files")
    parser.add_argument("--archives", type=Path, help="folder of archives to measure refreshes on too")
    parser.add_argument("--out", type=Path, help="also write the table to this file, as Markdown")
    given = parser.parse_args()
    wanted = [name for name in given.only.split(",") if name] or list(ROWS)
    unknown = [name for name in wanted if name not in ROWS]
    if unknown:
        sys.exit(f"{unknown[0]} is not one of {', '.join(ROWS)}")
    given.folder.mkdir(parents=True, exist_ok=True)
    settings = Settings(given.quick, given.runs, str(given.folder), str(given.archives or ""))
    rows: list[Row] = []
    before = os.getloadavg()[0]
    failed: list[str] = []
    for name in wanted:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            rows += ROWS[name](settings)
        except Exception as error:  # the other rows take an hour
            failed.append(name)
            print(error, file=sys.stderr)
    if given.quick:
        rows = [replace(row, reached=None) for row in rows]  # targets do not apply to small inputs
    text = f"{machine.describe(before)}\n\n{markdown(rows)}\n"
    print(text)
    if given.out:
        given.out.write_text(text)
    if not given.quick:
        print(history.record(rows, f"{datetime.now(UTC):%Y-%m-%d}", round(before, 1)), file=sys.stderr)
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}; the reasons are above")


def markdown(rows: list[Row]) -> str:
    """The table as Markdown, with padded columns."""
    lines = [COLUMNS] + [
        (r.what, r.peer, r.ours, r.theirs, r.ratio, r.target, _reached(r.reached), r.note.replace("\n", " "))
        for r in rows
    ]
    widths = [max(len(line[n]) for line in lines) for n in range(len(COLUMNS))]
    padded = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([padded[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *padded[1:]])


def _reached(reached: bool | None) -> str:
    return "-" if reached is None else "yes" if reached else "**no**"


if __name__ == "__main__":
    main()
