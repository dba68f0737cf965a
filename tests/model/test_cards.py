"""Cards are valid for the Hub, and say only what the version and the run's evaluation say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard
from huggingface_hub.utils import yaml_dump

from flows.cli import main
from ixi_etl.core.files import read_json, to_json
from ixi_etl.core.text import markdown_table
from ixi_etl.dataset import metadata
from ixi_etl.dataset.credit import credit_and_licence, describe_source
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.sources.catalog import CREDIT, LICENCE, official
from model.cards import model_card
from model.cards_dataset import dataset_card
from model.export import export
from model.run import Run


def card_of(run: Run) -> str:
    return model_card(run.folder, run.generator, run.version)


@pytest.fixture
def copied(finished_run: Run, tmp_path: Path) -> Any:
    """A copy of the run's folder, for tests that change its files."""
    shutil.copytree(finished_run.folder, tmp_path / "a")
    return Run(tmp_path / "a", finished_run.config, finished_run.version)


def with_metadata(folder: Path, out: Path, **changes: Any) -> Path:
    """A copy of a version with other metadata."""
    shutil.copytree(folder, out)
    content = {k: v for k, v in metadata.read_metadata(folder).items() if k != metadata.DIGEST} | changes
    (out / metadata.METADATA).write_text(to_json(metadata.with_digest(content)))
    return out


def test_the_hub_reads_the_card_of_a_run(finished_run: Run) -> None:
    text = card_of(finished_run)
    card = ModelCard(text)  # raises if the metadata are invalid
    assert card.data.pipeline_tag == "image-to-image"
    assert card.data.license == "unknown"
    assert "simulated" in card.data.tags
    summary = read_json(finished_run.folder / "evaluation-test.json")["summary"]
    measured = {
        (f"protocol {row['protocol']}, mask {row['mask']}", name.removesuffix("_mean"), value)
        for row in summary
        if row["method"] == "generated"
        for name, value in row.items()
        if name.endswith("_mean") and value is not None
    }
    shown = {(r.dataset_config, r.metric_type, r.metric_value) for r in card.data.eval_results}
    assert shown == measured
    assert {r.dataset_name for r in card.data.eval_results} == {f"{finished_run.config.dataset}, simulated (not IXI)"}
    assert yaml.safe_load(yaml_dump(card.data.to_dict())) == yaml.safe_load(text.split("---\n")[1])


def test_the_hub_reads_the_card_of_a_version(every_split: PublishedVersion) -> None:
    card = DatasetCard(dataset_card(every_split.folder))
    assert (card.data.license, card.data.task_categories, card.data.size_categories) == (
        "unknown",
        ["image-to-image"],
        ["n<1K"],
    )
    assert card.data.pretty_name.endswith("simulated (not IXI)")


def test_a_card_has_the_figures_of_its_version(every_split: PublishedVersion) -> None:
    text, version = dataset_card(every_split.folder), metadata.read_metadata(every_split.folder)
    for split, count in version["splits"].items():
        assert f"| {split} | {count} |" in text
    for source in version["sources"].values():
        assert f"simulated: {source['simulated_volumes']} volumes | {source['md5']} |" in text
    for step, counts in version["funnel"].items():
        assert f"| {step} | {counts['all']} |" in text
    assert "Simulated data, not IXI." in text
    assert "CC BY-SA" not in text
    assert "Imperial College" not in text  # IXI is not cited for what is not IXI


def test_a_card_of_ixi_has_its_licence_and_credit(every_split: PublishedVersion, tmp_path: Path) -> None:
    sources = metadata.read_metadata(every_split.folder)["sources"]
    as_ixi = {
        label: {**{k: v for k, v in source.items() if k != "simulated_volumes"}, "source": "ixi"}
        for label, source in sources.items()
    }
    folder = with_metadata(every_split.folder, tmp_path / "ixi", sources=as_ixi, licence=LICENCE, credit=CREDIT)
    text = dataset_card(folder)
    assert DatasetCard(text).data.license == "cc-by-sa-3.0"
    assert f"Licence of the data: {LICENCE}. Credit: {CREDIT}." in text
    assert "must give this credit and use the same licence" in text
    assert "Imperial College" in text
    assert "imulated" not in text


