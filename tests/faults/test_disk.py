"""Disks that are full, read-only, forbidden or taken away: one line says so, and the same again ends in the same."""

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

ROOM = 48 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of a few MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", folder]
    if os.getuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount the small disk that fills up; test_no_room.py needs no root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def same(a: Path, b: Path) -> bool:
    facts = [metadata.read_metadata(folder) for folder in (a, b)]  # with the SHA-256 of every file
    return facts[0] == facts[1] and verify.verify(a, deep=True) == []


def one_line(error: BaseException, *said: str) -> None:
    assert isinstance(error, IxiError), repr(error)
    assert "\n" not in str(error)
    assert all(text in str(error) for text in said), str(error)


_usage = shutil.disk_usage  # also while somebody is told otherwise


def fill(folder: Path, leave: int) -> None:
    """Take all of the room but `leave` bytes, once."""
    if not (folder / "filler").exists():
        with suppress(OSError), open(folder / "filler", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(_usage(folder).free - leave, 1))


def at(monkeypatch: pytest.MonkeyPatch, name: str, do: Callable[[], None]) -> None:
    """Call `do` when a stage starts."""
    module, function = STAGES[name]
    stage = getattr(module, function)

    def then(*args: Any, **more: Any) -> Any:
        do()
        return stage(*args, **more)

    monkeypatch.setattr(module, function, then)


STAGES = {
    "download": (ixi_inputs, "acquire_file"),
    "cut": (ixi, "cut_subjects"),
    "publish": (ixi, "publish_version"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_disk_full(
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
                # Somebody else fills the disk, after it was asked whether there is room.
                patch.setattr(shutil, "disk_usage", lambda path, ask=shutil.disk_usage: ask("/"))
                at(patch, stage, lambda leave=leave: fill(disk, leave))
                try:
                    ixi.refresh(config)
                except IxiError as error:
                    one_line(error, "No space left on device")
                    full += 1
            (disk / "filler").unlink(missing_ok=True)
            with reading(latest_of(root)):
                done = ixi.refresh(config)
            assert same(done.folder, published.folder)
            shutil.rmtree(root)
    assert full >= count // 2
    row(f"disk full in {stage}", count, f"{full} ended in one line, the others fitted; then the same version", "none")


def test_disk_room_is_asked_for_first(disk: Path, archives: Path, row: Row) -> None:
    fill(disk, 100_000)
    with pytest.raises(IxiError) as caught:
        ixi.refresh(config_for(disk / "root", archives))
    one_line(caught.value, "GB free, but the slabs need")
    row("disk too small from the first", 1, "said before the work begins", "none")


def test_disk_read_only(disk: Path, archives: Path, published: PublishedVersion, row: Row) -> None:
    ixi.refresh(config_for(disk / "root", archives))
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(IxiError) as caught:
        ixi.refresh(config_for(disk / "root", archives, split_seed=5))
    one_line(caught.value, "Read-only file system", "choose another --root")
    data_root = DataRoot(disk / "root")
    assert same(data_root.version(versions.resolve_version(data_root)), published.folder)  # reading it needs no writing
    row("read-only root", 1, "one line; versions in it are read and verified", "none")


def as_nobody(pipe: Any, config: str) -> None:
    from ixi_etl.config import RefreshConfig

    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    try:
        ixi.refresh(RefreshConfig.model_validate_json(config))
        pipe.send(("done", ["", "it may write"]))
    except Exception as error:
        pipe.send(("done", [type(error).__name__, str(error)]))


@pytest.mark.parametrize("what", ["root", "archives", "datasets"])
def test_disk_forbidden(what: str, archives: Path, row: Row) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders let nobody but their owner in
        top = Path(folder)
        shutil.copytree(archives, top / "source")
        root = top / "root"
        for place in (root, root / "archives", root / "datasets"):
            place.mkdir()
        for place in (top, *top.rglob("*")):
            place.chmod(0o777 if place.is_dir() else 0o666)
        closed = root if what == "root" else root / what
        closed.chmod(0o555)
        kind, said = Job(as_nobody, config_for(root, top / "source").model_dump_json()).end()
        closed.chmod(0o777)
        assert kind in ("IxiError", "DownloadError", "DatasetError"), (kind, said)
        assert "Permission denied" in said
        assert "\n" not in said
    row(f"no permission: {what}", 1, "one line", "none")


@pytest.mark.parametrize("stage", STAGES)
def test_disk_taken_away(
    stage: str, archives: Path, published: PublishedVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Row
) -> None:
    root = tmp_path / "root"
    config = config_for(root, archives)
    with monkeypatch.context() as patch:
        at(patch, stage, lambda: shutil.rmtree(root, ignore_errors=True))
        try:
            ixi.refresh(config)
            outcome = "nothing that was gone was needed"
        except IxiError as error:
            one_line(error, str(root))
            outcome = "one line"
    assert same(ixi.refresh(config).folder, published.folder)
    row(f"root removed before {stage}", 1, f"{outcome}; then the same version", "none")


def test_disk_no_rename_over_a_folder(
    archives: Path, published: PublishedVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Row
) -> None:
    """Some file systems refuse to rename over a folder even where it is empty."""
    rename = os.rename

    def strict(source: Any, target: Any, **more: Any) -> None:
        if Path(target).is_dir():
            raise FileExistsError(17, "File exists", str(target))
        rename(source, target, **more)

    monkeypatch.setattr(os, "rename", strict)
    data_root = DataRoot(tmp_path)
    count = 0
    for left in ("nothing", "an empty folder", "half a version", "a damaged version"):
        target = data_root.version(published.version)
        if left == "an empty folder":
            shutil.rmtree(target)
            target.mkdir()
        elif left == "half a version":
            (target / metadata.METADATA).unlink()
        elif left == "a damaged version":
            (target / "slices.zarr/t1/c/0/0/0/0").unlink()
        assert same(ixi.refresh(config_for(tmp_path, archives)).folder, published.folder)
        count += 1
    row("rename over a folder fails", count, "the same version, whatever lay in its place", "none")


def test_disk_full_in_training(disk: Path, published: PublishedVersion, row: Row) -> None:
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
        one_line(caught.value, "No space left on device")
        (disk / "filler").unlink()
        newest = checkpoint.latest_valid(run.folder / "checkpoints")
        assert newest is not None
        assert newest[0].step >= 2
        train_run(run, resume=True)
        shutil.rmtree(run.folder)
    row("disk full in training", count, "one line; then it goes on from the newest whole checkpoint", "none")
