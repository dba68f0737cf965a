"""Turn the IXI brain MRI archives into a verified, versioned, paired Zarr dataset.

The sub-packages are the stages of the data's way::

    sources -> scans -> pairing -> dataset -> report

``recipes`` runs the stages, one module per dataset; ``loading`` opens what they publish; ``core`` has files, storage
and parallel work; ``testing`` has simulated archives. Nothing in this package imports Prefect, or torch before it is
used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ixi_etl.loading.version import open_version

__all__ = ["PIPELINE_VERSION", "__version__", "open_version"]

__version__ = "0.3.0.dev0"

PIPELINE_VERSION = 11
"""Part of every version's name. Raise it whenever the same inputs would give other bytes."""


def __getattr__(name: str) -> Any:
    """Import `open_version` when it is used: pandas takes longer than the rest of a command."""
    if name == "open_version":
        return import_module("ixi_etl.loading.version").open_version
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
