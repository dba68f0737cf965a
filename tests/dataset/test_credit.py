"""Credit and licence depend on the contents of files; every version and run records them and its software."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import SMALL_NETWORKS, config_for

from ixi_etl.core import software
from ixi_etl.core.files import read_json, to_json
from ixi_etl.dataset import compare, metadata, verify
from ixi_etl.dataset.credit import IXI, OWN, SIMULATED, UNVERIFIED, credit_and_licence, describe_source
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.recipes.ixi import refresh
from ixi_etl.recipes.ixi_inputs import is_from_ixi
from ixi_etl.scans.nifti import pack_like
from ixi_etl.scans.survey import survey
from ixi_etl.sources import catalog
from ixi_etl.sources.cache import VerifiedFile
from ixi_etl.testing.phantom import grid_affine, pack_nifti, write_tar

MD5 = {name: catalog.official(name).md5 for name in ("IXI-T1.tar", "IXI-T2.tar", "IXI.xls")}
T1, OTHER = "IXI-T1.tar", "0" * 32


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (IXI, {"md5": MD5[T1]}),
        (IXI, {"md5": MD5[T1], "volumes": 3, "simulated": 3}),  # the MD5 takes precedence
        (OWN, {"md5": OTHER}),
        (OWN, {"md5": OTHER, "from_ixi": True}),  # another file of a mirror
        (OWN, {"md5": MD5["IXI-T2.tar"]}),  # the published MD5 of another file
        (OWN, {"md5": None}),
        (UNVERIFIED, {"md5": None, "from_ixi": True}),
        (SIMULATED, {"md5": OTHER, "volumes": 3, "simulated": 3}),
        (SIMULATED, {"md5": None, "from_ixi": True, "volumes": 3, "simulated": 1}),
    ],
)
def test_the_source_of_a_file_depends_on_its_md5_and_volumes(kind: str, arguments: dict[str, Any]) -> None:
    source = describe_source(T1, **arguments)
    credited = credit_and_licence({"T1": source, "T2": source})
    assert (source["source"], source["md5_is_published"]) == (kind, kind == IXI)
    assert ("Hammersmith" in credited["credit"]) == ("CC BY-SA" in credited["licence"]) == (kind in (IXI, UNVERIFIED))
    assert ("not verified" in credited["credit"]) == (kind == UNVERIFIED)


def test_a_mirror_is_not_a_host_of_ixi() -> None:
    host, mirror = catalog.official(T1).urls
    members = VerifiedFile(T1, "IXI-T1.tar.members.part", 1, "", False, host, None, "")
    assert is_from_ixi("T1", members)
    assert not is_from_ixi("T2", members)
    assert not is_from_ixi("T1", replace(members, origin=mirror))


def test_an_archive_of_ixi_without_a_published_md5_is_credited_as_not_verified() -> None:
    source = describe_source("IXI-MRA.tar", OTHER, from_ixi=True)
    credited = credit_and_licence({"MRA": source})
    assert (source["source"], source["md5_is_published"]) == (UNVERIFIED, False)
    assert credited == {"credit": f"{catalog.CREDIT}; not verified: no MD5 of this archive is published"} | {
        "licence": catalog.LICENCE
    }
    assert describe_source("IXI-MRA.tar", OTHER)["source"] == OWN


def test_the_credit_of_a_mix_names_each_part() -> None:
    own = describe_source("IXI-T2.tar", OTHER)
    credited = credit_and_licence({"T1": describe_source(T1, MD5[T1]), "T2": own, "demographics": own})
    assert credited["credit"].startswith("T1: IXI dataset")
    assert "; T2 and demographics: the user's own files" in credited["credit"]
    assert credited["licence"].startswith("T1: CC BY-SA 3.0")
    partly = credit_and_licence({"T1": describe_source(T1, OTHER, volumes=5, simulated=2)})
    assert "2 of 5 volumes" in partly["credit"]
    assert partly["licence"].startswith("unknown")


def test_simulated_and_generated_volumes_are_marked(tmp_path: Path) -> None:
    values = np.arange(24, dtype="<i2").reshape(2, 3, 4)
    simulated = pack_nifti(values, grid_affine((4, 3, 2), (1, 1, 1), "RAS"))
    plain = gzip.decompress(simulated)
    volumes = {
        "simulated": simulated,
        "synthetic": gzip.compress(pack_like(plain, values, "SYNTHETIC T2 of a T1, ixi-etl 0")),
        "scan": gzip.compress(pack_like(plain, values, "MPRAGE, was not SIMULATED")),
    }
    write_tar(tmp_path / T1, {f"IXI{n}-Guys-0001-T1.nii.gz": data for n, data in enumerate(volumes.values())})
    assert survey({"T1": str(tmp_path / T1)})["simulated"].tolist() == [True, True, False]


def test_a_version_of_the_phantom_is_never_credited_to_ixi(published: PublishedVersion) -> None:
    record = metadata.read_metadata(published.folder)
    assert {source["source"] for source in record["sources"].values()} == {SIMULATED}
    for name in ("dataset.json", "report.html", "slices.zarr/zarr.json"):
        text = (published.folder / name).read_text()
        assert "simulated" in text
        assert "Hammersmith" not in text
        assert "CC BY-SA" not in text


def test_published_md5s_give_the_credit_of_ixi_with_and_without_md5sums(
    archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's archives with IXI's MD5s, with and without MD5SUMS, give the same version, credited to IXI."""
    sums = dict(line.split()[::-1] for line in (archives / "MD5SUMS").read_text().splitlines())
    monkeypatch.setattr(catalog, "_MD5", catalog._MD5 | sums)
    made = []
    for name in ("with", "without"):
        shutil.copytree(archives, tmp_path / name)
        if name == "without":
            (tmp_path / name / "MD5SUMS").unlink()
        made.append(refresh(config_for(tmp_path / f"root-{name}", tmp_path / name, pictures=False)).folder)
    records = [(folder / "dataset.json").read_bytes() for folder in made]
    assert records[0] == records[1]
    record = json.loads(records[0])
    assert {s["source"] for s in record["sources"].values()} == {IXI}
    assert (record["credit"], record["licence"]) == (catalog.CREDIT, catalog.LICENCE)


