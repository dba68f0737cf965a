"""From archives on a server at 100 Mbit/s, or in a folder, to slabs on disk: what a user waits for in all.

The peers first download both archives, as they cannot do otherwise. One of them is what users of a converter do today:
extract the archives, copy the files into BIDS, as Clinica's `ixi-to-bids` does, and refresh that folder.
"""

from __future__ import annotations

import shutil
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import etl, inputs
from benchmarks.measure import Row, Settings, alternate, duration, ratio, require_equal, seconds, speed_row
from benchmarks.serving import LINK, serving

Work = Callable[[], dict[str, Any]]

E, S = "benchmarks.end_to_end:", "benchmarks.etl:"
RUNS = 2
MOST = 1.3
"""Times as long as the naive script that the default refresh may take, although it registers and draws the pairs."""
NAIVE, TORCHIO, MONAI = "extractall + get_fdata + np.save", "TorchIO Resample", "MONAI ResampleToMatchd"
COPIED = "copy into BIDS as Clinica does, then ours"
CASES: dict[str, Callable[..., Work]] = {
    "naive": etl.refresh_naive,
    "torchio": etl.refresh_torchio,
    "monai": etl.refresh_monai,
}


def copied(source: str, warm: str, scratch: str) -> Work:
    """Extract the archives, copy the files into BIDS, refresh that folder with the default options."""
    from ixi_etl.config import RefreshConfig
    from ixi_etl.dataset.store import open_arrays
    from ixi_etl.recipes.ixi import refresh

    def work_on(source: str, name: str) -> dict[str, Any]:
        extracted, bids, root = (
            inputs.scratch_folder(Path(scratch), f"{name}-{part}") for part in ("in", "bids", "root")
        )
        etl.extract_archives(source, extracted)
        (bids / "dataset_description.json").write_text('{"Name": "IXI", "BIDSVersion": "1.10.0"}')
        for path in extracted.glob("*/*.nii.gz"):
            person, rest = path.name[: len("IXI002")], path.name.removesuffix(".nii.gz")
            target = bids / f"sub-{person}/anat/sub-{person}_{rest.rpartition('-')[2]}w.nii.gz"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        done = refresh(RefreshConfig(root=str(root), source=str(bids), workers=2))
        arrays = open_arrays(done.folder)
        return {"slabs": [list(arrays["t1"].shape), list(arrays["t2"].shape)]}

    work_on(warm, "copied-warm")
    return lambda: work_on(source, "copied")


def downloaded(source: str, warm: str, scratch: str, peer: str) -> Work:
    """Download both archives from a server at 100 Mbit/s, then let the peer work on them."""
    folder = inputs.scratch_folder(Path(scratch), "downloaded")
    work = (CASES | {"copied": copied})[peer](str(folder), warm, scratch)

    def whole() -> dict[str, Any]:
        with serving(Path(source), LINK) as url:
            start = time.perf_counter()
            for path in Path(source).glob("*.tar"):
                with urllib.request.urlopen(f"{url}/{path.name}") as answer, open(folder / path.name, "wb") as file:
                    shutil.copyfileobj(answer, file, 1 << 20)
            return work() | {"seconds": time.perf_counter() - start}

    return whole


def ours(source: str, warm: str, scratch: str) -> Work:
    """Our refresh from a server at 100 Mbit/s, with the default options."""
    from ixi_etl.config import RefreshConfig
    from ixi_etl.dataset.store import open_arrays
    from ixi_etl.recipes.ixi import refresh

    def work_on(source: str, name: str) -> dict[str, Any]:
        root = inputs.scratch_folder(Path(scratch), name)
        with serving(Path(source), LINK) as url:
            start = time.perf_counter()
            done = refresh(RefreshConfig(root=str(root), source=url, workers=2))
            taken = time.perf_counter() - start
        arrays = open_arrays(done.folder)
        return {"slabs": [list(arrays["t1"].shape), list(arrays["t2"].shape)], "seconds": taken}

    work_on(warm, "served-warm")
    return lambda: work_on(source, "served")


