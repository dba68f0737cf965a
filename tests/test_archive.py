"""Members are read in place, whatever the tar holds."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ixi_etl.archive import index_archive, read_member
from ixi_etl.errors import ArchiveError

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
def test_every_member_s_bytes_are_found_in_place(
    tmp_path_factory: pytest.TempPathFactory, members: dict[str, bytes], form: int
) -> None:
    path = tar_of(tmp_path_factory.mktemp("t") / "a.tar", [(tarfile.TarInfo(n), d) for n, d in members.items()], form)
    found = index_archive(str(path))
    assert {m.name: read_member(str(path), m.offset, m.size) for m in found} == members
    assert all(m.problem == "" for m in found)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.CHRTYPE, "device"),
        (tarfile.FIFOTYPE, "pipe"),
    ],
)
def test_what_is_no_file_is_said_and_not_followed(tmp_path: Path, kind: bytes, said: str) -> None:
    link = tarfile.TarInfo("IXI002-Guys-0828-T1.nii.gz")
    link.type, link.linkname = kind, "/etc/passwd"
    (member,) = index_archive(str(tar_of(tmp_path / "a.tar", [(link, b"")])))
    assert said in member.problem


def test_names_that_lead_out_are_only_names(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", [(tarfile.TarInfo(n), b"x") for n in ("../../evil", "/etc/evil")])
    assert [m.name for m in index_archive(str(path))] == ["../../evil", "/etc/evil"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar"]


@pytest.mark.parametrize("at", [600, 3000, 5631, 5632, 5632 + 300, 5632 + 512 + 100, 2 * 5632])
def test_an_archive_cut_anywhere_loses_nobody_in_silence(at: int, tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", [(tarfile.TarInfo(n), b"x" * 5000) for n in "ab"], tarfile.GNU_FORMAT)
    path.write_bytes(path.read_bytes()[:at])
    with pytest.raises(ArchiveError, match=r"a\.tar is not a tar archive that can be read"):
        index_archive(str(path))


def test_a_damaged_header_loses_nobody_in_silence(tmp_path: Path) -> None:
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
def test_a_size_that_no_archive_has_is_one_clear_line_and_no_memory(kind: bytes, size: int, tmp_path: Path) -> None:
    block = bytearray(tarfile.TarInfo("IXI002-Guys-0828-T1.nii.gz").tobuf(tarfile.GNU_FORMAT))
    block[124:136] = bytes([255 if size < 0 else 128]) + (size % (1 << 88)).to_bytes(11, "big")
    block[156:157] = kind
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(block) + bytes(2048))
    with pytest.raises(ArchiveError, match=r"a\.tar is not a tar archive that can be read"):
        index_archive(str(path))


def test_a_name_that_is_no_utf_8_can_be_written_down(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", [(tarfile.TarInfo("caf\udce9"), b"x")], tarfile.GNU_FORMAT)
    (member,) = index_archive(str(path))
    assert member.name.encode() == b"caf\\udce9"


def test_a_name_cannot_steer_a_terminal(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", [(tarfile.TarInfo("a\x1b]0;b\x07\n\x7f\x9b\u2028\ufeff"), b"x")])
    (member,) = index_archive(str(path))
    assert member.name == "a\\x1b]0;b\\x07\\x0a\\x7f\\x9b\u2028\ufeff"


def header(size: int, kind: bytes) -> bytes:
    info = tarfile.TarInfo("IXI002-Guys-0828-T1.nii.gz")
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def test_a_header_on_which_tarfile_would_take_minutes_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(header(1 << 18, tarfile.XHDTYPE) + b"1" * (1 << 18) + header(0, tarfile.REGTYPE) + bytes(1024))
    with pytest.raises(ArchiveError, match="a member of 262144 bytes, of type b'x'"):
        index_archive(str(path))


def test_headers_without_end_before_a_member_are_one_clear_line(tmp_path: Path) -> None:
    path, name = tmp_path / "a.tar", header(4, tarfile.GNUTYPE_LONGNAME) + b"abc\0" + bytes(508)
    path.write_bytes(name * 2000 + header(0, tarfile.REGTYPE) + bytes(1024))
    with pytest.raises(ArchiveError, match=r"a\.tar is not a tar archive that can be read"):
        index_archive(str(path))


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_has_no_end_is_one_clear_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.tar"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(ArchiveError, match=r"a\.tar is not a regular file"):
        index_archive(str(path))


@pytest.mark.parametrize("content", [b"", b"<html>" * 500, b"\0" * 100])
def test_what_is_no_tar_is_one_clear_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(ArchiveError, match=r"a\.tar is not a tar archive"):
        index_archive(str(path))


def test_an_unknown_protocol_is_one_clear_line() -> None:
    with pytest.raises(ArchiveError, match=r"cannot read foo://x/a\.tar"):
        index_archive("foo://x/a.tar")


def test_a_missing_archive_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="is not there, or cannot be reached"):
        index_archive(str(tmp_path / "a.tar"))
