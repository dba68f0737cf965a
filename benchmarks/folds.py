"""Train generators on your own pairs, leaving out one person at a time, and measure each on that person::

    python -m benchmarks.folds FOLDER --out OUT                  # NAME_T1.nii.gz and NAME_T2.nii.gz
    python -m benchmarks.folds FOLDER --out OUT --person 'p\\d+' --steps 1600

1. Scans are smoothed to the voxel size of a common grid along the axes on which they are finer. The T2s are then
   interpolated onto it: equal pixels and slice distances, along the axes and about the centre of each scan.
2. The pairs become archives with the person in each name, of which `ixi_etl.recipes.ixi.refresh` makes a version: the
   T1s are registered and interpolated onto the slices of the T2s.
3. For each person, the project's training step and plain PyTorch (`benchmarks/reference.py`) train on all others: from
   equal weights, on the same batches, with the published recipe at a smaller width.
4. Both are measured on the person as `ixi-etl evaluate` does, beside its baselines.

All sessions of a person are left out together. Their scores are averaged, so a person counts once. OUT receives
`scores.csv`, `summary.csv`, `comparison.csv` and a folder `sheets`.
"""

from __future__ import annotations

import argparse
import gzip
import re
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from benchmarks import reference
from benchmarks.conditions import from_ras, to_ras
from benchmarks.training import copy_weights
from ixi_etl.config import DatasetConfig, RefreshConfig
from ixi_etl.core.parallel import usable_cores
from ixi_etl.dataset import metadata
from ixi_etl.dataset.splits import person_of
from ixi_etl.errors import BadVolumeError, ConfigError
from ixi_etl.modalities import DEFAULT_MODALITIES, archive_name
from ixi_etl.pairing.geometry import sampling_matrix, trilinear
from ixi_etl.pairing.heads import Volume
from ixi_etl.recipes.ixi import refresh
from ixi_etl.scans.nifti import read_volume
from ixi_etl.testing.anatomies import find_pairs
from ixi_etl.testing.phantom import write_tar
from model.baselines import baselines
from model.config import TrainConfig, preset
from model.data import Pairs, draw_batch, load_pairs
from model.devices import default_precision, keep_freed_memory
from model.evaluate import GENERATED, compare, measure, summarise
from model.generator import Predictor, as_predictor
from model.protocols import MAIN_MEASURES
from model.samples import draw_samples
from model.trainer import Trainer

PERSON = "[^_]+"
"""By default the person is what precedes the first underscore: `sub-01` of `sub-01_ses-2_T1w.nii.gz`."""

REFERENCE = "plain PyTorch"
WITH_DROPOUT = "{}, dropout on"  # as the publication generates
FWHM_TO_SIGMA = 1 / np.sqrt(8 * np.log(2))
PROGRESS_LINES = 10  # of each fold


