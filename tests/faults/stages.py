"""The jobs that run in processes to be killed: they report their stage through a pipe.

Processes are forked from one that has imported all this (`multiprocessing`'s fork server), so that hundreds of kills
take minutes; flows run in a fresh process, since Prefect starts threads.
"""

from __future__ import annotations

import faulthandler
import functools
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import dask.base
import dask.delayed
import distributed
import fsspec.implementations.http
import fsspec.implementations.local
import isal.igzip_lib
import pandera.backends.pandas.register
import pandera.pandas
import PIL.Image
import SimpleITK
import zarrs
from answers import SegmentedConfig

from ixi_etl import modalities
from ixi_etl.config import RefreshConfig
from ixi_etl.core.storage import DataRoot
from ixi_etl.dataset import versions
from ixi_etl.dataset.prune import prune_versions
from ixi_etl.errors import IxiError, LockedError
from ixi_etl.recipes import ixi, ixi_inputs, ixi_version
from ixi_etl.report import dataset_report

PRELOADED = (dask, distributed, fsspec, isal, pandera, SimpleITK, zarrs, dataset_report)
PIL.Image.init()
faulthandler.enable()  # a job that hangs gets SIGABRT, and prints its stack

STAGES = ("download", "name", "cut", "publish", "train", "done")
"""In order; a job is in the stage that it reported last."""


def _report(pipe: Connection, module: Any, name: str, stage: str, leave: Callable[[], Any] = lambda: None) -> None:
    """Make `module.name` report `stage` before its first call, and the result of `leave` after each call."""
    function, lock, reported = getattr(module, name), threading.Lock(), []

    @functools.wraps(function)  # Prefect reads the signature
    def reporting(*args: Any, **more: Any) -> Any:
        with lock:
            if not reported:
                reported.append(stage)
                pipe.send((stage, None))
        result = function(*args, **more)
        if (left := leave()) is not None:
            with lock:
                pipe.send((f"{stage} left", left))
        return result

    setattr(module, name, reporting)


def _report_refresh(pipe: Connection, config: RefreshConfig) -> None:
    work = config.data_root.unfinished

    def made() -> dict[str, int]:
        """When each record and shard was written."""
        return {p.name: p.stat().st_mtime_ns for p in [*work.glob("*/*/IXI*.json"), *work.glob("*/*/IXI*.shard")]}

    _report(pipe, ixi_inputs, "acquire_file", "download")
    _report(pipe, ixi_inputs, "name_version", "name")
    _report(pipe, ixi, "cut_subjects", "cut", made)
    for module in (ixi, ixi_version):  # used by the plain refresh and by the flow
        _report(pipe, module, "publish_version", "publish")


def _with_segments(config: str, segment: int) -> SegmentedConfig:
    return SegmentedConfig.model_validate(json.loads(config) | {"segment_bytes": segment})


def do_refresh(pipe: Connection, config: str, segment: int) -> None:
    chosen = _with_segments(config, segment)
    _report_refresh(pipe, chosen)
    pipe.send(("done", ixi.refresh(chosen).version))


def kill_itself_when(folder: Path, pattern: str, count: int) -> None:
    """SIGKILL this process when `count` paths match and it is about to touch another file.

    The moment is the same on every run, however busy the machine is.
    """

    def hook(event: str, arguments: object) -> None:
        touches = event in ("open", "os.mkdir", "os.rename", "os.link", "os.remove")
        if touches and len(list(folder.glob(pattern))) >= count:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def do_command(pipe: Connection, arguments: list[str], output: str, memory: int | None = None) -> None:
    """Run `ixi-etl` with its output in the file `output`, and `memory` bytes of address space."""
    from flows.cli import main

    if memory:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)
    main(arguments)


def do_refresh_killed(pipe: Connection, config: str, pattern: str, count: int) -> None:
    """A refresh that is killed when `count` paths of its unfinished work match."""
    chosen = RefreshConfig.model_validate_json(config)
    kill_itself_when(chosen.data_root.unfinished, pattern, count)
    ixi.refresh(chosen)


def do_training_killed(pipe: Connection, root: str, settings: dict[str, Any], run: str, pattern: str) -> None:
    """A training that is killed when a path of its run matches."""
    kill_itself_when(Path(root) / "runs" / run, pattern, 1)
    do_training(pipe, root, settings, run)


