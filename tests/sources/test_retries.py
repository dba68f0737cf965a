"""Temporary faults of a server are retried until the file is complete."""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from answers import (
    SEGMENT,
    TEMPORARY_FAULTS,
    acquire,
    after_probe,
    close,
    crop,
    finished_segments,
    first,
    half_then,
    md5,
    source_of,
    status,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples
from servers import Answer, Call, Host, serve

from ixi_etl.errors import DownloadError

pytest_plugins = ["downloads"]
pytestmark = pytest.mark.usefixtures("isolated_network")


def test_resets_every_40_kib_do_not_end_the_download(tmp_path: Path, tar: bytes) -> None:
    with serve(Host(tar, after_probe(crop(40 << 10, Call.reset)))) as host:
        found = acquire(source_of(host, md5=None), tmp_path, segment_bytes=10 * SEGMENT)
    assert Path(found.location).read_bytes() == tar
    assert len(host.fetches) >= len(tar) // (40 << 10)


@pytest.mark.parametrize("when", [lambda a: a, after_probe], ids=["from the start", "midway"])
@pytest.mark.parametrize(
    "fault",
    [status(500), status(503), status(429), status(408), Call.reset, half_then(close), half_then(Call.reset)],
    ids=["500", "503", "429", "408", "reset", "truncated", "reset midway"],
)
def test_temporary_failure_is_retried(
    tmp_path: Path, tar: bytes, fault: Answer, when: Callable[[Answer], Answer]
) -> None:
    with serve(Host(tar, when(first(2, fault)))) as host, serve(Host(tar)) as mirror:
        found = acquire(source_of(host, mirror, md5=None), tmp_path)
    assert Path(found.location).read_bytes() == tar
    assert (found.origin, mirror.requests) == (host.url, [])


@pytest.mark.parametrize("fault", [Call.stall, half_then(Call.stall)], ids=["before headers", "midway"])
def test_stall_times_out_and_is_retried(tmp_path: Path, tar: bytes, fault: Answer) -> None:
    with serve(Host(tar, after_probe(first(3, fault)))) as host:
        found = acquire(source_of(host, md5=None), tmp_path, timeout_s=0.3, tries=6)
    assert Path(found.location).read_bytes() == tar


def test_backoff_doubles_with_jitter(tmp_path: Path, tar: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with serve(Host(tar, status(503))) as host, pytest.raises(DownloadError, match="6 times"):
        acquire(source_of(host, md5=None), tmp_path, backoff_s=1.0, tries=6)
    assert len(host.requests) == 6
    shares = [wait / 2**n for n, wait in enumerate(waits)]
    assert len(set(shares)) == 5
    assert all(0.5 <= share <= 1.5 for share in shares)


@given(plan=st.lists(st.sampled_from(sorted(TEMPORARY_FAULTS)), max_size=12), ranges=st.booleans())
@settings(max_examples=examples(10))
def test_any_sequence_of_temporary_faults_ends_with_the_correct_file(
    tar: bytes, tmp_path_factory: pytest.TempPathFactory, plan: list[str], ranges: bool
) -> None:
    folder, faults = tmp_path_factory.mktemp("faults"), iter(plan)
    with serve(Host(tar, ranges=ranges)) as host:
        host.answer = lambda call: TEMPORARY_FAULTS[next(faults, "none")](call)
        found = acquire(source_of(host, md5=None), folder, tries=len(plan) + 1, backoff_s=0.0)
    assert Path(found.location).read_bytes() == tar
    shutil.rmtree(folder)


@pytest.mark.parametrize("length", [100, 3000, SEGMENT - 1])
@pytest.mark.parametrize("end", [close, Call.reset], ids=["close", "reset"])
def test_download_completes_if_each_connection_ends_after_a_few_bytes(
    tmp_path: Path, tar: bytes, length: int, end: Answer
) -> None:
    tries = 20 if end is Call.reset else 2  # a reset can discard bytes that were not read yet
    size = min(len(tar), 40 * length)
    with serve(Host(tar[:size], after_probe(crop(length, end)))) as host:
        found = acquire(source_of(host, md5=None), tmp_path, tries=tries)
    assert Path(found.location).read_bytes() == tar[:size]


def test_range_that_always_fails_ends_the_download_after_the_other_ranges(tmp_path: Path, tar: bytes) -> None:
    others, sent, changed = set(range(-(-len(tar) // SEGMENT))) - {2}, Counter[str | None](), threading.Condition()

    def answer(call: Call) -> None:
        if (call.logged.range or "").startswith(f"bytes={2 * SEGMENT}-"):
            with changed:
                changed.wait_for(lambda: len(sent) == len(others), 10)
            call.reset()
            return
        call.correct()
        with changed:
            sent[call.logged.range] += 1
            changed.notify_all()

    with serve(Host(tar, after_probe(answer))) as host, pytest.raises(DownloadError, match="3 times at byte") as caught:
        acquire(source_of(host, md5=None), tmp_path)
    assert caught.value.transient
    assert set(finished_segments(tmp_path)) <= others
    # Each of the other three connections may still be reading its last byte.
    assert len(finished_segments(tmp_path)) >= len(others) - 3


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_refused_range_is_retried(tmp_path: Path, tar: bytes, code: int) -> None:
    with serve(Host(tar, first(3, Call.correct, first(2, status(code))))) as host:
        found = acquire(source_of(host, md5=md5(tar)), tmp_path, connections=2)
    assert Path(found.location).read_bytes() == tar
