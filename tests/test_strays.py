"""Files that do not belong to a version are no damage, and no version is lost because another is being made."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import config_for
from test_prune import lay, start_run

from flows.cli import main
from ixi_etl import dataset
from ixi_etl import refresh as jobs
from ixi_etl.files import silent, to_json
from ixi_etl.places import Places, filesystem_of, upload
from ixi_etl.prune import prune
from ixi_etl.publish import Refreshed
from ixi_etl.refresh import refresh

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
def root(published: Refreshed, tmp_path: Path) -> Path:
    """The root of `published`, in which anything may be done."""
    return Path(shutil.copytree(published.folder.parents[2], tmp_path / "root"))


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"junk")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("text", ["not json", "{}", '{"version": 1, "history": []}', ""])
def test_a_damaged_pointer_is_kept(
    text: str, published: Refreshed, root: Path, archives: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pointer = root / "datasets/ixi-t1-t2/latest.json"
    pointer.write_text(text)
    assert refresh(config_for(root, archives)).version == published.version
    assert json.loads(pointer.read_text())["version"] == published.version
    assert pointer.with_name("latest.json.damaged").read_text() == text
    assert "latest.json.damaged" in caplog.text


def test_a_stray_file_is_a_warning(published: Refreshed, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copy = Path(shutil.copytree(published.folder, tmp_path / published.version))
    for stray in STRAYS:
        caplog.clear()
        put(copy, stray)
        assert dataset.read_sound(copy)[0] == dataset.read_facts(published.folder), stray
        (said,) = {record.getMessage() for record in caplog.records if record.levelno == logging.WARNING}
        assert "ignored what does not belong to the version" in said
        assert said.encode()  # it can be written to any log
        assert "\n" not in said
        (copy / stray).unlink()
    put(copy, *STRAYS)
    assert dataset.verify(copy, deep=True) == []


def test_a_refresh_finds_a_version_with_strays_published(
    root: Path, archives: Path, published: Refreshed, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Places(root).version(published.version)
    put(folder, *STRAYS)
    put(folder.parent, ".DS_Store", "Thumbs.db", ".directory")
    before = contents(folder)
    assert not refresh(config_for(root, archives)).is_new
    assert contents(folder) == before
    for command in (["verify"], ["versions"], ["prune", "--keep", "1"]):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--root", str(root)])
        assert not ended.value.code, capsys.readouterr()


@pytest.mark.stack
def test_folder_markers_on_s3_are_no_files(s3_root: str, published: Refreshed, archives: Path, tmp_path: Path) -> None:
    places = Places(s3_root, scratch=tmp_path)
    upload(published.folder, places.version(published.version), last=dataset.FACTS, progress=silent)
    filesystem, top = filesystem_of(places.datasets)
    for marker in ("", "pictures/", "slices.zarr/", "slices.zarr/t1/c/"):
        filesystem.pipe_file(f"{top}/{published.version}/{marker}", b"")
    filesystem.pipe_file(f"{top}/", b"")
    assert dataset.verify(places.version(published.version)) == []
    made = refresh(config_for(s3_root, archives, tmp_path))
    assert (made.version, made.is_new) == (published.version, False)


def damage(folder: Path) -> Path:
    path = folder / "slices.zarr/t2/c/1/0/0/0"
    path.write_bytes(path.read_bytes()[:-1])
    return path


def test_a_damaged_version_stays_until_it_is_replaced(
    root: Path, archives: Path, published: Refreshed, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Places(root).version(published.version)
    damage(folder)
    before = contents(folder)

    def killed(*arguments: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    for stage in ("survey_archives", "publish_version"):
        with monkeypatch.context() as patch:
            patch.setattr(jobs, stage, killed)
            with pytest.raises(KeyboardInterrupt):
                refresh(config_for(root, archives))
        assert contents(folder) == before
    assert refresh(config_for(root, archives)).is_new
    assert contents(folder) == contents(published.folder)


@pytest.mark.stack
def test_a_kill_between_the_old_and_the_new_loses_neither(
    root: Path, archives: Path, published: Refreshed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where the next refresh makes another version, and clears what stopped ones left."""
    places = Places(root)
    folder = places.version(published.version)
    damage(folder)
    before = contents(folder)
    rename = Path.rename

    def killed(path: Path, target: Any) -> Path:
        if path.name == "version":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            refresh(config_for(root, archives))
    assert not folder.exists()
    other = refresh(config_for(root, archives, split_seed=1, pictures=False))
    assert contents(folder) == before
    assert dataset.published(places) == [published.version, other.version]
    assert refresh(config_for(root, archives)).is_new
    assert contents(folder) == contents(published.folder)
    assert not places.unfinished.exists()


@pytest.mark.parametrize("name", [dataset.FACTS, dataset.MANIFEST, dataset.POINTER])
def test_one_damaged_file_does_not_hide_the_other_versions(
    name: str, root: Path, published: Refreshed, capsys: pytest.CaptureFixture[str]
) -> None:
    places, latest = Places(root), "0123456789ab"
    shutil.copytree(places.version(published.version), places.version(latest))
    history = [{"version": version} for version in (published.version, latest)]
    (places.datasets / dataset.POINTER).write_text(to_json({"version": latest, "history": history}))
    folder = places.datasets if name == dataset.POINTER else places.version(published.version)
    (folder / name).write_text('{"half')
    if name != dataset.POINTER:
        assert dataset.resolve(places) == latest
    with pytest.raises(SystemExit) as ended:
        main(["versions", "--root", str(root), "--json"])
    out, err = capsys.readouterr()
    assert not ended.value.code
    rows = {row["version"].partition("@")[2]: row for row in json.loads(out)["ixi-t1-t2"]}
    assert rows.keys() == {published.version, latest}
    assert {v for v, row in rows.items() if row["damaged"]} == ({published.version} if name == dataset.FACTS else set())
    assert {v for v, row in rows.items() if row["latest"]} == (set() if name == dataset.POINTER else {latest})
    assert (str(folder / name) in err) == (name != dataset.MANIFEST)
    with pytest.raises(SystemExit) as ended:
        main(["versions", "--root", str(root)])
    assert not ended.value.code
    assert latest in capsys.readouterr().out


def test_prune_does_not_need_the_facts_of_a_version(published: Refreshed, tmp_path: Path) -> None:
    places = Places(tmp_path)
    a, b, c, latest = lay(places, published, 4)
    start_run(tmp_path, "x", f"{dataset.NAME}@{b}")
    for version in (a, b, c):
        (places.version(version) / dataset.FACTS).write_text('{"half')
    assert {v.version for v in prune(places, 1) if v.removed} == {a, c}
    assert dataset.published(places) == [b, latest]


@pytest.mark.parametrize("named_by", ["the pointer", "a run"])
def test_prune_keeps_what_is_named_without_its_facts(named_by: str, published: Refreshed, tmp_path: Path) -> None:
    places = Places(tmp_path)
    old, latest = lay(places, published, 2)
    start_run(tmp_path, "x", f"{dataset.NAME}@{old}")
    (places.version(latest if named_by == "the pointer" else old) / dataset.FACTS).unlink()
    assert not [v for v in prune(places, 1) if v.removed]
    assert {p.name for p in places.datasets.iterdir()} == {old, latest, dataset.POINTER}
