"""The folder of a version explains itself: README.md, LICENSE.txt and columns.csv are true of it."""

from __future__ import annotations

import hashlib
import io
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import OnS3, config_for

from ixi_etl.dataset import credit, manifest, metadata, verify
from ixi_etl.dataset.columns import describe_columns
from ixi_etl.dataset.datasheet import make_datasheet
from ixi_etl.dataset.documents import LEGAL_CODE, licence_text, readme
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.dataset.schema import SCHEMAS
from ixi_etl.recipes.ixi import refresh

NAMES = (metadata.README, metadata.LICENCE_TEXT, metadata.COLUMNS, metadata.CROISSANT)


def with_sources(summary: dict[str, Any], **kinds: str) -> dict[str, Any]:
    """The summary of a version as if it were made from other archives."""
    sources = {m: {"file": f"IXI-{m}.tar", "source": kind, "md5": "0"} for m, kind in kinds.items()}
    return summary | {"sources": sources, **credit.credit_and_licence(sources)}


@pytest.fixture
def summary(published: PublishedVersion) -> dict[str, Any]:
    return metadata.read_metadata(published.folder)


@pytest.fixture
def final(published: PublishedVersion) -> pd.DataFrame:
    return metadata.read_manifest(published.folder)


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_every_column_that_a_manifest_may_have_is_described(name: str) -> None:
    schema = SCHEMAS[name]
    columns = [*schema.dtypes, *schema.optional]
    described = describe_columns(name, columns)
    assert described["column"].tolist() == columns
    assert described["meaning"].str.len().min() > 5
    assert not described["meaning"].str.contains("[{}]").any()
    kinds = {"str": {"text", "JSON"}, "Int64": {"integer"}, "Float64": {"number"}}
    dtypes = {**schema.dtypes, **schema.optional}
    assert all(row["type"] in kinds[dtypes[row["column"]]] for row in described.to_dict("records"))


def test_the_dictionary_of_a_version_has_exactly_its_columns(published: PublishedVersion, final: pd.DataFrame) -> None:
    dictionary = pd.read_csv(published.folder / metadata.COLUMNS, keep_default_na=False)
    assert dictionary["column"].tolist() == list(final.columns)
    as_json = final.loc[final["status"] == "used", dictionary.loc[dictionary["type"] == "JSON", "column"]]
    assert as_json.map(lambda text: text[0] == "[" and text[-1] == "]").all(axis=None)


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_document_is_found_like_any_other_file(
    name: str, published: PublishedVersion, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(published.folder, tmp_path / published.version))
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    assert verify.verify(copy, deep=True) == [
        f"{copy / name} is damaged: its SHA-256 is not the one in {metadata.METADATA}"
    ]
    (copy / name).unlink()
    assert verify.verify(copy) == [f"{copy / name} is missing"]


def test_the_documents_are_on_s3_too(on_s3: OnS3, published: PublishedVersion) -> None:
    for name in NAMES:
        assert (on_s3.made.folder / name).read_bytes() == (published.folder / name).read_bytes()


def run_python_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The variables of the Python block of a version's README after it ran in the folder."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    [block] = re.findall(r"^```python\n(.*?)^```", (folder / metadata.README).read_text(), re.MULTILINE | re.DOTALL)
    exec(compile(block, metadata.README, "exec"), names)
    return names


