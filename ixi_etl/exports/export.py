"""Export a version for other projects: `ixi-etl export-dataset`."""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ixi_etl import __version__
from ixi_etl.core.extras import require_extra
from ixi_etl.core.files import lock_root, os_errors_as_user_errors, sha256_file, to_json
from ixi_etl.core.progress import Progress, no_progress
from ixi_etl.core.storage import expand_home, is_url, naming_file
from ixi_etl.core.text import quantity
from ixi_etl.dataset.metadata import METADATA
from ixi_etl.errors import ConfigError, DatasetError
from ixi_etl.exports.bids import Bids
from ixi_etl.exports.bids_raw import BidsRaw
from ixi_etl.exports.layout import Layout, Row
from ixi_etl.exports.nifti import Nifti
from ixi_etl.exports.pix2pix import BITS, Pix2pix
from ixi_etl.exports.selection import Selection, read_selection
from ixi_etl.exports.selfrdb import SelfRDB
from ixi_etl.exports.syndiff import SynDiff

log = logging.getLogger(__name__)

LAYOUTS: dict[str, type[Layout]] = {
    "selfrdb": SelfRDB,
    "syndiff": SynDiff,
    "pix2pix": Pix2pix,
    "nifti": Nifti,
    "bids": Bids,
    "bids-raw": BidsRaw,
}
"""Format -> its layout."""

ROWS, SUMMARY = "export.csv", "export.json"
"""Files of every export: what went where, and the export as a whole."""


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Attributes:
        counts: split -> number of `subjects`, and of `slices` or files.
        left_out: subject id -> the arrays that it lacks.
    """

    folder: Path
    version: str
    counts: Mapping[str, Mapping[str, int]]
    left_out: Mapping[str, tuple[str, ...]]


def export_dataset(
    folder: Path,
    file_format: str,
    out: str | Path,
    *,
    direction: str | None = None,
    bits: int | None = None,
    source: str | None = None,
    version: str | None = None,
    progress: Progress = no_progress,
) -> Exported:
    """Write the version in `folder` as files that another project reads; see `LAYOUTS`.

    The files are written into a folder beside `out`, which gets its name at the end, so a killed export leaves no part
    of one. Equal versions and options give equal bytes.

    Args:
        file_format: one of `LAYOUTS`.
        out: a local folder that does not exist or is empty.
        direction: SOURCE->TARGET, of the formats that hold pairs; by default that of the dataset.
        bits: of the grey levels of `pix2pix`, 8 or 16.
        source: for `bids-raw`, the archives or the folder that the version was made from; by default those that the
            root has recorded.
        version: the version's name, if its folder may have another one.

    Raises:
        ConfigError: an option is invalid, or the format cannot hold this version.
        DatasetError: the version is damaged, a scan is not the one of the version, or the disk has too little space.
        IxiError: the files cannot be written.
    """
    make_layout, every_array = _layout(file_format, bits, source, direction)
    target = _check_out(out)
    selection = read_selection(folder, direction, version, every_array=every_array)
    layout = make_layout(selection)
    layout.check()
    staging = target.with_name(f".{target.name}.exporting")
    with os_errors_as_user_errors(), naming_file(target), lock_root(staging, "-o"):
        try:
            _check_disk(staging, layout.bytes_on_disk_of(staging))
            written = staging / "files"
            shutil.rmtree(written, ignore_errors=True)  # of a killed export
            written.mkdir()
            rows = layout.write(written, progress)
            _describe(written, file_format, layout, rows)
            _move(written, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    if not layout.every_array:
        _warn(selection)
    return Exported(target, selection.version, layout.counts(), selection.left_out)


def _layout(
    file_format: str, bits: int | None, source: str | None, direction: str | None
) -> tuple[Callable[[Selection], Layout], bool]:
    """What makes the layout of a format, and whether it holds every array. Options that it lacks are refused."""
    if file_format not in LAYOUTS:
        raise ConfigError(f"there is no format {file_format}; give {', '.join(LAYOUTS)}")
    layout = LAYOUTS[file_format]
    if layout.extra:
        require_extra(layout.extra)
    if bits is not None and layout is not Pix2pix:
        raise ConfigError(f"--bits is an option of pix2pix; {file_format} has one kind of values: leave it out")
    if bits not in (None, *BITS):
        raise ConfigError(f"--bits {bits}: give {' or '.join(map(str, BITS))}")
    if source is not None and layout is not BidsRaw:
        raise ConfigError(
            f"--source is an option of bids-raw; {file_format} holds what is in the version: leave it out"
        )
    if direction is not None and layout.every_array:
        raise ConfigError(f"--direction: {file_format} holds all scans of each subject, not pairs: leave it out")
    if layout is Pix2pix:
        return functools.partial(Pix2pix, bits=bits or BITS[0]), layout.every_array
    if layout is BidsRaw:
        return functools.partial(BidsRaw, source=source), layout.every_array
    return layout, layout.every_array


def _check_out(out: str | Path) -> Path:
    """The folder of the export as an absolute path; it must not exist, or be empty."""
    if is_url(str(out)):
        raise ConfigError(f"{out} is a URL; export to a local folder, and copy it")
    target = Path(os.path.abspath(expand_home(out)))
    if target.is_dir():
        if any(target.iterdir()):
            raise ConfigError(f"{target} is not empty; give another folder, or remove it")
    elif os.path.lexists(target):
        raise ConfigError(f"{target} is a file; give a folder")
    return target


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DatasetError(
            f"{folder.parent} has {free / 1e9:.2f} GB free, but the export needs up to {needed / 1e9:.2f} GB; free some"
        )


def _move(written: Path, target: Path) -> None:
    try:
        written.rename(target)  # also onto an empty folder
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot put the export at {target} ({reason}); give another folder") from error


def _describe(folder: Path, file_format: str, layout: Layout, rows: list[Row]) -> None:
    """Write the files that every export has."""
    selection, metadata = layout.selection, layout.selection.metadata
    pd.DataFrame(rows).to_csv(folder / ROWS, index=False, lineterminator="\n")
    kept = {key: metadata[key] for key in ("credit", "licence", "preparation") if key in metadata}
    of_pairs = {
        "direction": str(selection.direction),
        "normalisation": metadata["inputs"]["config"].get("normalisation", "percentiles"),
    }
    summary = {
        "version": selection.version,
        "dataset_json_sha256": sha256_file(selection.folder / METADATA),
        "ixi-etl": __version__,
        "format": file_format,
        **({} if layout.every_array else of_pairs),
        **layout.describe(),
        "counts": layout.counts(),
        "left_out": selection.left_out,
        **kept,
    }
    (folder / SUMMARY).write_text(to_json(summary))
    (folder / layout.licence_file).write_text(
        f"Exported from {selection.version} by ixi-etl {__version__}.\n\n"
        f"Credit:  {kept.get('credit', 'not recorded')}\n"
        f"Licence: {kept.get('licence', 'not recorded')}\n"
        f"Changes: {layout.changes}. Values: {layout.values}.\n\n"
        "Pass this file on with every copy of these files.\n"
    )


def _warn(selection: Selection) -> None:
    if selection.left_out:
        names = ", ".join(selection.names)
        left_out = quantity(len(selection.left_out), "subject")
        log.warning("left out %s without one of %s: see %s", left_out, names, SUMMARY)
    empty = [split for split, counts in selection.counts().items() if not counts["slices"]]
    if empty:
        log.warning("no slice is in split %s, which most readers cannot open", " or ".join(empty))