MIXED_CREDITS = {
    "T1 with MRA": {
        "T1": describe_source("IXI-T1.tar", official("IXI-T1.tar").md5),
        "MRA": describe_source("IXI-MRA.tar", "0" * 32, from_ixi=True),
    },
    "single members with IXI.xls": {
        "T1": describe_source("IXI-T1.tar", None, from_ixi=True),
        "demographics": describe_source("IXI.xls", official("IXI.xls").md5),
    },
}


@pytest.mark.parametrize("sources", MIXED_CREDITS.values(), ids=MIXED_CREDITS)
def test_data_wholly_under_the_licence_of_ixi_have_it_on_the_hub(
    sources: dict[str, Any], every_split: PublishedVersion, copied: Run, tmp_path: Path
) -> None:
    terms = credit_and_licence(sources)
    assert terms["licence"] != LICENCE  # the licence of each source is named, because the credits differ
    folder = with_metadata(every_split.folder, tmp_path / "mixed", sources=sources, **terms)
    assert DatasetCard(dataset_card(folder)).data.license == "cc-by-sa-3.0"

    path = copied.folder / "config.json"
    record = read_json(path)
    for data, version in ((metadata.licence_of(folder), None), (terms, folder)):  # the latter is of an older run
        path.write_text(to_json(record | {"data": data}))
        assert ModelCard(model_card(copied.folder, copied.generator, version)).data.license == "cc-by-sa-3.0"


def test_one_source_under_another_licence_is_enough_to_name_none(every_split: PublishedVersion, tmp_path: Path) -> None:
    sources = MIXED_CREDITS["T1 with MRA"] | {"T2": describe_source("IXI-T2.tar", "0" * 32)}
    terms = credit_and_licence(sources)
    folder = with_metadata(every_split.folder, tmp_path / "mixed", sources=sources, **terms)
    assert DatasetCard(dataset_card(folder)).data.license == "unknown"
    assert metadata.licence_of(folder) == {**terms, "share_alike": False}


def test_records_of_older_code_still_have_cards(copied: Run, every_split: PublishedVersion, tmp_path: Path) -> None:
    path = copied.folder / "config.json"
    record = read_json(path)
    for older in (record | {"hardware": {}}, {k: v for k, v in record.items() if k not in ("hardware", "software")}):
        path.write_text(to_json(older))
        assert "Hardware:" not in card_of(copied)
    inputs = metadata.read_metadata(every_split.folder)["inputs"]
    config = {k: v for k, v in inputs["config"].items() if k not in ("registration", "pairing", "slices")}
    folder = with_metadata(every_split.folder, tmp_path / "older", inputs={"config": config})
    assert "Scans were aligned by their headers alone, not registered." in dataset_card(folder)


def test_an_evaluation_of_before_there_were_protocols_is_shown(copied: Run) -> None:
    path = copied.folder / "evaluation-test.json"
    evaluation = read_json(path)
    for part in ("summary", "comparison"):
        rows = [row for row in evaluation[part] if row["protocol"] == "ours"]
        evaluation[part] = [{k: v for k, v in row.items() if k != "protocol"} for row in rows]
    del evaluation["protocols"]
    path.write_text(to_json(evaluation))
    text = card_of(copied)
    assert "| ours | head | generated |" in text
    assert ModelCard(text).data.eval_results


def test_a_run_that_was_not_evaluated_claims_nothing(copied: Run) -> None:
    (copied.folder / "evaluation-test.json").unlink()
    text = card_of(copied)
    assert "This generator was not evaluated." in text
    assert ModelCard(text).data.eval_results is None
    assert "It was not measured on a test split." in text
    assert "PSNR, dB" not in text


