"""The Prefect server: find the configured one, start a temporary one, and run flows on it.

Every failure becomes a `ServerError`: one line that names the setting to change.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from flows import temporary_server
from ixi_etl.core import signals
from ixi_etl.errors import IxiError, ServerError

SETTINGS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "ixi_etl,model",  # log to the server
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",  # progress threads belong to no run
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # often enough for the automation of any `make deploy`
    # The command prints the exception that ends it; Prefect would print it twice more, with tracebacks.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_INTERNAL_LOGGING_LEVEL": "CRITICAL",
}
"""Defaults for flows that a command runs; variables of the environment have precedence."""

START_TIMEOUT = "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"
START_TIMEOUT_S = 180.0  # starts took 10 to 27 s, and far longer on a busy machine
REQUEST_TIMEOUT_S = 15.0


def is_configured() -> bool:
    """Whether Prefect's settings name a server.

    Importing Prefect takes seconds, so it is imported only if one of its settings files may name a server.

    Raises:
        ServerError: Prefect cannot read its settings.
    """
    if "PREFECT_API_URL" in os.environ:
        return bool(os.environ["PREFECT_API_URL"])  # an empty value means no server, even if a profile names one
    home = os.environ.get("PREFECT_HOME") or os.path.expanduser("~/.prefect")
    profiles = os.environ.get("PREFECT_PROFILES_PATH") or os.path.join(home, "profiles.toml")
    if not any(map(_may_name_a_server, (".env", "prefect.toml", "pyproject.toml", profiles))):
        return False
    with errors_as_user_errors(), warnings.catch_warnings(record=True) as found:
        from prefect.settings import get_current_settings

        url = get_current_settings().api.url
    for warning in found:  # such as a profiles file that is not TOML
        logging.getLogger("ixi_etl").warning("%s", warning.message)
    return bool(url)


def _may_name_a_server(path: str) -> bool:
    try:
        text = Path(path).read_text(errors="replace").lower()
    except OSError:
        return False
    if path == "pyproject.toml" and "tool.prefect" not in text:
        return False
    return ("api" in text and "url" in text) or "profiles_path" in text


def start_server(home: Path) -> None:
    """Start a server on loopback that ends with this process, and run the flows of this process on it.

    Its settings, database and log are in `home`; the user's own Prefect settings and proxies are ignored.

    Raises:
        ServerError: it does not start.
    """
    import httpx

    home.mkdir(parents=True, exist_ok=True)
    home, log = home.resolve(), home.resolve() / "server.log"
    limit = float(os.environ.get(START_TIMEOUT) or START_TIMEOUT_S)
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
    password = f"ixi-etl:{secrets.token_urlsafe()}"  # other users of this machine must not use the server
    for name in [n for n in os.environ if n.startswith("PREFECT_") or n.lower().endswith("_proxy")]:
        del os.environ[name]
    os.environ |= {
        "PREFECT_HOME": str(home),
        "PREFECT_PROFILES_PATH": str(home / "profiles.toml"),
        "PREFECT_API_URL": url,
        "PREFECT_API_AUTH_STRING": password,
        "NO_PROXY": "127.0.0.1,localhost",  # also overrides proxies of the system settings
    }
    _ensure_home(home)
    server = {
        "PREFECT_SERVER_API_AUTH_STRING": password,
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home}/prefect.db",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_UI_ENABLED": "false",
        "PREFECT__SERVER_EPHEMERAL": "1",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603  # nosec B603 - no user input
            [sys.executable, "-P", temporary_server.__file__, str(listener.fileno())],
            stdin=subprocess.PIPE,  # open for as long as this process lives
            stdout=output,
            stderr=output,
            cwd=home,  # ignore settings of the working directory
            env={**os.environ, **server},
            pass_fds=[listener.fileno()],
            start_new_session=True,  # Ctrl-C must not reach the server, which this process still needs
        )
    listener.close()
    _end_with_this_process(process)
    try:  # the connection waits in the queue of the socket until the server accepts it
        httpx.get(f"{url}/health", timeout=limit, trust_env=False).raise_for_status()
    except httpx.TimeoutException as error:
        message = f"Prefect's server did not start in {limit:.0f} s ({START_TIMEOUT}); see {log}"
        raise ServerError(message) from error
    except httpx.HTTPError as error:
        raise ServerError(f"Prefect's server did not start ({error}); see {log}") from error


def _end_with_this_process(process: subprocess.Popen[bytes]) -> None:
    """End the server at exit. Registered before Prefect is imported, so it runs after Prefect has flushed its logs."""
    import atexit

    def end() -> None:
        process.kill()
        process.wait()

    signals.at_end.append(process.kill)
    atexit.register(end)


def _ensure_home(home: Path) -> None:
    """Set HOME for users without a home folder, as in containers: Prefect cannot be imported without one."""
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = str(home)


def run_flow(name: str, *arguments: Any, **parameters: Any) -> Any:
    """Run the flow `flows.<name>.<name>` in this process on the configured server.

    Raises:
        ServerError: the server does not answer as it should.
    """
    for variable, value in SETTINGS.items():
        os.environ.setdefault(variable, value)
    logging.raiseExceptions = False  # otherwise Prefect prints a traceback if its server does not accept a log
    # The home folder stays empty, so it may be read-only.
    warnings.filterwarnings("ignore", message="Failed to create the Prefect home directory")
    with errors_as_user_errors():
        check_server()
        return getattr(import_module(f"flows.{name}"), name)(*arguments, **parameters)


def check_server() -> None:
    """Send the configured server one request, without the many retries of a flow.

    Raises:
        ServerError: the server does not answer as it should.
    """
    with errors_as_user_errors():
        from prefect.client.orchestration import get_client
        from prefect.settings import (
            PREFECT_API_REQUEST_TIMEOUT,
            PREFECT_CLIENT_MAX_RETRIES,
            get_current_settings,
            temporary_settings,
        )

    url = get_current_settings().api.url
    once = {PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: REQUEST_TIMEOUT_S}
    try:
        with temporary_settings(once), get_client(sync_client=True) as client:
            client.raise_for_api_version_mismatch()
            client.read_flows(limit=1)
    except Exception as error:
        other = f"{_without_password(str(url))} does not answer as a Prefect server; {ADDRESS}"
        raise ServerError(_explain(error) or other) from error


ADDRESS = "set PREFECT_API_URL to its address (http://host:4200/api), or unset it to run without a server"


@contextmanager
def errors_as_user_errors() -> Iterator[None]:
    """Translate errors of Prefect's settings and server to `ServerError`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, IxiError) or not (line := _explain(error)):
            raise
        raise ServerError(line) from error


