"""Certificates are verified except for insecure hosts, and redirects never leave https."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import trustme
from answers import (
    acquire,
    assert_one_clear_line,
    md5,
    source_of,
    status,
)
from servers import Host, serve, served_as

from ixi_etl.errors import DownloadError

pytest_plugins = ["downloads"]
pytestmark = pytest.mark.usefixtures("isolated_network")


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("name", ["localhost", "elsewhere.example"])
def test_only_a_valid_certificate_is_accepted(
    tmp_path: Path, tar: bytes, authority: trustme.CA, monkeypatch: pytest.MonkeyPatch, trusted: bool, name: str
) -> None:
    if trusted:
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    else:
        monkeypatch.delenv("SSL_CERT_FILE")
    with serve(Host(tar), served_as(authority, name), "localhost") as host, serve(Host(tar)) as mirror:
        if trusted and name == "localhost":
            assert acquire(source_of(host, md5=None), tmp_path).origin == host.url
            return
        with pytest.raises(DownloadError, match="certificate is not valid") as caught:
            acquire(source_of(host, md5=md5(tar)), tmp_path)
        assert_one_clear_line(str(caught.value), tmp_path, host.url, "--insecure-host")
        assert acquire(source_of(host, mirror, md5=md5(tar)), tmp_path).origin == mirror.url
    assert host.requests == []


def test_insecure_host_applies_to_that_host_only(tmp_path: Path, tar: bytes, authority: trustme.CA) -> None:
    context = served_as(authority, "localhost", "127.0.0.1")
    with serve(Host(tar), context, "localhost") as named, serve(Host(tar), context, "127.0.0.1") as numbered:
        found = acquire(source_of(named, md5=None), tmp_path / "named", insecure_hosts=("localhost",))
        assert Path(found.location).read_bytes() == tar
        named.requests.clear()
        acquire(source_of(named, md5=None), tmp_path / "named", insecure_hosts=("localhost",))
        assert [r.method for r in named.requests] == ["HEAD"]
        with pytest.raises(DownloadError, match="certificate is not valid"):
            acquire(source_of(numbered, md5=None), tmp_path / "numbered", insecure_hosts=("localhost",))


def test_redirects_are_followed(tmp_path: Path, tar: bytes) -> None:
    with serve(Host(tar)) as target, serve(Host(b"", lambda call: call.plain(302, location=target.url))) as host:
        found = acquire(source_of(host, md5=None), tmp_path)
    assert (found.origin, Path(found.location).read_bytes()) == (host.url, tar)
    assert {r.if_range for r in target.fetches} == {target.etag}


def test_redirect_from_https_to_http_is_refused(
    tmp_path: Path, tar: bytes, authority: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    with (
        serve(Host(tar)) as plain,
        serve(Host(b"", status(302, location=plain.url)), served_as(authority, "localhost"), "localhost") as host,
    ):
        with pytest.raises(DownloadError, match=f"from https to {plain.url}") as caught:
            acquire(source_of(host, md5=None), tmp_path)
        assert_one_clear_line(str(caught.value), tmp_path, host.url)
    assert plain.requests == []


def test_each_range_may_be_redirected_to_another_node(tmp_path: Path, tar: bytes) -> None:
    with serve(Host(tar, etag='"one"')) as node_a, serve(Host(tar, etag='"two"')) as node_b:
        targets = itertools.cycle([node_a.url, node_b.url])
        with serve(Host(b"", lambda call: call.plain(302, location=next(targets)))) as host:
            found = acquire(source_of(host, md5=md5(tar)), tmp_path)
    assert Path(found.location).read_bytes() == tar
    assert node_a.sent + node_b.sent < 2 * len(tar)
