"""File systems that refuse what not all of them can do, paths of any characters, and as many threads as cores."""

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
from conftest import OnS3, config_for, logged, requests_in
from pydantic import ValidationError

from flows.cli import main
from ixi_etl import dataset, places, store
from ixi_etl.config import RefreshConfig, in_a_line
from ixi_etl.errors import IxiError
from ixi_etl.files import SYNC_REFUSED, disk_errors_in_a_line, lock_root, sync_path, write_atomic
from ixi_etl.places import Places, naming, place
from ixi_etl.publish import Refreshed
from ixi_etl.refresh import refresh
from ixi_etl.spread import usable_cores

NOT_UTF8 = os.fsdecode(b"not utf-8 \xff")


def fsync_raises(patch: pytest.MonkeyPatch, number: int, where: Callable[[int], bool] = lambda mode: True) -> None:
    honest = os.fsync

    def fsync(handle: int) -> None:
        if where(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        honest(handle)

    patch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("number", sorted(SYNC_REFUSED), ids=errno.errorcode.get)
def test_a_file_system_that_cannot_sync_is_written_all_the_same(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync_raises(monkeypatch, number)
    write_atomic(tmp_path / "file", "text")
    sync_path(tmp_path / "file")
    sync_path(tmp_path)
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_to_sync_is_one_line_with_the_path(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync_raises(monkeypatch, number)
    for write in (lambda: write_atomic(tmp_path / "file", "text"), lambda: sync_path(tmp_path)):
        said = re.escape(f"cannot read or write {tmp_path}") + f".*: {os.strerror(number)};"
        with pytest.raises(IxiError, match=said), disk_errors_in_a_line():
            write()


def test_a_version_is_published_without_syncs_and_hard_links(
    archives: Path, published: Refreshed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: Any, **more: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    fsync_raises(monkeypatch, errno.EINVAL, stat.S_ISDIR)
    monkeypatch.setattr(os, "link", refused)
    made = refresh(config_for(tmp_path, archives))
    assert dataset.read_facts(made.folder) == dataset.read_facts(published.folder)


def test_a_link_that_is_refused_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any, **more: Any) -> None:
        raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))

    monkeypatch.setattr(os, "link", refused)
    (tmp_path / "a").write_text("text")
    store.link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "text"


def test_a_file_system_without_locks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refused(handle: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", refused)
    with pytest.raises(IxiError, match=f"{tmp_path}, or lock it: .*; choose another --root"), lock_root(tmp_path):
        pass


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EIO, "broken", "a"), "a: broken"),
        (OSError(errno.EXDEV, "across", "a", None, "b"), "a -> b: across"),
        (OSError(errno.EIO, "broken", b"a\xff"), r"a\udcff: broken"),
        (OSError(errno.EIO, "broken", NOT_UTF8), r"not utf-8 \udcff: broken"),
        (OSError(errno.EIO, "broken", 7), "broken"),  # a handle says nothing to anybody
        (OSError("words alone"), "words alone"),
        (OSError(), "OSError"),
    ],
    ids=repr,
)
def test_a_disk_error_is_one_line_that_names_what_is_known(error: OSError, said: str) -> None:
    with pytest.raises(IxiError, match=re.escape(f"cannot read or write {said}; mend")), disk_errors_in_a_line():
        raise error


def test_an_error_that_names_no_file_is_given_the_path() -> None:
    for error, said in (
        (OSError("words alone"), "here: words alone"),
        (OSError(5, "broken", "there"), "there: broken"),
    ):
        line = f"cannot read or write {said};"
        with pytest.raises(IxiError, match=line), disk_errors_in_a_line(), naming("here"):
            raise error


# -- paths ------------------------------------------------------------------------------------------------------------


