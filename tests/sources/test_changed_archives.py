"""A version is made from exactly the bytes that determine its name, even if an archive changes while it is read."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import config_for

from ixi_etl.config import DatasetConfig
from ixi_etl.core.files import write_atomic
from ixi_etl.core.storage import fingerprint
from ixi_etl.dataset import metadata
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.errors import ArchiveError, DatasetError
from ixi_etl.pairing import cut as cutting
from ixi_etl.pairing.cut import CutJob, MemberRef, cut_subject, cut_unverified, record_path, shard_path
from ixi_etl.recipes import digits as mnist
from ixi_etl.recipes import ixi as jobs
from ixi_etl.recipes import ixi_cluster, ixi_inputs
from ixi_etl.recipes.ixi import refresh
from ixi_etl.sources.cache import VerifiedFile
from ixi_etl.testing.phantom import grid_affine, pack_nifti

SUBJECT = "IXI002-Guys-0828"
CONFIG = DatasetConfig(slices=6, registration="none", pictures=False)


def member(seed: int) -> bytes:
    """A volume whose file has the same size for any voxels."""
    values = np.random.default_rng(seed).integers(0, 3000, (14, 22, 26)).astype("<i2")
    packed = gzip.decompress(pack_nifti(values, grid_affine((26, 22, 14), (2.5, 2.5, 4), "LAS")))
    return gzip.compress(packed, compresslevel=0, mtime=0)


T1, T2, OTHER_T2 = member(0), member(1), member(2)
assert len(T2) == len(OTHER_T2)


@pytest.fixture
def job(tmp_path: Path) -> CutJob:
    """A subject of two archives (without tar headers), in a folder behind the symbolic link `archives`."""
    (tmp_path / "work").mkdir()
    (tmp_path / "one").mkdir()
    (tmp_path / "archives").symlink_to("one")
    members = {}
    for name, data in (("T1", T1), ("T2", T2)):
        path = tmp_path / "archives" / name
        path.write_bytes(data)
        members[name] = MemberRef(str(path), 0, len(data), fingerprint(str(path)))
    return CutJob(SUBJECT, members, True, "version")


def rename_over(path: Path) -> None:
    (path.parent / "new").write_bytes(OTHER_T2)
    (path.parent / "new").replace(path)


def rewrite_with_same_mtime(path: Path) -> None:
    before = path.stat()
    path.write_bytes(OTHER_T2)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def truncate(path: Path) -> None:
    os.truncate(path, 1000)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def remove(path: Path) -> None:
    path.unlink()


def redirect_link(path: Path) -> None:
    shutil.copytree(path.parent, path.parent.parent / "two")
    (path.parent.parent / "two" / path.name).write_bytes(OTHER_T2)
    path.parent.unlink()
    path.parent.symlink_to("two")


CHANGES = [rename_over, rewrite_with_same_mtime, truncate, append, remove, redirect_link]


def wait_for_clock(path: Path) -> None:
    """Wait until the kernel's clock for file times passes the ctime of `path`."""
    probe = path.parent / "probe"
    while probe.touch() or probe.stat().st_ctime_ns <= path.stat().st_ctime_ns:
        pass


