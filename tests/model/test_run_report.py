"""The report page of a run is made from the files that exist, is small, and agrees with the tables."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np
import pandas as pd
import pytest
from markup import page_of, rows_of, text_of
from PIL import Image

from flows.cli.output import Output
from flows.cli.show import show_evaluation
from flows.summaries import evaluation_summary
from model.protocols import MEASURES, PROTOCOLS
from model.report import FRAMES, LISTED, run_report, write_report

METHODS = ("generated", "source as it is", "mean training target", "intensity mapping")
STEPS = range(100, 100 * (FRAMES + 4), 100)


def write_run(folder: Path, subjects: int, steps: range = STEPS, rows: int = 50_000) -> Path:
    """Write a run's folder with every file that the page reads, with incompressible images."""
    random = np.random.default_rng(0)
    folder.mkdir()
    record: dict[str, Any] = {
        "config": {"dataset": "ixi-t1-t2@abc", "direction": "t1->t2", "steps": 4000, "batch_size": 1}
        | {"precision": "fp32", "log_every": 1},
        "hardware": {"device": "a GPU"},
        "software": {"torch": "2"},
    }
    (folder / "config.json").write_text(json.dumps(record))
    losses = ["loss_d", "loss_d_real", "loss_d_fake", "loss_g", "loss_g_adversarial", "loss_g_reconstruction"]
    speed = {"lr": 1e-4, "ms_per_step": 50.0, "images_per_s": 20.0, "peak_memory_mb": 1000.0}
    lines = pd.DataFrame(random.random((rows, len(losses))), columns=losses).assign(**speed)
    lines.insert(0, "step", range(1, len(lines) + 1))
    lines.to_csv(folder / "metrics.csv", index=False)
    validated = {"step": steps, "mae": np.linspace(0.2, 0.1, len(steps)), "psnr": 20.0, "ssim": 0.5}
    pd.DataFrame(validated).to_csv(folder / "validation.csv", index=False)
    for step in steps:
        singles = folder / "samples" / f"step-{step:08}"
        singles.mkdir(parents=True)
        for subject in range(4):
            for kind in ("source", "target", "generated", "error"):
                pixels = random.integers(0, 256, (256, 256), np.uint8)
                Image.fromarray(pixels).save(singles / f"IXI{subject:03}-HH-1-10-{kind}.png", compress_level=0)
    write_evaluation(folder, subjects)
    return folder


@pytest.mark.parametrize("name", ["metrics.csv", "validation.csv"])
@pytest.mark.parametrize("damaged", [b"", b"step,lo", b"step,mae\n\0\0\0\n", b"\xff\xfe\n1,2\n"])
def test_a_log_damaged_by_a_full_disk_is_left_out(
    name: str, damaged: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_run(tmp_path / "a", subjects=1, steps=range(0), rows=10)
    (folder / name).write_bytes(damaged)
    assert "a GPU" in run_report(folder)
    assert f"{folder / name} is damaged and left out of the report" in caplog.text


def write_evaluation(folder: Path, subjects: int) -> None:
    random = np.random.default_rng(1)
    names = [f"test-{k:05}" for k in range(subjects)]
    parts = [
        pd.DataFrame({"subject_id": names, "method": method, "mask": mask, **measures(random, subjects)})
        for mask in ("whole", "head")
        for method in METHODS
    ]
    pd.concat(parts).to_csv(folder / "evaluation-test.csv", index=False)
    mean = {f"{m}_{statistic}": 1.0 for m in ("psnr", "ssim", "mae") for statistic in ("mean", "std")}
    evaluation = {
        "split": "test",
        "weights": "generator.safetensors",
        "step": 100,
        "dropout": False,
        "normalisation": "percentiles",
        "masks": {"whole": "every pixel", "head": "the head"},
        "summary": [
            {"mask": mask, "method": m, "subjects": subjects, **mean} for mask in ("whole", "head") for m in METHODS
        ],
        "comparison": [
            difference("source as it is", "psnr", 3.0, 1.0, 5.0),
            difference("mean training target", "psnr", -3.0, -5.0, -1.0),
            difference("intensity mapping", "psnr", 3.0, -1.0, 7.0),
            difference("intensity mapping", "mae", 0.25, None, None),
            difference("intensity mapping", "ssim", None, None, None),
        ],
    }
    (folder / "evaluation-test.json").write_text(json.dumps(evaluation))


def measures(random: np.random.Generator, subjects: int) -> dict[str, Any]:
    return {"psnr": random.normal(25, 2, subjects), "ssim": random.random(subjects), "mae": random.random(subjects)}


def difference(
    baseline: str, measure: str, mean: float | None, low: float | None, high: float | None
) -> dict[str, Any]:
    return {"mask": "head", "baseline": baseline, "measure": measure} | {
        "better_by": mean,
        "low_95": low,
        "high_95": high,
    }


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "full", subjects=10_000)


@pytest.fixture(scope="module")
def written(full: Path) -> str:
    return write_report(full).read_text()


