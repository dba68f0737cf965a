"""Make the inputs of the benchmarks once and keep them: archives of the project's phantom on IXI's real grid.

Simulating a head takes seconds, so a few heads are repeated under other subject ids. Equal arguments give equal bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import tarfile
from pathlib import Path

from ixi_etl.modalities import DEFAULT_MODALITIES, archive_name
from ixi_etl.testing.phantom import DEPTH, PhantomSubject, simulate, write_phantom

HEADS = 4
SEED = 11
SHRINK_QUICK = 4
ODD_DEPTH = 146  # of the T1 of subjects that are excluded because their depth is not the modal one
VOXELS_AT = 352  # where the voxels begin in a NIfTI file without extensions
MEMBERS = {"T1": 581, "T2": 578}  # of IXI itself


def heads(folder: Path, shrink: int) -> Path:
    """A folder with the gzipped volumes of `HEADS` subjects and of one with `ODD_DEPTH`, created if missing."""
    target = folder / f"heads-{shrink}"
    if not (target / "done").exists():
        target.mkdir(parents=True, exist_ok=True)
        for number in range(HEADS + 1):
            depth, moved = ODD_DEPTH if number == HEADS else DEPTH["T1"], number % 2 == 1
            members, _ = simulate(PhantomSubject(number + 2, "Guys", SEED, depth, moved=moved, shrink=shrink))
            for modality, packed in members.items():
                (target / f"{number}-{modality}.nii.gz").write_bytes(packed)
        (target / "done").touch()
    return target


def archives(folder: Path, pairs: int, shrink: int = 1, odd: int = 0) -> Path:
    """A folder with IXI-T1.tar, IXI-T2.tar and MD5SUMS, of `pairs` subjects and `odd` subjects that are excluded."""
    target = folder / f"pairs-{pairs}-{odd}-{shrink}"
    if (target / "MD5SUMS").exists():
        return target
    source = heads(folder, shrink)
    target.mkdir(parents=True, exist_ok=True)
    sums = []
    for modality in DEFAULT_MODALITIES:
        packed = [(source / f"{n}-{modality}.nii.gz").read_bytes() for n in range(HEADS + 1)]
        with tarfile.open(target / archive_name(modality), "w", format=tarfile.GNU_FORMAT) as tar:
            for number in range(pairs + odd):
                data = packed[number % HEADS if number < pairs else HEADS]
                _add(tar, number, modality, data)
        with open(target / archive_name(modality), "rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        sums.append(f"{digest}  {archive_name(modality)}\n")
    (target / "MD5SUMS").write_text("".join(sums))
    return target


def small_archives(folder: Path, subjects: int, shrink: int = 8) -> Path:
    """Archives of many subjects with small volumes. No two scans are equal: each has its number in its first voxels."""
    target = folder / f"small-{subjects}-{shrink}"
    if (target / "done").exists():
        return target
    source = heads(folder, shrink)
    target.mkdir(parents=True, exist_ok=True)
    for modality in DEFAULT_MODALITIES:
        volumes = [gzip.decompress((source / f"{n}-{modality}.nii.gz").read_bytes()) for n in range(HEADS)]
        with tarfile.open(target / archive_name(modality), "w", format=tarfile.GNU_FORMAT) as tar:
            for number in range(subjects):
                data = bytearray(volumes[number % HEADS])
                data[VOXELS_AT : VOXELS_AT + 4 : 2] = number.to_bytes(2, "little")  # two int16 voxels, from 0 to 255
                _add(tar, number, modality, gzip.compress(data, 1, mtime=0))
    (target / "done").touch()
    return target


def different_heads(folder: Path, subjects: int, shrink: int = 1) -> Path:
    """A folder with archives of subjects who each have a head of their own, so that some can be held out."""
    target = folder / f"different-{subjects}-{shrink}"
    if not (target / "truth.json").exists():  # it is written last
        write_phantom(target, subjects, SEED, oddities=False, shrink=shrink)
    return target


def sparse_archives(folder: Path, shrink: int = 1, members: dict[str, int] | None = None) -> Path:
    """Archives with as many members as IXI's, of which only headers are read.

    After its first 64 KiB each member is a hole in a sparse file.
    """
    counts = members or MEMBERS
    target = folder / f"sparse-{'-'.join(map(str, counts.values()))}-{shrink}"
    if (target / "done").exists():
        return target
    source = heads(folder, shrink)
    target.mkdir(parents=True, exist_ok=True)
    for modality, count in counts.items():
        packed = [(source / f"{n}-{modality}.nii.gz").read_bytes() for n in range(HEADS)]
        with open(target / archive_name(modality), "wb") as file:
            for number in range(count):
                data = packed[number % HEADS]
                info = tarfile.TarInfo(_name(number, modality))
                info.size = len(data)
                file.write(info.tobuf(tarfile.GNU_FORMAT))
                file.write(data[: 64 << 10])
                file.seek(-(-len(data) // 512) * 512 - len(data[: 64 << 10]), os.SEEK_CUR)
            file.truncate(file.tell() + 2 * tarfile.BLOCKSIZE)
    (target / "done").touch()
    return target


def member_names(folder: Path) -> list[str]:
    """Names of the T1s in the archives of a folder."""
    with tarfile.open(folder / archive_name("T1")) as tar:
        return [name for name in tar.getnames() if name.endswith(".nii.gz")]


def _name(number: int, modality: str) -> str:
    return f"{PhantomSubject(number + 2, ('Guys', 'HH')[number % 2], SEED).subject_id}-{modality}.nii.gz"


def _add(tar: tarfile.TarFile, number: int, modality: str, data: bytes) -> None:
    import io

    info = tarfile.TarInfo(_name(number, modality))
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def scratch_folder(folder: Path, name: str) -> Path:
    """Create an empty folder to write into; remove an existing one."""
    target = folder / "scratch" / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    return target


def drop_from_page_cache(*folders: Path) -> None:
    """Drop the files in these folders from the page cache, so that they are next read from the disk."""
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                handle = os.open(path, os.O_RDONLY)
                os.fsync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(handle)


def read_json(path: Path) -> dict[str, object]:
    fields: dict[str, object] = json.loads(path.read_text())
    return fields
