"""Keys of assets: valid for Prefect, one for each folder, and without secrets."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples

from ixi_etl.core.storage import DataRoot
from ixi_etl.errors import ConfigError

NAMES = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=300).filter(
    lambda name: "/" not in name and name not in (".", "..")
)


@given(names=st.lists(NAMES, min_size=1, max_size=3), others=st.lists(NAMES, min_size=1, max_size=3))
@settings(max_examples=examples(60))
def test_every_folder_has_a_valid_key_of_its_own(names: list[str], others: list[str]) -> None:
    from prefect.assets import Asset

    from flows.assets import asset_key

    first, second = ("s3://bucket/" + "/".join(parts) for parts in (names, others))
    keys = [Asset(key=asset_key(each)).key for each in (first, second)]
    assert (keys[0] == keys[1]) == (first == second)


@pytest.mark.parametrize(
    ("folder", "key"),
    [
        ("/data/ixi/datasets/ixi-t1-t2", "file:///data/ixi/datasets/ixi-t1-t2"),
        ("s3://bucket/a.b_c/datasets/ixi-t1-t2", "s3://bucket/a.b_c/datasets/ixi-t1-t2"),
        ("/my scans/100%", "file:///my_scans/100_-a3e7c234b7b5"),
    ],
)
def test_a_key_is_the_address_if_prefect_takes_it(folder: str, key: str) -> None:
    from flows.assets import asset_key

    assert asset_key(folder) == key


def test_a_dataset_on_a_root_with_a_secret_has_no_asset() -> None:
    from flows.assets import dataset_asset

    with pytest.raises(ConfigError):
        dataset_asset(DataRoot("s3://key:secret@bucket/root"))
    asset = dataset_asset(DataRoot("s3://bucket/root", "ixi-pd-t2"))
    assert asset.properties is not None
    assert (asset.key, asset.properties.url) == ("s3://bucket/root/datasets/ixi-pd-t2",) * 2


def test_a_run_is_described_with_its_version(tmp_path: Path) -> None:
    from flows.assets import run_asset

    asset = run_asset(tmp_path / "runs" / "a", "ixi-t1-t2@0123456789ab")
    assert asset.properties is not None
    assert (asset.properties.name, asset.properties.url) == ("run a", (tmp_path / "runs/a/report.html").as_uri())
    assert "ixi-t1-t2@0123456789ab" in str(asset.properties.description)
