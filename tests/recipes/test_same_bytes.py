"""Versions have the same bytes on every CPU: registration uses other code paths of BLAS, NumPy and libm."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ixi_etl.pairing.heads import Volume, averaged
from ixi_etl.testing.phantom import rigid, write_phantom

WIDE = "AVX2 FMA3 AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR"
CPUS = {
    "this CPU": {},
    "Intel of 2004": {"OPENBLAS_CORETYPE": "Prescott", "NPY_DISABLE_CPU_FEATURES": WIDE},
    "Intel of 2008": {"OPENBLAS_CORETYPE": "Nehalem"},
    "Intel of 2013": {"OPENBLAS_CORETYPE": "Haswell"},
    "AMD Zen": {"OPENBLAS_CORETYPE": "Zen"},
    "without FMA": {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4,-AVX,-AVX512F,-AVX2_Usable,-FMA_Usable"},
}

REFRESH = """
import sys
from ixi_etl.config import RefreshConfig
from ixi_etl.recipes.ixi import refresh
print(refresh(RefreshConfig(root=sys.argv[1], source=sys.argv[2], workers=2)).folder)
"""


@pytest.mark.stack  # takes a minute; a quick test is below
def test_registered_versions_are_the_same_bytes_on_every_cpu(tmp_path: Path) -> None:
    write_phantom(tmp_path / "source", subjects=6, seed=11, shrink=3)
    found = {}
    for cpu, settings in CPUS.items():
        command = [sys.executable, "-c", REFRESH, str(tmp_path / cpu), str(tmp_path / "source")]
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=True)
        folder = Path(done.stdout.split("\n")[-2])
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        found[cpu] = {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    assert len(found["this CPU"]) > 20
    for cpu, files in found.items():
        assert files == found["this CPU"], cpu


@pytest.mark.parametrize("ulps", [-3, 3])
def test_last_bits_of_an_affine_do_not_reach_the_registration(ulps: int) -> None:
    """The grids of both levels are the same whatever the last bits of the affine."""
    voxels = np.zeros((12, 12, 12), np.int16)
    affine = rigid((5, 3, 8), (11, -7, 4)) @ np.diag([0.9375, 0.9375, 1.25, 1])
    for spacing in (1.0, 4.0):
        (_, a), (_, b) = (averaged(Volume(voxels, m), spacing) for m in (affine, affine + ulps * np.spacing(affine)))
        np.testing.assert_array_equal(a, b)
