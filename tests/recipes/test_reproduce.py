"""A published version is made again from its archives, and every byte compared; what differs is named."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import OnS3, config_for

from flows.cli import main
from ixi_etl import PIPELINE_VERSION
from ixi_etl.core.files import read_json, to_json
from ixi_etl.core.storage import DataRoot
from ixi_etl.dataset import metadata, versions
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.errors import ConfigError, DatasetError
from ixi_etl.recipes.ixi import refresh
from ixi_etl.recipes.reproduce import compare_software, differences_message, missing_inputs, pins, reproduce
from ixi_etl.sources import catalog


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON object of `ixi-etl reproduce`."""
    with pytest.raises(SystemExit) as ended:
        main(["reproduce", *arguments, "--json"])
    return int(ended.value.code or 0), json.loads(capsys.readouterr().out)


def edit_software(folder: Path, **changes: str) -> None:
    content = read_json(folder / metadata.SOFTWARE) | changes
    (folder / metadata.SOFTWARE).write_text(to_json(metadata.with_digest(content)))


def edit_metadata(folder: Path, sources: dict[str, Any] | None = None, **inputs: Any) -> None:
    """Change recorded sources (label -> fields) and inputs of a version."""
    content = metadata.read_metadata(folder)
    content["inputs"] |= inputs
    for label, fields in (sources or {}).items():
        content["sources"].setdefault(label, {}).update(fields)
    (folder / metadata.METADATA).write_text(to_json(metadata.with_digest(content)))


