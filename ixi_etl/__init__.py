"""Turn the IXI brain MRI archives into a verified, versioned, paired Zarr dataset.

The data walks one way through these modules::

    catalog -> download -> archive -> nifti -> survey -> manifest -> align -> cut -> store -> dataset -> report

``refresh`` strings them together. Nothing in this package imports Prefect or torch.
"""

__version__ = "0.1.0"

PIPELINE_VERSION = 2
"""Part of every version's name. Raise it whenever the same inputs would give other bytes."""
