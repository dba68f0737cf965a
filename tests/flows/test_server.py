"""The Prefect server: used if configured, started only by the demo; its failures print one line."""

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
def no_prefect_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory that is also the home, and an environment without Prefect settings."""
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
def test_server_is_configured_if_a_prefect_setting_names_one(
    files: dict[str, str],
    environment: dict[str, str],
    configured: bool,
    no_prefect_settings: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prefect's own settings must agree in the same environment."""
    for name, text in files.items():
        (no_prefect_settings / name).parent.mkdir(exist_ok=True)
        (no_prefect_settings / name).write_text(text)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("prefect.settings.sources.DEFAULT_PREFECT_HOME", Path("~/.prefect").expanduser())
    from prefect.settings.models.root import Settings

    monkeypatch.setattr("prefect.settings.get_current_settings", Settings)  # instead of those read at import
    assert is_configured() == configured
    assert bool(Settings().api.url) == configured


def test_unreadable_settings_raise_a_one_line_error(no_prefect_settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings.models.root import Settings

    monkeypatch.setattr("prefect.settings.get_current_settings", Settings)
    (no_prefect_settings / "prefect.toml").write_text("[api]\nurl = http://127.0.0.1:9/api")
    with pytest.raises(ServerError, match=r"Prefect's settings cannot be read: .*prefect\.toml") as error:
        is_configured()
    assert "\n" not in str(error.value)


def test_without_a_server_prefect_is_not_imported(no_prefect_settings: Path) -> None:
    code = (
        f"import sys\nsys.path[:0] = {sys.path!r}\nfrom flows.server import is_configured\nassert not is_configured()\n"
    )
    subprocess.run([sys.executable, "-c", f"{code}assert 'prefect' not in sys.modules"], check=True)


# -- faulty servers ---------------------------------------------------------------------------------------------------


class FixedResponse(http.server.BaseHTTPRequestHandler):
    status, body = 200, b""

    def respond(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_GET = do_POST = respond  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def responding_server() -> Iterator[str]:
    """The address of a server that answers every request with `FixedResponse`."""
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FixedResponse)
    threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"127.0.0.1:{served.server_port}"
    served.shutdown()
    served.server_close()


def server_error(url: str) -> str:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with pytest.MonkeyPatch.context() as patch, temporary_settings({PREFECT_API_URL: url}):
        patch.setattr(time, "sleep", lambda _: None)  # the wait before another attempt to connect
        with pytest.raises(ServerError) as error:
            check_server()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("status", "body", "pattern"),
    [
        (401, b"{}", r"refuses the password .* answers 401\); set PREFECT_API_AUTH_STRING"),
        (403, b"{}", r"refuses the password .* answers 403\); set PREFECT_API_AUTH_STRING"),
        (404, b"", "answers 404, not as a Prefect server; set PREFECT_API_URL"),
        (503, b"", "answers 503, not as a Prefect server; set PREFECT_API_URL"),
        (200, b"<html>Sign in</html>", "does not answer as a Prefect server; set PREFECT_API_URL"),
        (200, b'"2.20.1"', r"incompatible versions: .*PREFECT_API_URL"),
    ],
)
def test_unexpected_response_raises_a_one_line_error(
    status: int, body: bytes, pattern: str, responding_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FixedResponse, "status", status)
    monkeypatch.setattr(FixedResponse, "body", body)
    message = server_error(f"http://user:hunter2@{responding_server}/api")
    assert re.search(pattern, message), message
    assert "hunter2" not in message


@pytest.mark.parametrize("url", [URL, "localhost:4200", "http://no-such-host.invalid/api", "nonsense"])
def test_unreachable_server_raises_a_one_line_error(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    message = server_error(url)
    assert "no Prefect server answers at" in message
    assert "PREFECT_API_URL" in message
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert "NO_PROXY" in server_error(url)


def test_errors_of_a_temporary_server_name_the_setting() -> None:
    for message, setting in (
        ("Timed out while attempting to connect to ephemeral Prefect API server.", server.START_TIMEOUT),
        ("Can't locate revision identified by '5b0bd3b41a23'", "prefect.db"),
        ("Could not determine home directory.", "HOME"),
    ):
        with pytest.raises(ServerError, match=setting), errors_as_user_errors():
            raise RuntimeError(message)
    with pytest.raises(RuntimeError, match="a bug"), errors_as_user_errors():
        raise RuntimeError("a bug")


# -- the temporary server ---------------------------------------------------------------------------------------------

PARENT = """
import sys, pathlib
sys.path[:0] = {path!r}
from ixi_etl.core import signals
signals.end_on_signals()
from flows.server import start_server
start_server(pathlib.Path({home!r}))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda n: n.name)
def test_starting_server_ends_with_its_parent(number: signal.Signals, tmp_path: Path) -> None:
    code = PARENT.format(path=sys.path, home=str(tmp_path))
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    children: list[psutil.Process] = []
    while not children:
        assert parent.poll() is None
        children = psutil.Process(parent.pid).children()
    parent.send_signal(number)
    _, stderr = parent.communicate(timeout=60)
    assert "Traceback" not in stderr
    for child in children:
        with suppress(psutil.NoSuchProcess):
            while child.status() != psutil.STATUS_ZOMBIE:  # a container may have no process that reaps it
                time.sleep(0.01)


def test_server_that_does_not_start_raises_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
