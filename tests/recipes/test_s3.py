"""A root on S3 has the same content as a folder, appears atomically, and is read by the same functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import OnS3, capture_logs, config_for, requests_in
from upath import UPath

from ixi_etl.config import RefreshConfig
from ixi_etl.core.files import write_atomic
from ixi_etl.core.lease import LEASE, Lease, LeaseTimes, lock_data_root
from ixi_etl.core.progress import no_progress
from ixi_etl.core.storage import DataRoot, file_sizes, to_path, upload_folder
from ixi_etl.dataset import metadata, publish, verify, versions
from ixi_etl.dataset.prune import prune_versions
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.dataset.store import open_arrays
from ixi_etl.errors import IxiError, LockedError
from ixi_etl.recipes.ixi import refresh


def upload_version(published: PublishedVersion, config: RefreshConfig) -> UPath:
    """Upload the version and its pointer as a refresh does; return its folder on S3."""
    data_root = DataRoot(config.root)
    target = data_root.version(published.version)
    upload_folder(published.folder, target, last=metadata.METADATA, progress=no_progress)
    write_atomic(data_root.datasets / metadata.POINTER, (published.folder.parent / metadata.POINTER).read_bytes())
    return target


@pytest.fixture
def config(s3_root: str, archives: Path, tmp_path: Path) -> RefreshConfig:
    return config_for(s3_root, archives, tmp_path)


def test_a_version_on_s3_equals_the_local_one(on_s3: OnS3, published: PublishedVersion) -> None:
    config, made = on_s3.config, on_s3.made
    assert (made.version, made.is_new) == (published.version, True)
    assert str(made.folder) == f"{config.root}/datasets/ixi-t1-t2/{made.version}"
    assert metadata.read_metadata(made.folder) == metadata.read_metadata(
        published.folder
    )  # with the SHA-256 of every file
    assert verify.verify(made.folder, deep=True) == []
    assert metadata.read_manifest(made.folder).equals(metadata.read_manifest(published.folder))
    remote, local = open_arrays(made.folder), open_arrays(published.folder)
    assert {n: a.attrs.asdict() for n, a in remote.items()} == {n: a.attrs.asdict() for n, a in local.items()}
    assert all(np.array_equal(np.asarray(remote[n]), np.asarray(local[n])) for n in local)
    again = refresh(config)
    assert (again.version, again.is_new) == (published.version, False)
    assert versions.resolve_version(DataRoot(config.root)) == published.version
    assert not list(Path(config.scratch or "").rglob("*.shard"))  # unfinished work is deleted
    assert {name.partition("/")[0] for name in file_sizes(to_path(config.root))} == {"datasets", ".lock.json"}


def test_metadata_and_pointer_are_uploaded_last(on_s3: OnS3) -> None:
    """And unhashed files just before them, after the lock was confirmed."""
    written = [url.rpartition("/")[2] for method, url, _ in on_s3.requests if method == "PUT"]
    confirmed = [*sorted(metadata.UNHASHED), metadata.METADATA, LEASE, metadata.POINTER]
    assert written[-9:] == [LEASE, *confirmed, LEASE, LEASE]  # before staging is removed, and released
    prefix = "/" + on_s3.made.folder.parent.as_posix().removeprefix("s3://")
    urls = {url for method, url, _ in on_s3.requests if method == "PUT"}
    assert urls >= {f"{prefix}/{on_s3.made.version}/{metadata.METADATA}", f"{prefix}/{metadata.POINTER}"}
    assert len(urls) > len(metadata.read_metadata(on_s3.made.folder)["files"])


@pytest.mark.stack
def test_a_killed_upload_is_not_a_version_and_is_repeated(config: RefreshConfig, published: PublishedVersion) -> None:
    data_root, target = DataRoot(config.root), upload_version(published, config)
    (data_root.datasets / metadata.POINTER).unlink()
    (target / metadata.METADATA).unlink()
    (target / "stray").write_bytes(b"left over")
    assert versions.published_versions(data_root) == []
    with pytest.raises(IxiError, match="has no published version"):
        versions.resolve_version(data_root)
    assert refresh(config).is_new
    assert verify.verify(target) == []


@pytest.mark.stack
def test_a_damaged_version_on_s3_is_repaired_in_place(config: RefreshConfig, published: PublishedVersion) -> None:
    made = upload_version(published, config)
    shard = made / "slices.zarr/t1/c/0/0/0/0"
    original = shard.read_bytes()
    shard.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))  # only --deep detects this
    assert verify.verify(made, deep=True) != []
    shard.write_bytes(original[:-1])
    assert verify.verify(made) != []
    with capture_logs() as records:
        assert refresh(config).is_new
    assert not [request for request in requests_in(records) if request[0] == "DELETE" or "?delete" in request[1]]
    assert shard.read_bytes() == original
    assert verify.verify(made) == []


@pytest.mark.stack
def test_a_version_with_a_missing_object_is_repaired(config: RefreshConfig, published: PublishedVersion) -> None:
    made = upload_version(published, config)
    (made / "slices.zarr/t1/c/0/0/0/0").unlink()
    assert verify.verify(made) != []
    assert refresh(config).is_new
    assert verify.verify(made, deep=True) == []


def test_archives_on_s3_are_read_in_place(
    s3_root: str, archives: Path, published: PublishedVersion, tmp_path: Path
) -> None:
    upload_folder(archives, to_path(f"{s3_root}/archives"), last="MD5SUMS", progress=no_progress)
    made = refresh(config_for(tmp_path, f"{s3_root}/archives"))
    assert made.version == published.version
    assert not list(tmp_path.rglob("*.tar"))


def test_a_missing_bucket_is_reported_before_any_work(s3: None, archives: Path, tmp_path: Path) -> None:
    with pytest.raises(IxiError, match=r"cannot reach the bucket nowhere of s3://nowhere/x .*does not exist"):
        refresh(config_for("s3://nowhere/x", archives, tmp_path))
    with pytest.raises(IxiError, match="cannot reach the bucket nowhere"):
        versions.resolve_version(DataRoot("s3://nowhere/x"))
    assert not list(tmp_path.rglob("*.json"))


def take_over(config: RefreshConfig, elsewhere: Path) -> Lease:
    """Let another machine take over the lock of the root, as if it had expired."""
    elsewhere.mkdir()
    (to_path(config.root) / LEASE).unlink()
    lease = Lease(to_path(config.root), "--root", LeaseTimes())
    assert lease.acquire(elsewhere)
    return lease


def test_a_refresh_that_lost_its_lock_publishes_nothing(
    config: RefreshConfig, published: PublishedVersion, tmp_path: Path
) -> None:
    data_root, others = config.data_root, list[Lease]()

    def progress(stage: str, done: int, total: int, unit: str) -> None:
        if stage == "hash files" and not others:  # all is ready to be published
            others.append(take_over(config, tmp_path / "elsewhere"))

    with pytest.raises(LockedError, match=r"is now locked by process \d+ on .* run again to resume when the other has"):
        refresh(config, progress)
    assert {name.partition("/")[0] for name in file_sizes(to_path(config.root))} == {".lock.json"}
    with pytest.raises(LockedError, match="is in use by process"):
        prune_versions(data_root, 1)
    others[0].release()
    assert refresh(config) == PublishedVersion(published.version, data_root.version(published.version), is_new=True)


def test_a_refresh_that_loses_its_lock_while_it_uploads_leaves_the_files_of_another_alone(
    config: RefreshConfig, published: PublishedVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files that it wrote before it noticed have the same bytes, whoever writes them."""
    target = config.data_root.version(published.version)

    def upload(*given: Any, **more: Any) -> None:
        take_over(config, tmp_path / "elsewhere")
        for name in (*metadata.UNHASHED, metadata.METADATA):
            (target / name).write_bytes(b"of another process")
        upload_folder(*given, **more)

    monkeypatch.setattr(publish, "upload_folder", upload)
    with pytest.raises(LockedError, match="it will publish nothing more"):
        refresh(config)
    own = metadata.read_metadata(published.folder)["files"].keys()
    assert {
        name: data == (published.folder / name).read_bytes()
        for name in file_sizes(target)
        if (data := (target / name).read_bytes()) != b"of another process"
    } == dict.fromkeys(own, True)
    assert not (config.data_root.datasets / metadata.POINTER).exists()