@pytest.fixture(scope="module")
def page(written: str) -> Element:
    return page_of(written)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A small run that a test may change."""
    return write_run(tmp_path / "run", subjects=3, steps=range(100, 300, 100), rows=10)


@pytest.mark.stack
def test_the_page_of_a_large_run_is_small_and_reproducible(full: Path, written: str) -> None:
    assert len(written) < 5e6
    assert written == run_report(full)
    assert f"{LISTED} of 10000, all in evaluation-test.csv" in written


def test_the_slider_spans_the_first_to_the_last_sample(page: Element) -> None:
    (steps,) = (json.loads(element.get("data-steps", "")) for element in page.iter() if "data-steps" in element.attrib)
    assert len(steps) == FRAMES
    assert (steps[0], steps[-1]) == ("step 100", f"step {STEPS[-1]:,}")
    assert len([element for element in page.iter() if element.get("data-frame") == "0"]) == 4 * 2


@pytest.mark.parametrize(
    ("better_by", "interval", "verdict"),
    [
        ("+3.00", "1.00 to 5.00", "better"),
        ("-3.00", "-5.00 to -1.00", "worse"),
        ("+3.00", "-1.00 to 7.00", "open"),
        ("+0.2500", "-", "open"),
    ],
)
def test_the_verdict_follows_the_interval(page: Element, better_by: str, interval: str, verdict: str) -> None:
    assert [better_by, interval, verdict] in [row[-3:] for table in page.iter("table") for row in rows_of(table)]


@pytest.mark.parametrize(
    ("recorded", "subjects"),
    [
        ({"split": "val"}, "validation"),
        ({"split": "train"}, "training"),
        (None, "the same"),  # runs of older versions do not record it
        ([], "the same"),
    ],
)
def test_the_page_names_the_split_of_the_samples(run: Path, recorded: Any, subjects: str) -> None:
    if recorded is not None:
        (run / "samples" / "samples.json").write_text(json.dumps(recorded))
    page = run_report(run)
    assert f"Middle slices of {subjects} subjects" in page
    assert ("was trained on these subjects" in page) is (subjects == "training")


def test_the_page_explains_why_one_subject_has_no_interval(run: Path) -> None:
    assert "they need two subjects" not in run_report(run)
    write_evaluation(run, 1)
    page = run_report(run)
    assert "they need two subjects" in page
    assert "<p>1 subject; " in page


def test_the_step_with_the_lowest_mae_is_marked(page: Element) -> None:
    marked = [[text_of(cell) for cell in row][:2] for row in page.iter("tr") if row.get("class") == "marked"]
    assert marked == [[f"{STEPS[-1]:,}", "20.00"]]


def test_the_time_is_the_sum_over_all_steps(page: Element) -> None:
    assert "41.7 min" in text_of(page)  # 50,000 steps of 50 ms


def test_the_worst_subject_is_listed_first(full: Path, page: Element) -> None:
    table = pd.read_csv(full / "evaluation-test.csv")
    ours = table[(table["method"] == "generated") & (table["mask"] == "head")]
    (table,) = (t for t in page.iter("table") if t.get("id") == "subjects-test")
    assert rows_of(table)[0][0] == ours.loc[ours["psnr"].idxmin(), "subject_id"]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose evaluation has every protocol, one of them with an infinite and a missing value."""
    folder = write_run(tmp_path_factory.mktemp("scored") / "run", subjects=3, steps=range(0), rows=10)
    record = json.loads((folder / "evaluation-test.json").read_text())
    ours = pd.read_csv(folder / "evaluation-test.csv").assign(protocol="ours")
    other = ours[ours["mask"] == "whole"].assign(protocol="syndiff", mae=math.nan)
    pd.concat([ours, other]).to_csv(folder / "evaluation-test.csv", index=False)
    missing = dict.fromkeys(f"{m}_{x}" for m in MEASURES for x in ("mean", "std"))
    rows = [missing | row | {"protocol": "ours", "subjects": 3} for row in record["summary"]]
    theirs = {"protocol": "syndiff", "ssim_mean": 0.5, "psnr_mean": None, "mae_mean": None, "mae_std": None}
    record["summary"] = [*rows, *(row | theirs for row in rows if row["mask"] == "whole")]
    record["comparison"] = [row | {"protocol": "ours"} for row in record["comparison"]]
    record["protocols"] = {
        name: {k: getattr(PROTOCOLS[name], k) for k in ("title", "definition", "source", "masks", "link")}
        for name in ("syndiff", "ours")
    }
    (folder / "evaluation-test.json").write_text(json.dumps(record))
    return folder


def test_every_row_of_the_protocols_leads_to_its_definition(scored: Path) -> None:
    page = page_of(run_report(scored))
    table = next(t for t in page.iter("table") if "Every protocol" in text_of(t))
    rows = rows_of(table)
    assert len(rows) == 3 * len(METHODS)
    links = [link.get("href", "") for link in table.iter("a")]
    assert [link.removeprefix("#protocol-") for link in links] == [row[0] for row in rows]
    definitions = {e.get("id"): text_of(e) for e in page.iter() if e.get("id", "").startswith("protocol-")}
    assert {link.removeprefix("#") for link in links} == definitions.keys()
    for name in ("ours", "syndiff"):
        assert f"docs/protocols.md#{name}" in text_of(page)
    assert rows[-1][3:6] == ["- (1.00)", "0.500 (1.000)", "-"]
    assert ["+3.00", "1.00 to 5.00", "better"] in [row[-3:] for t in page.iter("table") for row in rows_of(t)]


