"""Measure the registration on your own pairs: the error, its estimate, and the CPU time, under hard conditions::

    python -m benchmarks.registration FOLDER                        # NAME_T1.nii.gz and NAME_T2.nii.gz
    python -m benchmarks.registration FOLDER --motions 1 --conditions none,bias --out table.md

The true motion of a real pair is unknown. So each pair is registered once as it is; then known motions are put into the
affine of its T1, and the pair is made harder. The error is the mean distance, over the foreground of the middle 25 mm
of the T2, between the result and the one that must follow from the first. It contains the error of the first.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from benchmarks.conditions import CONDITIONS, Pair, foreground, to_ras
from ixi_etl.config import MAX_REGISTRATION_ERROR_MM
from ixi_etl.pairing.geometry import Matrix
from ixi_etl.pairing.heads import RegistrationError, Volume
from ixi_etl.pairing.register import mean_distance, register
from ixi_etl.testing.anatomies import find_pairs, read_scan

SLAB_MM = 25.0
MOTIONS = ((3.0, 4.0), (7.0, 8.0), (5.0, 6.0))  # degrees, mm


def rotation_about(centre: NDArray[np.float64], axis: NDArray[np.float64], angle_deg: float) -> Matrix:
    """The rotation about an axis through `centre` (Rodrigues)."""
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.deg2rad(angle_deg)
    matrix = np.eye(4)
    matrix[:3, :3] += np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    matrix[:3, 3] = centre - matrix[:3, :3] @ centre
    return matrix


def random_motion(scan: Volume, angle_deg: float, shift_mm: float, rng: np.random.Generator) -> Matrix:
    """A rotation about the centre of the volume and a shift, both in random directions."""
    middle = (np.array(scan.voxels.shape[::-1]) - 1) / 2
    centre = scan.affine[:3, :3] @ middle + scan.affine[:3, 3]
    motion = rotation_about(centre, rng.normal(size=3), angle_deg)
    direction = rng.normal(size=3)
    motion[:3, 3] += shift_mm * direction / np.linalg.norm(direction)
    return motion


def slab_points(t2: Volume) -> NDArray[np.float64]:
    """RAS mm of some foreground voxels in the middle of the T2."""
    voxels, affine = to_ras(t2)
    slices = max(2, round(SLAB_MM / float(np.linalg.norm(affine[:3, 2]))))
    start = (voxels.shape[2] - slices) // 2
    indices = np.argwhere(foreground(voxels[:, :, start : start + slices]))[::37]
    indices[:, 2] += start
    points: NDArray[np.float64] = indices @ affine[:3, :3].T + affine[:3, 3]
    return points


def measure(pair: Pair, true: Matrix, points: NDArray[np.float64]) -> dict[str, object]:
    """One registration: its error, the estimate, the flag, and its CPU time."""
    start = time.process_time()
    try:
        found = register(*pair)
    except RegistrationError:
        return {"error_mm": np.nan, "estimate_mm": np.nan, "flag": "failed", "cpu_s": time.process_time() - start}
    taken, estimate = time.process_time() - start, found.error_mm(points, found.fixed_to_moving)
    flags = ["uncertain"] * (estimate > MAX_REGISTRATION_ERROR_MM) + ["mirrored"] * found.is_mirrored
    error_mm = mean_distance(found.fixed_to_moving, true, points)
    return {"error_mm": error_mm, "estimate_mm": estimate, "flag": ",".join(flags), "cpu_s": taken}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--conditions", default=",".join(CONDITIONS), help="separated by commas")
    parser.add_argument("--motions", type=int, default=len(MOTIONS), help="number of motions of each pair")
    parser.add_argument("--out", type=Path, help="also write every case to this CSV file")
    given = parser.parse_args()
    rows = []
    for name, paths in find_pairs(given.folder).items():
        t1, t2 = read_scan(paths["T1"]), read_scan(paths["T2"])
        points, reference = slab_points(t2), register(t1, t2).fixed_to_moving
        for condition in given.conditions.split(","):
            for number, (angle_deg, shift_mm) in enumerate(MOTIONS[: given.motions]):
                rng = np.random.default_rng([*name.encode(), *condition.encode(), number])
                harder = CONDITIONS[condition]((t1, t2), rng)
                motion = random_motion(harder[0], angle_deg, shift_mm, rng)
                moved = Volume(harder[0].voxels, motion @ harder[0].affine), harder[1]
                row = {"pair": name, "condition": condition, "degrees": angle_deg, "mm": shift_mm}
                rows.append(row | measure(moved, motion @ reference, points))
                print(" ".join(f"{k}={v:.2f}" if isinstance(v, float) else f"{k}={v}" for k, v in rows[-1].items()))
    table = pd.DataFrame(rows)
    if given.out:
        table.to_csv(given.out, index=False)
    print(
        table.groupby(["pair", "condition"], sort=False)[["error_mm", "estimate_mm", "cpu_s"]]
        .max()
        .round(2)
        .to_string()
    )
    print("rank correlation of estimate and error:", round(table["error_mm"].corr(table["estimate_mm"], "spearman"), 2))
    missed = table[(table["error_mm"] > MAX_REGISTRATION_ERROR_MM) & (table["flag"] == "")]
    print(f"{len(table)} cases; over {MAX_REGISTRATION_ERROR_MM:g} mm without a flag: {len(missed)}")


if __name__ == "__main__":
    main()
