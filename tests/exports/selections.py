"""Selections made from arrays in memory: what a version with such a manifest would give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ixi_etl.exports.selection import Selection, select


def selection_of(
    arrays: Mapping[str, NDArray[Any]],
    splits: Sequence[str],
    direction: str | None = None,
    *,
    name: str = "ixi-t1-t2",
    absent: Mapping[str, Sequence[int]] | None = None,
    slice_splits: Sequence[str] | None = None,
    columns: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    every_array: bool = False,
    **config: Any,
) -> Selection:
    """The selection of a version with these arrays, [subject, z, y, x], and a split for each subject.

    Args:
        absent: array -> the rows that lack it.
        slice_splits: for each subject, the splits of its slices.
        columns: further columns of the manifest.
        metadata: further fields of `dataset.json`.
        every_array: as of `select`.
        config: fields of the version's configuration.
    """
    rows = len(splits)
    given: dict[str, Any] = {
        "subject_id": [f"IXI{n:03d}-Guys-0{n}" for n in range(rows)],
        "status": "used",
        "split": list(splits),
        "store_row": range(rows),
    }
    for array in arrays:
        given |= {f"{array}_p_low": -10.0, f"{array}_p_high": 90.0, f"{array}_scale": 1.0, f"{array}_offset": 0.0}
        is_absent = np.isin(range(rows), (absent or {}).get(array, []))
        given[f"{array}_member"] = np.where(is_absent, "", "member.nii.gz")
    if slice_splits is not None:
        given["slice_splits"] = list(slice_splits)
    table = pd.DataFrame(given | dict(columns or {}))
    target = list(arrays)[-1]
    described = {"name": name, "version": "0123456789ab", "source": next(iter(arrays)), "target": target}
    settings = ({} if name == "digits" else {"pairing": "anatomical"}) | config
    affines = {f"{array}_affine": np.tile(affine(), (rows, 1, 1)) for array in arrays}
    described |= {"inputs": {"config": settings}, **(metadata or {})}
    everything = {**arrays, **affines}
    return select(Path("version"), described, table, everything, direction, every_array=every_array)


def affine() -> NDArray[np.float64]:
    """Voxels of 1 x 2 x 3 mm, a little oblique about x."""
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(0.1), -np.sin(0.1)], [np.sin(0.1), np.cos(0.1)]]
    return turn @ np.array([[1, 0, 0, -30], [0, 2, 0, -40], [0, 0, 3, 5], [0, 0, 0, 1.0]])


def numbers(subjects: int, depth: int, height: int, width: int, seed: int = 0) -> NDArray[np.int16]:
    """An array of a store, [subject, z, y, x], with values below 0 and above 1 once normalised."""
    return np.random.default_rng(seed).integers(-30, 120, (subjects, depth, height, width)).astype(np.int16)


def expected(array: NDArray[np.int16]) -> NDArray[np.float64]:
    """Images [subject, z, row, column] of the range -10 to 90, anterior (the last y) up."""
    return np.clip((array.astype(float) + 10) / 100, 0, 1)[:, :, ::-1]
