"""`report.html` of a version: one file that opens from disk, with the funnel, the histograms and every exclusion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from ixi_etl import manifest


def dataset_report(summary: Mapping[str, Any], settled: pd.DataFrame) -> str:
    """The page, from the facts of `dataset.json` and the settled manifest. Equal arguments give equal text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    pages = Environment(
        loader=PackageLoader("ixi_etl"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    out = settled[settled["status"] == manifest.EXCLUDED]
    sites = sorted(settled["site"].unique())
    return pages.get_template("dataset.html").render(
        summary=summary,
        sites=sites,
        funnel=manifest.records(manifest.funnel(settled).reset_index(names="name")),
        exclusions=manifest.records(manifest.exclusions(settled).reset_index(names="name")),
        reasons=manifest.REASONS,
        excluded=manifest.records(out[["subject_id", "site", "reason", "detail"]]),
    )
