"""The report of a version is one small self-contained file and agrees with the manifest; charts draw any values."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np
import pandas as pd
import pytest
from conftest import config_for
from hypothesis import example, given
from hypothesis import strategies as st
from markup import page_of, svg_of, table_of, text_of
from PIL import Image

from ixi_etl.dataset import manifest, metadata
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.dataset.schema import IXI, REASONS
from ixi_etl.pairing.pictures import pair_layers
from ixi_etl.recipes.ixi import refresh
from ixi_etl.report import charts, page
from ixi_etl.report.dataset_report import (
    PAIRS_SHOWN,
    WORST_SHOWN,
    dataset_report,
    drawn_pairs,
    list_pairs,
    sample_across_sites,
    worst_pairs,
)

numbers = st.floats(-1e6, 1e6, allow_nan=False)


@pytest.fixture(scope="module")
def published_manifest(published: PublishedVersion) -> pd.DataFrame:
    return metadata.read_manifest(published.folder)


@pytest.fixture(scope="module")
def summary(published: PublishedVersion) -> dict[str, Any]:
    return metadata.read_metadata(published.folder)


def manifest_of(published_manifest: pd.DataFrame, count: int) -> pd.DataFrame:
    """A manifest of `count` used subjects of three sites, made from one used row."""
    row = manifest.used_rows(published_manifest).iloc[[0]]
    table = pd.concat([row] * count, ignore_index=True)
    table["site"] = [("Guys", "HH", "IOP")[min(k % 20, 2)] for k in range(count)]  # 1 : 1 : 18
    table["subject_id"] = [f"IXI{k:04}-{site}-{k:04}" for k, site in enumerate(table["site"])]
    table["store_row"] = pd.array(range(count), dtype="Int64")
    table["nmi_after"] = np.linspace(0.1, 0.9, count)
    return table


# -- the dataset's page -----------------------------------------------------------------------------------------------


def test_the_page_is_self_contained(published: PublishedVersion) -> None:
    page = page_of((published.folder / metadata.REPORT).read_text())
    policy = next(meta.get("content", "") for meta in page.iter("meta") if meta.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    linked = [element.get(name, "") for element in page.iter() for name in ("src", "href") if name in element.attrib]
    linked += [
        part.partition(")")[0].strip("'\"") for style in page.iter("style") for part in text_of(style).split("url(")[1:]
    ]
    assert linked
    [comparison] = [target for target in linked if target == metadata.COMPARED_PAGE]  # followed only by a click
    assert (published.folder / comparison).is_file()
    assert {t.partition(":")[0] for t in linked if not t.startswith("#") and t != comparison} == {"data"}


def test_the_page_lists_each_excluded_subject(published: PublishedVersion, published_manifest: pd.DataFrame) -> None:
    rows = table_of(page_of((published.folder / metadata.REPORT).read_text()), "All ")
    excluded = published_manifest[published_manifest["status"] == "excluded"]
    assert [row[:3] for row in rows] == excluded[["subject_id", "site", "reason"]].to_numpy().tolist()


def test_text_of_a_file_cannot_become_markup(summary: dict[str, Any], published_manifest: pd.DataFrame) -> None:
    table = published_manifest.copy()
    hostile = "<script>alert(1)</script>"
    table.loc[table["status"] == "excluded", "detail"] = hostile
    table["site"] = hostile
    page = page_of(dataset_report(summary, table, {}))
    assert hostile in text_of(page)
    assert [script for script in page.iter("script") if "alert" in text_of(script)] == []


@pytest.mark.stack
def test_a_version_of_500_subjects_gives_a_small_page(
    summary: dict[str, Any], published_manifest: pd.DataFrame
) -> None:
    noise = np.random.default_rng(0).normal(500, 100, (2, 256, 256))  # noise is hardest to compress
    table = manifest_of(published_manifest, 500)
    shown = dict.fromkeys(drawn_pairs(list_pairs(table, "ixi-t1-t2")), pair_layers(*noise))
    page = dataset_report(summary, table, shown)
    assert page.count('class="pair"') == PAIRS_SHOWN + WORST_SHOWN
    assert f"{PAIRS_SHOWN} of 500 pairs" in page
    assert len(page) < 5e6


def test_pairs_of_each_site_and_the_least_similar_pairs_are_shown(published_manifest: pd.DataFrame) -> None:
    table = list_pairs(manifest_of(published_manifest, 60), "ixi-t1-t2")
    shown = sample_across_sites(table)
    assert shown["site"].value_counts().to_dict() == {"Guys": 3, "HH": 3, "IOP": PAIRS_SHOWN - 6}
    assert shown["subject_id"].is_unique
    assert worst_pairs(table)["subject_id"].tolist() == table["subject_id"].head(WORST_SHOWN).tolist()
    assert len(sample_across_sites(table.head(5))) == 5


def test_the_cost_of_the_modal_rule_is_shown_by_site(summary: dict[str, Any], published_manifest: pd.DataFrame) -> None:
    rows = table_of(page_of(dataset_report(summary, published_manifest, {})), "Pairs excluded only by their depth")
    funnel = manifest.funnel(published_manifest, IXI)
    before, after = funnel.loc["readable"], funnel.loc["modal depth"]
    costs = {name: (int(readable), int(out)) for name, readable, out, _ in rows}
    assert costs == {
        name or level: (before[level, name], before[level, name] - after[level, name]) for level, name in funnel
    }
    any_depth = json.loads(json.dumps(summary))
    any_depth["inputs"]["config"]["depth"] = "any"
    assert "Cost of the modal rule" not in dataset_report(any_depth, published_manifest, {})


def test_age_and_sex_are_shown_if_known(summary: dict[str, Any], published_manifest: pd.DataFrame) -> None:
    assert "Age in years" not in dataset_report(summary, published_manifest, {})
    known = published_manifest.copy()
    known["age"], known["sex"] = 40.5, "f"
    assert "40.5 (40 to 40)" in dataset_report(summary, known, {})


def test_without_pictures_there_is_no_contact_sheet(archives: Path, tmp_path: Path) -> None:
    done = refresh(config_for(tmp_path, archives, pictures=False))
    assert 'class="pair"' not in (done.folder / metadata.REPORT).read_text()
    assert not (done.folder / metadata.PICTURES).exists()


NAMES = ["unsupported_dtype", "Hammersmith.Hospital.Scanner.Number.Three", "WWWWWWWWWWWWWWWWWW", "<&>" * 20, "整" * 30]


@pytest.mark.parametrize("name", [*NAMES, *REASONS])
def test_names_of_rows_fit_or_are_shortened_with_a_tooltip(name: str) -> None:
    # DejaVu Sans at 12 pixels, a wide font
    widest = dict.fromkeys("il", 3.5) | {"m": 11.7, "w": 9.9, "W": 11.9}
    for svg in (charts.bars({name: {"a": 3}}, "x"), charts.strips({name: [1.0, 2.0]}, "x")):
        found = re.search(r'<text x="([\d.]+)"[^>]*"end"[^>]*>(?:<title>.*?</title>)?(.*?)</text>', svg)
        assert found
        x, shown = found.groups()
        shown = html.unescape(shown)
        assert sum(widest.get(c, 7.7 if c.isascii() else 12) for c in shown) <= float(x)
        assert shown == name or (shown.endswith("…") and f"<title>{html.escape(name)}</title>" in svg)


# -- charts and pictures ----------------------------------------------------------------------------------------------


@given(st.dictionaries(st.text(max_size=8), st.lists(numbers, max_size=20), max_size=4))
@example({"": [0.0, 5e-324]})
@example({"": [0.0, 1e-307]})
@example({"Me": [0.0], 'M"e': [1.0], 'x="900" \0': [2.0]})  # text like coordinates, and text that is invalid in XML
def test_strips_stay_in_the_chart_for_any_values(rows: dict[str, list[float]]) -> None:
    svg = str(charts.strips(rows, "label"))
    assert bool(svg) == any(rows.values())
    if svg:
        assert all(0 <= x <= charts.WIDTH for x in x_coordinates(svg_of(svg)))


@given(
    st.dictionaries(st.text(max_size=8), st.lists(st.tuples(st.integers(0, 10**6), numbers), max_size=20), max_size=3)
)
@example({"": [(0, 0.0), (0, 5e-324)]})
@example({"": [(0, 0.0), (0, 1e-307)]})
@example({"Me": [(0, 0.0)], 'cx="900" \0': [(1, 1.0)]})
def test_lines_stay_in_the_chart_for_any_values(series: dict[str, list[tuple[float, float]]]) -> None:
    svg = str(charts.lines(series, "label"))
    assert bool(svg) == any(series.values())
    if svg:
        assert all(0 <= x <= charts.WIDTH for x in x_coordinates(svg_of(svg)))


def x_coordinates(svg: Element) -> list[float]:
    """The x coordinates at which elements start or end."""
    found = []
    for element in svg.iter():
        match element.tag:
            case "rect":
                found += [float(element.get("x", "")), float(element.get("x", "")) + float(element.get("width", ""))]
            case "circle":
                found += [float(element.get("cx", ""))]
            case "text":
                found += [float(element.get("x", ""))]
            case "polyline":
                found += [float(point.partition(",")[0]) for point in element.get("points", "").split()]
            case "path":
                for move in element.get("d", "").split("M")[1:]:
                    found.append(float(move.split()[0]))
                    found += [float(end) for end in move.split("H")[1:]]
            case other:
                assert other == "svg"
    assert found
    return found


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(0, 700)), max_size=9))
def test_bars_are_as_long_as_their_counts(counts: list[dict[str, int]]) -> None:
    svg = svg_of(str(charts.bars({str(k): row for k, row in enumerate(counts)}, "label")))
    wide = [float(bar.get("width", "")) for bar in svg.iter("rect")]
    flat_counts = [n for row in counts for n in row.values()]
    most = max((sum(row.values()) for row in counts), default=0) or 1
    assert wide == pytest.approx(
        [n / most * (charts.WIDTH - charts.LEFT - charts.RIGHT) for n in flat_counts], abs=0.051
    )


def test_a_long_line_is_thinned_and_keeps_its_level() -> None:
    points = [(float(k), 5.0) for k in range(100_000)]
    svg = str(charts.lines({"a": points, "b": [(k, 0.0) for k, _ in points]}, "label"))
    assert len(svg) < 20_000
    assert "a from 5 to 5" in svg_of(svg).get("aria-label", "")


def test_nan_is_left_out() -> None:
    strips = svg_of(str(charts.strips({"a": [1.0, float("nan")]}, "x")))
    assert [
        element for element in strips.iter() if "nan" in "".join([*element.itertext(), *element.attrib.values()])
    ] == []
    assert charts.lines({"a": [(1.0, float("nan"))]}, "x") == ""


def test_only_large_pictures_are_scaled_down() -> None:
    def size(uri: str) -> tuple[int, int]:
        import base64
        import io

        return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size

    assert size(page.jpeg_uri(Image.new("L", (1024, 512)))) == (256, 128)
    assert size(page.png_uri(Image.new("RGBA", (32, 30)))) == (32, 30)


def test_an_svg_file_is_self_contained() -> None:
    series = [f"site-{n}" for n in range(9)] + ["W" * 60]
    rows = {"38 (modal)": dict.fromkeys(series, 2), "37": dict.fromkeys(series, 1)}
    panels = {f"{m} & volumes": charts.bars(rows, m, marked="38 (modal)") for m in ("T1", "T2")}
    drawing = charts.svg_file(panels, series)
    root = svg_of(drawing)
    width, height = (float(n) for n in root.attrib["viewBox"].split()[2:])
    inner = [child for child in root.iterfind(".//{*}svg") if "y" in child.attrib]
    assert [float(child.attrib["height"]) for child in inner] == [2 * charts.ROW] * 2
    assert float(inner[1].attrib["y"]) + 2 * charts.ROW <= height
    assert width == charts.WIDTH + 2 * charts.MARGIN
    texts = [text.text for text in root.iterfind(".//{*}text")]
    assert texts[:9] == series[:9]
    assert {"T1 & volumes", "T2 & volumes", "38 (modal)"} <= set(texts)
