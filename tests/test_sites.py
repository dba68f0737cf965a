"""Sites may have any name: none is taken for another column of a table."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_manifest import CUT, pair, table_of

from flows import artifacts
from ixi_etl import manifest
from ixi_etl.config import DatasetConfig
from ixi_etl.report import dataset_report
from ixi_etl.schema import IXI
from ixi_etl.survey import depth_histogram, draw_histogram, flat, modal_depths, site_records, table_of_sites

SITES = ["all", "depth", "step", "modality", "reason", "index", "site", "sites", "slices", "split", "subjects", "share"]
SITES += ["level_0", "row_0", "0", "NaN", "None", "T1", "Guys"]


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """The n-th site has n + 1 pairs, and one of another depth."""
    rows = []
    for n, site in enumerate(SITES):
        for number in range(n + 1):
            rows += pair(f"IXI{100 * n + number:04d}-{site}-1")
        rows += pair(f"IXI{100 * n + 99:04d}-{site}-1", depth=28)
    return table_of(rows)


@pytest.fixture(scope="module")
def settled(table: pd.DataFrame) -> pd.DataFrame:
    selected = manifest.select(table, DatasetConfig())
    found: dict[str, Any] = {s: CUT | {"t2_to_t1_ras_mm": "", "nmi_after": 0.5} for s in selected["subject_id"]}
    return IXI.from_csv(IXI.to_csv(manifest.settle(selected, found, DatasetConfig())), "manifest.csv")


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


def test_json_gives_the_table_back(table: pd.DataFrame) -> None:
    histogram = depth_histogram(table)
    said = json.loads(json.dumps(site_records(histogram)))
    assert said[0] | {"sites": {}} == {"modality": "T1", "depth": 150, "all": said[0]["all"], "sites": {}}
    pd.testing.assert_frame_equal(table_of_sites(said, ["modality", "depth"]), histogram, check_names=False)


@pytest.mark.parametrize("left", [0, 1])
def test_tables_of_nothing_are_empty(left: int, table: pd.DataFrame, settled: pd.DataFrame) -> None:
    assert len(flat(depth_histogram(table.head(left)))) == left
    assert len(flat(manifest.exclusions(manifest.used(settled).head(left)))) == 0


def test_the_funnel_and_the_exclusions_count_each_site(settled: pd.DataFrame) -> None:
    funnel, out = manifest.funnel(settled), manifest.exclusions(settled)
    assert funnel["sites"].loc["used"].to_dict() == USED
    assert funnel["all"]["found"] == len(settled)
    assert out["sites"].loc["depth_not_modal"].to_dict() == dict.fromkeys(SITES, 1)
    facts = json.loads(json.dumps(manifest.counts(settled)))
    assert facts["funnel"]["used"] == {"all": sum(USED.values()), "sites": USED}


def test_tables_to_show_have_a_column_for_each(table: pd.DataFrame, settled: pd.DataFrame) -> None:
    for counts, labels in (
        (depth_histogram(table), 2),
        (manifest.funnel(settled), 1),
        (manifest.exclusions(settled), 1),
    ):
        shown = flat(counts)
        assert shown.columns.is_unique
        assert shown.shape == (len(counts), labels + len(SITES) + 1)
        np.testing.assert_array_equal(shown.iloc[:, labels:-1].sum(axis=1), shown["all"])
        assert "site all" in shown


def test_pages_pictures_and_artifacts_take_any_site(table: pd.DataFrame, settled: pd.DataFrame, tmp_path: Any) -> None:
    histogram, modal = depth_histogram(table), modal_depths(table)
    draw_histogram(histogram, modal, tmp_path / "depths.png")
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
        "histogram": site_records(histogram),
        "sources": {},
        "credit": "",
        "licence": "",
        **manifest.counts(settled),
    }
    page = dataset_report(summary, settled, {})
    assert f'<th scope="row">site all</th><td>2</td><td>1</td><td>{1 / 2:.0%}</td>' in page
    assert page.count('<th scope="col">site all</th>') == 4  # the funnel, the depths of two modalities, the exclusions
    assert '<th scope="col">site share</th>' in page
    assert artifacts._histogram(summary).startswith(b"\x89PNG")
