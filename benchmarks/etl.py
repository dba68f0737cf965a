"""Cases of survey and refresh, ours and the peers': from archives to a depth histogram, or to slabs on disk.

Surveys start with archives that are not in the page cache. Refreshes start with verified archives and end with slabs of
20 slices of each pair: ours in a published version with hashes, CRCs and a manifest, the peers' as .npy files.
"""

from __future__ import annotations

import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.inputs import drop_from_page_cache, scratch_folder
from benchmarks.serving import counts, serving

Work = Callable[[], dict[str, Any]]
SLICES = 20
MODALITIES = ("T1", "T2")


# -- survey -----------------------------------------------------------------------------------------------------------


def survey(source: str, warm: str) -> Work:
    """Our survey; `inflated` is the largest number of bytes inflated of one member."""
    from ixi_etl.scans import gunzip
    from ixi_etl.scans import survey as stage

    inflated: list[int] = []

    def counted(packed: bytes) -> bytes:
        head = gunzip.inflate_head(packed)
        inflated.append(len(head))
        return head

    stage.inflate_head = counted  # type: ignore[attr-defined,assignment]

    def work_on(source: str) -> dict[str, Any]:
        table = stage.survey({m: f"{source}/IXI-{m}.tar" for m in MODALITIES})
        histogram = stage.depth_histogram(table)["all"]
        return {"depths": _depths(histogram.to_dict()), "inflated": max(inflated), "members": len(table)}

    work_on(warm)
    if "://" not in source:
        drop_from_page_cache(Path(source))
    return partial(work_on, source)


def _depths(found: dict[Any, int]) -> dict[str, int]:
    return {f"{modality} {depth}": int(n) for (modality, depth), n in sorted(found.items())}


def survey_extracted(source: str, warm: str, scratch: str, extract: bool, library: str = "nibabel") -> Work:
    """The usual method: `extractall`, then a library reads the shape of each file from its header."""
    depth_of = {"nibabel": _by_nibabel, "torchio": _by_torchio}[library]()

    def work_on(source: str, folder: Path, extract: bool) -> dict[str, Any]:
        if extract:
            extract_archives(source, folder)
        found: dict[tuple[str, int], int] = {}
        for modality in MODALITIES:
            for path in sorted((folder / modality).glob("*.nii.gz")):
                key = modality, depth_of(path)
                found[key] = found.get(key, 0) + 1
        return {"depths": _depths(found)}

    work_on(warm, scratch_folder(Path(scratch), "extracted-warm"), True)
    folder = scratch_folder(Path(scratch), "extracted")
    if not extract:
        extract_archives(source, folder)
    drop_from_page_cache(Path(source), folder)
    return partial(work_on, source, folder, extract)


def _by_nibabel() -> Callable[[Path], int]:
    import nibabel as nib

    return lambda path: int(nib.Nifti1Image.from_filename(path).shape[2])


def _by_torchio() -> Callable[[Path], int]:
    import torchio

    return lambda path: int(torchio.ScalarImage(path).shape[3])


def survey_remote(source: str, warm: str) -> Work:
    """Our survey of archives on a server."""

    def work() -> dict[str, Any]:
        with serving(Path(source)) as url:
            surveyed = survey(url, warm)
            start = time.perf_counter()
            found = surveyed()
            return found | {"seconds": time.perf_counter() - start} | counts(url)

    return work


def survey_downloaded(source: str, warm: str, scratch: str) -> Work:
    """Download everything, then run our survey on it."""
    import shutil
    import urllib.request

    folder = scratch_folder(Path(scratch), "downloaded")

    def work() -> dict[str, Any]:
        with serving(Path(source)) as url:
            surveyed = survey(str(folder), warm)
            start = time.perf_counter()
            for modality in MODALITIES:
                name = f"IXI-{modality}.tar"
                with urllib.request.urlopen(f"{url}/{name}") as answer, open(folder / name, "wb") as file:
                    shutil.copyfileobj(answer, file, 1 << 20)
            found = surveyed()
            return found | {"seconds": time.perf_counter() - start} | counts(url)

    return work


def extract_archives(source: str, folder: Path) -> None:
    """Unpack both archives into `folder/T1` and `folder/T2`."""
    for modality in MODALITIES:
        with tarfile.open(f"{source}/IXI-{modality}.tar") as tar:
            tar.extractall(folder / modality, filter="data")


# -- refresh ----------------------------------------------------------------------------------------------------------


def refresh(source: str, warm: str, scratch: str, pairing: str, default: bool = False) -> Work:
    """Our refresh, as a plain function, on verified archives.

    With `default` it also registers the pairs and draws pictures, which no peer does.
    """
    from ixi_etl.config import DatasetConfig, RefreshConfig
    from ixi_etl.dataset.store import open_arrays
    from ixi_etl.recipes.ixi import refresh as run
    from ixi_etl.recipes.ixi_inputs import acquire_inputs

    options: dict[str, Any] = {} if default else {"registration": "none", "pictures": False}
    dataset = DatasetConfig.model_validate({"pairing": pairing} | options)

    def prepare(name: str, source: str) -> RefreshConfig:
        config = RefreshConfig(root=str(scratch_folder(Path(scratch), name)), source=source, dataset=dataset, workers=2)
        acquire_inputs(config)
        return config

    def work_on(config: RefreshConfig) -> dict[str, Any]:
        done = run(config)
        arrays = open_arrays(done.folder)
        return {"slabs": _shapes([arrays["t1"].shape, arrays["t2"].shape]), "version": str(done.folder)}

    work_on(prepare("root-warm", warm))
    return partial(work_on, prepare("root", source))


