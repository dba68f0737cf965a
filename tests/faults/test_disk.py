"""Full, read-only, forbidden or missing folders end a command in one line; repeated, it gives the same version."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from answers import SegmentedConfig
from conftest import SMALL_NETWORKS, config_for
from faults_table import Row
from processes import Job
from reader import latest_of, reading
from servers import Host, serve

from ixi_etl.core.storage import DataRoot
from ixi_etl.dataset import metadata, verify, versions
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.errors import IxiError
from ixi_etl.recipes import ixi, ixi_inputs
from ixi_etl.sources import partial

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("fork_server")]

DISK_BYTES = 48 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A separate file system of `DISK_BYTES`."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", folder]
    if os.getuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount the small disk that fills up; test_no_room.py needs no root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def is_same_version(version: Path, wanted: Path) -> bool:
    """Whether `version` verifies and has the metadata of `wanted`, which include the SHA-256 of every file."""
    same_metadata = metadata.read_metadata(version) == metadata.read_metadata(wanted)
    return same_metadata and verify.verify(version, deep=True) == []


def assert_one_line(error: BaseException, *texts: str) -> None:
    assert isinstance(error, IxiError), repr(error)
    assert "\n" not in str(error)
    assert all(text in str(error) for text in texts), str(error)


_disk_usage = shutil.disk_usage  # tests replace that of shutil


def fill(folder: Path, leave: int) -> None:
    """Write a file that leaves `leave` bytes free, unless it exists."""
    if not (folder / "filler").exists():
        with suppress(OSError), open(folder / "filler", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(_disk_usage(folder).free - leave, 1))


def before_stage(monkeypatch: pytest.MonkeyPatch, stage: str, action: Callable[[], None]) -> None:
    """Call `action` when a stage starts."""
    module, name = STAGES[stage]
    function = getattr(module, name)

    def wrapped(*args: Any, **more: Any) -> Any:
        action()
        return function(*args, **more)

    monkeypatch.setattr(module, name, wrapped)


STAGES = {
    "download": (ixi_inputs, "acquire_file"),
    "cut": (ixi, "cut_subjects"),
    "publish": (ixi, "publish_version"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_is_one_line_and_the_next_run_completes_the_version(
    stage: str, disk: Path, archives: Path, published: PublishedVersion, monkeypatch: pytest.MonkeyPatch, row: Row
) -> None:
    monkeypatch.setattr(partial, "SPARE_BYTES", 0)
    ixi.refresh(config_for(disk / "before", archives, split_seed=1, pictures=False))
    files = {f"/{name}": (archives / name).read_bytes() for name in ("IXI-T1.tar", "IXI-T2.tar", "MD5SUMS")}
    need = {"download": sum(map(len, files.values())), "cut": 1 << 20, "publish": 200_000}[stage]
    count, full = 20, 0
    with serve(Host(b"", files=files)) as host:
        source = host.url.rpartition("/")[0] if stage == "download" else str(archives)
        for n in range(count):
            root = Path(shutil.copytree(disk / "before", disk / "root"))
            config = SegmentedConfig.model_validate(config_for(root, source).model_dump())
            leave = int(need * (n + 0.5) / count)
            with monkeypatch.context() as patch, reading(latest_of(root)):
                # The disk fills up after the check of free space, which here sees another disk.
                patch.setattr(shutil, "disk_usage", lambda path: _disk_usage("/"))
                before_stage(patch, stage, lambda leave=leave: fill(disk, leave))
                try:
                    ixi.refresh(config)
                except IxiError as error:
                    assert_one_line(error, "No space left on device")
                    full += 1
            (disk / "filler").unlink(missing_ok=True)
            with reading(latest_of(root)):
                done = ixi.refresh(config)
            assert is_same_version(done.folder, published.folder)
            shutil.rmtree(root)
    assert full >= count // 2
    row(f"disk full in {stage}", count, f"{full} ended in one line, the others fitted; then the same version", "none")


def test_a_disk_that_is_too_small_is_reported_before_the_work(disk: Path, archives: Path, row: Row) -> None:
    fill(disk, 100_000)
    with pytest.raises(IxiError) as caught:
        ixi.refresh(config_for(disk / "root", archives))
    assert_one_line(caught.value, "GB free, but the slabs need")
    row("disk too small from the start", 1, "one line before the work", "none")


def test_versions_on_a_read_only_disk_can_be_read(
    disk: Path, archives: Path, published: PublishedVersion, row: Row
) -> None:
    ixi.refresh(config_for(disk / "root", archives))
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(IxiError) as caught:
        ixi.refresh(config_for(disk / "root", archives, split_seed=5))
    assert_one_line(caught.value, "Read-only file system", "choose another --root")
    data_root = DataRoot(disk / "root")
    assert is_same_version(data_root.version(versions.resolve_version(data_root)), published.folder)
    row("read-only root", 1, "one line; versions in it are read and verified", "none")


def do_refresh_as_nobody(pipe: Any, config: str) -> None:
    """Run a refresh as the user `nobody`; report the class and the message of its error."""
    from ixi_etl.config import RefreshConfig

    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    try:
        ixi.refresh(RefreshConfig.model_validate_json(config))
        pipe.send(("done", ["", "no error"]))
    except Exception as error:
        pipe.send(("done", [type(error).__name__, str(error)]))


@pytest.mark.parametrize("folder", ["root", "archives", "datasets"])
def test_a_folder_without_write_permission_is_one_line(folder: str, archives: Path, row: Row) -> None:
    with tempfile.TemporaryDirectory() as temporary:  # only the owner can enter pytest's own folders
        top = Path(temporary)
        shutil.copytree(archives, top / "source")
        root = top / "root"
        for path in (root, root / "archives", root / "datasets"):
            path.mkdir()
        for path in (top, *top.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o666)
        closed = root if folder == "root" else root / folder
        closed.chmod(0o555)
        kind, message = Job(do_refresh_as_nobody, config_for(root, top / "source").model_dump_json()).result()
        closed.chmod(0o777)
        assert kind in ("IxiError", "DownloadError", "DatasetError"), (kind, message)
        assert "Permission denied" in message
        assert "\n" not in message
    row(f"no permission: {folder}", 1, "one line", "none")


@pytest.mark.parametrize("stage", STAGES)
def test_a_root_that_disappears_is_made_again_by_the_next_run(
    stage: str, archives: Path, published: PublishedVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Row
) -> None:
    root = tmp_path / "root"
    config = config_for(root, archives)
    with monkeypatch.context() as patch:
        before_stage(patch, stage, lambda: shutil.rmtree(root, ignore_errors=True))
        try:
            ixi.refresh(config)
            outcome = "the removed files were not needed"
        except IxiError as error:
            assert_one_line(error, str(root))
            outcome = "one line"
    assert is_same_version(ixi.refresh(config).folder, published.folder)
    row(f"root removed before {stage}", 1, f"{outcome}; then the same version", "none")


def test_a_file_system_that_refuses_to_rename_over_a_folder(
    archives: Path, published: PublishedVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Row
) -> None:
    """Some file systems refuse it even for an empty folder."""
    rename = os.rename

    def strict(source: Any, target: Any, **more: Any) -> None:
        if Path(target).is_dir():
            raise FileExistsError(17, "File exists", str(target))
        rename(source, target, **more)

    monkeypatch.setattr(os, "rename", strict)
    data_root = DataRoot(tmp_path)
    count = 0
    for existing in ("no folder", "an empty folder", "half a version", "a damaged version"):
        target = data_root.version(published.version)
        if existing == "an empty folder":
            shutil.rmtree(target)
            target.mkdir()
        elif existing == "half a version":
            (target / metadata.METADATA).unlink()
        elif existing == "a damaged version":
            (target / "slices.zarr/t1/c/0/0/0/0").unlink()
        assert is_same_version(ixi.refresh(config_for(tmp_path, archives)).folder, published.folder)
        count += 1
    row("rename over a folder fails", count, "the same version, whatever existed at its path", "none")


def test_a_training_resumes_after_a_full_disk(disk: Path, published: PublishedVersion, row: Row) -> None:
    from model import checkpoint
    from model.config import TrainConfig
    from model.jobs import prepare_run, train_run

    (disk / "datasets").symlink_to(published.folder.parents[1])
    small = SMALL_NETWORKS | {"batch_size": 2, "steps": 6, "checkpoint_every": 2, "log_every": 2, "samples": 0}
    count = 10
    for n in range(count):
        run = prepare_run(disk, TrainConfig.model_validate(small | {"seed": n}), f"{n}")
        train_run(prepare_run(disk, TrainConfig.model_validate(small | {"seed": n, "steps": 2}), f"{n}"))
        fill(disk, 20_000 * (n + 1))
        with pytest.raises(IxiError) as caught:
            train_run(run, resume=True)
        assert_one_line(caught.value, "No space left on device")
        (disk / "filler").unlink()
        newest = checkpoint.latest_valid(run.folder / "checkpoints")
        assert newest is not None
        assert newest[0].step >= 2
        train_run(run, resume=True)
        shutil.rmtree(run.folder)
    row("disk full in training", count, "one line; then it resumes from the newest valid checkpoint", "none")
