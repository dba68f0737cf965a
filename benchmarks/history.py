"""Keep how many times faster than its peers each commit was: a JSON line a commit, a file a class of machines.

`make bench` adds a line for a commit without changes, and draws the history. `make bench-check` fails if a ratio has
fallen by a third. Only ratios of one run are compared: times depend on the machine's other work.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.end_to_end import MONAI, NAIVE, TORCHIO
from benchmarks.machine import machine_class
from benchmarks.measure import Row
from ixi_etl.core.files import write_atomic

REPOSITORY = Path(__file__).parents[1]
FOLDER = REPOSITORY / "benchmarks/history"
PICTURE = REPOSITORY / "docs/pictures/benchmark-history.svg"
MOST_FALL = 1 / 3
SHOWN = {
    "survey, 200 volumes, compared with extractall + nibabel.load": ("#0072B2", "o"),
    f"refresh, 24 pairs, as by default, compared with {NAIVE}": ("#000000", "D"),
    f"refresh, 24 pairs, index, compared with {NAIVE}": ("#D55E00", "s"),
    f"refresh, 24 pairs, anatomical, compared with {TORCHIO}": ("#009E73", "^"),
    f"refresh, 24 pairs, anatomical, compared with {MONAI}": ("#CC79A7", "v"),
    "reading, first epoch, compared with MONAI CacheDataset": ("#E69F00", "P"),
    "training step on CPU, batch 1, compared with plain PyTorch, fp32, batch norm": ("#56B4E9", "X"),
}
"""Ratios in the picture -> colour (of Okabe and Ito's palette) and marker."""


def ratios(rows: Iterable[Row]) -> dict[str, float]:
    """What was compared -> how many times faster ours was."""
    return {f"{r.what}, compared with {r.peer}": round(r.times, 3) for r in rows if r.times is not None}


def read(machine: str) -> list[dict[str, Any]]:
    """The lines of a class of machines, oldest first: `commit`, `date`, `load`, and `ratios`."""
    path = FOLDER / f"{machine}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def latest(lines: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The last recorded value of each ratio."""
    return {name: value for line in lines for name, value in line["ratios"].items()}


def fallen(before: Mapping[str, float], now: Mapping[str, float]) -> list[str]:
    """A sentence for each ratio that is at least a third smaller than before."""
    return [
        f"{name}: {now[name]:.2f} x, {value:.2f} x before"
        for name, value in before.items()
        if name in now and now[name] <= value * (1 - MOST_FALL)
    ]


def record(rows: Iterable[Row], date: str, load: float) -> str:
    """Add the ratios to the line of this commit, draw all, and return what was done, in a sentence."""
    commit = _git("log", "-1", "--format=%h") if (REPOSITORY / ".git").exists() else ""
    if not commit or _is_changed():
        return "not recorded in the history: this is no commit without changes"
    found, machine = ratios(rows), machine_class()
    lines = read(machine)
    if not lines or lines[-1]["commit"] != commit:
        lines.append({"commit": commit, "date": date, "load": load, "ratios": {}})
    lines[-1]["ratios"] |= found
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_atomic(FOLDER / f"{machine}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    draw(PICTURE)
    return f"recorded {len(found)} ratios of commit {commit} in the history of {machine}"


def draw(path: Path) -> None:
    """Write the picture (SVG): `SHOWN` over the commits, a panel a class of machines. Equal lines give equal bytes."""
    machines = {file.stem: read(file.stem) for file in sorted(FOLDER.glob("*.jsonl"))}
    with mpl.rc_context({"svg.hashsalt": "history", "font.size": 9}):
        figure = Figure(figsize=(10, 6), layout="constrained")
        widths = [max(len(lines), 2) for lines in machines.values()]
        panels = figure.subplots(1, len(machines), sharey=True, squeeze=False, width_ratios=widths)[0]
        for axes, (machine, lines) in zip(panels, machines.items(), strict=True):
            _draw_panel(axes, machine, lines)
        panels[0].set_ylabel("times as fast as the peer (logarithmic)")
        handles = {
            label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def _draw_panel(axes: Any, machine: str, lines: list[dict[str, Any]]) -> None:
    for name, (colour, marker) in SHOWN.items():
        points = [(n, line["ratios"][name]) for n, line in enumerate(lines) if name in line["ratios"]]
        if points:
            axes.plot(*zip(*points, strict=True), marker=marker, color=colour, label=name)
    axes.axhline(1, color="#6E6E6E", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
    axes.minorticks_off()
    axes.set_xlim(-0.5, max(len(lines), 2) - 0.5)
    axes.set_xticks(range(len(lines)), [f"{line['commit']}\n{line['date']}" for line in lines], fontsize=8)
    axes.set_title(machine, fontsize=9)
    axes.grid(axis="y", alpha=0.3)


def _is_changed() -> bool:
    """Whether tracked files differ from the commit, besides what an earlier run of the benchmark wrote."""
    own = [f":!{path.relative_to(REPOSITORY)}" for path in (FOLDER, PICTURE)]
    return bool(_git("status", "--porcelain", "--untracked-files=no", "--", ".", *own))


def _git(*arguments: str) -> str:
    """The output of a git command in the repository, or "" if it fails."""
    command = ["git", "-C", str(REPOSITORY), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
