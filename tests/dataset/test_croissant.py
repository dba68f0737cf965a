"""`croissant.json` is valid for Croissant's own reader, which reads the manifest and checks hashes through it."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import mlcroissant
import pandas as pd
import pytest
from conftest import config_for

from ixi_etl.dataset import credit, metadata
from ixi_etl.dataset.croissant import CONTEXT, croissant
from ixi_etl.dataset.datasheet import make_datasheet
from ixi_etl.dataset.publish import PublishedVersion, list_files
from ixi_etl.recipes.ixi import refresh

NO_DATE = 'Property "https://schema.org/datePublished" is recommended, but does not exist.'
"""The only warning: a version holds no time."""


def open_dataset(folder: Path) -> mlcroissant.Dataset:
    """The version through mlcroissant, which raises on errors; its warnings are checked."""
    dataset = mlcroissant.Dataset(str(folder / metadata.CROISSANT))
    issues = dataset.metadata.ctx.issues
    assert not issues.errors
    assert [warning.partition("] ")[2] for warning in issues.warnings] == [NO_DATE]
    return dataset


def read_back(dataset: mlcroissant.Dataset, like: pd.DataFrame) -> pd.DataFrame:
    """The record set `manifest` with the columns and dtypes of the manifest."""
    records = [
        {
            name.removeprefix("manifest/"): value.decode() if isinstance(value, bytes) else value
            for name, value in record.items()
        }
        for record in dataset.records("manifest")
    ]
    table = pd.DataFrame(records, columns=list(like.columns), dtype="object")
    return pd.DataFrame(
        {
            name: table[name].fillna("").astype("str") if dtype == "str" else table[name].astype(dtype)
            for name, dtype in like.dtypes.items()
        }
    )


def test_the_manifest_is_read_back_through_croissant(published: PublishedVersion) -> None:
    expected = metadata.read_manifest(published.folder)
    pd.testing.assert_frame_equal(read_back(open_dataset(published.folder), expected), expected)


def test_a_copy_elsewhere_is_read_and_a_changed_manifest_is_refused(
    published: PublishedVersion, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(published.folder, tmp_path / "copy"))
    assert len(list(open_dataset(copy).records("manifest"))) == len(metadata.read_manifest(published.folder))
    text = (copy / metadata.MANIFEST).read_text()
    (copy / metadata.MANIFEST).write_text(text.replace("train", "tests", 1))
    with pytest.raises(mlcroissant.GenerationError) as caught:
        list(open_dataset(copy).records("manifest"))
    assert "is not identical with the reference" in str(caught.value.__cause__)


def test_every_hashed_file_is_listed_relative_to_the_folder(published: PublishedVersion) -> None:
    content = json.loads((published.folder / metadata.CROISSANT).read_text())
    files = metadata.read_metadata(published.folder)["files"]
    objects = {item["contentUrl"]: item["sha256"] for item in content["distribution"] if "contentUrl" in item}
    patterns = [item["includes"] for item in content["distribution"] if "includes" in item]
    assert objects == {n: f["sha256"] for n, f in files.items() if "/" not in n and n != metadata.CROISSANT}
    in_folders = [name for name in files if "/" in name]
    assert all(sum(fnmatch(name, pattern) for pattern in patterns) == 1 for name in in_folders)
    assert set(list_files(published.folder)) == set(files)


def test_the_context_is_the_standard_one() -> None:
    """The reader warns of another one only in a log."""
    from mlcroissant._src.core.context import Context
    from mlcroissant._src.core.rdf import make_context

    assert make_context(Context(conforms_to="http://mlcommons.org/croissant/1.1")) == CONTEXT


def test_the_fields_of_responsible_ai_are_read_by_croissant(published: PublishedVersion) -> None:
    described = open_dataset(published.folder).metadata
    assert "simulated" in described.data_collection.lower()
    assert any("site IOP" in bias for bias in described.data_biases)
    assert any(use.startswith("Not intended: Diagnosis") for use in described.data_use_cases)
    assert any(text.startswith("Consent: ") for text in described.personal_sensitive_information)
    assert described.version.endswith(f"+{published.version}")


def test_a_version_of_ixi_has_its_licence_scanners_and_people(published: PublishedVersion, tmp_path: Path) -> None:
    summary, final = metadata.read_metadata(published.folder), metadata.read_manifest(published.folder)
    sources: dict[str, Any] = {m: {"source": credit.IXI, "file": f"IXI-{m}.tar", "md5": "0"} for m in ("T1", "T2")}
    summary |= {"sources": sources, **credit.credit_and_licence(sources)}
    final = final.assign(age=40.0, sex="m")
    files = {name: file for name, file in summary["files"].items() if name != metadata.CROISSANT}
    content = croissant(summary, final, make_datasheet(summary, final), files)
    (tmp_path / metadata.CROISSANT).write_text(json.dumps(content))
    described = open_dataset(tmp_path).metadata
    assert described.license == ["https://creativecommons.org/licenses/by-sa/3.0/"]
    assert described.url == "https://brain-development.org/ixi-dataset/"
    assert "Site HH (Hammersmith Hospital, Philips, 3 T): 3 of 5 subjects used." in described.data_biases
    assert any(bias.startswith("Age and sex, train: 0 women, 6 men") for bias in described.data_biases)


def test_a_version_by_index_and_by_file_is_valid_and_says_so(archives: Path, tmp_path: Path) -> None:
    chosen = {"pairing": "index", "split_by": "file", "normalisation": "range", "pictures": False}
    made = refresh(config_for(tmp_path, archives, **chosen))
    dataset, expected = open_dataset(made.folder), metadata.read_manifest(made.folder)
    pd.testing.assert_frame_equal(read_back(dataset, expected), expected)
    assert "pictures" not in {item.id for item in dataset.metadata.distribution}
    assert any("results on test are too good" in bias for bias in dataset.metadata.data_biases)
    assert any("different planes of the head" in limit for limit in dataset.metadata.data_limitations)
    assert "--preset paper" in (made.folder / metadata.README).read_text()
