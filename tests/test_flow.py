"""The flow makes what the plain function makes, and a person's mistake is one line, not a trace."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import config_for

from ixi_etl.errors import DownloadError
from ixi_etl.refresh import Refreshed
from ixi_etl.serve import serve_folder


@pytest.fixture(scope="module", autouse=True)
def prefect() -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=60):
        yield


def test_the_flow_publishes_the_same_version_from_http(published: Refreshed, archives: Path, tmp_path: Path) -> None:
    from flows.refresh_dataset import refresh_dataset

    with serve_folder(archives) as url:
        done = refresh_dataset(config_for(tmp_path, url))
        again = refresh_dataset(config_for(tmp_path, url))
    assert (done.version, done.is_new) == (published.version, True)
    assert (again.version, again.is_new) == (published.version, False)
    assert (done.folder / "manifest.csv").read_bytes() == (published.folder / "manifest.csv").read_bytes()
    assert not list((tmp_path / "archives").glob("*.part*"))


def test_runs_have_names_a_person_can_read(archives: Path, tmp_path: Path) -> None:
    from prefect import get_client

    from flows.refresh_dataset import refresh_dataset

    refresh_dataset(config_for(tmp_path, archives))
    with get_client(sync_client=True) as client:
        names = {run.name for run in client.read_flow_runs()}
    assert f"refresh anatomical from {archives}" in names


def test_parameters_are_checked_at_the_door() -> None:
    from flows.refresh_dataset import refresh_dataset

    with pytest.raises(Exception, match="wormhole"):
        refresh_dataset(config={"root": "x", "wormhole": 1})


def test_a_person_s_mistake_is_not_tried_again(tmp_path: Path) -> None:
    from flows.refresh_dataset import refresh_dataset

    with pytest.raises(DownloadError, match="is not there"):  # three tries would last minutes
        refresh_dataset(config_for(tmp_path, tmp_path / "nowhere"))


def test_the_command_line_says_a_mistake_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows", "refresh", "--root", tmp_path / "root", "--source", tmp_path / "nowhere"],
        capture_output=True,
        text=True,
        env=os.environ | {"NO_COLOR": "1"},
        check=False,
    )
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line]
    assert lines == [f"error: {tmp_path}/nowhere/IXI-T1.tar is not there; --source wants IXI-T1.tar and IXI-T2.tar"], (
        done.stderr
    )


def test_the_command_line_refreshes_twice(published: Refreshed, archives: Path, tmp_path: Path) -> None:
    arguments = [
        "refresh",
        "--root",
        str(tmp_path),
        "--source",
        str(archives),
        "--slices",
        "12",
        "--registration",
        "none",
    ]
    for said in ("(published)", "(published before, nothing to do)"):
        done = subprocess.run([sys.executable, "-m", "flows", *arguments], capture_output=True, text=True, check=True)
        assert f"version   {published.version} {said}" in done.stdout
        assert "Traceback" not in done.stderr
