"""Turn the IXI brain MRI archives into a verified, versioned, paired Zarr dataset.

The sub-packages are the stages of the data's way::

    sources -> scans -> pairing -> dataset -> report

``recipes`` runs the stages, one module per dataset; ``core`` has files, storage and parallel work; ``testing`` has
simulated archives. Nothing in this package imports Prefect or torch.
"""

__all__ = ["PIPELINE_VERSION", "__version__"]

__version__ = "0.2.0"

PIPELINE_VERSION = 9
"""Part of every version's name. Raise it whenever the same inputs would give other bytes."""
