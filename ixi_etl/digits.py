"""MNIST as a version of the dataset `digits`, a warm-up for training: from the outline of a digit, the digit.

Legend: N images. Those of the files are [N, 28, 28]; the arrays of the store, `sketch` and `digit`, are [N, 1, 32, 32].
All are uint8, with y downwards as in the files.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ixi_etl import catalog, dataset, manifest, publish, store
from ixi_etl.config import DigitsConfig
from ixi_etl.download import Acquired, acquire
from ixi_etl.errors import ArchiveError, DatasetError
from ixi_etl.files import Progress, disk_errors_in_a_line, lock_root, silent, write_atomic
from ixi_etl.intensity import percentiles
from ixi_etl.places import filesystem_of, naming
from ixi_etl.publish import Refreshed
from ixi_etl.schema import DIGITS, EXCLUDED, USED

Bytes = NDArray[np.uint8]

PARTS = {
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
}
"""The two halves as published, in the order of their subjects' ids: images and labels of each."""

SIDE, PAD = 28, 2  # pixels; a U-Net wants a power of two: 28 + 2 x 2 = 32
INK = 127  # a pixel above this is ink
VAL_ONE_IN = 12  # the last twelfth of the training file is `val`: 5,000 of its 60,000

BYTE_LIBRARIES = ("numpy", "zarr", "zarrs")
"""Their versions are part of a version's name: another one may write other bytes."""

LONG_NAMES = {"sketch": f"outline, 0 or 255, of ink above {INK}", "digit": "handwritten digit, 0 (paper) to 255 (ink)"}


@disk_errors_in_a_line()
def make_digits(config: DigitsConfig, progress: Progress = silent) -> Refreshed:
    """Make sure that the version of `config` is published; make it if it is not.

    Raises:
        IxiError: one line that says what to do.
    """
    places = config.places
    with lock_root(places.local):
        files = acquire_files(config, progress)
        inputs = dataset.inputs_of({name: f.md5 for name, f in files.items()}, config.dataset, BYTE_LIBRARIES)
        version, origins = dataset.version_name(inputs), publish.origins_of(files)
        done = publish.find_published(places, version, origins)
        if done:
            return done
        halves = {half: read_half(files, half, config.dataset.limit) for half in PARTS}
        table, arrays = pair(halves)
        summary = {
            "name": places.name,
            "version": version,
            "source": "sketch",
            "target": "digit",
            "inputs": inputs,
            **manifest.counts(table, DIGITS),
            "sources": {
                n: {"file": n, "source": "mnist", "md5": f.md5, "md5_is_published": True} for n, f in files.items()
            },
            "licence": catalog.LICENCE,
            "credit": catalog.MNIST_CREDIT,
        }
        if not summary["subjects"]:
            raise DatasetError(f"none of the {len(table)} digits has any ink; are these the files of MNIST?")
        staged = publish.start_staging(places, version)
        attributes = {key: summary[key] for key in ("name", "version", "licence", "credit")}
        labels = manifest.used(table)["subject_id"].tolist()
        store.write_images(staged / store.STORE, arrays, LONG_NAMES, attributes, labels)
        write_atomic(staged / dataset.MANIFEST, DIGITS.to_csv(table))
        return publish.publish(places, staged, summary, origins, progress)


def acquire_files(config: DigitsConfig, progress: Progress = silent) -> dict[str, Acquired]:
    """Name -> each of the four files, whole and of the published MD5."""
    folder, sources = config.places.archives, catalog.mnist(config.source)
    with ThreadPoolExecutor(len(sources)) as pool:
        jobs = {
            name: pool.submit(acquire, source, folder, offline=config.offline, progress=progress)
            for name, source in sources.items()
        }
        return {name: job.result() for name, job in jobs.items()}


# -- the files --------------------------------------------------------------------------------------------------------


def read_half(files: Mapping[str, Acquired], half: str, limit: int | None = None) -> tuple[Bytes, Bytes]:
    """Images [N, 28, 28] and labels [N] of the training or test file; the first `limit` of them, if given.

    Raises:
        ArchiveError: not the images and labels of digits.
    """
    places = [files[name].location for name in PARTS[half]]
    images, labels = (
        parse_idx(_unpack(files[name]), ndim, place)
        for name, ndim, place in zip(PARTS[half], (3, 1), places, strict=True)
    )
    if images.shape[1:] != (SIDE, SIDE):
        raise ArchiveError(f"{places[0]} has images of {images.shape[1:]} pixels, not {SIDE} x {SIDE}: not of MNIST")
    if len(images) != len(labels):
        raise ArchiveError(f"{places[0]} has {len(images)} images, but {places[1]} {len(labels)} labels")
    if labels.max() > 9:
        raise ArchiveError(f"{places[1]} has the label {labels.max()}; digits are 0 to 9")
    return images[:limit], labels[:limit]


