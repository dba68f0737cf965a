"""Files are on the disk before a version is published."""

from __future__ import annotations

from pathlib import Path

import pytest

from ixi_etl.core import files


def test_a_tree_is_synced_with_all_its_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "store/t1").mkdir(parents=True)
    written = [tmp_path / name for name in ("dataset.json", "store/zarr.json", *(f"store/t1/{n}" for n in range(20)))]
    for path in written:
        path.touch()
    synced: list[Path] = []
    monkeypatch.setattr(files, "fsync_path", synced.append)
    files.fsync_tree(tmp_path)
    assert sorted(synced) == sorted([tmp_path, tmp_path / "store", tmp_path / "store/t1", *written])


def test_an_error_of_the_disk_ends_the_sync_of_a_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad").touch()

    def fail_on_bad(path: Path) -> None:
        if path.name == "bad":
            raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(files, "fsync_path", fail_on_bad)
    with pytest.raises(OSError, match="bad"):
        files.fsync_tree(tmp_path)
