"""What is deployed fits the flows, the server and the containers it is deployed with."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.deploy import POOLS, crash_lost_runs
from ixi_etl.config import RefreshConfig

PROJECT = Path(__file__).parent.parent
DEPLOYMENTS = {d["name"]: d for d in yaml.safe_load((PROJECT / "prefect.yaml").read_text())["deployments"]}


def flow_of(deployment: dict[str, Any]) -> Any:
    from prefect.flows import load_flow_from_entrypoint

    return load_flow_from_entrypoint(str(PROJECT / deployment["entrypoint"]))


@pytest.mark.parametrize("name", sorted(DEPLOYMENTS))
def test_a_deployment_is_of_a_flow_of_its_name_with_parameters_it_has(name: str) -> None:
    deployment = DEPLOYMENTS[name]
    flow = flow_of(deployment)
    given = set(deployment["parameters"])
    for trigger in deployment.get("triggers", ()):
        given |= set(trigger["parameters"])
    assert flow.name == name  # so that its bare name says it all
    assert given <= set(inspect.signature(flow.fn).parameters)
    assert deployment["work_pool"]["name"] in POOLS


def test_the_refresh_s_parameters_are_a_configuration() -> None:
    given = DEPLOYMENTS["refresh-dataset"]["parameters"]["config"]
    assert given.keys() == {"root", "scratch", "dask"}
    for root, scratch in (("/data", "/data"), ("/data", ""), ("s3://bucket", "/data")):
        config = RefreshConfig(root=root, scratch=scratch, dask="")  # a variable that is not set is ""
        assert (config.places.root, config.dask or None) == (root, None)


def test_a_root_that_is_not_said_is_not_this_folder() -> None:
    with pytest.raises(ValueError, match="'' is neither a folder nor s3://"):
        RefreshConfig(root="")  # what comes out of prefect.yaml where IXI_ROOT is not set


def test_missed_refreshes_do_not_pile_up() -> None:
    refresh = DEPLOYMENTS["refresh-dataset"]
    assert refresh["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}
    assert [schedule["cron"] for schedule in refresh["schedules"]] == ["17 3 * * 1"]


def test_the_training_waits_for_the_event_that_the_refresh_emits(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import refresh_dataset
    from ixi_etl.refresh import Refreshed

    emitted: dict[str, Any] = {}

    def emit_event(event: str, resource: dict[str, str], payload: dict[str, str]) -> None:
        emitted.update(event=event, resource=resource, payload=payload)

    monkeypatch.setattr(refresh_dataset, "emit_event", emit_event)
    refresh_dataset.announce(RefreshConfig(root="s3://b/x"), Refreshed("0123456789ab", Path("x"), is_new=True))
    [trigger] = DEPLOYMENTS["train-pix2pix"]["triggers"]
    assert trigger["expect"] == [emitted["event"]]
    assert trigger["match"].items() <= emitted["resource"].items()
    assert trigger["parameters"] == {
        "dataset": "ixi-t1-t2@{{ event.payload.version }}",
        "root": "{{ event.payload.root }}",
    }
    assert emitted["payload"] == {"version": "0123456789ab", "root": "s3://b/x"}


def test_the_preset_of_the_hand_over_is_chosen_and_is_a_small_one_where_nobody_chose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker without a GPU does not begin 49,200 steps unasked."""
    from flows import deploy

    assert DEPLOYMENTS["train-pix2pix"]["parameters"]["preset"] == "{{ $IXI_PRESET }}"
    assert deploy.DEFAULTS["IXI_PRESET"] == "smoke"
    assert SERVICES["deploy"]["environment"]["IXI_PRESET"] == "${IXI_PRESET:-smoke}"
    assert "\nIXI_PRESET=smoke\n" in ENV_EXAMPLE
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.setenv("IXI_PRESET", "smok")
    with pytest.raises(SystemExit, match="IXI_PRESET is smok; set one of paper, digits, smoke, gpu"):
        deploy.main()


