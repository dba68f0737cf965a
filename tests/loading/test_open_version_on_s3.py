"""A version on S3 opens like one in a folder, and gives the same values."""

from __future__ import annotations

from typing import Any

import numpy as np
from conftest import OnS3

import ixi_etl
from ixi_etl.dataset.publish import PublishedVersion


def test_a_version_on_s3_gives_what_a_local_one_gives(on_s3: OnS3, published: PublishedVersion, torch: Any) -> None:
    root = str(on_s3.config.root)
    there, here = ixi_etl.open_version(root), ixi_etl.open_version(published.folder.parents[2])
    assert there.name == here.name == ixi_etl.open_version("nowhere", str(on_s3.made.folder)).name
    assert there.manifest.equals(here.manifest)
    assert repr(there).endswith(f"{root}/datasets/ixi-t1-t2/{published.version}>")
    remote, local = there.xarray(), here.xarray()
    assert remote["t2"].chunks == local["t2"].chunks
    subject = str(remote["subject"][0].values)
    np.testing.assert_array_equal(remote["t2"].sel(subject=subject), local["t2"].sel(subject=subject))
    assert remote.drop_vars(["t1", "t2"]).identical(local.drop_vars(["t1", "t2"]))
    image = there.nifti(subject, "T1")
    np.testing.assert_array_equal(image.get_fdata(), here.nifti(subject, "T1").get_fdata())
    split = str(remote["split"][0].values)
    batch = next(iter(torch.utils.data.DataLoader(there.torch(split), batch_size=3, num_workers=1, timeout=120)))
    assert torch.equal(batch["t1"], torch.stack([here.torch(split)[n]["t1"] for n in range(3)]))