def test_a_pointer_that_another_process_wrote_is_not_overwritten(
    config: RefreshConfig, published: PublishedVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_root = config.data_root
    upload_version(published, config)
    pointer = data_root.datasets / metadata.POINTER
    pointer.unlink()

    def read_pointer(data_root: DataRoot) -> None:
        pointer.write_bytes(b"of another process")

    with monkeypatch.context() as patch, lock_data_root(data_root):
        patch.setattr(publish, "read_pointer", read_pointer)
        patch.setattr(publish, "_back_up_damaged_pointer", lambda _: None)
        with pytest.raises(
            LockedError, match=r"another process wrote s3://\S+/latest.json at the same time; run again"
        ):
            publish.find_published(data_root, published.version, {})
    assert pointer.read_bytes() == b"of another process"


def test_the_command_line_reads_from_s3(on_s3: OnS3, capsys: pytest.CaptureFixture[str]) -> None:
    from flows.cli import main

    for command, text in (("verify", "is intact"), ("versions", f"{on_s3.made.version} (latest)")):
        with pytest.raises(SystemExit) as ended:
            main([command, "--root", str(on_s3.config.root)])
        assert (ended.value.code or 0, text in capsys.readouterr().out) == (0, True)


def test_scratch_is_for_a_root_on_s3_only(tmp_path: Path) -> None:
    assert RefreshConfig(root=tmp_path / "a", scratch=tmp_path / "b").data_root.archives == tmp_path / "a/archives"
    assert RefreshConfig(root="s3://a/b", scratch=tmp_path / "b").data_root.archives == tmp_path / "b/archives"
