"""The content of a version is pinned: a refactoring must not change a voxel, an affine or a word of the manifest.

A hash that changes here means that the same archives give another version. If that is intended, raise
`ixi_etl.PIPELINE_VERSION` and write the new hashes here.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import config_for
from numpy.typing import NDArray

from ixi_etl.dataset.metadata import read_manifest
from ixi_etl.dataset.store import STORE, open_arrays
from ixi_etl.recipes.ixi import refresh
from ixi_etl.testing.phantom import grid_affine, pack_nifti, write_tar

SHAPE_KJI = (20, 24, 16)
DEPENDS_ON_LIBRARIES = "sha256|nmi_"  # hashes of compressed members, and logarithms

PINNED = {
    "anatomical": {
        "voxels": "c4330710fbddb045adf87dce1c36d6bc4b2a705ba9b38f4250c4553459e01766",
        "others": "9976e729bd4e1ca518910221428896062fcc608bc5aca05d7b4d0c55ccfb8a31",
        "attributes": "0daceaf2b7802c8b7d4a6f331bb43c697f50007a36da1b6ddb47ca4e7e61f7b0",
        "manifest": "7b5ef8535ac74bc09df34c630ce00e43dd82b78e3120d2dd64b3102cdd4e137b",
    },
    "index": {
        "voxels": "a73b5d8a1e9c0545989348a76fb39b96d0d60ef31d50762e827aa3623aa3c950",
        "others": "bd9c6ad6db3d0d55a46d88cac9f6d738233e165eb734b07f6cffb1192eac3418",
        "attributes": "c51087db2a473fe548d7f15260d601f491d5fe5d87fc7d346562dcf50b9af7c3",
        "manifest": "7141d053c4a12b482f4a4474c25fd1969d3be7c082bce053a4e6cf6c175ebd60",
    },
}


def pattern(seed: int) -> NDArray[np.int16]:
    """Voxels [k, j, i] computed only with integers: the same on every CPU and with every library."""
    k, j, i = np.indices(SHAPE_KJI, dtype=np.int64)
    blob = np.maximum(0, 900 - 25 * ((k - 10) ** 2 + (j - 12) ** 2 + (i - 8) ** 2))
    return (blob * (i + 2 * j + 3 * k + seed) // 64 + (7 * i + 13 * j + 31 * k + seed) % 61).astype("<i2")


@pytest.fixture(scope="module")
def exact_archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Archives whose T1 is offset by half a voxel from the T2's grid, so that interpolation is exact in binary."""
    folder = tmp_path_factory.mktemp("exact")
    members: dict[str, dict[str, bytes]] = {"T1": {}, "T2": {}}
    for number in range(1, 6):
        subject = f"IXI{number:03d}-{('Guys', 'HH')[number % 2]}-{number:04d}"
        for modality, orientation in (("T1", "RAS"), ("T2", "LAS")):
            if (number, modality) == (4, "T2"):
                continue  # excluded: missing_t2
            affine = grid_affine(SHAPE_KJI[::-1], (1.0, 1.0, 1.0), orientation)
            affine[:3, 3] += (0.5, 0, 0.5) if modality == "T1" else 0
            voxels = pattern(number + 40 * (modality == "T1"))
            if (number, modality) == (5, "T1"):
                voxels[:] = 0  # excluded: empty_image
            slope = 0.5 if number == 2 else 1.0
            members[modality][f"{subject}-{modality}.nii.gz"] = pack_nifti(voxels, affine, slope)
    for modality, files in members.items():
        write_tar(folder / f"IXI-{modality}.tar", files)
    return folder


def digest(*data: bytes) -> str:
    return hashlib.sha256(b"".join(data)).hexdigest()


def content(folder: Path) -> dict[str, str]:
    """SHA-256 of what must stay the same, by name: decoded arrays, their attributes, the text of the manifest."""
    arrays = {name: np.asarray(array) for name, array in sorted(open_arrays(folder).items()) if name != "subject"}
    metadata = {path.parent.name: json.loads(path.read_text()) for path in (folder / STORE).rglob("zarr.json")}
    attributes = {name: content["attributes"] for name, content in metadata.items()}
    del attributes[STORE]["version"]  # a hash of the versions of libraries, among others
    manifest = read_manifest(folder)
    manifest = manifest.drop(columns=manifest.columns[manifest.columns.str.contains(DEPENDS_ON_LIBRARIES)])
    return {
        "voxels": digest(arrays["t1"].tobytes(), arrays["t2"].tobytes()),
        "others": digest(*(array.tobytes() for name, array in arrays.items() if name not in ("t1", "t2"))),
        "attributes": digest(json.dumps(attributes, sort_keys=True).encode()),
        "manifest": digest(manifest.to_csv(index=False, lineterminator="\n").encode()),
    }


@pytest.mark.parametrize("pairing", sorted(PINNED))
def test_content_of_a_version_is_pinned(pairing: str, exact_archives: Path, tmp_path: Path) -> None:
    made = refresh(config_for(tmp_path, exact_archives, pairing=pairing, pictures=False))
    assert content(made.folder) == PINNED[pairing]
