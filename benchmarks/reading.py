"""Cases of reading for training: each pair of a version once, in random order, as normalised float32 batches of 16.

This is a first epoch: files are not in the page cache, and the time to build caches and workers counts. Batches are
(16, 1, H, W) in [-1, 1]. Only the number of pixels is compared, since each peer has its own order. Each case reads a
`folder` that `prepare` filled, after one epoch of `warm`, a small one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.inputs import drop_from_page_cache, read_json

Work = Callable[[], dict[str, Any]]
BATCH = 16


def prepare(source: str, folder: str) -> Work:
    """Publish a version with all subjects in the training split, and write the same slabs in the peers' formats."""

    def work() -> dict[str, Any]:
        from ixi_etl.config import DatasetConfig, RefreshConfig
        from ixi_etl.dataset import manifest, metadata
        from ixi_etl.dataset.store import open_arrays
        from ixi_etl.recipes.ixi import refresh
        from ixi_etl.scans.nifti import pack_like

        target = Path(folder)
        options = {"registration": "none", "pictures": False, "split": (1.0, 0.0, 0.0)}
        root, config = target / "root", DatasetConfig.model_validate(options)
        done = refresh(RefreshConfig(root=str(root), source=source, dataset=config, workers=2))
        arrays, used = open_arrays(done.folder), manifest.used_rows(metadata.read_manifest(done.folder))
        (target / "npy").mkdir(exist_ok=True)
        (target / "nifti").mkdir(exist_ok=True)
        ranges: dict[str, list[float]] = {}
        for row in manifest.to_records(used):
            for name in ("t1", "t2"):
                slab = np.asarray(arrays[name][row["store_row"]])
                subject = f"{row['subject_id']}-{name}"
                ranges[subject] = [row[f"{name}_p_low"], row[f"{name}_p_high"]]
                for z, image in enumerate(slab):
                    np.save(target / "npy" / f"{subject}-{z:02d}.npy", image)
                header = _plain_header(slab.shape, np.asarray(arrays[f"{name}_affine"][row["store_row"]]))
                (target / "nifti" / f"{subject}.nii").write_bytes(pack_like(header, slab, ""))
        import json

        (target / "prepared.json").write_text(json.dumps({"version": str(done.folder), "ranges": ranges}))
        mb = sum(arrays[name].nbytes for name in ("t1", "t2")) / 2**20
        return {"pairs": len(used) * arrays["t1"].shape[1], "mb": mb}

    return work


def _plain_header(shape: tuple[int, ...], affine: np.ndarray[Any, Any]) -> bytes:
    import nibabel as nib

    return nib.Nifti1Image(np.zeros(shape[::-1], np.int16), affine).to_bytes()[:352]


def _files(folder: str) -> tuple[Path, dict[str, list[float]], list[str]]:
    prepared = read_json(Path(folder) / "prepared.json")
    ranges: Any = prepared["ranges"]
    drop_from_page_cache(Path(folder))
    return Path(str(prepared["version"])), ranges, sorted({name.rpartition("-")[0] for name in ranges})


def _consumed(batches: Iterable[tuple[Tensor, Tensor]], keep: Any = None) -> dict[str, Any]:
    pairs = pixels = 0
    for source, target in batches:
        assert source.dtype == target.dtype == torch.float32
        assert source.shape == target.shape
        assert -1.001 <= float(source[0].min()) <= float(source[0].max()) <= 1.001
        pairs += len(source)
        pixels += source.numel()
    return {"pairs": pairs, "pixels": pixels, "keep": keep}


def _warmed(case: Callable[..., Work]) -> Callable[..., Work]:
    """Run the case on `warm` before `folder`, so that lazy imports are not timed."""

    @wraps(case)
    def prepared(folder: str, warm: str, **more: Any) -> Work:
        case(warm, **more)()
        return case(folder, **more)

    return prepared


def _epoch(folder: str) -> Work:
    """Read all batches with our loader, in random order."""
    from model import data
    from model.augmentation import batch_indices

    version, _, _ = _files(folder)

    def work() -> dict[str, Any]:
        pairs = data.load_pairs(version, "train")
        starts = range(0, len(pairs), BATCH)
        batches = (
            pairs.normalised(batch_indices(len(pairs), 0, start, min(BATCH, len(pairs) - start))) for start in starts
        )
        return _consumed(batches, pairs)

    return work


@_warmed
def ours(folder: str) -> Work:
    from model.devices import keep_freed_memory

    keep_freed_memory()  # as `ixi-etl train` does
    return _epoch(folder)


