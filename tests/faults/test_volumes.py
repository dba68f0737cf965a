"""Hostile and broken volumes and archives: each ends as a row with its reason, in time, in memory, and in the root."""

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

A_BATCH = 500
WITHIN_S, WITHIN_BYTES = 5.0, 1 << 30

Members = dict[str, list[tuple[tarfile.TarInfo, bytes]]]


def info(name: str, size: int = 0, **more: Any) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.size = size
    for key, value in more.items():
        setattr(found, key, value)
    return found


def members_of(subjects: dict[int, tuple[str, bytes]]) -> Members:
    """Good pairs, and those whose one member is the given one."""
    good = dict.fromkeys((1, 2, 3), ("T1", volumes.GOOD["T1"]))
    members: Members = {"T1": [], "T2": []}
    for number, (modality, data) in {**good, **subjects}.items():
        for m, name, member in volumes.pairs(number, modality, data):
            members[m].append((info(name, len(member)), member))
    return members


def write(folder: Path, members: Members, form: int = tarfile.PAX_FORMAT) -> Path:
    folder.mkdir()
    for modality, of in members.items():
        with tarfile.open(folder / f"IXI-{modality}.tar", "w", format=form) as tar:
            for header, data in of:
                tar.addfile(header, io.BytesIO(data))
    return folder


def everything(folder: Path, but: Path) -> dict[str, tuple[int, int]]:
    """All that lies in a folder, but for one in it: when it was written, and its size."""
    paths = [p for p in folder.rglob("*") if p != but and but not in p.parents]
    return {str(p): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in paths if p.is_file() or p.is_symlink()}


