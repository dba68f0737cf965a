"""Fixtures for download tests: small archives, a network without proxies, an interrupted download."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from answers import (
    NAME,
    Unfinished,
    acquire,
    after_probe,
    finished_segments,
    first,
    isolate_network,
    make_tar,
    source_of,
    status,
)
from servers import Call, Host, serve

from ixi_etl.core.files import read_json
from ixi_etl.errors import DownloadError


@pytest.fixture(scope="session")
def tar(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_tar(tmp_path_factory.mktemp("tar"), 1)


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Another file of the same length."""
    return make_tar(tmp_path_factory.mktemp("other"), 2)


@pytest.fixture(scope="session")
def longer(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_tar(tmp_path_factory.mktemp("longer"), 3, 800_000)


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def isolated_network(monkeypatch: pytest.MonkeyPatch, unrelated_ca: str) -> None:
    isolate_network(monkeypatch, unrelated_ca)


@pytest.fixture
def user_folder(tmp_path: Path, tar: bytes, other: bytes) -> Path:
    """A folder with the user's own archives."""
    folder = tmp_path / "user_folder"
    folder.mkdir()
    (folder / "IXI-T1.tar").write_bytes(tar)
    (folder / "IXI-T2.tar").write_bytes(other)
    return folder


@pytest.fixture(scope="module")
def unfinished(tar: bytes, unrelated_ca: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unfinished]:
    """A download that was interrupted after four segments."""
    folder = tmp_path_factory.mktemp("unfinished")
    with serve(Host(tar)) as host:
        host.answer = after_probe(first(4, Call.correct, status(403)))
        with pytest.MonkeyPatch.context() as patch:
            isolate_network(patch, unrelated_ca)
            with pytest.raises(DownloadError):
                acquire(source_of(host, md5=None), folder, connections=1)
        host.answer = Call.correct
        assert finished_segments(folder) == [0, 1, 2, 3]
        yield Unfinished(host, read_json(folder / f"{NAME}.part.json"))
