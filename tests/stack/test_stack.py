"""The whole stack, as processes: schedule, refresh onto S3 by way of Dask, hand-over to the GPU pool, and kills.

Every test goes on from where the one before it ended: `make test-stack`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from conftest import config_for
from services import Stack, wait_until

from ixi_etl import dataset
from ixi_etl.phantom import write_phantom
from ixi_etl.refresh import Refreshed, refresh
from ixi_etl.serve import serve_folder

pytestmark = pytest.mark.stack

DATASET = {"slices": 12}  # with registration: enough work for a kill to land in
TRAINING = {"steps": 20, "width": 8}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of the phantom's archives."""
    folder = tmp_path_factory.mktemp("served")
    write_phantom(folder, subjects=8, seed=3, shrink=4)
    with serve_folder(folder) as url:
        yield url


@pytest.fixture(scope="module")
def local(source: str, tmp_path_factory: pytest.TempPathFactory) -> Refreshed:
    """The version that one process on threads makes of the same archives."""
    return refresh(config_for(tmp_path_factory.mktemp("local"), source, registration="rigid"))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    values = {"IXI_ROOT": ROOT, "DASK_THREADS": "1", "HEARTBEAT_S": "30"}
    with Stack(folder, values) as stack:
        try:
            start(stack)
            yield stack
        finally:
            if request.session.testsfailed:
                print(f"the logs lie in {folder}")
                for log in sorted(folder.glob("*.log")):
                    print(f"---- {log.name}", *log.read_text(errors="replace").splitlines()[-40:], sep="\n")


def start(stack: Stack) -> None:
    """In the order of docker-compose.yml's `depends_on`."""
    stack.start_postgres()
    stack.start("server")
    stack.start("dask-scheduler")
    for number in (1, 2):
        stack.start("dask-worker", f"dask-worker-{number}")
    stack.wait_for_server()
    done = stack.run("deploy")
    assert done.returncode == 0, done.stdout + done.stderr
    for deployment in stack.ask("deployments/filter", deployments={"name": {"any_": ["train-pix2pix"]}}):
        few = deployment["parameters"] | {"settings": TRAINING}
        stack.ask(f"deployments/{deployment['id']}", "PATCH", parameters=few)
    stack.start("worker-cpu")
    stack.start("worker-no-gpu")


def refresh_parameters(stack: Stack, source: str, root: str) -> str:
    config = {
        "root": root,
        "source": source,
        "dask": stack.here("tcp://dask-scheduler:8786"),
        "dataset": DATASET,
    }
    return f"config={json.dumps(config)}"


def deployed_run(stack: Stack, deployment: str, *arguments: str) -> str:
    """Type `prefect deployment run`; the run's id."""
    done = stack.run("worker-cpu", ["prefect", "deployment", "run", deployment, *arguments])
    assert done.returncode == 0, done.stdout + done.stderr
    return str(re.findall(r"UUID: (\S+)", done.stdout)[0])


def final_state(stack: Stack, run_id: str, seconds: float = 120) -> str:
    final = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
    return wait_until("the end of the run", lambda: (s := stack.state_of(run_id)) in final and s, seconds)


def test_the_deployments_are_there_and_the_schedule_made_runs(stack: Stack) -> None:
    made = {d["name"] for d in stack.ask("deployments/filter")}
    assert made == {"refresh-dataset", "train-pix2pix"}
    scheduled = {"auto_scheduled": True}
    runs = wait_until(
        "scheduled runs",
        lambda: [r for r in stack.ask("flow_runs/filter") if scheduled.items() <= r.items()],
    )
    assert {run["work_pool_name"] for run in runs} == {"cpu"}


def test_to_deploy_again_changes_nothing(stack: Stack) -> None:
    before = {a["name"] for a in stack.ask("automations/filter")}
    assert stack.run("deploy").returncode == 0
    after = [a["name"] for a in stack.ask("automations/filter")]
    assert sorted(after) == sorted(before)
    assert "crash-lost-runs" in after


def test_who_does_not_say_the_password_is_refused(stack: Stack) -> None:
    assert httpx.post(f"{stack.url}/api/deployments/filter", json={}).status_code == 401
    assert httpx.post(f"{stack.url}/api/deployments/filter", json={}, auth=("admin", "guess")).status_code == 401


