"""Members of any tar archive are read in place; a damaged archive is a one-line error."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from servers import Host, serve

from ixi_etl.core.text import quantity
from ixi_etl.errors import ArchiveError
from ixi_etl.scans.survey import survey
from ixi_etl.scans.tar import MAX_MEMBER_BYTES, index_archive, read_member

names = st.text(
    st.characters(codec="utf-8", exclude_characters="\0/", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=300
)


def tar_of(path: Path, infos: list[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for info, data in infos:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@given(
    st.dictionaries(names, st.binary(max_size=2000), max_size=8),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_the_bytes_of_every_member_are_read_in_place(
    tmp_path_factory: pytest.TempPathFactory, members: dict[str, bytes], form: int
) -> None:
    path = tar_of(tmp_path_factory.mktemp("t") / "a.tar", [(tarfile.TarInfo(n), d) for n, d in members.items()], form)
    found = index_archive(str(path))
    assert {m.name: read_member(str(path), m.offset, m.size) for m in found} == members
    assert all(m.problem == "" for m in found)


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.CHRTYPE, "device"),
        (tarfile.FIFOTYPE, "pipe"),
    ],
)
def test_links_and_devices_are_reported_and_not_followed(tmp_path: Path, kind: bytes, problem: str) -> None:
    link = tarfile.TarInfo("IXI002-Guys-0828-T1.nii.gz")
    link.type, link.linkname = kind, "/etc/passwd"
    (member,) = index_archive(str(tar_of(tmp_path / "a.tar", [(link, b"")])))
    assert problem in member.problem


def test_a_member_of_gigabytes_is_not_read_into_memory(tmp_path: Path) -> None:
    size = 8 << 30
    assert size > MAX_MEMBER_BYTES
    large = tarfile.TarInfo("IXI300-Guys-0300-T1.nii.gz")
    large.size = size
    with open(tmp_path / "a.tar", "wb") as file:  # a sparse file
        file.write(large.tobuf(tarfile.GNU_FORMAT))
        file.truncate(512 + size + 1024)
    (member,) = index_archive(str(tmp_path / "a.tar"))
    assert "the maximum is" in member.problem


def test_member_names_outside_the_folder_write_no_files(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", [(tarfile.TarInfo(n), b"x") for n in ("../../evil", "/etc/evil")])
    assert [m.name for m in index_archive(str(path))] == ["../../evil", "/etc/evil"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar"]


@pytest.mark.parametrize("size", [600, 3000, 5631, 5632, 5632 + 300, 5632 + 512 + 100, 2 * 5632])
def test_a_truncated_archive_never_loses_members_silently(size: int, tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", [(tarfile.TarInfo(n), b"x" * 5000) for n in "ab"], tarfile.GNU_FORMAT)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ArchiveError, match=r"a\.tar is not a tar archive that can be read"):
        index_archive(str(path))


def test_a_damaged_tar_header_never_loses_members_silently(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", [(tarfile.TarInfo(n), b"x" * 5000) for n in "abc"], tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    data[2 * 5632 + 150] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ArchiveError, match="damaged or cut short at byte 11264, after 2 members"):
        index_archive(str(path))


def test_a_member_of_negative_size_does_not_hang(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a")
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" * 10 + b"\xfc\x00"  # base 256: -1024
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(block) + bytes(2048))
    with pytest.raises(ArchiveError, match="member of -1024 bytes"):
        index_archive(str(path))


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("size", [-(1 << 30), 1 << 40, 1 << 80])
def test_an_impossible_size_is_a_one_line_error_and_takes_no_memory(kind: bytes, size: int, tmp_path: Path) -> None:
    block = bytearray(tarfile.TarInfo("IXI002-Guys-0828-T1.nii.gz").tobuf(tarfile.GNU_FORMAT))
    block[124:136] = bytes([255 if size < 0 else 128]) + (size % (1 << 88)).to_bytes(11, "big")
    block[156:157] = kind
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(block) + bytes(2048))
    with pytest.raises(ArchiveError, match=r"a\.tar is not a tar archive that can be read"):
        index_archive(str(path))


def test_a_name_that_is_not_utf_8_can_be_printed(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", [(tarfile.TarInfo("caf\udce9"), b"x")], tarfile.GNU_FORMAT)
    (member,) = index_archive(str(path))
    assert member.name.encode() == b"caf\\udce9"


def test_control_characters_in_a_name_are_escaped(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", [(tarfile.TarInfo("a\x1b]0;b\x07\n\x7f\x9b\u2028\ufeff"), b"x")])
    (member,) = index_archive(str(path))
    assert member.name == "a\\x1b]0;b\\x07\\x0a\\x7f\\x9b\u2028\ufeff"


def header(size: int, kind: bytes) -> bytes:
    info = tarfile.TarInfo("IXI002-Guys-0828-T1.nii.gz")
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def test_a_header_that_takes_tarfile_minutes_is_a_one_line_error(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(header(1 << 18, tarfile.XHDTYPE) + b"1" * (1 << 18) + header(0, tarfile.REGTYPE) + bytes(1024))
    with pytest.raises(ArchiveError, match="a member of 262144 bytes, of type b'x'"):
        index_archive(str(path))


def test_endless_headers_are_a_one_line_error(tmp_path: Path) -> None:
    path, name = tmp_path / "a.tar", header(4, tarfile.GNUTYPE_LONGNAME) + b"abc\0" + bytes(508)
    path.write_bytes(name * 2000 + header(0, tarfile.REGTYPE) + bytes(1024))
    with pytest.raises(ArchiveError, match=r"a\.tar is not a tar archive that can be read"):
        index_archive(str(path))


@pytest.mark.parametrize("form", ["{}", "file://{}"])
@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "device", "kernel"])
def test_a_special_file_is_a_one_line_error(tmp_path: Path, kind: str, form: str) -> None:
    path, target = tmp_path / "a.tar", tmp_path / "b"
    if kind.endswith("pipe"):
        os.mkfifo(target if kind.startswith("link") else path)
    if kind != "pipe":
        path.symlink_to({"device": "/dev/zero", "kernel": "/proc/self/clear_refs"}.get(kind, target))
    with pytest.raises(ArchiveError, match=r"a\.tar is (not a regular|an empty) file; give a --source"):
        index_archive(form.format(path))


@pytest.mark.parametrize("content", [b"<html>" * 500, b"\0" * 100])
def test_a_file_that_is_not_a_tar_is_a_one_line_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(ArchiveError, match=r"a\.tar is not a tar archive"):
        index_archive(str(path))


def test_an_unknown_protocol_is_a_one_line_error() -> None:
    with pytest.raises(ArchiveError, match=r"cannot read foo://x/a\.tar"):
        index_archive("foo://x/a.tar")


def test_a_missing_archive_is_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="is not there, or cannot be reached"):
        index_archive(str(tmp_path / "a.tar"))


# -- the end of an archive --------------------------------------------------------------------------------------------

TEN = [f"IXI{n:03d}-Guys-{n:04d}-T1.nii.gz" for n in range(10)]
STRIDE = 10_240 + 512  # bytes of a member with its header


@pytest.fixture(scope="module")
def ten_members(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An archive of ten members without zero bytes."""
    members = [(tarfile.TarInfo(name), bytes([n + 1]) * 10_240) for n, name in enumerate(TEN)]
    return tar_of(tmp_path_factory.mktemp("ten") / "ten.tar", members, tarfile.GNU_FORMAT).read_bytes()


