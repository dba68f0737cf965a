"""`report.html` of a version: one file that opens from disk, with the funnel, the histograms and every exclusion."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import pandas as pd

from ixi_etl import manifest
from ixi_etl.schema import EXCLUDED, REASONS

MEASURES = {
    "NMI by headers": "nmi_before",
    "NMI as stored": "nmi_after",
    "motion taken up, mm": "motion_mm",
    "motion taken up, degrees": "motion_deg",
}


def dataset_report(summary: Mapping[str, Any], settled: pd.DataFrame, worst: bytes | None = None) -> str:
    """The page, from the facts of `dataset.json`, the settled manifest, and the JPEG of the pairs least alike if drawn.

    Equal arguments give equal text.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    pages = Environment(
        loader=PackageLoader("ixi_etl"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    out = settled[settled["status"] == EXCLUDED]
    used = manifest.used(settled)
    flags = used["flags"].str.split(",").explode()
    return pages.get_template("dataset.html").render(
        summary=summary,
        sites=sorted(settled["site"].unique()),
        flags=flags[flags != ""].value_counts().sort_index().to_dict(),
        measures={
            name: [f"{used[column].quantile(q):.3f}" for q in (0, 0.5, 1)]
            for name, column in MEASURES.items()
            if used[column].notna().any()
        },
        worst=base64.b64encode(worst).decode() if worst else "",
        funnel=manifest.records(manifest.funnel(settled).reset_index(names="name")),
        exclusions=manifest.records(manifest.exclusions(settled).reset_index(names="name")),
        reasons=REASONS,
        excluded=manifest.records(out[["subject_id", "site", "reason", "detail"]]),
    )
