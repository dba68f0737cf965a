"""The MD5 of a download is computed while it arrives, and is that of the bytes on the disk."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from answers import HTTP as ANY_HTTP
from hypothesis import given
from hypothesis import strategies as st

from ixi_etl.sources.arrivals import Arrival
from ixi_etl.sources.http import RemoteFile
from ixi_etl.sources.partial import PartialFile
from ixi_etl.sources.prefix_hash import PrefixHash

SEGMENT, SEGMENTS = 10_007, 6  # no multiple of any buffer
HTTP = replace(ANY_HTTP, segment_bytes=SEGMENT)
DEADLINE_S = 60  # takes milliseconds
DATA = random.Random(0).randbytes(SEGMENTS * SEGMENT - 10)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prefix") / "IXI-T1.tar"


@given(st.permutations(range(SEGMENTS)), st.integers(0, SEGMENTS))
def test_segments_that_arrived_are_hashed_up_to_the_first_gap(path: Path, order: list[int], count: int) -> None:
    arrival, prefix = Arrival(path), PrefixHash()
    remote = RemoteFile("http://host/a", len(DATA), None, True, True)
    with PartialFile(path, remote, HTTP) as part:
        part.done.clear()
        part.truncate(len(DATA))
        whole = next((n for n in range(SEGMENTS) if n not in order[:count]), SEGMENTS)
        expected = min(whole * SEGMENT, len(DATA))
        with prefix.following(part, arrival):
            for index in order[:count]:
                segment = part.segments[index]
                part.write(DATA[segment.start : segment.stop], segment.start)
                with arrival.changed:
                    part.done.add(index)
                arrival.advanced()
            caught_up, deadline = threading.Event(), time.monotonic() + DEADLINE_S
            while prefix.size < expected:  # the hash follows in a thread
                if time.monotonic() > deadline:
                    pytest.fail(f"after {DEADLINE_S} s only {prefix.size} of {expected} bytes are hashed")
                caught_up.wait(0.001)
    assert prefix.size == expected
    assert prefix.digest.hexdigest() == hashlib.md5(DATA[:expected], usedforsecurity=False).hexdigest()


def test_a_file_that_cannot_be_read_is_left_to_whoever_hashes_the_rest(path: Path) -> None:
    arrival, prefix = Arrival(path), PrefixHash()
    with PartialFile(path, RemoteFile("http://host/a", len(DATA), None, True, True), HTTP) as part:
        part.path.unlink()
        with prefix.following(part, arrival):
            pass
    assert prefix.size == 0