def test_software_json_is_not_one_of_the_hashed_files(published: PublishedVersion, tmp_path: Path) -> None:
    made_by = read_json(published.folder / metadata.SOFTWARE)
    assert made_by["ixi-etl"] == software.describe()["ixi-etl"]
    assert {"commit", "code_sha256", "python", "platform", "numpy", "zarr"} <= set(made_by)
    assert metadata.SOFTWARE not in metadata.read_metadata(published.folder)["files"]
    copy = tmp_path / published.version
    shutil.copytree(published.folder, copy)
    (copy / metadata.SOFTWARE).write_text('{"python": "another"}')
    assert verify.verify(copy) == [f"{copy / metadata.SOFTWARE} is damaged: it does not have the SHA-256 that it holds"]
    (copy / metadata.SOFTWARE).write_text(to_json(metadata.with_digest({"python": "another"})))
    assert verify.verify(copy, deep=True) == []
    assert "software.python" in compare.compare_inputs(published.folder, copy)["what"].tolist()
    (copy / metadata.SOFTWARE).unlink()
    assert verify.verify(copy) == []


def test_the_commit_is_that_of_the_repository_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository around the environment is ignored; without git or pip, an environment variable gives the commit."""
    (tmp_path / "venv/site-packages").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(software, "TOP", tmp_path / "venv/site-packages")
    monkeypatch.setattr(software, "_commit_from_pip", lambda: None)
    monkeypatch.setenv(software.COMMIT, "abc")
    assert software.commit.__wrapped__() == "abc"
    monkeypatch.delenv(software.COMMIT)
    assert software.commit.__wrapped__() is None


def test_every_packaged_template_is_part_of_the_hash_of_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = []
    for path in (path for package in software.PACKAGES for path in (software.TOP / package).glob("templates/*")):
        copies.append(tmp_path / path.relative_to(software.TOP))
        copies[-1].parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copies[-1])
    assert {copy.suffix for copy in copies} >= {".html", ".css", ".js", ".txt", ".md"}
    monkeypatch.setattr(software, "TOP", tmp_path)
    hashes = {software.code_sha256.__wrapped__()}
    for copy in copies:
        copy.write_bytes(copy.read_bytes() + b" ")
        hashes.add(software.code_sha256.__wrapped__())
    assert len(hashes) == len(copies) + 1


def test_versions_compares_configuration_and_libraries(published: PublishedVersion, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(published.folder, other)
    record = json.loads((other / "dataset.json").read_text())
    record["inputs"]["config"]["slices"] += 1
    record["inputs"]["libraries"]["numpy"] = "9.9"
    (other / "dataset.json").write_text(to_json(metadata.with_digest(record)))
    differences = compare.compare_inputs(published.folder, other).set_index("what")
    assert sorted(differences.index) == ["config.slices", "libraries.numpy"]
    assert differences.at["libraries.numpy", "new"] == "9.9"
    assert compare.compare_inputs(other, other).empty


def test_crcs_are_read_as_text_by_spreadsheets(published: PublishedVersion) -> None:
    table = pd.read_csv(published.folder / "manifest.csv")  # with guessed types, as spreadsheets do
    for column in ("t1_gzip_crc32", "t2_gzip_crc32"):
        assert table[column].dropna().str.fullmatch("crc32:[0-9a-f]{8}").all()


@pytest.mark.usefixtures("torch")
def test_a_run_and_its_outputs_carry_the_credit(refreshed: PublishedVersion, tmp_path: Path) -> None:
    from model import synthesize
    from model.config import TrainConfig
    from model.jobs import prepare_run, train_run

    config = TrainConfig.model_validate(SMALL_NETWORKS | {"steps": 1, "samples": 0, "checkpoint_every": 1})
    run = prepare_run(tmp_path, config, "credit")
    generator = train_run(run)
    terms = metadata.licence_of(refreshed.folder)
    record = read_json(run.folder / "config.json")
    assert record["data"] == terms
    assert record["software"].items() >= software.describe(("torch",)).items()
    assert terms["credit"] in (run.folder / "report.html").read_text()
    sidecar = synthesize.load_trained(generator).record
    assert {"licence": sidecar["Licence"], "credit": sidecar["Credit"], "share_alike": False} == terms