def zeroed(data: bytes, start: int, stop: int) -> bytes:
    """`data` with zeros from `start` to `stop`, as in a sparse file."""
    return data[:start] + bytes(stop - start) + data[stop:]


WRONG_ENDS = {
    "two archives joined": (lambda tar: tar + tar, 10 * STRIDE, "other bytes follow from byte 112640"),
    "an incomplete download": (lambda tar: zeroed(tar, 4 * STRIDE, len(tar)), 4 * STRIDE, "bytes follow"),
    "a download that ends in a member": (
        lambda tar: zeroed(tar, 4 * STRIDE + 999, len(tar)),
        5 * STRIDE,
        "bytes follow",
    ),
    "zeros only": (lambda tar: bytes(len(tar)), 0, "bytes follow"),
    "a hole over headers": (
        lambda tar: zeroed(tar, 3 * STRIDE - 9, 6 * STRIDE + 600),
        3 * STRIDE,
        "other bytes follow",
    ),
    "a hole over one header": (lambda tar: zeroed(tar, 3 * STRIDE, 3 * STRIDE + 512), 3 * STRIDE, "other bytes follow"),
    "a hole over whole members": (lambda tar: zeroed(tar, 2 * STRIDE, 7 * STRIDE), 2 * STRIDE, "other bytes follow"),
    "a hole at the start": (lambda tar: zeroed(tar, 0, 4096), 0, "other bytes follow from byte 4096"),
    "a hole of megabytes": (lambda tar: tar[:STRIDE] + bytes(3 << 20) + tar[STRIDE:], STRIDE, "bytes follow"),
    "zeros, then another file": (lambda tar: tar + b"<html>", 10 * STRIDE, "other bytes follow from byte 112640"),
    "a wrong last byte": (lambda tar: tar[:-1] + b"x", 10 * STRIDE, "other bytes follow from byte 112639"),
    "megabytes of zeros": (lambda tar: tar + bytes(5 << 20), 10 * STRIDE, "bytes follow"),
    "other bytes instead of zeros": (lambda tar: tar[: 10 * STRIDE] + b"x" * 600, 10 * STRIDE, "damaged or cut short"),
    "no end marker": (lambda tar: tar[: 10 * STRIDE], 10 * STRIDE, "damaged or cut short"),
    "part of an end marker": (lambda tar: tar[: 10 * STRIDE + 100], 10 * STRIDE, "damaged or cut short"),
}


