"""Choose the device of this process: CPU or GPU, its precision, its rank under torchrun, and its memory settings."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import distributed

from ixi_etl.errors import ConfigError, DeviceError

DEVICES = ("cpu", "cuda", "mps")

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # parameters of mallopt, from glibc's malloc.h


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for later allocations, in the whole process; without glibc, do nothing.

    By default glibc returns blocks above 32 MB to the system, which then clears every page of the next such block. For
    gradients and activations that takes longer than many of the computations. Because the setting applies to the whole
    process, only programs that train on a CPU call this, never the library itself.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def pick_device(wanted: str) -> str:
    """The device to compute on: `auto` means the GPU if there is one, otherwise the CPU.

    Raises:
        DeviceError: the device is not available.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(wanted).type not in DEVICES:
            raise RuntimeError(f"supported are {', '.join(DEVICES)}")
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(f"device {wanted} is not available ({str(error).splitlines()[0]}); try auto") from error
    return wanted


def default_precision(device: str) -> str:
    """`bf16` where the hardware computes in it, otherwise `fp32`: emulated bf16 is slower than fp32."""
    if device.startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "fp32"


def describe_hardware(device: str) -> dict[str, str | int]:
    """Name of the device and, for a CPU, the number of threads: what config.json records."""
    if device.startswith("cuda"):
        return {"device": torch.cuda.get_device_name(device)}
    return {"device": str(torch.cpu.get_capabilities()["cpu_name"]), "threads": torch.get_num_threads()}


class TorchrunRank(NamedTuple):
    """This process among all processes of a training run, and among those on this machine."""

    rank: int
    processes: int
    local_rank: int


def torchrun_rank() -> TorchrunRank | None:
    """The rank that `torchrun` gave this process; None if it trains alone.

    Clusters and MPI wrappers set RANK too, often without the other variables. A single process needs none of them.

    Raises:
        ConfigError: WORLD_SIZE is above 1, but other variables are missing or invalid.
    """
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    values = {name: os.environ.get(name, "") for name in names}
    try:
        rank = TorchrunRank(*(int(values[name]) for name in names[:3]))
        valid = 0 <= rank.rank < rank.processes and 0 <= rank.local_rank < rank.processes
        valid = valid and bool(values["MASTER_ADDR"]) and 0 < int(values["MASTER_PORT"]) < 1 << 16
    except ValueError:
        valid = False
    if not valid:
        shown = ", ".join(f"{name}={value or '(unset)'}" for name, value in values.items())
        advice = "start with torchrun, or unset RANK to train in a single process"
        raise ConfigError(f"the environment does not define a rank among several processes ({shown}); {advice}")
    return rank


@contextmanager
def under_torchrun(device: str) -> Iterator[str]:
    """Join the other processes if `torchrun` started this one; yield the device of this process.

    Raises:
        ConfigError: the other processes cannot be reached.
        DeviceError: there are fewer GPUs than processes on this machine.
    """
    rank = torchrun_rank()
    if rank is None:
        yield device
        return
    cuda = device.startswith("cuda")
    if cuda:
        if rank.local_rank >= torch.cuda.device_count():
            found = f"this machine has {torch.cuda.device_count()} GPUs, too few for process {rank.local_rank}"
            raise DeviceError(f"{found}; start fewer with --nproc-per-node")
        device = f"cuda:{rank.local_rank}"
        torch.cuda.set_device(device)
    try:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    except (RuntimeError, ValueError) as error:  # includes torch's DistError
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"cannot reach the other processes at MASTER_ADDR and MASTER_PORT ({reason})") from error
    try:
        yield device
    finally:
        distributed.destroy_process_group()
