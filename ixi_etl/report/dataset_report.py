"""Render `report.html` of a version: checks, funnel, histograms, exclusions, and pictures of pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ixi_etl.dataset import manifest
from ixi_etl.dataset.checks import failed
from ixi_etl.dataset.credit import SOURCE_LABELS
from ixi_etl.dataset.datasheet import people_by_split, splits_in
from ixi_etl.dataset.schema import EXCLUDED, SCHEMAS, is_absent, pair_column
from ixi_etl.modalities import DATASETS, moving
from ixi_etl.pairing.pictures import PairLayers
from ixi_etl.preparations import PREPARATIONS
from ixi_etl.report import charts, page
from ixi_etl.report.comparison_page import check_rows
from ixi_etl.report.depth_chart import depth_bars
from ixi_etl.scans.intensity import describe_normalisation
from ixi_etl.scans.site_tables import flatten, flatten_row, site_table_to_records, sites_of

PAIRS_SHOWN = 24  # pairs spread over the sites
WORST_SHOWN = 10  # least certain pairs

MEASURES = {
    "NMI by headers": "nmi_before",
    "NMI as stored": "nmi_after",
    "corrected motion, mm": "motion_mm",
    "corrected motion, degrees": "motion_deg",
    "estimated registration error, mm": "registration_error_mm",
}
QUARTILES = {"min": 0.0, "25%": 0.25, "median": 0.5, "75%": 0.75, "max": 1.0}


def list_pairs(final: pd.DataFrame, name: str) -> pd.DataFrame:
    """The pairs of the used subjects: one row per subject and moving modality that it has, in store order.

    Columns: subject_id, site, split, modality, label (the modality if there are several), and those of `MEASURES`.

    Args:
        final: the final manifest.
        name: of the dataset.
    """
    modalities, reference = DATASETS[name]
    used, others = manifest.used_rows(final), moving(modalities, reference)
    tables = []
    for m in others:
        columns = {pair_column(others, m, column): column for column in MEASURES.values()}
        rows = used.loc[~is_absent(used, m.lower()), ["subject_id", "site", "split", "store_row", *columns]]
        tables.append(rows.rename(columns=columns).assign(modality=m, label=f"{m}: " if len(others) > 1 else ""))
    listed: pd.DataFrame = pd.concat(tables).sort_values("store_row", kind="stable")
    return listed


def worst_pairs(pairs: pd.DataFrame) -> pd.DataFrame:
    """The pairs of `list_pairs` whose alignment is least certain, worst first.

    First those whose registration failed, then by the largest estimated error, then by the lowest NMI; last those that
    were not registered, such as two echoes.
    """
    failed = pairs["registration_error_mm"].isna() & pairs["motion_mm"].notna()
    order = {"failed": False, "registration_error_mm": False, "nmi_after": True, "subject_id": True}
    return pairs.assign(failed=failed).sort_values([*order], ascending=[*order.values()]).head(WORST_SHOWN)


def describe_alignment(row: Mapping[str, Any]) -> str:
    """The estimated error and the NMI of a pair, for a caption."""
    error_mm = row["registration_error_mm"]
    error = "" if pd.isna(error_mm) else f"error about {error_mm:.1f} mm, "
    return f"{row['label']}{error}NMI {row['nmi_after']:.3f}"


def sample_across_sites(pairs: pd.DataFrame) -> pd.DataFrame:
    """Up to `PAIRS_SHOWN` pairs, balanced over the sites and evenly spread over the pairs of each site."""
    sites = [rows for _, rows in pairs.groupby("site")]
    share = [0] * len(sites)
    for _ in range(min(PAIRS_SHOWN, len(pairs))):
        share[min((n, i) for i, n in enumerate(share) if n < len(sites[i]))[1]] += 1
    chosen = [
        rows.iloc[np.linspace(0, len(rows) - 1, n).round().astype(int)] for rows, n in zip(sites, share, strict=True)
    ]
    return pd.concat(chosen)


def drawn_pairs(pairs: pd.DataFrame) -> list[tuple[str, str]]:
    """(subject, modality) of the pairs that the page shows."""
    shown = pd.concat([worst_pairs(pairs), sample_across_sites(pairs)])
    return sorted({*zip(shown["subject_id"], shown["modality"], strict=True)})


def dataset_report(
    summary: Mapping[str, Any], final: pd.DataFrame, layers: Mapping[tuple[str, str], PairLayers]
) -> str:
    """The page of a version. Equal arguments give equal text.

    Args:
        summary: the content of `dataset.json`.
        final: the final manifest.
        layers: picture layers of the `drawn_pairs`; if empty, the page shows no pairs.
    """
    schema, (modalities, reference) = SCHEMAS[summary["name"]], DATASETS[summary["name"]]
    used, excluded = manifest.used_rows(final), final[final["status"] == EXCLUDED]
    funnel, reasons = manifest.funnel(final, schema), manifest.exclusions(final)
    pairs = list_pairs(final, summary["name"])
    sites = sites_of(funnel)
    flags = used["flags"].str.split(",").explode()
    return page.render_page(
        "dataset.html",
        summary=summary,
        source_labels=SOURCE_LABELS,
        checks=check_rows(summary.get("checks", [])),
        failed_checks=len(failed(summary.get("checks", []))),
        sites=sites,
        charts={
            "funnel": charts.bars(_counts(funnel, sites), "Subjects remaining after each step"),
            "depths": {m: depth_bars(summary["histogram"], m, summary["modal_depth"][m], sites) for m in modalities},
            "reasons": charts.bars(_counts(reasons, sites), "Excluded subjects by reason"),
            "age": charts.strips(_by_split(used, "age"), "Age in years"),
            "intensities": {
                m: charts.strips(_by_site(_in_units(used, m), "high"), f"{m}, percentile 99.9 of each slab")
                for m in modalities
            },
        },
        funnel=manifest.to_records(flatten(funnel)),
        depths={m: _depth_rows(summary, m, sites) for m in modalities},
        rule=_modal_rule(funnel, sites) if summary["inputs"]["config"]["depth"] == "modal" else [],
        moving=moving(modalities, reference),
        reference=reference,
        measures=[
            {"": f"{label}{name}"} | _quartiles(rows[column], 3)
            for label, rows in pairs.groupby("label", sort=False)
            for name, column in MEASURES.items()
            if rows[column].notna().any()
        ],
        flags=flags[flags != ""].value_counts().sort_index().to_dict(),
        pair_count=len(pairs),
        pairs=_cards(sample_across_sites(pairs), layers, reference),
        worst=_cards(worst_pairs(pairs), layers, reference),
        reasons=manifest.to_records(flatten(reasons)),
        meanings={name: schema.reasons[name] for name in reasons.index},
        excluded=manifest.to_records(
            excluded[["subject_id", "site", "reason", "detail"]].rename(columns={"subject_id": "subject"})
        ),
        splits=_splits(used, sites),
        slice_splits=_slice_splits(summary),
        normalisation=describe_normalisation(summary["inputs"]["config"].get("normalisation", "percentiles")),
        source=_source(summary),
        people=manifest.to_records(people_by_split(used)),
        intensities=[
            {"": f"{m}, percentile {percentile}"} | _quartiles(_in_units(used, m)[which], None)
            for m in modalities
            for which, percentile in (("low", "0.1"), ("high", "99.9"))
        ],
    )


def _counts(table: pd.DataFrame, sites: Sequence[str]) -> dict[str, dict[str, int]]:
    """Row -> site -> count, from a `site_table`."""
    label = str(table.index.name)
    return {str(row[label]): {s: row["sites"].get(s, 0) for s in sites} for row in site_table_to_records(table)}


def _depth_rows(summary: Mapping[str, Any], modality: str, sites: Sequence[str]) -> list[dict[str, Any]]:
    rows = [row for row in summary["histogram"] if row["modality"] == modality]
    return [
        flatten_row({"slices": row["depth"]}, {s: row["sites"].get(s, 0) for s in sites}, {"all": row["all"]})
        for row in rows
    ]


def _modal_rule(funnel: pd.DataFrame, sites: Sequence[str]) -> list[dict[str, Any]]:
    """Readable pairs lost by keeping only the modal depth, by site."""
    readable, kept = (list(funnel.loc[step]) for step in ("readable", "modal depth"))
    names = flatten_row({}, dict.fromkeys(sites), {"all": None})
    return [
        {
            "site": name,
            "readable pairs": before,
            "with another depth": before - after,
            "share": f"{(before - after) / before:.0%}" if before else "-",
        }
        for name, before, after in zip(names, readable, kept, strict=True)
    ]


def _in_units(used: pd.DataFrame, modality: str) -> pd.DataFrame:
    """Site, and percentiles `low` and `high` of each slab in scanner units."""
    name = modality.lower()
    scale, offset = used[f"{name}_scale"], used[f"{name}_offset"]
    return used[["site"]].assign(**{end: used[f"{name}_p_{end}"] * scale + offset for end in ("low", "high")})


def _quartiles(values: pd.Series, digits: int | None) -> dict[str, str]:
    """Quartiles as text with `digits` decimals; None means integers, with three significant digits below 100."""

    def text(value: float) -> str:
        if digits is None:
            return f"{value:.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.3g}"
        return f"{value:.{digits}f}"

    return {name: text(float(values.quantile(q))) for name, q in QUARTILES.items()}


def _by_site(used: pd.DataFrame, column: str) -> dict[str, list[float]]:
    return {str(site): rows[column].dropna().tolist() for site, rows in used.groupby("site")}


def _by_split(used: pd.DataFrame, column: str) -> dict[str, list[float]]:
    return {split: used.loc[used["split"] == split, column].dropna().tolist() for split in splits_in(used)}


def _slice_splits(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The slices of each split, of a version split by file; empty for others."""
    slices = summary.get("slices", {})
    return [{"split": split, "slices": n, "share": f"{n / sum(slices.values()):.0%}"} for split, n in slices.items()]


def _source(summary: Mapping[str, Any]) -> str:
    """The repositories of a published preparation; "" if the version follows none."""
    return PREPARATIONS[summary["preparation"]["name"]].source if "preparation" in summary else ""


def _splits(used: pd.DataFrame, sites: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for split in splits_in(used):
        part = used[used["split"] == split]
        labels = {"split": split, "subjects": len(part), "share": f"{len(part) / len(used):.0%}"}
        rows.append(flatten_row(labels, {site: int((part["site"] == site).sum()) for site in sites}, {}))
    return rows


def _cards(rows: pd.DataFrame, layers: Mapping[tuple[str, str], PairLayers], reference: str) -> list[dict[str, Any]]:
    """Caption and pictures of each drawn pair."""
    cards = []
    for row in manifest.to_records(rows):
        drawn = layers.get((row["subject_id"], row["modality"]))
        if drawn is not None:
            card = {"subject": row["subject_id"], "note": f"{row['split']}, {describe_alignment(row)}"}
            card |= {"moving": row["modality"], "moving_image": page.jpeg_uri(drawn.moving)}
            card |= {"reference": reference, "reference_image": page.jpeg_uri(drawn.reference)}
            cards.append(card | {"edges": page.png_uri(drawn.edges)})
    return cards
