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
import yaml
from conftest import config_for, s3_at
from services import PROJECT, SERVICES, Stack, wait_until

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
def local(source: str, tmp_path_factory: pytest.TempPathFactory) -> PublishedVersion:
    """The version that one process on threads makes of the same archives; with registration, so that a cut lasts."""
    return refresh(config_for(tmp_path_factory.mktemp("local"), source, registration="rigid"))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    values = {"IXI_ROOT": ROOT, "DASK_THREADS": "1", "HEARTBEAT_S": "30"}
    with Stack(folder, values) as stack:
        try:
            start(stack)
            with s3_at({name: value for name, value in stack.values.items() if name.startswith("AWS_")}):
                yield stack  # the tests look into the bucket, too
        finally:
            if request.session.testsfailed:
                print(f"the logs lie in {folder}")
                for log in sorted(folder.glob("*.log")):
                    print(f"---- {log.name}", *log.read_text(errors="replace").splitlines()[-40:], sep="\n")


def start(stack: Stack) -> None:
    """In the order of docker-compose.yml's `depends_on`."""
    stack.start_postgres()
    stack.start_s3(BUCKET)
    stack.start("server")
    stack.start("dask-scheduler")
    for number in (1, 2):
        stack.start("dask-worker", f"dask-worker-{number}")
    stack.wait_for_server()
    done = stack.run("deploy")
    assert done.returncode == 0, done.stdout + done.stderr
    [training] = stack.ask("deployments/filter", deployments={"name": {"any_": ["train-pix2pix"]}})
    few = training["parameters"] | {"settings": TRAINING}
    stack.ask(f"deployments/{training['id']}", "PATCH", parameters=few)
    stack.start("worker-cpu")
    stack.start("worker-no-gpu")


def run(stack: Stack, deployment: str, **parameters: object) -> str:
    """Start a deployment through the API, which takes no seconds to import; the run's id."""
    [found] = stack.ask("deployments/filter", deployments={"name": {"any_": [deployment]}})
    return str(stack.ask(f"deployments/{found['id']}/create_flow_run", parameters=parameters)["id"])


def type_run(stack: Stack, deployment: str, *arguments: str) -> str:
    """Type `prefect deployment run`; the run's id."""
    done = stack.run("worker-cpu", ["prefect", "deployment", "run", deployment, *arguments])
    assert done.returncode == 0, done.stdout + done.stderr
    return str(re.findall(r"UUID: (\S+)", done.stdout)[0])


def refresh_into(stack: Stack, source: str, root: str) -> dict[str, object]:
    """The refresh's configuration."""
    return {
        "root": root,
        "scratch": stack.here("/data"),
        "source": source,
        "dask": stack.here("tcp://dask-scheduler:8786"),
        "dataset": {"slices": 12},
    }


def end_of(stack: Stack, run: str) -> str:
    """The state that a run ends in."""
    final = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
    return wait_until("the end of the run", lambda: (state := stack.state_of(run)) in final and state)


def assert_same_bytes(root: str, local: PublishedVersion) -> None:
    """What `local` is, is in the bucket, the latest there, and sound to the last byte."""
    data_root = DataRoot(root)
    assert versions.resolve_version(data_root) == local.version
    assert metadata.read_metadata(data_root.version(local.version)) == metadata.read_metadata(local.folder)
    assert verify.verify(data_root.version(local.version), deep=True) == []


def trained() -> list[str]:
    """The runs that are kept in the bucket."""
    return [folder.name for folder in (to_path(ROOT) / "runs").iterdir()]


# -- deployed ---------------------------------------------------------------------------------------------------------


def test_the_deployments_are_there_and_the_schedule_made_runs(stack: Stack) -> None:
    wanted = yaml.safe_load((PROJECT / "prefect.yaml").read_text())["deployments"]
    assert {d["name"] for d in stack.ask("deployments/filter")} == {d["name"] for d in wanted}
    runs = wait_until("scheduled runs", lambda: [r for r in stack.ask("flow_runs/filter") if r["auto_scheduled"]])
    assert {run["work_pool_name"] for run in runs} == {"cpu"}
    assert "03:17:00" in runs[0]["expected_start_time"]


def test_who_does_not_say_the_password_is_refused(stack: Stack) -> None:
    for auth in (None, ("admin", "guess")):
        answer = httpx.post(f"{stack.url}/api/deployments/filter", json={}, auth=auth)
        assert answer.status_code == 401


# -- refreshed and trained --------------------------------------------------------------------------------------------


def test_a_refresh_onto_s3_cut_on_dask_makes_the_same_bytes(stack: Stack, source: str, local: PublishedVersion) -> None:
    config = json.dumps(refresh_into(stack, source, ROOT))
    assert end_of(stack, type_run(stack, "refresh-dataset", "--param", f"config={config}")) == "COMPLETED"
    assert_same_bytes(ROOT, local)