@pytest.mark.parametrize("normalisation", ["range", pytest.param("mean", marks=pytest.mark.stack)])
def test_the_python_of_the_readme_normalises_as_the_version_says(
    normalisation: str, archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = refresh(config_for(tmp_path, archives, normalisation=normalisation, pictures=False))
    names = run_python_of(made.folder, monkeypatch)
    used = manifest.used_rows(metadata.read_manifest(made.folder))
    low, high = manifest.intensity_ranges(used, "t1")[0]
    assert (low, high) != (used["t1_p_low"].iloc[0], used["t1_p_high"].iloc[0])
    expected = np.clip((names["source"] - low) / (high - low), 0, 1)
    np.testing.assert_allclose(names["source_0_to_1"], expected, rtol=1e-9)


def test_the_readme_names_every_file_and_its_python_runs(
    published: PublishedVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (published.folder / metadata.README).read_text()
    listed = set(re.findall(r"^\| `([^`]+)` \| [a-z]", text, re.MULTILINE))
    assert {path.name for path in published.folder.iterdir()} - {metadata.README} <= listed
    names = run_python_of(published.folder, monkeypatch)
    assert names["source"].shape == names["target"].shape
    assert (names["source_0_to_1"].min(), names["source_0_to_1"].max()) == (0, 1)


def test_the_readme_counts_what_the_version_has(summary: dict[str, Any], final: pd.DataFrame) -> None:
    sheet = make_datasheet(summary, final)
    used = manifest.used_rows(final)
    assert sheet.sites["used"].sum() == len(used) == summary["subjects"]
    assert sheet.sites["found"].sum() == len(final)
    [lost] = [sentence for sentence in sheet.biases if "site IOP" in sentence]
    assert "excludes 1 of 1 readable pairs of site IOP, the whole site" in lost
    assert sheet.people.empty


def test_age_and_sex_are_given_by_split_if_they_were_joined(summary: dict[str, Any], final: pd.DataFrame) -> None:
    joined = final.assign(age=pd.Series(range(20, 20 + len(final)), dtype="Float64"), sex="f")
    sheet = make_datasheet(summary, joined)
    assert sheet.people["women"].sum() == summary["subjects"]
    assert "### Age and sex\n\n| split | women |" in readme(summary, sheet, [], pd.DataFrame())


def test_persons_with_several_scans_are_counted(summary: dict[str, Any], final: pd.DataFrame) -> None:
    used = final["status"] == "used"
    twice = final.assign(subject_id=final["subject_id"].mask(used, "IXI999-HH-" + final["store_row"].astype(str)))
    [sentence] = [text for text in make_datasheet(summary, twice).biases if "more than once" in text]
    assert sentence.endswith(f": 1, with {summary['subjects']} of the used subjects.")
    assert not any("more than once" in text for text in make_datasheet(summary, final).biases)


PLANES = "Slices of the T2 are cut and never resampled."
SAME_PLACE = "So voxel (z, y, x) of all arrays is the same place in the head."
SIMILAR = "by the affines of their headers and, where that makes the pair more similar, a rigid registration."


@pytest.mark.parametrize(
    ("name", "register_echoes", "sentence", "registered"),
    [
        ("ixi-t1-t2", False, f"The T1 is interpolated once, linearly, onto exactly those planes, {SIMILAR}", "T1"),
        (
            "ixi-t1-pd-t2",
            False,
            f"The T1 is interpolated once, linearly, onto exactly those planes, {SIMILAR} The PD, an echo of the T2, "
            "is cut at the same slices and not interpolated, unless its grid differs (flag pd_grid_differs).",
            "T1",
        ),
        (
            "ixi-pd-t2",
            False,
            "The PD, an echo of the T2, is cut at the same slices and not interpolated, unless its grid differs (flag "
            "grid_differs).",
            "",
        ),
        (
            "ixi-t1-pd-t2",
            True,
            f"The T1 and PD are interpolated once, linearly, onto exactly those planes, {SIMILAR}",
            "T1 and PD",
        ),
    ],
)
def test_an_echo_is_not_called_interpolated(
    name: str, register_echoes: bool, sentence: str, registered: str, summary: dict[str, Any], final: pd.DataFrame
) -> None:
    config = summary["inputs"]["config"] | {"registration": "rigid", "register_echoes": register_echoes}
    sheet = make_datasheet(summary | {"name": name, "inputs": summary["inputs"] | {"config": config}}, final)
    assert sheet.preparation[0] == f"{PLANES} {sentence} {SAME_PLACE}"
    estimated = {text.partition(" is an estimate")[0] for text in sheet.limits if "is an estimate" in text}
    assert estimated == ({f"The registration of the {registered}"} if registered else set())
    is_cut = "echo" in sentence
    assert ("No motion is corrected between PD and T2, which count as echoes of one scan." in sheet.limits) == is_cut


def test_what_no_md5_verified_is_a_limit(summary: dict[str, Any], final: pd.DataFrame) -> None:
    def limits(**kinds: str) -> list[str]:
        sheet = make_datasheet(with_sources(summary, **kinds), final)
        return [text for text in sheet.limits if text.startswith("Not verified")]

    assert limits(T1=credit.IXI, T2=credit.IXI) == []
    assert limits(T1=credit.IXI, T2=credit.UNVERIFIED) == ["Not verified: no published MD5 was checked for T2."]
    both = ["Not verified: no published MD5 was checked for T1 and T2."]
    assert limits(T1=credit.UNVERIFIED, T2=credit.UNVERIFIED) == both


def test_only_archives_of_ixi_are_described_as_ixis(summary: dict[str, Any], final: pd.DataFrame) -> None:
    def text_of(**kinds: str) -> str:
        changed = with_sources(summary, **kinds)
        return readme(changed, make_datasheet(changed, final), [], pd.DataFrame()) + licence_text(changed)

    ixi = text_of(T1=credit.IXI, T2=credit.IXI)
    assert "Philips, 3 T" in ixi
    assert "normal, healthy subjects" in ixi
    assert "--source" not in ixi
    for kinds in ({"T1": "simulated", "T2": "simulated"}, {"T1": "own", "T2": "own"}):
        text = text_of(**kinds)
        assert not re.search(r"Philips|Hammersmith|Imperial College|healthy|CC BY-SA|brain-development", text)
        assert "--source FILES" in text
    mixed = text_of(T1=credit.IXI, T2=credit.OWN)
    assert "Philips" not in mixed
    assert "T1: IXI dataset" in mixed
    assert mixed.endswith(LEGAL_CODE.read_text())


def test_the_licence_of_ixi_is_the_whole_legal_code(summary: dict[str, Any]) -> None:
    text = licence_text(with_sources(summary, T1=credit.IXI, T2=credit.UNVERIFIED))
    assert text == LEGAL_CODE.read_text()
    words = re.sub("[^a-z0-9]+", " ", text.lower()).strip()
    # Three copies from different places, formatted differently, have these words.
    assert len(words.split()) == 3429
    assert (
        hashlib.sha256(words.encode()).hexdigest() == "3a1b1a543e5a2f14f53f448b7042f3c5b24910978e937c677df095e9f963caf6"
    )


def test_a_partly_simulated_archive_is_not_called_simulated() -> None:
    partly = {"source": credit.SIMULATED, "simulated_volumes": "2 of 5"}
    wholly = {"source": credit.SIMULATED, "simulated_volumes": "5 of 5"}
    assert credit.origin_of({"T1": wholly, "T2": wholly}) == credit.SIMULATED
    assert credit.origin_of({"T1": wholly, "T2": partly}) == credit.OWN
    assert credit.origin_of({"T1": {"source": credit.IXI}, "demographics": {"source": credit.OWN}}) == credit.IXI


def test_the_documents_hold_no_time_and_no_place(published: PublishedVersion, archives: Path) -> None:
    for name in NAMES:
        text = (published.folder / name).read_text()
        assert str(archives) not in text
        assert str(published.folder.parents[2]) not in text
        assert not re.search(r"\b20[2-9]\d-\d\d", text)
    assert pd.read_csv(io.StringIO((published.folder / metadata.COLUMNS).read_text())).shape[1] == 4