@dataclass(frozen=True)
class Grid:
    """The common grid of the T2s: `side` x `side` pixels of `pixel_mm`, and slices `slice_mm` apart."""

    side: int
    pixel_mm: float
    slice_mm: float

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Along x, y, z."""
        return self.pixel_mm, self.pixel_mm, self.slice_mm


def smooth(scan: Volume, grid: Grid) -> Volume:
    """The scan, turned to RAS, with a Gaussian along each axis on which it is finer than the grid.

    A voxel is taken for a profile whose full width at half maximum is its size; widths add up in squares.
    """
    voxels, affine = to_ras(scan)
    own_mm = np.linalg.norm(affine[:3, :3], axis=0)
    sigma_mm = FWHM_TO_SIGMA * np.sqrt(np.maximum(0, np.square(grid.spacing_mm) - own_mm**2))
    return from_ras(gaussian_filter(voxels, sigma_mm / own_mm, mode="nearest"), affine)


def to_grid(scan: Volume, grid: Grid) -> Volume:
    """A smoothed scan, interpolated onto the grid about its centre; its world positions stay. Outside it is 0."""
    shape_xyz = np.array(scan.voxels.shape[::-1])
    own_mm = np.linalg.norm(scan.affine[:3, :3], axis=0)
    grid_xyz = np.array([grid.side, grid.side, round(shape_xyz[2] * own_mm[2] / grid.slice_mm)])
    affine = scan.affine.copy()
    affine[:3, :3] *= grid.spacing_mm / own_mm
    affine[:3, 3] += scan.affine[:3, :3] @ ((shape_xyz - 1) / 2) - affine[:3, :3] @ ((grid_xyz - 1) / 2)
    matrix = sampling_matrix(affine, scan.affine, np.eye(4))
    return Volume(trilinear(scan.voxels, matrix, tuple(grid_xyz.tolist()[::-1])), affine)


def read(path: Path) -> tuple[Volume, int]:
    """A scan in scanner units, and the code of its space.

    Raises:
        ConfigError: the file is not a usable volume.
    """
    try:
        header, stored = read_volume(path.read_bytes())
    except BadVolumeError as error:
        raise ConfigError(f"{path}: {error.detail}; remove this pair") from None
    assert header.affine is not None
    return Volume(header.scaled(stored).astype(np.float32), header.affine), header.space


def pack(scan: Volume, space: int) -> bytes:
    image = nib.Nifti1Image(scan.voxels.T, scan.affine)
    image.set_sform(scan.affine, space)
    return gzip.compress(image.to_bytes(), 2, mtime=0)


def median_slice_mm(folder: Path) -> float:
    """The median distance between the slices of the T2s."""
    affines = (to_ras(read(paths["T2"])[0])[1] for paths in find_pairs(folder).values())
    return round(float(np.median([np.linalg.norm(affine[:3, 2]) for affine in affines])), 3)


def write_archives(folder: Path, person_pattern: str, grid: Grid, archives: Path) -> None:
    """Write `IXI-T1.tar` and `IXI-T2.tar`, with members named `PERSON-pairs-NAME-T1.nii.gz`.

    A name in which `person_pattern` does not occur is left out, with a message.
    """
    members: dict[str, dict[str, bytes]] = {m: {} for m in DEFAULT_MODALITIES}
    for name, paths in find_pairs(folder).items():
        person = re.search(person_pattern, name)
        if person is None:
            print(f"{name}: left out, because {person_pattern} is not in the name")
            continue
        subject_id = "-".join(re.sub(r"[^A-Za-z0-9.]", "_", word) for word in (person[0], "pairs", name))
        for modality in DEFAULT_MODALITIES:
            scan, space = read(paths[modality])
            scan = smooth(scan, grid)
            scan = to_grid(scan, grid) if modality == "T2" else scan
            members[modality][f"{subject_id}-{modality}.nii.gz"] = pack(scan, space)
    archives.mkdir(parents=True, exist_ok=True)
    for modality, named in members.items():
        write_tar(archives / archive_name(modality), named)


def make_version(archives: Path, root: Path, slices: int, margin: int = 0) -> Path:
    """The folder of the version with the middle `slices` of each pair and a margin, all in the training split."""
    dataset = DatasetConfig(depth="any", slices=slices, split=(1.0, 0.0, 0.0), margin=margin)
    version = refresh(RefreshConfig(root=str(root), source=str(archives), dataset=dataset)).folder
    columns = ["subject_id", "status", "reason", "flags", "motion_mm", "registration_error_mm", "nmi_after"]
    print(metadata.read_manifest(version)[columns].to_string(index=False))
    return version


def people_of(pairs: Pairs) -> list[str]:
    return sorted({person_of(subject) for subject in pairs.subjects})


def split_fold(pairs: Pairs, person: str) -> tuple[Pairs, Pairs]:
    """The pairs of all others, to train on, and those of `person`, to test on."""
    of_person = np.array([person_of(subject) == person for subject in pairs.subjects])
    train, test = (torch.from_numpy(np.flatnonzero(mask)) for mask in (~of_person, of_person))
    return pairs.of_subjects(train, "train"), pairs.of_subjects(test, "test")


def run_fold(person: str, version: Path, config: TrainConfig, out: Path) -> pd.DataFrame:
    """Train on all others, draw the sheet of `person`, and return the scores: a row per session, method and mask."""
    train, test = split_fold(load_pairs(version, "train"), person)
    assert config.side is not None
    ours, theirs = Trainer(config, torch.device("cpu")), reference.Trainer(config.side, config.width, "instance")
    copy_weights(ours, theirs)
    start = time.perf_counter()
    for step in range(config.steps):
        source, target = draw_batch(train, config, step * config.batch_size)
        losses = ours.step(source, target, config.lr_at(step))
        theirs_l1 = theirs.step(source, target).l1
        if (step + 1) % max(1, config.steps // PROGRESS_LINES) == 0:
            seconds = time.perf_counter() - start
            l1 = f"L1 {losses[5]:.3f}, {REFERENCE} {theirs_l1:.3f}"
            print(f"{person}: step {step + 1} of {config.steps}, {l1}, {seconds:.0f} s", flush=True)
    draw_samples(ours.generator, test, out / "sheets" / person, f"without-{person}")
    methods = {
        GENERATED: as_predictor(ours.generator),
        WITH_DROPOUT.format(GENERATED): as_predictor(ours.generator, dropout=True),
        REFERENCE: reference_predictor(theirs, dropout=False),
        WITH_DROPOUT.format(REFERENCE): reference_predictor(theirs, dropout=True),
    }
    return measure(test, methods | baselines(train), protocols=("ours",))


def reference_predictor(trainer: reference.Trainer, *, dropout: bool) -> Predictor:
    """Its instance norm has no running statistics, so the mode of the network is that of the dropout alone."""

    def predict(source: Tensor, _position: Tensor) -> Tensor:
        generated: Tensor = trainer.generator.train(dropout)(source)
        return generated

    return predict


def average_sessions(scores: pd.DataFrame) -> pd.DataFrame:
    """A row per person, method and mask: the mean over the sessions of the person."""
    people = scores.assign(subject_id=scores["subject_id"].map(person_of), protocol="ours")
    keys = ["subject_id", "protocol", "method", "mask"]
    return people.groupby(keys, sort=False)[list(MAIN_MEASURES)].mean().reset_index()


def by_person(people: pd.DataFrame) -> pd.DataFrame:
    """The scores of `average_sessions`: a row per mask, measure and method, and a column per person."""
    rows = people.melt(["subject_id", "method", "mask"], list(MAIN_MEASURES), var_name="measure")
    return rows.pivot_table("value", ["mask", "measure", "method"], "subject_id", sort=False)


def start_worker() -> None:
    """Prepare a process for one core: two folds on a core each are faster than one after the other on both."""
    torch.set_num_threads(1)
    keep_freed_memory()


def run_folds(version: Path, config: TrainConfig, out: Path, workers: int) -> pd.DataFrame:
    """The scores of all folds (`run_fold`), `workers` of them at a time; also written to `scores.csv`.

    Raises:
        ConfigError: there is only one person.
    """
    people = people_of(load_pairs(version, "train"))
    if len(people) < 2:
        raise ConfigError(f"all pairs are of the person {people[0]}; give pairs of two or more, or another --person")
    fold = partial(run_fold, version=version, config=config, out=out)
    if workers == 1:
        scores = pd.concat(map(fold, people))
    else:
        with ProcessPoolExecutor(workers, get_context("spawn"), start_worker) as pool:
            scores = pd.concat(pool.map(fold, people))
    scores.to_csv(out / "scores.csv", index=False)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the pairs")
    parser.add_argument("--out", type=Path, default=Path("folds"), help="folder to write into")
    parser.add_argument("--person", default=PERSON, help="regular expression: the person in a name; %(default)s")
    parser.add_argument("--side", type=int, default=256, help="pixels of the slices, a power of two; %(default)s")
    parser.add_argument("--pixel-mm", type=float, default=0.9375, help="%(default)s")
    parser.add_argument("--slice-mm", type=float, help="distance between slices; by default the median of the T2s")
    parser.add_argument("--slices", type=int, default=20, help="of each pair, in the middle of the T2; %(default)s")
    parser.add_argument("--steps", type=int, default=1600, help="of one pair each; %(default)s")
    parser.add_argument("--width", type=int, default=16, help="of both networks, published: 64; %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=usable_cores(), help="folds at a time; %(default)s")
    given = parser.parse_args()
    keep_freed_memory()
    grid = Grid(given.side, given.pixel_mm, given.slice_mm or median_slice_mm(given.folder))
    write_archives(given.folder, given.person, grid, given.out / "archives")
    version = make_version(given.out / "archives", given.out / "data", given.slices)
    settings = {"width": given.width, "discriminator_width": given.width, "side": given.side, "seed": given.seed}
    config = preset("paper", steps=given.steps, device="cpu", precision=default_precision("cpu"), **settings)
    scores = run_folds(version, config, given.out, given.workers)
    people = average_sessions(scores)
    summary, comparison = summarise(people), compare(people)
    summary.to_csv(given.out / "summary.csv", index=False)
    comparison.to_csv(given.out / "comparison.csv", index=False)
    for table in (by_person(people), summary.set_index(["mask", "method"]), comparison):
        print(table.round(3).to_string())


if __name__ == "__main__":
    main()
