"""Two states of a file that changes on the server during a download are never mixed."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from answers import (
    Unfinished,
    acquire,
    assert_one_clear_line,
    md5,
    non_ascii_etag,
    source_of,
)
from servers import Answer, Call, Host, serve

from ixi_etl.errors import DownloadError

pytest_plugins = ["downloads"]
pytestmark = pytest.mark.usefixtures("isolated_network")


@pytest.mark.parametrize("switch_at", [2, 5])
@pytest.mark.parametrize(
    ("etags", "honours_if_range", "length"),
    [
        (('"first"', '"second"'), True, "same"),
        (('"first"', '"second"'), True, "longer"),
        (('"first"', '"second"'), False, "same"),
        ((None, None), True, "same"),
        ((None, None), True, "longer"),
        (('W/"first"', 'W/"second"'), True, "same"),
    ],
)
def test_states_of_a_changing_file_are_never_mixed(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tar: bytes,
    switch_at: int,
    honours_if_range: bool,
    etags: tuple[str | None, str | None],
    length: str,
) -> None:
    new: bytes = request.getfixturevalue({"same": "other", "longer": "longer"}[length])
    lock, calls = threading.Lock(), iter(range(1, 10**9))

    def answer(call: Call) -> None:
        with lock:
            if next(calls) == switch_at:
                host.body, host.etag = new, etags[1]
            data = call.start()
        call.send(data)

    with serve(Host(tar, answer, etags[0], honours_if_range=honours_if_range)) as host:
        for _ in range(2):
            try:
                found = acquire(source_of(host, md5=None), tmp_path)
            except DownloadError as error:
                assert_one_clear_line(str(error), tmp_path, host.url)
                continue
            break
    served_once = etags[0] is None or etags[0].startswith("W/")
    assert Path(found.location).read_bytes() == (tar if served_once and switch_at > 2 else new)


def node(call: Call, number: int) -> None:
    """Answer as one of several nodes, each with its own ETag."""
    with call.host.lock:
        call.host.etag = f'"node {number}"'
        data = call.start()
    call.send(data)


def alternating_nodes() -> Answer:
    calls = iter(range(10**9))
    return lambda call: node(call, next(calls) % 2)


@pytest.mark.parametrize("honours_if_range", [True, False])
def test_nodes_with_different_etags_are_combined_only_with_a_known_md5(
    tmp_path: Path, tar: bytes, honours_if_range: bool
) -> None:
    with serve(Host(tar, alternating_nodes(), honours_if_range=honours_if_range)) as host:
        found = acquire(source_of(host, md5=md5(tar)), tmp_path / "known")
        assert Path(found.location).read_bytes() == tar
        assert host.sent < 2 * len(tar)
        assert acquire(source_of(host, md5=md5(tar)), tmp_path / "known") == found
        with pytest.raises(DownloadError, match="changed while it was fetched, twice"):
            acquire(source_of(host, md5=None), tmp_path / "unknown")


def test_part_from_one_node_is_resumed_from_another(unfinished: Unfinished, tmp_path: Path) -> None:
    unfinished.restore(tmp_path, {0, 1, 5}, validator='"another node"')
    body = unfinished.host.body
    found = acquire(source_of(unfinished.host, md5=md5(body)), tmp_path)
    assert Path(found.location).read_bytes() == body
    assert unfinished.host.sent < len(body)


def test_mix_of_two_files_is_downloaded_again_from_the_start(tmp_path: Path, tar: bytes, other: bytes) -> None:
    """The file is replaced midway by the one whose MD5 is known."""
    calls = iter(range(10**9))

    def answer(call: Call) -> None:
        with call.host.lock:
            if next(calls) == 4:
                call.host.body, call.host.etag = tar, '"second"'
            data = call.start()
        call.send(data)

    with serve(Host(other, answer)) as host:
        found = acquire(source_of(host, md5=md5(tar)), tmp_path, connections=1)
    assert Path(found.location).read_bytes() == tar
    assert 2 * len(tar) <= host.sent < 3 * len(tar)


def test_node_with_another_file_is_a_one_line_error(tmp_path: Path, tar: bytes, other: bytes) -> None:
    calls = iter(range(10**9))

    def answer(call: Call) -> None:
        with call.host.lock:
            stale = next(calls) % 2
            call.host.body, call.host.etag = (other if stale else tar), f'"{stale}"'
            data = call.start()
        call.send(data)

    with serve(Host(tar, answer)) as host, pytest.raises(DownloadError, match="changed while it was fetched") as caught:
        acquire(source_of(host, md5=md5(tar)), tmp_path)
    assert_one_clear_line(str(caught.value), tmp_path, host.url)


def test_non_ascii_etag_is_a_one_line_error_if_it_is_needed(tmp_path: Path, tar: bytes) -> None:
    with serve(Host(tar, non_ascii_etag)) as host, pytest.raises(DownloadError, match="can't encode"):
        acquire(source_of(host, md5=None), tmp_path)
