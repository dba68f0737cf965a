"""How OpenMP's threads wait is set before torch is loaded, unless the user has set it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import model

pytest.importorskip("torch", reason="torch is not installed; pip install -c constraints.txt -e '.[train]'")


@pytest.mark.stack  # a process that imports torch, seconds
@pytest.mark.skipif(
    sys.platform != "linux",
    reason="reads what libgomp prints, which PyTorch's wheels bring on Linux alone; the tests below run everywhere",
)
def test_libgomp_reads_the_spin_count_when_the_command_line_loads_torch() -> None:
    said = {"OMP_DISPLAY_ENV": "VERBOSE"}
    env = {name: value for name, value in os.environ.items() if "OMP_" not in name} | said
    line = [sys.executable, "-c", "import flows.cli, model.data"]
    shown = subprocess.run(line, env=env, capture_output=True, text=True, check=True).stderr
    assert f"GOMP_SPINCOUNT = '{model.SPIN_COUNT}'" in shown


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_what_the_user_has_set_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, "1")
    before = dict(os.environ)
    model.limit_spinning()
    assert dict(os.environ) == before
    monkeypatch.delenv(name)
    monkeypatch.setenv("GOMP_SPINCOUNT", "")  # so that the fixture restores it
    monkeypatch.delenv("GOMP_SPINCOUNT")
    model.limit_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == model.SPIN_COUNT
