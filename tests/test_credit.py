"""Credit, licence and software of versions and runs: decided by contents, and shown everywhere."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import SMALL_NETWORKS, config_for

from ixi_etl import catalog, dataset, software
from ixi_etl.credit import IXI, OWN, SIMULATED, UNVERIFIED, credit_and_licence, source_of
from ixi_etl.files import read_json, to_json
from ixi_etl.nifti import pack_like
from ixi_etl.phantom import grid_affine, pack, write_tar
from ixi_etl.publish import Refreshed
from ixi_etl.refresh import refresh
from ixi_etl.survey import survey

MD5 = {name: catalog.official(name).md5 for name in ("IXI-T1.tar", "IXI-T2.tar", "IXI.xls")}
T1, OTHER = "IXI-T1.tar", "0" * 32


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (IXI, {"md5": MD5[T1]}),
        (IXI, {"md5": MD5[T1], "volumes": 3, "simulated": 3}),  # the MD5 decides first
        (OWN, {"md5": OTHER}),
        (OWN, {"md5": OTHER, "from_ixi": True}),  # a mirror's other file
        (OWN, {"md5": MD5["IXI-T2.tar"]}),  # the published MD5 of another file
        (OWN, {"md5": None}),
        (UNVERIFIED, {"md5": None, "from_ixi": True}),
        (SIMULATED, {"md5": OTHER, "volumes": 3, "simulated": 3}),
        (SIMULATED, {"md5": None, "from_ixi": True, "volumes": 3, "simulated": 1}),
    ],
)
def test_whose_a_file_is_follows_from_its_md5_and_its_volumes(kind: str, arguments: dict[str, Any]) -> None:
    source = source_of(T1, **arguments)
    said = credit_and_licence({"T1": source, "T2": source})
    assert (source["source"], source["md5_is_published"]) == (kind, kind == IXI)
    assert ("Hammersmith" in said["credit"]) == ("CC BY-SA" in said["licence"]) == (kind in (IXI, UNVERIFIED))
    assert ("not verified" in said["credit"]) == (kind == UNVERIFIED)


def test_the_credit_of_a_mix_names_each_part() -> None:
    own = source_of("IXI-T2.tar", OTHER)
    said = credit_and_licence({"T1": source_of(T1, MD5[T1]), "T2": own, "demographics": own})
    assert said["credit"].startswith("T1: IXI dataset")
    assert "; T2 and demographics: own source" in said["credit"]
    assert said["licence"].startswith("T1: CC BY-SA 3.0")
    partly = credit_and_licence({"T1": source_of(T1, OTHER, volumes=5, simulated=2)})
    assert "2 of 5 volumes" in partly["credit"]
    assert partly["licence"].startswith("unknown")


def test_a_volume_says_that_it_was_simulated_or_generated(tmp_path: Path) -> None:
    values = np.arange(24, dtype="<i2").reshape(2, 3, 4)
    simulated = pack(values, grid_affine((4, 3, 2), (1, 1, 1), "RAS"))
    plain = gzip.decompress(simulated)
    heads = {
        "simulated": simulated,
        "synthetic": gzip.compress(pack_like(plain, values, "SYNTHETIC T2 of a T1, ixi-etl 0")),
        "scan": gzip.compress(pack_like(plain, values, "MPRAGE, was SIMULATED by nobody")),
    }
    write_tar(tmp_path / T1, {f"IXI{n}-Guys-0001-T1.nii.gz": data for n, data in enumerate(heads.values())})
    assert survey({"T1": str(tmp_path / T1)})["simulated"].tolist() == [True, True, False]


def test_a_version_of_the_phantom_says_so_and_never_ixi(published: Refreshed) -> None:
    facts = dataset.read_facts(published.folder)
    assert {source["source"] for source in facts["sources"].values()} == {SIMULATED}
    for name in ("dataset.json", "report.html", "slices.zarr/zarr.json"):
        text = (published.folder / name).read_text()
        assert "simulated" in text
        assert "Hammersmith" not in text
        assert "CC BY-SA" not in text


def test_published_md5s_give_the_credit_of_ixi_whatever_the_files_are_called_by(
    archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given by a user, with and without MD5SUMS: the same name and bytes, credited to IXI by their MD5s."""
    sums = dict(line.split()[::-1] for line in (archives / "MD5SUMS").read_text().splitlines())
    monkeypatch.setattr(catalog, "_MD5", catalog._MD5 | sums)
    made = []
    for name in ("with", "without"):
        shutil.copytree(archives, tmp_path / name)
        if name == "without":
            (tmp_path / name / "MD5SUMS").unlink()
        made.append(refresh(config_for(tmp_path / f"root-{name}", tmp_path / name, pictures=False)).folder)
    facts = [(folder / "dataset.json").read_bytes() for folder in made]
    assert facts[0] == facts[1]
    said = json.loads(facts[0])
    assert {s["source"] for s in said["sources"].values()} == {IXI}
    assert (said["credit"], said["licence"]) == (catalog.CREDIT, catalog.LICENCE)


