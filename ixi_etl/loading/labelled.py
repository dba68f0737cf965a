"""The store of a version as an `xarray.Dataset`, with what the manifest says about each subject as coordinates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ixi_etl.config import SPLITS
from ixi_etl.dataset import manifest
from ixi_etl.dataset.schema import SCHEMAS
from ixi_etl.dataset.store import STORE, fast_reading
from ixi_etl.errors import DatasetError

if TYPE_CHECKING:
    import xarray as xr

COORDINATES = ("split", "site", "age", "sex", "label")
"""Columns of the manifest that become coordinates, if the dataset has them."""


def to_xarray(folder: Path, metadata: Mapping[str, Any], used: pd.DataFrame, scanner_units: bool) -> xr.Dataset:
    """What `DatasetVersion.xarray` returns. `used` has the used subjects in the order of the store.

    Raises:
        DatasetError: the store cannot be opened, or its small arrays cannot be read.
    """
    names = SCHEMAS[metadata["name"]].arrays
    data = _open(folder / STORE, names)
    rows, depth = data[names[0]].dims[:2]
    coordinates: dict[Any, Any] = {rows: np.array(used["subject_id"], str)}
    coordinates |= {name: (rows, _plain(used[name])) for name in COORDINATES if name in used}
    for name in names:
        for end, value, stored in zip(("low", "high"), (-1, 1), manifest.intensity_ranges(used, name).T, strict=True):
            meaning = {"long_name": f"value of {name} that becomes {value} for a network"}
            coordinates[f"{name}_{end}"] = (rows, stored, meaning)
    if "slice_splits" in used:
        margin = int(metadata["inputs"]["config"].get("margin", 0))
        coordinates["slice_split"] = ((rows, depth), _splits_of_slices(used, data.sizes[depth], margin))
    scales = [f"{name}_{which}" for name in names for which in ("scale", "offset") if f"{name}_{which}" in data]
    data = data.set_coords(scales).assign_coords(coordinates)
    data.attrs.pop("subject_id", None)  # it is a coordinate
    return _in_scanner_units(data, names) if scanner_units and scales else data


def _open(path: Path, names: Sequence[str]) -> xr.Dataset:
    """The arrays of the store: the slabs as dask arrays, whose chunks are shards, and the small ones in memory."""
    import xarray as xr

    try:
        with fast_reading(path):
            data = xr.open_zarr(str(path), chunks=None, zarr_format=3, decode_cf=False)
        # Single slices, the chunks of the store, would give ten thousand tasks to a mean over all subjects.
        slabs = {name: data[name].chunk(dict(zip(data[name].dims, _shard(data[name]), strict=True))) for name in names}
        small: xr.Dataset = data.drop_vars(names).load()
        return small.assign(slabs)[[*names, *small.data_vars]]
    except Exception as error:  # zarr raises many kinds on damaged files
        message = " ".join(str(error).split()) or type(error).__name__
        raise DatasetError(f"{path} cannot be opened with xarray ({message})") from error


def _shard(array: xr.DataArray) -> tuple[int, ...]:
    return tuple(array.encoding.get("shards") or array.encoding["chunks"])


def _plain(column: pd.Series[Any]) -> NDArray[Any]:
    """A column of the manifest as an array of text, or of float64 with NaN where it is empty."""
    if pd.api.types.is_numeric_dtype(column):
        return column.to_numpy(np.float64, na_value=np.nan)
    return np.array(column, str)


def _splits_of_slices(used: pd.DataFrame, depth: int, margin: int) -> NDArray[np.str_]:
    """The split (S, `depth`) of each slice of a version that is split by file; "" in its margin."""
    splits = np.full((len(used), depth), "", f"U{max(map(len, SPLITS))}")
    for split in SPLITS:
        splits[:, margin : depth - margin][manifest.slices_in_split(used, split, depth - 2 * margin)] = split
    return splits


def _in_scanner_units(data: xr.Dataset, names: Sequence[str]) -> xr.Dataset:
    """`data` with float32 slabs and their ranges in scanner units, without the scales and offsets."""
    converted: dict[str, Any] = {}
    for name in names:
        for variable in (name, f"{name}_low", f"{name}_high"):
            values = data[variable] * data[f"{name}_scale"] + data[f"{name}_offset"]
            converted[variable] = values.astype(np.float32 if variable == name else np.float64)
            converted[variable].attrs = data[variable].attrs | {"units": "scanner units"}
    return data.assign(converted).drop_vars([f"{name}_{which}" for name in names for which in ("scale", "offset")])
