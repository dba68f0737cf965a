"""The Zarr v3 group `slices.zarr`: of volumes one slice a chunk and one subject a shard; of small images many.

Legend: N subjects; arrays are [subject, z, y, x] (`anatomical`) or [subject, k, j, i] (`index`), int16; times
`t1_scale` plus `t1_offset` of their subject they are in the scanner's units. A subject's shard is the same file
whatever its row, so subjects are written in any order, by any number of workers, and put in their rows when it is known
who is used. Images are [image, z, y, x] with one z, uint8.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from ixi_etl.errors import DatasetError
from ixi_etl.files import sha256_file
from ixi_etl.places import is_local, naming

STORE = "slices.zarr"
IMAGES_A_CHUNK, IMAGES_A_SHARD = 100, 1000  # a chunk of one image of 1 KB would be 70,000 chunks

_settings_lock = threading.Lock()  # zarr's configuration is global to the process; arrays take it when opened
_READING = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}
# One codec thread: zarrs orders the chunks of a shard by thread timing, and the same slab must give the same bytes.
# Subjects are what runs in parallel.
_WRITING = _READING | {"threading.max_workers": 1, "codec_pipeline.chunk_concurrent_maximum": 1}


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
    """An array of whole slices: `chunk` is (subjects, slices) of a chunk, `shard` the subjects of a shard."""
    typesize = np.dtype(dtype).itemsize
    with _settings_lock, zarr.config.set(_WRITING):
        return zarr.create_array(
            path,
            shape=shape,
            dtype=dtype,
            chunks=(*chunk, *shape[2:]),
            shards=(shard, *shape[1:]),
            # Bitshuffle + LZ4 decodes fastest of what was measured, and is within 10% of Zstandard's size.
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
    """Of an error of the disk zarrs makes a `RuntimeError`; this makes it an `OSError` again. Zarr's names no file."""
    try:
        with naming(path):
            yield
    except RuntimeError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if not found:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def write_shards(slabs: Mapping[Path, NDArray[np.int16]]) -> dict[str, str]:
    """Write slabs [z, y, x] of one shape as shard files in one folder, each whole or not at all; their names' SHA-256.

    They are read back. Nothing is said of whether they would outlive a power cut: publishing waits for that, and a cut
    that goes on looks at the hashes of what it finds.

    Raises:
        DatasetError: what was read back is not what was written.
    """
    together, folder = np.stack(list(slabs.values())), next(iter(slabs)).parent
    digests = {}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".shards-") as scratch:
        with _disk_errors(folder):
            array = _create_slabs(Path(scratch) / "a", together.shape, "anatomical")
            array[:] = together
        if not np.array_equal(np.asarray(array[:]), together):
            raise DatasetError(f"{folder}: a shard does not read back as it was written; is the disk sound?")
        for row, path in enumerate(slabs):
            shard = Path(scratch) / "a" / "c" / str(row) / "0" / "0" / "0"
            digests[path.name] = sha256_file(shard)
            shard.replace(path)
    return digests


def assemble(
    folder: Path,
    shards: Sequence[dict[str, Path]],
    affines: Sequence[dict[str, NDArray[np.float64]]],
    slab_shape: tuple[int, ...],
    pairing: str,
    attributes: dict[str, Any],
    scales: Sequence[Mapping[str, tuple[float, float]]] = (),
    subjects: Sequence[str] = (),
) -> None:
    """Make the group in `folder`: `shards[row]` and `affines[row]` hold array name -> shard file and 4 x 4 affine.

    `scales[row]` holds array name -> (scale, offset) to the scanner's units; without them these are 1 and 0. Shards are
    hard-linked where the file system can, else copied. `subjects` names the rows.
    """
    names = list(shards[0])
    given = scales or [dict.fromkeys(names, (1.0, 0.0))] * len(shards)
    with _disk_errors(folder):
        zarr.create_group(folder, attributes=attributes)
        for name in names:
            units = f"scanner units, times {name}_scale plus {name}_offset"
            said = {"long_name": f"{name.upper()}-weighted intensity", "units": units}
            _create_slabs(folder / name, (len(shards), *slab_shape), pairing, said)
            for row, shard in enumerate(shards):
                target = folder / name / "c" / str(row) / "0" / "0" / "0"
                target.parent.mkdir(parents=True)
                link(shard[name], target)
            axes = ", ".join(reversed(dimension_names(pairing)[1:]))
            matrices = np.stack([affine[name] for affine in affines])
            said = {"long_name": f"({axes}, 1) of {name} to RAS+ world (mm)", "units": "mm"}
            _write_beside(folder / f"{name}_affine", matrices, ("subject", "world", "voxel"), said)
            for which, values in zip(("scale", "offset"), np.transpose([of[name] for of in given]), strict=True):
                said = {"long_name": f"{which} of {name}: stored x scale + offset = the scanner's units"}
                _write_beside(folder / f"{name}_{which}", values, ("subject",), said)
        _write_labels(folder, "subject", subjects)
        _consolidate(folder)


