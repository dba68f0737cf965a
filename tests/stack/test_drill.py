"""The failure drill: a worker is killed, the server is down, a disk is full, a source is bad; who is told what.

Run by `make test-stack` after `test_stack`, on the same services. docs/operations.md has the notifications.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import (
    BUCKET,
    TRAINING,
    Told,
    assert_same_version,
    refresh_config,
    run_folders,
    start_refresh_until_first_subject,
    start_run,
    start_run_by_command,
    wait_for_end,
)
from services import Stack, wait_for

from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.testing.loopback import serve_folder

pytestmark = pytest.mark.stack


def notification(stack: Stack, told: Told, run_id: str) -> str:
    """The notification about the end of a run; asserts that it says which flow, why, where and what to do."""
    run = stack.request(f"flow_runs/{run_id}", "GET")
    text = told.wait_for_text(run_id)
    first, _, *lines = text.splitlines()
    flow = "refresh-dataset" if run["name"].startswith("refresh") else "train-pix2pix"
    assert first == f"{flow}: {run['state_name']}"
    assert lines[0] == f"Run: {run['name']}"
    assert lines[1].startswith(f"Message: {' '.join(run['state']['message'].split())}"[:500])
    assert lines[2] == f"Page: {stack.url}/runs/flow-run/{run_id}"
    assert lines[3].startswith("What to do: ")
    print(text)
    return text


# -- worker killed ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lost_run(stack: Stack, source: str) -> str:
    """The id of a run whose worker and all its processes were killed during the cut."""
    started = start_refresh_until_first_subject(stack, source, f"s3://{BUCKET}/worker-killed")
    stack.kill("worker-cpu")
    stack.start("worker-cpu")
    return started


@pytest.mark.usefixtures("lost_run")  # meanwhile the run's heartbeat becomes overdue
def test_deploying_again_changes_nothing(stack: Stack) -> None:
    before = sorted(automation["name"] for automation in stack.request("automations/filter"))
    assert stack.run("deploy").returncode == 0
    assert sorted(automation["name"] for automation in stack.request("automations/filter")) == before
    assert "crash-lost-runs" in before


@pytest.mark.usefixtures("lost_run")
def test_a_training_started_again_by_hand_makes_no_second_run(stack: Stack) -> None:
    settings = f"settings={json.dumps(TRAINING)}"  # deploying again has reset them
    assert wait_for_end(stack, start_run_by_command(stack, "train-pix2pix", "--param", settings)) == "COMPLETED"
    assert len(run_folders()) == 1


def test_after_the_loss_of_a_worker_the_next_run_publishes_the_same_version(
    stack: Stack, told: Told, lost_run: str, source: str, local_version: PublishedVersion
) -> None:
    stack.stop("worker-no-gpu")  # the versions published from here on need no training
    assert wait_for_end(stack, lost_run) == "CRASHED"  # set by the automation
    text = notification(stack, told, lost_run)
    assert "refresh-dataset: Crashed" in text
    assert "Message: No heartbeat: its process or machine is gone." in text
    assert 'What to do: start it again, by "Retry" on its page. A refresh or a training resumes.' in text
    root = f"s3://{BUCKET}/worker-killed"
    again = start_run(stack, "refresh-dataset", config=refresh_config(stack, source, root))
    assert wait_for_end(stack, again) == "COMPLETED"
    assert_same_version(root, local_version)


def test_a_refresh_survives_the_loss_of_a_dask_worker(
    stack: Stack, source: str, local_version: PublishedVersion
) -> None:
    started = start_refresh_until_first_subject(stack, source, f"s3://{BUCKET}/dask-worker-killed")
    stack.kill("dask-worker-1")
    assert wait_for_end(stack, started) == "COMPLETED"
    assert_same_version(f"s3://{BUCKET}/dask-worker-killed", local_version)
    stack.start("dask-worker", "dask-worker-1")


# -- server down ------------------------------------------------------------------------------------------------------


def test_after_a_restart_of_the_server_the_next_run_publishes_the_same_version(
    stack: Stack, source: str, local_version: PublishedVersion
) -> None:
    root = f"s3://{BUCKET}/server-restarted"
    started = start_refresh_until_first_subject(stack, source, root)
    stack.stop("server")
    stack.start("server")
    stack.wait_for_server()
    wait_for_end(stack, started)
    again = start_run(stack, "refresh-dataset", config=refresh_config(stack, source, root))
    assert wait_for_end(stack, again) == "COMPLETED"
    assert_same_version(root, local_version)


@pytest.fixture(scope="module")
def lost_in_outage(stack: Stack) -> str:
    """The id of a training run that was killed with its worker while the server was down."""
    stack.end_schedule("look-after")
    assert wait_for_end(stack, start_run(stack, "look-after")) == "COMPLETED"
    stack.start("worker-no-gpu")
    started = start_run(stack, "train-pix2pix", settings=TRAINING | {"steps": 100_000}, run="outage")
    resource = {"id": [f"prefect.flow-run.{started}"]}
    running = {"event": {"name": ["prefect.flow-run.Running"]}, "resource": resource}
    wait_for("the run on record", lambda: stack.request("events/filter", filter=running)["total"])
    stack.stop("server")
    stack.kill("worker-no-gpu")
    stack.start("server")
    stack.wait_for_server()
    return started


@pytest.mark.usefixtures("lost_in_outage")
def test_an_outage_of_the_server_is_notified(stack: Stack, told: Told) -> None:
    start_run(stack, "look-after", gap=0.01)  # minutes
    text = told.wait_for_text("Nothing was looked after for")
    print(text)
    assert "The Prefect server, or every worker of the pool cpu, was down." in text


# -- bad source, full disk: while the loss of that run becomes known --------------------------------------------------


@pytest.mark.usefixtures("lost_in_outage")
def test_a_host_without_the_archives_is_notified(stack: Stack, told: Told, source: str) -> None:
    config = refresh_config(stack, f"{source}/moved", f"s3://{BUCKET}/bad-source")
    failed = start_run(stack, "refresh-dataset", config=config)
    assert wait_for_end(stack, failed) == "FAILED"
    text = notification(stack, told, failed)
    assert "refresh-dataset: Failed" in text
    assert "404" in text


@pytest.mark.usefixtures("lost_in_outage")
def test_archives_with_another_md5_are_notified(
    stack: Stack, told: Told, archives_folder: Path, tmp_path: Path
) -> None:
    altered = Path(shutil.copytree(archives_folder, tmp_path / "altered"))
    with open(altered / "IXI-T1.tar", "r+b") as archive:
        archive.seek(10_000)
        archive.write(b"another byte")
    with serve_folder(altered) as url:
        config = refresh_config(stack, url, f"s3://{BUCKET}/bad-source")
        config["scratch"] = str(tmp_path / "scratch")  # the other one has verified archives
        failed = start_run(stack, "refresh-dataset", config=config)
        assert wait_for_end(stack, failed) == "FAILED"
    text = notification(stack, told, failed)
    assert "MD5" in text


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    if os.getuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.usefixtures("lost_in_outage")
def test_a_full_disk_is_notified(stack: Stack, told: Told, source: str, small_disk: Path) -> None:
    config = refresh_config(stack, source, f"s3://{BUCKET}/disk-full") | {"scratch": str(small_disk)}
    failed = start_run(stack, "refresh-dataset", config=config)
    assert wait_for_end(stack, failed) == "FAILED"
    assert "free" in notification(stack, told, failed)


def test_a_run_that_is_lost_while_the_server_is_down_is_crashed(stack: Stack, lost_in_outage: str) -> None:
    """Its notification is not waited for: Prefect holds the first event of a run after a restart for 15 minutes."""
    assert wait_for_end(stack, lost_in_outage) == "CRASHED"
    state = stack.request(f"flow_runs/{lost_in_outage}", "GET")["state"]
    assert state["message"] == "No heartbeat: its process or machine is gone."


def test_completed_runs_are_not_notified(stack: Stack, told: Told) -> None:
    completed = {"state": {"type": {"any_": ["COMPLETED"]}}}
    ids = [run["id"] for run in stack.request("flow_runs/filter", flow_runs=completed)]
    texts = "".join(body["text"] for _, body in told.requests)
    assert ids
    assert not any(run_id in texts for run_id in ids)


def test_no_service_exited(stack: Stack) -> None:
    assert stack.exited() == []