def test_a_run_is_lost_only_after_several_heartbeats() -> None:
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: 40}):
        trigger: Any = crash_lost_runs().trigger
    assert trigger.within.total_seconds() == 120
    assert {"prefect.flow-run.heartbeat", "prefect.flow-run.Crashed"} < trigger.expect


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (None, "no Prefect server is configured; set PREFECT_API_URL"),
        ("http://127.0.0.1:9/api", "no Prefect server answers at http://127.0.0.1:9/api"),
    ],
    ids=["none", "one that does not answer"],
)
def test_deploying_without_a_server_is_one_line(url: str | None, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows import deploy

    with temporary_settings({PREFECT_API_URL: url}), pytest.raises(SystemExit) as ended:
        deploy.main()
    line = str(ended.value.code)  # which Python prints; the exit status is 1
    assert line.startswith(f"error: {said}")
    assert "\n" not in line
    assert capfd.readouterr() == ("", "")


# -- containers -------------------------------------------------------------------------------------------------------

COMPOSE = yaml.safe_load((PROJECT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ENV_EXAMPLE = (PROJECT / ".env.example").read_text()


def test_the_compose_file_keeps_its_schema() -> None:
    checker = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*checker, PROJECT / "docker-compose.yml"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_what_the_compose_file_demands_stands_in_the_example() -> None:
    text = (PROJECT / "docker-compose.yml").read_text()
    demanded = set(re.findall(r"\$\{(\w+):\?", text))
    assert demanded == {"POSTGRES_PASSWORD", "PREFECT_AUTH"}
    for name in set(re.findall(r"\$\{(\w+)", text)):
        assert f"\n{name}=" in ENV_EXAMPLE


def test_profiles_in_the_example_exist() -> None:
    [given] = re.findall(r"^COMPOSE_PROFILES=(.+)$", ENV_EXAMPLE, re.MULTILINE)
    assert {profile for service in SERVICES.values() for profile in service.get("profiles", ())} >= {given, "no-gpu"}


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_service_is_pinned_closed_and_unprivileged(name: str) -> None:
    service = SERVICES[name]
    image, _, tag = service["image"].partition(":")
    assert tag not in ("", "latest")
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert service["security_opt"] == ["no-new-privileges:true"]
    if image == "ixi-etl":
        assert service["build"]["target"] == tag
        assert "user" not in service  # the image's own, which is none of root's
    else:
        assert service["user"] not in ("root", "0")
    for other, wanted in service.get("depends_on", {}).items():
        assert wanted["condition"] != "service_healthy" or "healthcheck" in SERVICES[other]


def test_images_are_built_from_the_constraints_and_end_unprivileged() -> None:
    stages = re.split(r"^FROM ", (PROJECT / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]
    assert {re.search(r"AS (\w+)", stage)[1] for stage in stages} == {  # type: ignore[index]
        service["build"]["target"] for service in SERVICES.values() if "build" in service
    }
    for stage in stages:
        assert stage.count("pip install") == stage.count("--constraint constraints.txt") == 1
        assert re.findall(r"^USER (\w+)$", stage, re.MULTILINE)[-1] == "ixi"


def test_only_the_server_and_postgres_keep_the_passwords_they_need() -> None:
    knows = {name for name, service in SERVICES.items() if "POSTGRES_PASSWORD" in str(service)}
    assert knows == {"postgres", "server"}


def test_prefect_s_settings_do_not_show_the_passwords(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from prefect.cli.config import view
    from prefect.settings import temporary_settings
    from prefect.settings.models.root import Settings

    secrets = {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": "postgresql+asyncpg://prefect:hunter2@postgres:5432/prefect",
        "PREFECT_SERVER_API_AUTH_STRING": "admin:hunter2",
        "PREFECT_API_AUTH_STRING": "admin:hunter2",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    auth = settings.api.auth_string
    assert auth is not None
    assert auth.get_secret_value() == secrets["PREFECT_API_AUTH_STRING"]
    assert "hunter2" not in repr(settings) + str(settings)
    with temporary_settings():
        view()  # `prefect config view`
    shown = capsys.readouterr().out
    assert "PREFECT_API_AUTH_STRING" in shown
    assert "hunter2" not in shown
