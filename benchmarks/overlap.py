"""The refresh from a server as slow as the cut: what the overlap of download and cut leaves of the sum of both.

The archives have a twelfth of IXI's pairs, and segments are smaller by the share of its bytes. The rate of the server
is chosen so that the download alone takes as long as everything after it. One core cuts: a server that shares the
machine, and the download, need the other. The last subject can only be cut when the download has ended, so with N pairs
the time is at least 1 + 1/N times that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import inputs
from benchmarks.measure import Row, Settings, alternate, duration, require_equal, seconds
from benchmarks.serving import serving
from ixi_etl.config import RefreshConfig
from ixi_etl.core.http_options import HttpOptions

Work = Callable[[], dict[str, Any]]
SEGMENT_BYTES, IXI_BYTES = 8 << 20, 8.7e9
RUNS = 3


class ScaledConfig(RefreshConfig):
    """A refresh with segments of `segment_bytes`."""

    segment_bytes: int = SEGMENT_BYTES

    @property
    def http(self) -> HttpOptions:
        return replace(super().http, segment_bytes=self.segment_bytes)


def download(source: str, warm: str, scratch: str, rate: float, segment: int) -> Work:
    """Download and verify both archives, and no more."""
    from ixi_etl.recipes.ixi_inputs import acquire_inputs

    return _timed(lambda config: acquire_inputs(config).locations, source, warm, scratch, rate, segment)


def whole(source: str, warm: str, scratch: str, rate: float, segment: int) -> Work:
    """The refresh, download included; the archives in `source` are used in place if `rate` is 0."""
    from ixi_etl.recipes.ixi import refresh

    return _timed(lambda config: refresh(config).version, source, warm, scratch, rate, segment)


def _timed(
    job: Callable[[RefreshConfig], Any], source: str, warm: str, scratch: str, rate: float, segment: int
) -> Work:
    import time

    from ixi_etl.recipes.ixi_inputs import acquire_inputs

    def work_on(source: str, name: str, rate: float) -> dict[str, Any]:
        with serving(Path(source), rate) as url:
            root = str(inputs.scratch_folder(Path(scratch), name))
            config = ScaledConfig(root=root, source=url if rate else source, workers=1, segment_bytes=segment)
            if not rate:
                acquire_inputs(config)  # verify them
            start = time.perf_counter()
            result = job(config)
            return {"seconds": time.perf_counter() - start, "version": result}

    work_on(warm, "overlap-warm", 10e6)  # lazy imports
    return lambda: work_on(source, "overlap", rate)


def overlap(settings: Settings) -> list[Row]:
    """Refresh 48 pairs with the default options, from a server that takes as long as the cut."""
    folder, pairs, runs = Path(settings.folder), 4 if settings.quick else 48, min(settings.times, RUNS)
    source = inputs.archives(folder, pairs, inputs.SHRINK_QUICK if settings.quick else 1)
    warm = inputs.archives(folder, 2, inputs.SHRINK_QUICK)
    size = sum(path.stat().st_size for path in source.glob("*.tar"))
    shared: dict[str, Any] = {
        "source": str(source),
        "warm": str(warm),
        "scratch": settings.folder,
        "segment": max(64 << 10, int(SEGMENT_BYTES * size / IXI_BYTES)),
    }
    case = "benchmarks.overlap:"
    (trial,) = alternate(1, (case + "whole", shared | {"rate": 0}))
    rate = size / seconds(trial)
    cut, fetched, overlapped = alternate(
        runs,
        (case + "whole", shared | {"rate": 0}),
        (case + "download", shared | {"rate": rate}),
        (case + "whole", shared | {"rate": rate}),
    )
    require_equal("version", cut, overlapped)
    share = median(
        run.seconds / max(one.seconds, other.seconds) for run, one, other in zip(overlapped, cut, fetched, strict=True)
    )
    note = (
        f"download alone {duration(seconds(fetched))} at {rate * 8 / 1e6:.0f} Mbit/s, the rest alone "
        f"{duration(seconds(cut))}"
    )
    slower = duration(max(seconds(cut), seconds(fetched)))
    what = f"refresh, {pairs} pairs, from a server"
    return [
        Row(what, "download or cut alone", duration(seconds(overlapped)), slower, f"{share:.2f} x", "at most 1.1 x",
            share <= 1.1, note)
    ]  # fmt: skip
