"""A version holds the bytes that it is named after, whatever happens to an archive while it is read."""

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

from ixi_etl import cut as cutting
from ixi_etl import dataset
from ixi_etl import digits as mnist
from ixi_etl import refresh as jobs
from ixi_etl.config import DatasetConfig
from ixi_etl.cut import Job, Part, cut_subject, record_path, shard_path
from ixi_etl.download import Acquired
from ixi_etl.errors import ArchiveError, DatasetError
from ixi_etl.files import write_atomic
from ixi_etl.phantom import grid_affine, pack
from ixi_etl.places import fingerprint
from ixi_etl.publish import Refreshed
from ixi_etl.refresh import refresh

SUBJECT = "IXI002-Guys-0828"
CONFIG = DatasetConfig(slices=6, registration="none", pictures=False)


def member(seed: int) -> bytes:
    """A volume whose file has the same length whatever its voxels."""
    values = np.random.default_rng(seed).integers(0, 3000, (14, 22, 26)).astype("<i2")
    packed = gzip.decompress(pack(values, grid_affine((26, 22, 14), (2.5, 2.5, 4), "LAS")))
    return gzip.compress(packed, compresslevel=0, mtime=0)


T1, T2, OTHER_T2 = member(0), member(1), member(2)
assert len(T2) == len(OTHER_T2)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A subject of two archives (without tar headers), in a folder that `archives` leads to."""
    (tmp_path / "work").mkdir()
    (tmp_path / "one").mkdir()
    (tmp_path / "archives").symlink_to("one")
    parts = {}
    for name, data in (("T1", T1), ("T2", T2)):
        path = tmp_path / "archives" / name
        path.write_bytes(data)
        parts[name] = Part(str(path), 0, len(data), fingerprint(str(path)))
    return Job(SUBJECT, parts, True, "version")


def rename_over(path: Path) -> None:
    (path.parent / "new").write_bytes(OTHER_T2)
    (path.parent / "new").replace(path)


def rewrite_with_its_time(path: Path) -> None:
    before = path.stat()
    path.write_bytes(OTHER_T2)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def cut_short(path: Path) -> None:
    os.truncate(path, 1000)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def remove(path: Path) -> None:
    path.unlink()


def lead_elsewhere(path: Path) -> None:
    shutil.copytree(path.parent, path.parent.parent / "two")
    (path.parent.parent / "two" / path.name).write_bytes(OTHER_T2)
    path.parent.unlink()
    path.parent.symlink_to("two")


CHANGES = [rename_over, rewrite_with_its_time, cut_short, append, remove, lead_elsewhere]


def settled_clock(path: Path) -> None:
    """Let the clock by which the kernel stamps files pass the time that `path` has."""
    probe = path.parent / "probe"
    while probe.touch() or probe.stat().st_ctime_ns <= path.stat().st_ctime_ns:
        pass


@pytest.mark.parametrize("when", ["before", "within"])
@pytest.mark.parametrize("change", CHANGES)
def test_an_archive_that_changed_since_it_was_hashed_is_not_cut(
    change: Callable[[Path], None], when: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(job.parts["T2"].archive)
    settled_clock(path)
    if when == "before":
        change(path)
    else:
        honest = cutting.read_member

        def meanwhile(location: str, offset: int, size: int) -> bytes:
            if location == str(path):
                change(path)
            return honest(location, offset, size)

        monkeypatch.setattr(cutting, "read_member", meanwhile)
    with pytest.raises(DatasetError, match=r"archives/T[12] changed while it was read; run again when it is whole"):
        cut_subject(job, CONFIG, tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())


def test_a_record_counts_for_the_same_bytes_alone(job: Job, tmp_path: Path) -> None:
    work, path = tmp_path / "work", Path(job.parts["T2"].archive)
    first = cut_subject(job, CONFIG, work)
    shard = shard_path(work, SUBJECT, "T2")
    written = shard.stat().st_mtime_ns

    def stamped(data: bytes) -> Job:
        path.write_bytes(data)
        return replace(job, parts=job.parts | {"T2": replace(job.parts["T2"], stamp=fingerprint(str(path)))})

    restored = cut_subject(stamped(T2), CONFIG, work)
    assert (restored["files"], shard.stat().st_mtime_ns) == (first["files"], written), "the same bytes were cut again"
    other = cut_subject(stamped(OTHER_T2), CONFIG, work)
    assert other["t2_sha256"] == hashlib.sha256(OTHER_T2).hexdigest()
    assert other["files"][shard.name] != first["files"][shard.name]
    assert other["files"][shard.name] == hashlib.sha256(shard.read_bytes()).hexdigest()


@pytest.mark.parametrize("change", [{"version": "another"}, {"subject_id": "IXI003-Guys-0001"}])
def test_a_record_of_another_staging_folder_does_not_count(change: dict[str, str], job: Job, tmp_path: Path) -> None:
    """Such as that of a version with another configuration, of the same archives."""
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


def test_what_dask_s_workers_read_is_held_against_what_is_here(job: Job, tmp_path: Path) -> None:
    """They may see a file through another mount, where neither inode nor times are the same."""
    work, path = tmp_path / "work", Path(job.parts["T2"].archive)
    there = jobs._read_elsewhere(job)
    rewrite_with_its_time(path)
    other = cut_subject(there, CONFIG, work)
    path.write_bytes(T2)
    here = replace(job, parts=job.parts | {"T2": replace(job.parts["T2"], stamp=fingerprint(str(path)))})
    with pytest.raises(DatasetError, match=r"workers read other bytes in \S+/T2 than there are here"):
        jobs._check_members([here], [other], work)
    assert not record_path(work, SUBJECT).exists()
    good = cut_subject(there, CONFIG, work)
    assert good["stamps"] != other["stamps"]
    jobs._check_members([here], [good | {"stamps": {"T1": "another mount's", "T2": "another mount's"}}], work)


def replaced(archives: Path, source: Path, name: str) -> None:
    """Replace an archive by one of the same size whose volumes are damaged, as if of other people."""
    data = bytearray((archives / name).read_bytes())
    data[2000::512] = bytes(b ^ 255 for b in data[2000::512])
    write_atomic(source / name, bytes(data))


def test_an_archive_replaced_in_the_cut_and_restored_after_a_kill_leaves_no_trace(
    archives: Path, published: Refreshed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, source = "IXI-T2.tar", Path(shutil.copytree(archives, tmp_path / "source"))
    config = config_for(tmp_path / "root", source).model_copy(update={"workers": 1})
    honest, calls = cutting.read_member, 0

    def meanwhile(location: str, offset: int, size: int) -> bytes:
        nonlocal calls
        calls += 1
        if calls == 6:
            replaced(archives, source, name)
        if calls == 14:
            raise KeyboardInterrupt
        return honest(location, offset, size)

    with monkeypatch.context() as patch:
        patch.setattr(cutting, "read_member", meanwhile)
        with pytest.raises((DatasetError, KeyboardInterrupt)):
            refresh(config)
    shutil.copy2(archives / name, source / name)
    again = refresh(config)
    assert again.version == published.version
    assert dataset.read_facts(again.folder) == dataset.read_facts(published.folder)  # with every file's SHA-256


@pytest.mark.parametrize("when", ["before", "within", "after"])
def test_an_archive_replaced_around_the_survey_ends_the_refresh(
    when: str, archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(archives, tmp_path / "source"))
    stage = {"before": "survey_archives", "within": "survey", "after": "select_subjects"}[when]
    honest = getattr(jobs, stage)

    def meanwhile(*arguments: Any, **more: Any) -> Any:
        replaced(archives, source, "IXI-T2.tar")
        return honest(*arguments, **more)

    monkeypatch.setattr(jobs, stage, meanwhile)
    with pytest.raises(DatasetError, match=r"IXI-T2\.tar changed while it was read"):
        refresh(config_for(tmp_path / "root", source))


def test_demographics_reach_the_manifest_and_the_version_and_are_read_once(
    published: Refreshed, archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    people, text = tmp_path / "people.csv", "IXI_ID,SEX_ID,AGE\n2,2,30.5\n3,1,44\n3,1,44\n"
    people.write_text(text)
    config = config_for(tmp_path / "root", archives).model_copy(update={"demographics": str(people)})
    honest = jobs.name_version

    def meanwhile(*arguments: Any) -> Any:
        people.write_text("IXI_ID,SEX_ID,AGE\n2,1,99\n")
        try:
            return honest(*arguments)
        finally:
            people.unlink()

    monkeypatch.setattr(jobs, "name_version", meanwhile)
    made = refresh(config)
    assert made.version != published.version
    facts, table = dataset.read_facts(made.folder), dataset.read_manifest(made.folder)
    assert facts["inputs"]["demographics_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert table["subject_id"].tolist() == dataset.read_manifest(published.folder)["subject_id"].tolist()
    known = table[table["age"].notna()]
    assert list(zip(known["subject_id"].str[:6], known["age"], known["sex"], strict=True)) == [
        ("IXI002", 30.5, "f"),
        ("IXI003", 44.0, "m"),
    ]


def test_a_file_of_mnist_that_changed_after_it_was_hashed_is_refused(tmp_path: Path) -> None:
    files = {}
    for name in mnist.PARTS["test"]:
        path = tmp_path / name
        path.write_bytes(gzip.compress(b"other digits"))
        files[name] = Acquired(name, str(path), 1, hashlib.md5(b"what was hashed").hexdigest(), True, "", None, "")
    with pytest.raises(ArchiveError, match=r"t10k-images-idx3-ubyte\.gz changed while it was read"):
        mnist.read_half(files, "test")
