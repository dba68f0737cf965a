"""Cut subjects while their archives are being downloaded: a head start for the stages that follow.

The head start fills the folder of finished subjects, and nothing else. When the archives are verified, the stages run
as they always do, and `cut_subject` reuses a record only if the verified members have the SHA-256s in it. So whatever
happens here can cost time, but cannot change a byte of a version.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from ixi_etl.config import RefreshConfig
from ixi_etl.core.progress import Progress, no_progress
from ixi_etl.dataset import selection, versions
from ixi_etl.errors import DatasetError, IxiError
from ixi_etl.pairing.cut import CutJob, MemberRef, cut_unverified
from ixi_etl.recipes.ixi_inputs import (
    RefreshJob,
    acquire_inputs,
    acquire_members,
    collect_inputs,
    create_cut_jobs,
    create_job,
    find_sources,
)
from ixi_etl.scans.survey import survey
from ixi_etl.sources.arrivals import Arrival, keep_pace
from ixi_etl.sources.cache import VerifiedFile
from ixi_etl.sources.catalog import Source
from ixi_etl.sources.partial import bytes_to_come

log = logging.getLogger(__name__)


def start_job(config: RefreshConfig, progress: Progress = no_progress) -> RefreshJob:
    """Fetch and verify all inputs, with a head start on the cut, and compute the version's name."""
    if config.fetch == "members":
        return create_job(config, acquire_members(config, progress), progress)
    sources = find_sources(config)
    with head_start(config, sources, progress) as arrivals:
        inputs = acquire_inputs(config, progress, sources, arrivals)
    return create_job(config, inputs, progress)


@contextmanager
def head_start(
    config: RefreshConfig, sources: Mapping[str, Source], progress: Progress = no_progress
) -> Iterator[Mapping[str, Arrival]]:
    """Cut the subjects whose members arrive, while the block downloads the sources.

    Yields key of a source -> the `Arrival` to give to its download. Yields an empty mapping and does nothing unless all
    files come over HTTP, their MD5s are known (the version's name is made from them), and this machine cuts.
    """
    known = all(source.over_http and source.md5 for source in sources.values())
    if not known or config.offline or config.dask:
        yield {}
        return
    start = _HeadStart(config, sources, progress)
    try:
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(start.run)
            try:
                yield start.arrivals
            finally:
                start.stop()
        running.result()
    finally:
        start.discard_if_rejected()


class _DownloadsEndedError(IxiError):
    """Ends a survey that is no longer needed."""


class _HeadStart:
    """The state that the survey, the cuts and the downloads share.

    Attributes:
        arrivals: key of a source -> its download.
    """

    def __init__(self, config: RefreshConfig, sources: Mapping[str, Source], progress: Progress) -> None:
        self._config, self._sources, self._progress = config, sources, progress
        self._changed = threading.Condition()
        folder = config.data_root.archives
        self.arrivals = {key: Arrival(folder / source.name, self._changed) for key, source in sources.items()}
        self._archives = {m: self.arrivals[m] for m in config.dataset.modalities}
        keep_pace(list(self._archives.values()))
        self._job: RefreshJob | None = None
        self._ended = False

    def stop(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def _stopped(self) -> bool:
        return self._ended or any(arrival.rejected for arrival in self.arrivals.values())

    def run(self) -> None:
        """Survey the archives on their server, and cut each candidate that has arrived, until stopped.

        Problems end the head start only: the stages that follow meet them too, and report them.
        """
        try:
            if self._downloads_started():
                self._job = job = self._create_job()
                if job.version not in versions.published_versions(self._config.data_root):
                    self._cut(job, self._candidates(job))
        except _DownloadsEndedError:
            pass
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            log.info("no more subjects are cut before the archives are complete: %s", reason)

    def _downloads_started(self) -> bool:
        """Wait until all archives come in byte ranges and demographics are there; False if nothing is left to do."""

        def started(key: str, arrival: Arrival) -> bool:
            return arrival.whole or (arrival.url is not None and key in self._archives)

        with self._changed:
            self._changed.wait_for(lambda: self._stopped or all(started(*each) for each in self.arrivals.items()))
            return not self._stopped and not all(arrival.whole for arrival in self._archives.values())

    def _create_job(self) -> RefreshJob:
        """The job for the archives as they will be when they are verified."""
        expected = {
            key: VerifiedFile(
                name=source.name,
                location=str(self.arrivals[key].path),
                size=0,
                md5=source.md5 or "",
                checked=True,
                origin=source.urls[0],
                validator=None,
                fingerprint="",
            )
            for key, source in self._sources.items()
        }
        return create_job(self._config, collect_inputs(self._config, expected))

    def _candidates(self, job: RefreshJob) -> list[CutJob]:
        """The subjects to cut, in the order in which their members are fetched from now on."""
        dataset_config = self._config.dataset
        locations = {m: str(a.path) if a.whole else a.url or "" for m, a in self._archives.items()}
        table = survey(locations, self._stop_survey, self._config.http, self._config.pattern)
        screened = selection.screen_headers(table, dataset_config)
        jobs = [each for each in create_cut_jobs(table, screened, job.inputs, job.version) if each.is_candidate]
        jobs = jobs[: dataset_config.subject_limit]
        for modality, arrival in self._archives.items():
            members = [each.members[modality] for each in jobs if modality in each.members]
            arrival.fetch_first([(member.offset, member.offset + member.size) for member in members])
        return jobs

    def _stop_survey(self, *_: object) -> None:
        if self._stopped:
            raise _DownloadsEndedError("the downloads have ended")

    def _cut(self, job: RefreshJob, cut_jobs: Sequence[CutJob]) -> None:
        done, work = 0, job.work
        work.mkdir(parents=True, exist_ok=True)

        def cut(cut_job: CutJob) -> None:
            nonlocal done
            if self._stopped:
                return
            try:
                if shutil.disk_usage(work).free < bytes_to_come():
                    raise DatasetError(f"{work} has no room beside the downloads")
                cut_unverified(cut_job, self._read, self._config.dataset, work)
            except BaseException:
                self.stop()
                raise
            with self._changed:
                done += 1
                self._progress("cut on arrival", done, len(cut_jobs), "subjects")

        with ThreadPoolExecutor(self._config.workers) as pool:
            for future in [pool.submit(cut, cut_job) for cut_job in cut_jobs if self._wait_for(cut_job)]:
                future.result()

    def _wait_for(self, cut_job: CutJob) -> bool:
        """Wait for the members of a subject; False if stopped."""
        members = [(self._archives[m], ref.offset, ref.offset + ref.size) for m, ref in cut_job.members.items()]
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or all(a.has(start, stop) for a, start, stop in members))
            return not self._stopped

    def _read(self, modality: str, member: MemberRef) -> bytes:
        data = self._archives[modality].read(member.offset, member.size)
        if len(data) != member.size:
            raise _DownloadsEndedError("the download started again, or ended")
        return data

    def discard_if_rejected(self) -> None:
        """Remove the work if an archive did not have its MD5, and no other URL provided it."""
        if self._job and any(arrival.rejected and not arrival.whole for arrival in self.arrivals.values()):
            shutil.rmtree(self._job.staging, ignore_errors=True)
