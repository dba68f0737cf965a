"""If a server never provides the correct file, the next URL is used, or one line gives the reason for each URL."""

from __future__ import annotations

from pathlib import Path

import pytest
from answers import (
    DRIP,
    NAME,
    PERMANENT_FAULTS,
    acquire,
    assert_one_clear_line,
    drip,
    md5,
    names_in,
    page,
    source_of,
    status,
)
from servers import Host, serve

from ixi_etl.errors import DownloadError

pytest_plugins = ["downloads"]
pytestmark = pytest.mark.usefixtures("isolated_network")


@pytest.mark.parametrize("case", ["403", "HTML page midway", "500 always", "wrong byte"])
def test_mirror_is_used_if_a_url_does_not_provide_the_file(tmp_path: Path, tar: bytes, case: str) -> None:
    fault = PERMANENT_FAULTS[case]
    with serve(Host(fault.spoil(tar), fault.answer, **fault.host)) as host, serve(Host(tar, etag='"m"')) as mirror:
        found = acquire(source_of(host, mirror, md5=md5(tar)), tmp_path)
    assert Path(found.location).read_bytes() == tar
    assert found.origin == mirror.url
    assert names_in(tmp_path) == {NAME, f"{NAME}.json"}


@pytest.mark.parametrize("case", PERMANENT_FAULTS)
def test_without_a_mirror_one_line_gives_the_reason(tmp_path: Path, tar: bytes, case: str) -> None:
    fault = PERMANENT_FAULTS[case]
    with serve(Host(fault.spoil(tar), fault.answer, **fault.host)) as host:
        source = source_of(host, md5=md5(tar))
        with pytest.raises(DownloadError, match=f"{NAME}: .*{fault.reason}.*[Tt]ry again") as caught:
            acquire(source, tmp_path, **fault.options)
    assert_one_clear_line(str(caught.value), tmp_path, host.url, str(tmp_path / NAME))
    assert not (tmp_path / f"{NAME}.json").exists()


def test_slow_first_block_is_an_error(tmp_path: Path, tar: bytes) -> None:
    with serve(Host(tar, drip)) as host, pytest.raises(DownloadError, match="slower than 1048576"):
        acquire(source_of(host, md5=None), tmp_path, **DRIP)
    assert host.fetches == []


def test_error_gives_the_reason_for_each_url(tmp_path: Path, tar: bytes) -> None:
    with (
        serve(Host(tar, status(403))) as forbidden,
        serve(Host(tar, page)) as portal,
        serve(Host(tar, status(503))) as busy,
    ):
        with pytest.raises(DownloadError) as caught:
            acquire(source_of(forbidden, portal, md5=md5(tar)), tmp_path)
        assert_one_clear_line(str(caught.value), tmp_path, f"{forbidden.url}: 403", f"{portal.url}: an HTML page")
        assert not caught.value.transient
        with pytest.raises(DownloadError) as caught:
            acquire(source_of(forbidden, busy, md5=md5(tar)), tmp_path)
        assert caught.value.transient


def test_mirror_is_used_if_the_host_is_down(tmp_path: Path, tar: bytes) -> None:
    with serve(Host(tar)) as stopped:
        pass
    with serve(Host(tar)) as mirror:
        assert acquire(source_of(stopped, mirror, md5=md5(tar)), tmp_path).origin == mirror.url
