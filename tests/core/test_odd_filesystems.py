"""File systems without optional operations, paths with any characters, S3 prefixes, and the number of cores."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import OnS3, capture_logs, config_for, requests_in
from pydantic import ValidationError

from flows.cli import main
from ixi_etl.config import RefreshConfig, format_validation_error
from ixi_etl.core import storage
from ixi_etl.core.files import SYNC_REFUSED, fsync_path, lock_root, os_errors_as_user_errors, write_atomic
from ixi_etl.core.parallel import usable_cores
from ixi_etl.core.storage import DataRoot, naming_file, to_path
from ixi_etl.dataset import metadata, store, verify, versions
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.errors import IxiError
from ixi_etl.recipes.ixi import refresh

NOT_UTF8 = os.fsdecode(b"not utf-8 \xff")


def fsync_raises(patch: pytest.MonkeyPatch, number: int, applies: Callable[[int], bool] = lambda mode: True) -> None:
    original = os.fsync

    def fsync(handle: int) -> None:
        if applies(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        original(handle)

    patch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("number", sorted(SYNC_REFUSED), ids=errno.errorcode.get)
def test_files_are_written_where_sync_is_unsupported(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync_raises(monkeypatch, number)
    write_atomic(tmp_path / "file", "text")
    fsync_path(tmp_path / "file")
    fsync_path(tmp_path)
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_failed_sync_is_a_one_line_error_with_the_path(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync_raises(monkeypatch, number)
    for write in (lambda: write_atomic(tmp_path / "file", "text"), lambda: fsync_path(tmp_path)):
        message = re.escape(f"cannot read or write {tmp_path}") + f".*: {os.strerror(number)};"
        with pytest.raises(IxiError, match=message), os_errors_as_user_errors():
            write()


def test_a_version_is_published_without_syncs_and_hard_links(
    archives: Path, published: PublishedVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **more: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    fsync_raises(monkeypatch, errno.EINVAL, stat.S_ISDIR)
    monkeypatch.setattr(os, "link", refuse)
    made = refresh(config_for(tmp_path, archives))
    assert metadata.read_metadata(made.folder) == metadata.read_metadata(published.folder)


def test_refused_hard_link_becomes_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **more: Any) -> None:
        raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_text("text")
    store.link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "text"


def test_file_system_without_locks_is_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(IxiError, match=f"{tmp_path}, or lock it: .*; choose another --root"), lock_root(tmp_path):
        pass


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.EIO, "broken", "a"), "a: broken"),
        (OSError(errno.EXDEV, "across", "a", None, "b"), "a -> b: across"),
        (OSError(errno.EIO, "broken", b"a\xff"), r"a\udcff: broken"),
        (OSError(errno.EIO, "broken", NOT_UTF8), r"not utf-8 \udcff: broken"),
        (OSError(errno.EIO, "broken", 7), "broken"),  # a file descriptor is not shown
        (OSError("only text"), "only text"),
        (OSError(), "OSError"),
    ],
    ids=repr,
)
def test_disk_error_is_one_line_with_its_paths(error: OSError, text: str) -> None:
    with (
        pytest.raises(IxiError, match=re.escape(f"cannot read or write {text}; fix that, and run again")),
        os_errors_as_user_errors(),
    ):
        raise error


def test_error_without_a_file_name_names_the_given_path() -> None:
    for error, text in (
        (OSError("only text"), "given: only text"),
        (OSError(5, "broken", "its own"), "its own: broken"),
    ):
        line = f"cannot read or write {text};"
        with pytest.raises(IxiError, match=line), os_errors_as_user_errors(), naming_file("given"):
            raise error


# -- paths ------------------------------------------------------------------------------------------------------------


def test_paths_may_have_any_characters(
    archives: Path, published: PublishedVersion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, source = tmp_path / "r a%20#?é[1]*{x};'\"&", tmp_path / "s a%20#?é[1]*::x"
    shutil.copytree(archives, source)
    made = refresh(config_for(root, source))
    assert metadata.read_metadata(made.folder) == metadata.read_metadata(published.folder)
    assert verify.verify(made.folder, deep=True) == []
    assert not refresh(config_for(root, source)).is_new
    for command in (["versions"], ["prune", "--keep", "1"]):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--root", str(root)])
        assert not ended.value.code
        assert made.version in capsys.readouterr().out


@pytest.mark.parametrize("field", ["root", "scratch", "source", "demographics"])
def test_path_that_is_not_utf8_is_a_one_line_error_with_the_path(field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        RefreshConfig.model_validate({field: f"/data/{NOT_UTF8}"})
    message = format_validation_error(caught.value)
    assert message.startswith(f"{field}: ")
    assert r"/data/not utf-8 \udcff is not UTF-8" in message
    message.encode()


@pytest.mark.parametrize("name", [NOT_UTF8, "a::b", "a\nb"])
@pytest.mark.parametrize("command", [["verify"], ["versions"], ["prune", "--keep", "1"], ["digits"], ["refresh"]])
def test_unusable_root_is_a_one_line_error(
    command: list[str], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--root", str(tmp_path / name)])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert storage.printable(str(tmp_path / name)) in line
    assert not list(tmp_path.iterdir())


def test_too_long_path_is_a_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long_path = tmp_path / ("x" * 300)
    with pytest.raises(IxiError, match=f"{long_path}, or lock it: File name too long"):
        refresh(config_for(long_path, tmp_path))
    for command in ("verify", "versions"):
        with pytest.raises(SystemExit) as ended:
            main([command, "--root", str(long_path)])
        (line,) = capsys.readouterr().err.splitlines()
        assert ended.value.code == 1
        assert str(long_path) in line


def test_reading_writes_nothing(published: PublishedVersion, capsys: pytest.CaptureFixture[str]) -> None:
    """A read-only root can therefore be read."""
    root = published.folder.parents[2]
    before = {path: path.stat().st_ctime_ns for path in (root, *root.rglob("*"))}
    for command in (["verify", "--deep"], ["versions"], ["versions", "latest"], ["prune", "--keep", "1", "--dry-run"]):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--root", str(root)])
        assert not ended.value.code, capsys.readouterr().err
    assert {path: path.stat().st_ctime_ns for path in (root, *root.rglob("*"))} == before


# -- S3 ---------------------------------------------------------------------------------------------------------------


def test_s3_requests_stay_within_the_prefix_of_the_root(on_s3: OnS3) -> None:
    """An access key can therefore be restricted to it."""
    root = str(on_s3.config.root)
    bucket, _, prefix = root.removeprefix("s3://").partition("/")
    with capture_logs() as records:
        for command in (["verify"], ["versions"], ["prune", "--keep", "1", "--dry-run"]):
            with pytest.raises(SystemExit) as ended:
                main([*command, "--root", root])
            assert not ended.value.code
    requests = on_s3.requests + requests_in(records)
    assert len(requests) > 20
    for method, url, _ in requests:
        path, _, query = url.partition("?")
        is_bucket = path.rstrip("/") == f"/{bucket}"
        match = re.search(r"(?:^|&)prefix=([^&]*)", query) if is_bucket else re.match(f"/{bucket}/(.*)", path)
        assert match, (method, url)
        assert re.sub("(?i)%2f", "/", match[1]).startswith(f"{prefix}/"), (method, url)


def test_denied_listing_is_one_line_with_the_needed_permissions(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    filesystem, _ = storage.filesystem_of(to_path(s3_root))

    def deny(*arguments: Any, **more: Any) -> None:
        raise PermissionError(errno.EACCES, "Access Denied")

    monkeypatch.setattr(type(filesystem), "call_s3", deny)
    with pytest.raises(IxiError, match=rf"cannot list {s3_root} \(.*Access Denied\); .* need s3:ListBucket"):
        versions.resolve_version(DataRoot(s3_root))


def test_replaced_object_has_another_fingerprint(s3_root: str, tmp_path: Path) -> None:
    path = to_path(f"{s3_root}/IXI-T1.tar")
    path.write_bytes(b"one")
    first = storage.fingerprint(str(path))
    assert storage.fingerprint(str(path)) == first
    list(path.parent.iterdir())
    path.write_bytes(b"two")
    assert storage.fingerprint(str(path)) != first
    path.unlink()
    with pytest.raises(FileNotFoundError):
        storage.fingerprint(str(path))


# -- cores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "membership", "cores"),
    [
        ({}, "", 8),
        ({"cpu.max": "200000 100000"}, "0::/", 2),
        ({"cpu.max": "150000 100000"}, "0::/", 2),
        ({"cpu.max": "10000 100000"}, "0::/", 1),
        ({"cpu.max": "max 100000"}, "0::/", 8),
        ({"cpu.max": "9900000 100000"}, "0::/", 8),
        ({"cpu.max": "invalid"}, "0::/", 8),
        ({"cpu.max": "100000 0"}, "0::/", 8),
        ({"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b", 3),
        ({"a/cpu.max": "300000 100000", "a/b/cpu.max": "100000 100000"}, "0::/a/b", 1),
        ({"cpu.max": "400000 100000"}, "0::/docker/of/the/host", 4),  # as seen inside a container
        (
            {"cpu/x/cpu.cfs_quota_us": "250000\n", "cpu/x/cpu.cfs_period_us": "100000\n"},
            "3:memory:/x\n4:cpu,cpuacct:/x",
            3,
        ),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu,cpuacct:/", 8),
    ],
)
def test_usable_cores_obey_affinity_and_cpu_quotas(
    groups: dict[str, str], membership: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for name, text in groups.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "membership").write_text(membership)
    assert usable_cores(tmp_path, tmp_path / "membership") == cores


def test_default_workers_follow_the_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert RefreshConfig(root=str(tmp_path)).workers == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores(tmp_path, tmp_path / "missing") == 1
