"""Name the machine that benchmarks run on, in a sentence and as a class of machines whose ratios can be compared."""

from __future__ import annotations

import os
import platform
import re
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

LIBRARIES = ("numpy", "isal", "zarr", "zarrs", "nibabel", "simpleitk", "torch", "torchio", "monai")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def describe(load: float) -> str:
    """Date, CPU, cores, memory, versions, and the load average before the benchmark."""
    info = _cpu_info()
    cpu = f"{info.get('model name', platform.machine())} (family {info.get('cpu family')}, model {info.get('model')})"
    flags = ", ".join(flag for flag in FLAGS if flag in info.get("flags", ""))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {_version(name)}" for name in LIBRARIES)
    return (
        f"{datetime.now(UTC):%Y-%m-%d}. {cpu}, {os.cpu_count()} cores, {flags}; {memory:.0f} GiB of memory; "
        f"Linux {platform.release().partition('-')[0]}, Python {platform.python_version()}; {versions}. "
        f"Load average at the start: {load:.1f}."
    )


def machine_class() -> str:
    """The CPU's family and model, and the number of cores, as a file name."""
    info = _cpu_info()
    parts = (info.get("vendor_id", platform.machine()), info.get("cpu family", ""), info.get("model", ""))
    return re.sub(r"[^a-z0-9]+", "-", f"{' '.join(parts)} {os.cpu_count()} cores".lower())


def _cpu_info() -> dict[str, str]:
    """The fields of the last core in /proc/cpuinfo; empty on other systems than Linux."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