def _unpack(file: Acquired) -> bytes:
    place = file.location
    with naming(place):
        filesystem, path = filesystem_of(place)
        packed = filesystem.cat_file(path)
    if hashlib.md5(packed, usedforsecurity=False).hexdigest() != file.md5:
        raise ArchiveError(f"{place} changed while it was read; run again when it is whole")
    try:
        return gzip.decompress(packed)
    except (OSError, EOFError, zlib.error) as error:
        raise ArchiveError(f"{place} is not a whole gzip file ({error}); fetch it again") from error


def parse_idx(data: bytes, ndim: int, name: str) -> Bytes:
    """The array of `ndim` dimensions that an IDX file of unsigned bytes holds.

    The format, from the MNIST page: the bytes 0, 0, 8 (unsigned byte) and the number of dimensions; the size of each as
    a big-endian 32-bit integer; then the values, the last dimension fastest.

    Raises:
        ArchiveError: `data`, which the message calls `name`, is not exactly that, or has no values.
    """
    start = 4 + 4 * ndim
    if data[:4] != bytes([0, 0, 8, ndim]):
        raise ArchiveError(f"{name} is no IDX file of bytes in {ndim} dimensions: it begins with {data[:4].hex(' ')}")
    if len(data) < start:
        raise ArchiveError(f"{name} is cut short within its sizes, at {len(data)} bytes")
    shape = [int(size) for size in np.frombuffer(data, ">u4", ndim, offset=4)]
    expected = start + math.prod(shape)
    if len(data) != expected or expected == start:
        raise ArchiveError(
            f"{name} has {len(data)} bytes; sizes of {shape} want {expected}, a header of {start} and values"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


# -- the pairs --------------------------------------------------------------------------------------------------------


def pair(halves: Mapping[str, tuple[Bytes, Bytes]]) -> tuple[pd.DataFrame, dict[str, Bytes]]:
    """The manifest, and array name -> [N, 1, 32, 32] of its used rows, from images and labels of each half.

    The test file is `test`; of the training file the last twelfth is `val`, the rest `train`.
    """
    digit = np.concatenate([pad(images) for images, _ in halves.values()])
    slabs = {"sketch": sketch(digit), "digit": digit}
    low_high = {name: percentiles(slab) for name, slab in slabs.items()}
    is_used = np.logical_and.reduce([low != high for low, high in (of.T for of in low_high.values())])
    splits = [split for half, (_, labels) in halves.items() for split in _splits(half, len(labels))]
    table = {
        "subject_id": [f"{half}-{n:05d}" for half, (_, labels) in halves.items() for n in range(len(labels))],
        "site": "",  # nobody says who wrote where; the column keeps the head of all manifests the same
        "status": np.where(is_used, USED, EXCLUDED),
        "reason": np.where(is_used, "", "empty_image"),
        "detail": np.where(is_used, "", "percentiles 0.1 and 99.9 of the digit or its sketch are the same"),
        "split": np.where(is_used, splits, ""),
        "store_row": pd.Series(np.cumsum(is_used) - 1).where(is_used),
        "label": np.concatenate([labels for _, labels in halves.values()]),
    }
    for name, of in low_high.items():
        table |= {f"{name}_p_low": of[:, 0], f"{name}_p_high": of[:, 1]}
    return DIGITS.typed(pd.DataFrame(table)), {name: slab[is_used] for name, slab in slabs.items()}


def _splits(half: str, count: int) -> list[str]:
    val = math.ceil(count / VAL_ONE_IN)
    return ["test"] * count if half == "test" else ["train"] * (count - val) + ["val"] * val


def pad(images: Bytes) -> Bytes:
    """Images [N, 28, 28] with two pixels of paper on each side: [N, 1, 32, 32]."""
    return np.pad(images, ((0, 0), (PAD, PAD), (PAD, PAD)))[:, None]


def sketch(digit: Bytes) -> Bytes:
    """The outline of the ink, 255 on 0, of digits [N, 1, y, x]: ink with a 4-neighbour (in y or x) that is no ink.

    Ink is what is above 127; beyond the edge of the image there is none.
    """
    ink = np.pad(digit > INK, ((0, 0), (0, 0), (1, 1), (1, 1)))
    middle = ink[..., 1:-1, 1:-1]
    inside = ink[..., :-2, 1:-1] & ink[..., 2:, 1:-1] & ink[..., 1:-1, :-2] & ink[..., 1:-1, 2:]
    return (middle & ~inside).astype(np.uint8) * np.uint8(255)