def test_the_code_that_made_a_version_is_named_outside_its_hashes(published: Refreshed, tmp_path: Path) -> None:
    made_by = read_json(published.folder / dataset.SOFTWARE)
    assert made_by["ixi-etl"] == software.describe()["ixi-etl"]
    assert {"commit", "code_sha256", "python", "platform", "numpy", "zarr"} <= set(made_by)
    assert dataset.SOFTWARE not in dataset.read_facts(published.folder)["files"]
    copy = tmp_path / published.version
    shutil.copytree(published.folder, copy)
    (copy / dataset.SOFTWARE).write_text('{"python": "another"}')
    assert dataset.verify(copy) == [f"{copy / dataset.SOFTWARE} is damaged: it does not have the SHA-256 that it holds"]
    (copy / dataset.SOFTWARE).write_text(to_json(dataset.with_digest({"python": "another"})))
    assert dataset.verify(copy, deep=True) == []
    assert "software.python" in dataset.compare_inputs(published.folder, copy)["what"].tolist()
    (copy / dataset.SOFTWARE).unlink()
    assert dataset.verify(copy) == []


def test_the_commit_is_of_the_codes_own_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository around an environment is not meant; what git or pip do not know is taken from the environment."""
    (tmp_path / "venv/site-packages").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(software, "TOP", tmp_path / "venv/site-packages")
    monkeypatch.setattr(software, "_of_pip", lambda: None)
    monkeypatch.setenv(software.COMMIT, "abc")
    assert software.commit.__wrapped__() == "abc"
    monkeypatch.delenv(software.COMMIT)
    assert software.commit.__wrapped__() is None


def test_versions_compares_configuration_and_libraries(published: Refreshed, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(published.folder, other)
    facts = json.loads((other / "dataset.json").read_text())
    facts["inputs"]["config"]["slices"] += 1
    facts["inputs"]["libraries"]["numpy"] = "9.9"
    (other / "dataset.json").write_text(to_json(dataset.with_digest(facts)))
    found = dataset.compare_inputs(published.folder, other).set_index("what")
    assert sorted(found.index) == ["config.slices", "libraries.numpy"]
    assert found.at["libraries.numpy", "new"] == "9.9"
    assert dataset.compare_inputs(other, other).empty


def test_a_crc_is_text_to_a_spreadsheet(published: Refreshed) -> None:
    table = pd.read_csv(published.folder / "manifest.csv")  # as pandas guesses, and spreadsheets too
    for column in ("t1_gzip_crc32", "t2_gzip_crc32"):
        assert table[column].dropna().str.fullmatch("crc32:[0-9a-f]{8}").all()


def test_a_run_and_what_it_makes_pass_the_credit_on(published: Refreshed, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed; pip install -c constraints.txt -e '.[train]'")
    from model import synthesize
    from model.config import TrainConfig
    from model.run import prepare, train_run

    root = published.folder.parents[2]
    config = TrainConfig.model_validate(SMALL_NETWORKS | {"steps": 1, "samples": 0, "checkpoint_every": 1})
    run = prepare(root, config, "credit")
    generator = train_run(run)
    terms = dataset.licence_of(published.folder)
    record = read_json(run.folder / "config.json")
    assert record["data"] == terms
    assert record["software"].items() >= software.describe(("torch",)).items()
    assert terms["credit"] in (run.folder / "report.html").read_text()
    sidecar = synthesize.load(generator).record
    assert {"licence": sidecar["Licence"], "credit": sidecar["Credit"]} == terms
