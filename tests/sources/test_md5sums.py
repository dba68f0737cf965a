"""An MD5SUMS next to a user's archives is read in any common format, or refused in one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from answers import HTTP, drip_headers, isolate_network, md5, page, status
from hypothesis import given
from hypothesis import strategies as st
from servers import Answer, Call, Host, serve

from ixi_etl.core.http_options import HttpOptions
from ixi_etl.core.storage import to_path
from ixi_etl.errors import ArchiveError, DownloadError, IxiError
from ixi_etl.sources.http import MAX_SMALL_FILE
from ixi_etl.sources.md5sums import find_md5, parse_md5sums
from ixi_etl.sources.user_source import user_sources

T1, T2 = md5(b"T1"), md5(b"T2")


@pytest.fixture(autouse=True)
def _isolated_network(monkeypatch: pytest.MonkeyPatch, unrelated_ca: str) -> None:
    isolate_network(monkeypatch, unrelated_ca)


def gnu(*lines: str) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


PLAIN = gnu(f"{T1}  IXI-T1.tar", f"{T2}  IXI-T2.tar")
FORMS: dict[str, bytes] = {
    "md5sum": PLAIN,
    "md5sum -b": PLAIN.replace(b"  ", b" *"),
    "one space, as md5 -r": PLAIN.replace(b"  ", b" "),
    "tabs": PLAIN.replace(b"  ", b"\t"),
    "capitals": PLAIN.replace(T1.encode(), T1.upper().encode()),
    "BSD": gnu(f"MD5 (IXI-T1.tar) = {T1}", f"MD5 (IXI-T2.tar) = {T2}"),
    "openssl": gnu(f"MD5(IXI-T1.tar)= {T1}", f"MD5(IXI-T2.tar)= {T2}"),
    "BSD with folders": gnu(f"MD5 (/data/IXI-T1.tar) = {T1}", f"MD5 (./IXI-T2.tar) = {T2}"),
    "leading spaces": gnu(f"   {T1}  IXI-T1.tar", f"\t{T2}  IXI-T2.tar"),
    "trailing spaces": gnu(f"{T1}  IXI-T1.tar  ", f"{T2}  IXI-T2.tar\t"),
    "UTF-8 with byte order mark": b"\xef\xbb\xbf" + PLAIN,
    "UTF-16, as PowerShell writes": PLAIN.decode().encode("utf-16"),
    "big-endian UTF-16": b"\xfe\xff" + PLAIN.decode().encode("utf-16-be"),
    "UTF-16 without byte order mark": PLAIN.decode().encode("utf-16-le"),
    "UTF-32": PLAIN.decode().encode("utf-32"),
    "a Latin-1 comment": b"# r\xe9sum\xe9\n" + PLAIN,
    "CRLF": PLAIN.replace(b"\n", b"\r\n"),
    "CR": PLAIN.replace(b"\n", b"\r"),
    "no last newline": PLAIN.rstrip(),
    "another case": gnu(f"{T1}  ixi-t1.TAR", f"{T2}  Ixi-T2.tar"),
    "a folder": gnu(f"{T1}  IXI/IXI-T1.tar", f"{T2} *./IXI-T2.tar"),
    "an absolute path": gnu(f"{T1}  /data/my scans/IXI-T1.tar", f"{T2}  C:\\data\\IXI-T2.tar"),
    "escaped": gnu(f"\\{T1}  a\\nb/IXI-T1.tar", f"\\{T2} *IXI-T2.tar"),
    "comments": gnu("# MD5", ";", "", f"{T1}  IXI-T1.tar", "// end", f"{T2}  IXI-T2.tar"),
    "duplicate lines": PLAIN + PLAIN,
    "with other files": gnu(f"{T2}  IXI-T1.tar.part", f"{T2}  old/IXI-T1.tar", f"{T1}  my-IXI-T2.tar") + PLAIN,
    "with other hashes": gnu(f"SHA256 (IXI-T1.tar) = {T2 * 2}", f"{T2 * 2}  IXI-T1.tar") + PLAIN,
}
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "an empty file"),
    "blank": (b"\n\n", "no line with the MD5 of IXI-T1.tar"),
    "only the T1": (gnu(f"{T1}  IXI-T1.tar"), "no line with the MD5 of IXI-T2.tar"),
    "only the T2": (gnu(f"{T2}  IXI-T2.tar"), "no line with the MD5 of IXI-T1.tar"),
    "an HTML page": (b"<!DOCTYPE html><p>Not found</p>", "no line with the MD5 of IXI-T1.tar"),
    "another hash": (gnu(f"{T1 * 2}  IXI-T1.tar", f"{T2 * 2}  IXI-T2.tar"), "no line with the MD5"),
    "a missing digit": (PLAIN[1:], "no line with the MD5 of IXI-T1.tar"),
    "no file names": (gnu(T1, T2), "no line with the MD5"),
    "no space before a name": (gnu(f"{T1}IXI-T1.tar", f"{T2}  IXI-T2.tar"), "no line with the MD5 of IXI-T1.tar"),
    "a contradiction": (PLAIN + gnu(f"{T2}  IXI-T1.tar"), "its lines for IXI-T1.tar contradict each other"),
    "a contradiction between folders": (
        gnu(f"{T1}  a/IXI-T1.tar", f"{T2}  b/IXI-T1.tar", f"{T2}  IXI-T2.tar"),
        "its lines for IXI-T1.tar contradict each other",
    ),
    "all byte values": (bytes(range(256)) * 9, "no line with the MD5"),
    "too large": (b"#" * (MAX_SMALL_FILE + 1), f"more than {MAX_SMALL_FILE} bytes"),
}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with both of the user's archives."""
    for name in ("IXI-T1.tar", "IXI-T2.tar"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def md5s_of(location: Path | str) -> dict[str, str | None]:
    return {m: source.md5 for m, source in user_sources(str(location), HTTP).items()}


def folder_of(host: Host) -> str:
    return host.url.rpartition("/")[0]


def assert_refused(location: Path | str, text: str, http: HttpOptions = HTTP) -> DownloadError:
    with pytest.raises(DownloadError, match="MD5SUMS") as caught:
        user_sources(str(location), http)
    assert str(caught.value).isprintable()
    assert text in str(caught.value)
    return caught.value


@pytest.mark.parametrize("form", FORMS)
def test_every_format_of_md5sums_is_read(form: str, own: Path) -> None:
    (own / "MD5SUMS").write_bytes(FORMS[form])
    assert md5s_of(own) == {"T1": T1, "T2": T2}


@pytest.mark.parametrize("case", BAD)
def test_invalid_md5sums_is_refused(case: str, own: Path) -> None:
    data, text = BAD[case]
    (own / "MD5SUMS").write_bytes(data)
    assert_refused(own, text)


names = st.text(st.characters(exclude_categories=("Z", "C"), exclude_characters="/*\\"), min_size=1)
digests = st.binary(min_size=16, max_size=16).map(bytes.hex)
separators = st.sampled_from(["  ", " *", "\t", "  ./", "  some/folder/"])


@given(sums=st.dictionaries(names, st.tuples(digests, separators, st.booleans())), end=st.sampled_from(["\n", "\r\n"]))
def test_md5sums_in_the_format_of_md5sum_are_parsed(sums: dict[str, tuple[str, str, bool]], end: str) -> None:
    lines = [
        f"{digest.upper() if upper else digest}{separator}{name}" for name, (digest, separator, upper) in sums.items()
    ]
    text = end.join(["# a comment", *lines, "", "d41d8cd98f00b204e9800998ecf8427  one.digit.short"])
    listed = parse_md5sums(text.encode())
    for name, (digest, _, _) in sums.items():
        assert find_md5(name, [(n, d) for n, d in listed if n.rpartition("/")[2] == name]) == digest
    assert len(listed) == len(sums)


def test_most_exact_file_name_takes_precedence() -> None:
    listed = [("ixi-t1.tar", "1"), ("old/IXI-T1.tar", "2"), ("./IXI-T1.tar", "3")]
    assert [find_md5("IXI-T1.tar", listed[:n]) for n in range(4)] == [None, "1", "2", "3"]
    with pytest.raises(ArchiveError, match="contradict"):
        find_md5("IXI-T1.tar", [*listed, ("IXI-T1.tar", "4")])


# -- local files ------------------------------------------------------------------------------------------------------


def test_archives_without_md5sums_are_unchecked(own: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert md5s_of(own) == {"T1": None, "T2": None}
    assert not caplog.messages


@pytest.mark.parametrize("name", ["md5sums.txt", "SHA256SUMS", "IXI-T1.tar.md5", "checksums.csv"])
def test_checksums_under_another_name_are_named_in_a_warning(
    name: str, own: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (own / name).write_text(f"{'0' * 32}  IXI-T1.tar\n")
    assert md5s_of(own) == {"T1": None, "T2": None}
    (message,) = caplog.messages
    assert f"used unchecked; {name} is not read; write it with" in message


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (pipe, "not a regular file"),
        (Path.mkdir, "not a regular file"),
        (link_to("/dev/zero"), "not a regular file"),
        (link_to("/proc/self/clear_refs"), "an empty file"),
        (link_to("nowhere"), "a link to a missing file"),
    ],
    ids=["pipe", "folder", "device", "kernel", "dangling"],
)
@pytest.mark.parametrize("form", ["{}", "file://{}", "file://localhost{}/"])
def test_md5sums_that_is_not_a_file_is_refused(make: Callable[[Path], None], text: str, form: str, own: Path) -> None:
    make(own / "MD5SUMS")
    assert_refused(form.format(own), text)


def test_unreadable_md5sums_is_refused(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own / "MD5SUMS").write_bytes(PLAIN)

    def refuse(*_: object, **__: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(fsspec.get_filesystem_class("file"), "cat_file", refuse)
    assert_refused(own, "Permission denied")


def test_md5_of_a_symbolic_link_is_found_by_the_name_of_the_link(
    own: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    links = tmp_path_factory.mktemp("links")
    for name in ("IXI-T1.tar", "IXI-T2.tar"):
        (links / name).symlink_to((own / name).rename(own / md5(name.encode())))
    (links / "MD5SUMS").write_bytes(PLAIN)
    for source in (links, links / "IXI-T1.tar", f"file://{links}/IXI-T2.tar"):
        assert md5s_of(source) == {"T1": T1, "T2": T2}
    assert user_sources(str(links / "IXI-T1.tar"))["T2"].urls == (str(links / "IXI-T2.tar"),)


# -- servers and S3 ---------------------------------------------------------------------------------------------------


def truncated(call: Call) -> None:
    call.head(200, {"content-length": str(len(PLAIN))})
    call.send(PLAIN[:-9])
    call.close_connection = True


ANSWERS: dict[str, tuple[Answer, str]] = {
    "503": (status(503), "503 Service Unavailable, 3 times"),
    "500": (status(500), "500 Internal Server Error, 3 times"),
    "429": (status(429, retry_after="0"), "429 Too Many Requests"),
    "403": (status(403), "403 Forbidden"),
    "401": (status(401), "401"),
    "an HTML page": (page, "no line with the MD5 of IXI-T1.tar"),
    "204": (status(204), "204"),
    "an empty file": (lambda call: call.plain(200), "no line with the MD5 of IXI-T1.tar"),
    "a reset": (Call.reset, "3 times"),
    "truncated": (truncated, "3 times"),
    "a redirect loop": (lambda call: call.plain(302, location=call.path), "redirects"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_failed_request_for_md5sums_is_an_error(case: str) -> None:
    answer, text = ANSWERS[case]
    with serve(Host(b"", answer)) as host:
        error = assert_refused(folder_of(host), text)
        assert error.transient == ("times" in text or case == "429")
        assert user_sources(folder_of(host), replace(HTTP, offline=True))["T1"].md5 is None


@pytest.mark.parametrize("answer", [Call.stall, drip_headers], ids=["stall", "drip"])
def test_server_that_does_not_answer_is_an_error(answer: Answer) -> None:
    http = replace(HTTP, timeout_s=0.15, tries=2)
    with serve(Host(b"", answer)) as host:
        assert assert_refused(folder_of(host), "2 times", http).transient


@pytest.mark.parametrize("code", [404, 410])
def test_archives_of_a_server_without_md5sums_are_unchecked(code: int) -> None:
    with serve(Host(b"", status(code))) as host:
        assert md5s_of(folder_of(host)) == {"T1": None, "T2": None}


@pytest.mark.parametrize("form", ["BSD", "UTF-16, as PowerShell writes", "another case", "CRLF"])
def test_every_format_is_read_over_http(form: str) -> None:
    with serve(Host(FORMS[form])) as host:
        assert md5s_of(folder_of(host)) == {"T1": T1, "T2": T2}


def test_percent_encoded_name_is_found() -> None:
    with serve(Host(gnu(f"{T1}  my T1.tar", f"{T2}  my T2.tar"))) as host:
        assert md5s_of(f"{folder_of(host)}/my%20T1.tar") == {"T1": T1, "T2": T2}


def test_md5sums_on_s3_is_read_and_only_not_found_means_unchecked(
    s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert md5s_of(s3_root) == {"T1": None, "T2": None}
    md5sums = to_path(s3_root) / "MD5SUMS"
    for form in ("BSD", "UTF-8 with byte order mark"):
        md5sums.write_bytes(FORMS[form])
        assert md5s_of(s3_root) == {"T1": T1, "T2": T2}
    for data, text in (BAD["only the T1"], (b"", "no line with the MD5 of IXI-T1.tar")):
        md5sums.write_bytes(data)
        assert_refused(s3_root, text)
    for error in (PermissionError("Forbidden"), OSError("SlowDown"), ConnectionError("timed out")):

        async def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(fsspec.get_filesystem_class("s3"), "_info", fail)
            assert assert_refused(s3_root, str(error)).transient != isinstance(error, PermissionError)


def test_file_url_of_another_machine_is_refused() -> None:
    with pytest.raises(IxiError, match="cannot read 'file://elsewhere/data': give a folder"):
        user_sources("file://elsewhere/data")
