"""The running services that the test modules of this folder share, their passwords, and helpers to run flows on them.

Every secret is random and different, so that `test_secrets` can search for it.
"""

from __future__ import annotations

import base64
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import config_for, s3_environment
from receivers import webhook
from servers import Call, Host, serve
from services import Stack, wait_for

from ixi_etl.core.storage import DataRoot, to_path
from ixi_etl.dataset import metadata, verify, versions
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.recipes.ixi import refresh
from ixi_etl.testing.phantom import write_phantom

BUCKET = "ixi"
ROOT = f"s3://{BUCKET}/root"
TRAINING = {"side": 64, "steps": 4, "width": 4, "discriminator_width": 4, "samples": 1, "device": "cpu"}

ORDER = ("test_stack.py", "test_drill.py", "test_secrets.py")
"""Modules that share the services, and each continue with the state that the previous one left."""

HOST_PASSWORD = secrets.token_urlsafe(20)
SECRETS = {
    "S3 secret key, in a block": f"{secrets.token_urlsafe(20)}/+{secrets.token_hex(5)}",
    "S3 secret key, in the environment": f"{secrets.token_urlsafe(20)}/+{secrets.token_hex(5)}",
    "password of the archives' host, in ~/.netrc": HOST_PASSWORD,
    "password of the database": secrets.token_hex(16),
    "password of the Prefect server": secrets.token_hex(16),
    "key of the webhook": secrets.token_urlsafe(20),
    "key that encrypts blocks": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
}


@dataclass(frozen=True)
class Told:
    """A webhook: its address, and the path and JSON of each request to it."""

    url: str
    requests: list[tuple[str, dict[str, Any]]]

    def wait_for_text(self, *parts: str) -> str:
        """Wait for a notification whose text has all parts, and return the text."""
        return wait_for(
            f"a notification with {parts}",
            lambda: next((b["text"] for _, b in self.requests if all(part in b["text"] for part in parts)), None),
            120,
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ORDER.index(item.path.name) if item.path.name in ORDER else -1)


@pytest.fixture(scope="session")
def archives_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    write_phantom(folder, subjects=8, seed=3, shrink=4)
    return folder


@pytest.fixture(scope="session")
def source(archives_folder: Path) -> Iterator[str]:
    """The URL of the phantom's archives, on a host that asks for a password."""
    wanted = f"Basic {base64.b64encode(f'me:{HOST_PASSWORD}'.encode()).decode()}"

    def answer(call: Call) -> None:
        known = call.path in call.host.files
        if call.headers.get("authorization") != wanted:
            call.plain(401)
        elif known:
            call.correct()
        else:
            call.plain(404)

    files = {f"/{path.name}": path.read_bytes() for path in archives_folder.iterdir()}
    with serve(Host(b"", answer, files=files)) as host:
        yield host.url.rpartition("/")[0]


@pytest.fixture(scope="session")
def local_version(archives_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PublishedVersion:
    """The version of a refresh on threads, with registration, so that the cut takes long enough to be interrupted."""
    return refresh(config_for(tmp_path_factory.mktemp("local"), archives_folder, registration="rigid"))


@pytest.fixture(scope="session")
def told() -> Iterator[Told]:
    """What a webhook on loopback receives: it is the address of IXI_NOTIFY."""
    with webhook() as (url, requests):
        yield Told(f"{url}/hook?key={SECRETS['key of the webhook']}", requests)


@pytest.fixture(scope="session")
def stack(told: Told, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    values = {
        "IXI_ROOT": ROOT,
        "IXI_SECRETS": "AWS_SECRET_ACCESS_KEY",
        "IXI_NOTIFY": told.url,
        "DASK_THREADS": "1",
        "HEARTBEAT_S": "30",
        "POSTGRES_PASSWORD": SECRETS["password of the database"],
        "PREFECT_AUTH": f"admin:{SECRETS['password of the Prefect server']}",
        "PREFECT_ENCRYPTION_KEY": SECRETS["key that encrypts blocks"],
    }
    netrc = folder / ".netrc"  # the home of all services is this folder
    netrc.touch(0o600)
    netrc.write_text(f"machine 127.0.0.1 login me password {HOST_PASSWORD}\n")
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
    stack.start_s3(BUCKET, SECRETS["S3 secret key, in the environment"])
    stack.start("server")
    stack.start("dask-scheduler")
    for number in (1, 2):
        stack.start("dask-worker", f"dask-worker-{number}")
    stack.wait_for_server()
    create_secret_block(stack, "aws-secret-access-key", SECRETS["S3 secret key, in a block"])
    done = stack.run("deploy")
    assert done.returncode == 0, done.stdout + done.stderr
    [training] = stack.request("deployments/filter", deployments=named("train-pix2pix"))
    short = training["parameters"] | {"settings": TRAINING}
    stack.request(f"deployments/{training['id']}", "PATCH", parameters=short)
    stack.start("worker-cpu")
    stack.start("worker-no-gpu")


def create_secret_block(stack: Stack, name: str, value: str) -> None:
    """Create a Secret block, as the page Blocks of the server does."""
    kind = stack.request("block_types/slug/secret", "GET")["id"]
    [schema] = stack.request("block_schemas/filter", block_schemas={"block_type_id": {"any_": [kind]}})
    ids = {"block_type_id": kind, "block_schema_id": schema["id"]}
    stack.request("block_documents/", name=name, data={"value": value}, **ids)


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


def start_refresh_until_first_subject(stack: Stack, source: str, root: str) -> str:
    """Start a refresh into another root and wait for its first subject, while others remain; return the run's id."""
    started = start_run(stack, "refresh-dataset", config=refresh_config(stack, source, root))
    scratch = Path(stack.localize("/data"))
    wait_for("a first subject", lambda: list(scratch.glob("datasets/*/.staging/*/*/IXI*.json")), every_s=0.02)
    return started
