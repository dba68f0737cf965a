"""The deployed services as processes: schedule, refresh onto S3 on Dask, start of a training on the GPU pool.

Run by `make test-stack`. Each test continues with the state that the previous one left; `test_drill` continues with
failures.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import httpx
import pytest
import yaml
from running import ROOT, assert_same_version, named, refresh_config, run_folders, start_run_by_command, wait_for_end
from services import PROJECT, SERVICES, Stack, wait_for

from ixi_etl.core.storage import to_path
from ixi_etl.dataset.publish import PublishedVersion

pytestmark = pytest.mark.stack


# -- deployment -------------------------------------------------------------------------------------------------------


def test_all_deployments_exist_and_the_schedule_created_runs(stack: Stack) -> None:
    wanted = yaml.safe_load((PROJECT / "prefect.yaml").read_text())["deployments"]
    assert {d["name"] for d in stack.request("deployments/filter")} == {d["name"] for d in wanted}
    for name, times in (("refresh-dataset", ("03:17:00",)), ("look-after", ("00:00", "15:00", "30:00", "45:00"))):
        runs = wait_for(
            f"scheduled runs of {name}", partial(stack.request, "flow_runs/filter", deployments=named(name))
        )
        assert {run["work_pool_name"] for run in runs} == {"cpu"}
        assert all(any(time in run["expected_start_time"] for time in times) for run in runs)


def test_requests_without_the_password_are_refused(stack: Stack) -> None:
    for auth in (None, ("admin", "guess")):
        response = httpx.post(f"{stack.url}/api/deployments/filter", json={}, auth=auth)
        assert response.status_code == 401


# -- refresh and training ---------------------------------------------------------------------------------------------


def test_a_refresh_onto_s3_on_dask_publishes_the_same_version(
    stack: Stack, source: str, local_version: PublishedVersion
) -> None:
    config = json.dumps(refresh_config(stack, source, ROOT))
    assert (
        wait_for_end(stack, start_run_by_command(stack, "refresh-dataset", "--param", f"config={config}"))
        == "COMPLETED"
    )
    assert_same_version(ROOT, local_version)


def test_a_new_version_starts_a_training_on_the_gpu_pool(stack: Stack, local_version: PublishedVersion) -> None:
    [started] = wait_for("a run of the training", lambda: stack.runs_of("train-pix2pix"))
    assert started["parameters"]["dataset"] == f"ixi-t1-t2@{local_version.version}"
    assert started["work_pool_name"] == "gpu"
    assert wait_for_end(stack, started["id"]) == "COMPLETED"
    [name] = run_folders()
    assert (to_path(ROOT) / "runs" / name / "generator.safetensors").is_file()


def test_the_lineage_of_the_version_and_the_run_is_on_the_server(stack: Stack, local_version: PublishedVersion) -> None:
    def events(name: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = stack.request("events/filter", filter={"event": {"name": [name]}})["events"]
        return found

    dataset, [run] = f"{ROOT}/datasets/ixi-t1-t2", run_folders()
    made = wait_for(
        "both assets", lambda: len(found := events("prefect.asset.materialization.succeeded")) == 2 and found
    )
    by_key = {event["resource"]["prefect.resource.id"]: event for event in made}
    assert by_key.keys() == {dataset, f"{ROOT}/runs/{run}"}
    assert by_key[dataset]["payload"]["version"] == local_version.version
    assert by_key[dataset]["payload"]["checks_failed"] == []
    upstream = {key: upstream_of(event) for key, event in by_key.items()}
    assert upstream == {dataset: [], f"{ROOT}/runs/{run}": [dataset]}
    assert [event["resource"]["prefect.resource.id"] for event in events("prefect.asset.referenced")] == [dataset]


def upstream_of(event: dict[str, Any]) -> list[str]:
    """Keys of the assets from which the asset of an event was made."""
    assets = [each for each in event["related"] if each["prefect.resource.role"] == "asset"]
    return [each["prefect.resource.id"] for each in assets]


def test_a_refresh_without_changes_starts_no_training(stack: Stack, source: str) -> None:
    config = json.dumps(refresh_config(stack, source, ROOT))
    started = start_run_by_command(stack, "refresh-dataset/refresh-dataset", "--param", f"config={config}")
    assert wait_for_end(stack, started) == "COMPLETED"
    events = stack.request("events/filter", filter={"event": {"name": ["ixi.dataset.published"]}})
    assert events["total"] == 1
    assert len(stack.runs_of("train-pix2pix")) == 1


def test_every_service_of_the_compose_file_ran_and_none_exited(stack: Stack) -> None:
    commands = {name: service.get("command") for name, service in SERVICES.items()}
    assert commands.pop("postgres") is None  # the command of its image; Debian's PostgreSQL ran
    assert commands.pop("worker-gpu") == commands["worker-no-gpu"]
    assert stack.used == commands.keys()
    assert stack.exited() == []
