"""Open a published version, and read it with pandas, xarray, PyTorch or nibabel.

::

    version = ixi_etl.open_version("ixi-data", "latest")
    version.manifest                                  # pandas: one row per subject
    version.xarray()                                  # all arrays, labelled, read when they are used
    version.torch("train")                            # a torch.utils.data.Dataset of normalised slices
    version.nifti("IXI002-Guys-0828", "T2")           # a slab with its affine, for nibabel

What these return agrees: `slice` of an item of PyTorch is the index along z of xarray, and the last index of NIfTI.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ixi_etl.config import SPLITS
from ixi_etl.core.extras import require_extra
from ixi_etl.core.text import printable, quantity
from ixi_etl.dataset import manifest as manifests
from ixi_etl.dataset.schema import SCHEMAS, USED, is_absent
from ixi_etl.dataset.store import open_arrays
from ixi_etl.dataset.verify import read_verified
from ixi_etl.dataset.versions import find_version
from ixi_etl.errors import ConfigError, DatasetError, EmptySplitError

if TYPE_CHECKING:
    import nibabel as nib
    import xarray as xr
    import zarr
    from torch.utils.data import Dataset


@dataclass(frozen=True, eq=False, repr=False)
class DatasetVersion:
    """A verified version of a dataset; `open_version` opens it.

    Attributes:
        folder: where it is, locally or on S3.
        metadata: the content of `dataset.json`.
        manifest: one row per subject, used or excluded with its reason; see `docs/dataset.md` for the columns. Text is
            `str`, "" if empty; numbers are `Int64` and `Float64`, missing if empty. Copy it before you change it.
    """

    folder: Path
    metadata: Mapping[str, Any]
    manifest: pd.DataFrame

    @property
    def name(self) -> str:
        """`NAME@VERSION`, to be cited."""
        return f"{self.metadata['name']}@{self.metadata['version']}"

    def __repr__(self) -> str:
        splits = self.metadata["splits"]
        counts = ", ".join(f"{splits[split]} {split}" for split in sorted(splits, key=(*SPLITS, *splits).index))
        used = f"{self.metadata['subjects']} of {quantity(len(self.manifest), 'subject')} used ({counts})"
        return f"<{self.name}: {used}; {', '.join(self._schema.arrays)}; {self.folder}>"

    def xarray(self, *, scanner_units: bool = False) -> xr.Dataset:
        """The arrays of the store with labels, as dask arrays: nothing is read before it is computed.

        The subjects are the coordinate `subject`; `split`, `site`, `age` and `sex` are coordinates along it (of digits:
        `image`, `split`, `label`). A version split by file has the coordinate `slice_split` (subject, z) too. Variables
        are the slabs, int16 [subject, z, y, x], and their affines `t1_affine` [subject, world, voxel], from voxel
        (x, y, z, 1) to RAS+ mm. `t1_low` and `t1_high` are the values of `t1` that become -1 and 1 for a network.

        Args:
            scanner_units: give the slabs as float32 in the scanner's units; otherwise as stored, with `t1_scale` and
                `t1_offset` as coordinates: stored x scale + offset = scanner units.

        Raises:
            MissingExtraError: xarray is not installed.
            DatasetError: the store is damaged.
        """
        require_extra("xarray")
        from ixi_etl.loading.labelled import to_xarray

        return to_xarray(self.folder, self.metadata, manifests.used_rows(self.manifest), scanner_units)

    def torch(
        self, split: str, transform: Callable[[dict[str, Any]], Any] | None = None, *, direction: str | None = None
    ) -> Dataset[Any]:
        """The slices of one split as a `torch.utils.data.Dataset`, in the order of subjects, then from bottom to top.

        An item is a dictionary with a float32 tensor (1, y, x) in [-1, 1] for each array of the direction, normalised
        as for this project's own training, and with `subject_id` and `slice`, the index along z in the store. Slices in
        the margin of a version are left out, and subjects that lack one of the arrays.

        Items are read when they are asked for, from any process: the data set can be pickled, and used by the workers
        of a `DataLoader`. `model.data.load_pairs` reads a whole split into memory, which is faster to train from.

        Args:
            split: `train`, `val` or `test`.
            transform: called with each item; what it returns is the item instead.
            direction: SOURCE->TARGET or SOURCE+SOURCE->TARGET, as for training; by default that of the dataset.

        Raises:
            MissingExtraError: PyTorch is not installed.
            ConfigError: there is no such split, or the direction does not fit the dataset.
            EmptySplitError: the split has no slices.
        """
        require_extra("train", "torch")
        from ixi_etl.exports.selection import select
        from ixi_etl.loading.slices import SliceReader, make_dataset

        selection = select(self.folder, self.metadata, self.manifest, self._arrays, direction)
        counts = selection.counts()
        shown = ", ".join(f"{name} {n['subjects']} ({quantity(n['slices'], 'slice')})" for name, n in counts.items())
        if split not in counts:
            raise ConfigError(f"{self.name} has no split {printable(split)}; its splits, with subjects: {shown}")
        if not counts[split]["slices"]:
            arrays = ", ".join(selection.names)
            raise EmptySplitError(f"split {split} of {self.name} has no subject with {arrays}; subjects: {shown}")
        return make_dataset(SliceReader.of(selection, split), transform)

    def nifti(self, subject: str, modality: str) -> nib.Nifti1Image:
        """The stored slab of one scan, as an image with axes x, y, z in the scanner's units.

        It is int16 if stored values are in scanner units already (scale 1, offset 0), otherwise float32. The affine is
        that of the slab, to RAS+ mm. Pairs by index have the axes i, j, k of the scan, and each scan its own affine.

        Args:
            subject: its `subject_id`.
            modality: such as `T2`, in any case.

        Raises:
            ConfigError: the version has no such subject, or not this scan of it, or its images are no scans.
            DatasetError: the slab cannot be decoded.
        """
        import nibabel as nib

        from ixi_etl.exports.volumes import slab_header

        name, row = self._find(subject, modality)
        if f"{name}_affine" not in self._arrays:
            raise ConfigError(f"the images of {self.name} are no scans and have no affine, so they are no NIfTI images")
        affine, slab = self._read(f"{name}_affine", row, subject), self._read(name, row, subject)
        scale, offset = (float(self._read(f"{name}_{which}", row, subject)) for which in ("scale", "offset"))
        if (scale, offset) != (1, 0):
            slab = (slab * scale + offset).astype(np.float32)
        header = nib.Nifti1Header(slab_header(slab.shape, affine))
        header.set_data_dtype(slab.dtype)
        header["descrip"] = f"{name.upper()} of {subject}, {self.name}".encode()[:79]
        return nib.Nifti1Image(slab.transpose(2, 1, 0), affine, header)

    @property
    def _schema(self) -> Any:
        return SCHEMAS[self.metadata["name"]]

    @cached_property
    def _arrays(self) -> dict[str, zarr.Array[Any]]:
        return open_arrays(self.folder)

    def _find(self, subject: str, modality: str) -> tuple[str, int]:
        """The array of a modality, and the row of a subject in it."""
        name, arrays = modality.lower(), self._schema.arrays
        if name not in arrays:
            raise ConfigError(f"{self.name} has no {printable(modality)}; its arrays are {', '.join(arrays)}")
        rows = self.manifest[self.manifest["subject_id"] == subject]
        if rows.empty:
            close = difflib.get_close_matches(subject, self.manifest["subject_id"], n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "the column subject_id of its manifest has all"
            raise ConfigError(f"{self.name} has no subject {printable(subject)}; {hint}")
        row = rows.iloc[0]
        if row["status"] != USED:
            raise ConfigError(f"{subject} was excluded from {self.name}: {row['reason']} ({row['detail']})")
        if is_absent(rows, name).iloc[0]:
            has = ", ".join(other for other in arrays if not is_absent(rows, other).iloc[0])
            raise ConfigError(f"{subject} has no {modality} in {self.name}, but {has}")
        return name, int(row["store_row"])

    def _read(self, array: str, row: int, subject: str) -> NDArray[Any]:
        try:
            return np.asarray(self._arrays[array][row])
        except Exception as error:  # codecs raise many kinds on damaged bytes
            raise DatasetError(
                f"{self.folder}: cannot read {array} of {subject} ({' '.join(str(error).split())}); "
                "`ixi-etl verify --deep` lists what is damaged"
            ) from error


def open_version(root: str | Path, version: str = "latest") -> DatasetVersion:
    """Open a published version for pandas, xarray, PyTorch and nibabel, and verify its files by size and hash.

    Args:
        root: the folder or `s3://` URL that holds the versions.
        version: `latest`, a name, the unique beginning of one, `NAME@VERSION`, or the path or URL of a version's folder
            (then the root is not used).

    Raises:
        DatasetError: there is no such version, or it is damaged.
        ConfigError: there is no such dataset, or the folder does not contain a version.
    """
    folder = find_version(root, version)
    metadata, table = read_verified(folder)
    return DatasetVersion(folder, metadata, table)
