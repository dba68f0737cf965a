"""Versions made by published preparations: subjects, splits, slices, ranges, and what reads them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ixi_etl.config import DatasetConfig, RefreshConfig
from ixi_etl.core.files import sha256_file, to_json
from ixi_etl.dataset import manifest, metadata
from ixi_etl.dataset.compare import compare_manifests
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.dataset.schema import IXI, SCHEMAS
from ixi_etl.dataset.store import open_arrays
from ixi_etl.dataset.verify import verify
from ixi_etl.errors import DatasetError
from ixi_etl.preparations import configure, deviations
from ixi_etl.recipes.ixi import refresh
from ixi_etl.testing.phantom import grid_affine, pack_nifti, write_tar

COUNTS = (3, 1, 1)
SLICES = 12


def make(folder: Path, archives: Path, preset: str, **given: object) -> tuple[PublishedVersion, DatasetConfig]:
    dataset = configure(preset, {"registration": "none", "slices": SLICES, **given})
    config = RefreshConfig(root=str(folder), source=str(archives), dataset=dataset, workers=2)
    return refresh(config), dataset


@pytest.fixture(scope="module")
def syndiff(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PublishedVersion, DatasetConfig]:
    """The first five subjects in order, with the T1 as the reference; tests only read it."""
    return make(tmp_path_factory.mktemp("syndiff"), archives, "syndiff", split_counts=COUNTS)


@pytest.fixture(scope="module")
def moschetto(
    archives: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PublishedVersion, DatasetConfig, list[str]]:
    """A split by file of several slices, and the warnings of its refresh; tests only read it."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ixi_etl").addHandler(handler)
    try:
        made = make(tmp_path_factory.mktemp("moschetto"), archives, "moschetto", margin=1)
    finally:
        logging.getLogger("ixi_etl").removeHandler(handler)
    return *made, messages


def used_of(published: PublishedVersion) -> pd.DataFrame:
    return manifest.used_rows(metadata.read_manifest(published.folder))


def test_subjects_beyond_the_limit_are_rows_with_a_reason(syndiff: tuple[PublishedVersion, DatasetConfig]) -> None:
    table = metadata.read_manifest(syndiff[0].folder)
    used, beyond = table[table["status"] == "used"], table[table["reason"] == "beyond_limit"]
    assert len(used) == 5
    assert len(beyond) > 0
    assert used["subject_id"].max() < beyond["subject_id"].min()
    assert set(beyond["detail"]) == {"used: the first 5 subjects that can be used (3 + 1 + 1)"}
    assert beyond["t1_sha256"].str.fullmatch("[0-9a-f]{64}").all()  # hashed as other excluded subjects
    assert beyond["t2_p_low"].isna().all()  # and not cut
    assert manifest.funnel(table, SCHEMAS["ixi-t2-t1"]).loc["used", ("all", "")] == 5


def test_the_first_subjects_are_train_then_val_then_test(syndiff: tuple[PublishedVersion, DatasetConfig]) -> None:
    assert used_of(syndiff[0])["split"].tolist() == ["train"] * 3 + ["val", "test"]


def test_the_ranges_of_a_version_divide_by_mean_and_maximum(syndiff: tuple[PublishedVersion, DatasetConfig]) -> None:
    published, _ = syndiff
    used, arrays = used_of(published), open_arrays(published.folder)
    for name in ("t1", "t2"):
        ranges = manifest.intensity_ranges(used, name)
        scale, offset = (np.asarray(arrays[f"{name}_{c}"])[:, None, None, None] for c in ("scale", "offset"))
        units = np.asarray(arrays[name]) * scale + offset
        divided = units / units.mean(axis=(1, 2, 3), keepdims=True)
        low, high = ranges.T[:, :, None, None, None]
        normalised = (np.asarray(arrays[name]) - low) / (high - low)
        np.testing.assert_allclose(normalised, divided / divided.max(), atol=1e-9)
        assert normalised.max() == pytest.approx(1)


