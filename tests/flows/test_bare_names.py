"""`prefect deployment run` accepts the bare name of a deployment (`flows/bare_names.py`)."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from uuid import UUID

import pytest

pytestmark = [pytest.mark.usefixtures("prefect"), pytest.mark.stack]

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def deployments(prefect: None) -> dict[str, UUID]:
    """The deployments lone/lone, one/twin and two/twin on the server, by full name."""
    from prefect import get_client

    with get_client(sync_client=True) as client:
        return {
            f"{flow}/{name}": client.create_deployment(client.create_flow_from_name(flow), name)
            for flow, name in (("lone", "lone"), ("one", "twin"), ("two", "twin"))
        }


@pytest.fixture
def find_deployment(
    deployments: dict[str, UUID], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Coroutine[Any, Any, UUID]]:
    """The lookup of `prefect deployment run` in a process that has loaded the plugin."""
    from prefect import get_client
    from prefect.client.orchestration import PrefectClient
    from prefect.plugins import HookContext

    from flows.bare_names import setup_environment

    monkeypatch.setattr(
        PrefectClient, "read_deployment_by_name", PrefectClient.read_deployment_by_name
    )  # restored afterwards
    setup_environment(ctx=Mock(HookContext))

    async def find(name: str) -> UUID:
        async with get_client() as client:
            return (await client.read_deployment_by_name(name)).id

    return find


@pytest.mark.parametrize(
    ("name", "full"), [("lone", "lone/lone"), ("lone/lone", "lone/lone"), ("two/twin", "two/twin")]
)
def test_deployment_is_found_by_bare_and_full_name(
    name: str,
    full: str,
    deployments: dict[str, UUID],
    find_deployment: Callable[[str], Coroutine[Any, Any, UUID]],
) -> None:
    assert asyncio.run(find_deployment(name)) == deployments[full]


@pytest.mark.parametrize("name", ["twin", "unknown"])
def test_ambiguous_or_unknown_bare_name_raises_the_error_of_prefect(
    name: str, find_deployment: Callable[[str], Coroutine[Any, Any, UUID]]
) -> None:
    message = f"Invalid deployment name format: {name}. Expected format: <FLOW_NAME>/<DEPLOYMENT_NAME>"
    with pytest.raises(ValueError, match=re.escape(message)):
        asyncio.run(find_deployment(name))


def test_prefect_command_in_the_project_folder_accepts_a_bare_name(deployments: dict[str, UUID]) -> None:
    """`prefect.toml` in the project folder enables the plugin."""
    from prefect.settings import get_current_settings

    done = subprocess.run(
        [sys.executable, "-m", "prefect", "deployment", "run", "lone"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        env=os.environ | {"PREFECT_API_URL": str(get_current_settings().api.url), "NO_COLOR": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Created flow run" in done.stdout