def _write_beside(path: Path, values: NDArray[Any], dimensions: Sequence[str], attributes: dict[str, Any]) -> None:
    """A small array, in one chunk."""
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
    """Make the group in `folder` of small images: array name -> [N, 1, y, x]. Each shard is read back.

    `labels` names the images.

    Raises:
        DatasetError: what was read back is not what was written.
    """
    with _disk_errors(folder):
        zarr.create_group(folder, attributes=attributes)
        for name, values in images.items():
            dimensions = ("image", "z", "y", "x")
            said = {"long_name": long_names[name]}
            array = _create(folder / name, values.shape, "uint8", (IMAGES_A_CHUNK, 1), IMAGES_A_SHARD, dimensions, said)
            for start in range(0, len(values), IMAGES_A_SHARD):
                rows = slice(start, min(start + IMAGES_A_SHARD, len(values)))
                array[rows] = values[rows]
                if not np.array_equal(np.asarray(array[rows]), values[rows]):
                    raise DatasetError(f"{folder / name} does not read back as it was written; is the disk sound?")
        _write_labels(folder, "image", labels)
        _consolidate(folder)


def _write_labels(folder: Path, dimension: str, labels: Sequence[str]) -> None:
    """Write a one-dimensional array of text that bears its dimension's name: xarray's way to a coordinate.

    Text of any length (`string`, codec `vlen-utf8`): the type that readers know; text of fixed length has no
    specification in Zarr 3, and zarr-python warns of it.
    """
    if not labels:
        return
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
    with warnings.catch_warnings():  # consolidated metadata is an extension of v3, which plain readers pass over
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(folder)


def open_arrays(version: Path) -> dict[str, zarr.Array[Any]]:
    """Name -> array of a version's store, to be read through the fast codec pipeline, which reads local files only.

    Raises:
        DatasetError: there is no such store, or its metadata are damaged.
    """
    path = version / STORE
    try:
        with _settings_lock, zarr.config.set(_READING if is_local(path) else {}):
            # Version 3 alone: the codecs of version 2 include pickle.
            return dict(zarr.open_group(str(path), mode="r", zarr_format=3).arrays())
    except Exception as error:  # zarr raises what comes, on damaged metadata
        said = " ".join(str(error).split()) or type(error).__name__
        raise DatasetError(f"{path} cannot be opened as a Zarr group ({said})") from error


def shards_of(version: Path, array: zarr.Array[Any], rows: Iterable[int]) -> list[Path]:
    """The files of a version in which rows of an array lie, each once, in their order."""
    height = (array.shards or array.chunks)[0]
    numbers = sorted({row // height for row in rows})
    return [version / STORE / array.basename / array.metadata.encode_chunk_key((n, 0, 0, 0)) for n in numbers]


def read_ahead(paths: Iterable[Path]) -> None:
    """Have the system read files of this machine into its own memory, one after another, where it can; raises nothing.

    While one is decoded the next ones come from the disk. A copy to nowhere moves no bytes in memory.
    """
    with open(os.devnull, "wb") as nowhere:
        for path in paths:
            with suppress(OSError), path.open("rb") as file:  # whoever needs the file will say what ails it
                os.sendfile(nowhere.fileno(), file.fileno(), 0, path.stat().st_size)


def link(source: Path, target: Path) -> None:
    """Give `source` a second name; where the file system has no hard links, a copy."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
