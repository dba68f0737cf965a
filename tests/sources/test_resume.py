"""A stopped download resumes from the segments that were finished."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from answers import (
    NAME,
    SEGMENT,
    Unfinished,
    acquire,
    after_probe,
    finished_segments,
    first,
    flip_bit,
    half_then,
    md5,
    names_in,
    page,
    segment_bytes,
    source_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples
from servers import Call, Host, serve

from ixi_etl.errors import DownloadError

pytest_plugins = ["downloads"]
pytestmark = pytest.mark.usefixtures("isolated_network")


CHILD = """
import sys
from pathlib import Path
from ixi_etl.core.http_options import HttpOptions
from ixi_etl.sources.cache import acquire
from ixi_etl.sources.catalog import Source
name, url, folder, segment = sys.argv[1:]
acquire(Source(name, (url,), None), Path(folder), http=HttpOptions(segment_bytes=int(segment)))
"""


def kill_at(host: Host, folder: Path, segments: int) -> None:
    """Start a download in a child process; kill it when it has finished `segments` more and started the next."""
    target = len(finished_segments(folder)) + segments
    host.requests.clear()
    host.answer = after_probe(first(segments, Call.correct, half_then(Call.stall)))
    child = subprocess.Popen([sys.executable, "-c", CHILD, NAME, host.url, str(folder), str(SEGMENT)])
    deadline = time.monotonic() + 60
    try:
        while len(finished_segments(folder)) < target or len(host.fetches) < segments + 4:
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == -9
    assert len(finished_segments(folder)) == target
    assert not (folder / NAME).exists()


def test_killed_download_resumes_from_finished_segments(tmp_path: Path, tar: bytes) -> None:
    with serve(Host(tar)) as host:
        for segments in (2, 3):
            kill_at(host, tmp_path, segments)
        finished = segment_bytes(finished_segments(tmp_path), len(tar))
        host.requests.clear()
        host.answer = Call.correct
        found = acquire(source_of(host, md5=None), tmp_path)
        assert Path(found.location).read_bytes() == tar
        assert host.sent == len(tar) - finished
    assert names_in(tmp_path) == {NAME, f"{NAME}.json"}


@given(data=st.data(), known=st.booleans())
@settings(max_examples=examples(10))
def test_any_set_of_finished_segments_is_resumed(
    unfinished: Unfinished, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, known: bool
) -> None:
    done = data.draw(st.sets(st.integers(0, unfinished.segments - 1)))
    folder, body = tmp_path_factory.mktemp("resume"), unfinished.host.body
    unfinished.restore(folder, done)
    found = acquire(source_of(unfinished.host, md5=md5(body) if known else None), folder)
    assert Path(found.location).read_bytes() == body
    assert unfinished.host.sent == len(body) - segment_bytes(done, len(body))
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "changes",
    [{"validator": '"older"'}, {"validator": None}, {"size": 10240}, {"segment": SEGMENT // 2}, {"url": "http://a/b"}],
    ids=str,
)
def test_record_of_another_file_is_not_resumed(unfinished: Unfinished, tmp_path: Path, changes: dict[str, Any]) -> None:
    unfinished.restore(tmp_path, {0, 1, 2}, **changes)
    found = acquire(source_of(unfinished.host, md5=None), tmp_path)
    assert Path(found.location).read_bytes() == unfinished.host.body
    assert unfinished.host.sent == len(unfinished.host.body)


@pytest.mark.parametrize("record", ["", "{", "[]", "[1]", "5", "null", '{"done": [0, 1]}'])
def test_damaged_record_is_not_resumed(unfinished: Unfinished, tmp_path: Path, record: str) -> None:
    unfinished.restore(tmp_path, set())
    (tmp_path / f"{NAME}.part.json").write_text(record)
    found = acquire(source_of(unfinished.host, md5=None), tmp_path)
    assert Path(found.location).read_bytes() == unfinished.host.body


@pytest.mark.parametrize("done", [5, None, "01", [[1]], [0, "a"], {"0": 1}], ids=str)
def test_record_without_valid_segments_is_not_resumed(unfinished: Unfinished, tmp_path: Path, done: Any) -> None:
    unfinished.restore(tmp_path, set())
    (tmp_path / f"{NAME}.part.json").write_text(json.dumps(unfinished.record | {"done": done}))
    found = acquire(source_of(unfinished.host, md5=None), tmp_path)
    assert Path(found.location).read_bytes() == unfinished.host.body


def test_truncated_part_is_not_resumed(unfinished: Unfinished, tmp_path: Path) -> None:
    unfinished.restore(tmp_path, {0, 1, 2, unfinished.segments - 1})
    os.truncate(tmp_path / f"{NAME}.part", SEGMENT)
    found = acquire(source_of(unfinished.host, md5=None), tmp_path)
    assert Path(found.location).read_bytes() == unfinished.host.body


def test_part_with_a_wrong_byte_is_downloaded_again(unfinished: Unfinished, tmp_path: Path) -> None:
    unfinished.restore(tmp_path, {0, 1, 2})
    part = tmp_path / f"{NAME}.part"
    part.write_bytes(flip_bit(part.read_bytes(), SEGMENT + 7))
    found = acquire(source_of(unfinished.host, md5=md5(unfinished.host.body)), tmp_path)
    assert Path(found.location).read_bytes() == unfinished.host.body


@pytest.mark.parametrize("known", [True, False])
def test_part_from_another_url_is_resumed_only_with_a_known_md5(
    unfinished: Unfinished, tmp_path: Path, known: bool
) -> None:
    body = unfinished.host.body
    unfinished.restore(tmp_path, {0, 5, 6})
    with serve(Host(body, etag='"of the mirror"')) as mirror:
        found = acquire(source_of(mirror, md5=md5(body) if known else None), tmp_path)
    assert Path(found.location).read_bytes() == body
    assert mirror.sent == len(body) - (segment_bytes([0, 5, 6], len(body)) if known else 0)


def test_mirror_resumes_where_the_host_failed(tmp_path: Path, tar: bytes) -> None:
    with serve(Host(tar)) as host, serve(Host(tar, etag='"of the mirror"')) as mirror:
        host.answer = after_probe(first(6, Call.correct, page))
        found = acquire(source_of(host, mirror, md5=md5(tar)), tmp_path, connections=1)
    assert Path(found.location).read_bytes() == tar
    assert found.origin == mirror.url
    assert mirror.sent == len(tar) - 6 * SEGMENT


def test_html_page_in_place_of_a_range_keeps_finished_segments(tmp_path: Path, tar: bytes) -> None:
    with serve(Host(tar)) as host:
        host.answer = after_probe(first(6, Call.correct, page))
        portal = first(7, host.answer, page)
        host.answer = portal
        with pytest.raises(DownloadError, match="HTML page"):
            acquire(source_of(host, md5=None), tmp_path, connections=1)
        host.requests.clear()
        host.answer = Call.correct
        found = acquire(source_of(host, md5=None), tmp_path)
    assert Path(found.location).read_bytes() == tar
    assert host.sent == len(tar) - 6 * SEGMENT


def test_interrupt_keeps_finished_segments(tmp_path: Path, tar: bytes) -> None:
    def interrupt(what: str, done: int, total: int, unit: str) -> None:
        if done > 5 * SEGMENT:
            raise KeyboardInterrupt

    with serve(Host(tar)) as host:
        with pytest.raises(KeyboardInterrupt):
            acquire(source_of(host, md5=None), tmp_path, connections=1, progress=interrupt)
        assert finished_segments(tmp_path) == [0, 1, 2, 3, 4]
        host.requests.clear()
        found = acquire(source_of(host, md5=None), tmp_path)
    assert Path(found.location).read_bytes() == tar
    assert host.sent == len(tar) - 5 * SEGMENT
