"""A root on S3 holds what a folder would, appears whole or not at all, and is read by the same functions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import OnS3, config_for, logged, requests_in
from upath import UPath

from ixi_etl import dataset
from ixi_etl.config import RefreshConfig
from ixi_etl.errors import IxiError
from ixi_etl.files import silent, write_atomic
from ixi_etl.places import Places, file_sizes, place, upload
from ixi_etl.refresh import Refreshed, refresh
from ixi_etl.store import open_arrays


def put(published: Refreshed, config: RefreshConfig) -> UPath:
    """The version on S3, as a refresh leaves it there."""
    places = Places(config.root)
    target = places.version(published.version)
    upload(published.folder, target, last=dataset.FACTS, progress=silent)
    write_atomic(places.datasets / dataset.POINTER, (published.folder.parent / dataset.POINTER).read_bytes())
    return target


@pytest.fixture
def config(s3_root: str, archives: Path, tmp_path: Path) -> RefreshConfig:
    return config_for(s3_root, archives, tmp_path)


def test_a_version_on_s3_is_the_local_one(on_s3: OnS3, published: Refreshed) -> None:
    config, made = on_s3.config, on_s3.made
    assert (made.version, made.is_new) == (published.version, True)
    assert str(made.folder) == f"{config.root}/datasets/ixi-t1-t2/{made.version}"
    assert dataset.read_facts(made.folder) == dataset.read_facts(published.folder)  # with the SHA-256 of every file
    assert dataset.verify(made.folder, deep=True) == []
    assert dataset.read_manifest(made.folder).equals(dataset.read_manifest(published.folder))
    there, here = open_arrays(made.folder), open_arrays(published.folder)
    assert {n: a.attrs.asdict() for n, a in there.items()} == {n: a.attrs.asdict() for n, a in here.items()}
    assert all(np.array_equal(np.asarray(there[n]), np.asarray(here[n])) for n in here)
    again = refresh(config)
    assert (again.version, again.is_new) == (published.version, False)
    assert dataset.resolve(Places(config.root)) == published.version
    assert not list(Path(config.scratch or "").rglob("*.shard"))  # what was being made is cleared away
    assert {name.partition("/")[0] for name in file_sizes(place(config.root))} == {"datasets"}


def test_the_version_is_complete_before_it_says_so_and_the_pointer_is_last(on_s3: OnS3) -> None:
    written = [url for method, url, _ in on_s3.requests if method == "PUT"]
    prefix = "/" + on_s3.made.folder.parent.as_posix().removeprefix("s3://")
    assert written[-2:] == [f"{prefix}/{on_s3.made.version}/dataset.json", f"{prefix}/latest.json"]
    assert len(written) > len(dataset.read_facts(on_s3.made.folder)["files"])


@pytest.mark.stack
def test_an_upload_that_was_killed_is_no_version_and_is_done_again(config: RefreshConfig, published: Refreshed) -> None:
    places, target = Places(config.root), put(published, config)
    (places.datasets / dataset.POINTER).unlink()
    (target / dataset.FACTS).unlink()
    (target / "stray").write_bytes(b"of another time")
    assert dataset.published(places) == []
    with pytest.raises(IxiError, match="has no published version"):
        dataset.resolve(places)
    assert refresh(config).is_new
    assert dataset.verify(target) == []


@pytest.mark.stack
def test_a_version_damaged_on_s3_is_seen_and_mended_without_being_removed(
    config: RefreshConfig, published: Refreshed
) -> None:
    made = put(published, config)
    shard = made / "slices.zarr/t1/c/0/0/0/0"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # which only --deep can see
    assert dataset.verify(made, deep=True) != []
    shard.write_bytes(whole[:-1])
    assert dataset.verify(made) != []
    with logged() as records:
        assert refresh(config).is_new
    assert not [asked for asked in requests_in(records) if asked[0] == "DELETE" or "?delete" in asked[1]]
    assert shard.read_bytes() == whole
    assert dataset.verify(made) == []


@pytest.mark.stack  # a fault beyond the first one
def test_a_version_of_which_an_object_was_removed_is_mended(config: RefreshConfig, published: Refreshed) -> None:
    made = put(published, config)
    (made / "slices.zarr/t1/c/0/0/0/0").unlink()
    assert dataset.verify(made) != []
    assert refresh(config).is_new
    assert dataset.verify(made, deep=True) == []


def test_archives_on_s3_are_read_where_they_lie(
    s3_root: str, archives: Path, published: Refreshed, tmp_path: Path
) -> None:
    upload(archives, place(f"{s3_root}/archives"), last="MD5SUMS", progress=silent)
    made = refresh(config_for(tmp_path, f"{s3_root}/archives"))
    assert made.version == published.version
    assert not list(tmp_path.rglob("*.tar"))


def test_a_bucket_that_is_not_there_is_said_before_any_work(s3: None, archives: Path, tmp_path: Path) -> None:
    with pytest.raises(IxiError, match=r"cannot reach the bucket nowhere of s3://nowhere/x .*does not exist"):
        refresh(config_for("s3://nowhere/x", archives, tmp_path))
    with pytest.raises(IxiError, match="cannot reach the bucket nowhere"):
        dataset.resolve(Places("s3://nowhere/x"))
    assert not list(tmp_path.rglob("*.json"))


def test_the_command_line_reads_from_s3(on_s3: OnS3, capsys: pytest.CaptureFixture[str]) -> None:
    from flows.cli import main

    for command, said in (("verify", "is sound"), ("versions", f"{on_s3.made.version} (latest)")):
        with pytest.raises(SystemExit) as ended:
            main([command, "--root", str(on_s3.config.root)])
        assert (ended.value.code or 0, said in capsys.readouterr().out) == (0, True)


def test_scratch_is_for_a_root_on_s3_only(tmp_path: Path) -> None:
    assert RefreshConfig(root=tmp_path / "a", scratch=tmp_path / "b").places.archives == tmp_path / "a/archives"
    assert RefreshConfig(root="s3://a/b", scratch=tmp_path / "b").places.archives == tmp_path / "b/archives"