def refreshed(tmp_path: Path, source: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The manifest of a refresh in a process of its own; what it took. It stayed in its root, and in its limits."""
    chosen = DatasetConfig(slices=12, registration="none", pictures=False)
    config = RefreshConfig(root=str(tmp_path / "root"), source=str(source), dataset=chosen, max_unreadable=1, workers=1)
    before = everything(tmp_path, tmp_path / "root")
    took = Job(stages.do_volumes, config.model_dump_json()).end()
    assert everything(tmp_path, tmp_path / "root") == before, "something was written outside the root"
    assert max(took["slowest"].values()) < WITHIN_S, took["slowest"]
    assert took["peak"] < WITHIN_BYTES, took["peak"]
    assert {p.name for p in (tmp_path / "root").iterdir()} <= {"archives", "datasets", ".lock"}
    places = config.data_root
    return metadata.read_manifest(places.version(took["version"])), took


def say(took: dict[str, Any]) -> str:
    return f"slowest {max(took['slowest'].values()):.1f} s, memory {took['peak'] / 2**20:.0f} MiB"


def reasons_of(table: pd.DataFrame) -> dict[str, str]:
    assert set(table["reason"]) <= {"", *REASONS}
    assert ((table["reason"] == "") == (table["detail"] == "")).all()
    return dict(zip(table["subject_id"], table["reason"], strict=True))


def test_volumes_named(tmp_path: Path, row: Row) -> None:
    subjects = {100 + n: member[:2] for n, member in enumerate(volumes.named().values())}
    table, took = refreshed(tmp_path, write(tmp_path / "source", members_of(subjects)))
    found = reasons_of(table)
    wanted = {what: reason for what, (_, _, reason) in volumes.named().items()}
    assert {w: found[f"IXI{100 + n}-Guys-{100 + n}"] for n, w in enumerate(wanted)} == wanted
    row("hostile volumes, by name", len(wanted), f"each a row with its reason; {say(took)}", "none")


def test_archives_hostile(tmp_path: Path, row: Row) -> None:
    members = members_of({})
    t1 = volumes.GOOD["T1"]
    long = f"{'folder/' * 30}IXI210-Guys-0210-T1.nii.gz"  # more than the 100 bytes of a header
    kinds: dict[str, tuple[list[tarfile.TarInfo], str]] = {
        "IXI200-Guys-0200": ([info("../../IXI200-Guys-0200-T1.nii.gz")], ""),
        "IXI201-Guys-0201": ([info("/IXI201-Guys-0201-T1.nii.gz")], ""),
        "IXI202-Guys-0202": ([info("IXI202-Guys-0202-T1.nii.gz", type=tarfile.SYMTYPE, linkname="/etc/passwd")], ""),
        "IXI203-Guys-0203": ([info("IXI203-Guys-0203-T1.nii.gz", type=tarfile.LNKTYPE, linkname="../x")], ""),
        "IXI204-Guys-0204": ([info("IXI204-Guys-0204-T1.nii.gz", type=tarfile.CHRTYPE, devmajor=1)], ""),
        "IXI205-Guys-0205": ([info("IXI205-Guys-0205-T1.nii.gz", type=tarfile.BLKTYPE)], ""),
        "IXI206-Guys-0206": ([info("IXI206-Guys-0206-T1.nii.gz", type=tarfile.FIFOTYPE)], ""),
        "IXI207-Guys-0207": ([info("IXI207-Guys-0207-T1.nii.gz", type=tarfile.GNUTYPE_SPARSE)], ""),
        "IXI208-Guys-0208": ([info("IXI208-Guys-0208-T1.nii.gz")] * 2, "duplicate_member"),
        "IXI209-Guys-0209": ([info("IXI209-Guys-0209-T1.nii.gz")], ""),
        "IXI209-Guys-0209b": ([info("IXI209-Guys-0209b-T1.nii.gz")], ""),  # the same person, once more
        "IXI210-Guys-0210": ([info(long)], ""),
    }
    for subject, (headers, _) in kinds.items():
        for header in headers:
            plain = header.isreg()
            header.size = len(t1) if plain else 0
            members["T1"].append((header, t1 if plain else b""))
        members["T2"].append((info(f"{subject}-T2.nii.gz", len(volumes.GOOD["T2"])), volumes.GOOD["T2"]))
    no_file = {f"IXI{n}-Guys-0{n}" for n in (202, 203, 204, 205, 206, 207)}
    for number, form in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        (tmp_path / f"{number}").mkdir()
        table, took = refreshed(tmp_path / f"{number}", write(tmp_path / f"{number}" / "source", members, form))
        found = reasons_of(table)
        wanted = {s: "unreadable" if s in no_file else reason for s, (_, reason) in kinds.items()}
        assert {s: found.get(s) for s in kinds} == wanted
        assert len(found) == len(kinds) + 3
        twice = table[table["subject_id"].str.startswith("IXI209")]
        assert len(set(twice["split"])) == 1, "one person in two splits"
    row("hostile archives, by name", 2 * len(kinds), f"each a row with its reason; {say(took)}", "none")


def test_volumes_mutated(tmp_path: Path, row: Row) -> None:
    """In batches of a refresh each."""
    batches, count = 10, A_BATCH
    kinds, slowest, peak = Counter[str](), 0.0, 0
    for batch in range(batches):
        subjects = {1000 + n: volumes.mutated(batch * A_BATCH + n) for n in range(count)}
        folder = tmp_path / f"{batch}"
        folder.mkdir()
        table, took = refreshed(folder, write(folder / "source", members_of(subjects)))
        found = reasons_of(table)
        assert found.keys() == {f"IXI{n}-Guys-{n}" for n in [*subjects, 1, 2, 3]}, "somebody has no row"
        kinds.update(reason or "used" for reason in found.values())
        slowest, peak = max(slowest, *took["slowest"].values()), max(peak, took["peak"])
        shutil.rmtree(folder)
    said = ", ".join(f"{n} {reason}" for reason, n in kinds.most_common())
    row("hostile volumes, mutated", batches * count, f"{said}; {say({'slowest': {'': slowest}, 'peak': peak})}", "none")


def test_archives_mutated(tmp_path: Path, row: Row) -> None:
    """Headers of tars with bytes changed, most of them with the right checksum again: read, or refused in a line."""
    rng, count, refused = random.Random(7), 5000, 0
    bases = []
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
            for name in ("a" * 150, "b", "ü" * 90):
                tar.addfile(info(name, 700), io.BytesIO(b"x" * 700))
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
