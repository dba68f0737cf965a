"""Each hostile or broken volume is a row with its reason, within limits of time and memory; nothing leaves the root."""

from __future__ import annotations

import io
import random
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import stages
import volumes
from faults_table import Row
from processes import Job

from ixi_etl.config import DatasetConfig, RefreshConfig
from ixi_etl.dataset import metadata
from ixi_etl.dataset.schema import REASONS
from ixi_etl.errors import ArchiveError
from ixi_etl.scans.tar import index_archive

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("fork_server")]

BATCH_SIZE = 500
MAX_VOLUME_S, MAX_PEAK_BYTES = 5.0, 1 << 30

Members = dict[str, list[tuple[tarfile.TarInfo, bytes]]]


def tar_info(name: str, size: int = 0, **fields: Any) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.size = size
    for key, value in fields.items():
        setattr(header, key, value)
    return header


def members_of(subjects: dict[int, tuple[str, bytes]]) -> Members:
    """Three valid pairs, and one for each given (modality, member), whose other member is valid."""
    valid = dict.fromkeys((1, 2, 3), ("T1", volumes.VALID["T1"]))
    members: Members = {"T1": [], "T2": []}
    for number, (modality, data) in {**valid, **subjects}.items():
        for m, name, member in volumes.pair_members(number, modality, data):
            members[m].append((tar_info(name, len(member)), member))
    return members


def write_archives(folder: Path, members: Members, tar_format: int = tarfile.PAX_FORMAT) -> Path:
    folder.mkdir()
    for modality, entries in members.items():
        with tarfile.open(folder / f"IXI-{modality}.tar", "w", format=tar_format) as tar:
            for header, data in entries:
                tar.addfile(header, io.BytesIO(data))
    return folder


def list_files(folder: Path, exclude: Path) -> dict[str, tuple[int, int]]:
    """Path -> modification time in ns and size of each file and link in a folder, without the folder `exclude`."""
    paths = [p for p in folder.rglob("*") if p != exclude and exclude not in p.parents]
    return {str(p): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in paths if p.is_file() or p.is_symlink()}


