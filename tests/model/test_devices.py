"""Only the command line sets how memory is freed; the rank of a process is read from torchrun's variables."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flows import server
from flows.cli.runs import run_training
from ixi_etl.errors import ConfigError
from model import devices, jobs
from model.config import preset
from model.devices import torchrun_rank, under_torchrun

MEASURE = """
import psutil
from model.devices import keep_freed_memory
keep_freed_memory()
process = psutil.Process()
before = process.memory_info().rss
block = b"x" * (100 << 20)
del block
print(process.memory_info().rss - before)
"""


@pytest.mark.stack  # takes seconds: a new process imports torch
@pytest.mark.skipif(
    sys.platform != "linux", reason="measures a setting of glibc, which only Linux has; elsewhere the call does nothing"
)
def test_freed_memory_stays_with_the_process() -> None:
    kept = int(subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, check=True).stdout)
    assert kept > 90 << 20


def test_a_c_library_without_the_setting_is_left_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda _: object())
    devices.keep_freed_memory()


@pytest.mark.parametrize(("device", "calls"), [("cpu", 1), ("cuda", 0)])
def test_the_command_line_keeps_freed_memory_for_a_training_on_a_cpu(
    device: str, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    run = SimpleNamespace(folder=tmp_path, config=preset("smoke", device=device))
    monkeypatch.setattr(devices, "keep_freed_memory", lambda: called.append("keep"))
    monkeypatch.setattr(jobs, "prepare_run", lambda *_: run)
    monkeypatch.setattr(jobs, "train_run", lambda *_, **__: called.append("train"))
    monkeypatch.setattr(jobs, "evaluate_run", lambda *_, **__: called.append("evaluate"))
    assert run_training("smoke", {}, str(tmp_path), None, resume=False) == tmp_path
    assert called == ["keep"] * calls + ["train", "evaluate"]


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(("environment", "called"), [({"RANK": "3"}, ["flow"]), (TORCHRUN, ["train"])])
def test_with_a_server_a_run_is_a_flow_unless_it_has_several_processes(
    environment: dict[str, str], called: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    run = SimpleNamespace(folder=tmp_path, config=preset("smoke", device="cuda"))
    monkeypatch.setattr(server, "is_configured", lambda: True)
    monkeypatch.setattr(server, "run_flow", lambda *_, **__: calls.append("flow"))
    monkeypatch.setattr(jobs, "prepare_run", lambda *_: run)
    monkeypatch.setattr(jobs, "train_run", lambda *_, **__: calls.append("train"))
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run_training("smoke", {}, str(tmp_path), None, resume=False) is None
    assert calls == called


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"RANK": "0"}, None),  # set by clusters and MPI wrappers
        ({"RANK": "3"}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"RANK": "", "WORLD_SIZE": "1"}, None),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "WORLD_SIZE": "2"}, None),
        (TORCHRUN, (1, 2, 1)),
        (TORCHRUN | {"MASTER_ADDR": ""}, "MASTER_ADDR=(unset)"),
        (TORCHRUN | {"MASTER_PORT": "x"}, "MASTER_PORT=x"),
        (TORCHRUN | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
        (TORCHRUN | {"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        (TORCHRUN | {"RANK": "2"}, "RANK=2"),
        (TORCHRUN | {"RANK": "-1"}, "RANK=-1"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "LOCAL_RANK=(unset), MASTER_ADDR=(unset)"),
    ],
)
def test_the_rank_is_read_only_from_a_complete_torchrun_environment(
    environment: dict[str, str], expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if not isinstance(expected, str):
        assert torchrun_rank() == expected
        return
    with pytest.raises(ConfigError, match=re.escape(expected)) as error:
        torchrun_rank()
    assert "start with torchrun, or unset RANK" in str(error.value)


def test_unreachable_processes_are_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)

    def unreachable(_backend: str) -> None:  # the real timeout takes minutes
        raise torch.distributed.DistNetworkError("the client socket has timed out\nwith a trace")

    monkeypatch.setattr("torch.distributed.init_process_group", unreachable)
    message = "cannot reach the other processes at MASTER_ADDR and MASTER_PORT"
    with pytest.raises(ConfigError, match=message) as error, under_torchrun("cpu"):
        pytest.fail("it must not start")
    assert "\n" not in str(error.value)
