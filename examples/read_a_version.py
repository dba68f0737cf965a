"""python examples/read_a_version.py ixi-data

Read the latest version of the dataset with pandas, zarr and xarray. This script imports nothing of this project.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import xarray as xr
import zarr


def main(root: str) -> None:
    datasets = Path(root) / "datasets" / "ixi-t1-t2"
    version = datasets / json.loads((datasets / "latest.json").read_text())["version"]

    manifest = pd.read_csv(version / "manifest.csv")
    used = manifest[manifest["status"] == "used"].astype({"store_row": int}).set_index("subject_id")
    print(f"{version.name}: {len(used)} of {len(manifest)} subjects are used")
    print(manifest["reason"].value_counts().to_string())

    # zarr-python: NumPy arrays, indexed by the manifest's store_row.
    subject = used.index[0]
    row = used.loc[subject]
    arrays = zarr.open_group(version / "slices.zarr", mode="r")
    slab = arrays["t1"][int(row["store_row"])]  # int16 [z, y, x]
    scaled = (slab - row["t1_p_low"]) / (row["t1_p_high"] - row["t1_p_low"])  # percentiles 0.1 and 99.9 become 0 and 1
    print(f"{subject}: t1 {slab.shape} {slab.dtype}, {scaled.min():.2f} to {scaled.max():.2f} of its percentile range")

    # xarray: lazy, and indexed by name. Dask computes the mean in parallel.
    data = xr.open_zarr(version / "slices.zarr")
    mean = data["t2"].sel(subject=subject).isel(z=0).mean().compute()
    print(f"{subject}: mean of the lowest T2 slice {float(mean):.1f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
