"""Jobs that tests run in child processes and kill; they report their stages through a pipe.

Jobs are forked from a process that has imported these modules (`multiprocessing`'s fork server), so that hundreds of
kills take minutes. Flows run in a new interpreter, because Prefect starts threads.
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

from ixi_etl.config import RefreshConfig
from ixi_etl.core.storage import DataRoot
from ixi_etl.dataset import versions
from ixi_etl.dataset.prune import prune_versions
from ixi_etl.errors import IxiError, LockedError
from ixi_etl.recipes import ixi, ixi_cluster, ixi_inputs, ixi_version
from ixi_etl.report import dataset_report

PRELOADED = (dask, distributed, fsspec, isal, pandera, SimpleITK, zarrs, dataset_report)
PIL.Image.init()
faulthandler.enable()  # `Job.result` sends SIGABRT to a job that hangs, which then prints its stack

STAGES = ("download", "name", "cut", "publish", "train", "done")
"""In the order of a run; a job is in the stage that it reported last."""


def _report(pipe: Connection, module: Any, name: str, stage: str, snapshot: Callable[[], Any] = lambda: None) -> None:
    """Make `module.name` report `stage` before its first call, and the result of `snapshot` after each call."""
    function, lock, reported = getattr(module, name), threading.Lock(), []

    @functools.wraps(function)  # Prefect reads the signature
    def reporting(*args: Any, **more: Any) -> Any:
        with lock:
            if not reported:
                reported.append(stage)
                pipe.send((stage, None))
        result = function(*args, **more)
        if (output := snapshot()) is not None:
            with lock:
                pipe.send((f"{stage} output", output))
        return result

    setattr(module, name, reporting)


def _report_refresh(pipe: Connection, config: RefreshConfig) -> None:
    unfinished = config.data_root.unfinished

    def modification_times() -> dict[str, int]:
        """Record or shard -> nanoseconds."""
        paths = [*unfinished.glob("*/*/IXI*.json"), *unfinished.glob("*/*/IXI*.shard")]
        return {path.name: path.stat().st_mtime_ns for path in paths}

    _report(pipe, ixi_inputs, "acquire_file", "download")
    _report(pipe, ixi, "find_published", "name")
    _report(pipe, ixi, "cut_subjects", "cut", modification_times)
    for module in (ixi, ixi_version):  # the plain refresh calls one, the flow the other
        _report(pipe, module, "publish_version", "publish")


def _with_segments(config: str, segment: int) -> SegmentedConfig:
    return SegmentedConfig.model_validate(json.loads(config) | {"segment_bytes": segment})


def do_refresh(pipe: Connection, config: str, segment: int) -> None:
    chosen = _with_segments(config, segment)
    _report_refresh(pipe, chosen)
    pipe.send(("done", ixi.refresh(chosen).version))


def kill_itself_when(folder: Path, pattern: str, count: int) -> None:
    """Send SIGKILL to this process before its next file operation once `count` paths in the folder match.

    The kill comes at the same point on every run, however busy the machine is.
    """

    def hook(event: str, arguments: object) -> None:
        file_operation = event in ("open", "os.mkdir", "os.rename", "os.link", "os.remove")
        if file_operation and len(list(folder.glob(pattern))) >= count:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def do_command(pipe: Connection, arguments: list[str], output: str, memory: int | None = None) -> None:
    """Run `ixi-etl` with its output in the file `output`, in at most `memory` bytes of address space."""
    from flows.cli import main

    if memory:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)
    main(arguments)


def do_refresh_killed(pipe: Connection, config: str, pattern: str, count: int) -> None:
    """Run a refresh that is killed when `count` paths of its unfinished work match."""
    chosen = RefreshConfig.model_validate_json(config)
    kill_itself_when(chosen.data_root.unfinished, pattern, count)
    ixi.refresh(chosen)


def do_training_killed(pipe: Connection, root: str, settings: dict[str, Any], run: str, pattern: str) -> None:
    """Run a training that is killed when a path of its run matches."""
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
    _report_refresh(pipe, chosen)  # before the import of the flow, which makes tasks of the functions
    from flows.refresh_dataset import refresh_dataset

    pipe.send(("done", refresh_dataset(chosen).version))


def do_training_flow(pipe: Connection, root: str, settings: dict[str, Any], run: str, api: str) -> None:
    os.environ["PREFECT_API_URL"] = api
    from flows.train_pix2pix import train_pix2pix
    from model import jobs

    _report(pipe, jobs, "train", "train")
    pipe.send(("done", train_pix2pix(root=root, run=run, settings=settings).name))


def do_measured_refresh(pipe: Connection, config: str) -> None:
    """Run a refresh that reports its slowest volume or subject, in seconds, and its peak memory, in bytes."""
    from ixi_etl.scans import survey

    slowest = {"": 0.0}

    def measure(module: Any, name: str, label: Callable[..., str]) -> None:
        function = getattr(module, name)

        def timed(*args: Any, **more: Any) -> Any:
            start = time.monotonic()
            pipe.send((f"{name} of", label(*args)))  # so that a crash or a hang can be attributed
            result = function(*args, **more)
            seconds = time.monotonic() - start
            if seconds > max(slowest.values()):
                slowest.clear()
                slowest[label(*args)] = seconds
            return result

        setattr(module, name, timed)

    measure(survey, "_row", lambda _modality, member, *_: str(member.name))
    measure(ixi_cluster, "cut_subject", lambda job, *_: str(job.subject_id))
    made = ixi.refresh(RefreshConfig.model_validate_json(config))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    pipe.send(("done", {"version": made.version, "slowest": slowest, "peak": peak}))


def _send_result_or_error(pipe: Connection, job: Callable[[], str]) -> None:
    """Send the result of a job, or its error message."""
    try:
        pipe.send(("done", job()))
    except IxiError as error:
        pipe.send(("done", str(error)))


def do_refresh_or_report_error(pipe: Connection, config: str) -> None:
    _send_result_or_error(pipe, lambda: ixi.refresh(RefreshConfig.model_validate_json(config)).version)


def do_refresh_with_retries(pipe: Connection, config: str) -> None:
    """Run a refresh; retry while another process holds the lock of the root."""
    while True:
        try:
            pipe.send(("done", ixi.refresh(RefreshConfig.model_validate_json(config)).version))
        except LockedError:
            continue
        return


def do_training_or_report_error(pipe: Connection, root: str, settings: dict[str, Any], run: str) -> None:
    from model import jobs
    from model.config import TrainConfig

    _report(pipe, jobs, "train", "train")

    def job() -> str:
        jobs.train_run(jobs.prepare_run(root, TrainConfig.model_validate(settings), run))
        return run

    _send_result_or_error(pipe, job)


def do_prune(pipe: Connection, root: str) -> None:
    pipe.send(("prune", None))
    prune_versions(DataRoot(root), 1)
    pipe.send(("done", None))


def do_prune_until_refreshed(pipe: Connection, root: str) -> None:
    """Remove old versions in a loop until a refresh has published a version; report the number of removals."""
    data_root, removed = DataRoot(root), 0
    existing = set(versions.published_versions(data_root))
    while not set(versions.published_versions(data_root)) - existing:
        try:
            removed += sum(decision.removed for decision in prune_versions(data_root, 1))
        except LockedError:
            continue
    pipe.send(("done", removed))
