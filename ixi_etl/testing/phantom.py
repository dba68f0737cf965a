"""Simulate small IXI archives with the same names, grids, orientations and faults, for the demo and the tests.

Every subject is a head of ellipsoids with its own proportions and pose, scanned twice. Some move between the scans by a
rigid motion that is written to `truth.json`. Values measured on this phantom do not apply to IXI.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from ixi_etl.config import DatasetConfig
from ixi_etl.core.parallel import parallel_map
from ixi_etl.core.progress import Progress, no_progress
from ixi_etl.dataset.splits import person_of
from ixi_etl.modalities import DEFAULT_MODALITIES as MODALITIES
from ixi_etl.modalities import archive_name
from ixi_etl.pairing.geometry import Matrix, trilinear
from ixi_etl.testing.anatomies import Anatomy, assign_anatomies, read_anatomies

DESCRIPTION = "SIMULATED, no scan: ixi_etl.phantom"
SPACING_MM = {"T1": (0.9375, 0.9375, 1.2), "T2": (0.9375, 0.9375, 1.25)}
DEPTH = {"T1": 150, "T2": 130}
IN_PLANE = 256
ORIENTATION = {"T1": "PSR", "T2": "LAS"}  # as in IXI: the last axis is left-right (T1), inferior-superior (T2)
_AXIS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}

_HEAD_MM = 1.5  # voxel size of the sampled head
_HEAD_SHAPE = (136, 156, 136)  # z, y, x: 204 x 234 x 204 mm about the world's origin

# Tissue: signal in T1 and T2 (0 to 255), then centre and radii in mm along x, y, z (RAS+). Later ones cover
# earlier ones. Left and right differ, so that a flip is detectable.
_Tissue = tuple[int, int, tuple[float, float, float], tuple[float, float, float]]
_TISSUES: list[_Tissue] = [
    (200, 120, (0, 0, 5), (76, 95, 88)),  # scalp
    (25, 15, (0, 0, 6), (71, 90, 83)),  # skull
    (45, 240, (0, 0, 8), (67, 86, 78)),  # cerebrospinal fluid
    (110, 150, (0, -2, 10), (64, 82, 74)),  # grey matter
    (165, 95, (0, -2, 10), (57, 74, 66)),  # white matter
    (115, 140, (-24, 4, 4), (10, 17, 10)),  # left deep nuclei
    (115, 140, (25, 6, 5), (10, 15, 11)),  # right deep nuclei
    (40, 245, (-10, 8, 20), (6, 28, 9)),  # left ventricle
    (40, 245, (11, 4, 21), (7, 24, 11)),  # right ventricle
    (130, 110, (0, -28, -38), (34, 26, 20)),  # cerebellum
    (60, 60, (-35, -20, 30), (6, 6, 6)),  # a landmark on the left only
    (45, 230, (32, 66, -28), (13, 13, 12)),  # right eye
    (45, 230, (-32, 66, -28), (13, 13, 12)),  # left eye
]
_WHITE_MATTER = 4


@dataclass(frozen=True)
class PhantomSubject:
    """One subject to simulate. `shrink` divides the number of voxels along each axis and multiplies their size."""

    number: int
    site: str
    seed: int
    depth_t1: int = DEPTH["T1"]
    depth_t2: int = DEPTH["T2"]
    thickness_t2: float = SPACING_MM["T2"][2]
    moved: bool = False
    shrink: int = 1
    anatomy: Anatomy | None = None  # a real head, warped; otherwise ellipsoids

    @property
    def subject_id(self) -> str:
        return f"IXI{self.number:03d}-{self.site}-{(700 + 37 * self.number) % 10000:04d}"


def write_phantom(
    folder: Path,
    subjects: int = 6,
    seed: int = 1,
    *,
    oddities: bool = True,
    shrink: int = 1,
    bases: Path | None = None,
    workers: int = 2,
    progress: Progress = no_progress,
) -> None:
    """Write `IXI-T1.tar`, `IXI-T2.tar`, `MD5SUMS` and `truth.json` into `folder`.

    `truth.json` gives for each subject the 4 x 4 matrix from the T2's world to the same tissue in the T1's (RAS mm),
    and the name of its head. The heads are ellipsoids, or those of the pairs in the folder `bases` (`anatomies`).
    `IXI-PD.tar` has the subjects whose head has a PD; without any it is not written.
    With `oddities` the archives also contain unusual depths and damaged members (`_broken_members`). Equal arguments
    give equal bytes.
    """
    rng = np.random.default_rng(seed)
    sites = ["Guys", "HH"]
    scans = [
        PhantomSubject(n + 2, sites[int(rng.random() < 0.4)], seed, moved=bool(rng.random() < 0.4), shrink=shrink)
        for n in range(subjects)
    ]
    if oddities:
        scans += [
            PhantomSubject(subjects + 2, "IOP", seed, 146, 136, shrink=shrink),
            PhantomSubject(subjects + 3, "HH", seed, depth_t2=112, shrink=shrink),
            PhantomSubject(subjects + 4, "HH", seed, depth_t2=28, thickness_t2=4.98, shrink=shrink),
        ]
    if bases is not None:
        anatomies = read_anatomies(bases, workers=workers, progress=progress)
        heads = assign_anatomies(anatomies, [person_of(s.subject_id) for s in scans], DatasetConfig())
        scans = [replace(s, anatomy=heads[person_of(s.subject_id)]) for s in scans]
    folder.mkdir(parents=True, exist_ok=True)  # before the work, in case it is not possible
    simulated = parallel_map(
        simulate, scans, workers=workers, on_done=lambda done: progress("simulate", done, len(scans), "subjects")
    )
    members: dict[str, dict[str, bytes]] = {}
    for scan, (packed, _) in zip(scans, simulated, strict=True):
        for modality, data in packed.items():
            members.setdefault(modality, {})[f"{scan.subject_id}-{modality}.nii.gz"] = data
    if oddities:
        for modality, name, data in _broken_members(simulated[0][0]):
            members[modality][name] = data
    sums = [f"{write_tar(folder / archive_name(m), members[m])}  {archive_name(m)}\n" for m in members]
    (folder / "MD5SUMS").write_text("".join(sums))
    truth = {
        s.subject_id: {"motion_mm_ras": motion.tolist()} | ({"head": s.anatomy.name} if s.anatomy else {})
        for s, (_, motion) in zip(scans, simulated, strict=True)
    }
    (folder / "truth.json").write_text(json.dumps(truth, indent=1))


def write_tar(path: Path, members: dict[str, bytes]) -> str:
    """Write a flat tar like IXI's, with members sorted by name; returns its MD5."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in sorted(members.items()):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1412640000
            tar.addfile(info, io.BytesIO(data))
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def simulate(scan: PhantomSubject) -> tuple[dict[str, bytes], Matrix]:
    """Simulate a subject: modality -> gzipped NIfTI, and the motion (4 x 4, T2's world to T1's, RAS mm)."""
    rng = np.random.default_rng([scan.seed, scan.number])
    scale = np.diag([*rng.uniform(0.94, 1.05, 3), 1.0])
    pose = rigid(rng.normal(0, 3, 3), rng.normal(0, 4, 3)) @ scale
    motion = rigid(rng.uniform(-3, 3, 3), rng.uniform(-4, 4, 3)) if scan.moved else np.eye(4)
    head_to_world = {"T1": pose, "T2": np.linalg.inv(motion) @ pose}
    grids = {
        "T1": (scan.depth_t1, SPACING_MM["T1"], rigid(rng.normal(0, [6, 1, 1]), (0, 0, 0))),
        "T2": (scan.depth_t2, (*SPACING_MM["T2"][:2], scan.thickness_t2), rigid(rng.normal(0, [4, 1, 1]), (0, 0, 0))),
    }
    heads, head_affine = scan.anatomy.sample(rng) if scan.anatomy else (_heads(rng), _head_affine())
    if "PD" in heads:  # the T2's other echo
        grids["PD"], head_to_world["PD"] = grids["T2"], head_to_world["T2"]
    packed = {}
    for modality, (depth, spacing, oblique) in grids.items():
        shape = (IN_PLANE // scan.shrink, IN_PLANE // scan.shrink, -(-depth // scan.shrink))
        size_mm = tuple(mm * scan.shrink for mm in spacing)
        affine = oblique @ grid_affine(shape, size_mm, ORIENTATION.get(modality, ORIENTATION["T2"]))
        matrix = np.linalg.inv(head_to_world[modality] @ head_affine) @ affine
        signal = trilinear(heads[modality], matrix, shape[::-1]) * rng.uniform(3, 9)
        noise = rng.standard_normal((2, *signal.shape), np.float32) * 6
        stored = np.hypot(signal + noise[0], noise[1]).round().astype("<i2")
        slope = float(np.float32(rng.uniform(1.2, 2.4))) if rng.random() < 0.35 else 1.0
        packed[modality] = pack_nifti(stored, affine, slope)
    return packed, motion


def pack_nifti(stored: NDArray[Any], affine: Matrix, slope: float = 1.0, intercept: float = 0.0) -> bytes:
    """A gzipped NIfTI-1 file of stored voxels [k, j, i, ...] with sform = qform = `affine`, as in IXI.

    Its description marks it as simulated, so that versions made from it are not credited to IXI (`credit`).
    """
    image = nib.Nifti1Image(stored.T, affine)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    raw = bytearray(image.to_bytes())
    raw[112:120] = np.array([slope, intercept], "<f4").tobytes()  # nibabel resets both on writing
    raw[148:228] = DESCRIPTION.encode().ljust(80, b"\0")
    return gzip.compress(bytes(raw), 2, mtime=0)


def grid_affine(shape_ijk: tuple[int, ...], spacing_mm: tuple[float, ...], orientation: str) -> Matrix:
    """The affine (voxel to RAS mm) of an upright grid, centred on the world's origin, with axes along `orientation`."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, letter in enumerate(orientation):
        row, sign = _AXIS[letter]
        affine[row, axis] = sign * spacing_mm[axis]
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape_ijk) - 1) / 2)
    return affine


def rigid(angles_deg: Any, shift_mm: Any) -> Matrix:
    """The 4 x 4 matrix of a rotation about x, then y, then z through the origin, then a shift, in RAS mm."""
    a, b, c = np.deg2rad(angles_deg)
    x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    matrix = np.eye(4)
    matrix[:3, :3] = z @ y @ x
    matrix[:3, 3] = shift_mm
    return matrix


def _head_affine() -> Matrix:
    return grid_affine(_HEAD_SHAPE[::-1], (_HEAD_MM,) * 3, "RAS")


def _heads(rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    """One person's head [z, y, x] in both contrasts: ellipsoids with soft edges, folds, sulci, and smooth texture."""
    z, y, x = (
        ((np.arange(n, dtype=np.float32) - (n - 1) / 2) * _HEAD_MM).reshape(shape)
        for n, shape in zip(_HEAD_SHAPE, ((-1, 1, 1), (1, -1, 1), (1, 1, -1)), strict=True)
    )
    phase = rng.uniform(0, 2 * np.pi, 6).astype(np.float32)
    folds = np.sin(x / 5 + phase[0]) * np.sin(y / 6 + phase[1]) * np.sin(z / 5.5 + phase[2])
    texture = 1 + 0.04 * np.sin(x / 14 + phase[3]) * np.sin(y / 17 + phase[4]) * np.cos(z / 12 + phase[5])
    heads = [np.zeros(_HEAD_SHAPE, np.float32) for _ in MODALITIES]
    for number, (t1, t2, middle, size) in enumerate([*_TISSUES, *_sulci(rng)]):
        centre = np.array(middle) + rng.normal(0, 0.6, 3)
        radii = np.array(size) * rng.uniform(0.97, 1.03, 3)
        box = tuple(  # nothing outside it changes
            slice(max(0, int((c - r) / _HEAD_MM + n / 2) - 6), max(0, int((c + r) / _HEAD_MM + n / 2) + 7))
            for c, r, n in zip(centre[::-1], radii[::-1], _HEAD_SHAPE, strict=True)
        )
        dx, dy, dz = centre.astype(np.float32)
        a, b, c = radii.astype(np.float32)
        radius = np.sqrt(
            ((x[:, :, box[2]] - dx) / a) ** 2 + ((y[:, box[1]] - dy) / b) ** 2 + ((z[box[0]] - dz) / c) ** 2
        )
        depth = (1 - radius) * min(a, b, c)  # approximate mm below the surface
        if number == _WHITE_MATTER:  # fold its surface
            depth += 9 * folds[box] - 2
        share = np.clip(depth / 2 + 0.5, 0, 1)  # a soft edge of 2 mm
        for head, signal in zip(heads, (t1, t2), strict=True):
            head[box] += share * (signal * texture[box] - head[box])
    return dict(zip(MODALITIES, heads, strict=True))


def _sulci(rng: np.random.Generator) -> Iterator[_Tissue]:
    """Drops of cerebrospinal fluid all over the cortex. Without them a head is nearly a ball, with no definite pose."""
    for _ in range(60):
        towards = rng.normal(size=3)
        middle = towards / np.linalg.norm(towards) * (58, 75, 67) + (0, -2, 10)
        yield 45, 240, tuple(middle.tolist()), tuple(rng.uniform(3, 9, 3).tolist())


def _broken_members(good: dict[str, bytes]) -> Iterator[tuple[str, str, bytes]]:
    """(modality, name, bytes) of faulty members that a reader must report, made from a good subject's members."""
    t1, t2 = good["T1"], good["T2"]

    def named(number: int, modality: str) -> str:
        return f"IXI{number}-Guys-{number}0-{modality}.nii.gz"

    def changed(packed: bytes, at: int, data: bytes) -> bytes:
        raw = bytearray(gzip.decompress(packed))
        raw[at : at + len(data)] = data
        return gzip.compress(bytes(raw), 2, mtime=0)

    yield "T1", named(901, "T1"), t1  # no T2
    yield "T2", named(902, "T2"), t2  # no T1
    flipped = bytearray(t2)
    flipped[len(t2) // 2] ^= 0xFF
    image = nib.Nifti1Image.from_bytes(gzip.decompress(t2))
    bad: dict[int, tuple[bytes, bytes]] = {
        903: (t1[: len(t1) // 3], t2),  # cut short
        904: (t1, bytes(flipped)),  # a flipped byte
        905: (gzip.compress(b"<html>403 Forbidden</html>" * 40, mtime=0), t2),  # not NIfTI
        906: (t1, pack_nifti(np.zeros(image.shape[::-1], "<i2"), image.affine)),  # a volume of zeros
        907: (pack_nifti(np.ones((2, *image.shape[::-1]), "<i2"), image.affine), t2),  # 4-D
        908: (changed(changed(t1, 280, np.full(12, np.nan, "<f4").tobytes()), 252, b"\0\0"), t2),  # no orientation
        909: (changed(t1, 70, np.array([32, 64], "<i2").tobytes()), t2),  # complex voxels
    }
    for number, (first, second) in bad.items():
        yield "T1", named(number, "T1"), first
        yield "T2", named(number, "T2"), second
    yield "T1", "README.txt", b"not a volume\n"
