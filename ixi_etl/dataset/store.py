"""Write and read the Zarr v3 group `slices.zarr`.

Volumes have one slice per chunk and one subject per shard; small images have many of them. Legend: N subjects; arrays
are int16 [subject, z, y, x] (`anatomical`) or [subject, k, j, i] (`index`). Values x `t1_scale` + `t1_offset` of their
subject are in scanner units. A shard is the same file whatever its row, so workers write subjects in any order, and the
shards get their rows once it is known which subjects are used. Images are uint8 [image, z, y, x] with one z.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ixi_etl.core.files import sha256_file
from ixi_etl.core.storage import is_local, naming_file
from ixi_etl.errors import DatasetError

if TYPE_CHECKING:  # functions import it: it takes 0.1 s, and a refresh of a published version opens no store
    import zarr

STORE = "slices.zarr"
IMAGES_PER_CHUNK, IMAGES_PER_SHARD = 100, 1000  # with one image of 1 KB per chunk there would be 70,000 chunks

_settings_lock = threading.Lock()  # zarr's configuration is global; arrays read it when opened
_READING = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}
# One codec thread: zarrs orders the chunks of a shard by thread timing, but equal slabs must give equal bytes. Subjects
# are written in parallel instead.
_WRITING = _READING | {"threading.max_workers": 1, "codec_pipeline.chunk_concurrent_maximum": 1}


_zarrs = {"opened": False, "forked": False}
"""Whether arrays were opened with zarrs, in this process or, before it was forked, in its parent."""


def _note_fork() -> None:
    """zarrs decodes on threads, which a forked process does not have: it would wait for them for ever."""
    _zarrs["forked"] |= _zarrs["opened"]


os.register_at_fork(after_in_child=_note_fork)


def dimension_names(pairing: str) -> tuple[str, str, str, str]:
    return ("subject", "z", "y", "x") if pairing == "anatomical" else ("subject", "k", "j", "i")


def _create(
    path: Path,
    shape: tuple[int, ...],
    dtype: str,
    chunk: tuple[int, int],
    shard: int,
    dimensions: Sequence[str],
    attributes: dict[str, Any] | None = None,
) -> zarr.Array[Any]:
    """Create an array of whole slices. `chunk` is (subjects, slices) per chunk, `shard` is subjects per shard."""
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec

    typesize = np.dtype(dtype).itemsize
    with _settings_lock, zarr.config.set(_WRITING):
        return zarr.create_array(
            path,
            shape=shape,
            dtype=dtype,
            chunks=(*chunk, *shape[2:]),
            shards=(shard, *shape[1:]),
            # Bitshuffle + LZ4 decodes fastest of the codecs measured, within 10% of Zstandard's size.
            compressors=[BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=typesize), Crc32cCodec()],
            fill_value=0,
            dimension_names=dimensions,
            attributes=attributes,
        )


def _create_slabs(
    path: Path, shape: tuple[int, ...], pairing: str, attributes: dict[str, Any] | None = None
) -> zarr.Array[Any]:
    return _create(path, shape, "int16", (1, 1), 1, dimension_names(pairing), attributes)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Convert zarrs' `RuntimeError` for a disk error back to an `OSError`, and add the path, which Zarr leaves out."""
    try:
        with naming_file(path):
            yield
    except RuntimeError as error:
        match = re.search(r"\(os error (\d+)\)", str(error))
        if not match:
            raise
        raise OSError(int(match[1]), os.strerror(int(match[1])), str(path)) from error


def write_shards(slabs: Mapping[Path, NDArray[np.int16]]) -> dict[str, str]:
    """Write slabs [z, y, x] of equal shape as shard files in one folder, each atomically; returns name -> SHA-256.

    The shards are read back and compared. They are not synced to disk: `publish` does that, and a resumed cut checks
    the hashes of existing files.

    Raises:
        DatasetError: the data read back differ from what was written.
    """
    stacked, folder = np.stack(list(slabs.values())), next(iter(slabs)).parent
    digests = {}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".shards-") as scratch:
        with _disk_errors(folder):
            array = _create_slabs(Path(scratch) / "a", stacked.shape, "anatomical")
            array[:] = stacked
        if not np.array_equal(np.asarray(array[:]), stacked):
            raise DatasetError(f"{folder}: a shard reads back differently than it was written; check the disk")
        for row, path in enumerate(slabs):
            shard = Path(scratch) / "a" / "c" / str(row) / "0" / "0" / "0"
            digests[path.name] = sha256_file(shard)
            shard.replace(path)
    return digests


