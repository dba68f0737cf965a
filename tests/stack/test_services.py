"""Addresses and paths of the compose file become those of this machine, and all others stay as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
from services import PORTS, Stack


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(tmp_path, {"NOTIFY": "http://127.0.0.1:42001/hook"})


@pytest.mark.parametrize(("service", "port"), PORTS.items())
def test_addresses_of_services_are_replaced(stack: Stack, service: str, port: str) -> None:
    here = stack.ports[service]
    assert stack.localize(port) == here
    assert stack.localize(f"http://{service}:{port}/api") == f"http://127.0.0.1:{here}/api"
    assert stack.localize(f"x://user:secret@{service}:{port}") == f"x://user:secret@127.0.0.1:{here}"
    assert stack.localize(f"0.0.0.0:{port}") == f"127.0.0.1:{here}"


@pytest.mark.parametrize("port", PORTS.values())
@pytest.mark.parametrize("host", ["127.0.0.1", *PORTS])
def test_ports_that_only_start_like_those_of_services_stay(stack: Stack, host: str, port: str) -> None:
    address = f"http://{host}:{port}1/hook"
    assert stack.localize(address) == address


def test_addresses_among_the_values_stay(stack: Stack) -> None:
    assert stack.localize("${NOTIFY:-}") == stack.values["NOTIFY"]


def test_passwords_that_end_like_a_port_stay(stack: Stack) -> None:
    for text in ("admin:abc8080", "5432abc", "admin:abc4200"):
        assert stack.localize(text) == text


def test_folders_of_containers_are_below_the_folder(stack: Stack, tmp_path: Path) -> None:
    assert stack.localize("/data/ixi") == str(tmp_path / "data" / "ixi")
    assert stack.localize("s3://bucket/data") == "s3://bucket/data"