def test_paths_may_have_any_characters(
    archives: Path, published: Refreshed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, source = tmp_path / "r a%20#?é[1]*{x};'\"&", tmp_path / "s a%20#?é[1]*::x"
    shutil.copytree(archives, source)
    made = refresh(config_for(root, source))
    assert dataset.read_facts(made.folder) == dataset.read_facts(published.folder)
    assert dataset.verify(made.folder, deep=True) == []
    assert not refresh(config_for(root, source)).is_new
    for command in (["versions"], ["prune", "--keep", "1"]):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--root", str(root)])
        assert not ended.value.code
        assert made.version in capsys.readouterr().out


@pytest.mark.parametrize("field", ["root", "scratch", "source", "demographics"])
def test_a_path_that_is_not_utf8_is_one_line_that_names_it(field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        RefreshConfig.model_validate({field: f"/data/{NOT_UTF8}"})
    said = in_a_line(caught.value)
    assert said.startswith(f"{field}: ")
    assert r"/data/not utf-8 \udcff is not UTF-8" in said
    said.encode()


@pytest.mark.parametrize("name", [NOT_UTF8, "a::b", "a\nb"])
@pytest.mark.parametrize("command", [["verify"], ["versions"], ["prune", "--keep", "1"], ["digits"], ["refresh"]])
def test_a_root_that_no_store_can_be_in_is_one_line(
    command: list[str], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--root", str(tmp_path / name)])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1
    assert places.printable(str(tmp_path / name)) in line
    assert not list(tmp_path.iterdir())


def test_a_path_that_is_too_long_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = tmp_path / ("x" * 300)
    with pytest.raises(IxiError, match=f"{long}, or lock it: File name too long"):
        refresh(config_for(long, tmp_path))
    for command in ("verify", "versions"):
        with pytest.raises(SystemExit) as ended:
            main([command, "--root", str(long)])
        (line,) = capsys.readouterr().err.splitlines()
        assert ended.value.code == 1
        assert str(long) in line


def test_reading_writes_nothing(published: Refreshed, capsys: pytest.CaptureFixture[str]) -> None:
    """So a read-only root can be read."""

    root = published.folder.parents[2]
    before = {path: path.stat().st_ctime_ns for path in (root, *root.rglob("*"))}
    for command in (["verify", "--deep"], ["versions"], ["versions", "latest"], ["prune", "--keep", "1", "--dry-run"]):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--root", str(root)])
        assert not ended.value.code, capsys.readouterr().err
    assert {path: path.stat().st_ctime_ns for path in (root, *root.rglob("*"))} == before


# -- S3 ---------------------------------------------------------------------------------------------------------------


def test_nothing_outside_the_root_s_prefix_is_asked_of_s3(on_s3: OnS3) -> None:
    """So a key may be confined to it."""
    root = str(on_s3.config.root)
    bucket, _, prefix = root.removeprefix("s3://").partition("/")
    with logged() as records:
        for command in (["verify"], ["versions"], ["prune", "--keep", "1", "--dry-run"]):
            with pytest.raises(SystemExit) as ended:
                main([*command, "--root", root])
            assert not ended.value.code
    asked = on_s3.requests + requests_in(records)
    assert len(asked) > 20
    for method, url, _ in asked:
        path, _, query = url.partition("?")
        of_bucket = path.rstrip("/") == f"/{bucket}"
        named = re.search(r"(?:^|&)prefix=([^&]*)", query) if of_bucket else re.match(f"/{bucket}/(.*)", path)
        assert named, (method, url)
        assert re.sub("(?i)%2f", "/", named[1]).startswith(f"{prefix}/"), (method, url)


def test_a_prefix_that_may_not_be_listed_is_one_line_that_says_what_is_needed(
    s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    filesystem, _ = places.filesystem_of(place(s3_root))

    def denied(*arguments: Any, **more: Any) -> None:
        raise PermissionError(errno.EACCES, "Access Denied")

    monkeypatch.setattr(type(filesystem), "call_s3", denied)
    with pytest.raises(IxiError, match=rf"cannot list {s3_root} \(.*Access Denied\); .* need s3:ListBucket"):
        dataset.resolve(Places(s3_root))


def test_an_object_that_is_replaced_has_another_fingerprint(s3_root: str, tmp_path: Path) -> None:
    path = place(f"{s3_root}/IXI-T1.tar")
    path.write_bytes(b"one")
    first = places.fingerprint(str(path))
    assert places.fingerprint(str(path)) == first
    list(path.parent.iterdir())
    path.write_bytes(b"two")
    assert places.fingerprint(str(path)) != first
    path.unlink()
    with pytest.raises(FileNotFoundError):
        places.fingerprint(str(path))


# -- cores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "own", "cores"),
    [
        ({}, "", 8),
        ({"cpu.max": "200000 100000"}, "0::/", 2),
        ({"cpu.max": "150000 100000"}, "0::/", 2),
        ({"cpu.max": "10000 100000"}, "0::/", 1),
        ({"cpu.max": "max 100000"}, "0::/", 8),
        ({"cpu.max": "9900000 100000"}, "0::/", 8),
        ({"cpu.max": "rubbish"}, "0::/", 8),
        ({"cpu.max": "100000 0"}, "0::/", 8),
        ({"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b", 3),
        ({"a/cpu.max": "300000 100000", "a/b/cpu.max": "100000 100000"}, "0::/a/b", 1),
        ({"cpu.max": "400000 100000"}, "0::/docker/of/the/host", 4),  # seen from inside of a container
        (
            {"cpu/x/cpu.cfs_quota_us": "250000\n", "cpu/x/cpu.cfs_period_us": "100000\n"},
            "3:memory:/x\n4:cpu,cpuacct:/x",
            3,
        ),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu,cpuacct:/", 8),
    ],
)
def test_the_cores_are_those_that_this_process_may_use(
    groups: dict[str, str], own: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for name, text in groups.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "own").write_text(own)
    assert usable_cores(tmp_path, tmp_path / "own") == cores


def test_the_workers_follow_the_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert RefreshConfig(root=str(tmp_path)).workers == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores(tmp_path, tmp_path / "none") == 1
