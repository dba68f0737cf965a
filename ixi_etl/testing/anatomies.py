"""Simulate subjects from real heads: pairs of T1 and T2 volumes that the user provides, aligned or not.

A subject is one of these heads, warped at random. All heads of a person are in one split, so that a generator is tested
on anatomies that it has not seen. Figures measured on such subjects do not apply to IXI.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ixi_etl.config import SPLITS, DatasetConfig
from ixi_etl.core.parallel import parallel_map
from ixi_etl.core.progress import Progress, no_progress
from ixi_etl.dataset.splits import split_of
from ixi_etl.errors import BadVolumeError, ConfigError
from ixi_etl.pairing.geometry import Matrix, import_sitk, rounded
from ixi_etl.pairing.heads import RegistrationError, Volume
from ixi_etl.pairing.register import head_points, register
from ixi_etl.scans.intensity import percentiles
from ixi_etl.scans.nifti import read_volume

log = logging.getLogger(__name__)

MODALITIES = ("T1", "T2", "PD")
PERSON = "[^_]+"
"""By default the person is what precedes the first underscore: `p01` of `p01_session2_T1.nii.gz`."""

MAX_ERROR_MM = 1.5  # estimated error of the registration of a pair, at the largest
WARP_MM = 2.5  # standard deviation of the random displacement at the nodes of its lattice
_LATTICE = (7, 8, 7)  # nodes along x, y, z, about 30 mm apart
_HEAD_MM, _HEAD_SHAPE = 1.0, (204, 234, 204)  # grid of a sampled head about the world's origin; z, y, x
_NAME = re.compile(r"(?P<name>.+)[-_](?P<modality>T1|T2|PD)w?\.nii(\.gz)?", re.IGNORECASE)


@dataclass(frozen=True)
class Anatomy:
    """One real head.

    Attributes:
        name: of its files, without modality.
        person: whose head it is.
        scans: modality -> volume with values from 0 to 255.
        to_scan: modality -> 4 x 4, a point about the centre of the head (RAS mm) to the world of that scan.
    """

    name: str
    person: str
    scans: dict[str, Volume]
    to_scan: dict[str, Matrix]

    def sample(self, rng: np.random.Generator) -> tuple[dict[str, NDArray[np.float32]], Matrix]:
        """The head with a random smooth warp: modality -> [z, y, x], and the affine of that grid (voxel to RAS mm)."""
        sitk = import_sitk()
        affine = np.diag([_HEAD_MM, _HEAD_MM, _HEAD_MM, 1.0])
        affine[:3, 3] = -_HEAD_MM * (np.array(_HEAD_SHAPE[::-1]) - 1) / 2
        grid = sitk.Image(_HEAD_SHAPE[::-1], sitk.sitkFloat32)
        grid.SetSpacing([_HEAD_MM] * 3)
        grid.SetOrigin(affine[:3, 3].tolist())
        warp = _random_warp(grid, rng)
        heads = {}
        for modality, scan in self.scans.items():
            to_voxel = rounded(np.linalg.solve(scan.affine, self.to_scan[modality]))
            both = sitk.CompositeTransform([_affine_transform(to_voxel), warp])  # the last one is applied first
            voxels = sitk.GetImageFromArray(scan.voxels)
            heads[modality] = sitk.GetArrayFromImage(sitk.Resample(voxels, grid, both, sitk.sitkLinear, 0.0))
        return heads, affine


def read_anatomies(
    folder: Path,
    person: str = PERSON,
    needed: Collection[str] = (),
    *,
    workers: int = 1,
    progress: Progress = no_progress,
) -> list[Anatomy]:
    """The heads in a folder: `NAME_T1.nii.gz` with `NAME_T2.nii.gz`, perhaps `NAME_PD.nii.gz`.

    Each T2 is registered to its T1; a PD has the T2's space. The first match of the regular expression `person` in a
    name is its person.

    Raises:
        ConfigError: the folder has no pair, one cannot be read or registered, a name has no person, or no pair has one
            of the modalities `needed`.
    """
    pairs = list(find_pairs(folder).items())
    for modality in needed:
        if not any(modality in paths for _, paths in pairs):
            raise ConfigError(f"no head in {folder} has {modality} that can be used; leave {modality} out")
    people = _people_of([name for name, _ in pairs], person)
    return parallel_map(
        lambda pair: _read_anatomy(people[pair[0]], *pair),
        pairs,
        workers=workers,
        on_done=lambda done: progress("register heads", done, len(pairs), "pairs"),
    )


def _people_of(names: list[str], person: str) -> dict[str, str]:
    """Name -> person.

    Raises:
        ConfigError: `person` is not a regular expression, or is not in a name.
    """
    try:
        found = {name: re.search(person, name) for name in names}
    except re.error as error:
        raise ConfigError(f"--person {person} is not a regular expression: {error}") from None
    people = {name: match[0] for name, match in found.items() if match}
    for name in names:
        if not people.get(name):
            raise ConfigError(f"--person {person} finds nothing in the name {name}; give another, or rename the files")
    return people


def find_pairs(folder: Path) -> dict[str, dict[str, Path]]:
    """Name -> modality -> file, of the names that have a T1 and a T2; a warning names the others.

    Raises:
        ConfigError: the folder has no pair, or two files of one scan.
    """
    files: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.glob("*")):
        match = _NAME.fullmatch(path.name)
        if match:
            modality, scans = match["modality"].upper(), files.setdefault(match["name"], {})
            if modality in scans:
                raise ConfigError(f"{path} and {scans[modality].name} have the same name and modality; remove one")
            scans[modality] = path
    pairs = {name: paths for name, paths in files.items() if {"T1", "T2"} <= set(paths)}
    if not pairs:
        raise ConfigError(f"{folder} has no pair of NAME_T1.nii.gz and NAME_T2.nii.gz; give another folder")
    single = [name for name in files if name not in pairs]
    if single:
        log.warning("%s: not used, because T1 or T2 is missing: %s", folder, ", ".join(single))
    return pairs


def assign_anatomies(anatomies: list[Anatomy], persons: list[str], dataset_config: DatasetConfig) -> dict[str, Anatomy]:
    """Subject's person -> head, with the people of the heads divided among the splits in which the subjects will be.

    With heads of fewer than three people, the splits share them, and a warning says so.
    """
    people = list(dict.fromkeys(anatomy.person for anatomy in anatomies))
    of_split = dict.fromkeys(SPLITS, people)
    if len(people) >= len(SPLITS):
        held_out = max(1, round(len(people) * dataset_config.split[2]))
        of_split = {
            "train": people[: -2 * held_out],
            "val": people[-2 * held_out : -held_out],
            "test": people[-held_out:],
        }
    else:
        log.warning(
            "the heads are of fewer than three people (%s), so all splits share them; if this is wrong, give --person",
            ", ".join(people),
        )
    heads = {split: [a for a in anatomies if a.person in of_split[split]] for split in SPLITS}
    used = dict.fromkeys(SPLITS, 0)
    assigned = {}
    for person in persons:
        split = split_of(person, dataset_config)
        assigned[person] = heads[split][used[split] % len(heads[split])]
        used[split] += 1
    return assigned


def _read_anatomy(person: str, name: str, paths: dict[str, Path]) -> Anatomy:
    scans = {modality: read_scan(path) for modality, path in paths.items()}
    problem = f"{paths['T2']} cannot be registered to the T1"
    try:
        found = register(scans["T1"], scans["T2"])
    except RegistrationError as error:
        raise ConfigError(f"{problem}: {error}; remove this pair") from None
    points = head_points(scans["T1"])
    error_mm = found.error_mm(points, found.fixed_to_moving)
    if found.is_mirrored:
        raise ConfigError(f"{problem}: one of the headers exchanges left and right; correct it, or remove this pair")
    if error_mm > MAX_ERROR_MM:
        raise ConfigError(f"{problem}: the error is about {error_mm:.1f} mm; remove this pair")
    to_t1: Matrix = np.eye(4)
    to_t1[:3, 3] = (points.min(axis=0) + points.max(axis=0)) / 2
    to_t2 = rounded(np.linalg.solve(found.fixed_to_moving, to_t1))
    return Anatomy(name, person, scans, {m: to_t1 if m == "T1" else to_t2 for m in scans})


def read_scan(path: Path) -> Volume:
    """A volume [k, j, i] whose percentiles 0.1 and 99.9 are 0 and 255.

    Raises:
        ConfigError: the file is not a volume that a refresh could use.
    """
    try:
        header, stored = read_volume(path.read_bytes())
    except (BadVolumeError, OSError) as error:
        raise ConfigError(f"{path} cannot be used: {error}; remove it") from None
    assert header.affine is not None  # otherwise the header is refused
    voxels = header.scaled(stored).astype(np.float32)
    ((low, high),) = percentiles(voxels[np.newaxis])
    scaled = np.clip((voxels - low) * (255 / max(float(high - low), 1e-6)), 0, 255)
    return Volume(np.ascontiguousarray(scaled, np.float32), header.affine)


def _random_warp(grid: Any, rng: np.random.Generator) -> Any:
    """A smooth random displacement as an ITK transform on the whole `grid`."""
    sitk = import_sitk()
    nodes = rng.normal(0, WARP_MM, (*_LATTICE[::-1], 3))
    lattice = sitk.GetImageFromArray(nodes, isVector=True)
    extent = np.multiply(grid.GetSize(), grid.GetSpacing())
    lattice.SetSpacing((extent / (np.array(_LATTICE) - 1)).tolist())
    lattice.SetOrigin(grid.GetOrigin())
    coarse = sitk.Image([int(n) // 3 + 2 for n in grid.GetSize()], sitk.sitkFloat64)
    coarse.SetSpacing([3 * mm for mm in grid.GetSpacing()])
    coarse.SetOrigin(grid.GetOrigin())
    components = [
        sitk.Resample(sitk.VectorIndexSelectionCast(lattice, axis), coarse, sitk.Transform(), sitk.sitkBSpline, 0.0)
        for axis in range(3)
    ]
    return sitk.DisplacementFieldTransform(sitk.Compose(components))


def _affine_transform(matrix: Matrix) -> Any:
    transform = import_sitk().AffineTransform(3)
    transform.SetMatrix(matrix[:3, :3].ravel().tolist())
    transform.SetTranslation(matrix[:3, 3].tolist())
    return transform
