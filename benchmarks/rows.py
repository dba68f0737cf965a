"""The rows of the table: which cases are compared, on which inputs, and the target of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks import inputs
from benchmarks.end_to_end import end_to_end, refresh
from benchmarks.measure import Measured, Row, Settings, alternate, duration, require_equal, seconds, speed_row
from benchmarks.overlap import overlap
from benchmarks.quality import quality

E, F, R, T = "benchmarks.etl:", "benchmarks.flow:", "benchmarks.reading:", "benchmarks.training:"


def _shrink(settings: Settings) -> int:
    return inputs.SHRINK_QUICK if settings.quick else 1


def _warm(settings: Settings) -> dict[str, str]:
    """Small archives that each ETL case processes first, so that lazy imports are not timed."""
    return {"warm": str(inputs.archives(Path(settings.folder), 2, inputs.SHRINK_QUICK))}


def survey(settings: Settings) -> list[Row]:
    """Survey 200 volumes, and archives with as many members as IXI."""
    folder = Path(settings.folder)
    volumes = 12 if settings.quick else 200
    source = str(inputs.archives(folder, volumes // 2, _shrink(settings)))
    warm = _warm(settings)
    both: dict[str, Any] = {"source": source} | warm
    peers: dict[str, Any] = both | {"scratch": settings.folder}
    ours, extracted, headers, torchio = alternate(
        settings.times,
        (E + "survey", both),
        (E + "survey_extracted", peers | {"extract": True}),
        (E + "survey_extracted", peers | {"extract": False}),
        (E + "survey_extracted", peers | {"extract": True, "library": "torchio"}),
    )
    require_equal("depths", ours, extracted, headers, torchio)
    what = f"survey, {volumes} volumes"
    members = {"T1": 30, "T2": 30} if settings.quick else inputs.MEMBERS
    sparse = str(inputs.sparse_archives(folder, _shrink(settings), members))
    (whole,) = alternate(settings.times, (E + "survey", {"source": sparse} | warm))
    count, most = whole[0].result["members"], max(r.result["inflated"] for r in [*ours, *whole])
    return [
        speed_row(what, "extractall + nibabel.load", extracted, ours, 20),
        speed_row(what, "nibabel.load, extracted before", headers, ours, None),
        speed_row(what, "extractall + TorchIO", torchio, ours, None),
        _limit_row(f"survey, {count:,} members", seconds(whole), 3, "s"),
        Row("survey, bytes inflated per member", "", f"{most} B", "-", "-", "8 KiB", most <= 8 << 10),
    ]


def _limit_row(what: str, value: float, target: float, unit: str) -> Row:
    """A row whose value must not exceed a target."""
    shown = duration(value) if unit == "s" else f"{value:.3g} {unit}"
    return Row(what, "-", shown, "-", "-", f"{target:g} {unit}", value <= target)


def remote(settings: Settings) -> list[Row]:
    """Survey archives on a server with 20 ms latency."""
    folder = Path(settings.folder)
    source = str(inputs.archives(folder, 4 if settings.quick else 24, _shrink(settings)))
    warm = _warm(settings)
    ours, everything = alternate(
        settings.times,
        (E + "survey_remote", {"source": source} | warm),
        (E + "survey_downloaded", {"source": source, "scratch": settings.folder} | warm),
    )
    require_equal("depths", ours, everything)
    members = {"T1": 30, "T2": 30} if settings.quick else inputs.MEMBERS
    sparse = inputs.sparse_archives(folder, _shrink(settings), members)
    (whole,) = alternate(1, (E + "survey_remote", {"source": str(sparse)} | warm))
    size = sum((sparse / f"IXI-{m}.tar").stat().st_size for m in members)
    share, moved = whole[0].result["bytes"] / size, ours[0].result["bytes"] / everything[0].result["bytes"]
    what = f"survey before download, {ours[0].result['members']} members"
    count = whole[0].result["members"]
    loopback = "the download is over loopback, faster than any network"
    return [
        speed_row(what, "download all, then survey", everything, ours, None),
        Row(what + ", bytes", "download all", f"{moved:.3%}", "100%", "-", "0.5%", moved <= 0.005, loopback),
        _limit_row(f"survey before download, {count:,} members", seconds(whole), 60, "s"),
        Row(
            f"the same, bytes of {size / 1e9:.1f} GB",
            "download all",
            f"{share:.3%}",
            "100%",
            "-",
            "0.5%",
            share <= 0.005,
        ),
    ]


def members(settings: Settings) -> list[Row]:
    """Fetch only the members that selection keeps."""
    what = "refresh --fetch members, bytes beyond the selected members"
    odd = 2 if settings.quick else 8
    source = inputs.archives(Path(settings.folder), 6 if settings.quick else 24, _shrink(settings), odd)
    (ours,) = alternate(1, (E + "fetch_members", {"source": str(source), "scratch": settings.folder}))
    result = ours[0].result
    over, everything = result["bytes"] / result["selected"] - 1, sum(p.stat().st_size for p in source.glob("*.tar"))
    note = f"{result['pairs']} pairs of {result['pairs'] + odd}, {result['requests']} requests"
    share = f"{everything / result['selected'] - 1:.1%}"
    return [Row(what, "whole archives", f"{over:.2%}", share, "-", "2%", over <= 0.02, note)]


def growth(settings: Settings) -> list[Row]:
    """Time and memory of a refresh by the number of pairs."""
    sizes = (4, 8) if settings.quick else (8, 16, 32, 64)
    folder = Path(settings.folder)
    cases = []
    for pairs in sizes:
        source = str(inputs.archives(folder, pairs, _shrink(settings)))
        shared: dict[str, Any] = {"source": source, "scratch": settings.folder} | _warm(settings)
        cases.append((E + "refresh", shared | {"pairing": "anatomical"}))
    runs = alternate(settings.times, *cases)
    taken, peaks = [seconds(case) for case in runs], [median(r.peak_mb for r in case) for case in runs]
    slope, start = _line(list(sizes), taken)
    off = max(abs(t / (start + slope * n) - 1) for n, t in zip(sizes, taken, strict=True))
    shown = ", ".join(f"{n}: {t:.2f} s" for n, t in zip(sizes, taken, strict=True))
    process = [median(r.base_mb + r.peak_mb for r in case) for case in runs]
    grown, process_grown = (max(values) / values[0] - 1 for values in (peaks, process))
    memory, process_memory = (
        ", ".join(f"{n}: {p:.0f} MB" for n, p in zip(sizes, values, strict=True)) for values in (peaks, process)
    )
    return [
        Row("refresh, run time, deviation from linear", "-", f"{off:.1%}", "-", "-", "10%", off <= 0.1, shown),
        Row("refresh, peak memory grown", "-", f"{grown:.0%}", "-", "-", "flat (10%)", grown <= 0.1, memory),
        Row("the same, of the whole process", "-", f"{process_grown:.0%}", "-", "-", "-", None, process_memory),
    ]


def _line(x: list[int], y: list[float]) -> tuple[float, float]:
    """Slope and intercept of the least-squares line."""
    mean_x, mean_y = fmean(x), fmean(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    return slope, mean_y - slope * mean_x


def reading(settings: Settings) -> list[Row]:
    """Read a first epoch; measure the share of drawing a batch in a training step."""
    pairs = 6 if settings.quick else 64
    source = str(inputs.archives(Path(settings.folder), pairs, _shrink(settings)))
    folders = {
        name: str(inputs.scratch_folder(Path(settings.folder), f"reading-{name}")) for name in ("folder", "warm")
    }
    made, _ = alternate(
        1,
        (R + "prepare", {"source": source, "folder": folders["folder"]}),
        (R + "prepare", {"source": _warm(settings)["warm"], "folder": folders["warm"]}),
    )
    peers = {
        "DataLoader over .npy, 0 workers": ("npy_loader", {"workers": 0}),
        "DataLoader over .npy, 2 workers": ("npy_loader", {"workers": 2}),
        "MONAI CacheDataset": ("monai_cache", {}),
        "TorchIO Queue": ("torchio_queue", {}),
        "zarr-python's codec pipeline": ("zarr_default", {}),
    }
    ours, *theirs = alternate(
        settings.times, (R + "ours", folders), *((R + case, folders | more) for case, more in peers.values())
    )
    require_equal("pixels", ours, *theirs)
    best = min(range(len(theirs)), key=lambda n: seconds(theirs[n]))
    rows = []
    for n, (name, peer) in enumerate(zip(peers, theirs, strict=True)):
        row = speed_row("reading, first epoch", name, peer, ours, 3 if n == best else None)
        rows.append(replace(row, ours=_rate(ours), theirs=_rate(peer)))
    held = [median(r.held_mb for r in case) for case in (ours, theirs[list(peers).index("MONAI CacheDataset")])]
    share, note = held[0] / held[1], f"the slabs are {made[0].result['mb']:.0f} MB"
    rows.append(
        Row("reading, memory held", "MONAI CacheDataset", f"{held[0]:.0f} MB", f"{held[1]:.0f} MB", f"{share:.3f} x",
            "half", share <= 0.5, note)
    )  # fmt: skip
    side, width = (64, 8) if settings.quick else (256, 64)
    for batch in (1, 8):
        times = 20 if settings.quick else 500
        alone, step = alternate(
            1,
            (R + "batch_alone", {"folder": folders["folder"], "batch": batch, "times": times}),
            (T + "our_step", {"batch": batch, "side": side, "width": width, "times": 3}),
        )
        waits, taken = seconds(alone) / times, seconds(step)
        share = waits / taken
        what = f"reading, share of a CPU step, batch {batch}"
        rows.append(
            Row(
                what,
                "-",
                f"{share:.2%}",
                "-",
                "-",
                "1%",
                share <= 0.01,
                f"{duration(waits)} of {duration(taken)}",
            )
        )
    return rows


def _rate(runs: list[Measured]) -> str:
    return f"{runs[0].result['pairs'] / seconds(runs):,.0f} pairs/s"


def step(settings: Settings) -> list[Row]:
    """A training step on this CPU: `model` compared with plain PyTorch, with both norms."""
    side, width = (64, 8) if settings.quick else (256, 64)
    rows = []
    for batch in (1, 8):
        times = 2 if settings.quick else {1: 8, 8: 3}[batch]
        shared = {"batch": batch, "side": side, "width": width, "times": times}
        ours, batch_norm, instance_norm = alternate(
            settings.times if batch == 1 else min(settings.times, 3),
            (T + "our_step", shared),
            (T + "reference_step", shared | {"norm": "batch"}),
            (T + "reference_step", shared | {"norm": "instance"}),
        )
        what = f"training step on CPU, batch {batch}"
        rows += [
            speed_row(what, "plain PyTorch, fp32, batch norm", batch_norm, ours, 1.6),
            speed_row(what, "plain PyTorch, fp32, instance norm", instance_norm, ours, 1.6),
        ]
    note = "python -m benchmarks.train_gpu, on a GPU"
    rows.append(
        Row(
            "training step on a GPU, batch 1",
            "plain PyTorch, fp32",
            "not here",
            "not here",
            "-",
            "10 x",
            None,
            note,
        )
    )
    return rows


def curves(settings: Settings) -> list[Row]:
    """The L1 loss of `model`, of plain PyTorch, and of plain PyTorch with another seed."""
    steps, side, width = (20, 64, 8) if settings.quick else (200, 128, 32)
    shared: dict[str, Any] = {"steps": steps, "side": side, "width": width}
    runs = alternate(
        1,
        (T + "curves", shared | {"implementation": "ours", "seed": 0}),
        (T + "curves", shared | {"implementation": "reference", "seed": 0}),
        (T + "curves", shared | {"implementation": "reference", "seed": 1}),
    )
    ours, theirs, other = ([fmean(losses[n : n + 10]) for n in range(0, steps, 10)] for losses in _losses(runs))
    apart, noise = (fmean(abs(a - b) for a, b in zip(theirs, curve, strict=True)) for curve in (ours, other))
    note = f"at the end {ours[-1]:.4f} and {theirs[-1]:.4f}, another seed {other[-1]:.4f}; side {side}, width {width}"
    what = f"loss curves of {steps} steps: mean difference of L1"
    return [
        Row(what, "plain PyTorch, two seeds", f"{apart:.4f}", f"{noise:.4f}", "-", "the seeds'", apart <= noise, note)
    ]  # fmt: skip


def _losses(runs: list[list[Measured]]) -> list[list[float]]:
    return [case[0].result["losses"] for case in runs]


def start(settings: Settings) -> list[Row]:
    """Commands, from the start of the process to its end, imports included."""
    source = str(inputs.archives(Path(settings.folder), 4, inputs.SHRINK_QUICK))
    out = str(inputs.scratch_folder(Path(settings.folder), "survey"))
    root = str(inputs.scratch_folder(Path(settings.folder), "published"))
    refreshing = ["refresh", "--source", source, "--root", root, "--registration", "none", "--quiet"]
    refreshing += ["--slices", "12"]  # of the 33 slices of a small T2
    shown, surveyed, _, refreshed = alternate(
        settings.times,
        (T + "command", {"arguments": ["--help"]}),
        (T + "command", {"arguments": ["survey", "--source", source, "--out", out, "--quiet"]}),
        (T + "command", {"arguments": refreshing}),  # publishes the version, in the first turn
        (T + "command", {"arguments": refreshing}),
    )
    return [
        _limit_row("ixi-etl --help", seconds(shown), 0.3, "s"),
        _limit_row("ixi-etl refresh, published before", seconds(refreshed), 1.5, "s"),
        _limit_row("ixi-etl survey, 8 small volumes", seconds(surveyed), 1.5, "s"),
    ]


def prefect(settings: Settings) -> list[Row]:
    """Prefect's part in a refresh of 600 and of 6,000 small subjects: the flow less the plain function."""
    folder, rows, own = Path(settings.folder), [], []
    for subjects in (20, 40) if settings.quick else (600, 6000):
        source = str(inputs.small_archives(folder, subjects))
        shared: dict[str, Any] = {"source": source, "scratch": settings.folder}
        shared |= {"warm": str(inputs.small_archives(folder, 8))}
        (plain,), (flow,) = alternate(1, (F + "plain", shared), (F + "flow", shared))
        require_equal("version", [plain], [flow])
        found = flow.result
        own.append((found["cpu"] - plain.result["cpu"], flow.peak_mb - plain.peak_mb, found["server_mb"]))
        note = f"{found['tasks']} task runs, {found['events']} events, {found['artifacts']} artifacts"
        note += f"; server {found['server_mb']:.0f} MB; CPU {found['cpu']:.1f} and {plain.result['cpu']:.1f} s"
        note += f"; peak {flow.peak_mb:.0f} and {plain.peak_mb:.0f} MB above {flow.base_mb:.0f} and {plain.base_mb:.0f}"
        what = f"refresh as a flow, {subjects:,} subjects"
        times = duration(flow.seconds), duration(plain.seconds)
        rows.append(Row(what, "the plain function", *times, f"{flow.seconds / plain.seconds:.2f} x", "-", None, note))
    (_, *small), (_, *large) = own
    grown = max(b - a for a, b in zip(small, large, strict=True))
    what = "the same, memory that Prefect adds, grown"
    return [*rows, Row(what, "-", f"{grown:.0f} MB", "-", "-", "flat (10 MB)", grown <= 10)]


ROWS: dict[str, Callable[[Settings], list[Row]]] = {
    "survey": survey,
    "remote": remote,
    "members": members,
    "refresh": refresh,
    "server": end_to_end,
    "overlap": overlap,
    "growth": growth,
    "reading": reading,
    "step": step,
    "curves": curves,
    "quality": quality,
    "start": start,
    "prefect": prefect,
}
