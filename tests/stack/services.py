"""Run the services of docker-compose.yml as processes on this machine, with the commands of that file.

Host names are replaced by 127.0.0.1 and free ports, volumes by folders. PostgreSQL is Debian's
(`apt-get install postgresql`) instead of its image, and S3 is a moto server.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import pytest
import yaml

PROJECT = Path(__file__).parents[2]
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((PROJECT / "docker-compose.yml").read_text())["services"]
PORTS = {"postgres": "5432", "server": "4200", "dask-scheduler": "8786"}
VOLUMES = ("/data", "/prefect", "/tmp")  # paths in containers
IN_NAMESPACE = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]
"""Run a command in a mount namespace of its own, as root or with root's rights there."""

HTTP = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0), timeout=30, follow_redirects=True)
"""Connects anew for each request, because servers are restarted. A new client would read all certificates."""

T = TypeVar("T")


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def skip_unless_mounts() -> None:
    """Skip the test if this process may not mount folders, as in a container without `--privileged`."""
    command = [*IN_NAMESPACE, "mount", "-t", "tmpfs", "none", tempfile.gettempdir()]
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare, of Linux")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs the right to mount folders (docker run --privileged): {done.stderr.strip()}")


def responds(method: str, url: str) -> bool:
    """Whether the server accepts connections and responds with status 200."""
    try:
        return HTTP.request(method, url).status_code == 200
    except httpx.TransportError:
        return False


