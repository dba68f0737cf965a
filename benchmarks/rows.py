"""The rows of the table: which cases are compared, on which inputs, and the target of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks import inputs
from benchmarks.measure import Measured, Row, Settings, agree, alternate, duration, faster, ratio, seconds

E, R, T = "benchmarks.etl:", "benchmarks.reading:", "benchmarks.training:"


def _shrink(settings: Settings) -> int:
    return inputs.SHRINK_QUICK if settings.quick else 1


def _warm(settings: Settings) -> dict[str, str]:
    """Small archives that each ETL case processes first, so that lazy imports are not timed."""
    return {"warm": str(inputs.archives(Path(settings.folder), 2, inputs.SHRINK_QUICK))}


def survey(settings: Settings) -> list[Row]:
    """Survey 200 volumes, and as many members as IXI has."""
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
    agree("depths", ours, extracted, headers, torchio)
    what = f"survey, {volumes} volumes"
    members = {"T1": 30, "T2": 30} if settings.quick else inputs.MEMBERS
    hollow = str(inputs.hollow(folder, _shrink(settings), members))
    (whole,) = alternate(settings.times, (E + "survey", {"source": hollow} | warm))
    count, most = whole[0].facts["members"], max(r.facts["inflated"] for r in [*ours, *whole])
    return [
        faster(what, "extractall + nibabel.load", extracted, ours, 20),
        faster(what, "nibabel.load, extracted before", headers, ours, None),
        faster(what, "extractall + TorchIO", torchio, ours, None),
        _against(f"survey, {count:,} members", "", seconds(whole), 3, "s"),
        Row("survey, inflated a member", "", f"{most} B", "-", "-", "8 KiB", most <= 8 << 10),
    ]


def _against(what: str, peer: str, value: float, target: float, unit: str) -> Row:
    shown = duration(value) if unit == "s" else f"{value:.3g} {unit}"
    return Row(what, peer or "-", shown, "-", "-", f"{target:g} {unit}", value <= target)


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
    agree("depths", ours, everything)
    members = {"T1": 30, "T2": 30} if settings.quick else inputs.MEMBERS
    hollow = inputs.hollow(folder, _shrink(settings), members)
    (whole,) = alternate(1, (E + "survey_remote", {"source": str(hollow)} | warm))
    size = sum((hollow / f"IXI-{m}.tar").stat().st_size for m in members)
    share, moved = whole[0].facts["bytes"] / size, ours[0].facts["bytes"] / everything[0].facts["bytes"]
    what = f"survey before download, {ours[0].facts['members']} members"
    count = whole[0].facts["members"]
    loopback = "the download is over loopback, faster than any network"
    return [
        faster(what, "download all, then survey", everything, ours, None),
        Row(what + ", bytes", "download all", f"{moved:.3%}", "100%", "-", "0.5%", moved <= 0.005, loopback),
        _against(f"survey before download, {count:,} members", "", seconds(whole), 60, "s"),
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
    from ixi_etl.config import RefreshConfig

    what = "refresh --fetch members, bytes over the selected members'"
    if "fetch" not in RefreshConfig.model_fields:
        return [Row(what, "whole archives", "not there yet", "-", "-", "2%", False)]
    odd = 2 if settings.quick else 8
    source = inputs.archives(Path(settings.folder), 6 if settings.quick else 24, _shrink(settings), odd)
    (ours,) = alternate(1, (E + "fetch_members", {"source": str(source), "scratch": settings.folder}))
    facts = ours[0].facts
    over, everything = facts["bytes"] / facts["selected"] - 1, sum(p.stat().st_size for p in source.glob("*.tar"))
    note = f"{facts['pairs']} pairs of {facts['pairs'] + odd}, {facts['requests']} requests"
    share = f"{everything / facts['selected'] - 1:.1%}"
    return [Row(what, "whole archives", f"{over:.2%}", share, "-", "2%", over <= 0.02, note)]


def refresh(settings: Settings) -> list[Row]:
    """Refresh 24 pairs with the default options, and as the peers do: without registration and pictures."""
    pairs = 4 if settings.quick else 24
    source = str(inputs.archives(Path(settings.folder), pairs, _shrink(settings)))
    at: dict[str, Any] = {"source": source, "scratch": settings.folder} | _warm(settings)
    default, index, naive, anatomical, torchio, monai, floor = alternate(
        settings.times,
        (E + "refresh", at | {"pairing": "anatomical", "default": True}),
        (E + "refresh", at | {"pairing": "index"}),
        (E + "refresh_naive", at),
        (E + "refresh", at | {"pairing": "anatomical"}),
        (E + "refresh_torchio", at),
        (E + "refresh_monai", at),
        (E + "inflate_only", {"source": source}),
    )
    agree("slabs", index, naive)
    agree("slabs", anatomical, torchio, monai)
    what, slower = f"refresh, {pairs} pairs, ", 1 / ratio(floor, anatomical)
    share = f"{slower:.2f} x"
    registered = "with registration and pictures; the peer does neither"
    return [
        Row(
            what + "as by default", "extractall + get_fdata + np.save", duration(seconds(default)),
            duration(seconds(naive)), f"{ratio(naive, default):.1f} x", "-", None, registered,
        ),
        faster(what + "index", "extractall + get_fdata + np.save", naive, index, 8),
        faster(what + "anatomical", "TorchIO Resample", torchio, anatomical, 7),
        faster(what + "anatomical", "MONAI ResampleToMatchd", monai, anatomical, 7),
        Row(
            what + "anatomical", "floor: ISA-L inflates them", duration(seconds(anatomical)),
            duration(seconds(floor)), share, "at most 2.3 x", slower <= 2.3,
        ),
    ]  # fmt: skip


def growth(settings: Settings) -> list[Row]:
    """Time and memory of a refresh by the number of pairs."""
    sizes = (4, 8) if settings.quick else (8, 16, 32, 64)
    folder = Path(settings.folder)
    cases = []
    for pairs in sizes:
        source = str(inputs.archives(folder, pairs, _shrink(settings)))
        at: dict[str, Any] = {"source": source, "scratch": settings.folder} | _warm(settings)
        cases.append((E + "refresh", at | {"pairing": "anatomical"}))
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
        Row("refresh, time by pairs, off a line", "-", f"{off:.1%}", "-", "-", "10%", off <= 0.1, shown),
        Row("refresh, peak memory grown", "-", f"{grown:.0%}", "-", "-", "flat (10%)", grown <= 0.1, memory),
        Row("the same, of the whole process", "-", f"{process_grown:.0%}", "-", "-", "-", None, process_memory),
    ]


def _line(x: list[int], y: list[float]) -> tuple[float, float]:
    """Slope and intercept of the least-squares line."""
    mean_x, mean_y = fmean(x), fmean(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    return slope, mean_y - slope * mean_x


def reading(settings: Settings) -> list[Row]:
    """Read a first epoch; and the share of a training step that drawing its batch takes."""
    pairs = 6 if settings.quick else 64
    source = str(inputs.archives(Path(settings.folder), pairs, _shrink(settings)))
    places = {name: str(inputs.fresh(Path(settings.folder), f"reading-{name}")) for name in ("folder", "warm")}
    made, _ = alternate(
        1,
        (R + "prepare", {"source": source, "folder": places["folder"]}),
        (R + "prepare", {"source": _warm(settings)["warm"], "folder": places["warm"]}),
    )
    peers = {
        "DataLoader over .npy, 0 workers": ("npy_loader", {"workers": 0}),
        "DataLoader over .npy, 2 workers": ("npy_loader", {"workers": 2}),
        "MONAI CacheDataset": ("monai_cache", {}),
        "TorchIO Queue": ("torchio_queue", {}),
        "zarr-python's codec pipeline": ("zarr_default", {}),
    }
    ours, *theirs = alternate(
        settings.times, (R + "ours", places), *((R + case, places | more) for case, more in peers.values())
    )
    agree("pixels", ours, *theirs)
    best = min(range(len(theirs)), key=lambda n: seconds(theirs[n]))
    rows = []
    for n, (name, peer) in enumerate(zip(peers, theirs, strict=True)):
        times = ratio(peer, ours)
        wanted, reached = ("3 x the best", times >= 3) if n == best else ("-", None)
        rows.append(
            Row("reading, first epoch", name, _rate(ours), _rate(peer), f"{times:.1f} x", wanted, reached)
        )  # fmt: skip
    held = [median(r.held_mb for r in case) for case in (ours, theirs[list(peers).index("MONAI CacheDataset")])]
    share, note = held[0] / held[1], f"the slabs are {made[0].facts['mb']:.0f} MB"
    rows.append(
        Row("reading, memory held", "MONAI CacheDataset", f"{held[0]:.0f} MB", f"{held[1]:.0f} MB", f"{share:.3f} x",
            "half", share <= 0.5, note)
    )  # fmt: skip
    side, width = (64, 8) if settings.quick else (256, 64)
    for batch in (1, 8):
        times = 20 if settings.quick else 500
        alone, step = alternate(
            1,
            (R + "batch_alone", {"folder": places["folder"], "batch": batch, "times": times}),
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
    return f"{runs[0].facts['pairs'] / seconds(runs):,.0f} pairs/s"


def step(settings: Settings) -> list[Row]:
    """A training step on this CPU: `model` beside plain PyTorch, with both norms."""
    side, width = (64, 8) if settings.quick else (256, 64)
    rows = []
    for batch in (1, 8):
        times = 2 if settings.quick else {1: 8, 8: 3}[batch]
        at = {"batch": batch, "side": side, "width": width, "times": times}
        ours, batch_norm, instance_norm = alternate(
            settings.times if batch == 1 else min(settings.times, 3),
            (T + "our_step", at),
            (T + "reference_step", at | {"norm": "batch"}),
            (T + "reference_step", at | {"norm": "instance"}),
        )
        what = f"training step on CPU, batch {batch}"
        rows += [
            faster(what, "plain PyTorch, fp32, batch norm", batch_norm, ours, 1.6),
            faster(what, "plain PyTorch, fp32, instance norm", instance_norm, ours, 1.6),
        ]
    elsewhere = "python -m benchmarks.train_gpu, where there is one"
    rows.append(
        Row(
            "training step on a GPU, batch 1",
            "plain PyTorch, fp32",
            "not here",
            "not here",
            "-",
            "10 x",
            None,
            elsewhere,
        )
    )
    return rows


def curves(settings: Settings) -> list[Row]:
    """The L1 loss of `model`, of plain PyTorch, and of plain PyTorch with another seed."""
    steps, side, width = (20, 64, 8) if settings.quick else (200, 128, 32)
    at: dict[str, Any] = {"steps": steps, "side": side, "width": width}
    runs = alternate(
        1,
        (T + "curves", at | {"implementation": "ours", "seed": 0}),
        (T + "curves", at | {"implementation": "reference", "seed": 0}),
        (T + "curves", at | {"implementation": "reference", "seed": 1}),
    )
    ours, theirs, other = ([fmean(losses[n : n + 10]) for n in range(0, steps, 10)] for losses in _losses(runs))
    apart, noise = (fmean(abs(a - b) for a, b in zip(theirs, curve, strict=True)) for curve in (ours, other))
    note = f"at the end {ours[-1]:.4f} and {theirs[-1]:.4f}, another seed {other[-1]:.4f}; side {side}, width {width}"
    what = f"loss curves of {steps} steps: mean difference of L1"
    return [
        Row(what, "plain PyTorch, two seeds", f"{apart:.4f}", f"{noise:.4f}", "-", "the seeds'", apart <= noise, note)
    ]  # fmt: skip


def _losses(runs: list[list[Measured]]) -> list[list[float]]:
    return [case[0].facts["losses"] for case in runs]


def start(settings: Settings) -> list[Row]:
    """Commands, from the start of the process to its end, imports included."""
    source = str(inputs.archives(Path(settings.folder), 4, inputs.SHRINK_QUICK))
    out = str(inputs.fresh(Path(settings.folder), "survey"))
    shown, surveyed = alternate(
        settings.times,
        (T + "command", {"arguments": ["--help"]}),
        (T + "command", {"arguments": ["survey", "--source", source, "--out", out, "--quiet"]}),
    )
    return [
        _against("ixi-etl --help", "", seconds(shown), 0.5, "s"),
        _against("ixi-etl survey, 8 small volumes", "", seconds(surveyed), 1.5, "s"),
    ]


ROWS: dict[str, Callable[[Settings], list[Row]]] = {
    "survey": survey,
    "remote": remote,
    "members": members,
    "refresh": refresh,
    "growth": growth,
    "reading": reading,
    "step": step,
    "curves": curves,
    "start": start,
}