@pytest.mark.parametrize("when", ["before", "within"])
@pytest.mark.parametrize("change", CHANGES)
def test_archive_changed_after_it_was_hashed_is_not_cut(
    change: Callable[[Path], None], when: str, job: CutJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(job.members["T2"].archive)
    wait_for_clock(path)
    if when == "before":
        change(path)
    else:
        original = cutting.read_member

        def change_and_call(location: str, offset: int, size: int) -> bytes:
            if location == str(path):
                change(path)
            return original(location, offset, size)

        monkeypatch.setattr(cutting, "read_member", change_and_call)
    with pytest.raises(DatasetError, match=r"archives/T[12] changed while it was read; run again when it is whole"):
        cut_subject(job, CONFIG, tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())


def test_record_is_reused_only_for_the_same_bytes(job: CutJob, tmp_path: Path) -> None:
    work, path = tmp_path / "work", Path(job.members["T2"].archive)
    first = cut_subject(job, CONFIG, work)
    shard = shard_path(work, SUBJECT, "T2")
    written = shard.stat().st_mtime_ns

    def with_new_fingerprint(data: bytes) -> CutJob:
        path.write_bytes(data)
        return replace(
            job, members=job.members | {"T2": replace(job.members["T2"], fingerprint=fingerprint(str(path)))}
        )

    restored = cut_subject(with_new_fingerprint(T2), CONFIG, work)
    assert (restored["files"], shard.stat().st_mtime_ns) == (first["files"], written), "the same bytes were cut again"
    other = cut_subject(with_new_fingerprint(OTHER_T2), CONFIG, work)
    assert other["t2_sha256"] == hashlib.sha256(OTHER_T2).hexdigest()
    assert other["files"][shard.name] != first["files"][shard.name]
    assert other["files"][shard.name] == hashlib.sha256(shard.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("arrived", "is_reused"),
    [
        ({"T1": T1, "T2": T2}, True),
        ({"T1": T1, "T2": OTHER_T2}, False),
        ({"T1": T1, "T2": T2, "PD": T2}, False),
    ],
    ids=["the same bytes", "other bytes", "a member more"],
)
def test_record_made_from_unverified_bytes_is_reused_only_for_the_same_members(
    arrived: dict[str, bytes], is_reused: bool, job: CutJob, tmp_path: Path
) -> None:
    (work := tmp_path / "early").mkdir()
    early = replace(job, members={m: MemberRef("unread", 0, len(data)) for m, data in arrived.items()})
    cut_unverified(early, lambda modality, _: arrived[modality], CONFIG, work)
    written = record_path(work, SUBJECT).stat().st_ino
    cut_unverified(early, lambda *_: b"never read", CONFIG, work)
    assert record_path(work, SUBJECT).stat().st_ino == written, "a finished subject was cut again"
    before = {path.name: path.stat().st_ino for path in work.glob("*.shard")}
    record, without = (cut_subject(job, CONFIG, folder) for folder in (work, tmp_path / "work"))
    assert record["record_sha256"] == without["record_sha256"]
    after = {path.name: path.stat().st_ino for path in work.glob("*.shard")}
    assert (before == after) == is_reused


@pytest.mark.parametrize("change", [{"version": "another"}, {"subject_id": "IXI003-Guys-0001"}])
def test_record_of_another_staging_folder_is_not_reused(change: dict[str, str], job: CutJob, tmp_path: Path) -> None:
    """Such as that of a version with another configuration of the same archives."""
    work, copied = tmp_path / "work", tmp_path / "copied"
    cut_subject(job, CONFIG, work)
    shutil.copytree(work, copied)
    another = replace(job, **change)
    if "subject_id" in change:
        record_path(copied, SUBJECT).rename(record_path(copied, another.subject_id))
    config = DatasetConfig(slices=4, registration="none", pictures=False)
    record = cut_subject(another, config, copied)
    assert record["slab_shape"][0] == 4
    assert record["made_for"][:2] == [another.version, another.subject_id]


def test_bytes_read_by_dask_workers_are_compared_with_local_ones(job: CutJob, tmp_path: Path) -> None:
    """Workers may see a file through another mount, with another inode and other times."""
    work, path = tmp_path / "work", Path(job.members["T2"].archive)
    remote = ixi_cluster.without_fingerprints(job)
    rewrite_with_same_mtime(path)
    other = cut_subject(remote, CONFIG, work)
    path.write_bytes(T2)
    local = replace(job, members=job.members | {"T2": replace(job.members["T2"], fingerprint=fingerprint(str(path)))})
    with pytest.raises(DatasetError, match=r"workers read other bytes in \S+/T2 than this machine"):
        ixi_cluster.check_members([local], [other], work)
    assert not record_path(work, SUBJECT).exists()
    good = cut_subject(remote, CONFIG, work)
    assert good["fingerprints"] != other["fingerprints"]
    elsewhere = good | {"fingerprints": {"T1": "another mount's", "T2": "another mount's"}}
    ixi_cluster.check_members([local], [elsewhere], work)


def damage_archive(archives: Path, source: Path, name: str) -> None:
    """Replace an archive by one of the same size with other, damaged volumes."""
    data = bytearray((archives / name).read_bytes())
    data[2000::512] = bytes(b ^ 255 for b in data[2000::512])
    write_atomic(source / name, bytes(data))


def test_archive_replaced_during_the_cut_and_restored_after_a_kill_has_no_effect(
    archives: Path, published: PublishedVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, source = "IXI-T2.tar", Path(shutil.copytree(archives, tmp_path / "source"))
    config = config_for(tmp_path / "root", source).model_copy(update={"workers": 1})
    original, calls = cutting.read_member, 0

    def change_and_call(location: str, offset: int, size: int) -> bytes:
        nonlocal calls
        calls += 1
        if calls == 6:
            damage_archive(archives, source, name)
        if calls == 14:
            raise KeyboardInterrupt
        return original(location, offset, size)

    with monkeypatch.context() as patch:
        patch.setattr(cutting, "read_member", change_and_call)
        with pytest.raises((DatasetError, KeyboardInterrupt)):
            refresh(config)
    shutil.copy2(archives / name, source / name)
    again = refresh(config)
    assert again.version == published.version
    assert metadata.read_metadata(again.folder) == metadata.read_metadata(published.folder)  # with every file's SHA-256


@pytest.mark.parametrize("when", ["before", "within", "after"])
def test_archive_replaced_around_the_survey_ends_the_refresh(
    when: str, archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(archives, tmp_path / "source"))
    stage = {"before": "survey_archives", "within": "survey", "after": "select_subjects"}[when]
    original = getattr(jobs, stage)

    def change_and_call(*arguments: Any, **more: Any) -> Any:
        damage_archive(archives, source, "IXI-T2.tar")
        return original(*arguments, **more)

    monkeypatch.setattr(jobs, stage, change_and_call)
    with pytest.raises(DatasetError, match=r"IXI-T2\.tar changed while it was read"):
        refresh(config_for(tmp_path / "root", source))


def test_demographics_are_read_once_and_are_part_of_the_manifest_and_version(
    published: PublishedVersion, archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    people, text = tmp_path / "people.csv", "IXI_ID,SEX_ID,AGE\n2,2,30.5\n3,1,44\n3,1,44\n"
    people.write_text(text)
    config = config_for(tmp_path / "root", archives).model_copy(update={"demographics": str(people)})
    original = ixi_inputs.name_version

    def change_and_call(*arguments: Any) -> Any:
        people.write_text("IXI_ID,SEX_ID,AGE\n2,1,99\n")
        try:
            return original(*arguments)
        finally:
            people.unlink()

    monkeypatch.setattr(ixi_inputs, "name_version", change_and_call)
    made = refresh(config)
    assert made.version != published.version
    record, table = metadata.read_metadata(made.folder), metadata.read_manifest(made.folder)
    assert record["inputs"]["demographics_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert table["subject_id"].tolist() == metadata.read_manifest(published.folder)["subject_id"].tolist()
    known = table[table["age"].notna()]
    assert list(zip(known["subject_id"].str[:6], known["age"], known["sex"], strict=True)) == [
        ("IXI002", 30.5, "f"),
        ("IXI003", 44.0, "m"),
    ]


def test_mnist_file_changed_after_it_was_hashed_is_refused(tmp_path: Path) -> None:
    files = {}
    for name in mnist.FILE_PAIRS["test"]:
        path = tmp_path / name
        path.write_bytes(gzip.compress(b"other digits"))
        files[name] = VerifiedFile(name, str(path), 1, hashlib.md5(b"what was hashed").hexdigest(), True, "", None, "")
    with pytest.raises(ArchiveError, match=r"t10k-images-idx3-ubyte\.gz changed while it was read"):
        mnist.read_file_pair(files, "test")
