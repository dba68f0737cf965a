"""Prefect's server: used where one is configured, started by the demo alone, and its faults are one line."""

from __future__ import annotations

import http.server
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from flows import server
from flows.server import check_server, errors_as_user_errors, is_configured
from ixi_etl.errors import ServerError

URL = "http://127.0.0.1:9/api"
PROFILE = f'active = "a"\n[profiles.a]\nPREFECT_API_URL = "{URL}"'


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, which is also the home, and no setting of Prefect's."""
    for name in [n for n in os.environ if n.startswith("PREFECT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("files", "environment", "configured"),
    [
        ({}, {}, False),
        ({}, {"PREFECT_API_URL": URL}, True),
        ({}, {"PREFECT_API_URL": ""}, False),
        ({".prefect/profiles.toml": PROFILE}, {}, True),
        ({".prefect/profiles.toml": f'active = "a"\n[profiles.a]\n[profiles.b]\nPREFECT_API_URL = "{URL}"'}, {}, False),
        (
            {".prefect/profiles.toml": f'active = "a"\n[profiles.a]\n[profiles.b]\nPREFECT_API_URL = "{URL}"'},
            {"PREFECT_PROFILE": "b"},
            True,
        ),
        ({".prefect/profiles.toml": 'active = "a"\n[profiles.a]\nPREFECT_SERVER_EPHEMERAL_ENABLED = "1"'}, {}, False),
        ({".prefect/profiles.toml": PROFILE}, {"PREFECT_API_URL": ""}, False),
        ({"p.toml": PROFILE}, {"PREFECT_PROFILES_PATH": "p.toml"}, True),
        ({"h/profiles.toml": PROFILE}, {"PREFECT_HOME": "h"}, True),
        ({"prefect.toml": f'[api]\n# our server\nurl = "{URL}"'}, {}, True),
        ({"prefect.toml": '[logging.to_api]\nenabled = true'}, {}, False),
        ({"pyproject.toml": f'[tool.prefect.api]\nurl = "{URL}"'}, {}, True),
        ({"pyproject.toml": '[project.urls]\napi = "https://example.org/api"'}, {}, False),
        ({".env": f"PREFECT_API_URL={URL}"}, {}, True),
        ({".prefect": "a file where the folder should be"}, {}, False),
        ({}, {"HOME": "/nonexistent"}, False),
    ],
)  # fmt: skip
def test_a_server_is_configured_where_prefect_s_settings_name_one(
    files: dict[str, str],
    environment: dict[str, str],
    configured: bool,
    nowhere: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Held against Prefect itself, in the same surroundings."""
    for name, text in files.items():
        (nowhere / name).parent.mkdir(exist_ok=True)
        (nowhere / name).write_text(text)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("prefect.settings.sources.DEFAULT_PREFECT_HOME", Path("~/.prefect").expanduser())
    from prefect.settings.models.root import Settings

    monkeypatch.setattr("prefect.settings.get_current_settings", Settings)  # not those of when it was imported
    assert is_configured() == configured
    assert bool(Settings().api.url) == configured


def test_settings_that_cannot_be_read_are_one_line(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings.models.root import Settings

    monkeypatch.setattr("prefect.settings.get_current_settings", Settings)
    (nowhere / "prefect.toml").write_text("[api]\nurl = http://127.0.0.1:9/api")
    with pytest.raises(ServerError, match=r"Prefect's settings cannot be read: .*prefect\.toml") as error:
        is_configured()
    assert "\n" not in str(error.value)


def test_without_a_server_prefect_is_not_imported(nowhere: Path) -> None:
    work = (
        f"import sys\nsys.path[:0] = {sys.path!r}\nfrom flows.server import is_configured\nassert not is_configured()\n"
    )
    subprocess.run([sys.executable, "-c", f"{work}assert 'prefect' not in sys.modules"], check=True)


# -- a server that is not as it should be -----------------------------------------------------------------------------


class Answers(http.server.BaseHTTPRequestHandler):
    status, body = 200, b""

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_GET = do_POST = answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def answering() -> Iterator[str]:
    """A server that answers everything as `Answers` says."""
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"127.0.0.1:{served.server_port}"
    served.shutdown()
    served.server_close()


def refused(url: str) -> str:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: url}), pytest.raises(ServerError) as error:
        check_server()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("status", "body", "line"),
    [
        (401, b"{}", r"refuses the password .* answers 401\); set PREFECT_API_AUTH_STRING"),
        (403, b"{}", r"refuses the password .* answers 403\); set PREFECT_API_AUTH_STRING"),
        (404, b"", "answers 404, not as a Prefect server; set PREFECT_API_URL"),
        (503, b"", "answers 503, not as a Prefect server; set PREFECT_API_URL"),
        (200, b"<html>Sign in</html>", "does not answer as a Prefect server; set PREFECT_API_URL"),
        (200, b'"2.20.1"', r"incompatible versions: .*PREFECT_API_URL"),
    ],
)
def test_a_server_that_answers_something_else_is_one_line(
    status: int, body: bytes, line: str, answering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answers, "status", status)
    monkeypatch.setattr(Answers, "body", body)
    said = refused(f"http://user:hunter2@{answering}/api")
    assert re.search(line, said), said
    assert "hunter2" not in said


@pytest.mark.parametrize("url", [URL, "localhost:4200", "http://no-such-host.invalid/api", "nonsense"])
def test_a_server_that_is_not_there_is_one_line(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = refused(url)
    assert "no Prefect server answers at" in said
    assert "PREFECT_API_URL" in said
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert "NO_PROXY" in refused(url)


def test_what_prefect_raises_of_a_server_of_its_own_names_the_setting() -> None:
    for said, setting in (
        ("Timed out while attempting to connect to ephemeral Prefect API server.", server.START_TIMEOUT),
        ("Can't locate revision identified by '5b0bd3b41a23'", "prefect.db"),
        ("Could not determine home directory.", "HOME"),
    ):
        with pytest.raises(ServerError, match=setting), errors_as_user_errors():
            raise RuntimeError(said)
    with pytest.raises(RuntimeError, match="a bug"), errors_as_user_errors():
        raise RuntimeError("a bug")


# -- one of our own ---------------------------------------------------------------------------------------------------

PARENT = """
import sys, pathlib
sys.path[:0] = {path!r}
from ixi_etl.core import signals
signals.end_on_signals()
from flows.server import start_server
start_server(pathlib.Path({home!r}))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda n: n.name)
def test_the_server_ends_with_who_started_it_also_while_it_starts(number: signal.Signals, tmp_path: Path) -> None:
    code = PARENT.format(path=sys.path, home=str(tmp_path))
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    children: list[psutil.Process] = []
    while not children:
        assert parent.poll() is None
        children = psutil.Process(parent.pid).children()
    parent.send_signal(number)
    _, said = parent.communicate(timeout=60)
    assert "Traceback" not in said
    for child in children:
        with suppress(psutil.NoSuchProcess):
            while child.status() != psutil.STATUS_ZOMBIE:  # a container may have nobody to reap it
                time.sleep(0.01)


def test_a_server_that_does_not_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('no')")
    silent = tmp_path / "silent.py"
    silent.write_text("import sys; sys.stdin.read()")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ) | {server.START_TIMEOUT: "1"})
        patch.setattr(server.temporary_server, "__file__", str(broken))
        with pytest.raises(ServerError, match=r"did not start .*see .*server\.log"):
            server.start_server(tmp_path / "home")
        os.environ[server.START_TIMEOUT] = "0.1"
        patch.setattr(server.temporary_server, "__file__", str(silent))
        with pytest.raises(ServerError, match=f"did not start in 0 s .{server.START_TIMEOUT}"):
            server.start_server(tmp_path / "home")
