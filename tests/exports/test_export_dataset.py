"""`ixi-etl export-dataset`: a published version to a folder, as a whole or not at all, and what stops it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import consumers
import numpy as np
import pandas as pd
import pytest
from conftest import config_for
from consumers import hashes

from flows.cli import main
from flows.cli.versions import export_dataset as command
from ixi_etl.core import extras
from ixi_etl.core.files import lock_root
from ixi_etl.dataset.manifest import used_rows
from ixi_etl.dataset.metadata import METADATA, read_manifest
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.dataset.store import open_arrays
from ixi_etl.errors import ConfigError, DatasetError, IxiError, LockedError
from ixi_etl.exports.export import LAYOUTS, export_dataset
from ixi_etl.recipes.ixi import refresh

SPLITS = ("train", "val", "test")


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["export-dataset", *arguments])
    output = capsys.readouterr()
    return int(ended.value.code or 0), output.out, output.err


def pairs_in_store(version: Path, split: str) -> list[np.ndarray]:
    """The pairs of a split from manifest and store, normalised, as images: T1 and T2 [pair, row, column]."""
    arrays, images = open_arrays(version), []
    used = used_rows(read_manifest(version))
    for name in ("t1", "t2"):
        chosen = used[used["split"] == split]
        low, high = (chosen[f"{name}_p_{end}"].to_numpy(float)[:, None, None, None] for end in ("low", "high"))
        slabs = np.asarray(arrays[name])[chosen["store_row"].to_numpy(int)]
        images.append(np.clip((slabs - low) / (high - low), 0, 1).reshape(-1, *slabs.shape[2:])[:, ::-1])
    return images


READERS: dict[str, Callable[[Path, str], list[np.ndarray]]] = {
    "selfrdb": lambda folder, split: list(consumers.selfrdb(folder, split, "T1", "T2")),
    "syndiff": lambda folder, split: [(x + 1) / 2 for x in consumers.syndiff(folder, split, "T1", "T2", 64)],
    "pix2pix": lambda folder, split: list(consumers.pix2pix(folder, split, 16)),
}


@pytest.mark.parametrize("file_format", READERS)
def test_a_consumer_reads_the_normalised_pairs_of_the_store(
    file_format: str, every_split: PublishedVersion, tmp_path: Path
) -> None:
    bits = 16 if file_format == "pix2pix" else None
    done = export_dataset(every_split.folder, file_format, tmp_path / "out", bits=bits)
    used = used_rows(read_manifest(every_split.folder))
    listed = pd.read_csv(tmp_path / "out/export.csv")
    for split in SPLITS:
        read, wanted = READERS[file_format](tmp_path / "out", split), pairs_in_store(every_split.folder, split)
        assert len(read[0]) == len(read[1]) == done.counts[split]["slices"] > 0
        assert (float(read[0].min()), float(read[0].max())) == (0, 1)
        for images, right in zip(read, wanted, strict=True):
            np.testing.assert_allclose(images, right, atol=1e-5)
        of_split = set(used.loc[used["split"] == split, "subject_id"])
        assert set(listed.loc[listed["split"] == split, "subject_id"]) == of_split
        assert set(listed.loc[listed["split"] == split, "person"]) == {subject[:6] for subject in of_split}
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_left_and_front_of_the_head_are_where_the_summary_says(archives: Path, tmp_path: Path) -> None:
    """The phantom has a dark ball on the left only, at (-35, -20, 30) mm."""
    made = refresh(config_for(tmp_path / "root", archives, slices=6, window=(18, 24), pictures=False))
    export_dataset(made.folder, "syndiff", tmp_path / "out")
    assert "row 0 is anterior, column 0 is the subject's left" in (tmp_path / "out/export.json").read_text()
    arrays, used = open_arrays(made.folder), used_rows(read_manifest(made.folder))
    listed = pd.read_csv(tmp_path / "out/export.csv").set_index(["subject_id", "array", "slice"])
    pairs = {split: consumers.syndiff(tmp_path / "out", split, "T1", "T2", 64) for split in set(used["split"])}
    for row in used.to_dict("records"):
        x, y, z = np.linalg.inv(np.asarray(arrays["t2_affine"])[row["store_row"]])[:3] @ (-35, -20, 30, 1)
        from_left, from_front, middle = round(x), 63 - round(y), round(z)
        assert from_front > 32 > from_left
        for n, name in enumerate(("t1", "t2")):
            index = [listed.loc[(row["subject_id"], name, at), "index"] for at in range(middle - 1, middle + 2)]
            images = pairs[row["split"]][n][index][:, from_front - 2 : from_front + 3]
            ball, opposite = (images[..., at - 2 : at + 3].min() for at in (from_left, 63 - from_left))
            assert ball < opposite - 0.2


@pytest.mark.parametrize("file_format", LAYOUTS)
def test_the_same_version_gives_the_same_bytes(file_format: str, every_split: PublishedVersion, tmp_path: Path) -> None:
    for name in ("one", "two"):
        export_dataset(every_split.folder, file_format, tmp_path / name)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_the_summary_names_version_split_licence_and_credit(
    every_split: PublishedVersion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(every_split.folder.parents[2])
    code, out, err = run(
        *("latest", "--root", root, "--format", "pix2pix", "--direction", "t2->t1", "--quiet"),
        *("-o", str(tmp_path / "new" / "out"), "--json"),
        capsys=capsys,
    )
    assert (code, err) == (0, "")
    result = json.loads(out)
    summary = json.loads((tmp_path / "new/out/export.json").read_text())
    described = json.loads((every_split.folder / METADATA).read_text())
    assert result["version"] == summary["version"] == f"ixi-t1-t2@{every_split.version}"
    assert summary["dataset_json_sha256"] == hashlib.sha256((every_split.folder / METADATA).read_bytes()).hexdigest()
    assert (summary["direction"], summary["bits"], summary["size"]) == ("t2->t1", 8, [64, 128])
    assert (summary["licence"], summary["credit"]) == (described["licence"], described["credit"])
    assert {split: n["subjects"] for split, n in summary["counts"].items()} == described["splits"]
    assert [row["split"] for row in result["splits"]] == list(SPLITS)
    licence = (tmp_path / "new/out/LICENSE.txt").read_text()
    assert described["licence"] in licence
    assert described["credit"] in licence


def test_a_copied_version_is_exported_by_its_folder(every_split: PublishedVersion, tmp_path: Path) -> None:
    copy = shutil.copytree(every_split.folder, tmp_path / "copy")
    with pytest.raises(SystemExit) as ended:
        main(["export-dataset", str(copy), "--format", "nifti", "-o", str(tmp_path / "out"), "--quiet"])
    assert ended.value.code == 0
    export_dataset(every_split.folder, "nifti", tmp_path / "same")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "same")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nothing@latest", "--format", "nifti"], 2, "there is no dataset nothing; give ixi-t1-t2@latest"),
        (["beef", "--format", "nifti"], 1, "there is no version beef in "),
        (["--format", "nifti", "--direction", "t1->t3"], 2, "direction 't1->t3' names t3; the arrays of ixi-t1-t2 are"),
        (["--format", "nifti", "--bits", "16"], 2, "--bits is an option of pix2pix; nifti has one kind of values"),
        (["--format", "nifti", "-o", "{full}"], 2, "{full} is not empty; give another folder, or remove it"),
        (["--format", "nifti", "-o", "{full}/file"], 2, "{full}/file is a file; give a folder"),
        (["--format", "nifti", "-o", "s3://bucket/x"], 2, "s3://bucket/x is a URL; export to a local folder"),
        (["--format", "nifti", "-o", "~nobody-here/x"], 2, "~nobody-here/x: no such user; give the full path"),
    ],
)
def test_a_wrong_option_is_one_line_and_writes_nothing(
    arguments: list[str],
    code: int,
    message: str,
    published: PublishedVersion,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("kept")
    given = [argument.format(full=full) for argument in arguments]
    given += [] if "-o" in given else ["-o", str(tmp_path / "out")]
    ended, out, err = run(*given, "--root", str(published.folder.parents[2]), capsys=capsys)
    assert (ended, out) == (code, "")
    assert err.startswith(f"error: {message.format(full=full)}")
    assert err.count("\n") == 1
    assert [f.name for f in tmp_path.rglob("*")] == ["full", "file"]


def test_formats_and_bits_of_the_command_are_those_of_the_package(tmp_path: Path) -> None:
    hints = get_type_hints(command)
    assert get_args(hints["file_format"]) == tuple(LAYOUTS)
    with pytest.raises(ConfigError, match="there is no format zip; give selfrdb, syndiff, pix2pix, nifti"):
        export_dataset(tmp_path, "zip", tmp_path / "out")
    with pytest.raises(ConfigError, match="--bits 12: give 8 or 16"):
        export_dataset(tmp_path, "pix2pix", tmp_path / "out", bits=12)


def test_a_missing_extra_is_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "h5py" else find_spec(name))
    with pytest.raises(ConfigError, match=r"not installed \(h5py\); run: pip install \"ixi-etl\[mat\]\""):
        export_dataset(tmp_path / "no-version", "syndiff", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_version_is_not_exported(refreshed: PublishedVersion, tmp_path: Path) -> None:
    shard = refreshed.folder / "slices.zarr/t2/c/1/0/0/0"
    shard.write_bytes(bytes(shard.stat().st_size))  # of the right size, which a quick check cannot tell
    with pytest.raises(DatasetError, match=r"cannot read t2 of IXI\d+-.*`ixi-etl verify --deep` lists") as caught:
        export_dataset(refreshed.folder, "nifti", tmp_path / "out")
    assert "\n" not in str(caught.value)
    shard.unlink()
    with pytest.raises(DatasetError, match=r"is missing; `ixi-etl refresh --.* --source FILES` makes the version"):
        export_dataset(refreshed.folder, "nifti", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.exporting").exists()


def test_the_disk_is_checked_before_the_export(
    published: PublishedVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(DatasetError, match=r"has 0\.00 GB free, but the export needs up to 0\.00 GB; free some"):
        export_dataset(published.folder, "selfrdb", tmp_path / "new/out")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("file_format", LAYOUTS)
def test_a_full_disk_is_one_line_and_leaves_nothing(
    file_format: str, published: PublishedVersion, tmp_path: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))  # bytes of a file
    try:
        with pytest.raises(IxiError, match=r"cannot read or write .*: File too large; fix that") as caught:
            export_dataset(published.folder, file_format, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_is_replaced_and_an_export_in_progress_is_not(
    published: PublishedVersion, tmp_path: Path
) -> None:
    staging, out = tmp_path / ".out.exporting", tmp_path / "out"
    (staging / "files").mkdir(parents=True)
    (staging / "files/half.npy").write_text("half")
    with (
        lock_root(staging),
        pytest.raises(LockedError, match=re.escape(f"{staging} is in use by process {os.getpid()}")),
    ):
        export_dataset(published.folder, "nifti", out)
    out.mkdir()  # an empty folder is no obstacle
    export_dataset(published.folder, "nifti", out)
    assert not list(tmp_path.rglob("half.npy"))
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
