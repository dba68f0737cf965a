"""The jobs as they run in processes that are killed: they tell where they are through a pipe.

Processes are forked from one that has imported all this (`multiprocessing`'s fork server), so that hundreds of kills
take minutes; `flow` runs in a fresh process, since Prefect starts threads.
"""

from __future__ import annotations

import faulthandler
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

from ixi_etl import catalog, dataset, refresh, report, transfer
from ixi_etl.config import RefreshConfig
from ixi_etl.errors import IxiError, LockedError
from ixi_etl.places import Places
from ixi_etl.prune import prune

PRELOADED = (dask, distributed, fsspec, isal, pandera, SimpleITK, zarrs, report)
PIL.Image.init()
faulthandler.enable()  # who hangs is ended with SIGABRT, and tells where

STAGES = ("download", "name", "cut", "publish", "train", "done")
"""In their order; a job is in the one that it has told last."""


def _tell(pipe: Connection, module: Any, name: str, stage: str, leave: Callable[[], Any] = lambda: None) -> None:
    """Have `module.name` tell `stage` before it runs the first time, and what `leave` gives when it has run."""
    function, lock, told = getattr(module, name), threading.Lock(), []

    def telling(*args: Any, **more: Any) -> Any:
        with lock:
            if not told:
                told.append(stage)
                pipe.send((stage, None))
        result = function(*args, **more)
        if (left := leave()) is not None:
            with lock:
                pipe.send((f"{stage} left", left))
        return result

    setattr(module, name, telling)


def _tell_refresh(pipe: Connection, config: RefreshConfig, segment: int) -> None:
    transfer.SEGMENT = segment
    work = config.places.unfinished

    def made() -> dict[str, int]:
        """When each record and shard was written."""
        return {p.name: p.stat().st_mtime_ns for p in [*work.glob("*/*/IXI*.json"), *work.glob("*/*/IXI*.shard")]}

    _tell(pipe, refresh, "acquire_file", "download")
    _tell(pipe, refresh, "name_version", "name")
    _tell(pipe, refresh, "cut_subjects", "cut", made)
    _tell(pipe, refresh, "publish_version", "publish")


def do_refresh(pipe: Connection, config: str, segment: int) -> None:
    chosen = RefreshConfig.model_validate_json(config)
    _tell_refresh(pipe, chosen, segment)
    pipe.send(("done", refresh.refresh(chosen).version))


def kill_itself_when(folder: Path, pattern: str, count: int) -> None:
    """SIGKILL this process as soon as so many paths match and it is about to touch another file.

    The moment is the same on every run, however busy the machine is.
    """

    def hook(event: str, arguments: object) -> None:
        touches = event in ("open", "os.mkdir", "os.rename", "os.link", "os.remove")
        if touches and len(list(folder.glob(pattern))) >= count:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def do_command(pipe: Connection, arguments: list[str], said: str, memory: int | None = None) -> None:
    """`ixi-etl` with these arguments, and what it prints in the file `said`. `memory`: bytes of address space."""
    from flows.cli import main

    if memory:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    file = os.open(said, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)
    main(arguments)


def do_refresh_killed(pipe: Connection, config: str, pattern: str, count: int) -> None:
    """A refresh that is killed when so many paths of its unfinished work match."""
    chosen = RefreshConfig.model_validate_json(config)
    kill_itself_when(chosen.places.unfinished, pattern, count)
    refresh.refresh(chosen)


def do_training_killed(pipe: Connection, root: str, settings: dict[str, Any], run: str, pattern: str) -> None:
    """A training that is killed when a path of its run matches."""
    kill_itself_when(Path(root) / "runs" / run, pattern, 1)
    do_training(pipe, root, settings, run)


def do_training(pipe: Connection, root: str, settings: dict[str, Any], run: str) -> None:
    from model import run as runs
    from model.config import TrainConfig

    _tell(pipe, runs, "train", "train")
    runs.train_run(runs.prepare(root, TrainConfig.model_validate(settings), run), resume=True)
    pipe.send(("done", run))


def do_refresh_flow(pipe: Connection, config: str, segment: int, api: str) -> None:
    os.environ["PREFECT_API_URL"] = api
    from flows.refresh_dataset import refresh_dataset

    chosen = RefreshConfig.model_validate_json(config)
    _tell_refresh(pipe, chosen, segment)
    pipe.send(("done", refresh_dataset(chosen).version))


def do_training_flow(pipe: Connection, root: str, settings: dict[str, Any], run: str, api: str) -> None:
    os.environ["PREFECT_API_URL"] = api
    from flows.train_pix2pix import train_pix2pix
    from model import run as runs

    _tell(pipe, runs, "train", "train")
    pipe.send(("done", train_pix2pix(root=root, run=run, settings=settings).name))


def fetched(folder: Path) -> dict[str, list[int]]:
    """Archive -> the segments of it that are done, of those that are not whole yet."""
    records = {m: folder / f"{catalog.archive_name(m)}.part.json" for m in catalog.MODALITIES}
    return {m: (dataset.read_json(path) or {}).get("done", []) for m, path in records.items()}


def do_volumes(pipe: Connection, config: str) -> None:
    """A refresh that tells the slowest volume, in seconds, and the most memory it took, in bytes."""
    from ixi_etl import survey

    slowest = {"": 0.0}

    def timed(module: Any, name: str, what: Callable[..., str]) -> None:
        function = getattr(module, name)

        def timing(*args: Any, **more: Any) -> Any:
            begun = time.monotonic()
            pipe.send((f"{name} of", what(*args)))  # if it crashes or hangs, this is what did it
            result = function(*args, **more)
            took = time.monotonic() - begun
            if took > max(slowest.values()):
                slowest.clear()
                slowest[what(*args)] = took
            return result

        setattr(module, name, timing)

    timed(survey, "_row", lambda modality, member: str(member.name))
    timed(refresh, "cut_subject", lambda job, *_: str(job.subject_id))
    made = refresh.refresh(RefreshConfig.model_validate_json(config))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    pipe.send(("done", {"version": made.version, "slowest": slowest, "peak": peak}))


def _said(pipe: Connection, job: Callable[[], str]) -> None:
    """Tell what a job gives, or the one line that it ends in."""
    try:
        pipe.send(("done", job()))
    except IxiError as error:
        pipe.send(("done", str(error)))


def do_refresh_or_say(pipe: Connection, config: str) -> None:
    _said(pipe, lambda: refresh.refresh(RefreshConfig.model_validate_json(config)).version)


def do_refresh_or_wait(pipe: Connection, config: str) -> None:
    """Try again for as long as somebody else holds the root."""
    while True:
        try:
            pipe.send(("done", refresh.refresh(RefreshConfig.model_validate_json(config)).version))
        except LockedError:
            continue
        return


def do_training_or_say(pipe: Connection, root: str, settings: dict[str, Any], run: str) -> None:
    from model import run as runs
    from model.config import TrainConfig

    _tell(pipe, runs, "train", "train")

    def job() -> str:
        runs.train_run(runs.prepare(root, TrainConfig.model_validate(settings), run))
        return run

    _said(pipe, job)


def do_prune(pipe: Connection, root: str) -> None:
    pipe.send(("prune", None))
    prune(Places(root), 1)
    pipe.send(("done", None))


def do_prunes(pipe: Connection, root: str) -> None:
    """Remove old versions again and again, until four are gone or a refresh has made its version."""
    places, removed = Places(root), 0
    there = set(dataset.published(places))
    while not set(dataset.published(places)) - there:
        try:
            removed += sum(verdict.removed for verdict in prune(places, 1))
        except LockedError:
            continue
    pipe.send(("done", removed))