def do_training(pipe: Connection, root: str, settings: dict[str, Any], run: str) -> None:
    from model import jobs
    from model.config import TrainConfig

    _report(pipe, jobs, "train", "train")
    jobs.train_run(jobs.prepare_run(root, TrainConfig.model_validate(settings), run), resume=True)
    pipe.send(("done", run))


def do_refresh_flow(pipe: Connection, config: str, segment: int, api: str) -> None:
    os.environ["PREFECT_API_URL"] = api
    chosen = _with_segments(config, segment)
    _report_refresh(pipe, chosen)  # before the flow makes tasks of the functions
    from flows.refresh_dataset import refresh_dataset

    pipe.send(("done", refresh_dataset(chosen).version))


def do_training_flow(pipe: Connection, root: str, settings: dict[str, Any], run: str, api: str) -> None:
    os.environ["PREFECT_API_URL"] = api
    from flows.train_pix2pix import train_pix2pix
    from model import jobs

    _report(pipe, jobs, "train", "train")
    pipe.send(("done", train_pix2pix(root=root, run=run, settings=settings).name))


def fetched(folder: Path) -> dict[str, list[int]]:
    """Archive -> its finished segments, for archives that are not complete."""
    records = {m: folder / f"{modalities.archive_name(m)}.part.json" for m in modalities.MODALITIES}
    return {m: (versions.read_json(path) or {}).get("done", []) for m, path in records.items()}


def do_volumes(pipe: Connection, config: str) -> None:
    """A refresh that reports its slowest volume, in seconds, and its peak memory, in bytes."""
    from ixi_etl.scans import survey

    slowest = {"": 0.0}

    def timed(module: Any, name: str, what: Callable[..., str]) -> None:
        function = getattr(module, name)

        def timing(*args: Any, **more: Any) -> Any:
            start = time.monotonic()
            pipe.send((f"{name} of", what(*args)))  # so that a crash or a hang can be attributed
            result = function(*args, **more)
            took = time.monotonic() - start
            if took > max(slowest.values()):
                slowest.clear()
                slowest[what(*args)] = took
            return result

        setattr(module, name, timing)

    timed(survey, "_row", lambda modality, member: str(member.name))
    timed(ixi, "cut_subject", lambda job, *_: str(job.subject_id))
    made = ixi.refresh(RefreshConfig.model_validate_json(config))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    pipe.send(("done", {"version": made.version, "slowest": slowest, "peak": peak}))


def _send_result(pipe: Connection, job: Callable[[], str]) -> None:
    """Report the result of a job, or its error message."""
    try:
        pipe.send(("done", job()))
    except IxiError as error:
        pipe.send(("done", str(error)))


def do_refresh_or_say(pipe: Connection, config: str) -> None:
    _send_result(pipe, lambda: ixi.refresh(RefreshConfig.model_validate_json(config)).version)


def do_refresh_or_wait(pipe: Connection, config: str) -> None:
    """Repeat while another process holds the root."""
    while True:
        try:
            pipe.send(("done", ixi.refresh(RefreshConfig.model_validate_json(config)).version))
        except LockedError:
            continue
        return


def do_training_or_say(pipe: Connection, root: str, settings: dict[str, Any], run: str) -> None:
    from model import jobs
    from model.config import TrainConfig

    _report(pipe, jobs, "train", "train")

    def job() -> str:
        jobs.train_run(jobs.prepare_run(root, TrainConfig.model_validate(settings), run))
        return run

    _send_result(pipe, job)


def do_prune(pipe: Connection, root: str) -> None:
    pipe.send(("prune", None))
    prune_versions(DataRoot(root), 1)
    pipe.send(("done", None))


def do_prunes(pipe: Connection, root: str) -> None:
    """Remove old versions again and again, until four are gone or a refresh has made its version."""
    data_root, removed = DataRoot(root), 0
    existing = set(versions.published_versions(data_root))
    while not set(versions.published_versions(data_root)) - existing:
        try:
            removed += sum(verdict.removed for verdict in prune_versions(data_root, 1))
        except LockedError:
            continue
    pipe.send(("done", removed))
