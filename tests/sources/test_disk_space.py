"""Too little space, a full disk and unreadable files are one-line errors."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from answers import (
    NAME,
    SEGMENT,
    Unfinished,
    acquire,
    assert_one_clear_line,
    finished_segments,
    md5,
    source_of,
)
from servers import Host, serve

from ixi_etl.errors import DownloadError
from ixi_etl.sources import partial
from ixi_etl.sources.catalog import Source

pytest_plugins = ["downloads"]
pytestmark = pytest.mark.usefixtures("isolated_network")


def test_too_little_space_is_reported_before_the_download(
    tmp_path: Path, tar: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = len(tar) + partial.SPARE_BYTES - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with serve(Host(tar)) as host, serve(Host(tar)) as mirror:
        source = source_of(host, mirror, md5=None)
        with pytest.raises(DownloadError, match=r"GB free, but .* IXI-T1.tar, need .* GB more") as caught:
            acquire(source, tmp_path)
        assert_one_clear_line(str(caught.value), tmp_path, str(tmp_path))
        assert (host.fetches, mirror.requests) == ([], [])
        assert all(p.stat().st_size == 0 for p in tmp_path.iterdir())
        free += 1
        acquire(source, tmp_path)


def test_finished_segments_need_no_space(
    unfinished: Unfinished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished.restore(tmp_path, {0, 1, 2})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=partial.SPARE_BYTES + SEGMENT))
    acquire(source_of(unfinished.host, md5=None), tmp_path)


def test_full_disk_is_a_one_line_error_and_the_next_run_resumes(
    tmp_path: Path, tar: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.pwrite

    def write_until_full(file: int, data: bytes, offset: int) -> int:
        if offset >= 7 * SEGMENT:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[:10_000], offset)  # a write may be partial

    with serve(Host(tar)) as host:
        source = source_of(host, md5=None)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", write_until_full)
            with pytest.raises(DownloadError, match="No space left on device") as caught:
                acquire(source, tmp_path, connections=1)
        assert_one_clear_line(str(caught.value), tmp_path, str(tmp_path / NAME))
        assert finished_segments(tmp_path) == [0, 1, 2, 3, 4, 5, 6]
        host.requests.clear()
        assert Path(acquire(source, tmp_path).location).read_bytes() == tar
        assert host.sent == len(tar) - 7 * SEGMENT


def test_unreadable_file_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(DownloadError) as caught:
        acquire(Source(NAME, ("http://127.0.0.1:9/IXI-T1.tar",), md5(b"")), tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / NAME) in str(caught.value)
