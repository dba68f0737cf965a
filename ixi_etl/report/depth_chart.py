"""Draw the histogram of depths as bar charts, for the page of a version and as an SVG file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ixi_etl.report import charts


def depth_bars(histogram: Sequence[Mapping[str, Any]], modality: str, modal_depth: int, sites: Sequence[str]) -> Markup:
    """A bar for each depth of one modality, stacked by site, the modal depth marked.

    `histogram` has the records of `depth_histogram`: modality, depth, and the count of each site.
    """
    rows = {
        f"{row['depth']}{' (modal)' if row['depth'] == modal_depth else ''}": {s: row["sites"].get(s, 0) for s in sites}
        for row in histogram
        if row["modality"] == modality
    }
    return charts.bars(rows, f"{modality} volumes by number of slices", marked=f"{modal_depth} (modal)")


def depths_svg(histogram: Sequence[Mapping[str, Any]], modal_depths: Mapping[str, int]) -> str:
    """The text of an SVG file with a chart for each modality; arguments as in `depth_bars`."""
    sites = list(dict.fromkeys(site for row in histogram for site in row["sites"]))
    panels = {
        f"{modality} volumes by number of slices": depth_bars(histogram, modality, depth, sites)
        for modality, depth in modal_depths.items()
    }
    return charts.svg_file(panels, sites)
