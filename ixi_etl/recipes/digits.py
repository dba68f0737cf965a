"""Make a version of the dataset `digits` from MNIST, to try training: generate a digit from its outline.

Legend: N images. Images in the files are [N, 28, 28]; the arrays of the store, `sketch` and `digit`, are
[N, 1, 32, 32]. All are uint8, with y downwards as in the files.
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

from ixi_etl.config import DigitsConfig
from ixi_etl.core.files import os_errors_as_user_errors, write_atomic
from ixi_etl.core.lease import lock_data_root
from ixi_etl.core.progress import Progress, no_progress
from ixi_etl.core.storage import filesystem_of, naming_file
from ixi_etl.dataset import credit, manifest, metadata, publish, store
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.dataset.schema import DIGITS, EXCLUDED, USED
from ixi_etl.errors import ArchiveError, DatasetError
from ixi_etl.scans.intensity import percentiles
from ixi_etl.sources import catalog
from ixi_etl.sources.cache import VerifiedFile, acquire

Bytes = NDArray[np.uint8]

FILE_PAIRS = {
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
}
"""Image and label file of each half, as published, in the order of their subjects' ids."""

SIDE, PAD = 28, 2  # pixels; a U-Net needs a power of two: 28 + 2 x 2 = 32
INK = 127  # a pixel above this is ink
VAL_ONE_IN = 12  # the last twelfth of the training file is `val`: 5,000 of its 60,000

BYTE_LIBRARIES = ("numpy", "zarr", "zarrs")
"""Their versions are part of a version's name, because they may change its bytes."""

LONG_NAMES = {"sketch": f"outline, 0 or 255, of ink above {INK}", "digit": "handwritten digit, 0 (paper) to 255 (ink)"}


@os_errors_as_user_errors()
def make_digits(config: DigitsConfig, progress: Progress = no_progress) -> PublishedVersion:
    """Make and publish the version of `config`, unless it is published already.

    Raises:
        IxiError: with a message that says what to do.
    """
    data_root = config.data_root
    with lock_data_root(data_root):
        files = acquire_files(config, progress)
        inputs = metadata.version_inputs({name: f.md5 for name, f in files.items()}, config.dataset, BYTE_LIBRARIES)
        version, origins = metadata.version_name(inputs), publish.origins_of(files)
        published = publish.find_published(data_root, version, origins)
        if published:
            return published
        halves = {half: read_file_pair(files, half, config.dataset.limit) for half in FILE_PAIRS}
        table, arrays = pair_images(halves)
        summary = {
            "name": data_root.name,
            "version": version,
            "source": "sketch",
            "target": "digit",
            "inputs": inputs,
            **manifest.counts(table, DIGITS),
            "sources": {
                n: {"file": n, "source": credit.MNIST, "md5": f.md5, "md5_is_published": True} for n, f in files.items()
            },
            "licence": catalog.LICENCE,
            "credit": catalog.MNIST_CREDIT,
        }
        if not summary["subjects"]:
            raise DatasetError(f"all {len(table)} digits are blank; are these the files of MNIST?")
        staged = publish.start_staging(data_root, version)
        attributes = {key: summary[key] for key in ("name", "version", "licence", "credit")}
        labels = manifest.used_rows(table)["subject_id"].tolist()
        store.write_images(staged / store.STORE, arrays, LONG_NAMES, attributes, labels)
        write_atomic(staged / metadata.MANIFEST, DIGITS.to_csv(table))
        return publish.publish(data_root, staged, summary, origins, progress)


def acquire_files(config: DigitsConfig, progress: Progress = no_progress) -> dict[str, VerifiedFile]:
    """Name -> file, for all four files, each with the published MD5."""
    folder, sources = config.data_root.archives, catalog.mnist(config.source)
    with ThreadPoolExecutor(len(sources)) as pool:
        jobs = {
            name: pool.submit(acquire, source, folder, http=config.http, progress=progress)
            for name, source in sources.items()
        }
        return {name: job.result() for name, job in jobs.items()}


def read_file_pair(files: Mapping[str, VerifiedFile], half: str, limit: int | None = None) -> tuple[Bytes, Bytes]:
    """Images [N, 28, 28] and labels [N] of one half, or its first `limit` ones.

    Raises:
        ArchiveError: the files do not contain images and labels of digits.
    """
    locations = [files[name].location for name in FILE_PAIRS[half]]
    images, labels = (
        parse_idx(_unpack(files[name]), ndim, location)
        for name, ndim, location in zip(FILE_PAIRS[half], (3, 1), locations, strict=True)
    )
    if images.shape[1:] != (SIDE, SIDE):
        raise ArchiveError(f"{locations[0]} has images of {images.shape[1:]} pixels, not {SIDE} x {SIDE} like MNIST")
    if len(images) != len(labels):
        raise ArchiveError(f"{locations[0]} has {len(images)} images, but {locations[1]} {len(labels)} labels")
    if labels.max() > 9:
        raise ArchiveError(f"{locations[1]} has the label {labels.max()}; digits are 0 to 9")
    return images[:limit], labels[:limit]