def fetch_members(source: str, scratch: str) -> Work:
    """Our refresh over HTTP, fetching only members of selected subjects; `selected` is their total size in bytes."""
    from ixi_etl.config import DatasetConfig, RefreshConfig
    from ixi_etl.dataset import manifest, metadata
    from ixi_etl.recipes.ixi import refresh as run
    from ixi_etl.scans import survey

    chosen = DatasetConfig.model_validate({"registration": "none", "pictures": False})
    root = str(scratch_folder(Path(scratch), "root-members"))

    def work() -> dict[str, Any]:
        with serving(Path(source)) as url:
            config = RefreshConfig(root=root, source=url, dataset=chosen, workers=2, fetch="members")
            done = run(config)
            traffic = counts(url)
        used = manifest.used_rows(metadata.read_manifest(done.folder))["subject_id"]
        table = survey.survey({m: f"{source}/IXI-{m}.tar" for m in MODALITIES})
        selected = int(table.loc[table["subject_id"].isin(used), "size"].sum())
        return {"pairs": len(used), "selected": selected, **traffic}

    return work


def _shapes(shapes: list[tuple[int, ...]]) -> list[list[int]]:
    return [[int(n) for n in shape] for shape in shapes]


def _saved(out: Path) -> dict[str, Any]:
    """The shapes of the peers' .npy files, reported as for our store."""
    files = [sorted(out.glob(f"*-{modality}.npy")) for modality in MODALITIES]
    return {"slabs": _shapes([(len(paths), *np.load(paths[0]).shape) for paths in files])}


def _pairs(folder: Path) -> list[tuple[str, Path, Path]]:
    t1 = sorted((folder / "T1").glob("*-T1.nii.gz"))
    return [(p.name[: -len("-T1.nii.gz")], p, folder / "T2" / p.name.replace("-T1.", "-T2.")) for p in t1]


def _warmed(work_on: Callable[[str, Path, Path], None], source: str, warm: str, scratch: str) -> Work:
    """The work on `source`, after one run on the small archives of `warm`."""

    def empty_folders() -> tuple[Path, Path]:
        return scratch_folder(Path(scratch), "peer-in"), scratch_folder(Path(scratch), "peer-out")

    work_on(warm, *empty_folders())
    folder, out = empty_folders()

    def work() -> dict[str, Any]:
        work_on(source, folder, out)
        return _saved(out)

    return work


def refresh_naive(source: str, warm: str, scratch: str) -> Work:
    """The script of many repositories: `extractall`, `get_fdata`, the middle slices by index, `np.save`."""
    import nibabel as nib

    def work_on(source: str, folder: Path, out: Path) -> None:
        extract_archives(source, folder)
        for subject, *paths in _pairs(folder):
            for modality, path in zip(MODALITIES, paths, strict=True):
                volume = nib.Nifti1Image.from_filename(path).get_fdata()
                start = (volume.shape[2] - SLICES) // 2
                slab = volume[:, :, start : start + SLICES].transpose(2, 1, 0)
                np.save(out / f"{subject}-{modality}.npy", slab.astype(np.int16))

    return _warmed(work_on, source, warm, scratch)


def refresh_torchio(source: str, warm: str, scratch: str) -> Work:
    """TorchIO: reorient both to canonical axes, resample the T1 to the T2, save the middle axial slices."""
    import torchio

    transform = torchio.Compose([torchio.ToCanonical(), torchio.Resample("t2")])

    def work_on(source: str, folder: Path, out: Path) -> None:
        extract_archives(source, folder)
        for subject, t1, t2 in _pairs(folder):
            images = torchio.Subject(t1=torchio.ScalarImage(t1), t2=torchio.ScalarImage(t2))
            done: Any = transform(images)
            for modality, name in (("T1", "t1"), ("T2", "t2")):
                _save_axial(done[name].numpy()[0], out / f"{subject}-{modality}.npy")

    return _warmed(work_on, source, warm, scratch)


def refresh_monai(source: str, warm: str, scratch: str) -> Work:
    """MONAI: `LoadImaged`, `Orientationd` of the T2, `ResampleToMatchd`; save the middle axial slices."""
    from monai.transforms import Compose, LoadImaged, Orientationd, ResampleToMatchd

    transform = Compose(
        [
            LoadImaged(keys=["T1", "T2"], ensure_channel_first=True),
            Orientationd(keys="T2", axcodes="RAS"),
            ResampleToMatchd(keys="T1", key_dst="T2", mode="bilinear"),
        ]
    )

    def work_on(source: str, folder: Path, out: Path) -> None:
        extract_archives(source, folder)
        for subject, t1, t2 in _pairs(folder):
            done = transform({"T1": str(t1), "T2": str(t2)})
            for modality in MODALITIES:
                _save_axial(done[modality][0].numpy(), out / f"{subject}-{modality}.npy")

    return _warmed(work_on, source, warm, scratch)


def _save_axial(volume: np.ndarray[Any, Any], path: Path) -> None:
    start = (volume.shape[2] - SLICES) // 2
    slab = volume[:, :, start : start + SLICES].transpose(2, 1, 0)
    np.save(path, np.rint(slab).astype(np.int16))


def inflate_only(source: str) -> Work:
    """The lower bound: only inflate the same members with ISA-L, on two threads."""
    from isal import igzip_lib

    from ixi_etl.scans.tar import index_archive, read_member

    members = [(f"{source}/IXI-{m}.tar", x) for m in MODALITIES for x in index_archive(f"{source}/IXI-{m}.tar")]

    def inflated(item: tuple[str, Any]) -> int:
        location, member = item
        packed = read_member(location, member.offset, member.size)
        stream = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
        return len(stream.decompress(packed))

    def work() -> dict[str, Any]:
        with ThreadPoolExecutor(2) as pool:
            return {"bytes": sum(pool.map(inflated, members))}

    return work