def _explain(error: BaseException) -> str:
    """What is wrong with the server or the settings; empty if the error has another cause."""
    chain: list[BaseException] = []
    while error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__ or error
    lines = (_explain_one(link) for link in chain)
    return _without_password(next(filter(None, lines), ""))


def _explain_one(error: BaseException) -> str:
    module, message = type(error).__module__.partition(".")[0], (str(error).splitlines() or [""])[0]
    if type(error).__name__ in ("SettingsError", "ProfileSettingsValidationError"):
        return f"Prefect's settings cannot be read: {message}"
    if isinstance(error, RuntimeError) and "home directory" in message:
        return "Prefect needs a home folder; set HOME, or unset PREFECT_API_URL to run without a server"
    if "Can't locate revision" in str(error):
        return _explain_database()
    if isinstance(error, RuntimeError) and "incompatible versions" in message:
        return f"{message} Install the server's version of Prefect, or {ADDRESS}"
    if "ephemeral Prefect API server" in message:
        return f"Prefect's server did not start in time; raise {START_TIMEOUT}"
    if module != "httpx" and not module.startswith("prefect"):
        return ""
    status = getattr(getattr(error, "response", None), "status_code", None)
    try:
        url = str(error.request.url)  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):
        url = os.environ.get("PREFECT_API_URL", "the configured server")
    if status in (401, 403):
        setting = "PREFECT_API_KEY" if "prefect.cloud" in url else "PREFECT_API_AUTH_STRING (user:password)"
        return f"the Prefect server refuses the password ({url} answers {status}); set {setting}"
    if status is not None:
        return f"{url} answers {status}, not as a Prefect server; {ADDRESS}"
    if module == "httpx":
        proxy = any(os.environ.get(n) for n in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY"))
        through = "; a proxy is configured: add the host to NO_PROXY if needed" if proxy else ""
        return (
            f"no Prefect server answers at {url} ({message or type(error).__name__}); start it, or {ADDRESS}{through}"
        )
    return ""


def _explain_database() -> str:
    from prefect.settings import get_current_settings

    database = get_current_settings().home / "prefect.db"
    return f"the Prefect database {database} was made by another version of Prefect; move it away, or set PREFECT_HOME"


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//", text)
