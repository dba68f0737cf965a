"""A version on S3 is exported like a local one."""

from __future__ import annotations

from pathlib import Path

from conftest import OnS3
from consumers import hashes

from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.exports.export import export_dataset


def test_a_version_on_s3_gives_the_same_export(on_s3: OnS3, published: PublishedVersion, tmp_path: Path) -> None:
    export_dataset(on_s3.made.folder, "nifti", tmp_path / "s3")
    export_dataset(published.folder, "nifti", tmp_path / "local")
    assert hashes(tmp_path / "s3") == hashes(tmp_path / "local")
