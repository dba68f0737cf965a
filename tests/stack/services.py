"""Run the services of docker-compose.yml as processes of this machine, with the very commands that stand there.

What a container changes is changed back: names of hosts become 127.0.0.1 with free ports, volumes become folders.
PostgreSQL is Debian's (`apt-get install postgresql`) in place of its image, and S3 is a moto server.
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
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import yaml

PROJECT = Path(__file__).parents[2]
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((PROJECT / "docker-compose.yml").read_text())["services"]
PORTS = {"postgres": "5432", "server": "4200", "dask-scheduler": "8786"}
VOLUMES = ("/data", "/prefect", "/tmp")  # as containers see them

T = TypeVar("T")


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def answers(method: str, url: str) -> bool:
    """Whether a server is there yet, and does as asked."""
    try:
        return httpx.request(method, url).status_code == 200
    except httpx.TransportError:
        return False


def wait_until(what: str, found: Callable[[], T | None], seconds: float = 300) -> T:
    """What `found` gives as soon as it is true; the test fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what} did not come in {seconds} s")


class Stack:
    """The running stack. `folder` holds the volumes and logs; `values` is what stands in `.env`."""

    def __init__(self, folder: Path, values: Mapping[str, str]) -> None:
        self.folder = folder
        self.values = {"POSTGRES_PASSWORD": secrets.token_hex(8), "PREFECT_AUTH": f"admin:{secrets.token_hex(8)}"}
        self.values |= values
        self.ports = {name: free_port() for name in PORTS}
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.ran: set[str] = set()
        self._stopping = ExitStack()
        for volume in VOLUMES:
            (folder / volume[1:]).mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Stack:
        return self

    def __exit__(self, *_: object) -> None:
        for name in reversed(list(self.running)):
            self.kill(name)
        self._stopping.close()

    # -- what the compose file says, for this machine

    def interpolate(self, text: str) -> str:
        """`${NAME}`, `${NAME:-default}` and `${NAME:?what to do}` from `values`, as Compose does."""

        def value(match: re.Match[str]) -> str:
            name, default = match[1], match[3] if match[2] == ":-" else None
            found = self.values.get(name) or default
            assert found is not None, f"{name} stands in no .env"
            return found

        return re.sub(r"\$\{(\w+)(?:(:[-?])([^}]*))?\}", value, text)

    def here(self, text: str) -> str:
        """A container's address, port or folder, as one of this machine."""
        text = self.interpolate(text).replace("0.0.0.0", "127.0.0.1")
        for name, port in PORTS.items():
            text = text.replace(f"{name}:{port}", f"127.0.0.1:{self.ports[name]}")
            text = (
                self.ports[name] if text == port else text.replace(f"127.0.0.1:{port}", f"127.0.0.1:{self.ports[name]}")
            )
        if text.endswith((":8787", "8080")):  # only its own container sees these
            text = text[:-4] + free_port()
        return str(self.folder / text[1:]) if text.startswith(VOLUMES) else text

    def command(self, service: str) -> list[str]:
        self.ran.add(service)
        return [self.here(part) for part in SERVICES[service]["command"]]

    def environment(self, service: str) -> dict[str, str]:
        """The service's variables, on top of what the image sets and this machine needs."""
        said = SERVICES[service].get("environment", {})
        given = {name: self.here(value) for name, value in said.items() if value is not None}
        given |= {name: self.values[name] for name, value in said.items() if value is None and name in self.values}
        base = {name: os.environ[name] for name in ("PYTHONPATH", "LANG") if name in os.environ}
        base |= {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "PREFECT_HOME": str(self.folder / "tmp" / service),
            "PREFECT_PLUGINS_ENABLED": "1",
            "PREFECT_WORKER_QUERY_SECONDS": "2",  # the default, 10, only makes the test longer
        }
        return base | given

    # -- processes

    def start(self, service: str, name: str | None = None) -> None:
        """Start one process of a service, called `name` where there are several."""
        self.spawn(name or service, self.command(service), self.environment(service))

    def spawn(self, name: str, command: list[str], environment: Mapping[str, str], **options: Any) -> None:
        with open(self.folder / f"{name}.log", "ab") as log:
            self.running[name] = subprocess.Popen(
                command, cwd=PROJECT, env=dict(environment), stdout=log, stderr=log, start_new_session=True, **options
            )

    def run(self, service: str, command: list[str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a service that ends, or a command that a person types with a service's variables."""
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
        """End a service as `docker compose stop` does: politely, then not."""
        process = self.running.pop(name)
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        self._kill(process)

    def kill(self, name: str) -> None:
        """As if its machine went away: every process of the service at once, without a word."""
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

    def lost(self) -> list[str]:
        """Names of services that ended by themselves."""
        return [name for name, process in self.running.items() if process.poll() is not None]

    # -- what is not ours

    def start_postgres(self) -> None:
        """Debian's PostgreSQL, which refuses to be root's."""
        binaries = max(
            Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), default=None
        )
        assert binaries, "no PostgreSQL; apt-get install postgresql"
        folder = Path(self._stopping.enter_context(tempfile.TemporaryDirectory(prefix="ixi-postgres-")))
        password = folder / "password"
        password.write_text(self.values["POSTGRES_PASSWORD"])
        options: dict[str, Any] = {}
        if os.getuid() == 0:
            options = {"user": "postgres", "group": "postgres", "extra_groups": []}
            for path in (folder, password):
                shutil.chown(path, "postgres", "postgres")
        data, port = folder / "data", self.ports["postgres"]
        make = [binaries / "initdb", "-D", data, "-U", "prefect", "--pwfile", password, "-A", "scram-sha-256"]
        subprocess.run(make, check=True, capture_output=True, cwd=folder, **options)
        serve = [binaries / "postgres", "-D", data, "-h", "127.0.0.1", "-p", port, "-k", "", "-c", "fsync=off"]
        self.spawn("postgres", [str(part) for part in serve], os.environ, **options)
        address = ["-h", "127.0.0.1", "-p", port, "-U", "prefect"]
        ready = [binaries / "pg_isready", *address]
        wait_until("PostgreSQL", lambda: subprocess.run(ready, capture_output=True, check=False).returncode == 0)
        environment = os.environ | {"PGPASSWORD": self.values["POSTGRES_PASSWORD"]}
        subprocess.run([binaries / "createdb", *address, "prefect"], check=True, env=environment)

    def start_s3(self, bucket: str) -> None:
        """A moto server in place of S3, with a bucket; `values` then has where it is, as `.env` would."""
        port = free_port()
        self.spawn("s3", [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port], os.environ)
        self.values |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "anything",
            "AWS_SECRET_ACCESS_KEY": "anything",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

        wait_until("S3", lambda: answers("PUT", f"{self.values['AWS_ENDPOINT_URL']}/{bucket}"))

    # -- Prefect's API

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports['server']}"

    def wait_for_server(self) -> None:
        wait_until("the Prefect server", lambda: answers("GET", f"{self.url}/api/health"))

    def ask(self, path: str, method: str = "POST", **body: Any) -> Any:
        """What the server's API answers."""
        user, password = self.values["PREFECT_AUTH"].split(":")
        answer = httpx.request(
            method,
            f"{self.url}/api/{path}",
            json=body or None,
            auth=(user, password),
            timeout=30,
            follow_redirects=True,
        )
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def runs_of(self, deployment: str, **filters: Any) -> list[dict[str, Any]]:
        """The runs of a deployment, in the order in which they were made, but for those of its schedule."""
        runs = self.ask("flow_runs/filter", deployments={"name": {"any_": [deployment]}}, **filters)
        return sorted((run for run in runs if not run["auto_scheduled"]), key=lambda run: str(run["created"]))

    def state_of(self, run_id: str) -> str:
        return str(self.ask(f"flow_runs/{run_id}", "GET")["state"]["type"])