def test_the_same_environment_makes_the_same_bytes(
    refreshed: PublishedVersion, archives: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = refreshed.folder.parents[2]
    before = sorted(root.rglob("*"))
    status, result = run(capsys, "--root", str(root), "--source", str(archives))
    assert (status, result["made_again"], result["same"]) == (0, True, True)
    assert result["command"] == "ixi-etl refresh --slices 12 --registration none --source FILES"
    assert f"numpy=={metadata.installed('numpy')}" in result["pins"].split()
    assert {row["what"] for row in result["software"]} >= {"commit", "python", "platform", "zarr"}
    assert all(row["recorded"] == row["installed"] for row in result["software"])
    assert sorted(root.rglob("*")) == before


def test_without_the_archives_only_the_command_and_pins_are_printed(
    published: PublishedVersion, capsys: pytest.CaptureFixture[str]
) -> None:
    status, result = run(capsys, str(published.folder), "--root", str(published.folder.parents[2]))
    assert (status, result["made_again"]) == (0, False)
    assert missing_inputs(published.folder, DataRoot(published.folder.parents[2])) == ["IXI-T1.tar", "IXI-T2.tar"]


def test_a_changed_byte_is_named(
    refreshed: PublishedVersion, archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = refreshed.folder / metadata.README
    readme.write_text(readme.read_text().replace("Paired", "Parted"))
    (refreshed.folder / metadata.COLUMNS).unlink()
    keep = tmp_path / "again"
    options = ["--root", str(refreshed.folder.parents[2]), "--source", str(archives), "--keep", str(keep)]
    status, result = run(capsys, *options)
    assert status == 1
    assert [row["file"] for row in result["files"]] == ["README.md", "columns.csv"]
    assert result["files"][1]["old"] == "-"
    assert "2 files differ" in result["error"]
    assert "README.md, columns.csv; inputs and libraries are the same" in result["error"]
    assert (keep / "datasets/ixi-t1-t2" / refreshed.version / metadata.README).read_text() != readme.read_text()
    status, result = run(capsys, *options)  # again
    assert (status, result["error"]) == (2, f"{keep} exists; give a new folder as --keep")


def test_a_library_of_another_version_is_named(
    refreshed: PublishedVersion, archives: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version of numpy is part of the version's name, so files that hold the name differ; voxels do not."""
    installed = metadata.installed
    monkeypatch.setattr(metadata, "installed", lambda name: "9.9" if name == "numpy" else installed(name))
    options = ("--root", str(refreshed.folder.parents[2]), "--source", str(archives))
    status, result = run(capsys, *options)
    assert status == 1
    assert [row["what"] for row in result["inputs"]] == ["libraries.numpy"]
    assert f"libraries.numpy was {installed('numpy')}, is 9.9" in result["error"]
    changed = {row["file"] for row in result["files"]}
    assert {"dataset.json", "README.md", "croissant.json", "slices.zarr/zarr.json"} <= changed
    assert not any("/c/" in name or name == "manifest.csv" for name in changed)


def test_a_library_that_is_not_in_the_name_is_named_if_bytes_differ(
    refreshed: PublishedVersion, archives: Path, tmp_path: Path
) -> None:
    edit_software(refreshed.folder, pillow="1.0")
    compared = compare_software(refreshed.folder)
    differing = compared[compared["recorded"] != compared["installed"]]
    assert differing["what"].tolist() == ["pillow"]
    assert "pillow==1.0" in pins(compared).split()
    (refreshed.folder / "pictures/worst.jpg").write_bytes(b"another JPEG")
    data_root = DataRoot(refreshed.folder.parents[2])
    again = reproduce(refreshed.folder, data_root, tmp_path / "again", source=str(archives))
    message = differences_message(again, compared, "x")
    assert message is not None
    assert message.startswith("1 file differs from that of x: pictures/worst.jpg; pillow was 1.0, is ")


def test_unknown_software_is_shown_as_unknown(refreshed: PublishedVersion) -> None:
    (refreshed.folder / metadata.SOFTWARE).unlink()
    compared = compare_software(refreshed.folder).set_index("what")["recorded"]
    assert compared["commit"] == compared["platform"] == "unknown"
    assert compared["numpy"] == metadata.installed("numpy")


def test_the_archives_of_the_root_are_used_and_stay_as_they_are(
    archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Official archives that a refresh downloaded, and the table of age and sex: no network, nothing is written."""
    root = tmp_path / "root"
    shutil.copytree(archives, root / "archives")
    sums = dict(line.split()[::-1] for line in (archives / "MD5SUMS").read_text().splitlines())
    monkeypatch.setattr(catalog, "_MD5", catalog._MD5 | sums)
    config = config_for(root, archives, pictures=False)
    made = refresh(config.model_copy(update={"source": None, "offline": True}))
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert missing_inputs(made.folder, DataRoot(root)) == []
    again = reproduce(made.folder, DataRoot(root), tmp_path / "again")
    assert again.files.empty
    assert again.folder.name == made.version
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


@pytest.mark.stack  # a second
def test_the_makers_own_table_of_age_and_sex_is_asked_for(archives: Path, tmp_path: Path) -> None:
    table = tmp_path / "people.csv"
    table.write_text("IXI_ID,SEX_ID,AGE\n" + "".join(f"{n},1,{30 + n}\n" for n in range(1, 30)))
    config = config_for(tmp_path / "root", archives, pictures=False)
    config = config.model_copy(update={"demographics": str(table)})
    made = refresh(config)
    assert "| split | women | men |" in (made.folder / metadata.README).read_text()
    options: dict[str, Any] = {"source": str(archives)}
    with pytest.raises(ConfigError, match="give that table as --demographics"):
        reproduce(made.folder, config.data_root, tmp_path / "a", **options)
    again = reproduce(made.folder, config.data_root, tmp_path / "b", demographics=str(table), **options)
    assert again.files.empty


@pytest.mark.stack  # a second
def test_a_version_on_s3_is_reproduced_on_this_machine(on_s3: OnS3, archives: Path, tmp_path: Path) -> None:
    folder = versions.find_version(on_s3.config.root, "latest")
    again = reproduce(folder, on_s3.config.data_root, tmp_path / "again", source=str(archives))
    assert again.files.empty


def test_a_version_of_another_pipeline_is_refused_before_any_work(
    refreshed: PublishedVersion, archives: Path, tmp_path: Path
) -> None:
    edit_metadata(refreshed.folder, pipeline_version=8)
    edit_software(refreshed.folder, **{"ixi-etl": "0.1.0", "commit": "abc123"})
    data_root, work = DataRoot(refreshed.folder.parents[2]), tmp_path / "again"
    made_by = f"{refreshed.version} was made by pipeline version 8, and this is {PIPELINE_VERSION}"
    with pytest.raises(DatasetError, match=f"{made_by}; install ixi-etl 0.1.0, commit abc123 first"):
        reproduce(refreshed.folder, data_root, work, source=str(archives))
    (refreshed.folder / metadata.SOFTWARE).unlink()
    with pytest.raises(DatasetError, match=f"{made_by}; install the ixi-etl that made it first"):
        reproduce(refreshed.folder, data_root, work, source=str(archives))
    assert not work.exists()


def test_members_of_ixi_are_fetched_again_and_a_folder_cannot_give_them(
    refreshed: PublishedVersion, archives: Path, tmp_path: Path
) -> None:
    data_root, work = DataRoot(refreshed.folder.parents[2]), tmp_path / "again"
    from_server = {"members_sha256": "0" * 64, "members_of_ixi": ["T1", "T2"]}
    edit_metadata(refreshed.folder, {m: {"source": "ixi_unverified", "md5": None} for m in ("T1", "T2")}, **from_server)
    assert missing_inputs(refreshed.folder, data_root) == []
    with pytest.raises(
        ConfigError, match=r"made of members from a server, and .* is no URL of one; leave out --source"
    ):
        reproduce(refreshed.folder, data_root, work, source=str(archives))
    edit_metadata(refreshed.folder, {"T2": {"source": "own"}}, members_of_ixi=["T1"])
    assert missing_inputs(refreshed.folder, data_root) == ["IXI-T1.tar", "IXI-T2.tar"]
    for source, advice in ((None, "as --source"), (str(archives), "is no URL of one; give the URL of its archives")):
        with pytest.raises(ConfigError, match=advice):
            reproduce(refreshed.folder, data_root, work, source=source)
    assert not work.exists()


def test_the_official_table_is_found_beside_the_scans_or_asked_for(
    archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table that counts as the published IXI.xls; another one has the same name."""
    table, source, work = tmp_path / "people.csv", tmp_path / "source", tmp_path / "again"
    table.write_text("IXI_ID,SEX_ID,AGE\n" + "".join(f"{n},1,{30 + n}\n" for n in range(1, 30)))
    md5 = hashlib.md5(table.read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setattr(catalog, "_MD5", catalog._MD5 | {"IXI.xls": md5})
    config = config_for(tmp_path / "root", archives, pictures=False)
    folder, root = refresh(config.model_copy(update={"demographics": str(table)})).folder, config.data_root
    for name in ("IXI-T1.tar", "IXI-T2.tar"):
        (root.archives / name).symlink_to(archives / name)
    assert missing_inputs(folder, root) == ["IXI.xls"]
    assert missing_inputs(folder, root, str(table)) == []
    shutil.copytree(archives, source)
    (source / "IXI.xls").write_bytes(b"another table of this name")
    asked = rf"IXI.xls, whose right copy is not in {source} or {root.archives}; give it as --demographics"
    with pytest.raises(ConfigError, match=asked):
        reproduce(folder, root, work, source=str(source))
    assert not work.exists()
    shutil.copyfile(table, source / "IXI.xls")
    assert reproduce(folder, root, work, source=str(source / "IXI-T1.tar")).files.empty


def test_the_home_folder_is_expanded_in_keep(
    refreshed: PublishedVersion, archives: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = refreshed.folder.parents[2]
    monkeypatch.setenv("HOME", str(root))
    options = ("--root", str(root), "--source", str(archives), "--keep", "~/datasets")
    status, result = run(capsys, *options)
    assert (status, result["error"]) == (2, f"{root / 'datasets'} exists; give a new folder as --keep")
