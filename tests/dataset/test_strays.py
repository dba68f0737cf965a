"""Stray files are not damage, and no version is lost while another is being made."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import config_for
from test_prune import start_run, write_versions

from flows.cli import main
from ixi_etl.core.files import to_json
from ixi_etl.core.progress import no_progress
from ixi_etl.core.storage import DEFAULT_DATASET, DataRoot, filesystem_of, upload_folder
from ixi_etl.dataset import metadata, verify, versions
from ixi_etl.dataset.prune import prune_versions
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.recipes import ixi as jobs
from ixi_etl.recipes.ixi import refresh

STRAYS = [
    ".DS_Store",
    "pictures/.DS_Store",
    "slices.zarr/._zarr.json",
    "slices.zarr/t1/c/0/0/0/.nfs0000000001234",
    ".fuse_hidden0000002a00000001",
    "Thumbs.db",
    "desktop.ini",
    "manifest.csv~",
    ".manifest.csv.swp",
    ".~lock.manifest.csv#",
    "slices.zarr/t1/c/99/0/0/0",
    "slices.zarr/t3/zarr.json",
    "slices.zarr/.zattrs",
    "a folder/and a file",
    os.fsdecode(b"not utf-8 \xff\n"),
]


@pytest.fixture
def root(published: PublishedVersion, tmp_path: Path) -> Path:
    """A copy of the root of `published` that tests may change."""
    return Path(shutil.copytree(published.folder.parents[2], tmp_path / "root"))


def write_junk(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"junk")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("text", ["not json", "{}", '{"version": 1, "history": []}', ""])
def test_a_damaged_pointer_is_replaced_and_kept_as_a_copy(
    text: str, published: PublishedVersion, root: Path, archives: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pointer = root / "datasets/ixi-t1-t2/latest.json"
    pointer.write_text(text)
    assert refresh(config_for(root, archives)).version == published.version
    assert json.loads(pointer.read_text())["version"] == published.version
    assert pointer.with_name("latest.json.damaged").read_text() == text
    assert "latest.json.damaged" in caplog.text


def test_a_stray_file_is_a_warning(
    published: PublishedVersion, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = Path(shutil.copytree(published.folder, tmp_path / published.version))
    for stray in STRAYS:
        caplog.clear()
        write_junk(copy, stray)
        assert verify.read_verified(copy)[0] == metadata.read_metadata(published.folder), stray
        (message,) = {record.getMessage() for record in caplog.records if record.levelno == logging.WARNING}
        assert "ignored files that do not belong to the version" in message
        assert message.encode()  # it can be written to any log
        assert "\n" not in message
        (copy / stray).unlink()
    write_junk(copy, *STRAYS)
    assert verify.verify(copy, deep=True) == []


def test_a_refresh_reuses_a_version_with_stray_files(
    root: Path, archives: Path, published: PublishedVersion, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = DataRoot(root).version(published.version)
    write_junk(folder, *STRAYS)
    write_junk(folder.parent, ".DS_Store", "Thumbs.db", ".directory")
    before = contents(folder)
    assert not refresh(config_for(root, archives)).is_new
    assert contents(folder) == before
    for command in (["verify"], ["versions"], ["prune", "--keep", "1"]):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--root", str(root)])
        assert not ended.value.code, capsys.readouterr()


@pytest.mark.stack
def test_folder_markers_on_s3_are_ignored(
    s3_root: str, published: PublishedVersion, archives: Path, tmp_path: Path
) -> None:
    data_root = DataRoot(s3_root, scratch=tmp_path)
    upload_folder(published.folder, data_root.version(published.version), last=metadata.METADATA, progress=no_progress)
    filesystem, top = filesystem_of(data_root.datasets)
    for marker in ("", "pictures/", "slices.zarr/", "slices.zarr/t1/c/"):
        filesystem.pipe_file(f"{top}/{published.version}/{marker}", b"")
    filesystem.pipe_file(f"{top}/", b"")
    assert verify.verify(data_root.version(published.version)) == []
    made = refresh(config_for(s3_root, archives, tmp_path))
    assert (made.version, made.is_new) == (published.version, False)


def damage(folder: Path) -> Path:
    path = folder / "slices.zarr/t2/c/1/0/0/0"
    path.write_bytes(path.read_bytes()[:-1])
    return path


def test_a_damaged_version_stays_until_it_is_replaced(
    root: Path, archives: Path, published: PublishedVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = DataRoot(root).version(published.version)
    damage(folder)
    before = contents(folder)

    def interrupt(*arguments: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    for stage in ("survey_archives", "publish_version"):
        with monkeypatch.context() as patch:
            patch.setattr(jobs, stage, interrupt)
            with pytest.raises(KeyboardInterrupt):
                refresh(config_for(root, archives))
        assert contents(folder) == before
    assert refresh(config_for(root, archives)).is_new
    assert contents(folder) == contents(published.folder)


@pytest.mark.stack
def test_a_kill_during_the_replacement_loses_no_version(
    root: Path, archives: Path, published: PublishedVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the next refresh makes another version and removes the leftovers of interrupted ones."""
    data_root = DataRoot(root)
    folder = data_root.version(published.version)
    damage(folder)
    before = contents(folder)
    rename = Path.rename

    def interrupt(path: Path, target: Any) -> Path:
        if path.name == "version":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupt)
        with pytest.raises(KeyboardInterrupt):
            refresh(config_for(root, archives))
    assert not folder.exists()
    other = refresh(config_for(root, archives, split_seed=1, pictures=False))
    assert contents(folder) == before
    assert versions.published_versions(data_root) == [published.version, other.version]
    assert refresh(config_for(root, archives)).is_new
    again, first = contents(folder), contents(published.folder)
    compared = {name: again.pop(name) != first.pop(name) for name in (metadata.COMPARED, metadata.COMPARED_PAGE)}
    assert all(compared.values())  # with `other`, which was the latest
    assert again == first
    assert not data_root.unfinished.exists()


