"""How the consumers read an export, in a few lines each: written from what their loaders do, to check the files.

Each returns pairs of images (source, target), float32 [pair, row, column].
"""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ixi_etl.core.files import sha256_file

Images = NDArray[np.float32]


def syndiff(folder: Path, split: str, source: str, target: str, size: int = 256) -> tuple[Images, Images]:
    """icon-lab/SynDiff: swaps the last axes, pads as much on one side as on the other, maps to [-1, 1]."""

    def load(contrast: str) -> Images:
        with h5py.File(folder / f"data_{split}_{contrast}.mat", "r") as file:
            data = np.asarray(file["data_fs"]).transpose(0, 2, 1)
        rows, columns = (int((size - n) / 2) for n in data.shape[1:])
        return np.pad(data, ((0, 0), (rows, rows), (columns, columns))) * 2 - 1

    return load(source), load(target)


def selfrdb(folder: Path, split: str, source: str, target: str) -> tuple[Images, Images]:
    """icon-lab/SelfRDB, without padding: sorts by the number after the last underscore."""

    def load(modality: str) -> Images:
        files = sorted((folder / modality / split).glob("*.npy"), key=lambda f: int(f.stem.rpartition("_")[2]))
        return np.array([np.load(file) for file in files])

    return load(source), load(target)


def pix2pix(folder: Path, split: str, bits: int = 8) -> tuple[Images, Images]:
    """junyanz/pytorch-CycleGAN-and-pix2pix: sorts by path, halves the width. It reads 8 bits alone."""
    pairs = [np.asarray(Image.open(file)) / np.float32(2**bits - 1) for file in sorted((folder / split).glob("*.png"))]
    halves = [np.split(pair, 2, axis=1) for pair in pairs]
    return np.array([a for a, _ in halves]), np.array([b for _, b in halves])


def nnunet(dataset: Path) -> dict[str, tuple[list[NDArray[np.float64]], NDArray[np.float64]]]:
    """A raw data set of nnU-Net: case -> its channels [x, y, z] and its labels, checked as nnU-Net checks them."""
    described = json.loads((dataset / "dataset.json").read_text())
    ending, channels = described["file_ending"], described["channel_names"]
    cases = sorted({f.name[: -len(ending) - len("_0000")] for f in (dataset / "imagesTr").iterdir()})
    assert len(cases) == described["numTraining"]
    assert sorted(described["labels"].values()) == list(range(len(described["labels"])))
    found = {}
    for case in cases:
        images = [nib.load(dataset / "imagesTr" / f"{case}_{n:04d}{ending}") for n in range(len(channels))]
        labels = nib.load(dataset / "labelsTr" / f"{case}{ending}")
        for image in images:
            assert image.shape == labels.shape
            assert np.allclose(image.affine, labels.affine)
            assert np.allclose(image.header.get_zooms(), labels.header.get_zooms())
        values = labels.get_fdata()
        assert set(np.unique(values)) <= set(described["labels"].values())
        found[case] = [image.get_fdata() for image in images], values
    return found


def decathlon(datalist: Path, key: str) -> list[tuple[nib.Nifti1Image, nib.Nifti1Image]]:
    """The images and labels of MONAI's list, whose paths are relative to the list."""
    items = json.loads(datalist.read_text())[key]
    return [(nib.load(datalist.parent / item["image"]), nib.load(datalist.parent / item["label"])) for item in items]


def hashes(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of each file of an export."""
    return {str(f.relative_to(folder)): sha256_file(f) for f in sorted(folder.rglob("*")) if f.is_file()}