def test_an_evaluation_without_ours_has_no_details(scored: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(scored, tmp_path / "run")
    table = pd.read_csv(folder / "evaluation-test.csv")
    table[table["protocol"] == "syndiff"].to_csv(folder / "evaluation-test.csv", index=False)
    page = run_report(folder)
    assert "in detail" not in page
    assert 'href="#protocol-syndiff"' in page


def test_an_evaluation_without_newer_measures_is_shown(scored: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(scored, tmp_path / "run")
    record = json.loads((folder / "evaluation-test.json").read_text())
    for row in record["summary"]:
        for name in ("mse_mean", "mse_std", "mae_std"):
            row.pop(name, None)
    (folder / "evaluation-test.json").write_text(json.dumps(record))
    table = next(t for t in page_of(run_report(folder)).iter("table") if "Every protocol" in text_of(t))
    assert rows_of(table)[0][3:6] == ["1.00 (1.00)", "1.000 (1.000)", "1.0000"]
    summary = evaluation_summary(folder)
    assert summary is not None
    assert "MSE" not in summary.shown


def test_the_command_lists_the_definitions_below_the_table(
    scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(scored, tmp_path / "run")
    show_evaluation(Output(), folder, "evaluation-test")
    assert "definitions:" not in capsys.readouterr().out  # rows of older code have no link
    record = json.loads((folder / "evaluation-test.json").read_text())
    record["summary"] = [row | {"definition": PROTOCOLS[row["protocol"]].link} for row in record["summary"]]
    (folder / "evaluation-test.json").write_text(json.dumps(record))
    show_evaluation(Output(), folder, "evaluation-test")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "definitions: docs/protocols.md#ours, docs/protocols.md#syndiff"


def test_an_evaluation_by_older_code_has_no_table_of_protocols(run: Path) -> None:
    page = run_report(run)
    assert "Every protocol" not in page
    assert "Mask head: the generator is better by" in page
    summary = evaluation_summary(run)
    assert summary is not None
    assert list(summary.shown.columns) == ["protocol", "mask", "method", "PSNR, dB", "SSIM", "MAE"]
    assert summary.shown["protocol"].tolist() == ["ours", "", "", "", "ours", "", "", ""]


def test_the_table_of_protocols_fits_120_columns(
    scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(scored, tmp_path / "run")
    record = json.loads((folder / "evaluation-test.json").read_text())
    for row in record["summary"]:
        row.update({key: 0.12345 for key in row if key.endswith(("_mean", "_std"))}, psnr_mean=31.2812, psnr_std=1.56)
        row.update(protocol="moschetto", mask="foreground")
    record["normalisation"] = "x" * 60
    (folder / "evaluation-test.json").write_text(json.dumps(record))
    Output().table("evaluation", (shown := evaluation_summary(folder)).shown, shown.title)  # type: ignore[union-attr]
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 120
    assert any("31.28 (1.56)" in line and "0.12345" in line and "foreground" in line for line in lines)


def test_the_terms_of_the_table_name_each_definition(scored: Path) -> None:
    summary = evaluation_summary(scored)
    assert summary is not None
    for name, text in summary.terms.items():
        assert text == f"{PROTOCOLS[name].definition} docs/protocols.md#{name}"
    assert summary.terms.keys() == {"ours", "syndiff"}


def test_a_run_that_has_just_started_has_a_page(run: Path) -> None:
    for path in run.iterdir():
        if path.name != "config.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = run_report(run)
    assert "ixi-etl evaluate run" in page
    assert "No samples were drawn" in page
    assert "No validation: " in page


def test_disabled_losses_have_no_chart(run: Path) -> None:
    lines = pd.read_csv(run / "metrics.csv").head(10)
    lines[["loss_d", "loss_d_real", "loss_d_fake", "loss_g_adversarial"]] = 0.0
    lines.to_csv(run / "metrics.csv", index=False)
    page = run_report(run)
    assert 'aria-label="Generator: reconstruction' in page
    assert 'aria-label="Generator: adversarial' not in page
    assert 'aria-label="Discriminator' not in page


def test_a_single_subject_with_infinite_psnr_is_shown(run: Path) -> None:
    write_evaluation(run, 1)
    table = pd.read_csv(run / "evaluation-test.csv")
    table["psnr"] = math.inf  # equal images
    table.to_csv(run / "evaluation-test.csv", index=False)
    page = run_report(run)
    assert "1 of 1 rows" not in page  # the script writes it
    assert "<td>inf</td>" in page
    assert 'aria-label="test: PSNR' not in page
    assert 'aria-label="test: SSIM' in page
