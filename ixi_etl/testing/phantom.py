"""Simulate small IXI archives with the same names, grids, orientations and faults, for the demo and the tests.

Every subject is a head of ellipsoids with its own proportions and pose, scanned once per modality. Some move between
T1 and T2, and all between T2 and MRA; `truth.json` has these rigid motions. PD is the second echo of the T2, so it has
the T2's grid and pose. Values measured on this phantom do not apply to IXI.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from ixi_etl.config import DatasetConfig
from ixi_etl.core.parallel import parallel_map
from ixi_etl.core.progress import Progress, no_progress
from ixi_etl.dataset.splits import person_of
from ixi_etl.modalities import DEFAULT_MODALITIES, MODALITIES, archive_name
from ixi_etl.pairing.geometry import Matrix, trilinear
from ixi_etl.testing.anatomies import PERSON, Anatomy, assign_anatomies, read_anatomies

DESCRIPTION = "SIMULATED, no scan: ixi_etl.phantom"
SPACING_MM = {"T1": (0.9375, 0.9375, 1.2), "T2": (0.9375, 0.9375, 1.25), "MRA": (0.46875, 0.46875, 0.8)}
DEPTH = {"T1": 150, "T2": 130, "MRA": 100}
IN_PLANE = {"T1": 256, "T2": 256, "MRA": 512}
# As in IXI, the last axis is left-right (T1) or inferior-superior (T2). That of its MRA has not been checked.
ORIENTATION = {"T1": "PSR", "T2": "LAS", "MRA": "LAS"}
MRA_CENTRE_MM = -12.0
"""Mean position of the middle of the MRA along the T2's slice axis, from the middle of the T2 (positive: superior)."""
LOW_MRA_CENTRE_MM = -40.0  # the MRA ends in the middle of the T2

_AXIS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}

_HEAD_MM = 1.5  # voxel size of the sampled head
_HEAD_SHAPE = (136, 156, 136)  # z, y, x: 204 x 234 x 204 mm about the world's origin

# Tissue: signal (0 to 255) in each of `MODALITIES`, then centre and radii in mm along x, y, z (RAS+). Later ones cover
# earlier ones. Left and right differ, so that a flip is detectable.
_Point = tuple[float, float, float]
_Tissue = tuple[tuple[int, int, int, int], _Point, _Point]
_FLUID = (45, 240, 205, 20)
_TISSUES: list[_Tissue] = [
    ((200, 120, 150, 55), (0, 0, 5), (76, 95, 88)),  # scalp
    ((25, 15, 20, 10), (0, 0, 6), (71, 90, 83)),  # skull
    (_FLUID, (0, 0, 8), (67, 86, 78)),  # cerebrospinal fluid
    ((110, 150, 190, 75), (0, -2, 10), (64, 82, 74)),  # grey matter
    ((165, 95, 145, 62), (0, -2, 10), (57, 74, 66)),  # white matter
    ((115, 140, 175, 70), (-24, 4, 4), (10, 17, 10)),  # left deep nuclei
    ((115, 140, 175, 70), (25, 6, 5), (10, 15, 11)),  # right deep nuclei
    ((40, 245, 210, 18), (-10, 8, 20), (6, 28, 9)),  # left ventricle
    ((40, 245, 210, 18), (11, 4, 21), (7, 24, 11)),  # right ventricle
    ((130, 110, 165, 68), (0, -28, -38), (34, 26, 20)),  # cerebellum
    ((60, 60, 90, 30), (-35, -20, 30), (6, 6, 6)),  # a landmark on the left only
    ((45, 230, 200, 22), (32, 66, -28), (13, 13, 12)),  # right eye
    ((45, 230, 200, 22), (-32, 66, -28), (13, 13, 12)),  # left eye
]
# Arteries, bright in MRA alone: radius, then points in mm along x, y, z.
_MIDLINE_VESSELS: list[tuple[float, list[_Point]]] = [
    (2.0, [(0, -22, -78), (1, -20, -55), (0, -14, -30), (0, -12, -20)]),  # basilar
    (1.3, [(-6, 18, -17), (0, 20, -16), (6, 18, -17)]),  # anterior communicating
]
_SIDE_VESSELS: list[tuple[float, list[_Point]]] = [  # of the right; mirrored for the left
    (2.6, [(26, -8, -82), (24, -2, -60), (16, 6, -42), (18, 12, -30), (13, 6, -20)]),  # internal carotid
    (2.0, [(13, 6, -20), (28, 8, -18), (44, 8, -12), (52, 2, -4)]),  # middle cerebral
    (1.6, [(52, 2, -4), (56, -14, 6), (54, -32, 20), (46, -46, 36)]),  # its lower branch
    (1.6, [(52, 2, -4), (56, 14, 8), (52, 22, 26), (44, 26, 44)]),  # its upper branch
    (1.6, [(13, 6, -20), (6, 18, -17), (4, 36, -8), (4, 46, 12), (4, 38, 38), (4, 12, 60)]),  # anterior cerebral
    (1.6, [(0, -12, -20), (16, -20, -18), (26, -38, -10), (20, -58, 0), (12, -72, 8)]),  # posterior cerebral
    (1.2, [(13, 6, -20), (11, -6, -20), (12, -18, -19)]),  # posterior communicating
]
_BLOOD = 240
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
    modalities: tuple[str, ...] = DEFAULT_MODALITIES
    mra_centre_mm: float = MRA_CENTRE_MM

    @property
    def subject_id(self) -> str:
        return f"IXI{self.number:03d}-{self.site}-{(700 + 37 * self.number) % 10000:04d}"


