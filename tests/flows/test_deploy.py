"""The deployments match the flows and the server; the containers match the deployments."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.automations import FLOWS, crash_lost_runs
from flows.deploy import POOLS
from ixi_etl.config import RefreshConfig
from ixi_etl.core.files import to_json
from ixi_etl.dataset.metadata import COMPARED, with_digest

PROJECT = Path(__file__).parents[2]
DEPLOYMENTS = {d["name"]: d for d in yaml.safe_load((PROJECT / "prefect.yaml").read_text())["deployments"]}


def flow_of(deployment: dict[str, Any]) -> Any:
    from prefect.flows import load_flow_from_entrypoint

    return load_flow_from_entrypoint(str(PROJECT / deployment["entrypoint"]))


@pytest.mark.parametrize("name", sorted(DEPLOYMENTS))
def test_deployment_has_the_name_and_parameters_of_its_flow(name: str) -> None:
    deployment = DEPLOYMENTS[name]
    flow = flow_of(deployment)
    given = set(deployment["parameters"])
    for trigger in deployment.get("triggers", ()):
        given |= set(trigger["parameters"])
    assert flow.name == name  # so that the bare name is unambiguous
    assert given <= set(inspect.signature(flow.fn).parameters)
    assert deployment["work_pool"]["name"] in POOLS


def test_refresh_parameters_are_a_valid_configuration() -> None:
    given = DEPLOYMENTS["refresh-dataset"]["parameters"]["config"]
    assert given.keys() == {"root", "scratch", "dask"}
    for root, scratch in (("/data", "/data"), ("/data", ""), ("s3://bucket", "/data")):
        config = RefreshConfig(root=root, scratch=scratch, dask="")  # an unset variable gives ""
        assert (config.data_root.root, config.dask or None) == (root, None)


def test_empty_root_is_refused() -> None:
    with pytest.raises(ValueError, match="'' is neither a folder nor s3://"):
        RefreshConfig(root="")  # prefect.yaml gives this if IXI_ROOT is not set


def test_training_is_triggered_by_the_event_of_the_refresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from flows import announce

    emitted: dict[str, Any] = {}

    def emit_event(event: str, resource: dict[str, str], payload: dict[str, str]) -> None:
        emitted.update(event=event, resource=resource, payload=payload)

    monkeypatch.setattr(announce, "emit_event", emit_event)
    data_root = RefreshConfig(root=str(tmp_path)).data_root
    folder = data_root.version("0123456789ab")
    folder.mkdir(parents=True)
    (folder / COMPARED).write_text(to_json(with_digest({"failed": [], "held_by": []})))
    announce.announce(data_root, "0123456789ab")
    [trigger] = DEPLOYMENTS["train-pix2pix"]["triggers"]
    assert trigger["expect"] == [emitted["event"]]
    assert trigger["match"].items() <= emitted["resource"].items()
    assert trigger["parameters"] == {
        "dataset": "ixi-t1-t2@{{ event.payload.version }}",
        "root": "{{ event.payload.root }}",
    }
    assert emitted["payload"] == {"version": "0123456789ab", "root": str(tmp_path)}


def test_unknown_preset_in_the_environment_prints_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import deploy

    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.setenv("IXI_PRESET", "smok")
    with pytest.raises(SystemExit, match="IXI_PRESET is smok; set one of paper, digits, smoke, gpu"):
        deploy.main()


def test_deploying_outside_a_checkout_prints_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import deploy

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^error: this folder has no prefect.yaml; deploy from a checkout"):
        deploy.main()


@pytest.mark.parametrize("name", sorted(DEPLOYMENTS))
def test_every_deployment_variable_has_a_default(name: str) -> None:
    from flows import deploy

    variables = set(re.findall(r"\{\{ \$(\w+) \}\}", str(DEPLOYMENTS[name])))
    assert variables <= deploy.DEFAULTS.keys()


def test_run_counts_as_lost_after_three_missed_heartbeats() -> None:
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: 40}):
        trigger: Any = crash_lost_runs().trigger
    assert trigger.within.total_seconds() == 120
    assert {"prefect.flow-run.heartbeat", "prefect.flow-run.Crashed"} < trigger.expect


def test_automations_watch_the_flows_of_all_deployments_and_no_others() -> None:
    trigger: Any = crash_lost_runs().trigger
    assert sorted(FLOWS) == sorted(DEPLOYMENTS)
    assert trigger.match_related["prefect.resource.name"] == list(FLOWS)


def test_runs_of_the_command_line_beat_often_enough_for_any_automation() -> None:
    from prefect.flow_engine import MINIMUM_HEARTBEAT_INTERVAL

    from flows.server import SETTINGS

    assert float(SETTINGS["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]) == MINIMUM_HEARTBEAT_INTERVAL


def test_every_embedded_server_has_180_seconds_to_start() -> None:
    import tomllib

    from flows.server import START_TIMEOUT_S

    settings = tomllib.loads((PROJECT / "prefect.toml").read_text())
    assert settings["server"]["ephemeral"]["startup_timeout_seconds"] == START_TIMEOUT_S == 180


def test_prefect_and_sqlalchemy_are_within_the_versions_that_work_together() -> None:
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    needed = {r.name.lower(): r.specifier for r in map(Requirement, requires("ixi-etl") or ())}
    assert [needed["prefect"].contains(v) for v in ("3.9.0", "3.9.1")] == [False, True]
    assert [needed["sqlalchemy"].contains(v) for v in ("2.0.58", "2.1.0")] == [True, False]


# -- notifications ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "url"),
    [
        (
            "https://example.org/a%20b/hook?token=x%26y",
            "jsons://example.org/a%20b/hook?-token=x%26y&%3Amessage=text&%3Aversion=&%3Atype=&%3Aattachments=",
        ),
        ("https://hooks.slack.com/services/T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ", None),
        ("mailtos://me:pw@example.org?to=a@example.org", "mailtos://me:pw@example.org?to=a@example.org&format=text"),
        ("ntfy://topic", None),
    ],
    ids=["webhook", "Slack", "mail", "another service"],
)
def test_address_of_notifications_becomes_a_url_of_apprise(given: str, url: str | None) -> None:
    from flows.notifications import apprise_url

    assert apprise_url(given) == (url or given)


@pytest.mark.parametrize("given", ["nonsense", "ftp://example.org", "https://", "mailto://hunter2@"])
def test_unusable_address_of_notifications_prints_one_line_without_it(
    given: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows import deploy

    monkeypatch.setenv("IXI_NOTIFY", given)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}), pytest.raises(SystemExit) as ended:
        deploy.main()
    line = str(ended.value.code)
    assert line.startswith("error: IXI_NOTIFY is not an address that can be notified; set a webhook (https://...)")
    assert "\n" not in line
    assert "hunter2" not in line
    assert capfd.readouterr() == ("", "")


def test_minutes_before_a_missing_training_must_be_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import deploy

    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.setenv("IXI_TRAIN_AFTER", "soon")
    with pytest.raises(SystemExit, match="IXI_TRAIN_AFTER is soon; set a whole number of minutes"):
        deploy.main()


def test_fallback_starts_the_same_training_as_the_event() -> None:
    look_after = DEPLOYMENTS["look-after"]["parameters"]
    training = DEPLOYMENTS["train-pix2pix"]
    assert look_after["root"] == DEPLOYMENTS["refresh-dataset"]["parameters"]["config"]["root"]
    assert set(training["triggers"][0]["parameters"]) == {"dataset", "root"}  # what `look_after` gives


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (None, "no Prefect server is configured; set PREFECT_API_URL"),
        ("http://127.0.0.1:9/api", "no Prefect server answers at http://127.0.0.1:9/api"),
    ],
    ids=["not configured", "no answer"],
)
def test_deploying_without_a_server_prints_one_line(
    url: str | None, message: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows import deploy

    monkeypatch.setattr(time, "sleep", lambda _: None)  # the wait before another attempt to connect
    with temporary_settings({PREFECT_API_URL: url}), pytest.raises(SystemExit) as ended:
        deploy.main()
    line = str(ended.value.code)  # Python prints it; the exit status is 1
    assert line.startswith(f"error: {message}")
    assert "\n" not in line
    assert capfd.readouterr() == ("", "")


# -- containers -------------------------------------------------------------------------------------------------------

COMPOSE = yaml.safe_load((PROJECT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ENV_EXAMPLE = (PROJECT / ".env.example").read_text()


def test_compose_file_is_valid() -> None:
    checker = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*checker, PROJECT / "docker-compose.yml"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_example_environment_has_every_variable_of_the_compose_file() -> None:
    text = (PROJECT / "docker-compose.yml").read_text()
    required = set(re.findall(r"\$\{(\w+):\?", text))
    assert required == {"POSTGRES_PASSWORD", "PREFECT_AUTH"}
    for name in set(re.findall(r"\$\{(\w+)", text)):
        assert f"\n{name}=" in ENV_EXAMPLE


def test_profiles_in_the_example_environment_exist() -> None:
    [given] = re.findall(r"^COMPOSE_PROFILES=(.+)$", ENV_EXAMPLE, re.MULTILINE)
    assert {profile for service in SERVICES.values() for profile in service.get("profiles", ())} >= {given, "no-gpu"}


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_service_is_pinned_local_and_unprivileged(name: str) -> None:
    service = SERVICES[name]
    image, _, tag = service["image"].partition("@")[0].partition(":")
    assert tag not in ("", "latest")
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert service["security_opt"] == ["no-new-privileges:true"]
    if image == "ixi-etl":
        assert service["build"]["target"] == tag
        assert "user" not in service  # the unprivileged user of the image
    else:
        assert re.search(r"@sha256:[0-9a-f]{64}$", service["image"])
        assert service["user"] not in ("root", "0")
    for dependency, options in service.get("depends_on", {}).items():
        assert options["condition"] != "service_healthy" or "healthcheck" in SERVICES[dependency]


def test_images_use_the_lock_a_pinned_base_and_an_unprivileged_user() -> None:
    stages = re.split(r"^FROM ", (PROJECT / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]
    assert {re.search(r"AS (\w+)", stage)[1] for stage in stages} == {  # type: ignore[index]
        service["build"]["target"] for service in SERVICES.values() if "build" in service
    }
    assert re.match(r"python:3\.11\.\d+-slim-bookworm@sha256:[0-9a-f]{64} ", stages[0])
    for stage in stages:
        assert stage.count(" python requirements/install.py ") == 1
        assert "pip install" not in stage
        assert re.findall(r"^USER (\w+)$", stage, re.MULTILINE)[-1] == "ixi"


def test_only_server_and_postgres_get_the_database_password() -> None:
    with_password = {name for name, service in SERVICES.items() if "POSTGRES_PASSWORD" in str(service)}
    assert with_password == {"postgres", "server"}


def test_prefect_settings_hide_passwords(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
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