def measured_refresh(tmp_path: Path, source: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Run a refresh in a child process; return the manifest and the measurements of `do_measured_refresh`.

    Asserts that the refresh wrote only to its root, and kept the limits of time and memory.
    """
    dataset = DatasetConfig(slices=12, registration="none", pictures=False)
    config = RefreshConfig(
        root=str(tmp_path / "root"), source=str(source), dataset=dataset, max_unreadable=1, workers=1
    )
    before = list_files(tmp_path, tmp_path / "root")
    measured = Job(stages.do_measured_refresh, config.model_dump_json()).result()
    assert list_files(tmp_path, tmp_path / "root") == before, "the refresh wrote outside the root"
    assert max(measured["slowest"].values()) < MAX_VOLUME_S, measured["slowest"]
    assert measured["peak"] < MAX_PEAK_BYTES, measured["peak"]
    assert {p.name for p in (tmp_path / "root").iterdir()} <= {"archives", "datasets", ".lock"}
    return metadata.read_manifest(config.data_root.version(measured["version"])), measured


def describe(slowest_s: float, peak_bytes: int) -> str:
    return f"slowest {slowest_s:.1f} s, memory {peak_bytes / 2**20:.0f} MiB"


def reasons_of(table: pd.DataFrame) -> dict[str, str]:
    """Subject -> reason; a subject that is used has neither reason nor detail."""
    assert set(table["reason"]) <= {"", *REASONS}
    assert ((table["reason"] == "") == (table["detail"] == "")).all()
    return dict(zip(table["subject_id"], table["reason"], strict=True))


def test_named_hostile_volumes_have_the_expected_reasons(tmp_path: Path, row: Row) -> None:
    subjects = {100 + n: member[:2] for n, member in enumerate(volumes.named_members().values())}
    table, measured = measured_refresh(tmp_path, write_archives(tmp_path / "source", members_of(subjects)))
    found = reasons_of(table)
    wanted = {defect: reason for defect, (_, _, reason) in volumes.named_members().items()}
    assert {defect: found[f"IXI{100 + n}-Guys-{100 + n}"] for n, defect in enumerate(wanted)} == wanted
    row(
        "hostile volumes, by name",
        len(wanted),
        f"each a row with its reason; {describe(max(measured['slowest'].values()), measured['peak'])}",
        "none",
    )


def test_hostile_archive_entries_have_the_expected_reasons(tmp_path: Path, row: Row) -> None:
    members = members_of({})
    t1 = volumes.VALID["T1"]
    long = f"{'folder/' * 30}IXI210-Guys-0210-T1.nii.gz"  # more than the 100 bytes of the name field
    kinds: dict[str, tuple[list[tarfile.TarInfo], str]] = {
        "IXI200-Guys-0200": ([tar_info("../../IXI200-Guys-0200-T1.nii.gz")], ""),
        "IXI201-Guys-0201": ([tar_info("/IXI201-Guys-0201-T1.nii.gz")], ""),
        "IXI202-Guys-0202": (
            [tar_info("IXI202-Guys-0202-T1.nii.gz", type=tarfile.SYMTYPE, linkname="/etc/passwd")],
            "",
        ),
        "IXI203-Guys-0203": ([tar_info("IXI203-Guys-0203-T1.nii.gz", type=tarfile.LNKTYPE, linkname="../x")], ""),
        "IXI204-Guys-0204": ([tar_info("IXI204-Guys-0204-T1.nii.gz", type=tarfile.CHRTYPE, devmajor=1)], ""),
        "IXI205-Guys-0205": ([tar_info("IXI205-Guys-0205-T1.nii.gz", type=tarfile.BLKTYPE)], ""),
        "IXI206-Guys-0206": ([tar_info("IXI206-Guys-0206-T1.nii.gz", type=tarfile.FIFOTYPE)], ""),
        "IXI207-Guys-0207": ([tar_info("IXI207-Guys-0207-T1.nii.gz", type=tarfile.GNUTYPE_SPARSE)], ""),
        "IXI208-Guys-0208": ([tar_info("IXI208-Guys-0208-T1.nii.gz")] * 2, "duplicate_member"),
        "IXI209-Guys-0209": ([tar_info("IXI209-Guys-0209-T1.nii.gz")], ""),
        "IXI209-Guys-0209b": ([tar_info("IXI209-Guys-0209b-T1.nii.gz")], ""),  # the same person again
        "IXI210-Guys-0210": ([tar_info(long)], ""),
    }
    for subject, (headers, _) in kinds.items():
        for header in headers:
            is_file = header.isreg()
            header.size = len(t1) if is_file else 0
            members["T1"].append((header, t1 if is_file else b""))
        members["T2"].append((tar_info(f"{subject}-T2.nii.gz", len(volumes.VALID["T2"])), volumes.VALID["T2"]))
    not_files = {f"IXI{n}-Guys-0{n}" for n in (202, 203, 204, 205, 206, 207)}
    for number, tar_format in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        (tmp_path / f"{number}").mkdir()
        table, measured = measured_refresh(
            tmp_path / f"{number}", write_archives(tmp_path / f"{number}" / "source", members, tar_format)
        )
        found = reasons_of(table)
        wanted = {s: "unreadable" if s in not_files else reason for s, (_, reason) in kinds.items()}
        assert {s: found.get(s) for s in kinds} == wanted
        assert len(found) == len(kinds) + 3
        scans = table[table["subject_id"].str.startswith("IXI209")]
        assert len(set(scans["split"])) == 1, "one person in two splits"
    row(
        "hostile archives, by name",
        2 * len(kinds),
        f"each a row with its reason; {describe(max(measured['slowest'].values()), measured['peak'])}",
        "none",
    )


def test_mutated_volumes_are_used_or_have_a_reason(tmp_path: Path, row: Row) -> None:
    """One refresh for each batch."""
    batches, count = 10, BATCH_SIZE
    outcomes, slowest, peak = Counter[str](), 0.0, 0
    for batch in range(batches):
        subjects = {1000 + n: volumes.mutated_member(batch * BATCH_SIZE + n) for n in range(count)}
        folder = tmp_path / f"{batch}"
        folder.mkdir()
        table, measured = measured_refresh(folder, write_archives(folder / "source", members_of(subjects)))
        found = reasons_of(table)
        assert found.keys() == {f"IXI{n}-Guys-{n}" for n in [*subjects, 1, 2, 3]}, "a subject has no row"
        outcomes.update(reason or "used" for reason in found.values())
        slowest, peak = max(slowest, *measured["slowest"].values()), max(peak, measured["peak"])
        shutil.rmtree(folder)
    text = ", ".join(f"{n} {reason}" for reason, n in outcomes.most_common())
    row("hostile volumes, mutated", batches * count, f"{text}; {describe(slowest, peak)}", "none")


def test_mutated_tar_headers_are_read_or_refused_in_one_line(tmp_path: Path, row: Row) -> None:
    """Four fifths have a correct checksum after the change."""
    rng, count, refused = random.Random(7), 5000, 0
    bases = []
    for tar_format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
            for name in ("a" * 150, "b", "ü" * 90):
                tar.addfile(tar_info(name, 700), io.BytesIO(b"x" * 700))
        bases.append(buffer.getvalue())
    path = tmp_path / "a.tar"
    for _ in range(count):
        data = bytearray(rng.choice(bases))
        at = rng.randrange(10) * 512
        for _ in range(rng.choice([1, 1, 2, 4])):
            data[at + rng.randrange(512)] = rng.choice([0, 48, 55, 76, 83, 103, 120, 128, 255, rng.randrange(256)])
        if rng.random() < 0.8:
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
        path.write_bytes(data)
        try:
            index_archive(str(path))
        except ArchiveError as error:
            refused += 1
            assert "\n" not in str(error)
    row("hostile archives, mutated headers", count, f"{refused} refused in one line, the others read", "none")
