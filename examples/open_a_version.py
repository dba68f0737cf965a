"""python examples/open_a_version.py ixi-data [OUT.nii.gz]

Open the latest version of the dataset with one call, and read it with pandas, xarray, PyTorch and nibabel.
"""

from __future__ import annotations

import sys

import torch

import ixi_etl


def main(root: str, out: str | None = None) -> None:
    version = ixi_etl.open_version(root, "latest")
    print(version)

    # pandas: who is in which split.
    used = version.manifest[version.manifest["status"] == "used"]
    print(used.groupby(["split", "site"]).size().to_string())

    # xarray: lazy, by subject and by site. dask computes the means in parallel.
    data = version.xarray(scanner_units=True)
    means = data["t2"].mean(["z", "y", "x"]).compute()
    print(means.groupby("site").mean().to_series().round(1).to_string())

    # PyTorch: normalised pairs, in worker processes.
    split = str(data["split"][0].values)
    loader = torch.utils.data.DataLoader(version.torch(split), batch_size=8, shuffle=True, num_workers=2)
    batch = next(iter(loader))
    print(f"{split}: t1 {tuple(batch['t1'].shape)}, {float(batch['t1'].min()):g} to {float(batch['t1'].max()):g}")

    # nibabel: a slab for any viewer.
    subject = str(data["subject"][0].values)
    image = version.nifti(subject, "T2")
    print(f"{subject}: T2 slab {image.shape}, voxels of {image.header.get_zooms()} mm")
    if out:
        image.to_filename(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