def write_phantom(
    folder: Path,
    subjects: int = 6,
    seed: int = 1,
    *,
    modalities: tuple[str, ...] | None = None,
    oddities: bool = True,
    shrink: int = 1,
    bases: Path | None = None,
    person: str = PERSON,
    workers: int = 2,
    progress: Progress = no_progress,
) -> None:
    """Write an archive for each modality, `MD5SUMS` and `truth.json` into `folder`.

    By default these are `IXI-T1.tar` and `IXI-T2.tar`, and `IXI-PD.tar` if a head of `bases` has a PD. Equal arguments
    give equal bytes, and a subject has the same T1 and T2 whatever the other modalities.

    `truth.json` gives for each subject `motion_mm_ras`, the 4 x 4 matrix from the T2's world to the same tissue in the
    T1's (RAS mm), and the name of its head. With more modalities, `motions_mm_ras` has the matrix from the T2's world
    to that of each scan of the subject.

    The heads are ellipsoids, or those of the pairs in the folder `bases` (`anatomies`); `person` is the regular
    expression of the person in their names. A subject whose head has no PD has none either.
    With `oddities` the archives also contain unusual depths and damaged members (`_broken_members`), subjects that lack
    the PD or the MRA, and one whose MRA misses half of the middle slices.

    Raises:
        ConfigError: `bases` cannot be used, or has no head with one of the `modalities`.
    """
    rng = np.random.default_rng(seed)
    sites = ["Guys", "HH"]
    wanted = modalities or DEFAULT_MODALITIES
    scans = [
        PhantomSubject(
            n + 2,
            sites[int(rng.random() < 0.4)],
            seed,
            moved=bool(rng.random() < 0.4),
            shrink=shrink,
            modalities=wanted,
        )
        for n in range(subjects)
    ]
    if oddities:
        usual = PhantomSubject(subjects + 2, "HH", seed, shrink=shrink, modalities=wanted)
        scans += [
            replace(usual, site="IOP", depth_t1=146, depth_t2=136),
            replace(usual, number=subjects + 3, depth_t2=112),
            replace(usual, number=subjects + 4, depth_t2=28, thickness_t2=4.98),
        ]
        for n, modality in ((subjects + 5, "PD"), (subjects + 6, "MRA")):
            if modality in wanted:
                scans.append(replace(usual, number=n, modalities=tuple(m for m in wanted if m != modality)))
        if "MRA" in wanted:
            scans.append(replace(usual, number=subjects + 7, mra_centre_mm=LOW_MRA_CENTRE_MM))
    if bases is not None:
        scans = _with_heads(scans, bases, person, modalities, workers, progress)
    folder.mkdir(parents=True, exist_ok=True)  # before the work, in case it is not possible
    simulated = parallel_map(
        simulate, scans, workers=workers, on_done=lambda done: progress("simulate", done, len(scans), "subjects")
    )
    members: dict[str, dict[str, bytes]] = {}
    for scan, (packed, _) in zip(scans, simulated, strict=True):
        for modality, data in packed.items():
            members.setdefault(modality, {})[f"{scan.subject_id}-{modality}.nii.gz"] = data
    if oddities:
        for modality, name, data in _broken_members({m: d for m, d in simulated[0][0].items() if m in wanted}):
            members[modality][name] = data
    sums = [f"{write_tar(folder / archive_name(m), members[m])}  {archive_name(m)}\n" for m in members]
    (folder / "MD5SUMS").write_text("".join(sums))
    truth: dict[str, dict[str, Any]] = {}
    for scan, (packed, motions) in zip(scans, simulated, strict=True):
        truth[scan.subject_id] = {"motion_mm_ras": motions["T1"].tolist()}
        if set(members) - set(DEFAULT_MODALITIES):
            truth[scan.subject_id]["motions_mm_ras"] = {m: motions[m].tolist() for m in packed if m != "T2"}
        if scan.anatomy:
            truth[scan.subject_id]["head"] = scan.anatomy.name
    (folder / "truth.json").write_text(json.dumps(truth, indent=1))


