"""The user's archives are read locally or from a server, with and without MD5SUMS."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from answers import (
    DRIP,
    HTTP,
    NAME,
    acquire,
    assert_one_clear_line,
    drip_headers,
    first,
    md5,
    names_in,
    source_of,
    status,
)
from servers import Answer, Call, Host, serve

from ixi_etl.errors import DownloadError
from ixi_etl.sources.catalog import Source
from ixi_etl.sources.user_source import user_sources

pytest_plugins = ["downloads"]
pytestmark = pytest.mark.usefixtures("isolated_network")


def test_own_archives_are_used_in_place(tmp_path: Path, user_folder: Path, tar: bytes) -> None:
    records, reports = tmp_path / "records", Counter[str]()

    def count(what: str, done: int, total: int, unit: str) -> None:
        reports[what] += 1

    (user_folder / "MD5SUMS").write_text(
        "".join(f"{md5(p.read_bytes())}  {p.name}\n" for p in user_folder.glob("*.tar"))
    )
    sources = user_sources(str(user_folder))
    found = {m: acquire(source, records, progress=count) for m, source in sources.items()}
    assert {m: f.location for m, f in found.items()} == {m: str(user_folder / f"IXI-{m}.tar") for m in ("T1", "T2")}
    assert all(f.checked for f in found.values())
    assert found["T1"].md5 == md5(tar)
    assert names_in(records) == {"IXI-T1.tar.json", "IXI-T2.tar.json"}

    assert set(reports) == {"verify IXI-T1.tar", "verify IXI-T2.tar"}
    reports.clear()
    assert {m: acquire(source, records, progress=count, offline=True) for m, source in sources.items()} == found
    assert not reports  # nothing was read again

    stat = (user_folder / NAME).stat()
    os.utime(user_folder / NAME, ns=(stat.st_atime_ns, stat.st_mtime_ns - 10**9))
    assert acquire(sources["T1"], records, progress=count).md5 == md5(tar)
    assert reports["verify IXI-T1.tar"] > 0
    with open(user_folder / NAME, "r+b") as file:
        file.seek(500_000)
        file.write(b"changed")
    os.utime(user_folder / NAME, ns=(stat.st_atime_ns, stat.st_mtime_ns - 10**9))
    with pytest.raises(DownloadError, match="MD5SUMS"):
        acquire(sources["T1"], records)


def test_own_archive_without_md5sums_is_accepted_unchecked(tmp_path: Path, user_folder: Path, tar: bytes) -> None:
    unchecked = acquire(user_sources(str(user_folder))["T1"], tmp_path / "records")
    assert (unchecked.md5, unchecked.checked) == (md5(tar), False)
    (user_folder / "MD5SUMS").write_text(f"{md5(tar)} *{NAME}\n{md5(b'')} *IXI-T2.tar\n")
    assert acquire(user_sources(str(user_folder))["T1"], tmp_path / "records").checked


def test_own_archive_with_another_md5_is_refused(tmp_path: Path, user_folder: Path, other: bytes) -> None:
    source = user_sources(str(user_folder))["T1"]
    acquire(source, tmp_path / "records")
    (user_folder / "MD5SUMS").write_text(f"{md5(other)}  {NAME}\n{md5(other)}  IXI-T2.tar\n")
    with pytest.raises(DownloadError, match="MD5SUMS") as caught:
        acquire(user_sources(str(user_folder))["T1"], tmp_path / "records")
    assert_one_clear_line(str(caught.value), tmp_path / "records", str(user_folder / NAME), md5(other))


def test_own_archive_that_is_being_written_is_refused(tmp_path: Path, user_folder: Path) -> None:
    def append(what: str, done: int, total: int, unit: str) -> None:
        if done <= total:
            with open(user_folder / NAME, "ab") as file:
                file.write(b"more")

    with pytest.raises(DownloadError, match="changed while it was read"):
        acquire(user_sources(str(user_folder))["T1"], tmp_path / "records", progress=append)
    assert names_in(tmp_path / "records") == set()


def test_missing_own_archive_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="is not there; give a --source") as caught:
        acquire(user_sources(str(tmp_path / "none"))["T1"], tmp_path)
    assert_one_clear_line(str(caught.value), tmp_path, str(tmp_path / "none"))


@pytest.mark.parametrize("form", ["{}", "file://{}", "file://localhost{}"])
@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "device", "kernel"])
def test_special_file_as_own_archive_is_a_one_line_error(
    tmp_path: Path, user_folder: Path, kind: str, form: str
) -> None:
    (user_folder / NAME).unlink()
    if kind.endswith("pipe"):
        os.mkfifo(user_folder / ("pipe" if kind.startswith("link") else NAME))
    if kind != "pipe":
        (user_folder / NAME).symlink_to({"device": "/dev/zero", "kernel": "/proc/self/clear_refs"}.get(kind, "pipe"))
    with pytest.raises(DownloadError, match=r"is (not a regular|an empty) file; give a --source") as caught:
        acquire(user_sources(form.format(user_folder))["T1"], tmp_path / "records")
    assert_one_clear_line(str(caught.value), tmp_path / "records", str(user_folder / NAME))


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_own_archive_that_grows_endlessly_is_refused(tmp_path: Path, user_folder: Path, form: str) -> None:
    def append(what: str, done: int, total: int, unit: str) -> None:
        with open(user_folder / NAME, "ab") as file:
            file.write(bytes(4 << 20))

    with pytest.raises(DownloadError, match="changed while it was read"):
        acquire(user_sources(form.format(user_folder))["T1"], tmp_path / "records", progress=append)


def test_unknown_protocol_is_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"cannot read nosuch://store/IXI-T1.tar: .*nosuch") as caught:
        acquire(Source("IXI-T1.tar", ("nosuch://store/IXI-T1.tar",), None), tmp_path)
    assert_one_clear_line(str(caught.value), tmp_path)


@pytest.mark.parametrize("failures", [0, 2])
def test_md5sums_on_the_server_of_the_user_verifies_its_archives(tmp_path: Path, tar: bytes, failures: int) -> None:
    def answer(call: Call) -> None:
        call.plain(200, sums.encode()) if call.path == "/MD5SUMS" else call.correct()

    with serve(Host(tar, first(failures, status(503), answer))) as host:
        folder = host.url.rpartition("/")[0]
        sums = f"{md5(tar)}  IXI-T1.tar\n{md5(b'')}  IXI-T2.tar\n"
        sources = user_sources(folder, HTTP)
        assert acquire(sources["T1"], tmp_path).checked
        with pytest.raises(DownloadError, match="MD5 is"):
            acquire(sources["T2"], tmp_path)
        host.requests.clear()
        assert user_sources(folder, replace(HTTP, offline=True))["T1"].md5 is None
        assert host.requests == []


def test_md5sums_with_any_declared_charset_is_read(tar: bytes) -> None:
    sums = f"{md5(tar)}  IXI-T1.tar\n{md5(tar)}  IXI-T2.tar\n".encode()
    with serve(Host(tar, lambda call: call.plain(200, sums, content_type="text/plain; charset=rot13"))) as host:
        assert user_sources(host.url, HTTP)["T1"].md5 == md5(tar)


def test_md5sums_may_list_all_members_before_the_archives(tar: bytes) -> None:
    members = "".join(f"{n:032x}  IXI{n:03d}-Guys-{n:04d}-T1.nii.gz\n" for n in range(1500))
    sums = f"{members}{md5(tar)}  IXI-T1.tar\n{md5(tar)}  IXI-T2.tar\n".encode()
    with serve(Host(tar, lambda call: call.plain(200, sums))) as host:
        assert user_sources(host.url, HTTP)["T1"].md5 == md5(tar)


def endless_body(call: Call) -> None:
    call.head(200, {"connection": "close"})
    while True:  # until the client disconnects
        call.send(b"#" * 65536)


def slow_endless_body(call: Call) -> None:
    call.head(200, {"connection": "close"})
    while not call.host.closing.wait(0.02):
        call.send(b"#")


@pytest.mark.parametrize("answer", [endless_body, slow_endless_body, drip_headers])
def test_endless_md5sums_is_refused(tar: bytes, answer: Answer) -> None:
    with serve(Host(tar, answer)) as host, pytest.raises(DownloadError, match=r"cannot use .*/MD5SUMS: "):
        user_sources(host.url, replace(HTTP, **DRIP))


def test_server_of_the_user_without_md5sums_is_accepted_unchecked(tmp_path: Path, tar: bytes) -> None:
    with serve(Host(tar, lambda call: call.plain(404) if call.path == "/MD5SUMS" else call.correct())) as host:
        source = user_sources(host.url, HTTP)["T1"]
        assert source == source_of(host, md5=None)
        assert not acquire(source, tmp_path).checked