def test_the_new_version_is_handed_over_to_the_gpu_pool(stack: Stack, local: PublishedVersion) -> None:
    [started] = wait_until("a run of the training", lambda: stack.runs_of("train-pix2pix"))
    assert started["parameters"]["dataset"] == f"ixi-t1-t2@{local.version}"
    assert started["work_pool_name"] == "gpu"
    assert end_of(stack, started["id"]) == "COMPLETED"
    [name] = trained()
    assert (to_path(ROOT) / "runs" / name / "generator.safetensors").is_file()


def test_a_refresh_that_changes_nothing_starts_nothing(stack: Stack, source: str) -> None:
    config = json.dumps(refresh_into(stack, source, ROOT))
    typed = type_run(stack, "refresh-dataset/refresh-dataset", "--param", f"config={config}")
    assert end_of(stack, typed) == "COMPLETED"
    told = stack.ask("events/filter", filter={"event": {"name": ["ixi.dataset.published"]}})
    assert told["total"] == 1
    assert len(stack.runs_of("train-pix2pix")) == 1


# -- killed -----------------------------------------------------------------------------------------------------------


def cut_under_way(stack: Stack, source: str, root: str) -> str:
    """Start a refresh into another root; the run's id, when a first subject is done and others are not."""
    started = run(stack, "refresh-dataset", config=refresh_into(stack, source, root))
    scratch = Path(stack.here("/data"))
    wait_until("a first subject", lambda: list(scratch.glob("datasets/*/.staging/*/*/IXI*.json")))
    return started


@pytest.fixture(scope="module")
def lost(stack: Stack, source: str) -> str:
    """A run whose worker died during the cut, with all its processes."""
    started = cut_under_way(stack, source, f"s3://{BUCKET}/worker-killed")
    stack.kill("worker-cpu")
    stack.start("worker-cpu")
    return started


@pytest.mark.usefixtures("lost")  # it takes its time to be found lost
def test_to_deploy_again_changes_nothing(stack: Stack) -> None:
    before = sorted(automation["name"] for automation in stack.ask("automations/filter"))
    assert stack.run("deploy").returncode == 0
    assert sorted(automation["name"] for automation in stack.ask("automations/filter")) == before
    assert "crash-lost-runs" in before


@pytest.mark.usefixtures("lost")
def test_a_training_started_by_hand_is_not_done_twice(stack: Stack) -> None:
    settings = f"settings={json.dumps(TRAINING)}"  # which deploying again took away
    assert end_of(stack, type_run(stack, "train-pix2pix", "--param", settings)) == "COMPLETED"
    assert len(trained()) == 1


def test_after_the_death_of_a_worker_the_next_run_ends_the_same(
    stack: Stack, lost: str, source: str, local: PublishedVersion
) -> None:
    stack.stop("worker-no-gpu")  # the versions that are published from here on need not be trained on
    assert end_of(stack, lost) == "CRASHED"  # by the automation: nobody else can say so
    root = f"s3://{BUCKET}/worker-killed"
    again = run(stack, "refresh-dataset", config=refresh_into(stack, source, root))
    assert end_of(stack, again) == "COMPLETED"
    assert_same_bytes(root, local)


def test_a_dask_worker_that_dies_costs_nothing(stack: Stack, source: str, local: PublishedVersion) -> None:
    started = cut_under_way(stack, source, f"s3://{BUCKET}/dask-worker-killed")
    stack.kill("dask-worker-1")
    assert end_of(stack, started) == "COMPLETED"
    assert_same_bytes(f"s3://{BUCKET}/dask-worker-killed", local)
    stack.start("dask-worker", "dask-worker-1")


def test_after_a_restart_of_the_server_the_next_run_ends_the_same(
    stack: Stack, source: str, local: PublishedVersion
) -> None:
    root = f"s3://{BUCKET}/server-restarted"
    started = cut_under_way(stack, source, root)
    stack.stop("server")
    stack.start("server")
    stack.wait_for_server()
    end_of(stack, started)
    again = run(stack, "refresh-dataset", config=refresh_into(stack, source, root))
    assert end_of(stack, again) == "COMPLETED"
    assert_same_bytes(root, local)


def test_every_service_of_the_compose_file_ran_and_none_died_of_itself(stack: Stack) -> None:
    commands = {name: service.get("command") for name, service in SERVICES.items()}
    assert commands.pop("postgres") is None  # its image's own; Debian's ran
    assert commands.pop("worker-gpu") == commands["worker-no-gpu"]
    assert stack.ran == commands.keys()
    assert stack.lost() == []
