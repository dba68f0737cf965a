"""A version on S3 is exported like a local one."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import OnS3
from consumers import hashes

from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.errors import DatasetError
from ixi_etl.exports.export import export_dataset


def test_a_version_on_s3_gives_the_same_export(on_s3: OnS3, published: PublishedVersion, tmp_path: Path) -> None:
    export_dataset(on_s3.made.folder, "nifti", tmp_path / "s3")
    export_dataset(published.folder, "nifti", tmp_path / "local")
    assert hashes(tmp_path / "s3") == hashes(tmp_path / "local")


def test_whole_scans_of_a_version_on_s3_come_from_given_archives(on_s3: OnS3, archives: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"has no archives, only versions; give the archives or the folder"):
        export_dataset(on_s3.made.folder, "bids-raw", tmp_path / "out")
    export_dataset(on_s3.made.folder, "bids-raw", tmp_path / "out", source=str(archives))
    assert len(list((tmp_path / "out").rglob("*.nii.gz"))) == 12
