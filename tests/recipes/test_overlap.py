"""Subjects are cut while their archives are downloaded; the version is the same, whatever happens to the download."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from answers import SEGMENT, flip_bit, status
from conftest import config_for
from servers import PROBE, Answer, Call, Host, LoggedRequest, serve

from ixi_etl.config import RefreshConfig
from ixi_etl.core.http_options import HttpOptions
from ixi_etl.dataset import metadata, versions
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.errors import DownloadError
from ixi_etl.recipes import ixi, ixi_overlap
from ixi_etl.recipes.ixi_inputs import DEMOGRAPHICS, acquire_inputs, find_sources
from ixi_etl.sources.arrivals import Arrival
from ixi_etl.sources.catalog import Source

WAIT_S = 60.0  # at most, for what takes milliseconds on an idle machine
T1, T2 = "/IXI-T1.tar", "/IXI-T2.tar"


class Config(RefreshConfig):
    """A refresh that downloads in small segments, and soon gives a server up."""

    @property
    def http(self) -> HttpOptions:
        return replace(super().http, segment_bytes=SEGMENT, tries=2, backoff_s=0.001)


class Cut:
    """The progress of a refresh, which shows what is cut before the archives are verified.

    Attributes:
        counts: number of subjects that are finished, and of all, at each call.
    """

    def __init__(self) -> None:
        self.started, self.counts = threading.Event(), list[tuple[int, int]]()

    def __call__(self, what: str, done: int, total: int, unit: str) -> None:
        if what == "cut on arrival":
            self.counts.append((done, total))
            self.started.set()


@pytest.fixture
def cut() -> Cut:
    return Cut()


@pytest.fixture(scope="module")
def contents(archives: Path) -> dict[str, bytes]:
    return {path: (archives / path[1:]).read_bytes() for path in (T1, T2, "/MD5SUMS")}


@pytest.fixture
def host(contents: dict[str, bytes]) -> Iterator[Host]:
    with serve(Host(b"", files=dict(contents))) as running:
        yield running


@pytest.fixture
def config(host: Host, tmp_path: Path) -> RefreshConfig:
    return Config.model_validate(config_for(tmp_path, host.url.rpartition("/")[0]).model_dump())


def segment_of(request: LoggedRequest, host: Host) -> int | None:
    """The index of the segment that a request is for; None if it is a probe or one of the survey."""
    if request.path not in (T1, T2) or request.range in (None, PROBE):
        return None
    start, stop = map(int, request.range.removeprefix("bytes=").split("-"))
    is_whole = start % SEGMENT == 0 and stop + 1 in (start + SEGMENT, len(host.files[request.path]))
    return start // SEGMENT if is_whole else None


def surveyed(host: Host) -> list[LoggedRequest]:
    return [r for r in host.fetches if r.path in (T1, T2) and r.range and segment_of(r, host) is None]


def bytes_fetched_again(host: Host) -> int:
    """Bytes of the archives that were fetched more than once, beside the survey."""
    sent = sum(r.sent for r in host.requests if r.status == 206 and segment_of(r, host) is not None)
    return sent - len(host.files[T1]) - len(host.files[T2])


def last_segment_after(cut: Cut, then: Answer = Call.correct) -> Answer:
    """Answer the request for the last segment of the T2s with `then`, but only when a subject has been cut."""

    def answer(call: Call) -> None:
        if call.path == T2 and segment_of(call.logged, call.host) == (len(call.host.files[T2]) - 1) // SEGMENT:
            assert cut.started.wait(WAIT_S)
            then(call)
        else:
            call.correct()

    return answer


def assert_same(made: PublishedVersion, published: PublishedVersion) -> None:
    """With every file's SHA-256."""
    assert metadata.read_metadata(made.folder) == metadata.read_metadata(published.folder)


def shard_times(config: RefreshConfig) -> dict[str, int]:
    """When each shard of unfinished work was written, in nanoseconds."""
    return {path.name: path.stat().st_mtime_ns for path in config.data_root.unfinished.rglob("*.shard")}


