"""Objects of others in the staging on S3, where Dask workers put finished subjects."""

from __future__ import annotations

from pathlib import Path

from ixi_etl.config import DatasetConfig
from ixi_etl.core.storage import DataRoot, file_sizes, filesystem_of, to_path
from ixi_etl.dataset.publish import PublishedVersion, find_published
from ixi_etl.pairing.cut import CutJob, read_finished_record, record_path
from ixi_etl.pairing.remote_cut import MARK, WorkFolder, cut_on_worker, fetch_staged, mark_folder

OTHERS = ("IXI001.json", "IXI002.json", "notes.json", "notes.txt", MARK, "folder/IXI003.json", "../IXI004.json")
"""The first has the name of the record of a subject that a worker cuts."""


def put(folder: Path, *names: str) -> None:
    filesystem, top = filesystem_of(folder)
    for name in names:
        filesystem.pipe_file(f"{top}/{name}", b"of others")


def test_objects_of_others_in_the_staging_are_neither_read_nor_changed(s3_root: str, tmp_path: Path) -> None:
    staging = to_path(s3_root) / "staging" / "0123456789ab"
    put(staging, *OTHERS)
    (work := tmp_path / "refresh" / "work").mkdir(parents=True)
    folder = mark_folder(work, staging)
    mark = (work / MARK).read_text()
    fetch_staged(folder)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {MARK, *OTHERS[:3]}
    assert (work / MARK).read_text() == mark
    jobs = {name: CutJob(name, {}, False, "0123456789ab") for name in ("IXI001", "IXI002", "IXI003", "IXI004", "notes")}
    assert {name: read_finished_record(job, work) for name, job in jobs.items()} == dict.fromkeys(jobs)

    record_path(work, "IXI001").unlink()  # as the refresh does, before a worker cuts the subject
    seen_there = WorkFolder(tmp_path / "of the worker", mark, str(staging))  # it has no such folder
    record = cut_on_worker(jobs["IXI001"], DatasetConfig(), seen_there)
    fetch_staged(folder)
    assert read_finished_record(jobs["IXI001"], work) == record
    filesystem, top = filesystem_of(staging)
    kept = {name: filesystem.cat_file(f"{top}/{name}") for name in OTHERS[1:]}
    assert kept == dict.fromkeys(OTHERS[1:], b"of others")


def test_the_next_version_removes_the_staging_and_nothing_beside_it(
    s3_root: str, published: PublishedVersion, tmp_path: Path
) -> None:
    data_root = DataRoot(s3_root, scratch=tmp_path)
    filesystem, top = filesystem_of(data_root.version(published.version))
    filesystem.put(str(published.folder), top, recursive=True)
    beside = {".staging-of-mine/IXI001.json", ".stagings", "notes.json"}
    put(data_root.datasets, *beside, f".staging/{published.version}/IXI001.json", ".staging/notes.txt")
    assert find_published(data_root, published.version, {})
    assert {name for name in file_sizes(data_root.datasets) if not name.startswith(published.version)} == {
        *beside,
        "latest.json",
    }
