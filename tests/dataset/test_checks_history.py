"""A version is compared with the one that was the latest before it; this changes no byte of the version itself."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import SHRINK, OnS3, config_for
from markup import page_of, text_of

from ixi_etl.core.storage import DataRoot
from ixi_etl.dataset import checks, checks_history, metadata, verify
from ixi_etl.dataset.checks_history import Described, HistoryFacts
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.recipes.ixi import refresh
from ixi_etl.testing.phantom import write_phantom


@pytest.fixture(scope="module")
def fewer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Archives of three healthy subjects, so that the funnel is another than that of `archives`."""
    folder = tmp_path_factory.mktemp("fewer")
    write_phantom(folder, subjects=3, seed=3, oddities=False, shrink=SHRINK)
    return folder


@pytest.fixture(scope="module")
def second(archives: Path, fewer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of two versions of one root, published one after the other, of `archives` and of `fewer`."""
    root = tmp_path_factory.mktemp("root")
    return tuple(refresh(config_for(root, source, pictures=False)).folder for source in (archives, fewer))  # type: ignore[return-value]


def compared(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / metadata.COMPARED).read_text())
    return content


def folder_before(data_root: DataRoot, version: str) -> Path | None:
    """The folder of the version that `version` is compared with, which has options of its own."""
    found = checks_history.find_before(data_root, {"version": version, "inputs": {"config": {}}})
    return found[0] if found else None


def page(folder: Path) -> str:
    return " ".join(text_of(page_of((folder / metadata.COMPARED_PAGE).read_text())).split())


def test_the_first_version_has_nothing_to_compare_with(published: PublishedVersion) -> None:
    content = compared(published.folder)
    assert (content["before"], content["failed"], content["held_by"]) == (None, [], [])
    assert [(result["value"], result["passed"]) for result in content["checks"]] == [(None, True)] * 2
    assert [row["version"] for row in content["history"]] == [published.version]
    assert "There is nothing to compare with: this is the first version" in page(published.folder)


def test_a_version_is_compared_with_the_one_before(second: tuple[Path, Path]) -> None:
    first, last = second
    content, old, new = compared(last), *map(metadata.read_metadata, second)
    assert content["before"] == first.name
    found = {row["step"]: row for row in content["funnel"]}
    assert (found["found"]["before"], found["found"]["now"]) == (old["funnel"]["found"]["all"], 3)
    assert found["used"]["share_now"] == 1
    assert found["used"]["change"] == pytest.approx(1 - old["subjects"] / old["funnel"]["found"]["all"], abs=1e-6)
    assert {row["reason"]: row["change"] for row in content["reasons"]}["unreadable"] == -1
    assert [row["what"] for row in content["inputs"]] == ["archives_md5.T1", "archives_md5.T2"]
    values = {row["check"]: row for row in content["values"]}
    assert (values["subjects"]["before"], values["subjects"]["now"]) == (old["subjects"], new["subjects"])
    assert [row["version"] for row in content["history"]] == [first.name, last.name]
    assert content["history"][0]["checks"]["subjects"]["value"] == old["subjects"]


@pytest.mark.parametrize("damage", ["manifest", "columns", "funnel"])
def test_a_version_that_cannot_be_read_is_not_compared_with(
    damage: str, published: PublishedVersion, tmp_path: Path
) -> None:
    """Such as one of an older release: the refresh must not fail after its cut."""
    root = Path(shutil.copytree(published.folder.parents[2], tmp_path / "root"))
    folder = root / "datasets" / "ixi-t1-t2" / published.version
    manifest, described = folder / metadata.MANIFEST, folder / metadata.METADATA
    assert folder_before(DataRoot(root), "another") == folder
    if damage == "funnel":
        described.write_text(json.dumps(json.loads(described.read_text()) | {"funnel": {}}))
    else:
        manifest.write_text("subject_id\n" if damage == "columns" else "\0")
    assert folder_before(DataRoot(root), "another") is None


def test_a_changed_funnel_holds_the_hand_off(second: tuple[Path, Path]) -> None:
    first, last = second
    assert checks.held_by(first) == []
    assert "funnel_change" in checks.held_by(last)
    [failure] = [result for result in checks.failed_checks(last) if result["name"] == "funnel_change"]
    assert (failure["at_most"], failure["value"]) == (0.1, max(map(abs, failure["details"].values())))
    text = page(last)
    assert "The hand-off to training is held." in text
    assert f"compared with {first.name}" in text


def test_the_checks_of_the_version_itself_do_not_depend_on_the_root(
    second: tuple[Path, Path], fewer: Path, tmp_path: Path
) -> None:
    alone = refresh(config_for(tmp_path, fewer, pictures=False)).folder
    for name in (metadata.METADATA, metadata.REPORT, metadata.README, metadata.CROISSANT):
        assert (alone / name).read_bytes() == (second[1] / name).read_bytes()
    assert (alone / metadata.COMPARED).read_bytes() != (second[1] / metadata.COMPARED).read_bytes()
    assert not {metadata.COMPARED, metadata.COMPARED_PAGE} & metadata.read_metadata(alone)["files"].keys()


def test_a_failed_check_only_warns_if_told_so(
    second: tuple[Path, Path], fewer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = Path(shutil.copytree(second[0].parents[2], tmp_path / "root"))
    shutil.rmtree(root / "datasets/ixi-t1-t2" / second[1].name)
    with caplog.at_level(logging.WARNING):
        made = refresh(config_for(root, fewer, pictures=False).model_copy(update={"checks": "warn"}))
    assert (made.version, made.is_new) == (second[1].name, True)  # the option is no part of the name
    assert "funnel_change" in [result["name"] for result in checks.failed_checks(made.folder)]
    assert "check failed: funnel_change: " in caplog.text
    assert "the hand-off to training is held" not in caplog.text
    assert checks.held_by(made.folder) == []


@pytest.mark.parametrize("max_change", [0.1, 1.0])
def test_the_limit_of_the_change_of_the_funnel_can_be_set(max_change: float, second: tuple[Path, Path]) -> None:
    summary, final = metadata.read_metadata(second[1]), metadata.read_manifest(second[1])
    content = checks_history.compare(DataRoot(second[0].parents[2]), summary, final, "block", max_change)
    assert ("funnel_change" in content["held_by"]) == (max_change < 1)


@pytest.mark.parametrize("name", [metadata.COMPARED, metadata.COMPARED_PAGE])
def test_damage_of_either_file_is_found(name: str, published: PublishedVersion, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(published.folder, tmp_path / published.version))
    assert verify.verify(copy) == []
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    [problem] = verify.verify(copy)
    assert problem.startswith(f"{copy / name} is damaged: ")
    assert verify.read_verified(copy)[0] == metadata.read_metadata(copy)  # the data are intact


@pytest.mark.parametrize("name", [metadata.COMPARED, metadata.COMPARED_PAGE])
def test_a_file_that_is_missing_is_found(name: str, published: PublishedVersion, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(published.folder, tmp_path / published.version))
    (copy / name).unlink()
    assert verify.verify(copy) == [f"{copy / name} is missing"]


@pytest.mark.parametrize("name", metadata.UNHASHED)
def test_a_version_is_not_made_again_for_a_file_that_no_data_depend_on(
    name: str, archives: Path, refreshed: PublishedVersion, tmp_path: Path
) -> None:
    (refreshed.folder / name).write_text("damaged")
    assert not refresh(config_for(tmp_path, archives)).is_new
    assert (refreshed.folder / name).read_text() == "damaged"
    [problem] = verify.verify(refreshed.folder)
    assert problem.startswith(f"{refreshed.folder / name} is damaged: ")


def test_a_version_that_cannot_be_read_is_passed_over(
    second: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = Path(shutil.copytree(second[0].parents[2], tmp_path / "root"))
    data_root = DataRoot(root)
    assert folder_before(data_root, "another") == data_root.version(second[1].name)
    assert folder_before(data_root, second[1].name) == data_root.version(second[0].name)
    (data_root.version(second[1].name) / metadata.METADATA).write_text("{}")
    assert folder_before(data_root, "another") == data_root.version(second[0].name)
    assert "is not compared with" in caplog.text


def test_a_version_made_the_latest_again_is_the_one_compared_with(second: tuple[Path, Path], tmp_path: Path) -> None:
    data_root = DataRoot(shutil.copytree(second[0].parents[2], tmp_path / "root"))
    pointer = json.loads((data_root.datasets / metadata.POINTER).read_text())
    again = pointer["history"][0]
    again_latest = again | {"history": [*pointer["history"], again]}
    (data_root.datasets / metadata.POINTER).write_text(json.dumps(again_latest))
    assert folder_before(data_root, "another") == data_root.version(second[0].name)


def test_a_version_is_compared_with_the_last_one_of_the_same_options(
    second: tuple[Path, Path], archives: Path, fewer: Path, tmp_path: Path
) -> None:
    """A change of the options changes the funnel, and is no fault of the data."""
    root = Path(shutil.copytree(second[0].parents[2], tmp_path / "root"))
    shutil.rmtree(root / "datasets/ixi-t1-t2" / second[1].name)
    others = config_for(root, fewer, pictures=False, depth="any")
    made = refresh(others)
    content, text = compared(made.folder), page(made.folder)
    assert (content["before"], content["same_options"], content["held_by"]) == (second[0].name, False, [])
    assert [(result["value"], result["passed"]) for result in content["checks"]] == [(None, True)] * 2
    assert f"compared with {second[0].name}, the last version before it, which has other options" in text
    assert "No version before it has the same options, so the checks of the changes do not apply." in text
    assert "config.depth" in {row["what"] for row in content["inputs"]}
    again = compared(refresh(config_for(root, fewer, pictures=False)).folder)
    assert (again["before"], again["same_options"]) == (second[0].name, True)
    assert "funnel_change" in again["held_by"]


@pytest.mark.parametrize("name", [metadata.METADATA, metadata.MANIFEST])
def test_a_version_that_cannot_be_read_now_is_not_passed_over(
    name: str, second: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as after an error of S3: its successor might not be held."""
    data_root, read_bytes = DataRoot(second[0].parents[2]), Path.read_bytes

    def fail(path: Path) -> bytes:
        if path.name == name:
            raise OSError(errno.EIO, "the server is busy")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match="the server is busy") as raised:
        folder_before(data_root, "another")
    assert raised.value.filename == str(second[1] / name)


