"""`report.html` of a version: the funnel, the histograms, every exclusion, and pairs to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from ixi_etl import charts, manifest, pages
from ixi_etl.config import SPLITS
from ixi_etl.credit import WHOSE
from ixi_etl.pictures import Layers
from ixi_etl.schema import EXCLUDED, REASONS
from ixi_etl.survey import flat, flat_row, site_records, sites_of

SHOWN = 24  # pairs spread over the sites
WORST_SHOWN = 10  # pairs that are least alike

MEASURES = {
    "NMI by headers": "nmi_before",
    "NMI as stored": "nmi_after",
    "motion taken up, mm": "motion_mm",
    "motion taken up, degrees": "motion_deg",
}
QUARTILES = {"least": 0.0, "25%": 0.25, "median": 0.5, "75%": 0.75, "most": 1.0}


def worst(settled: pd.DataFrame) -> pd.DataFrame:
    """The used rows of the pairs with the least NMI, the least alike first."""
    return manifest.used(settled).sort_values(["nmi_after", "subject_id"]).head(WORST_SHOWN)


def spread_over_sites(settled: pd.DataFrame) -> pd.DataFrame:
    """Up to `SHOWN` used rows, as many of each site as can be, evenly spread over each site's subjects."""
    used = manifest.used(settled)
    sites = [rows for _, rows in used.groupby("site")]
    share = [0] * len(sites)
    for _ in range(min(SHOWN, len(used))):
        share[min((n, i) for i, n in enumerate(share) if n < len(sites[i]))[1]] += 1
    chosen = [
        rows.iloc[np.linspace(0, len(rows) - 1, n).round().astype(int)] for rows, n in zip(sites, share, strict=True)
    ]
    return pd.concat(chosen)


def drawn(settled: pd.DataFrame) -> list[str]:
    """The subjects whose pairs the page shows."""
    return sorted({*worst(settled)["subject_id"], *spread_over_sites(settled)["subject_id"]})


def dataset_report(summary: Mapping[str, Any], settled: pd.DataFrame, layers: Mapping[str, Layers]) -> str:
    """The page, from the facts of `dataset.json`, the settled manifest, and the pictures of the `drawn` subjects.

    Without `layers` it shows no pairs. Equal arguments give equal text.
    """
    used, out = manifest.used(settled), settled[settled["status"] == EXCLUDED]
    funnel, reasons = manifest.funnel(settled), manifest.exclusions(settled)
    sites = sites_of(funnel)
    flags = used["flags"].str.split(",").explode()
    return pages.render(
        "dataset.html",
        summary=summary,
        whose=WHOSE,
        sites=sites,
        charts={
            "funnel": charts.bars(_counts(funnel, sites), "Subjects left after each step"),
            "depths": {m: _depths(summary, m, sites) for m in summary["modal_depth"]},
            "reasons": charts.bars(_counts(reasons, sites), "Subjects that are out, by reason"),
            "age": charts.strips(_by_split(used, "age"), "Age in years"),
            "intensities": {
                m: charts.strips(_by_site(_in_units(used, m), "high"), f"{m}, percentile 99.9 of each slab")
                for m in summary["modal_depth"]
            },
        },
        funnel=manifest.records(flat(funnel)),
        depths={m: _depth_rows(summary, m, sites) for m in summary["modal_depth"]},
        rule=_modal_rule(funnel, sites) if summary["inputs"]["config"]["depth"] == "modal" else [],
        measures=[
            {"": name} | _quartiles(used[column], 3) for name, column in MEASURES.items() if used[column].notna().any()
        ],
        flags=flags[flags != ""].value_counts().sort_index().to_dict(),
        pairs=_cards(spread_over_sites(settled), layers),
        worst=_cards(worst(settled), layers),
        reasons=manifest.records(flat(reasons)),
        meanings={name: REASONS[name] for name in reasons.index},
        excluded=manifest.records(
            out[["subject_id", "site", "reason", "detail"]].rename(columns={"subject_id": "subject"})
        ),
        splits=_splits(used, sites),
        people=_people(used),
        intensities=[
            {"": f"{m}, percentile {percentile}"} | _quartiles(_in_units(used, m)[which], None)
            for m in summary["modal_depth"]
            for which, percentile in (("low", "0.1"), ("high", "99.9"))
        ],
    )