@pytest.mark.parametrize("case", WRONG_ENDS)
def test_members_after_a_wrong_end_are_never_lost_silently(case: str, ten_members: bytes, tmp_path: Path) -> None:
    change, offset, problem = WRONG_ENDS[case]
    path = tmp_path / "a.tar"
    path.write_bytes(change(ten_members))
    with pytest.raises(ArchiveError, match=r"a\.tar is not a tar archive that can be read") as caught:
        index_archive(str(path))
    assert f"byte {offset}, after {quantity(offset // STRIDE, 'member')}" in str(caught.value)
    assert problem in str(caught.value)


@pytest.mark.parametrize("zeros", [512, 1024, 1024 + 7, 1024 + 3000, 10_240, 10_752])
def test_an_archive_may_end_in_a_few_zero_bytes(zeros: int, ten_members: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(ten_members[: 10 * STRIDE] + bytes(zeros))
    assert [m.name for m in index_archive(str(path))] == TEN


@pytest.mark.parametrize("record", [32 << 10, 64 << 10, 1 << 20])
def test_an_archive_may_be_padded_to_tape_records(record: int, ten_members: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(ten_members[: 10 * STRIDE])
    os.truncate(path, -(-(10 * STRIDE + 1024) // record) * record)
    assert [m.name for m in index_archive(str(path))] == TEN


@pytest.mark.parametrize(("start", "stop"), [(512, STRIDE), (512, 600), (STRIDE - 5000, STRIDE)])
def test_a_member_with_zeroed_bytes_keeps_its_row(start: int, stop: int, ten_members: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(zeroed(ten_members, 4 * STRIDE + start, 4 * STRIDE + stop))
    table = survey({"T1": str(path)}).set_index("member")
    assert list(table.index) == TEN
    assert table.loc[TEN[4], "reason"] == "unreadable"


def test_a_zeroed_long_name_is_an_error(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", [(tarfile.TarInfo("long" * 50), b"x")], tarfile.GNU_FORMAT)
    path.write_bytes(zeroed(path.read_bytes(), 512, 1024))
    with pytest.raises(ArchiveError, match="a member without a name at byte 0"):
        index_archive(str(path))


def test_checking_the_end_of_a_remote_archive_costs_one_request(ten_members: bytes) -> None:
    with serve(Host(ten_members)) as host:
        assert [m.name for m in index_archive(host.url)] == TEN
        request_count = len(host.requests)
        assert request_count <= len(TEN) + 4
    with serve(Host(ten_members[:STRIDE] + bytes(50 << 20) + ten_members[STRIDE:])) as host:
        with pytest.raises(ArchiveError, match=f"byte {STRIDE}, after 1 member, but .* bytes follow"):
            index_archive(host.url)
        assert sum(r.sent for r in host.requests) < 2 << 20
        assert len(host.requests) <= request_count
