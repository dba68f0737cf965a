"""The data of the protocol study: simulated archives, their versions, and pairs that are misaligned on purpose."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
BY_SUBJECT, BY_FILE, OTHERS = "by subject", "by file", "by subject, twice as many"
SPLITS = (BY_SUBJECT, OTHERS, BY_FILE)
GROUPS = {BY_FILE: ("train", "test"), OTHERS: ("train", "val")}
"""Whose slices are trained on, of the slices that a split by file trains on. Groups are splits by subject."""
OWN_TEST, SAME_SLICES = "own test split", "same slices"


@dataclass(frozen=True)
class Dataset:
    """Archives, and two versions of them: by subject a third each is in train, val and test, by file half of the slices
    in train and in test.

    Attributes:
        pairs: the number of pairs in every training set.
    """

    archives: Path
    by_subject: Path
    by_file: Path
    pairs: int = 0

    def training_set(self, split: str, error_mm: float = 0) -> Pairs:
        """A training set of `SPLITS`; the sources are displaced by `error_mm`.

        `BY_SUBJECT` has a third of the subjects. The other two have half of the slices of twice as many: `BY_FILE` of
        subjects that include those of the test, `OTHERS` of subjects that do not.
        """
        if split == BY_SUBJECT:
            pairs = self._load(self.by_subject, "train", error_mm)
        else:
            pairs = self._of_groups(self._load(self.by_file, "train", error_mm), *GROUPS[split])
        return thin(pairs, self.pairs) if self.pairs else pairs

    def test_sets(self, split: str, error_mm: float = 0) -> dict[str, Pairs]:
        """The test split of a training set, if it has one, and, without an error, slices to compare all of them on.

        These are of the test subjects, and in no training set.
        """
        sets = {}
        if split == BY_SUBJECT:
            sets[OWN_TEST] = self._load(self.by_subject, "test", error_mm)
        held_out = load_pairs(self.by_file, "test")
        if split == BY_FILE:
            sets[OWN_TEST] = self._of_groups(held_out, *GROUPS[split])
        if not error_mm:
            sets[SAME_SLICES] = self._of_groups(held_out, "test")
        return sets

    def _load(self, version: Path, split: str, error_mm: float) -> Pairs:
        pairs = load_pairs(version, split)
        return displace(pairs, version, self.archives, error_mm) if error_mm else pairs

    def _of_groups(self, pairs: Pairs, *groups: str) -> Pairs:
        rows = metadata.read_manifest(self.by_subject).set_index("subject_id")["split"]
        chosen = [n for n, subject in enumerate(pairs.subjects) if rows[subject] in groups]
        return pairs.of_subjects(torch.tensor(chosen), pairs.split)


def thin(pairs: Pairs, count: int) -> Pairs:
    """`count` of the pairs, chosen at random, always the same ones."""
    kept = torch.arange(len(pairs)) if pairs.kept is None else pairs.kept
    chosen = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(SEED))[:count]
    return replace(pairs, kept=kept[chosen].sort().values)


def make_dataset(folder: Path, subjects: int, slices: int, shrink: int, workers: int) -> Dataset:
    """Simulate three groups of `subjects` and publish both versions in `folder`.

    Nobody moves between the scans, so the headers align them exactly and no registration is needed.
    """
    archives = folder / "archives"
    scans = [PhantomSubject(number + 2, "Guys", SEED, shrink=shrink) for number in range(3 * subjects)]
    simulated = parallel_map(simulate, scans, workers=workers)
    archives.mkdir(parents=True)
    for modality in DEFAULT_MODALITIES:
        pairs = zip(scans, simulated, strict=True)
        members = {f"{scan.subject_id}-{modality}.nii.gz": packed[modality] for scan, (packed, _) in pairs}
        write_tar(archives / archive_name(modality), members)

    def publish(**split: Any) -> Path:
        fields = {"registration": "none", "pictures": False, "slices": slices, **split}
        config = DatasetConfig.model_validate(fields)
        return refresh(
            RefreshConfig(root=str(folder / "data"), source=str(archives), dataset=config, workers=workers)
        ).folder

    by_subject = publish(split_by="order", split_counts=(subjects,) * 3)
    dataset = Dataset(archives, by_subject, publish(split_by="file", split=(0.5, 0.0, 0.5)))
    return replace(dataset, pairs=min(len(dataset.training_set(split)) for split in SPLITS))


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