def _counts(table: pd.DataFrame, sites: Sequence[str]) -> dict[str, dict[str, int]]:
    """Row -> site -> count, of a table of `by_site`."""
    label = str(table.index.name)
    return {str(row[label]): {s: row["sites"].get(s, 0) for s in sites} for row in site_records(table)}


def _depth_rows(summary: Mapping[str, Any], modality: str, sites: Sequence[str]) -> list[dict[str, Any]]:
    rows = [row for row in summary["histogram"] if row["modality"] == modality]
    return [
        flat_row({"slices": row["depth"]}, {s: row["sites"].get(s, 0) for s in sites}, {"all": row["all"]})
        for row in rows
    ]


def _depths(summary: Mapping[str, Any], modality: str, sites: Sequence[str]) -> Markup:
    modal = summary["modal_depth"][modality]
    rows = {
        f"{row['depth']}{' (modal)' if row['depth'] == modal else ''}": {s: row["sites"].get(s, 0) for s in sites}
        for row in summary["histogram"]
        if row["modality"] == modality
    }
    return charts.bars(rows, f"{modality} volumes by number of slices", marked=f"{modal} (modal)")


def _modal_rule(funnel: pd.DataFrame, sites: Sequence[str]) -> list[dict[str, Any]]:
    """What keeping the modal depth alone costs, by site."""
    before, after = (list(funnel.loc[step]) for step in ("readable", "modal depth"))
    names = flat_row({}, dict.fromkeys(sites), {"all": None})
    return [
        {
            "site": name,
            "readable pairs": readable,
            "of another depth": readable - left,
            "share": f"{(readable - left) / readable:.0%}" if readable else "-",
        }
        for name, readable, left in zip(names, before, after, strict=True)
    ]


def _in_units(used: pd.DataFrame, modality: str) -> pd.DataFrame:
    """Site, and percentiles `low` and `high` of each slab, in the scanner's units."""
    name = modality.lower()
    scale, offset = used[f"{name}_scale"], used[f"{name}_offset"]
    return used[["site"]].assign(**{end: used[f"{name}_p_{end}"] * scale + offset for end in ("low", "high")})


def _quartiles(values: pd.Series, digits: int | None) -> dict[str, str]:
    """With so many digits behind the point; None: whole numbers, and of those under 100 the first three digits."""

    def text(value: float) -> str:
        if digits is None:
            return f"{value:.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.3g}"
        return f"{value:.{digits}f}"

    return {name: text(float(values.quantile(q))) for name, q in QUARTILES.items()}


def _by_site(used: pd.DataFrame, column: str) -> dict[str, list[float]]:
    return {str(site): rows[column].dropna().tolist() for site, rows in used.groupby("site")}


def _by_split(used: pd.DataFrame, column: str) -> dict[str, list[float]]:
    return {split: used.loc[used["split"] == split, column].dropna().tolist() for split in SPLITS}


def _splits(used: pd.DataFrame, sites: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for split in SPLITS:
        part = used[used["split"] == split]
        labels = {"split": split, "subjects": len(part), "share": f"{len(part) / len(used):.0%}"}
        rows.append(flat_row(labels, {site: int((part["site"] == site).sum()) for site in sites}, {}))
    return rows


def _people(used: pd.DataFrame) -> list[dict[str, Any]]:
    """Age and sex by split; nothing where no demographics were joined."""
    if used["age"].isna().all() and (used["sex"] == "").all():
        return []
    rows = []
    for split in SPLITS:
        part = used[used["split"] == split]
        sexes = {name: int((part["sex"] == sex).sum()) for name, sex in (("women", "f"), ("men", "m"), ("unknown", ""))}
        age = f"{part['age'].mean():.1f} ({part['age'].min():.0f} to {part['age'].max():.0f})"
        known = part["age"].notna().any()
        rows.append({"split": split, **sexes, "mean age (range)": age if known else "-"})
    return rows


def _cards(rows: pd.DataFrame, layers: Mapping[str, Layers]) -> list[dict[str, Any]]:
    """What the page says and shows of each pair that was drawn."""
    return [
        {
            "subject": row["subject_id"],
            "note": f"{row['split']}, NMI {row['nmi_after']:.3f}",
            "t1": pages.jpeg_uri(layers[row["subject_id"]].t1),
            "t2": pages.jpeg_uri(layers[row["subject_id"]].t2),
            "edges": pages.png_uri(layers[row["subject_id"]].edges),
        }
        for row in manifest.records(rows)
        if row["subject_id"] in layers
    ]
