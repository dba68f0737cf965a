"""Verify a version: files, hashes, schema, counts, and optionally every voxel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ixi_etl.core.files import sha256_file
from ixi_etl.core.progress import Progress, no_progress
from ixi_etl.core.storage import file_sizes, read_bytes
from ixi_etl.core.text import printable, quantity
from ixi_etl.dataset import manifest
from ixi_etl.dataset.command import how_to_make
from ixi_etl.dataset.metadata import (
    COMPARED,
    COMPARED_PAGE,
    MANIFEST,
    METADATA,
    PAGE_DIGEST,
    POINTER,
    SOFTWARE,
    UNHASHED,
    parse_with_digest,
    published_digest,
    read_manifest_of,
    read_metadata,
    version_name,
)
from ixi_etl.dataset.normalisation import mean_ranges, measure_slab
from ixi_etl.dataset.schema import SCHEMAS, is_absent
from ixi_etl.dataset.store import open_arrays
from ixi_etl.dataset.versions import log
from ixi_etl.errors import DatasetError
from ixi_etl.scans.intensity import percentiles

ALWAYS_HASHED = (MANIFEST, "zarr.json")  # small files that describe all others


def verify(
    folder: Path, *, version: str | None = None, deep: bool = False, progress: Progress = no_progress
) -> list[str]:
    """The problems of a version, one line each; an empty list if it is intact.

    The default checks are that every file exists with its size, that the manifest and the store's metadata have their
    SHA-256, that the manifest is valid, and that counts agree. `dataset.json` is checked against its own SHA-256, and
    against that in `latest.json` beside the version, if any. Foreign files, such as those of a file manager, cause a
    warning, not a problem.

    Args:
        version: its name, if the folder has another one.
        deep: also check the SHA-256 of every file, decode every chunk (which checks its CRC-32C), and compare the
            percentiles of every slab, and its range if it has another normalisation, with the manifest.
    """
    try:
        metadata = read_metadata(folder)
    except DatasetError as error:
        return [str(error)]
    return _verify(folder, metadata, version or folder.name, deep, progress, unhashed=True)[0]


def verify_files(folder: Path, *, unhashed: bool = True) -> list[str]:
    """The problems of the files of a version, one line each: whether they are those that were published.

    These are the default checks of `verify` that need only sizes and hashes: the size of every file, and the SHA-256 of
    `dataset.json`, the manifest and the store's metadata. The manifest's rules were checked when the version was
    published, and hold while its hash does. Only `verify` with `deep`
    finds a chunk that changed and kept its size.

    Args:
        unhashed: also check the `UNHASHED` files, on which no data depend.
    """
    try:
        return _file_problems(folder, read_metadata(folder), folder.name, unhashed=unhashed)
    except DatasetError as error:
        return [str(error)]


def read_verified(folder: Path, version: str | None = None) -> tuple[dict[str, Any], pd.DataFrame]:
    """Read the metadata and manifest of a version, and check that `verify` finds no problem in its data.

    Damage of the `UNHASHED` files is no reason not to read the data.

    Args:
        version: its name, if the folder has another one.

    Raises:
        DatasetError: the first problem, with the command that repairs it.
    """
    metadata = read_metadata(folder)
    problems, table = _verify(folder, metadata, version or folder.name)
    if problems or table is None:
        raise DatasetError(f"{problems[0]}; {how_to_make(metadata)} makes the version again")
    return metadata, table


def _verify(
    folder: Path,
    metadata: Mapping[str, Any],
    version: str,
    deep: bool = False,
    progress: Progress = no_progress,
    *,
    unhashed: bool = False,
) -> tuple[list[str], pd.DataFrame | None]:
    """The problems, and the manifest if it could be read."""
    problems = _file_problems(folder, metadata, version, deep, progress, unhashed=unhashed)
    names, schema = (metadata["source"], metadata["target"]), SCHEMAS[metadata["name"]]
    if names[0] == names[1] or not set(names) <= set(schema.arrays):
        problems.append(
            f"{folder / METADATA} is damaged: {names[0]} and {names[1]} are not arrays of {metadata['name']}"
        )
        return problems, None
    table = None
    try:
        table = read_manifest_of(folder, schema)
        used, config = manifest.used_rows(table), metadata["inputs"]["config"]
        problems += _verify_store(folder, schema.arrays, used, config, deep, progress)
        if not manifest.counts(table, schema).items() <= metadata.items():
            problems.append(f"{folder / MANIFEST} does not give the counts in {METADATA}")
    except DatasetError as error:
        problems.append(str(error))
    return problems, table


def _file_problems(
    folder: Path,
    metadata: Mapping[str, Any],
    version: str,
    deep: bool = False,
    progress: Progress = no_progress,
    *,
    unhashed: bool,
) -> list[str]:
    """Missing files, wrong sizes and hashes, and a name that is not the hash of the inputs."""
    problems = []
    sizes = file_sizes(folder)
    for done, (name, known) in enumerate(metadata["files"].items(), 1):
        if name not in sizes:
            problems.append(f"{folder / name} is missing")
        elif sizes[name] != known["size"]:
            problems.append(f"{folder / name} has {sizes[name]} bytes, not {known['size']}")
        elif (deep or name.endswith(ALWAYS_HASHED)) and sha256_file(folder / name) != known["sha256"]:
            problems.append(f"{folder / name} is damaged: its SHA-256 is not the one in {METADATA}")
        progress("verify files", done, len(metadata["files"]), "files")
    _warn_of_foreign_files(folder, sizes.keys() - metadata["files"].keys() - {METADATA, *UNHASHED})
    problems += _unhashed_problems(folder, sizes, metadata) if unhashed else []
    known_digest = published_digest(folder)
    if known_digest and known_digest != sha256_file(folder / METADATA):
        problems.append(f"{folder / METADATA} is not the file that was published: {POINTER} has another SHA-256 of it")
    if not version_name(metadata["inputs"]) == metadata["version"] == version:
        problems.append(
            f"{folder / METADATA} is damaged: its version is not its folder's name, or not the hash of its inputs"
        )
    return problems


def _unhashed_problems(folder: Path, sizes: Mapping[str, int], metadata: Mapping[str, Any]) -> list[str]:
    """Damage of the files that may differ between equal versions.

    They may be missing, but not `compared.json` of a version with checks: it says whether the hand-off is held.
    """
    content = {n: parse_with_digest(read_bytes(folder / n)) for n in (SOFTWARE, COMPARED) if n in sizes}
    damaged = [name for name, fields in content.items() if fields is None]
    problems = [f"{folder / name} is damaged: it does not have the SHA-256 that it holds" for name in damaged]
    if COMPARED not in content and "checks" in metadata:
        problems.append(f"{folder / COMPARED} is missing")
    if compared := content.get(COMPARED):
        if COMPARED_PAGE not in sizes:
            problems.append(f"{folder / COMPARED_PAGE} is missing")
        elif sha256_file(folder / COMPARED_PAGE) != compared.get(PAGE_DIGEST):
            problems.append(f"{folder / COMPARED_PAGE} is damaged: its SHA-256 is not the one in {COMPARED}")
    return problems


def _warn_of_foreign_files(folder: Path, names: Iterable[str]) -> None:
    foreign = sorted(map(printable, names))
    if foreign:
        shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        log.warning("%s: ignored files that do not belong to the version: %s", folder, shown)


def _verify_store(
    folder: Path,
    names: Sequence[str],
    used: pd.DataFrame,
    config: Mapping[str, Any],
    deep: bool,
    progress: Progress,
) -> list[str]:
    problems = []
    arrays = open_arrays(folder)
    for column in (f"{name}_{kind}" for name in names for kind in ("scale", "offset") if f"{name}_{kind}" in used):
        array = arrays.get(column)
        values = used[column].to_numpy("float64", na_value=np.nan)
        if array is None or not np.array_equal(np.asarray(array), values, equal_nan=True):
            problems.append(f"{folder}: array {column} differs from the manifest's column")
    for name in names:
        array = arrays.get(name)
        if array is None or len(array.shape) != 4 or array.shape[0] != len(used):
            problems.append(
                f"{folder}: array {name} does not hold the {quantity(len(used), 'used subject')} of the manifest"
            )
            continue
        if "slice_splits" in used:
            targets = array.shape[1] - 2 * config.get("margin", 0)
            wrong = used.loc[used["slice_splits"].str.count(",") + 1 != targets, "subject_id"].tolist()
            problems += [f"{folder}: {s} does not have a split for each of its {targets} slices" for s in wrong]
        shards = range(0, array.shape[0], (array.shards or array.chunks)[0]) if deep else range(0)
        measured: dict[str, tuple[float, ...]] = {}
        for start in shards:
            rows = used.iloc[start : start + shards.step]
            stop = start + len(rows)
            subjects = rows["subject_id"].tolist()
            try:
                slabs = np.asarray(array[start:stop])
                low_high = percentiles(slabs)
            except Exception as error:  # codecs raise many kinds on damaged bytes
                affected = subjects[0] if len(rows) == 1 else f"{subjects[0]} to {subjects[-1]}"
                problems.append(f"{folder}: {name} of {affected} cannot be decoded ({error})")
                continue
            in_manifest = rows[[f"{name}_p_low", f"{name}_p_high"]].to_numpy("float64", na_value=np.nan)
            differs = (low_high != in_manifest).any(axis=1) & ~is_absent(rows, name).to_numpy()
            wrong = [subject for subject, differ in zip(subjects, differs, strict=True) if differ]
            problems += [f"{folder}: {name} of {s} does not have the manifest's percentiles" for s in wrong]
            if f"{name}_low" in used:
                scales = rows[[f"{name}_scale", f"{name}_offset"]].to_numpy("float64", na_value=np.nan)
                for subject, slab, scale in zip(subjects, slabs, scales.tolist(), strict=True):
                    measured[subject] = measure_slab(slab, *scale)
            progress(f"verify {name}", stop, array.shape[0], "subjects")
        if measured.keys() == set(used["subject_id"]):
            problems += _verify_ranges(folder, name, used, np.array(list(measured.values())), config["normalisation"])
    return problems


def _verify_ranges(
    folder: Path, name: str, used: pd.DataFrame, measured: NDArray[np.float64], normalisation: str
) -> list[str]:
    """Compare the columns `_low` and `_high` with those of the slabs, of which (N, 4) values were measured."""
    expected = measured[:, :2]
    present = ~is_absent(used, name).to_numpy()
    if normalisation == "mean":
        scale = used[[f"{name}_scale", f"{name}_offset"]].to_numpy("float64", na_value=np.nan)
        expected = np.full_like(expected, np.nan)
        expected[present] = mean_ranges(*measured[present, 2:].T, *scale[present].T)
    in_manifest = manifest.intensity_ranges(used, name)
    differs = present & ~np.isclose(expected, in_manifest, rtol=1e-12, atol=0).all(axis=1)
    return [f"{folder}: {name} of {s} does not have the manifest's range" for s in used.loc[differs, "subject_id"]]