@_warmed
def zarr_default(folder: str) -> Work:
    """Our store and batches, decoded by zarr-python's own codec pipeline."""
    import zarr

    from ixi_etl.dataset.store import STORE
    from model import data

    def plain(folder: Path) -> dict[str, Any]:
        return dict(zarr.open_group(str(folder / STORE), mode="r").arrays())

    data.open_arrays = plain  # type: ignore[attr-defined,assignment]
    return _epoch(folder)


class _Slices(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Pairs from one .npy file per slice and modality."""

    def __init__(self, folder: Path, ranges: dict[str, list[float]], subjects: list[str]) -> None:
        self.folder, self.ranges = folder, ranges
        slices = len(list(folder.glob(f"{subjects[0]}-t1-*.npy")))
        self.items = [(subject, z) for subject in subjects for z in range(slices)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        subject, z = self.items[index]
        t1, t2 = (self._image(f"{subject}-{name}", z) for name in ("t1", "t2"))
        return t1, t2

    def _image(self, name: str, z: int) -> Tensor:
        low, high = self.ranges[name]
        stored = np.load(self.folder / f"{name}-{z:02d}.npy").astype(np.float32)
        return torch.from_numpy(((stored - low) / (high - low) * 2 - 1).clip(-1, 1))[None]


@_warmed
def npy_loader(folder: str, workers: int) -> Work:
    """PyTorch's `DataLoader` over one .npy file per slice."""
    _, ranges, subjects = _files(folder)

    def work() -> dict[str, Any]:
        loader = torch.utils.data.DataLoader(
            _Slices(Path(folder) / "npy", ranges, subjects), BATCH, shuffle=True, num_workers=workers
        )
        return _consumed((source, target) for source, target in loader)

    return work


@_warmed
def monai_cache(folder: str) -> Work:
    """MONAI's `CacheDataset` of normalised slices, built by two threads."""
    from monai.data import CacheDataset, DataLoader
    from monai.transforms import Transform

    _, ranges, subjects = _files(folder)
    slices = _Slices(Path(folder) / "npy", ranges, subjects)

    class Load(Transform):  # MONAI caches only the output of its own transforms
        def __call__(self, index: int) -> dict[str, Tensor]:
            t1, t2 = slices[index]
            return {"t1": t1, "t2": t2}

    def work() -> dict[str, Any]:
        cached = CacheDataset(list(range(len(slices))), Load(), num_workers=2, progress=False)
        loader = DataLoader(cached, batch_size=BATCH, shuffle=True, num_workers=0)
        return _consumed(((batch["t1"], batch["t2"]) for batch in loader), cached)

    return work


@_warmed
def torchio_queue(folder: str) -> Work:
    """TorchIO's `Queue` with two workers: single slices sampled from slabs, as many per subject as it has slices."""
    import torchio

    _, _, subjects = _files(folder)
    volumes = Path(folder) / "nifti"

    def subject_of(name: str) -> Any:
        images = {m: torchio.ScalarImage(volumes / f"{name}-{m}.nii") for m in ("t1", "t2")}
        return torchio.Subject(**images)

    def work() -> dict[str, Any]:
        listed = [subject_of(name) for name in subjects]
        shape = listed[0].spatial_shape
        transform = torchio.RescaleIntensity(out_min_max=(-1, 1), percentiles=(0.1, 99.9))
        queue = torchio.Queue(
            torchio.SubjectsDataset(listed, transform=transform),
            max_length=16 * shape[2],
            samples_per_volume=shape[2],
            sampler=torchio.UniformSampler((shape[0], shape[1], 1)),
            num_workers=2,
        )
        loader = torchio.SubjectsLoader(queue, batch_size=BATCH)
        batches = ((_flat(batch["t1"]), _flat(batch["t2"])) for batch in loader)
        return _consumed(batches, queue)

    return work


def _flat(image: Any) -> Tensor:
    """(B, 1, x, y, 1) to (B, 1, H, W)."""
    data = image.data if hasattr(image, "data") and not isinstance(image, dict) else image["data"]
    flat: Tensor = data[..., 0].transpose(-1, -2)
    return flat.float()


def batch_alone(folder: str, batch: int, times: int) -> Work:
    """Draw and normalise batches of a split in memory: the share of a training step that is data loading."""
    from model import data
    from model.config import TrainConfig

    pairs = data.load_pairs(_files(folder)[0], "train")
    config = TrainConfig(side=pairs.shape[-1], batch_size=batch)

    def work() -> dict[str, Any]:
        for step in range(times):
            data.draw_batch(pairs, config, step * batch)
        return {"times": times}

    return work