def test_the_window_of_each_subject_has_the_largest_area(syndiff: tuple[PublishedVersion, DatasetConfig]) -> None:
    used = used_of(syndiff[0])
    windows = used[["t1_window_start", "t1_window_stop"]].to_numpy(int)
    assert (windows[:, 1] - windows[:, 0] == SLICES).all()
    assert (windows[:, 0] != (64 - SLICES) // 2).all()  # not the middle of the 64 axial slices


def test_deviations_are_in_the_metadata_and_on_the_page(syndiff: tuple[PublishedVersion, DatasetConfig]) -> None:
    published, config = syndiff
    recorded = metadata.read_metadata(published.folder)["preparation"]
    assert recorded == {"name": "syndiff", "deviations": deviations(config)}
    assert recorded["deviations"][-1] == "split_counts is 3, 1, 1, not 25, 5, 10."
    page = (published.folder / metadata.REPORT).read_text()
    assert "slices is 12, not 100." in page
    assert "in the order of their IDs are train" in page
    assert "_low and _high" in page


def test_every_slice_of_a_split_by_file_has_a_split(
    moschetto: tuple[PublishedVersion, DatasetConfig, list[str]],
) -> None:
    published, _, messages = moschetto
    used = used_of(published)
    names = used["slice_splits"].str.split(",")
    assert (names.map(len) == SLICES).all()
    expected = ["mixed" if len(set(row)) > 1 else row[0] for row in names]
    assert used["split"].tolist() == expected
    assert "mixed" in expected
    described = metadata.read_metadata(published.folder)
    files = len(used) * SLICES
    assert described["slices"] == {
        "train": int(files * 0.8),
        "val": int(files * 0.05),
        "test": files - int(files * 0.8) - int(files * 0.05),
    }
    leaking = sum({"train", "test"} <= set(row) for row in names)
    assert described["leaking_subjects"] == leaking > 1
    assert manifest.slices_in_split(used, "train", SLICES).sum() == described["slices"]["train"]
    (warning,) = [message for message in messages if "split by file" in message]
    assert f"slices of {leaking} of {len(used)} subjects ({leaking} persons) are in train and in test" in warning
    assert not any("in split" in message for message in messages)  # no split lacks slices
    page = (published.folder / metadata.REPORT).read_text()
    assert f"Slices of {leaking} of {len(used)} subjects are in both train and test" in page
    assert "mixed" in page


def test_the_range_of_a_slab_is_that_of_its_stored_values(
    moschetto: tuple[PublishedVersion, DatasetConfig, list[str]],
) -> None:
    used, arrays = used_of(moschetto[0]), open_arrays(moschetto[0].folder)
    for name in ("t1", "t2"):
        values = np.asarray(arrays[name]).reshape(len(used), -1)
        expected = np.stack([values.min(axis=1), values.max(axis=1)], axis=1)
        np.testing.assert_array_equal(manifest.intensity_ranges(used, name), expected)


@pytest.mark.parametrize("name", ["syndiff", "moschetto"])
def test_versions_of_a_preparation_verify(name: str, request: pytest.FixtureRequest) -> None:
    published = request.getfixturevalue(name)[0]
    assert verify(published.folder, deep=True) == []
    again = refresh(
        RefreshConfig(
            root=str(published.folder.parents[2]),
            source=str(request.getfixturevalue("archives")),
            dataset=request.getfixturevalue(name)[1],
        )
    )
    assert (again.version, again.is_new) == (published.version, False)


def tampered(published: PublishedVersion, folder: Path, change: Mapping[str, Any]) -> list[str]:
    """Problems found in a copy whose manifest is changed, with a new hash, as a faulty program would write it."""
    shutil.copytree(published.folder, folder)
    path = folder / metadata.MANIFEST
    described = metadata.read_metadata(folder)
    table = pd.read_csv(path, dtype="str", keep_default_na=False)
    row = table.index[table["status"] == "used"][0]
    for column, value in change.items():
        table.loc[row, column] = value
    table.to_csv(path, index=False, lineterminator="\n")
    described["files"][metadata.MANIFEST] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    (folder / metadata.METADATA).write_text(to_json(metadata.with_digest(described)))
    return verify(folder, version=published.version, deep=True)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("moschetto", {"t1_high": "30000"}, "does not have the manifest's range"),
        ("moschetto", {"t1_low": "30000"}, "used_has_ranges"),
        ("syndiff", {"t2_high": "30000"}, "does not have the manifest's range"),
        ("moschetto", {"slice_splits": "train,test", "split": "mixed"}, "slices_have_splits"),
        ("moschetto", {"split": "train"}, "slices_have_splits"),
        ("moschetto", {"slice_splits": ",".join(["both"] * SLICES)}, "slices_have_splits"),
        ("syndiff", {"split": "mixed"}, "slices_have_splits"),
    ],
)
def test_verification_finds_wrong_ranges_and_splits(
    name: str, change: Mapping[str, Any], expected: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    problems = tampered(request.getfixturevalue(name)[0], tmp_path / "copy", change)
    assert any(expected in problem for problem in problems)


def test_verification_counts_the_slices(
    moschetto: tuple[PublishedVersion, DatasetConfig, list[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(moschetto[0].folder, folder)
    described = metadata.read_metadata(folder)
    described["inputs"]["config"]["margin"] = 0
    (folder / metadata.METADATA).write_text(to_json(metadata.with_digest(described)))
    assert any(f"a split for each of its {SLICES + 2} slices" in problem for problem in verify(folder))


def test_versions_with_other_columns_can_be_compared(
    moschetto: tuple[PublishedVersion, DatasetConfig, list[str]], published: PublishedVersion
) -> None:
    tables = [metadata.read_manifest(version.folder) for version in (published, moschetto[0])]
    assert list(tables[0].columns) == IXI.columns
    changed = compare_manifests(*tables)
    assert changed["changed"].str.contains("slice_splits").any()


def test_too_few_subjects_for_the_counts_end_the_refresh_with_one_line(archives: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as error:
        make(tmp_path, archives, "syndiff")
    line = str(error.value)
    assert "but --split-counts 25 + 5 + 10 needs 40; give numbers that add up to at most" in line
    assert "1 missing_t1" in line


def test_the_next_candidate_is_cut_when_one_fails(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    head = np.zeros((12, 16, 16), np.int16)
    head[2:10, 3:13, 3:13] = 500
    members: dict[str, dict[str, bytes]] = {"T1": {}, "T2": {}}
    for number in range(1, 6):
        for modality, files in members.items():
            noise = rng.integers(0, 400, head.shape, dtype=np.int16)
            voxels = np.zeros_like(head) if (number, modality) == (2, "T2") else head + noise  # seen only in the cut
            name = f"IXI{number:03d}-Guys-0001-{modality}.nii.gz"
            files[name] = pack_nifti(voxels, grid_affine((16, 16, 12), (2.0, 2.0, 2.0), "LAS"))
    for modality, files in members.items():
        write_tar(tmp_path / f"IXI-{modality}.tar", files)
    made, _ = make(tmp_path / "root", tmp_path, "paired", slices=6, subjects=3, pictures=False)
    table = metadata.read_manifest(made.folder)
    assert table["reason"].tolist() == ["", "empty_image", "", "", "beyond_limit"]
    assert table["t2_p_low"].notna().tolist() == [True, False, True, True, False]
    assert (table["t1_sha256"] != "").all()
