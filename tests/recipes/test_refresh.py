"""The refresh: equal inputs give the same version and bytes, however it is run or interrupted."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import stages
from conftest import config_for
from processes import Job

from ixi_etl.config import DatasetConfig
from ixi_etl.core.files import lock_root, to_json
from ixi_etl.core.storage import DEFAULT_DATASET, DataRoot
from ixi_etl.dataset import compare, manifest, metadata, publish, verify, versions
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.dataset.store import open_arrays
from ixi_etl.errors import ConfigError, DatasetError, DownloadError, IxiError, LockedError
from ixi_etl.recipes import ixi as jobs
from ixi_etl.recipes import ixi_cluster
from ixi_etl.recipes.ixi import refresh, select_subjects
from ixi_etl.recipes.ixi_inputs import VOXEL_LIBRARIES, DemographicsFile, Inputs, RefreshJob
from ixi_etl.scans.survey import describe_skipped_members, survey
from ixi_etl.scans.tar import read_member
from ixi_etl.testing.phantom import write_tar


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


EXPECTED = {
    "IXI008-IOP-0996": "depth_not_modal",
    "IXI009-HH-1033": "depth_not_modal",
    "IXI010-HH-1070": "depth_not_modal",
    "IXI901-Guys-9010": "missing_t2",
    "IXI902-Guys-9020": "missing_t1",
    "IXI903-Guys-9030": "corrupt_voxels",
    "IXI904-Guys-9040": "corrupt_voxels",
    "IXI905-Guys-9050": "unreadable",
    "IXI906-Guys-9060": "empty_image",
    "IXI907-Guys-9070": "not_3d",
    "IXI908-Guys-9080": "bad_affine",
    "IXI909-Guys-9090": "unsupported_dtype",
}


def test_every_subject_of_either_archive_has_a_row(published: PublishedVersion, archives: Path) -> None:
    table = metadata.read_manifest(published.folder)
    members = survey({m: str(archives / f"IXI-{m}.tar") for m in ("T1", "T2")})
    assert table["subject_id"].tolist() == sorted(set(members["subject_id"]) - {""})
    excluded = table[table["status"] == "excluded"]
    assert dict(zip(excluded["subject_id"].str[:6], excluded["reason"], strict=True)) == {
        k[:6]: v for k, v in EXPECTED.items()
    }
    assert (manifest.used_rows(table)["subject_id"].str[:6] == [f"IXI{n:03d}" for n in range(2, 8)]).all()
    version_metadata = metadata.read_metadata(published.folder)
    assert version_metadata["not_volumes"] == ["README.txt"]
    assert "subject" in {path.name for path in (published.folder / "slices.zarr").iterdir()}
    assert version_metadata["funnel"]["used"]["all"] == 6
    assert (
        table[["t1_sha256", "t2_sha256"]].map(len).sum(axis=1) == [128 - 64 * ("missing" in r) for r in table["reason"]]
    ).all()


def test_words_of_the_manifest_are_pinned(published: PublishedVersion) -> None:
    """Reasons, details and flags are part of the bytes of a version; see `test_pinned_version`."""
    words = metadata.read_manifest(published.folder)[["subject_id", "status", "reason", "detail", "flags"]]
    quotes_a_library = words["detail"].str.contains("gzip stream")  # or a compressed length
    assert quotes_a_library.sum() == 2
    text = words[~quotes_a_library].to_csv(index=False, lineterminator="\n")
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "2e50d1ae3a46a2cd37faccfe76b4fcffd4d852adb5b99f98cd49f443352861e6"
    )


def test_no_file_of_a_version_holds_a_path_a_url_or_a_time(published: PublishedVersion, archives: Path) -> None:
    for name, data in contents(published.folder).items():
        for vocabulary in (b"http://mlcommons.org/croissant/", b"http://purl.org/dc/terms/"):  # names, no addresses
            data = data.replace(vocabulary, b"") if name == metadata.CROISSANT else data
        for trace in (str(archives), "http://", "pytest", time.strftime("%Y-%m-%d")):
            assert trace.encode() not in data, (name, trace)


def test_workers_do_not_change_a_byte(published: PublishedVersion, archives: Path, tmp_path: Path) -> None:
    """`published` was made by two workers; the refresh that is killed below has one."""
    again = refresh(config_for(tmp_path, archives).model_copy(update={"workers": 4}))
    assert again.version == published.version
    assert contents(again.folder) == contents(published.folder)


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a cluster in this process, reached over TCP; `make test-stack` has one of several processes."""
    from distributed import LocalCluster

    with LocalCluster(1, processes=False, threads_per_worker=1, protocol="tcp", dashboard_address=None) as cluster:
        yield cluster.scheduler_address


