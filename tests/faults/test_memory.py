"""The memory of a refresh does not grow with the number of subjects."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from faults_table import Row

from ixi_etl.config import RefreshConfig
from ixi_etl.modalities import DEFAULT_MODALITIES, archive_name
from ixi_etl.testing.phantom import PhantomSubject, simulate, write_tar

pytestmark = pytest.mark.faults

CHILD = """
import sys
from pathlib import Path
from ixi_etl.config import RefreshConfig
from ixi_etl.recipes.ixi import refresh
refresh(RefreshConfig.model_validate_json(sys.argv[1]))
print([line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")][0].split()[1])
"""


def peak_of(config: RefreshConfig) -> int:
    """Peak resident memory of a refresh in bytes; the refresh starts no other process, so its own peak is the total."""
    command = [sys.executable, "-c", CHILD, config.model_dump_json()]
    # VmHWM as the child reads it: the kernel's figure for a child includes the memory of this process at the fork.
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    refresh, others = psutil.Process(child.pid), set()
    while child.poll() is None:
        with suppress(psutil.NoSuchProcess):
            # The refresh asks git for the commit; git is small and not part of the work.
            others |= {other.pid for other in refresh.children(recursive=True) if other.name() != "git"}
        time.sleep(0.05)
    output, _ = child.communicate()
    assert child.returncode == 0
    assert not others, "the refresh started processes, whose memory is not counted"
    return int(output) << 10


def test_peak_memory_does_not_grow_with_the_number_of_subjects(tmp_path: Path, row: Row) -> None:
    """8, 16 and 32 subjects with scans of full size, registered, on two workers."""
    heads = [simulate(PhantomSubject(n, "Guys", 1, moved=bool(n % 2)))[0] for n in range(4)]  # repeated below
    peaks = {}
    for subjects in (8, 16, 32):
        source = tmp_path / f"source{subjects}"
        source.mkdir()
        for m in DEFAULT_MODALITIES:
            members = {f"IXI{n:03d}-Guys-{n:04d}-{m}.nii.gz": heads[n % 4][m] for n in range(subjects)}
            write_tar(source / archive_name(m), members)
        config = RefreshConfig(root=str(tmp_path / f"root{subjects}"), source=str(source), workers=2)
        peaks[subjects] = peak_of(config)
        for path in source.iterdir():
            path.unlink()
    outcome = ", ".join(f"{n} subjects: {peak / 2**20:.0f} MiB" for n, peak in peaks.items())
    row("memory", len(peaks), outcome, "none")
    assert max(peaks.values()) < 1 << 30, outcome
    assert peaks[32] - peaks[8] < 100 << 20, outcome  # the slabs alone of 24 subjects are 126 MB
