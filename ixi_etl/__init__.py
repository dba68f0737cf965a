"""Turn the IXI brain MRI archives into a verified, versioned, paired Zarr dataset.

The data walks one way through these modules::

    catalog -> download -> archive -> nifti -> survey -> manifest -> align -> cut -> store -> report -> publish

``refresh`` strings them together, ``digits`` does the like for MNIST, and ``dataset`` reads what was published.
Nothing in this package imports Prefect or torch.
"""

__version__ = "0.1.0"

PIPELINE_VERSION = 6
"""Part of every version's name. Raise it whenever the same inputs would give other bytes."""