def test_a_dask_cluster_does_not_change_a_byte(
    cluster: str, published: PublishedVersion, archives: Path, tmp_path: Path
) -> None:
    again = refresh(config_for(tmp_path, archives).model_copy(update={"dask": cluster}))
    assert again.version == published.version
    assert contents(again.folder) == contents(published.folder)


def test_an_unreachable_dask_address_is_a_one_line_error(archives: Path, tmp_path: Path) -> None:
    with pytest.raises(IxiError, match="no Dask scheduler answers at nonsense"):
        refresh(config_for(tmp_path, archives).model_copy(update={"dask": "nonsense://x"}))


def test_index_pairing_stores_the_voxels_and_warns_of_planes_and_empty_splits(
    archives: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import gzip

    import nibabel as nib

    done = refresh(config_for(tmp_path, archives, pairing="index", pictures=False))
    assert "T1 slices are sagittal and T2 slices are axial" in caplog.text
    assert "no subject is in split val or test (the version has 6 train): " in caplog.text
    assert "no validation during training, no evaluation after it" in caplog.text
    used = manifest.used_rows(metadata.read_manifest(done.folder))
    members = survey({m: str(archives / f"IXI-{m}.tar") for m in ("T1", "T2")}).set_index("member")
    arrays = open_arrays(done.folder)
    assert len(used) == 6
    for row in used.to_dict("records"):
        for m in ("T1", "T2"):
            member = members.loc[row[f"{m.lower()}_member"]]
            packed = read_member(str(archives / f"IXI-{m}.tar"), int(member["offset"]), int(member["size"]))
            stored = nib.Nifti1Image.from_bytes(gzip.decompress(packed)).get_fdata().transpose(2, 1, 0)
            start, stop = row[f"{m.lower()}_window_start"], row[f"{m.lower()}_window_stop"]
            np.testing.assert_array_equal(arrays[m.lower()][row["store_row"]], np.rint(stored[start:stop]))
    assert "different planes" in (done.folder / metadata.REPORT).read_text()


def test_a_second_refresh_changes_nothing(refreshed: PublishedVersion, archives: Path, tmp_path: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    second = refresh(config_for(tmp_path, archives))
    assert (refreshed.is_new, second.is_new) == (True, False)
    assert second.version == refreshed.version
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert not (tmp_path / "datasets" / DEFAULT_DATASET / ".staging" / refreshed.version).exists()


def test_only_options_that_affect_data_change_the_version_name(archives: Path, tmp_path: Path) -> None:
    config = config_for(tmp_path, archives)

    def inputs(chosen: DatasetConfig, t2: str = "b", demographics: str | None = None) -> dict[str, Any]:
        return metadata.version_inputs({"T1": "a", "T2": t2}, chosen, VOXEL_LIBRARIES, demographics_sha256=demographics)

    def name(**changes: Any) -> str:
        return metadata.version_name(inputs(config.dataset.model_copy(update=changes)))

    names = {name(), name(window=(3, 9)), name(split_seed=1), name(pairing="index"), name(slices=8)}
    assert len(names) == 5
    assert metadata.version_name(inputs(config.dataset, demographics="c")) not in names
    assert metadata.version_name(inputs(config.dataset, t2="x")) not in names
    # no other option of a refresh is an input
    assert set(inputs(config.dataset)) == {
        "archives_md5",
        "demographics_sha256",
        "config",
        "pipeline_version",
        "libraries",
    }


def test_the_pointer_moves_back_to_a_requested_old_version(
    refreshed: PublishedVersion, archives: Path, tmp_path: Path
) -> None:
    data_root, first = DataRoot(tmp_path), refreshed
    second = refresh(config_for(tmp_path, archives, split_seed=4, pictures=False))
    assert versions.resolve_version(data_root) == second.version
    assert versions.published_versions(data_root) == [first.version, second.version]
    assert not refresh(config_for(tmp_path, archives)).is_new
    assert (
        versions.resolve_version(data_root) == versions.resolve_version(data_root, first.version[:6]) == first.version
    )
    changed = compare.compare_manifests(metadata.read_manifest(first.folder), metadata.read_manifest(second.folder))
    assert set(changed["changed"]) <= {"split"}
    assert compare.compare_manifests(metadata.read_manifest(first.folder), metadata.read_manifest(first.folder)).empty


def test_versions_are_compared_subject_by_subject(published: PublishedVersion, archives: Path, tmp_path: Path) -> None:
    fewer = tmp_path / "archives"
    fewer.mkdir()
    for modality in ("T1", "T2"):
        archive = str(archives / f"IXI-{modality}.tar")
        table = survey({modality: archive})
        kept = table[~table["member"].str.startswith("IXI002") & ~table["member"].str.contains("IXI003.*T2")]
        write_tar(
            fewer / f"IXI-{modality}.tar", {r.member: read_member(archive, r.offset, r.size) for r in kept.itertuples()}
        )
    new = refresh(config_for(tmp_path / "b", fewer, pictures=False))
    changes = compare.compare_manifests(
        metadata.read_manifest(published.folder), metadata.read_manifest(new.folder)
    ).set_index("subject_id")
    (gone,), (lost,) = (changes.index[changes.index.str.startswith(n)] for n in ("IXI002", "IXI003"))
    assert changes.loc[gone, "new"] == "absent"
    assert changes.loc[lost, "new"] == "excluded (missing_t2)"
    assert len(changes) == 2


# -- interruptions ----------------------------------------------------------------------------------------------------


def test_a_killed_refresh_resumes_and_gives_the_same_bytes(
    published: PublishedVersion, archives: Path, tmp_path: Path
) -> None:
    """Killed during the cut; `make faults` has hundreds of moments."""
    config, data_root = config_for(tmp_path, archives).model_copy(update={"workers": 1}), DataRoot(tmp_path)
    staging = data_root.staging(published.version)

    records = "work/IXI*.json"
    job = Job(stages.do_refresh_killed, config.model_dump_json(), f"*/{records}", 5, fresh=True)
    assert job.exit_code() == -signal.SIGKILL
    done = {p: p.stat().st_mtime_ns for p in staging.glob(records)}
    assert len(done) == 5
    assert versions.published_versions(data_root) == []
    found: list[dict[Path, int]] = []

    def progress(stage: str, *_: object) -> None:
        if stage == "hash files" and not found:
            found.append({p: p.stat().st_mtime_ns for p in done})

    again = refresh(config, progress)
    assert found == [done], "finished subjects were cut again"
    assert contents(again.folder) == contents(published.folder)
    assert versions.resolve_version(data_root) == published.version
    assert not staging.exists()


def test_a_kill_between_publish_and_pointer_is_repaired(
    published: PublishedVersion, archives: Path, tmp_path: Path
) -> None:
    data_root = DataRoot(tmp_path)
    shutil.copytree(published.folder, data_root.version(published.version))
    with pytest.raises(DatasetError, match="no published version"):
        versions.resolve_version(data_root)
    assert not refresh(config_for(tmp_path, archives)).is_new
    assert versions.resolve_version(data_root) == published.version


def test_a_second_concurrent_refresh_names_the_first(archives: Path, tmp_path: Path) -> None:
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys\nfrom pathlib import Path\nfrom ixi_etl.core.files import lock_root\n"
            "with lock_root(Path(sys.argv[1])):\n print(flush=True); input()",
            str(tmp_path),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    child.stdout.readline()
    with pytest.raises(LockedError, match=f"in use by process {child.pid} on .* since 20"):
        refresh(config_for(tmp_path, archives))
    child.kill()  # the kernel releases the lock
    child.wait()
    with lock_root(tmp_path):
        pass


@pytest.mark.parametrize("note", ["[1]", '{"pid": 1}', "5", "[" * 200_000, "1" * 5000])
def test_a_damaged_lock_note_is_ignored(note: str, tmp_path: Path) -> None:
    with lock_root(tmp_path):
        (tmp_path / ".lock.json").write_text(note)
        with pytest.raises(LockedError, match="is in use by another process"), lock_root(tmp_path):
            pass


def test_an_unwritable_root_is_a_one_line_error(archives: Path) -> None:
    with pytest.raises(IxiError, match="cannot write to /proc/nowhere"):
        refresh(config_for(Path("/proc/nowhere"), archives))


# -- errors -----------------------------------------------------------------------------------------------------------


def with_unreadable_pairs(archives: Path, folder: Path, count: int) -> Path:
    """The phantom's intact pairs, and `count` more whose T1 is not a gzip file."""
    folder.mkdir()
    sums = []
    for modality in ("T1", "T2"):
        archive = str(archives / f"IXI-{modality}.tar")
        rows = survey({modality: archive})
        members = {r.member: read_member(archive, r.offset, r.size) for r in rows.itertuples() if r.member < "IXI008"}
        good = next(iter(members.values()))
        members |= {
            f"IXI{n}-HH-1-{modality}.nii.gz": b"damaged" if modality == "T1" else good for n in range(500, 500 + count)
        }
        sums.append(f"{write_tar(folder / f'IXI-{modality}.tar', members)}  IXI-{modality}.tar")
    (folder / "MD5SUMS").write_text("\n".join(sums))
    return folder


def test_too_many_unreadable_pairs_end_the_refresh(archives: Path, tmp_path: Path) -> None:
    config = config_for(tmp_path / "root", with_unreadable_pairs(archives, tmp_path / "src", 11), pictures=False)
    with pytest.raises(
        DatasetError, match=r"11 of 17 paired subjects are unreadable \(IXI500-HH-1, .*IXI510-HH-1\)"
    ) as caught:
        refresh(config)
    assert versions.published_versions(DataRoot(config.root)) == []
    audit = Path(str(caught.value).split("; ")[1].removesuffix(" lists the reasons"))
    table = pd.read_csv(audit)
    assert (table["reason"] == "unreadable").sum() == 11
    ten_unreadable = table[table["subject_id"] != "IXI510-HH-1"]
    jobs._check_enough_subjects(ten_unreadable, config, audit, [])  # ten are always allowed
    assert refresh(config.model_copy(update={"max_unreadable": 0.9})).is_new


def test_no_used_subject_is_a_one_line_error_with_an_audit(archives: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no subject is left \(.*grid_not_modal.*manifest\.csv lists the reasons"):
        refresh(config_for(tmp_path, archives, window=(90, 110)))


VOLUME = "IXI002-Guys-0828"
WRONG_NAMES = {
    "BIDS": "sub-01/anat/sub-01_{m}w.nii.gz",
    "not gzipped": VOLUME + "-{m}.nii",
    "upper case": VOLUME + "-{m}.NII.GZ",
    "browser's copy": VOLUME + "-{m} (1).nii.gz",
    "DICOM": "1.2.840/{m}/0001.dcm",
    "other modality": VOLUME + "-PD.nii.gz",
    "no number": "Guys-{m}.nii.gz",
    "very long": "x" * 300 + "-{m}.nii.gz",
}


@pytest.mark.parametrize("name", WRONG_NAMES.values(), ids=WRONG_NAMES)
def test_wrong_member_names_are_reported_with_an_example_and_the_pattern(name: str, tmp_path: Path) -> None:
    for m in ("T1", "T2"):
        write_tar(tmp_path / f"IXI-{m}.tar", {name.format(m=m): b"x", f"second-{m}": b"x"})
    table = survey({m: str(tmp_path / f"IXI-{m}.tar") for m in ("T1", "T2")})
    message = "; ".join(describe_skipped_members(table, ("T1", "T2")))
    assert message.startswith("IXI-T1.tar: skipped 2 of 2 members, for example ")
    assert name.format(m="T1")[-20:] in message or "second-T1" in message
    assert "a volume is called SUBJECT-SITE-NUMBER-T2.nii.gz, such as IXI002-Guys-0828-T2.nii.gz" in message
    assert len(message) < 800


def test_archives_without_a_subject_are_a_one_line_error(tmp_path: Path) -> None:
    for m in ("T1", "T2"):
        write_tar(tmp_path / f"IXI-{m}.tar", {WRONG_NAMES["BIDS"].format(m=m): b"x"})
    with pytest.raises(DatasetError) as caught:
        refresh(config_for(tmp_path / "root", tmp_path))
    table = survey({m: str(tmp_path / f"IXI-{m}.tar") for m in ("T1", "T2")})
    reasons = "; ".join(describe_skipped_members(table, ("T1", "T2")))
    assert str(caught.value) == f"the archives contain no subject: {reasons}"


def test_empty_archives_are_reported(tmp_path: Path) -> None:
    for m in ("T1", "T2"):
        write_tar(tmp_path / f"IXI-{m}.tar", {})
    with pytest.raises(DatasetError, match=r"no subject: IXI-T1\.tar has no members; IXI-T2\.tar has no members"):
        refresh(config_for(tmp_path / "root", tmp_path))


def test_skipped_members_are_a_warning(archives: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = survey({m: str(archives / f"IXI-{m}.tar") for m in ("T1", "T2")})
    config = config_for("unused", archives)
    select_subjects(RefreshJob(config, Inputs(dict.fromkeys(("T1", "T2")), None), "", {}), table)  # type: ignore[arg-type]
    assert [r.getMessage().partition(";")[0] for r in caplog.records if r.levelname == "WARNING"] == [
        "IXI-T1.tar: skipped 1 of 18 members, for example 'README.txt'"
    ]


def test_archives_that_differ_from_md5sums_are_rejected(archives: Path, tmp_path: Path) -> None:
    source = tmp_path / "src"
    shutil.copytree(archives, source)
    with open(source / "IXI-T2.tar", "r+b") as file:
        file.seek(100_000)
        file.write(b"\0\1\2")
    with pytest.raises(DownloadError, match=r"IXI-T2\.tar: MD5 is \w+, not"):
        refresh(config_for(tmp_path / "root", source))


def test_archives_that_change_after_hashing_are_not_published(
    archives: Path, published: PublishedVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(archives, tmp_path / "src"))
    parallel_map = ixi_cluster.parallel_map

    def map_and_delete_an_archive(*arguments: Any, **more: Any) -> Any:
        done = parallel_map(*arguments, **more)
        (source / "IXI-T2.tar").unlink()
        return done

    with monkeypatch.context() as patch:
        patch.setattr(ixi_cluster, "parallel_map", map_and_delete_an_archive)
        with pytest.raises(DatasetError, match=r"IXI-T2\.tar changed while it was read; run again when it is whole"):
            refresh(config_for(tmp_path / "root", source))
    data_root = DataRoot(tmp_path / "root")
    assert versions.published_versions(data_root) == []
    shutil.copy(archives / "IXI-T2.tar", source)
    assert contents(refresh(config_for(tmp_path / "root", source)).folder) == contents(published.folder)


def test_unchecked_archives_are_accepted_and_recorded(
    refreshed: PublishedVersion, archives: Path, tmp_path: Path
) -> None:
    source = tmp_path / "src"
    shutil.copytree(archives, source)
    (source / "MD5SUMS").unlink()
    path = DataRoot(tmp_path).datasets / metadata.POINTER
    path.unlink()  # otherwise nothing new would be written
    assert refresh(config_for(tmp_path, source)).version == refreshed.version
    pointer = json.loads(path.read_text())
    assert [origin["checked"] for origin in pointer["origins"].values()] == [False, False]


# -- verify -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(published: PublishedVersion, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published.folder, tmp_path / published.version))


def test_an_intact_version_verifies(published: PublishedVersion) -> None:
    assert verify.verify(published.folder) == []
    assert verify.verify(published.folder, deep=True) == []


@pytest.mark.parametrize("share", [0.0, 0.31, 0.77, 0.999])
def test_deep_verification_detects_any_flipped_byte(share: float, copy: Path) -> None:
    shards = [p for p in (copy / "slices.zarr").rglob("*") if p.is_file()]
    victim = shards[int(share * len(shards))]
    data = bytearray(victim.read_bytes())
    data[int(share * len(data))] ^= 1
    victim.write_bytes(data)
    assert any(str(victim) in problem for problem in verify.verify(copy, deep=True))


def damage(copy: Path, name: str) -> None:
    shard = copy / "slices.zarr/t1/c/2/0/0/0"
    dataset_json = copy / metadata.METADATA
    if name == "a shard deleted":
        shard.unlink()
    elif name == "a shard truncated":
        os.truncate(shard, shard.stat().st_size - 1)
    elif name == "a manifest edited":
        path = copy / metadata.MANIFEST
        path.write_text(path.read_text().replace(",train,", ",test,", 1))
    elif name == "a subject removed from the manifest":
        path = copy / metadata.MANIFEST
        path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("IXI002")))
    elif name == "dataset.json truncated":
        os.truncate(dataset_json, 100)
    elif name == "the configuration edited":
        dataset_json.write_text(dataset_json.read_text().replace('"anatomical"', '"index"'))
    elif name == "the store deleted":
        shutil.rmtree(copy / "slices.zarr")


@pytest.mark.parametrize(
    "name",
    [
        "a shard deleted",
        "a shard truncated",
        "a manifest edited",
        "a subject removed from the manifest",
        "dataset.json truncated",
        "the configuration edited",
        "the store deleted",
    ],
)
def test_verification_without_deep_detects_edits_and_missing_files(name: str, copy: Path) -> None:
    damage(copy, name)
    assert verify.verify(copy)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"node_type": "group"', '"node_uype": "group"'),
        ('"consolidated_metadata": {', '"consolidated_metadata": 5, "x": {'),
        ('"metadata": {', '"metadata": [], "x": {'),
        ('"kind": "inline"', '"kine": "inline"'),
        ('"shape": [', '"shaqe": ['),
        ('"codecs": [', '"codecs": null, "x": ['),
        ('"data_type": "int16"', '"data_type": [1]'),
        ('"zarr_format": 3', '"zarr_format": []'),
    ],
)
def test_verification_of_damaged_metadata_gives_one_line_problems(old: str, new: str, copy: Path) -> None:
    path = copy / "slices.zarr/zarr.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    problems = verify.verify(copy, deep=True)
    assert any(str(path) in problem for problem in problems)
    assert not any("\n" in problem for problem in problems)


def test_swapped_shards_are_detected(copy: Path) -> None:
    rows = [copy / f"slices.zarr/t1/c/{n}/0/0/0" for n in (0, 1)]
    one, two = (row.read_bytes() for row in rows)
    rows[0].write_bytes(two)
    rows[1].write_bytes(one)
    version_metadata = json.loads((copy / metadata.METADATA).read_text())
    version_metadata["files"] = publish.list_files(copy)  # as if the list of files was updated too
    (copy / metadata.METADATA).write_text(to_json(metadata.with_digest(version_metadata)))
    assert verify.verify(copy) == []
    assert any("percentiles" in problem for problem in verify.verify(copy, deep=True))


@pytest.mark.parametrize("loss", ["a shard", "dataset.json"])
def test_a_refresh_makes_a_damaged_version_again(
    loss: str, refreshed: PublishedVersion, published: PublishedVersion, archives: Path, tmp_path: Path
) -> None:
    config, folder = config_for(tmp_path, archives), refreshed.folder
    (folder / metadata.METADATA if loss == "dataset.json" else folder / "slices.zarr/t2/c/1/0/0/0").unlink()
    again = refresh(config)
    assert again.is_new
    assert contents(again.folder) == contents(published.folder)
    assert not (tmp_path / "datasets" / DEFAULT_DATASET / ".staging").exists()


def test_a_damaged_pointer_is_a_one_line_error_and_is_repaired(
    refreshed: PublishedVersion, archives: Path, tmp_path: Path
) -> None:
    data_root, done = DataRoot(tmp_path), refreshed
    for text in ("[1]", '{"version": "x"}', '{"version": 3, "history": []}', "", '{"version'):
        (data_root.datasets / metadata.POINTER).write_text(text)
        with pytest.raises(DatasetError, match=r"latest\.json is damaged; `ixi-etl refresh` rewrites it"):
            versions.resolve_version(data_root)
        assert versions.published_versions(data_root) == [done.version]
    refresh(config_for(tmp_path, archives))
    assert versions.resolve_version(data_root) == done.version


def test_a_renamed_version_is_detected(published: PublishedVersion, tmp_path: Path) -> None:
    copied = shutil.copytree(published.folder, tmp_path / "0123456789ab")
    assert any("its folder's name" in problem for problem in verify.verify(Path(copied)))


def test_a_missing_demographics_file_is_reported_before_any_download(tmp_path: Path) -> None:
    config = config_for(tmp_path, "http://127.0.0.1:9").model_copy(update={"demographics": str(tmp_path / "IXI.xls")})
    with pytest.raises(ConfigError, match=r"IXI\.xls does not exist; give IXI\.xls, 'official', or omit the option"):
        refresh(config)


@pytest.mark.parametrize("url", ["http://[::1", "http://host:x/y", "http://host:99999", "http://ho\x00st"])
def test_an_invalid_source_url_is_a_one_line_error(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*--source") as caught:
        refresh(config_for(tmp_path, url))
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def surveyed(archives: Path) -> pd.DataFrame:
    return survey({m: str(archives / f"IXI-{m}.tar") for m in ("T1", "T2")})


@pytest.mark.parametrize(("ids", "matched"), [("2 ixi003 2.5", 2), ("IXI002 IXI003-HH-1 900", 2), ("002 x", 1)])
def test_the_count_of_matching_demographics_is_one_warning(
    ids: str, matched: int, surveyed: pd.DataFrame, archives: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    demographics = tmp_path / "demographics.csv"
    demographics.write_text("IXI_ID,SEX_ID,AGE\n" + "".join(f"{n},1,30\n" for n in ids.split()))
    with caplog.at_level(logging.WARNING):
        inputs = Inputs({}, DemographicsFile(demographics, demographics.read_bytes()))
        selected = select_subjects(RefreshJob(config_for(tmp_path, archives), inputs, "", {}), surveyed)
    assert selected["age"].notna().sum() == matched
    (message,) = caplog.messages
    assert f"{demographics}: {matched} of {len(ids.split())} rows match {matched} of the " in message
    assert ids.split()[-1] in message or matched == 2


@pytest.mark.parametrize("ids", ["900", "x y", ""])
def test_demographics_that_match_nothing_are_an_error(
    ids: str, surveyed: pd.DataFrame, archives: Path, tmp_path: Path
) -> None:
    demographics = tmp_path / "demographics.csv"
    demographics.write_text("IXI_ID,SEX_ID,AGE\n" + "".join(f"{n},1,30\n" for n in ids.split()))
    inputs = Inputs({}, DemographicsFile(demographics, demographics.read_bytes()))
    with pytest.raises(DatasetError, match=r"demographics\.csv: 0 of \d rows match 0 of the \d+ persons"):
        select_subjects(RefreshJob(config_for(tmp_path, archives), inputs, "", {}), surveyed)


def test_missing_disk_space_is_reported_before_the_cut(
    archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ixi_etl.recipes import ixi as module

    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
    with pytest.raises(DatasetError, match=r"has 0\.00 GB free, but the slabs need"):
        refresh(config_for(tmp_path, archives))


def test_a_pointer_to_a_missing_version_is_a_one_line_error(
    refreshed: PublishedVersion, archives: Path, tmp_path: Path
) -> None:
    shutil.rmtree(refreshed.folder)
    with pytest.raises(DatasetError, match=f"names version {refreshed.version}, which does not exist"):
        versions.resolve_version(DataRoot(tmp_path))
    assert refresh(config_for(tmp_path, archives)).is_new
