"""The spin count of OpenMP threads is set before torch is imported, unless the user has set how they wait."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import model

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@pytest.mark.stack  # takes seconds: a new process imports torch
@pytest.mark.skipif(
    sys.platform != "linux",
    reason="reads what libgomp prints, which only PyTorch's Linux wheels bundle; the tests below run everywhere",
)
def test_libgomp_reads_the_spin_count_when_the_command_line_imports_torch() -> None:
    env = {name: value for name, value in os.environ.items() if "OMP_" not in name} | {"OMP_DISPLAY_ENV": "VERBOSE"}
    line = [sys.executable, "-c", "import flows.cli, model.data"]
    settings = subprocess.run(line, env=env, capture_output=True, text=True, check=True).stderr
    assert f"GOMP_SPINCOUNT = '{model.SPIN_COUNT}'" in settings


@pytest.mark.parametrize("name", VARIABLES)
def test_a_setting_of_the_user_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, "1")
    before = dict(os.environ)
    model.limit_spinning()
    assert dict(os.environ) == before


def test_without_a_setting_of_the_user_the_spin_count_is_3000(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "")  # so that the fixture restores it
        monkeypatch.delenv(variable)
    model.limit_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == model.SPIN_COUNT == "3000"