def assemble(
    folder: Path,
    names: Sequence[str],
    shards: Sequence[dict[str, Path]],
    affines: Sequence[dict[str, NDArray[np.float64]]],
    slab_shape: tuple[int, ...],
    pairing: str,
    attributes: dict[str, Any],
    scales: Sequence[Mapping[str, tuple[float, float]]] = (),
    subjects: Sequence[str] = (),
) -> None:
    """Create the group in `folder` from shard files, which are hard-linked if possible, otherwise copied.

    Args:
        names: of the arrays.
        shards: for each row, array name -> shard file. A row without one has the fill value 0, and NaN elsewhere.
        affines: for each row, array name -> 4 x 4 affine, slab voxel to RAS mm.
        slab_shape: (z, y, x) of every slab.
        pairing: `anatomical` or `index`; names the dimensions.
        attributes: of the group.
        scales: for each row, array name -> (scale, offset) to scanner units; 1 and 0 if not given.
        subjects: ids of the rows.
    """
    import zarr

    all_scales = scales or [dict.fromkeys(names, (1.0, 0.0))] * len(shards)
    absent_affine, absent_scale = np.full((4, 4), np.nan), (np.nan, np.nan)
    with _disk_errors(folder):
        zarr.create_group(folder, attributes=attributes)
        for name in names:
            units = f"scanner units, times {name}_scale plus {name}_offset"
            kind = "MRA" if name == "mra" else f"{name.upper()}-weighted"
            labels = {"long_name": f"{kind} intensity", "units": units}
            _create_slabs(folder / name, (len(shards), *slab_shape), pairing, labels)
            for row, shard in enumerate(shards):
                if name not in shard:
                    continue
                target = folder / name / "c" / str(row) / "0" / "0" / "0"
                target.parent.mkdir(parents=True)
                link(shard[name], target)
            axes = ", ".join(reversed(dimension_names(pairing)[1:]))
            matrices = np.stack([affine.get(name, absent_affine) for affine in affines])
            labels = {"long_name": f"({axes}, 1) of {name} to RAS+ world (mm)", "units": "mm"}
            _write_small_array(folder / f"{name}_affine", matrices, ("subject", "world", "voxel"), labels)
            both = np.transpose([row.get(name, absent_scale) for row in all_scales])
            for which, values in zip(("scale", "offset"), both, strict=True):
                labels = {"long_name": f"{which} of {name}: stored x scale + offset = the scanner's units"}
                _write_small_array(folder / f"{name}_{which}", values, ("subject",), labels)
        _write_labels(folder, "subject", subjects)
        _consolidate(folder)


def _write_small_array(path: Path, values: NDArray[Any], dimensions: Sequence[str], attributes: dict[str, Any]) -> None:
    """Write a small float64 array in one uncompressed chunk."""
    import zarr

    zarr.create_array(
        path,
        data=np.ascontiguousarray(values, np.float64),
        chunks=values.shape,
        compressors=None,
        dimension_names=dimensions,
        attributes=attributes,
    )


def write_images(
    folder: Path,
    images: Mapping[str, NDArray[np.uint8]],
    long_names: Mapping[str, str],
    attributes: dict[str, Any],
    labels: Sequence[str] = (),
) -> None:
    """Create the group in `folder` from small images (array name -> [N, 1, y, x]). Each shard is read back.

    Args:
        long_names: array name -> its `long_name` attribute.
        attributes: of the group.
        labels: ids of the images.

    Raises:
        DatasetError: the data read back differ from what was written.
    """
    import zarr

    with _disk_errors(folder):
        zarr.create_group(folder, attributes=attributes)
        for name, values in images.items():
            dimensions = ("image", "z", "y", "x")
            label = {"long_name": long_names[name]}
            chunk, shard = (IMAGES_PER_CHUNK, 1), IMAGES_PER_SHARD
            array = _create(folder / name, values.shape, "uint8", chunk, shard, dimensions, label)
            for start in range(0, len(values), IMAGES_PER_SHARD):
                rows = slice(start, min(start + IMAGES_PER_SHARD, len(values)))
                array[rows] = values[rows]
                if not np.array_equal(np.asarray(array[rows]), values[rows]):
                    raise DatasetError(f"{folder / name} reads back differently than it was written; check the disk")
        _write_labels(folder, "image", labels)
        _consolidate(folder)


def _write_labels(folder: Path, dimension: str, labels: Sequence[str]) -> None:
    """Write a one-dimensional text array named like its dimension, which xarray reads as a coordinate.

    The type is variable-length text (`string`, codec `vlen-utf8`), which readers support. Fixed-length text has no
    specification in Zarr 3, and zarr-python warns about it.
    """
    if not labels:
        return
    import zarr

    array = zarr.create_array(
        folder / dimension,
        shape=(len(labels),),
        dtype="string",
        chunks=(len(labels),),
        compressors=None,
        dimension_names=(dimension,),
        attributes={"long_name": f"{dimension}'s id, as subject_id in the manifest"},
    )
    array[:] = np.array(labels, dtype=object)


def _consolidate(folder: Path) -> None:
    import zarr

    with warnings.catch_warnings():  # consolidated metadata is an extension of v3 that plain readers ignore
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(folder)


@contextmanager
def fast_reading(path: Path) -> Iterator[None]:
    """Arrays of the store at `path` that are opened in the block use the fast codec pipeline, if it can read them.

    It cannot read S3, and not in a forked process whose parent used it, such as a worker of a PyTorch `DataLoader`.
    There zarr-python's own pipeline reads the same values.
    """
    import zarr

    is_fast = is_local(path) and not _zarrs["forked"]
    _zarrs["opened"] |= is_fast
    with _settings_lock, zarr.config.set(_READING if is_fast else {}):
        yield


def open_arrays(version: Path) -> dict[str, zarr.Array[Any]]:
    """Open the store of a version: name -> array. A forked process has to open it again: see `fast_reading`.

    Raises:
        DatasetError: the store does not exist, or its metadata are damaged.
    """
    import zarr

    path = version / STORE
    try:
        with fast_reading(path):
            # Version 3 only, because the codecs of version 2 include pickle.
            return dict(zarr.open_group(str(path), mode="r", zarr_format=3).arrays())
    except Exception as error:  # zarr raises many kinds on damaged metadata
        message = " ".join(str(error).split()) or type(error).__name__
        raise DatasetError(f"{path} cannot be opened as a Zarr group ({message})") from error


def link(source: Path, target: Path) -> None:
    """Hard-link `source` to `target`, or copy it if the file system has no hard links."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
