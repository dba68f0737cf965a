"""Lost runs are crashed and others are left alone, everyone who should be told is, and no training is forgotten.

All cases of lost runs wait for their heartbeats together: the least interval is 30 s, and three may be missed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from conftest import SHRINK, SLICES, config_for
from receivers import mail_server, webhook
from services import HTTP, PROJECT, Stack, wait_for

from ixi_etl.core.storage import DataRoot
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.dataset.versions import resolve_version
from ixi_etl.recipes.ixi import refresh
from ixi_etl.testing.phantom import write_phantom

pytestmark = pytest.mark.stack

KEY = "hunter2-of-the-webhook"
FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


@dataclass(frozen=True)
class Told:
    """The receivers of notifications, and what they got."""

    url: str
    requests: list[tuple[str, dict[str, Any]]]
    mail_port: int
    mails: list[Message]

    def texts(self, *parts: str) -> list[str]:
        """The texts sent to the webhook that contain all of the parts."""
        return [body["text"] for _, body in self.requests if all(part in body["text"] for part in parts)]


@pytest.fixture(scope="module")
def told() -> Iterator[Told]:
    with webhook() as (url, requests), mail_server() as (port, mails):
        yield Told(url, requests, port, mails)


@pytest.fixture(scope="module")
def stack(told: Told, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Stack]:
    """Server, pools and deployments; workers for ten runs in each pool, and a run that is older than the automation."""
    folder = tmp_path_factory.mktemp("stack")
    values = {"HEARTBEAT_S": "30", "IXI_NOTIFY": f"{told.url}/hook?key={KEY}"}
    with Stack(folder, values) as stack:
        try:
            stack.start_postgres()
            stack.start("server")
            stack.wait_for_server()
            stack.request("flows/", name="synthesize")
            start_without_process(stack, "older than the automation")
            deploy(stack)
            for service in ("worker-cpu", "worker-no-gpu"):
                command = stack.command(service)
                command[command.index("--limit") + 1] = "10"
                stack.spawn(service, command, stack.environment(service))
            yield stack
        finally:
            if request.session.testsfailed:
                print(f"logs: {folder}")
                for log in sorted(folder.glob("*.log")):
                    print(f"---- {log.name}", *log.read_text(errors="replace").splitlines()[-40:], sep="\n")


def deploy(stack: Stack) -> None:
    done = stack.run("deploy")
    assert done.returncode == 0, done.stdout + done.stderr


def flow_id(stack: Stack) -> str:
    return str(stack.request("flows/name/synthesize", "GET")["id"])


def start_without_process(stack: Stack, name: str) -> str:
    """A run that is Running but has sent no heartbeat, as if its process was killed at once."""
    run_id = str(stack.request("flow_runs/", flow_id=flow_id(stack), name=name)["id"])
    for state in ("PENDING", "RUNNING"):
        stack.request(f"flow_runs/{run_id}/set_state", state={"type": state})
    return run_id


def emit(stack: Stack, event: str, resource: dict[str, str], **others: Any) -> None:
    """Send an event to the server, as the client of Prefect does."""
    content = {"id": str(uuid4()), "occurred": datetime.now(UTC).isoformat(), "event": event, "resource": resource}
    auth = httpx.BasicAuth(*stack.values["PREFECT_AUTH"].split(":"))
    HTTP.post(f"{stack.url}/api/events", json=[content | others], auth=auth).raise_for_status()


def beat(stack: Stack, run_id: str) -> None:
    related = [
        {
            "prefect.resource.id": f"prefect.flow.{flow_id(stack)}",
            "prefect.resource.role": "flow",
            "prefect.resource.name": "synthesize",
        }
    ]
    emit(stack, "prefect.flow-run.heartbeat", {"prefect.resource.id": f"prefect.flow-run.{run_id}"}, related=related)


def state_name(stack: Stack, run_id: str) -> str:
    return str(stack.request(f"flow_runs/{run_id}", "GET")["state"]["name"])


def automations(stack: Stack) -> dict[str, Any]:
    """The automations without that of the trigger in `prefect.yaml`, which `prefect deploy` makes anew."""
    found = {automation["name"]: automation for automation in stack.request("automations/filter")}
    del found["train-new-versions"]
    return found


@pytest.fixture(scope="module")
def lives(stack: Stack) -> dict[str, str]:
    """Runs on two workers: one works on, and the other is killed with all of its runs. Name -> id."""

    def start(ending: str, pool: str) -> str:
        deployment = stack.request(
            "deployments/",
            name=f"{ending} in {pool}",
            flow_id=flow_id(stack),
            entrypoint="tests/stack/lives.py:live",
            pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(PROJECT)}}],
            work_pool_name=pool,
            parameter_openapi_schema={},
        )
        created = stack.request(f"deployments/{deployment['id']}/create_flow_run", parameters={"ending": ending})
        return str(created["id"])

    runs = {"cancelled": start("running on", "cpu"), "running on": start("running on", "cpu")}
    runs |= {ending: start(ending, "cpu") for ending in ("finished", "failed", "paused", "suspended")}
    runs |= {name: start("running on", "gpu") for name in ("killed", "killed, then cancelled")}
    runs["no heartbeat"] = start_without_process(stack, "no heartbeat")
    alive = ("cancelled", "running on", "killed", "killed, then cancelled")
    wait_for("runs to run", lambda: {state_name(stack, runs[name]) for name in alive} == {"Running"})
    wait_for("heartbeats", lambda: all(has_beaten(stack, runs[name]) for name in alive))
    stack.kill("worker-no-gpu")
    for name in ("cancelled", "killed, then cancelled"):
        stack.request(f"flow_runs/{runs[name]}/set_state", state={"type": "CANCELLING"})
    ends = {"cancelled": "Cancelled", "finished": "Completed", "failed": "Failed"}
    ends |= {"paused": "Paused", "suspended": "Suspended"}
    for name, state in ends.items():
        wait_for(f"the run that is {name}", lambda name=name, state=state: state_name(stack, runs[name]) == state)
    for name in ("finished", "cancelled"):  # a heartbeat that arrives after the end
        beat(stack, runs[name])
    return runs


def has_beaten(stack: Stack, run_id: str) -> bool:
    wanted = {"event": {"name": ["prefect.flow-run.heartbeat"]}, "resource": {"id": [f"prefect.flow-run.{run_id}"]}}
    return bool(stack.request("events/filter", filter=wanted)["total"])


# -- while heartbeats become overdue ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("lives")
def test_deploying_again_changes_no_automation(stack: Stack) -> None:
    before = automations(stack)
    deploy(stack)
    assert automations(stack) == before
    assert {"crash-lost-runs", "notify-failed-runs", "notify-late-runs", "notify-failed-checks"} < before.keys()


@pytest.mark.usefixtures("lives")
def test_a_failed_run_is_told_with_its_message_and_what_to_do(told: Told, stack: Stack, lives: dict[str, str]) -> None:
    [text] = wait_for("the notification", lambda: told.texts("synthesize: Failed"))
    assert "ValueError: the archive is damaged see the log" in text  # one line
    assert f"/runs/flow-run/{lives['failed']}" in text
    assert 'What to do: what the message says; then start it again, by "Retry" on its page.' in text


@pytest.mark.usefixtures("lives")
def test_failed_checks_are_told(told: Told, stack: Stack) -> None:
    payload = {"version": "0123456789ab", "root": "/data", "failed": "funnel_change: 0.4, limit 0.1", "held": True}
    resource = {"prefect.resource.id": "ixi.dataset.ixi-t1-t2", "prefect.resource.name": "ixi-t1-t2"}
    emit(stack, "ixi.dataset.checks_failed", resource, payload=payload)
    [text] = wait_for("the notification", lambda: told.texts("0123456789ab"))
    assert "funnel_change: 0.4, limit 0.1" in text
    assert "--param dataset=ixi-t1-t2@0123456789ab" in text


@pytest.mark.usefixtures("lives")
def test_a_run_that_no_worker_starts_is_told(told: Told, stack: Stack) -> None:
    """The worker of the pool gpu is dead. Ten minutes are shortened to ten seconds."""
    late = automations(stack)["notify-late-runs"]
    writable = ("name", "description", "enabled", "trigger", "actions")
    short = {name: late[name] for name in writable} | {"trigger": late["trigger"] | {"within": 10}}
    stack.request(f"automations/{late['id']}", "PUT", **short)
    [deployment] = stack.request("deployments/filter", deployments={"name": {"any_": ["running on in gpu"]}})
    created = stack.request(f"deployments/{deployment['id']}/create_flow_run", name="nobody starts me")
    [text] = wait_for("the notification", lambda: told.texts("nobody starts me"))
    assert "synthesize: Late" in text
    assert f"/runs/flow-run/{created['id']}" in text


# -- after three heartbeats -------------------------------------------------------------------------------------------


def test_lost_runs_are_crashed_and_all_others_left_alone(stack: Stack, lives: dict[str, str], told: Told) -> None:
    for name in ("killed", "no heartbeat"):
        wait_for(f"the end of the run: {name}", lambda name=name: stack.state_of(lives[name]) in FINAL)
    wait_for("the refused crashes", lambda: refused(stack) >= 3)
    states = {name: state_name(stack, run) for name, run in lives.items()}
    assert states == {
        "cancelled": "Cancelled",
        "running on": "Running",
        "finished": "Completed",
        "failed": "Failed",
        "paused": "Paused",
        "suspended": "Suspended",
        "killed": "Crashed",
        "killed, then cancelled": "Cancelling",  # the server refuses to crash it; `look-after` ends it
        "no heartbeat": "Crashed",
    }
    [text] = wait_for("the notification", lambda: told.texts(lives["killed"]))
    assert text.startswith("synthesize: Crashed")
    assert "No heartbeat" in text
    assert 'What to do: start it again, by "Retry" on its page.' in text
    assert not [name for name in ("finished", "cancelled", "paused", "suspended") if told.texts(lives[name])]


def test_the_real_end_of_a_run_replaces_a_crash_by_mistake(stack: Stack, lives: dict[str, str]) -> None:
    """As after an outage of the server that was longer than three heartbeats."""
    stack.request(f"flow_runs/{lives['no heartbeat']}/set_state", state={"type": "COMPLETED"})
    assert state_name(stack, lives["no heartbeat"]) == "Completed"


def refused(stack: Stack) -> int:
    """How often the server refused to crash a run that has ended or is cancelled."""
    found = stack.request("events/filter", filter={"event": {"name": ["prefect.automation.action.failed"]}})
    return len([event for event in found["events"] if "Failed to set state" in event["payload"]["reason"]])


# -- the training that an event did not start -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unannounced(stack: Stack, archives: Path) -> PublishedVersion:
    """A version whose event was lost."""
    return refresh(config_for(stack.localize("/data"), archives))


def look_after(stack: Stack, **parameters: object) -> None:
    stack.end_schedule("look-after")
    [deployment] = stack.request("deployments/filter", deployments={"name": {"any_": ["look-after"]}})
    created = stack.request(f"deployments/{deployment['id']}/create_flow_run", parameters=parameters)
    end = wait_for("look-after", lambda: (state := stack.state_of(created["id"])) in FINAL and state)
    assert end == "COMPLETED"


def trainings(stack: Stack) -> list[dict[str, Any]]:
    return [run["parameters"] for run in stack.runs_of("train-pix2pix")]


def test_look_after_starts_a_missing_training_once_and_ends_runs_that_the_automation_could_not(
    stack: Stack, unannounced: PublishedVersion, lives: dict[str, str]
) -> None:
    """The automation cannot know a run that was Running before it existed."""
    [old] = stack.request("flow_runs/filter", flow_runs={"name": {"any_": ["older than the automation"]}})
    look_after(stack, train_after=0)
    [training] = trainings(stack)
    assert training["dataset"] == f"ixi-t1-t2@{unannounced.version}"
    assert training["root"] == stack.localize("/data")
    look_after(stack, train_after=0)
    assert trainings(stack) == [training]
    assert stack.state_of(old["id"]) == "CRASHED"
    assert stack.state_of(lives["killed, then cancelled"]) == "CANCELLED"
    assert state_name(stack, lives["running on"]) == "Running"


# -- a version with failed checks -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held(stack: Stack, published: PublishedVersion) -> tuple[DataRoot, str]:
    """A run of refresh-dataset whose checks fail: its root, and its id. Archives of half the subjects follow others."""
    data_root, source = DataRoot(stack.localize("/data/held")), stack.folder / "fewer"
    shutil.copytree(published.folder.parents[2], data_root.root)
    write_phantom(source, subjects=3, seed=3, oddities=False, shrink=SHRINK)
    [deployment] = stack.request("deployments/filter", deployments={"name": {"any_": ["refresh-dataset"]}})
    dataset = {"slices": SLICES, "registration": "none"}  # as of the version before, or its funnel is not compared
    config = {"root": str(data_root.root), "source": str(source), "workers": 2, "dataset": dataset}
    created = stack.request(f"deployments/{deployment['id']}/create_flow_run", parameters={"config": config})
    end = wait_for("the refresh", lambda: (state := stack.state_of(created["id"])) in FINAL and state)
    assert end == "COMPLETED"
    return data_root, str(created["id"])


def test_a_refresh_with_failed_checks_is_told_as_held_and_starts_no_training(
    stack: Stack, told: Told, held: tuple[DataRoot, str]
) -> None:
    data_root, run_id = held
    version = resolve_version(data_root)
    [text] = wait_for("the notification", lambda: told.texts(version))
    assert text.startswith(f"ixi-t1-t2: checks failed in version {version}\n")
    assert "funnel_change: 0." in text
    assert f"Root: {data_root.root}\n" in text
    assert f"/runs/flow-run/{run_id}" in text
    assert "The version is published, but no training was started on it." in text
    wait_for("the stored event", lambda: payloads(stack, "ixi.dataset.checks_failed", version))
    assert not payloads(stack, "ixi.dataset.published", version)
    assert not [training for training in trainings(stack) if training["root"] == data_root.root]


def test_failed_checks_whose_event_was_lost_are_told_once(stack: Stack, told: Told, held: tuple[DataRoot, str]) -> None:
    """In another root, which has the same version."""
    root, version = stack.localize("/data/untold"), resolve_version(held[0])
    shutil.copytree(held[0].root, root)
    look_after(stack, root=root, train_after=0)
    [text] = wait_for("the notification", lambda: told.texts(version, f"Root: {root}\n"))
    assert "The version is published, but no training was started on it." in text

    def events() -> list[dict[str, Any]]:
        return [payload for payload in payloads(stack, "ixi.dataset.checks_failed", version) if payload["root"] == root]

    wait_for("the stored event", events)
    look_after(stack, root=root, train_after=0)
    assert len(events()) == 1
    assert told.texts(version, f"Root: {root}\n") == [text]
    roots = {root, str(held[0].root)}  # of the other one the server has long stored all events
    assert not [training for training in trainings(stack) if training["root"] in roots]
    assert not payloads(stack, "ixi.dataset.published", version)


def payloads(stack: Stack, event: str, version: str) -> list[dict[str, Any]]:
    """The payloads of the stored events with this name about this version."""
    found = stack.request("events/filter", filter={"event": {"name": [event]}})["events"]
    return [stored["payload"] for stored in found if stored["payload"]["version"] == version]


# -- other addresses --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("lives")
def test_the_address_is_in_no_log_and_no_answer_of_the_server(stack: Stack, told: Told) -> None:
    assert all(path == f"/hook?key={KEY}" for path, _ in told.requests)
    stack.values["IXI_NOTIFY"] = f"{told.url}/broken?key={KEY}"
    deploy(stack)
    stack.request(f"flow_runs/{start_without_process(stack, 'fails')}/set_state", state={"type": "FAILED"})
    wait_for("the request", lambda: [path for path, _ in told.requests if path.startswith("/broken")])
    failed = {"event": {"name": ["prefect.automation.action.failed"]}}
    wait_for("the failure", lambda: "Notification failed" in json.dumps(stack.request("events/filter", filter=failed)))
    answers = [stack.request("block_documents/filter"), stack.request("events/filter", filter=failed)]
    logs = "".join(log.read_text(errors="replace") for log in stack.folder.glob("*.log"))
    assert KEY not in json.dumps(answers) + logs


def test_notifications_go_by_mail(stack: Stack, told: Told) -> None:
    stack.values["IXI_NOTIFY"] = f"mailto://127.0.0.1:{told.mail_port}?from=ixi@example.org&to=me@example.org"
    deploy(stack)
    stack.request(f"flow_runs/{start_without_process(stack, 'fails')}/set_state", state={"type": "FAILED"})
    [mail] = wait_for("the mail", lambda: told.mails)
    assert mail["Subject"] == "synthesize: Failed"
    assert "me@example.org" in mail["To"]
    text = mail.get_payload(decode=True)
    assert isinstance(text, bytes)
    assert b"\nRun: fails\nMessage: none\nPage: http://" in text.replace(b"\r", b"")


def test_without_an_address_the_notifications_of_earlier_deploys_are_removed(stack: Stack) -> None:
    stack.values["IXI_NOTIFY"] = ""
    deploy(stack)
    assert not [name for name in automations(stack) if name.startswith("notify-")]
    assert stack.request("block_documents/filter") == []


def test_the_event_and_the_fallback_start_one_training(
    stack: Stack, archives: Path, unannounced: PublishedVersion
) -> None:
    version = refresh(config_for(stack.localize("/data"), archives, depth="any")).version
    resource = {"prefect.resource.id": "ixi.dataset.ixi-t1-t2", "prefect.resource.name": "ixi-t1-t2"}
    payload = {"version": version, "root": stack.localize("/data")}
    emit(stack, "ixi.dataset.published", resource, payload=payload)
    by_fallback, by_event = wait_for("the training", lambda: len(found := trainings(stack)) == 2 and found)
    assert by_event == by_fallback | {"dataset": f"ixi-t1-t2@{version}"}  # the same parameters
    look_after(stack, train_after=0)
    assert len(trainings(stack)) == 2
    assert DataRoot(stack.localize("/data")).version(version).is_dir()