@pytest.fixture
def times(config: RefreshConfig, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """`shard_times` before and after each stage `cut_subjects`."""
    original, seen = ixi.cut_subjects, list[dict[str, int]]()

    def observed(*arguments: Any) -> Any:
        seen.append(shard_times(config))
        result = original(*arguments)
        seen.append(shard_times(config))
        return result

    monkeypatch.setattr(ixi, "cut_subjects", observed)
    return seen


def test_subjects_are_cut_once_and_before_the_archives_are_complete(
    host: Host, config: RefreshConfig, published: PublishedVersion, cut: Cut, times: list[dict[str, int]]
) -> None:
    host.answer = last_segment_after(cut)  # a refresh that waits for the whole archives would fail
    assert_same(ixi.refresh(config, cut), published)
    candidates = metadata.read_manifest(published.folder)["t1_window_start"].notna().sum()
    assert cut.counts == [(n, cut.counts[0][1]) for n in range(1, len(cut.counts) + 1)]
    assert len(cut.counts) <= cut.counts[0][1]
    assert candidates <= cut.counts[0][1] < len(metadata.read_manifest(published.folder))
    before, after = times
    assert before
    assert before.items() <= after.items()
    assert bytes_fetched_again(host) == 0


def test_a_wrong_md5_throws_the_work_away_and_the_next_refresh_is_right(
    host: Host, config: RefreshConfig, contents: dict[str, bytes], published: PublishedVersion, cut: Cut
) -> None:
    host.files[T2] = flip_bit(contents[T2], 300_000)
    host.answer = last_segment_after(cut)
    with pytest.raises(DownloadError, match=r"IXI-T2\.tar: .*MD5 is"):
        ixi.refresh(config, cut)
    assert cut.counts
    assert versions.published_versions(config.data_root) == []
    assert list(config.data_root.unfinished.rglob("*.*")) == []
    host.files[T2] = contents[T2]
    assert_same(ixi.refresh(config), published)


def test_work_and_bytes_survive_a_server_that_stops_in_the_middle(
    host: Host, config: RefreshConfig, published: PublishedVersion, cut: Cut, times: list[dict[str, int]]
) -> None:
    host.answer = last_segment_after(cut, status(403))
    with pytest.raises(DownloadError, match=r"IXI-T2\.tar: 403"):
        ixi.refresh(config, cut)
    assert versions.published_versions(config.data_root) == []
    kept = shard_times(config)
    assert kept
    host.answer = Call.correct
    assert_same(ixi.refresh(config), published)
    assert kept.items() <= times[-1].items()
    assert bytes_fetched_again(host) == 0


@pytest.mark.parametrize("lacks", ["byte ranges", "MD5SUMS"])
def test_without_ranges_or_md5s_nothing_is_surveyed_or_cut_early(
    lacks: str, host: Host, config: RefreshConfig, published: PublishedVersion, cut: Cut
) -> None:
    if lacks == "MD5SUMS":
        host.answer = lambda call: status(404)(call) if call.path == "/MD5SUMS" else call.correct()
    host.ranges = lacks == "MD5SUMS"
    assert ixi.refresh(config, cut).version == published.version
    assert cut.counts == []
    assert surveyed(host) == []


def test_a_survey_that_fails_costs_only_the_head_start(
    host: Host, config: RefreshConfig, published: PublishedVersion, cut: Cut, caplog: pytest.LogCaptureFixture
) -> None:
    failed = threading.Event()

    def answer(call: Call) -> None:
        if call.command == "HEAD" or (call.path in (T1, T2) and call.logged in surveyed(call.host)):
            failed.set()
            status(403)(call)
        else:
            if segment_of(call.logged, call.host) == 3:
                assert failed.wait(WAIT_S)
            call.correct()

    host.answer = answer
    with caplog.at_level("INFO"):
        assert_same(ixi.refresh(config, cut), published)
    assert cut.counts == []
    assert "no more subjects are cut before the archives are complete: ArchiveError: cannot read http" in caplog.text


def test_subjects_are_cut_early_only_if_the_downloads_have_room(
    host: Host, config: RefreshConfig, published: PublishedVersion, cut: Cut, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room() -> int:
        cut.started.set()
        return 1 << 60

    monkeypatch.setattr(ixi_overlap, "bytes_to_come", no_room)
    host.answer = last_segment_after(cut)
    assert_same(ixi.refresh(config, cut), published)
    assert cut.counts == []


def test_an_unexpected_error_costs_only_the_head_start(
    host: Host,
    config: RefreshConfig,
    published: PublishedVersion,
    cut: Cut,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> NoReturn:
        cut.started.set()
        raise RuntimeError("cannot cut")

    monkeypatch.setattr(ixi_overlap, "cut_unverified", fail)
    host.answer = last_segment_after(cut)
    with caplog.at_level("INFO"):
        assert_same(ixi.refresh(config, cut), published)
    assert "no more subjects are cut before the archives are complete: RuntimeError: cannot cut" in caplog.text


def test_nothing_is_cut_from_a_part_that_became_shorter(
    host: Host, config: RefreshConfig, published: PublishedVersion, cut: Cut, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> bytes:
        cut.started.set()
        return b"short"

    monkeypatch.setattr(Arrival, "read", read)
    host.answer = last_segment_after(cut)
    assert_same(ixi.refresh(config, cut), published)
    assert cut.counts == []


def test_work_is_kept_if_a_second_url_provides_what_the_first_did_not(
    host: Host, config: RefreshConfig, contents: dict[str, bytes], cut: Cut
) -> None:
    bad = "/bad/IXI-T2.tar"
    host.files[bad] = flip_bit(contents[T2], 300_000)
    last = (len(contents[T2]) - 1) // SEGMENT * SEGMENT

    def answer(call: Call) -> None:
        if call.path == bad and call.logged.range == f"bytes={last}-{len(contents[T2]) - 1}":
            assert cut.started.wait(WAIT_S)
        call.correct()

    host.answer, sources = answer, find_sources(config)
    (good,) = sources["T2"].urls
    sources["T2"] = replace(sources["T2"], urls=(good.replace(T2, bad), good))
    with ixi_overlap.head_start(config, sources, cut) as arrivals:
        acquire_inputs(config, sources=sources, arrivals=arrivals)
    assert (arrivals["T2"].rejected, arrivals["T2"].whole) == (True, True)
    assert shard_times(config)


def test_demographics_are_awaited_before_the_version_is_named(host: Host, config: RefreshConfig, cut: Cut) -> None:
    with_ages = config.model_copy(update={"demographics": "official"})
    host.files["/IXI.xls"] = table = b"a table"
    url = host.url.rpartition("/")[0] + "/IXI.xls"
    digest = hashlib.md5(table, usedforsecurity=False).hexdigest()
    sources = find_sources(with_ages) | {DEMOGRAPHICS: Source("IXI.xls", (url,), digest)}
    host.answer = last_segment_after(cut)
    with ixi_overlap.head_start(with_ages, sources, cut) as arrivals:
        inputs = acquire_inputs(with_ages, sources=sources, arrivals=arrivals)
    assert arrivals[DEMOGRAPHICS].whole
    assert cut.counts
    (work,) = config.data_root.unfinished.glob("*/work")
    assert work == ixi_overlap.create_job(with_ages, inputs).work


def test_there_is_no_head_start_if_one_archive_has_no_md5(config: RefreshConfig) -> None:
    sources = find_sources(config)
    with ixi_overlap.head_start(config, {**sources, "T2": replace(sources["T2"], md5=None)}) as arrivals:
        assert arrivals == {}


def test_no_more_subjects_are_cut_early_than_are_wanted(host: Host, config: RefreshConfig, cut: Cut) -> None:
    limited = config.model_copy(update={"dataset": config.dataset.model_copy(update={"subjects": 2})})
    host.answer = last_segment_after(cut)
    with ixi_overlap.head_start(limited, sources := find_sources(limited), cut) as arrivals:
        acquire_inputs(limited, sources=sources, arrivals=arrivals)
    assert {total for _, total in cut.counts} == {2}


@pytest.mark.parametrize("option", [{"offline": True}, {"dask": "tcp://host:1"}])
def test_there_is_no_head_start_offline_or_on_other_machines(option: dict[str, Any], config: RefreshConfig) -> None:
    sources = find_sources(config)
    for chosen, followed in ((config, sources.keys()), (config.model_copy(update=option), set())):
        with ixi_overlap.head_start(chosen, sources) as arrivals:
            assert arrivals.keys() == followed


def test_subjects_of_a_published_version_are_not_cut(
    host: Host, config: RefreshConfig, published: PublishedVersion, tmp_path: Path, cut: Cut
) -> None:
    (tmp_path / "datasets").symlink_to(published.folder.parents[1])
    assert not ixi.refresh(config, cut).is_new
    assert cut.counts == []
    assert surveyed(host) == []
