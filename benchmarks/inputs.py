"""What is measured on: archives of the project's phantom at IXI's real grid, made once and kept.

Simulating a head takes seconds, so a few are repeated under other subjects' ids. Equal arguments give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from pathlib import Path

from ixi_etl.catalog import MODALITIES, archive_name
from ixi_etl.phantom import Scan, simulate

HEADS = 4
SEED = 11
SHRINK_QUICK = 4
ODD_DEPTH = 146  # of the T1 of subjects whom the modal depth leaves out
MEMBERS = {"T1": 581, "T2": 578}  # of IXI itself


def heads(folder: Path, shrink: int) -> Path:
    """A folder with the gzipped volumes of `HEADS` subjects and of one of another depth, made if it is not there."""
    place = folder / f"heads-{shrink}"
    if not (place / "done").exists():
        place.mkdir(parents=True, exist_ok=True)
        for number in range(HEADS + 1):
            depth = {"depth_t1": ODD_DEPTH} if number == HEADS else {}
            members, _ = simulate(Scan(number + 2, "Guys", SEED, moved=number % 2 == 1, shrink=shrink, **depth))
            for modality, packed in members.items():
                (place / f"{number}-{modality}.nii.gz").write_bytes(packed)
        (place / "done").touch()
    return place


def archives(folder: Path, pairs: int, shrink: int = 1, odd: int = 0) -> Path:
    """A folder with IXI-T1.tar, IXI-T2.tar and MD5SUMS of `pairs` subjects, and of `odd` ones that selection leaves
    out.
    """
    place = folder / f"pairs-{pairs}-{odd}-{shrink}"
    if (place / "MD5SUMS").exists():
        return place
    source = heads(folder, shrink)
    place.mkdir(parents=True, exist_ok=True)
    sums = []
    for modality in MODALITIES:
        packed = [(source / f"{n}-{modality}.nii.gz").read_bytes() for n in range(HEADS + 1)]
        with tarfile.open(place / archive_name(modality), "w", format=tarfile.GNU_FORMAT) as tar:
            for number in range(pairs + odd):
                data = packed[number % HEADS if number < pairs else HEADS]
                _add(tar, number, modality, data)
        with open(place / archive_name(modality), "rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        sums.append(f"{digest}  {archive_name(modality)}\n")
    (place / "MD5SUMS").write_text("".join(sums))
    return place


def hollow(folder: Path, shrink: int = 1, members: dict[str, int] | None = None) -> Path:
    """Archives of as many members as IXI's, of which all but the first 64 KiB is a hole in the file: for what reads
    headers alone.
    """
    counts = members or MEMBERS
    place = folder / f"hollow-{'-'.join(map(str, counts.values()))}-{shrink}"
    if (place / "done").exists():
        return place
    source = heads(folder, shrink)
    place.mkdir(parents=True, exist_ok=True)
    for modality, count in counts.items():
        packed = [(source / f"{n}-{modality}.nii.gz").read_bytes() for n in range(HEADS)]
        with open(place / archive_name(modality), "wb") as file:
            for number in range(count):
                data = packed[number % HEADS]
                info = tarfile.TarInfo(_name(number, modality))
                info.size = len(data)
                file.write(info.tobuf(tarfile.GNU_FORMAT))
                file.write(data[: 64 << 10])
                file.seek(-(-len(data) // 512) * 512 - len(data[: 64 << 10]), os.SEEK_CUR)
            file.truncate(file.tell() + 2 * tarfile.BLOCKSIZE)
    (place / "done").touch()
    return place


def _name(number: int, modality: str) -> str:
    return f"{Scan(number + 2, ('Guys', 'HH')[number % 2], SEED).subject_id}-{modality}.nii.gz"


def _add(tar: tarfile.TarFile, number: int, modality: str, data: bytes) -> None:
    import io

    info = tarfile.TarInfo(_name(number, modality))
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def fresh(folder: Path, name: str) -> Path:
    """An empty folder to write into."""
    place = folder / "scratch" / name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    return place


def out_of_memory(*folders: Path) -> None:
    """Have the system forget what it keeps in memory of the files in there, so that the next reader waits for the
    disk.
    """
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                handle = os.open(path, os.O_RDONLY)
                os.fsync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(handle)


def read_json(path: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(path.read_text())
    return found
