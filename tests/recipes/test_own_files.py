"""A folder of NIfTI files gives the same pairs as archives of them."""

from __future__ import annotations

import gzip
import logging
import tarfile
import zlib
from pathlib import Path

import pandas as pd
import pytest
from conftest import config_for

from flows.cli import main
from ixi_etl.dataset import metadata, verify
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.recipes.ixi import refresh

PATTERN = ("{site}/{subject}/{session}_{modality}.nii", "{site}/{subject}/{session}_{modality}.nii.gz")


@pytest.fixture(scope="module")
def folder(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The members of the archives as files of their own, those of T1 uncompressed if they are not damaged."""
    top = tmp_path_factory.mktemp("own files")
    for modality in ("T1", "T2"):
        with tarfile.open(archives / f"IXI-{modality}.tar") as tar:
            for info in tar:
                member = tar.extractfile(info)
                if member is None or not info.name.endswith(".nii.gz"):
                    continue
                data, (person, site, number, _) = member.read(), info.name.split("-")
                path = top / site / person / f"{number}_{modality}.nii.gz"
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    plain = gzip.decompress(data)
                except (OSError, EOFError, zlib.error):
                    plain = b""
                if modality == "T1" and plain:
                    path.with_suffix("").write_bytes(plain)
                else:
                    path.write_bytes(data)
    return top


def test_files_give_the_same_store_and_decisions_as_archives(
    folder: Path, published: PublishedVersion, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_for(tmp_path, folder).model_copy(update={"pattern": PATTERN})
    made = refresh(config)
    files, expected_files = (
        {n: f for n, f in metadata.read_metadata(v.folder)["files"].items() if n.startswith("slices.zarr/t")}
        for v in (made, published)
    )
    assert files == expected_files
    assert not verify.verify(made.folder, deep=True)
    table, expected = (metadata.read_manifest(v.folder) for v in (made, published))
    assert table["subject_id"].tolist() == expected["subject_id"].tolist()
    decisions = ["site", "status", "reason", "split", "t1_shape", "t2_shape", "t2_sha256", "t1_p_low", "flags"]
    pd.testing.assert_frame_equal(table[decisions], expected[decisions])
    record = metadata.read_metadata(made.folder)
    assert record["inputs"]["archives_md5"] == {}
    assert {source["md5"] for source in record["sources"].values()} == {None}
    assert {m: source["files_sha256"] for m, source in record["sources"].items()} == record["inputs"]["files_sha256"]
    assert f"SHA-256 of the files {record['inputs']['files_sha256']['T1']}" in (made.folder / "report.html").read_text()
    assert str(folder) not in (made.folder / "dataset.json").read_text()
    with caplog.at_level(logging.WARNING):
        assert refresh(config) == PublishedVersion(made.version, made.folder, is_new=False)


def test_a_survey_reads_a_folder_of_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [option for pattern in PATTERN for option in ("--pattern", pattern)]
    with pytest.raises(SystemExit) as ended:
        main(["survey", "--source", str(folder), "--out", str(tmp_path), "--modalities", "t2,t1", *options])
    assert ended.value.code == 0
    table = pd.read_csv(tmp_path / "survey.csv", keep_default_na=False)
    assert set(table["modality"]) == {"T1", "T2"}
    assert (table["location"] == str(folder) + "/" + table["member"]).all()
    with pytest.raises(SystemExit) as ended:
        main(["survey", "--source", str(folder), "--out", str(tmp_path), "--modalities", "T1,T3"])
    assert ended.value.code == 2
    assert "error: there is no modality T3; the modalities are T1, T2, PD, MRA" in capsys.readouterr().err
