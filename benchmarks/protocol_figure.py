"""The figure of the protocol study: a panel for each of its tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind people can tell apart. Markers differ too.
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#6E6E6E"
STYLES = {"whole": (BLUE, "o"), "head": (ORANGE, "s")}
TITLE = (
    "What the protocol alone is worth, on simulated heads: no figure here is one on IXI\n"
    "T1 to T2; points are means of two seeds, and bars end at the seeds"
)
METHODS = {
    "psnr": (BLUE, "o", "pix2pix"),
    "psnr, source as it is": (GREY, "x", "source as it is"),
    "psnr, mean training target": (PINK, "D", "mean training target"),
    "psnr, intensity mapping": (GREEN, "^", "intensity mapping"),
}
"""Column -> how it is drawn."""
FORMATS = {"svg": {"Date": None}, "png": {}}
"""Suffix -> metadata; without a date, equal tables give equal bytes."""


def draw(tables: Mapping[str, pd.DataFrame], folder: Path) -> None:
    """Write `protocols.svg` and `protocols.png`."""
    with mpl.rc_context({"svg.hashsalt": "protocols", "font.size": 9, "axes.titlesize": 10, "axes.axisbelow": True}):
        figure = Figure(figsize=(10, 8), layout="constrained")
        panels = figure.subplots(2, 2)
        figure.suptitle(TITLE, fontsize=10)
        draw_metrics(panels[0, 0], tables["metric"])
        draw_splits(panels[0, 1], tables["split"])
        draw_registration(panels[1, 0], tables["registration"])
        draw_regions(panels[1, 1], tables["region"])
        for suffix, metadata in FORMATS.items():
            figure.savefig(folder / f"protocols.{suffix}", dpi=150, metadata=metadata)


def draw_metrics(axes: Any, table: pd.DataFrame) -> None:
    """PSNR of the generators and of the baselines, a row for each protocol and mask."""
    shown = table[table["psnr"].notna()]
    for column, (colour, marker, name) in METHODS.items():
        axes.plot(shown[column], range(len(shown)), marker, color=colour, label=name, markersize=6)
    for place, value in enumerate(shown["psnr"]):
        axes.annotate(f"{value:.1f}", (value, place), xytext=(0, 7), textcoords="offset points", ha="center")
    axes.set_yticks(range(len(shown)), [f"{row.protocol}\n{row.mask}" for row in shown.itertuples()])
    axes.set_ylim(len(shown) - 0.5, -0.6)
    axes.set(title="1. The same generators under every metric", xlabel="PSNR (dB)")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.45, -0.13), ncols=4, fontsize=8, handletextpad=0.2, columnspacing=1
    )


def draw_splits(axes: Any, table: pd.DataFrame) -> None:
    """PSNR on the same slices, by training set."""
    for region, part in table.groupby("region", sort=False):
        colour, marker = STYLES[str(region)]
        places, half = range(len(part)), part["psnr_spread"] / 2
        above = 8 if region == "whole" else -16
        axes.errorbar(part["psnr"], places, xerr=half, fmt=marker, color=colour, capsize=3, label=region, markersize=7)
        for place, row in enumerate(part.itertuples()):
            text = f"{row.psnr:.1f}" + (f" ({row.psnr_change:+.1f})" if place else "")
            axes.annotate(text, (row.psnr, place), xytext=(0, above), textcoords="offset points", ha="center")
        axes.set_yticks(places, [name.replace(", ", ",\n") for name in part["split"]])
        axes.set_ylim(len(part) - 0.5, -0.6)
    axes.margins(x=0.2)
    axes.set(title="2. Training set, tested on the same slices", xlabel="PSNR (dB)")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)


def draw_registration(axes: Any, table: pd.DataFrame) -> None:
    """PSNR by the error; bars reach from one seed to the other."""
    for region, part in table.groupby("region", sort=False):
        colour, marker = STYLES[str(region)]
        half = part["psnr_spread"] / 2
        axes.errorbar(part["error_mm"], part["psnr"], half, color=colour, marker=marker, capsize=3, label=region)
    axes.set_xticks(sorted(set(table["error_mm"])))
    axes.set(title="3. Registration error put in on purpose", xlabel="displacement of each source (mm)")
    axes.set_ylabel("PSNR (dB)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def draw_regions(axes: Any, table: pd.DataFrame) -> None:
    """PSNR over each region."""
    labels = [f"{row.region}\n({row.share:.0%} of pixels)" for row in table.itertuples()]
    half = table["psnr_spread"] / 2
    axes.errorbar(table["psnr"], range(len(table)), xerr=half, fmt="o", color=BLUE, capsize=3, markersize=7)
    for place, row in enumerate(table.itertuples()):
        text = f"{row.psnr:.1f} dB" + (f" ({row.psnr_change:+.1f})" if place else "")
        axes.annotate(text, (row.psnr, place), xytext=(0, 8), textcoords="offset points", ha="center")
    axes.set_yticks(range(len(table)), labels)
    axes.set_ylim(len(table) - 0.5, -0.6)
    axes.margins(x=0.2)
    axes.set(title="4. The same generators over other regions", xlabel="PSNR (dB)")
    axes.grid(axis="x", alpha=0.3)
