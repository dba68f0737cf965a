"""Fixtures made once: small phantom archives, and a version refreshed from them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from ixi_etl.config import DatasetConfig, RefreshConfig
from ixi_etl.phantom import write_phantom
from ixi_etl.publish import Refreshed
from ixi_etl.refresh import refresh

# Networks of a few channels wait for each other more than they compute; and processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("here", deadline=None)  # machines differ, and the first call imports
settings.load_profile("here")

SHRINK = 4  # of the phantom's grids: IXI's shapes, a quarter of the voxels along each axis
SLICES = 12  # of the 33 that are left of the T2's 130


@pytest.fixture(scope="session")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both archives, oddities and MD5SUMS; tests only read it."""
    folder = tmp_path_factory.mktemp("archives")
    write_phantom(folder, subjects=6, seed=3, shrink=SHRINK)
    return folder


def config_for(root: Path, source: Path | str, **dataset: object) -> RefreshConfig:
    """A refresh of the phantom without registration, which has tests of its own and takes most of the time."""
    chosen = DatasetConfig.model_validate({"slices": SLICES, "registration": "none"} | dataset)
    return RefreshConfig(root=root, source=str(source), dataset=chosen, workers=2)


@pytest.fixture(scope="session")
def published(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Refreshed:
    """The version that `paired` makes of the phantom; tests only read it."""
    return refresh(config_for(tmp_path_factory.mktemp("root"), archives))
