"""The failure drill: what happens if a worker is killed or the server is down.

Run by `make test-stack` after `test_stack`, on the same services.
"""

from __future__ import annotations

import json

import pytest
from running import (
    BUCKET,
    TRAINING,
    assert_same_version,
    refresh_config,
    run_folders,
    start_refresh_until_first_subject,
    start_run,
    start_run_by_command,
    wait_for_end,
)
from services import Stack

from ixi_etl.dataset.publish import PublishedVersion

pytestmark = pytest.mark.stack


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
    stack: Stack, lost_run: str, source: str, local_version: PublishedVersion
) -> None:
    stack.stop("worker-no-gpu")  # the versions published from here on need no training
    assert wait_for_end(stack, lost_run) == "CRASHED"  # set by the automation
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
