"""A script gets one JSON object, a pipe gets plain lines, a terminal gets bars, and who wants quiet gets it."""

from __future__ import annotations

import json
import os
import pty
import re
from pathlib import Path

import pandas as pd
import pytest

from flows.cli import main
from flows.cli.output import Output
from flows.progress import show_progress
from ixi_etl import __version__
from ixi_etl.dataset.metadata import read_manifest
from ixi_etl.dataset.publish import PublishedVersion


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert not ended.value.code
    said = capsys.readouterr()
    return said.out, said.err


def test_json_is_one_object_with_what_the_tables_say(
    published: PublishedVersion, archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(published.folder.parents[2])
    said = json.loads(run("survey", "--source", str(archives), "--out", str(tmp_path), "--json", capsys=capsys)[0])
    assert Path(said["survey"]).read_text().count("\n") == said["members"] + 1
    assert sum(row["all"] for row in said["depths"]) + len(said["broken"]) >= said["members"]
    said = json.loads(run("verify", "--root", root, "--json", capsys=capsys)[0])
    assert said.pop("software")["ixi-etl"] == __version__
    named = {"folder": str(published.folder), "version": f"ixi-t1-t2@{published.version}"}
    assert said == named | {"sound": True, "checked": "files, schema and counts", "warnings": []}
    (row,) = json.loads(run("versions", "--root", root, "--json", capsys=capsys)[0])["ixi-t1-t2"]
    assert (row["version"], row["latest"]) == (f"ixi-t1-t2@{published.version}", True)
    version = published.version
    compared = json.loads(run("versions", version, version, "--root", root, "--json", capsys=capsys)[0])
    assert compared == {"inputs": [], "changes": [], "warnings": []}


def test_json_of_a_refresh_leads_to_all_that_it_made(
    published: PublishedVersion, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flows.cli.datasets.run_refresh", lambda _: published)  # the refresh has tests of its own
    said = json.loads(run("refresh", "--json", capsys=capsys)[0])
    assert said["version"] == published.version
    assert all(Path(said[name]).exists() for name in ("store", "manifest", "report"))
    assert said["funnel"][-1]["all"] == (read_manifest(published.folder)["status"] == "used").sum()
    assert {row["reason"] for row in said["exclusions"]} == set(read_manifest(published.folder)["reason"]) - {""}


def test_json_of_a_command_that_fails_has_the_error_and_what_was_found(
    refreshed: PublishedVersion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (refreshed.folder / "manifest.csv").write_text("cut short")
    with pytest.raises(SystemExit) as ended:
        main(["verify", "--root", str(tmp_path), "--json"])
    said = capsys.readouterr()
    answer = json.loads(said.out)
    assert ended.value.code == 1
    assert answer["sound"] is False
    assert answer["problems"]
    assert all(problem in said.err for problem in answer["problems"])
    assert f"error: {answer['error']}\n" in said.err


def test_json_has_the_warnings(refreshed: PublishedVersion, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (refreshed.folder / ".DS_Store").write_bytes(b"of a file browser")
    out, err = run("verify", "--root", str(tmp_path), "--json", capsys=capsys)
    (warning,) = json.loads(out)["warnings"]
    assert ".DS_Store" in warning
    assert warning in err


def test_brackets_and_colons_in_what_is_shown_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    say = Output()
    say.table("broken", pd.DataFrame({"[/a]": ["[/x].txt", ":smile:"]}), "members of [/b]")
    said = capsys.readouterr().out
    assert all(shown in said for shown in ("[/a]", "[/x].txt", ":smile:", "members of [/b]"))


def test_quiet_leaves_the_result_alone(archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["survey", "--source", str(archives), "--out", str(tmp_path)]
    out, err = run(*arguments, capsys=capsys)
    assert "survey T1: 100%" in err
    assert run(*arguments, "--quiet", capsys=capsys) == (out, "")


def test_a_terminal_gets_bars(archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with open(theirs, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        with pytest.raises(SystemExit) as ended:
            main(["survey", "--source", str(archives), "--out", str(tmp_path)])
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert not ended.value.code
    assert re.search(r"survey T1 .*━.*100%", shown)


def test_lines_come_at_the_start_and_the_end_and_not_with_every_step(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="ixi_etl")
    with show_progress() as progress:
        for done in range(1001):
            progress("cut", done, 1000, "subjects")
    told = [record.message for record in caplog.records]
    assert re.fullmatch(r"cut: 1000 of 1000 subjects, [\d.]+/s", told[-1])
    assert len(told) < 10


@pytest.mark.parametrize(("total", "said"), [(4_500_000_000, "2.25 of 4.50 GB"), (5_000_000, "2.50 of 5.00 MB")])
def test_bytes_are_told_in_the_unit_that_suits_the_whole(
    total: int, said: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", logger="ixi_etl")
    monkeypatch.setattr("flows.progress.LINE_EVERY_S", 0)
    with show_progress() as progress:
        progress("download IXI-T1.tar", total // 2, total, "B")
    assert said in caplog.text