def _with_heads(
    scans: list[PhantomSubject],
    bases: Path,
    person: str,
    modalities: tuple[str, ...] | None,
    workers: int,
    progress: Progress,
) -> list[PhantomSubject]:
    """The subjects with heads of the folder `bases`, and the modalities that their heads have."""
    heads = read_anatomies(bases, person, modalities or (), workers=workers, progress=progress)
    assigned = assign_anatomies(heads, [person_of(s.subject_id) for s in scans], DatasetConfig())
    with_heads = []
    for scan in scans:
        head = assigned[person_of(scan.subject_id)]
        wanted = scan.modalities if modalities else head.scans
        with_heads.append(
            replace(scan, anatomy=head, modalities=tuple(m for m in MODALITIES if m in wanted and m in head.scans))
        )
    return with_heads


def write_tar(path: Path, members: dict[str, bytes]) -> str:
    """Write a flat tar like IXI's, with members sorted by name; returns its MD5."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in sorted(members.items()):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1412640000
            tar.addfile(info, io.BytesIO(data))
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def simulate(scan: PhantomSubject) -> tuple[dict[str, bytes], dict[str, Matrix]]:
    """Simulate a subject.

    Returns:
        packed: modality -> gzipped NIfTI.
        motions: modality -> the motion (4 x 4, T2's world to that modality's, RAS mm).
    """
    rng = np.random.default_rng([scan.seed, scan.number])
    # The MRA has random numbers of its own. Those of the PD come last, so T1 and T2 do not depend on either.
    mra_rng = np.random.default_rng([scan.seed, scan.number, MODALITIES.index("MRA")])
    scale = np.diag([*rng.uniform(0.94, 1.05, 3), 1.0])
    pose = rigid(rng.normal(0, 3, 3), rng.normal(0, 4, 3)) @ scale
    motion = rigid(rng.uniform(-3, 3, 3), rng.uniform(-4, 4, 3)) if scan.moved else np.eye(4)
    motions = {"T1": motion, "T2": np.eye(4), "PD": np.eye(4)}
    motions["MRA"] = rigid(mra_rng.uniform(-1.5, 1.5, 3), mra_rng.uniform(-1.5, 1.5, 3))
    head_to_t2 = np.linalg.inv(motion) @ pose
    oblique_t1 = rigid(rng.normal(0, [6, 1, 1]), (0, 0, 0))
    oblique_t2 = rigid(rng.normal(0, [4, 1, 1]), (0, 0, 0))
    centre_mra = (0, 0, scan.mra_centre_mm + mra_rng.uniform(-4, 4))
    t2_mm = (*SPACING_MM["T2"][:2], scan.thickness_t2)
    grids = {
        "T1": _grid("T1", scan.depth_t1, SPACING_MM["T1"], oblique_t1, scan.shrink),
        "T2": _grid("T2", scan.depth_t2, t2_mm, oblique_t2, scan.shrink),
    }
    grids["PD"] = grids["T2"]
    tilted = oblique_t2 @ rigid(mra_rng.normal(0, [2, 1, 1]), centre_mra)  # planned on the same localiser as the T2
    grids["MRA"] = _grid("MRA", DEPTH["MRA"], SPACING_MM["MRA"], tilted, scan.shrink)
    simulated = [m for m in MODALITIES if m in scan.modalities or m in DEFAULT_MODALITIES]
    if scan.anatomy:
        heads, head_affine = scan.anatomy.sample(rng)
    else:
        heads, head_affine = _heads(simulated, rng, mra_rng), _head_affine()
    packed = {}
    for modality in simulated:
        own_rng = mra_rng if modality == "MRA" else rng
        affine, shape_kji = grids[modality]
        head_to_world = pose if modality == "T1" else motions[modality] @ head_to_t2
        matrix = np.linalg.inv(head_to_world @ head_affine) @ affine
        signal = trilinear(heads[modality], matrix, shape_kji) * own_rng.uniform(3, 9)
        noise = own_rng.standard_normal((2, *signal.shape), np.float32) * 6
        stored = np.hypot(signal + noise[0], noise[1]).round().astype("<i2")
        slope = float(np.float32(own_rng.uniform(1.2, 2.4))) if own_rng.random() < 0.35 else 1.0
        if modality in scan.modalities:
            packed[modality] = pack_nifti(stored, affine, slope)
    return packed, motions


def _grid(
    modality: str, depth: int, spacing_mm: tuple[float, ...], placed: Matrix, shrink: int
) -> tuple[Matrix, tuple[int, int, int]]:
    """The affine of a scan (voxel to RAS mm), and its shape [k, j, i]; `placed` moves the upright, centred grid."""
    side = IN_PLANE[modality] // shrink
    shape_kji = (-(-depth // shrink), side, side)
    upright = grid_affine(shape_kji[::-1], tuple(mm * shrink for mm in spacing_mm), ORIENTATION[modality])
    return placed @ upright, shape_kji


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


def _heads(
    modalities: list[str], rng: np.random.Generator, mra_rng: np.random.Generator
) -> dict[str, NDArray[np.float32]]:
    """One person's head [z, y, x] in each modality: ellipsoids with soft edges, folds, sulci, and smooth texture.

    The MRA has arteries too, made from `mra_rng`.
    """
    z, y, x = (
        ((np.arange(n, dtype=np.float32) - (n - 1) / 2) * _HEAD_MM).reshape(shape)
        for n, shape in zip(_HEAD_SHAPE, ((-1, 1, 1), (1, -1, 1), (1, 1, -1)), strict=True)
    )
    phase = rng.uniform(0, 2 * np.pi, 6).astype(np.float32)
    folds = np.sin(x / 5 + phase[0]) * np.sin(y / 6 + phase[1]) * np.sin(z / 5.5 + phase[2])
    texture = 1 + 0.04 * np.sin(x / 14 + phase[3]) * np.sin(y / 17 + phase[4]) * np.cos(z / 12 + phase[5])
    heads = {modality: np.zeros(_HEAD_SHAPE, np.float32) for modality in modalities}
    for number, (signals, middle, size) in enumerate([*_TISSUES, *_sulci(rng)]):
        centre = np.array(middle) + rng.normal(0, 0.6, 3)
        radii = np.array(size) * rng.uniform(0.97, 1.03, 3)
        box = _box(centre - radii, centre + radii, margin=6)
        dx, dy, dz = centre.astype(np.float32)
        a, b, c = radii.astype(np.float32)
        radius = np.sqrt(
            ((x[:, :, box[2]] - dx) / a) ** 2 + ((y[:, box[1]] - dy) / b) ** 2 + ((z[box[0]] - dz) / c) ** 2
        )
        depth = (1 - radius) * min(a, b, c)  # approximate mm below the surface
        if number == _WHITE_MATTER:  # fold its surface
            depth += 9 * folds[box] - 2
        share = np.clip(depth / 2 + 0.5, 0, 1)  # a soft edge of 2 mm
        for modality, head in heads.items():
            signal = signals[MODALITIES.index(modality)]
            head[box] += share * (signal * texture[box] - head[box])
    for start, end, radius_mm in _vessel_segments(mra_rng) if "MRA" in heads else ():
        box = _box(np.minimum(start, end) - radius_mm, np.maximum(start, end) + radius_mm, margin=2)
        points = np.stack(np.broadcast_arrays(x[:, :, box[2]], y[:, box[1]], z[box[0]]), axis=-1)
        along = np.clip((points - start) @ (end - start) / np.square(end - start).sum(), 0, 1)
        distance = np.linalg.norm(points - start - along[..., np.newaxis] * (end - start), axis=-1)
        blood = _BLOOD * np.clip((radius_mm - distance) / _HEAD_MM + 0.5, 0, 1)
        heads["MRA"][box] = np.maximum(heads["MRA"][box], blood)
    return heads


def _box(low: NDArray[Any], high: NDArray[Any], margin: int) -> tuple[slice, ...]:
    """Slices [z, y, x] of the sampled head from `low` to `high` (x, y, z in mm), with a margin of voxels."""
    return tuple(
        slice(max(0, int(a / _HEAD_MM + n / 2) - margin), max(0, int(b / _HEAD_MM + n / 2) + margin + 1))
        for a, b, n in zip(low[::-1], high[::-1], _HEAD_SHAPE, strict=True)
    )


def _vessel_segments(rng: np.random.Generator) -> Iterator[tuple[NDArray[Any], NDArray[Any], float]]:
    """Start, end (x, y, z in mm) and radius of the straight parts of the arteries; each artery is moved a little."""
    right = [(radius, np.array(points, float)) for radius, points in _SIDE_VESSELS]
    left = [(radius, points * (-1, 1, 1)) for radius, points in right]
    middle = [(radius, np.array(points, float)) for radius, points in _MIDLINE_VESSELS]
    bend = rng.normal(0, 0.8, (3, 2))  # the same at each point, so that arteries stay joined
    for radius, points in (*middle, *right, *left):
        bent = points + np.sin(points / 25 + bend[:, 0]) * bend[:, 1] * 2
        for start, end in pairwise(bent):
            yield start, end, radius * rng.uniform(0.85, 1.15)


def _sulci(rng: np.random.Generator) -> Iterator[_Tissue]:
    """Drops of cerebrospinal fluid all over the cortex. Without them a head is nearly a ball, with no definite pose."""
    for _ in range(60):
        towards = rng.normal(size=3)
        middle = towards / np.linalg.norm(towards) * (58, 75, 67) + (0, -2, 10)
        yield _FLUID, tuple(middle.tolist()), tuple(rng.uniform(3, 9, 3).tolist())


def _broken_members(good: dict[str, bytes]) -> Iterator[tuple[str, str, bytes]]:
    """(modality, name, bytes) of faulty members that a reader must report, made from a good subject's members.

    Each of these subjects has one fault, and the good subject's other members.
    """
    t1, t2 = good["T1"], good["T2"]

    def changed(packed: bytes, at: int, data: bytes) -> bytes:
        raw = bytearray(gzip.decompress(packed))
        raw[at : at + len(data)] = data
        return gzip.compress(bytes(raw), 2, mtime=0)

    flipped = bytearray(t2)
    flipped[len(t2) // 2] ^= 0xFF
    image = nib.Nifti1Image.from_bytes(gzip.decompress(t2))
    bad: dict[int, tuple[str, bytes | None]] = {
        901: ("T2", None),  # missing
        902: ("T1", None),
        903: ("T1", t1[: len(t1) // 3]),  # cut short
        904: ("T2", bytes(flipped)),  # a flipped byte
        905: ("T1", gzip.compress(b"<html>403 Forbidden</html>" * 40, mtime=0)),  # not NIfTI
        906: ("T2", pack_nifti(np.zeros(image.shape[::-1], "<i2"), image.affine)),  # a volume of zeros
        907: ("T1", pack_nifti(np.ones((2, *image.shape[::-1]), "<i2"), image.affine)),  # 4-D
        908: ("T1", changed(changed(t1, 280, np.full(12, np.nan, "<f4").tobytes()), 252, b"\0\0")),  # no orientation
        909: ("T1", changed(t1, 70, np.array([32, 64], "<i2").tobytes())),  # complex voxels
    }
    if "PD" in good:
        bad[910] = ("PD", good["PD"][: len(good["PD"]) // 3])
    for number, (faulty, data) in bad.items():
        for modality, packed in (good | {faulty: data}).items():
            if packed is not None:
                yield modality, f"IXI{number}-Guys-{number}0-{modality}.nii.gz", packed
    yield "T1", "README.txt", b"not a volume\n"
