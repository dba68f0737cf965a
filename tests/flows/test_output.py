"""`--json` prints one JSON object, a pipe gets plain lines, a terminal gets bars, `--quiet` hides progress."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import sys
from contextlib import ExitStack
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
    output = capsys.readouterr()
    return output.out, output.err


def test_json_is_one_object_with_the_content_of_the_tables(
    published: PublishedVersion, archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(published.folder.parents[2])
    result = json.loads(run("survey", "--source", str(archives), "--out", str(tmp_path), "--json", capsys=capsys)[0])
    assert Path(result["survey"]).read_text().count("\n") == result["members"] + 1
    assert sum(row["all"] for row in result["depths"]) + len(result["broken"]) >= result["members"]
    result = json.loads(run("verify", "--root", root, "--json", capsys=capsys)[0])
    assert result.pop("software")["ixi-etl"] == __version__
    identity = {"folder": str(published.folder), "version": f"ixi-t1-t2@{published.version}"}
    assert result == identity | {"sound": True, "checked": "files, schema and counts", "warnings": []}
    (row,) = json.loads(run("versions", "--root", root, "--json", capsys=capsys)[0])["ixi-t1-t2"]
    assert (row["version"], row["latest"]) == (f"ixi-t1-t2@{published.version}", True)
    version = published.version
    compared = json.loads(run("versions", version, version, "--root", root, "--json", capsys=capsys)[0])
    assert compared == {"inputs": [], "changes": [], "warnings": []}


def test_json_of_a_refresh_names_every_output(
    published: PublishedVersion, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flows.cli.datasets.run_refresh", lambda _: published)  # other tests cover the refresh
    result = json.loads(run("refresh", "--json", capsys=capsys)[0])
    assert result["version"] == published.version
    assert all(Path(result[name]).exists() for name in ("store", "manifest", "report"))
    assert result["funnel"][-1]["all"] == (read_manifest(published.folder)["status"] == "used").sum()
    assert {row["reason"] for row in result["exclusions"]} == set(read_manifest(published.folder)["reason"]) - {""}


def test_json_of_a_failed_verify_has_the_error_and_the_problems(
    refreshed: PublishedVersion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (refreshed.folder / "manifest.csv").write_text("cut short")
    with pytest.raises(SystemExit) as ended:
        main(["verify", "--root", str(tmp_path), "--json"])
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert ended.value.code == 1
    assert result["sound"] is False
    assert result["problems"]
    assert all(problem in err for problem in result["problems"])
    assert f"error: {result['error']}\n" in err


def test_a_reader_that_stops_reading_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in `ixi-etl --help | head`."""
    reader, writer = os.pipe()

    def write(_: object) -> None:
        output.write("a first line\n")
        output.flush()
        os.close(reader)
        output.write("x" * (1 << 20))  # more than Python's buffers, which drop it when it cannot be written

    monkeypatch.setattr("flows.cli.datasets.run_refresh", write)
    with open(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as ended:
            main(["refresh"])
    assert (ended.value.code, capsys.readouterr().err) == (1, "")


@pytest.mark.parametrize("output", ["a pipe", "a file", "captured"])
def test_a_broken_pipe_of_a_command_is_an_error(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("flows.cli.datasets.run_refresh", fail)
    with ExitStack() as streams:
        if output != "captured":
            reader, writer = os.pipe()
            streams.enter_context(open(reader))
            pipe = streams.enter_context(open(writer, "w"))
            file = streams.enter_context(open(tmp_path / "output", "w"))
            monkeypatch.setattr(sys, "stdout", pipe if output == "a pipe" else file)
        with pytest.raises(SystemExit) as ended:
            main(["refresh"])
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: a connection broke (broken pipe); run the same command again\n"


def test_json_lists_the_warnings(
    refreshed: PublishedVersion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (refreshed.folder / ".DS_Store").write_bytes(b"written by a file browser")
    out, err = run("verify", "--root", str(tmp_path), "--json", capsys=capsys)
    (warning,) = json.loads(out)["warnings"]
    assert ".DS_Store" in warning
    assert warning in err


def test_brackets_and_colons_in_tables_are_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    Output().table("broken", pd.DataFrame({"[/a]": ["[/x].txt", ":smile:"]}), "members of [/b]")
    output = capsys.readouterr().out
    assert all(text in output for text in ("[/a]", "[/x].txt", ":smile:", "members of [/b]"))


def test_quiet_prints_the_same_result_without_progress(
    archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["survey", "--source", str(archives), "--out", str(tmp_path)]
    out, err = run(*arguments, capsys=capsys)
    assert "survey T1: 100%" in err
    assert run(*arguments, "--quiet", capsys=capsys) == (out, "")


def test_terminal_shows_progress_bars(archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    controller, terminal_end = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with open(terminal_end, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        with pytest.raises(SystemExit) as ended:
            main(["survey", "--source", str(archives), "--out", str(tmp_path)])
    shown = os.read(controller, 65536).decode()
    os.close(controller)
    assert not ended.value.code
    assert re.search(r"survey T1 .*━.*100%", shown)


def test_progress_lines_are_rate_limited_and_include_the_last_step(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="ixi_etl")
    with show_progress() as progress:
        for done in range(1001):
            progress("cut", done, 1000, "subjects")
    messages = [record.message for record in caplog.records]
    assert re.fullmatch(r"cut: 1000 of 1000 subjects, [\d.]+/s", messages[-1])
    assert len(messages) < 10


@pytest.mark.parametrize(("total", "shown"), [(4_500_000_000, "2.25 of 4.50 GB"), (5_000_000, "2.50 of 5.00 MB")])
def test_byte_counts_use_the_unit_of_the_total(
    total: int, shown: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", logger="ixi_etl")
    monkeypatch.setattr("flows.progress.LINE_EVERY_S", 0)
    with show_progress() as progress:
        progress("download IXI-T1.tar", total // 2, total, "B")
    assert shown in caplog.text