def test_a_refresh_cut_on_dask_makes_the_same_bytes(stack: Stack, source: str, local: Refreshed) -> None:
    root = stack.here("/data")
    run = deployed_run(stack, "refresh-dataset", "--param", refresh_parameters(stack, source, root))
    assert final_state(stack, run) == "COMPLETED"
    places = dataset.Places(Path(root))
    assert dataset.resolve(places) == local.version
    assert dataset.read_facts(places.version(local.version)) == dataset.read_facts(local.folder)
    assert dataset.verify(places.version(local.version), deep=True) == []


def test_the_new_version_is_handed_over_to_the_gpu_pool(stack: Stack, local: Refreshed) -> None:
    runs = wait_until("a run of the training", lambda: stack.runs_of("train-pix2pix"))
    assert final_state(stack, runs[0]["id"]) == "COMPLETED"
    assert runs[0]["parameters"]["dataset"] == f"ixi-t1-t2@{local.version}"
    assert runs[0]["work_pool_name"] == "gpu"
    assert len(trained(stack)) == 1


def test_a_refresh_that_changes_nothing_starts_nothing(stack: Stack, source: str) -> None:
    parameters = refresh_parameters(stack, source, stack.here("/data"))
    run = deployed_run(stack, "refresh-dataset/refresh-dataset", "--param", parameters)
    assert final_state(stack, run) == "COMPLETED"
    told = stack.ask("events/filter", filter={"event": {"name": ["ixi.dataset.published"]}})
    assert told["total"] == 1
    assert len(stack.runs_of("train-pix2pix")) == 1


@pytest.mark.parametrize("name", ["train-pix2pix", "train-pix2pix/train-pix2pix"])
def test_a_training_started_by_hand_is_not_done_twice(stack: Stack, name: str) -> None:
    assert final_state(stack, deployed_run(stack, name)) == "COMPLETED"
    assert len(trained(stack)) == 1


def trained(stack: Stack) -> list[str]:
    """The run folders that there are."""
    return [folder.name for folder in Path(stack.here("/data"), "runs").iterdir()]


# -- kills ------------------------------------------------------------------------------------------------------------


def cut_under_way(stack: Stack, source: str, root: Path) -> str:
    """Start a refresh into another root; the run's id, as soon as a first subject is done and others are not."""
    run = deployed_run(stack, "refresh-dataset", "--param", refresh_parameters(stack, source, str(root)))
    wait_until("a first subject", lambda: list(root.glob("datasets/*/.staging/*/work/*.json")))
    return run


def assert_same_bytes(root: Path, local: Refreshed) -> None:
    places = dataset.Places(root)
    assert dataset.resolve(places) == local.version
    assert dataset.read_facts(places.version(local.version)) == dataset.read_facts(local.folder)
    assert dataset.verify(places.version(local.version), deep=True) == []


def test_a_dask_worker_that_dies_costs_nothing(stack: Stack, source: str, local: Refreshed) -> None:
    root = Path(stack.here("/data/dask-killed"))
    run = cut_under_way(stack, source, root)
    stack.kill("dask-worker-1")
    assert final_state(stack, run) == "COMPLETED"
    assert_same_bytes(root, local)
    stack.start("dask-worker", "dask-worker-1")


def test_after_a_restart_of_the_server_the_next_run_ends_the_same(stack: Stack, source: str, local: Refreshed) -> None:
    root = Path(stack.here("/data/server-restarted"))
    run = cut_under_way(stack, source, root)
    stack.stop("server")
    stack.start("server")
    stack.wait_for_server()
    final_state(stack, run)
    again = deployed_run(stack, "refresh-dataset", "--param", refresh_parameters(stack, source, str(root)))
    assert final_state(stack, again) == "COMPLETED"
    assert_same_bytes(root, local)


def test_after_the_death_of_a_worker_the_next_run_ends_the_same(stack: Stack, source: str, local: Refreshed) -> None:
    root = Path(stack.here("/data/worker-killed"))
    run = cut_under_way(stack, source, root)
    stack.kill("worker-cpu")
    stack.start("worker-cpu")
    assert final_state(stack, run) == "CRASHED"  # by the automation: nobody else can say so
    again = deployed_run(stack, "refresh-dataset", "--param", refresh_parameters(stack, source, str(root)))
    assert final_state(stack, again) == "COMPLETED"
    assert_same_bytes(root, local)


def test_no_service_died_of_itself(stack: Stack) -> None:
    assert stack.lost() == []
