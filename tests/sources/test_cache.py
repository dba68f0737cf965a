"""A verified file is reused; a changed or wrong one is downloaded again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from answers import (
    NAME,
    Unfinished,
    acquire,
    after_probe,
    assert_one_clear_line,
    drip_headers,
    first,
    flip_bit,
    md5,
    names_in,
    source_of,
    status,
)
from servers import Answer, Call, Host, serve

from ixi_etl.core.files import read_json
from ixi_etl.errors import DownloadError

pytest_plugins = ["downloads"]
pytestmark = pytest.mark.usefixtures("isolated_network")


@pytest.mark.parametrize("known", [True, False])
def test_verified_archive_costs_one_head_request_and_none_offline(tmp_path: Path, tar: bytes, known: bool) -> None:
    with serve(Host(tar)) as host:
        source = source_of(host, md5=md5(tar) if known else None)
        found = acquire(source, tmp_path)
        host.requests.clear()
        assert acquire(source, tmp_path) == found
        assert [r.method for r in host.requests] == ["HEAD"]
        host.requests.clear()
        assert acquire(source, tmp_path, offline=True) == found
        assert host.requests == []
    assert acquire(source, tmp_path) == found  # the host is down


@pytest.mark.parametrize("fault", [drip_headers, status(302, location="http://a..b/")], ids=["drip", "redirect"])
def test_verified_archive_is_used_if_the_head_request_fails(tmp_path: Path, tar: bytes, fault: Answer) -> None:
    with serve(Host(tar)) as host:
        found = acquire(source_of(host, md5=None), tmp_path)
        host.answer = fault
        assert acquire(source_of(host, md5=None), tmp_path, timeout_s=0.15) == found


def test_offline_without_the_archive_is_an_error(tmp_path: Path, tar: bytes) -> None:
    with serve(Host(tar)) as host:
        with pytest.raises(DownloadError, match="without --offline") as caught:
            acquire(source_of(host, md5=md5(tar)), tmp_path, offline=True)
        assert_one_clear_line(str(caught.value), tmp_path)
        (tmp_path / NAME).write_bytes(flip_bit(tar, 600))
        with pytest.raises(DownloadError, match="not the right file"):
            acquire(source_of(host, md5=md5(tar)), tmp_path, offline=True)
        assert host.requests == []


@pytest.mark.parametrize("change", ["etag", "length"])
def test_changed_remote_file_is_fetched_again_unless_the_md5_is_known(
    tmp_path: Path, tar: bytes, other: bytes, longer: bytes, change: str
) -> None:
    with serve(Host(tar)) as host:
        kept = acquire(source_of(host, md5=md5(tar)), tmp_path / "kept")
        followed = acquire(source_of(host, md5=None), tmp_path / "followed")
        assert (kept.checked, followed.checked) == (True, False)
        host.body, host.etag = (other, '"second"') if change == "etag" else (longer, host.etag)
        host.requests.clear()
        assert acquire(source_of(host, md5=md5(tar)), tmp_path / "kept") == kept
        assert [r.method for r in host.requests] == ["HEAD"]
        acquire(source_of(host, md5=None), tmp_path / "followed")
    assert (tmp_path / "kept" / NAME).read_bytes() == tar
    assert (tmp_path / "followed" / NAME).read_bytes() == host.body


def test_failed_update_keeps_the_old_file(tmp_path: Path, tar: bytes, other: bytes) -> None:
    with serve(Host(tar)) as host:
        acquire(source_of(host, md5=None), tmp_path)
        host.body, host.etag, host.answer = other, '"second"', after_probe(first(3, Call.correct, status(403)))
        with pytest.raises(DownloadError, match="403"):
            acquire(source_of(host, md5=None), tmp_path)
    assert (tmp_path / NAME).read_bytes() == tar


def test_file_modified_after_verification_is_replaced(tmp_path: Path, tar: bytes) -> None:
    with serve(Host(tar)) as host:
        source = source_of(host, md5=md5(tar))
        acquire(source, tmp_path)
        (tmp_path / NAME).write_bytes(flip_bit(tar, 500_000))
        found = acquire(source, tmp_path)
    assert Path(found.location).read_bytes() == tar


def test_unchecked_file_of_another_source_is_not_reused(tmp_path: Path, tar: bytes, other: bytes) -> None:
    with serve(Host(tar, etag=None)) as first_host, serve(Host(other, etag=None)) as second_host:
        acquire(source_of(first_host, md5=None), tmp_path)
        with pytest.raises(DownloadError, match="without --offline"):
            acquire(source_of(second_host, md5=None), tmp_path, offline=True)
        found = acquire(source_of(second_host, md5=None), tmp_path)
    assert (found.origin, Path(found.location).read_bytes()) == (second_host.url, other)


def test_correct_file_placed_by_the_user_is_reused(
    tmp_path: Path, tar: bytes, unfinished: Unfinished, caplog: pytest.LogCaptureFixture
) -> None:
    unfinished.restore(tmp_path, {0, 1})
    (tmp_path / NAME).write_bytes(tar)
    source = source_of(unfinished.host, md5=md5(tar))
    found = acquire(source, tmp_path)
    assert (found.md5, found.checked) == (md5(tar), True)
    assert acquire(source, tmp_path) == found
    assert [r.method for r in unfinished.host.requests] == ["HEAD"]
    assert caplog.text == ""
    assert names_in(tmp_path) == {NAME, f"{NAME}.json"}


@pytest.mark.parametrize("record", ["", "[]", "null", '{"md5": 1}'])
def test_damaged_record_of_a_correct_file_is_rewritten(
    unfinished: Unfinished, tmp_path: Path, tar: bytes, record: str
) -> None:
    (tmp_path / NAME).write_bytes(tar)
    (tmp_path / f"{NAME}.json").write_text(record)
    found = acquire(source_of(unfinished.host, md5=md5(tar)), tmp_path, offline=True)
    assert read_json(tmp_path / f"{NAME}.json")["fingerprint"] == found.fingerprint


def test_wrong_file_placed_by_the_user_is_replaced(tmp_path: Path, tar: bytes) -> None:
    (tmp_path / NAME).write_bytes(flip_bit(tar, 500_000))
    with serve(Host(tar)) as host:
        found = acquire(source_of(host, md5=md5(tar)), tmp_path)
    assert Path(found.location).read_bytes() == tar
    assert host.sent == len(tar)


def test_pipe_in_place_of_a_download_is_refused(tmp_path: Path, tar: bytes) -> None:
    os.mkfifo(tmp_path / NAME)
    with serve(Host(tar)) as host, pytest.raises(DownloadError, match="is not a regular file"):
        acquire(source_of(host, md5=md5(tar)), tmp_path)