@pytest.mark.parametrize("name", [metadata.METADATA, metadata.MANIFEST, metadata.POINTER])
def test_one_damaged_file_does_not_hide_the_other_versions(
    name: str, root: Path, published: PublishedVersion, capsys: pytest.CaptureFixture[str]
) -> None:
    data_root, latest = DataRoot(root), "0123456789ab"
    shutil.copytree(data_root.version(published.version), data_root.version(latest))
    history = [{"version": version} for version in (published.version, latest)]
    (data_root.datasets / metadata.POINTER).write_text(to_json({"version": latest, "history": history}))
    folder = data_root.datasets if name == metadata.POINTER else data_root.version(published.version)
    (folder / name).write_text('{"half')
    if name != metadata.POINTER:
        assert versions.resolve_version(data_root) == latest
    with pytest.raises(SystemExit) as ended:
        main(["versions", "--root", str(root), "--json"])
    out, err = capsys.readouterr()
    assert not ended.value.code
    rows = {row["version"].partition("@")[2]: row for row in json.loads(out)["ixi-t1-t2"]}
    assert rows.keys() == {published.version, latest}
    assert {v for v, row in rows.items() if row["damaged"]} == (
        {published.version} if name == metadata.METADATA else set()
    )
    assert {v for v, row in rows.items() if row["latest"]} == (set() if name == metadata.POINTER else {latest})
    assert (str(folder / name) in err) == (name != metadata.MANIFEST)
    with pytest.raises(SystemExit) as ended:
        main(["versions", "--root", str(root)])
    assert not ended.value.code
    assert latest in capsys.readouterr().out


def test_prune_removes_a_version_with_damaged_metadata(published: PublishedVersion, tmp_path: Path) -> None:
    data_root = DataRoot(tmp_path)
    a, b, c, latest = write_versions(data_root, published, 4)
    start_run(tmp_path, "x", f"{DEFAULT_DATASET}@{b}")
    for version in (a, b, c):
        (data_root.version(version) / metadata.METADATA).write_text('{"half')
    assert {v.version for v in prune_versions(data_root, 1) if v.removed} == {a, c}
    assert versions.published_versions(data_root) == [b, latest]


@pytest.mark.parametrize("named_by", ["the pointer", "a run"])
def test_prune_keeps_referenced_versions_without_metadata(
    named_by: str, published: PublishedVersion, tmp_path: Path
) -> None:
    data_root = DataRoot(tmp_path)
    old, latest = write_versions(data_root, published, 2)
    start_run(tmp_path, "x", f"{DEFAULT_DATASET}@{old}")
    (data_root.version(latest if named_by == "the pointer" else old) / metadata.METADATA).unlink()
    assert not [v for v in prune_versions(data_root, 1) if v.removed]
    assert {p.name for p in data_root.datasets.iterdir()} == {old, latest, metadata.POINTER}