def wait_for(description: str, poll: Callable[[], T | None], seconds: float = 300, every_s: float = 0.2) -> T:
    """Call `poll` until its result is true and return that; fail the test after `seconds`.

    Requests take CPU time that the services need: only what can be missed is looked at more often.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := poll():
            return value
        time.sleep(every_s)
    raise AssertionError(f"waited {seconds} s in vain for {description}")


class Stack:
    """The running services.

    Attributes:
        folder: has the volumes and logs.
        values: the variables of `.env`.
        ports: service -> port on this machine.
        running: name of a process -> the process.
        used: services whose command ran.
        commands: command lines of all processes.
        run_environments: environments of the processes that ran flows.
    """

    def __init__(self, folder: Path, values: Mapping[str, str]) -> None:
        self.folder = folder
        self.values = {"POSTGRES_PASSWORD": secrets.token_hex(8), "PREFECT_AUTH": f"admin:{secrets.token_hex(8)}"}
        self.values |= values
        self.ports = {name: free_port() for name in PORTS}
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.used: set[str] = set()
        self.commands: set[str] = set()
        self.run_environments: dict[int, dict[str, str]] = {}
        self._cleanup = ExitStack()
        for volume in VOLUMES:
            (folder / volume[1:]).mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Stack:
        ended = threading.Event()
        recorder = threading.Thread(target=self._record_processes, args=(ended,))
        recorder.start()
        self._cleanup.callback(recorder.join)
        self._cleanup.callback(ended.set)
        return self

    def _record_processes(self, ended: threading.Event) -> None:
        while not ended.wait(0.5):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    self.commands.add(" ".join(process.cmdline()))
                    environment = process.environ()
                    if "PREFECT__FLOW_RUN_ID" in environment:
                        self.run_environments[process.pid] = environment

    def __exit__(self, *_: object) -> None:
        for name in reversed(list(self.running)):
            self.kill(name)
        self._cleanup.close()

    # -- commands and variables of the compose file, for this machine

    def interpolate(self, text: str) -> str:
        """Replace `${NAME}`, `${NAME:-default}` and `${NAME:?error}` by values of `values`, as Compose does."""

        def value(match: re.Match[str]) -> str:
            name, default = match[1], match[3] if match[2] == ":-" else None
            chosen = self.values.get(name) or default
            assert chosen is not None, f"{name} has no value"
            return chosen

        return re.sub(r"\$\{(\w+)(?:(:[-?])([^}]*))?\}", value, text)

    def localize(self, text: str) -> str:
        """Translate an address, port or folder of a container to one of this machine."""
        text = self.interpolate(text).replace("0.0.0.0", "127.0.0.1")
        for name, port in PORTS.items():
            here = self.ports[name]
            address = rf"\b(?:{name}|127\.0\.0\.1):{port}\b"  # not the start of a longer port, as 42001
            text = here if text == port else re.sub(address, f"127.0.0.1:{here}", text)
        if text == "8080" or text.endswith(":8787"):  # used inside one container only
            text = text[:-4] + free_port()
        return str(self.folder / text[1:]) if text.startswith(VOLUMES) else text

    def command(self, service: str) -> list[str]:
        self.used.add(service)
        return [self.localize(argument) for argument in SERVICES[service]["command"]]

    def environment(self, service: str) -> dict[str, str]:
        """The service's variables, added to those of the image and those that this machine needs."""
        declared = SERVICES[service].get("environment", {})
        given = {name: self.localize(value) for name, value in declared.items() if value is not None}
        given |= {name: self.values[name] for name, value in declared.items() if value is None and name in self.values}
        base = {name: os.environ[name] for name in ("PYTHONPATH", "LANG") if name in os.environ}
        base |= {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "PREFECT_HOME": str(self.folder / "tmp" / service),
            "PREFECT_PLUGINS_ENABLED": "1",
            "PREFECT_LOGGING_LEVEL": "DEBUG",  # `test_secrets` searches the logs
            "PREFECT_WORKER_QUERY_SECONDS": "2",  # the default of 10 makes the tests longer
        }
        return base | given

    # -- processes

    def start(self, service: str, name: str | None = None) -> None:
        """Start a process of a service; `name` distinguishes several processes of one service."""
        self.spawn(name or service, self.command(service), self.environment(service))

    def spawn(self, name: str, command: list[str], environment: Mapping[str, str], **options: Any) -> None:
        """Start a process that writes to the log `<name>.log`; `options` are those of `Popen`."""
        with open(self.folder / f"{name}.log", "ab") as log:
            chosen = {"cwd": PROJECT, "stdout": log, "stderr": log, "start_new_session": True} | options
            self.running[name] = subprocess.Popen(command, env=dict(environment), **chosen)

    def run(self, service: str, command: list[str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run the command of a service, or another one with its variables, and wait until it ends."""
        return subprocess.run(
            command or self.command(service),
            cwd=PROJECT,
            env=self.environment(service) | {"NO_COLOR": "1", "COLUMNS": "300"},
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )

    def stop(self, name: str) -> None:
        """Send SIGTERM, and SIGKILL after 10 s, as `docker compose stop` does."""
        process = self.running.pop(name)
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        self._kill(process)

    def kill(self, name: str) -> None:
        """Send SIGKILL to the process and its descendants, as if their machine failed."""
        self._kill(self.running.pop(name))

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        try:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            family = []
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()

    def exited(self) -> list[str]:
        """Names of processes that ended without a call of `stop` or `kill`."""
        return [name for name, process in self.running.items() if process.poll() is not None]

    # -- PostgreSQL and S3

    def start_postgres(self) -> None:
        """Start Debian's PostgreSQL, which refuses to run as root, so root starts it as the user `postgres`."""
        binaries = self._postgres_binaries()
        folder = Path(self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="ixi-postgres-")))
        password = folder / "password"
        password.write_text(self.values["POSTGRES_PASSWORD"])
        options: dict[str, Any] = {}
        if os.getuid() == 0:
            options = {"user": "postgres", "group": "postgres", "extra_groups": []}
            for path in (folder, password):
                shutil.chown(path, "postgres", "postgres")
        data, port = folder / "data", self.ports["postgres"]
        initdb = [binaries / "initdb", "-D", data, "-U", "prefect", "--pwfile", password, "-A", "scram-sha-256"]
        subprocess.run(initdb, check=True, capture_output=True, cwd=folder, **options)
        serve = [binaries / "postgres", "-D", data, "-h", "127.0.0.1", "-p", port, "-k", "", "-c", "fsync=off"]
        self.spawn("postgres", [str(argument) for argument in serve], os.environ, **options)
        address = ["-h", "127.0.0.1", "-p", port, "-U", "prefect"]
        ready = [binaries / "pg_isready", *address]
        wait_for("PostgreSQL", lambda: subprocess.run(ready, capture_output=True, check=False).returncode == 0)
        environment = os.environ | {"PGPASSWORD": self.values["POSTGRES_PASSWORD"]}
        subprocess.run([binaries / "createdb", *address, "prefect"], check=True, env=environment)

    def _postgres_binaries(self) -> Path:
        found = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), default=None)
        assert found, "no PostgreSQL; apt-get install postgresql"
        return found

    def dump_database(self) -> dict[str, bytes]:
        """The rows of each table of the database, as SQL, and the rest of `pg_dump` under the name ""."""
        address = ["-h", "127.0.0.1", "-p", self.ports["postgres"], "-U", "prefect"]
        environment = os.environ | {"PGPASSWORD": self.values["POSTGRES_PASSWORD"]}
        dump = [self._postgres_binaries() / "pg_dump", *address, "prefect"]
        done = subprocess.run(dump, check=True, capture_output=True, env=environment)
        rest, *tables = re.split(rb"^COPY public\.", done.stdout, flags=re.MULTILINE)
        return {"": rest} | {table.split()[0].decode(): table for table in tables}

    def start_s3(self, bucket: str, secret: str = "anything") -> None:
        """Start a moto server with a bucket, and add its address and keys to `values`, as in `.env`.

        The server accepts every secret key.
        """
        port = free_port()
        self.spawn("s3", [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port], os.environ)
        self.values |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "anything",
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        wait_for("S3", lambda: responds("PUT", f"{self.values['AWS_ENDPOINT_URL']}/{bucket}"))

    # -- Prefect's API

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports['server']}"

    def wait_for_server(self) -> None:
        wait_for("the Prefect server", lambda: responds("GET", f"{self.url}/api/health"))

    def request(self, path: str, method: str = "POST", **body: Any) -> Any:
        """Send a request to the API of the Prefect server; return the JSON of its response.

        Raises:
            httpx.HTTPStatusError: the status is not a success.
        """
        user, password = self.values["PREFECT_AUTH"].split(":")
        response = HTTP.request(method, f"{self.url}/api/{path}", json=body or None, auth=(user, password))
        response.raise_for_status()
        return response.json() if response.content else None

    def runs_of(self, deployment: str, **filters: Any) -> list[dict[str, Any]]:
        """The runs of a deployment without those of its schedule, in order of creation."""
        runs = self.request("flow_runs/filter", deployments={"name": {"any_": [deployment]}}, **filters)
        return sorted((run for run in runs if not run["auto_scheduled"]), key=lambda run: str(run["created"]))

    def end_schedule(self, deployment: str) -> None:
        """End the schedule of a deployment, and wait for its runs: one on the clock may take the place of a test's."""
        [found] = self.request("deployments/filter", deployments={"name": {"any_": [deployment]}})
        self.request(f"deployments/{found['id']}/pause_deployment")
        started = {"type": {"any_": ["PENDING", "RUNNING"]}}
        chosen = {"deployments": {"name": {"any_": [deployment]}}, "flow_runs": {"state": started}}
        wait_for("the scheduled run", lambda: not self.request("flow_runs/filter", **chosen))

    def state_of(self, run_id: str) -> str:
        return str(self.request(f"flow_runs/{run_id}", "GET")["state"]["type"])
