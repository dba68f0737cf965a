"""The data of the protocol study: simulated archives, their versions, and pairs that are misaligned on purpose."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ixi_etl.config import DatasetConfig, RefreshConfig
from ixi_etl.core.parallel import parallel_map
from ixi_etl.dataset import metadata
from ixi_etl.dataset.store import open_arrays
from ixi_etl.modalities import DEFAULT_MODALITIES, archive_name
from ixi_etl.pairing import geometry
from ixi_etl.pairing.slabs import ScanVolume
from ixi_etl.recipes.ixi import refresh
from ixi_etl.testing.phantom import PhantomSubject, rigid, simulate, write_tar
from model.data import Pairs, Slabs, load_pairs

SEED = 22
BY_SUBJECT, BY_FILE = "subject", "file"


@dataclass(frozen=True)
class Dataset:
    """Archives, and a version of them for each kind of split: `versions[BY_SUBJECT]`, `versions[BY_FILE]`.

    Half of the pairs are in the training split of either version, and the others in the test split.
    """

    archives: Path
    versions: dict[str, Path]

    def load(self, split_by: str, error_mm: float = 0) -> tuple[Pairs, Pairs]:
        """Pairs to train on and to test on; the sources are displaced by `error_mm`."""
        version = self.versions[split_by]
        pairs = [load_pairs(version, split) for split in ("train", "test")]
        train, test = (displace(each, version, self.archives, error_mm) if error_mm else each for each in pairs)
        return train, test

    def load_same_slices(self) -> Pairs:
        """The pairs that are in the test split of both versions."""
        held_out = load_pairs(self.versions[BY_SUBJECT], "test").subjects
        pairs = load_pairs(self.versions[BY_FILE], "test")
        return pairs.of_subjects(torch.tensor([n for n, s in enumerate(pairs.subjects) if s in held_out]), "test")


def make_dataset(folder: Path, subjects: int, slices: int, shrink: int, workers: int) -> Dataset:
    """Simulate `subjects` and publish both versions in `folder`.

    Nobody moves between the scans, so the headers align them exactly and no registration is needed.
    """
    archives = folder / "archives"
    scans = [PhantomSubject(number + 2, "Guys", SEED, shrink=shrink) for number in range(subjects)]
    simulated = parallel_map(simulate, scans, workers=workers)
    archives.mkdir(parents=True)
    for modality in DEFAULT_MODALITIES:
        pairs = zip(scans, simulated, strict=True)
        members = {f"{scan.subject_id}-{modality}.nii.gz": packed[modality] for scan, (packed, _) in pairs}
        write_tar(archives / archive_name(modality), members)
    half = subjects // 2
    splits = {
        BY_SUBJECT: {"split_by": "order", "split_counts": (half, 0, subjects - half)},
        BY_FILE: {"split_by": "file", "split": (0.5, 0.0, 0.5)},
    }
    versions = {}
    for name, split in splits.items():
        fields = {"registration": "none", "pictures": False, "slices": slices, **split}
        dataset = DatasetConfig.model_validate(fields)
        done = refresh(RefreshConfig(root=str(folder / "data"), source=str(archives), dataset=dataset, workers=workers))
        versions[name] = done.folder
    return Dataset(archives, versions)


def direction_of(subject_id: str) -> NDArray[np.float64]:
    """A random unit vector (x, y, z), always the same for a subject."""
    drawn = np.random.default_rng([SEED, *subject_id.encode()]).normal(size=3)
    return np.asarray(drawn / np.linalg.norm(drawn), np.float64)


def displace(pairs: Pairs, version: Path, archives: Path, error_mm: float) -> Pairs:
    """The pairs with sources that are misaligned by `error_mm`, in a random direction for each subject.

    A shift of the scan's affine, so each source is interpolated once from its scan, as a refresh does; without an error
    the voxels are those of the version.
    """
    (name,), target = pairs.direction
    rows = metadata.read_manifest(version).set_index("subject_id")["store_row"]
    affines = open_arrays(version)[f"{target}_affine"]
    shape = tuple(pairs.target.stored.shape[1:])
    slabs, ranges = [], []
    with tarfile.open(archives / archive_name(name.upper())) as tar:
        for subject in pairs.subjects:
            member = tar.extractfile(f"{subject}-{name.upper()}.nii.gz")
            assert member is not None
            scan = ScanVolume(name.upper(), member.read())
            shift = rigid((0, 0, 0), error_mm * direction_of(subject))
            affine = np.asarray(affines[int(rows[subject])])
            matrix = geometry.sampling_matrix(affine, scan.affine, shift)
            stored = scan.to_stored_slab(*geometry.resample(scan.voxels, matrix, shape))
            slabs.append(torch.from_numpy(stored.voxels))
            ranges.append((stored.p_low, stored.p_high))
    return replace(pairs, sources=(Slabs(torch.stack(slabs), torch.tensor(ranges, dtype=torch.float32)),))