def test_scores_of_other_weights_are_left_out(copied: Run) -> None:
    path = copied.folder / "evaluation-test.json"
    path.write_text(to_json(read_json(path) | {"weights_sha256": "0" * 64}))
    assert "This generator was not evaluated." in card_of(copied)


def test_a_run_without_its_version_still_has_a_card(finished_run: Run) -> None:
    text = model_card(finished_run.folder, finished_run.generator, None)
    assert "Trained on simulated data, not on IXI." in text
    assert "subjects for training" not in text


def test_cells_of_a_table_cannot_break_it() -> None:
    assert markdown_table([{"a|": "x|y\n<b>", "b": 1}]) == "| a\\| | b |\n| --- | --- |\n| x\\|y\\x0a&lt;b> | 1 |"
    assert markdown_table([]) == ""


def run_card(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["card", *map(str, arguments)])
    output = capsys.readouterr()
    return int(ended.value.code or 0), output.out, output.err


def test_the_command_prints_or_writes_the_card(
    finished_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, text = finished_run.folder.parents[1], card_of(finished_run)
    for shared in ("latest", "a", finished_run.folder):
        assert run_card(shared, "--root", root, capsys=capsys) == (0, text, "")
    version = dataset_card(finished_run.version)
    for shared in (finished_run.config.dataset, "ixi-t1-t2@latest", finished_run.version):
        assert run_card(shared, "--root", root, capsys=capsys) == (0, version, "")
    out = tmp_path / "CARD.md"
    assert run_card("a", "--root", root, "-o", out, capsys=capsys)[0] == 0
    assert out.read_text() == text
    _, printed, _ = run_card("a", "--root", root, "--json", capsys=capsys)
    assert json.loads(printed) == {"card": text, "warnings": []}


def test_the_folder_of_a_run_may_be_relative_and_have_an_at_sign_in_its_path(
    finished_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, text = finished_run.folder.parents[1], card_of(finished_run)
    assert text.split("---\n")[2].startswith("\n# a\n")
    monkeypatch.chdir(finished_run.folder)
    assert run_card(".", "--root", root, capsys=capsys) == (0, text, "")
    monkeypatch.chdir(finished_run.folder.parent)
    assert run_card("a", "--root", root, capsys=capsys) == (0, text, "")
    copy = shutil.copytree(finished_run.folder, tmp_path / "me@home" / "a")
    assert run_card(copy, "--root", root, capsys=capsys) == (0, text, "")


def test_the_folder_of_an_unfinished_run_is_one_line(
    finished_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "abc"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(finished_run.folder / "config.json", run)
    monkeypatch.chdir(run.parent)
    code, _, err = run_card("abc", capsys=capsys)
    assert (code, err.count("\n")) == (1, 1)
    assert f"{run} has no generator.safetensors yet" in err


@pytest.mark.parametrize("content", ["exported", "other"])
def test_another_folder_with_a_configuration_is_no_run(
    content: str, finished_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content == "exported":  # has the run's configuration, too
        export(finished_run.generator, "safetensors", tmp_path)
    else:
        (tmp_path / "config.json").write_text('{"model_type": "other"}')
        (tmp_path / "checkpoints").mkdir()
    code, _, err = run_card(tmp_path, "--root", finished_run.folder.parents[1], capsys=capsys)
    assert (code, err.count("\n")) == (1, 1)
    assert f"{tmp_path} is not a run's folder; give a run's name, or NAME@VERSION" in err


def test_an_unknown_name_is_one_line(finished_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run_card("zzz", "--root", finished_run.folder.parents[1], capsys=capsys)
    assert (code, err.count("\n")) == (1, 1)
    assert "there is no run zzz" in err
    assert "a dataset version is named NAME@VERSION" in err
