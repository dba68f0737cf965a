"""Sites may have any name, including that of a column of a table."""

from __future__ import annotations

import json
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from survey_tables import CUT, pair, table_of

from ixi_etl.config import DatasetConfig
from ixi_etl.dataset import manifest, selection
from ixi_etl.dataset.schema import IXI
from ixi_etl.report.dataset_report import dataset_report
from ixi_etl.report.depth_chart import depths_svg
from ixi_etl.scans.site_tables import flatten, site_table_to_records
from ixi_etl.scans.survey import depth_histogram, modal_depths

SITES = ["all", "depth", "step", "modality", "reason", "index", "site", "sites", "slices", "split", "subjects", "share"]
SITES += ["level_0", "row_0", "0", "NaN", "None", "T1", "Guys"]


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """Site n has n + 1 pairs of the modal depth and one of another depth."""
    rows = []
    for n, site in enumerate(SITES):
        for number in range(n + 1):
            rows += pair(f"IXI{100 * n + number:04d}-{site}-1")
        rows += pair(f"IXI{100 * n + 99:04d}-{site}-1", depth=28)
    return table_of(rows)


@pytest.fixture(scope="module")
def final(table: pd.DataFrame) -> pd.DataFrame:
    selected = selection.screen_headers(table, DatasetConfig())
    found: dict[str, Any] = {s: CUT | {"t2_to_t1_ras_mm": "", "nmi_after": 0.5} for s in selected["subject_id"]}
    return IXI.from_csv(IXI.to_csv(manifest.finalise(selected, found, DatasetConfig())), "manifest.csv")


USED = {site: n + 1 for n, site in enumerate(SITES)}


def test_the_histogram_counts_each_site(table: pd.DataFrame) -> None:
    histogram = depth_histogram(table)
    assert histogram["sites"].loc[("T2", 130)].to_dict() == USED
    assert histogram["sites"].loc[("T2", 28)].to_dict() == dict.fromkeys(SITES, 1)
    assert histogram["all"].to_dict() == {
        ("T1", 150): sum(USED.values()) + len(SITES),
        ("T2", 28): len(SITES),
        ("T2", 130): sum(USED.values()),
    }


def test_records_of_the_histogram_survive_json(table: pd.DataFrame) -> None:
    histogram = depth_histogram(table)
    records = json.loads(json.dumps(site_table_to_records(histogram)))
    keys = [(record["modality"], record["depth"]) for record in records]
    assert dict(zip(keys, (record["all"] for record in records), strict=True)) == histogram["all"].to_dict()
    assert [record["sites"] for record in records] == histogram["sites"].to_dict("records")


@pytest.mark.parametrize("rows", [0, 1])
def test_flattened_tables_have_no_additional_rows(rows: int, table: pd.DataFrame, final: pd.DataFrame) -> None:
    assert len(flatten(depth_histogram(table.head(rows)))) == rows
    assert len(flatten(manifest.exclusions(manifest.used_rows(final).head(rows)))) == 0


def test_the_funnel_and_the_exclusions_count_each_site(final: pd.DataFrame) -> None:
    funnel, exclusions = manifest.funnel(final, IXI), manifest.exclusions(final)
    assert funnel["sites"].loc["used"].to_dict() == USED
    assert funnel["all"]["found"] == len(final)
    assert exclusions["sites"].loc["depth_not_modal"].to_dict() == dict.fromkeys(SITES, 1)
    counts = json.loads(json.dumps(manifest.counts(final, IXI)))
    assert counts["funnel"]["used"] == {"all": sum(USED.values()), "sites": USED}


def test_flattened_tables_have_a_column_for_each_site(table: pd.DataFrame, final: pd.DataFrame) -> None:
    for counts, labels in (
        (depth_histogram(table), 2),
        (manifest.funnel(final, IXI), 1),
        (manifest.exclusions(final), 1),
    ):
        flat = flatten(counts)
        assert flat.columns.is_unique
        assert flat.shape == (len(counts), labels + len(SITES) + 1)
        np.testing.assert_array_equal(flat.iloc[:, labels:-1].sum(axis=1), flat["all"])
        assert "site all" in flat


def test_reports_and_charts_show_any_site_name(table: pd.DataFrame, final: pd.DataFrame) -> None:
    histogram, modal = depth_histogram(table), modal_depths(table)
    config = DatasetConfig().model_dump(mode="json")
    summary: dict[str, Any] = {
        "name": "ixi-t1-t2",
        "version": "0" * 12,
        "planes": {"T1": "sagittal", "T2": "axial"},
        "inputs": {
            "config": config,
            "archives_md5": {},
            "demographics_sha256": None,
            "libraries": {},
            "pipeline_version": 0,
        },
        "modal_depth": modal,
        "histogram": site_table_to_records(histogram),
        "sources": {},
        "credit": "",
        "licence": "",
        **manifest.counts(final, IXI),
    }
    page = dataset_report(summary, final, {})
    assert f'<th scope="row">site all</th><td>2</td><td>1</td><td>{1 / 2:.0%}</td>' in page
    assert page.count('<th scope="col">site all</th>') == 4  # the funnel, the depths of two modalities, the exclusions
    assert '<th scope="col">site share</th>' in page
    drawing = ElementTree.fromstring(depths_svg(summary["histogram"], modal))
    assert {*SITES, "150 (modal)", "130 (modal)"} <= {
        text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text")
    }