def test_a_lost_site_is_found_however_small(published: PublishedVersion) -> None:
    summary = metadata.read_metadata(published.folder)
    funnel = json.loads(json.dumps(summary["funnel"]))
    site = next(name for name, n in funnel["used"]["sites"].items() if n)
    funnel["used"]["sites"][site] = 0
    before = Described(summary, {})
    facts = HistoryFacts(replace(before, summary=summary | {"funnel": funnel}), before, 0.1)
    results = {result["name"]: result for result in checks.run_checks(checks_history.CHECKS, facts)}
    assert (results["funnel_change"]["passed"], results["funnel_change"]["value"]) == (True, 0)
    assert (results["sites_gone"]["passed"], results["sites_gone"]["details"].keys()) == (False, {site})


def test_a_version_before_of_an_older_pipeline_has_no_values(published: PublishedVersion) -> None:
    summary = metadata.read_metadata(published.folder)
    older = {key: value for key, value in summary.items() if key != "checks"}
    rows = checks_history.changed_values(older.get("checks", []), summary["checks"])
    assert {(row["before"], row["change"], row["passed_before"]) for row in rows} == {(None, None, None)}


def test_the_page_is_self_contained_and_links_to_the_report(second: tuple[Path, Path]) -> None:
    elements = list(page_of((second[1] / metadata.COMPARED_PAGE).read_text()).iter())
    targets = {element.get(name, "") for element in elements for name in ("src", "href") if name in element.attrib}
    assert {target for target in targets if not target.startswith("#")} == {metadata.REPORT}
    assert any(e.get("content", "").startswith("default-src 'none'") for e in elements)


def test_both_files_are_on_s3_too(on_s3: OnS3, published: PublishedVersion) -> None:
    for name in (metadata.COMPARED, metadata.COMPARED_PAGE):
        assert (on_s3.made.folder / name).read_bytes() == (published.folder / name).read_bytes()
    assert checks.held_by(on_s3.made.folder) == []
