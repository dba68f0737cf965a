"""The deployed services as processes: schedule, refresh onto S3 on Dask, start of a training on the GPU pool, kills.

Run by `make test-stack`. Each test continues with the state that the previous one left.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from conftest import config_for, s3_environment
from services import PROJECT, SERVICES, Stack, wait_for

from ixi_etl.core.storage import DataRoot, to_path
from ixi_etl.dataset import metadata, verify, versions
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.recipes.ixi import refresh
from ixi_etl.testing.loopback import serve_folder
from ixi_etl.testing.phantom import write_phantom

pytestmark = pytest.mark.stack

BUCKET = "ixi"
ROOT = f"s3://{BUCKET}/root"
TRAINING = {"side": 64, "steps": 4, "width": 4, "discriminator_width": 4, "samples": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of the phantom's archives."""
    folder = tmp_path_factory.mktemp("served")
    write_phantom(folder, subjects=8, seed=3, shrink=4)
    with serve_folder(folder) as url:
        yield url


@pytest.fixture(scope="module")
def local_version(source: str, tmp_path_factory: pytest.TempPathFactory) -> PublishedVersion:
    """The version of a refresh on threads, with registration, so that the cut takes long enough to be interrupted."""
    return refresh(config_for(tmp_path_factory.mktemp("local"), source, registration="rigid"))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    values = {"IXI_ROOT": ROOT, "DASK_THREADS": "1", "HEARTBEAT_S": "30"}
    with Stack(folder, values) as stack:
        try:
            start_services(stack)
            with s3_environment({name: value for name, value in stack.values.items() if name.startswith("AWS_")}):
                yield stack  # the tests also read the bucket
        finally:
            if request.session.testsfailed:
                print(f"logs: {folder}")
                for log in sorted(folder.glob("*.log")):
                    print(f"---- {log.name}", *log.read_text(errors="replace").splitlines()[-40:], sep="\n")


def start_services(stack: Stack) -> None:
    """Start the services in the order of `depends_on`, deploy, and shorten the training."""
    stack.start_postgres()
    stack.start_s3(BUCKET)
    stack.start("server")
    stack.start("dask-scheduler")
    for number in (1, 2):
        stack.start("dask-worker", f"dask-worker-{number}")
    stack.wait_for_server()
    done = stack.run("deploy")
    assert done.returncode == 0, done.stdout + done.stderr
    [training] = stack.request("deployments/filter", deployments=named("train-pix2pix"))
    short = training["parameters"] | {"settings": TRAINING}
    stack.request(f"deployments/{training['id']}", "PATCH", parameters=short)
    stack.start("worker-cpu")
    stack.start("worker-no-gpu")


def named(deployment: str) -> dict[str, Any]:
    """The filter of a deployment."""
    return {"name": {"any_": [deployment]}}


def start_run(stack: Stack, deployment: str, **parameters: object) -> str:
    """Start a deployment through the API, without the seconds that `prefect` takes to import; return the run's id."""
    [matching] = stack.request("deployments/filter", deployments=named(deployment))
    return str(stack.request(f"deployments/{matching['id']}/create_flow_run", parameters=parameters)["id"])


def start_run_by_command(stack: Stack, deployment: str, *arguments: str) -> str:
    """Run `prefect deployment run`; return the run's id."""
    done = stack.run("worker-cpu", ["prefect", "deployment", "run", deployment, *arguments])
    assert done.returncode == 0, done.stdout + done.stderr
    return str(re.findall(r"UUID: (\S+)", done.stdout)[0])


def refresh_config(stack: Stack, source: str, root: str) -> dict[str, object]:
    """The configuration of a refresh on Dask."""
    return {
        "root": root,
        "scratch": stack.localize("/data"),
        "source": source,
        "dask": stack.localize("tcp://dask-scheduler:8786"),
        "dataset": {"slices": 12},
    }


def wait_for_end(stack: Stack, run_id: str) -> str:
    """Wait until a run ends; return its final state."""
    final = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
    return wait_for("the end of the run", lambda: (state := stack.state_of(run_id)) in final and state)


def assert_same_version(root: str, local_version: PublishedVersion) -> None:
    """The latest version of the root is `local_version`, with the same files, and verifies."""
    data_root = DataRoot(root)
    assert versions.resolve_version(data_root) == local_version.version
    folder = data_root.version(local_version.version)
    assert metadata.read_metadata(folder) == metadata.read_metadata(local_version.folder)
    assert verify.verify(folder, deep=True) == []


def run_folders() -> list[str]:
    """Names of the folders of training runs in the bucket."""
    return [folder.name for folder in (to_path(ROOT) / "runs").iterdir()]


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
    assert "anything" not in json.dumps(made)  # the key of the store


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


# -- failures ---------------------------------------------------------------------------------------------------------


def start_refresh_until_first_subject(stack: Stack, source: str, root: str) -> str:
    """Start a refresh into another root and wait for its first subject, while others remain; return the run's id."""
    started = start_run(stack, "refresh-dataset", config=refresh_config(stack, source, root))
    scratch = Path(stack.localize("/data"))
    wait_for("a first subject", lambda: list(scratch.glob("datasets/*/.staging/*/*/IXI*.json")))
    return started


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


def test_every_service_of_the_compose_file_ran_and_none_exited(stack: Stack) -> None:
    commands = {name: service.get("command") for name, service in SERVICES.items()}
    assert commands.pop("postgres") is None  # the command of its image; Debian's PostgreSQL ran
    assert commands.pop("worker-gpu") == commands["worker-no-gpu"]
    assert stack.used == commands.keys()
    assert stack.exited() == []