def _unpack(file: VerifiedFile) -> bytes:
    location = file.location
    with naming_file(location):
        filesystem, path = filesystem_of(location)
        packed = filesystem.cat_file(path)
    if hashlib.md5(packed, usedforsecurity=False).hexdigest() != file.md5:
        raise ArchiveError(f"{location} changed while it was read; run again when it is whole")
    try:
        return gzip.decompress(packed)
    except (OSError, EOFError, zlib.error) as error:
        raise ArchiveError(f"{location} is not a complete gzip file ({error}); fetch it again") from error


def parse_idx(data: bytes, ndim: int, name: str) -> Bytes:
    """Parse an IDX file of unsigned bytes with `ndim` dimensions.

    The format, from the MNIST page: the bytes 0, 0, 8 (unsigned byte) and the number of dimensions; the size of each as
    a big-endian 32-bit integer; then the values, last dimension fastest.

    Raises:
        ArchiveError: `data` does not have exactly this format, or has no values. The message calls it `name`.
    """
    start = 4 + 4 * ndim
    if data[:4] != bytes([0, 0, 8, ndim]):
        raise ArchiveError(
            f"{name} is not an IDX file of bytes in {ndim} dimensions: it begins with {data[:4].hex(' ')}"
        )
    if len(data) < start:
        raise ArchiveError(f"{name} is truncated within its sizes, at {len(data)} bytes")
    shape = [int(size) for size in np.frombuffer(data, ">u4", ndim, offset=4)]
    expected = start + math.prod(shape)
    if len(data) != expected or expected == start:
        raise ArchiveError(
            f"{name} has {len(data)} bytes; sizes of {shape} need {expected}: a header of {start}, then values"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def pair_images(halves: Mapping[str, tuple[Bytes, Bytes]]) -> tuple[pd.DataFrame, dict[str, Bytes]]:
    """The manifest and the arrays (name -> [N, 1, 32, 32]) of its used rows, from images and labels of each half.

    The test file becomes split `test`; the last twelfth of the training file becomes `val`, the rest `train`.
    """
    digit = np.concatenate([pad_images(images) for images, _ in halves.values()])
    slabs = {"sketch": draw_outline(digit), "digit": digit}
    low_high = {name: percentiles(slab) for name, slab in slabs.items()}
    is_used = np.logical_and.reduce([low != high for low, high in (limits.T for limits in low_high.values())])
    splits = [split for half, (_, labels) in halves.items() for split in _splits(half, len(labels))]
    table = {
        "subject_id": [f"{half}-{n:05d}" for half, (_, labels) in halves.items() for n in range(len(labels))],
        "site": "",  # unknown; all manifests begin with the same columns
        "status": np.where(is_used, USED, EXCLUDED),
        "reason": np.where(is_used, "", "empty_image"),
        "detail": np.where(is_used, "", "percentiles 0.1 and 99.9 of the digit or its sketch are equal"),
        "split": np.where(is_used, splits, ""),
        "store_row": pd.Series(np.cumsum(is_used) - 1).where(is_used),
        "label": np.concatenate([labels for _, labels in halves.values()]),
    }
    for name, limits in low_high.items():
        table |= {f"{name}_p_low": limits[:, 0], f"{name}_p_high": limits[:, 1]}
    return DIGITS.typed(pd.DataFrame(table)), {name: slab[is_used] for name, slab in slabs.items()}


def _splits(half: str, count: int) -> list[str]:
    val = math.ceil(count / VAL_ONE_IN)
    return ["test"] * count if half == "test" else ["train"] * (count - val) + ["val"] * val


def pad_images(images: Bytes) -> Bytes:
    """Pad images [N, 28, 28] with two blank pixels on each side: [N, 1, 32, 32]."""
    return np.pad(images, ((0, 0), (PAD, PAD), (PAD, PAD)))[:, None]


def draw_outline(digit: Bytes) -> Bytes:
    """The outlines (255 on 0) of digits [N, 1, y, x]: all ink pixels with a 4-neighbour that is not ink.

    Pixels above 127 are ink; pixels beyond the edge of the image are not.
    """
    ink = np.pad(digit > INK, ((0, 0), (0, 0), (1, 1), (1, 1)))
    middle = ink[..., 1:-1, 1:-1]
    inside = ink[..., :-2, 1:-1] & ink[..., 2:, 1:-1] & ink[..., 1:-1, :-2] & ink[..., 1:-1, 2:]
    return (middle & ~inside).astype(np.uint8) * np.uint8(255)