@dataclass(frozen=True)
class Source:
    """Archives to refresh, and what they are called in a row."""

    folder: Path
    pairs: int
    name: str


def sources(settings: Settings, pairs: int) -> list[Source]:
    """The phantom's archives, and those of `--archives`."""
    folder, shrink = Path(settings.folder), inputs.SHRINK_QUICK if settings.quick else 1
    found = [Source(inputs.archives(folder, pairs, shrink), pairs, f"{pairs} pairs")]
    if settings.archives:
        given = Path(settings.archives)
        count = len(inputs.member_names(given))
        found.append(Source(given, count, f"{count} pairs of {given.name}"))
    return found


def refresh(settings: Settings) -> list[Row]:
    """Refresh 24 pairs with the default options, and, like the peers, without registration and pictures.

    Ratios of `--archives` are not kept in the history: nobody else has these.
    """
    phantom, *given = sources(settings, 4 if settings.quick else 24)
    rows = _refresh_rows(settings, phantom)
    return rows + [replace(row, times=None) for source in given for row in _refresh_rows(settings, source)]


def _arguments(settings: Settings, source: Source) -> dict[str, Any]:
    warm = str(inputs.archives(Path(settings.folder), 2, inputs.SHRINK_QUICK))
    return {"source": str(source.folder), "warm": warm, "scratch": settings.folder}


def _refresh_rows(settings: Settings, source: Source) -> list[Row]:
    shared = _arguments(settings, source)
    default, index, naive, anatomical, torchio, monai, clinica, floor = alternate(
        settings.times,
        (S + "refresh", shared | {"pairing": "anatomical", "default": True}),
        (S + "refresh", shared | {"pairing": "index"}),
        (S + "refresh_naive", shared),
        (S + "refresh", shared | {"pairing": "anatomical"}),
        (S + "refresh_torchio", shared),
        (S + "refresh_monai", shared),
        (E + "copied", shared),
        (S + "inflate_only", {"source": shared["source"]}),
    )
    require_equal("slabs", index, naive)
    require_equal("slabs", anatomical, torchio, monai)
    require_equal("slabs", default, clinica)
    what = f"refresh, {source.name}, "
    both = "ours registers and draws the pairs; the peer does not"
    slower, times = 1 / ratio(floor, anatomical), ratio(naive, default)
    return [
        Row(
            what + "as by default", NAIVE, duration(seconds(default)), duration(seconds(naive)),
            f"{1 / times:.2f} x as long", f"at most {MOST:g} x", 1 / times <= MOST, both, times,
        ),
        speed_row(what + "as by default", TORCHIO, torchio, default, None, both),
        speed_row(what + "as by default", MONAI, monai, default, None, both),
        speed_row(what + "as by default", COPIED, clinica, default, None),
        speed_row(what + "index", NAIVE, naive, index, 8),
        speed_row(what + "anatomical", TORCHIO, torchio, anatomical, 7),
        speed_row(what + "anatomical", MONAI, monai, anatomical, 7),
        Row(
            what + "anatomical", "floor: ISA-L inflates them", duration(seconds(anatomical)),
            duration(seconds(floor)), f"{slower:.2f} x", "at most 2.3 x", slower <= 2.3,
        ),
    ]  # fmt: skip


def end_to_end(settings: Settings) -> list[Row]:
    """Refresh 24 pairs from a server at 100 Mbit/s, in all."""
    (source, *_), runs = sources(settings, 4 if settings.quick else 24), min(settings.times, RUNS)
    shared = _arguments(settings, source)
    peers = {NAIVE: "naive", TORCHIO: "torchio", MONAI: "monai", COPIED: "copied"}
    mine, *others = alternate(
        runs, (E + "ours", shared), *((E + "downloaded", shared | {"peer": peer}) for peer in peers.values())
    )
    size = sum(path.stat().st_size for path in source.folder.glob("*.tar"))
    note = f"the download alone takes {duration(size / LINK)}"
    what = f"refresh, {source.name}, from a server at 100 Mbit/s"
    return [
        speed_row(what, f"download, then {name}", theirs, mine, None, note)
        for name, theirs in zip(peers, others, strict=True)
    ]
