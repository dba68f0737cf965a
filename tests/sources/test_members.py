"""Fetching members alone gives the same dataset as whole archives, and transfers little more than the members."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import trustme
from conftest import config_for
from servers import Call, Host, LoggedRequest, serve, served_as

from ixi_etl.config import RefreshConfig
from ixi_etl.dataset import manifest, metadata, verify
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.errors import ConfigError, DownloadError
from ixi_etl.recipes.ixi import UNCHECKED, refresh
from ixi_etl.recipes.ixi_inputs import acquire_inputs, acquire_members
from ixi_etl.scans.survey import HEAD_BYTES, survey


@pytest.fixture(scope="module")
def host(archives: Path) -> Iterator[Host]:
    """A server of the two archives without MD5SUMS, which logs the bytes that it sends."""
    bodies = {f"/IXI-{m}.tar": (archives / f"IXI-{m}.tar").read_bytes() for m in ("T1", "T2")}

    def answer(call: Call) -> None:
        body = bodies.get(call.path)
        if body is None:
            call.plain(404)
            return
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", call.logged.range or "")
        start, stop = (int(match[1]), min(int(match[2]) + 1, len(body))) if match else (0, len(body))
        headers = {
            "accept_ranges": "bytes",
            "etag": f'"{call.path}"',
            "content_range": f"bytes {start}-{stop - 1}/{len(body)}",
        }
        call.plain(206 if match else 200, body[start:stop], **headers)

    with serve(Host(b"", answer)) as host:
        yield host


@dataclass(frozen=True)
class Fetched:
    """A refresh with `fetch = members`, and its requests."""

    made: PublishedVersion
    requests: list[LoggedRequest]


@pytest.fixture(scope="module")
def fetched(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Fetched:
    """Tests only read it, or copy its root."""
    host.requests.clear()
    made = refresh(members_of(host, tmp_path_factory.mktemp("members")))
    return Fetched(made, list(host.requests))


def members_of(host: Host, root: Path, **dataset: object) -> RefreshConfig:
    source = host.url.rpartition("/")[0]
    return config_for(root, source, **dataset).model_copy(update={"fetch": "members"})


def sent(requests: list[LoggedRequest]) -> int:
    return sum(request.sent for request in requests)


@pytest.fixture(scope="module")
def selected(published: PublishedVersion, archives: Path) -> pd.DataFrame:
    """The members of the subjects that are not excluded by their headers."""
    reasons = ("", "corrupt_voxels", "empty_image")
    table = metadata.read_manifest(published.folder)
    wanted = table.loc[table["reason"].isin(reasons), "subject_id"]
    members = survey({m: str(archives / f"IXI-{m}.tar") for m in ("T1", "T2")})
    return members[members["subject_id"].isin(wanted)]


def test_members_give_the_same_store_and_decisions_as_archives(fetched: Fetched, published: PublishedVersion) -> None:
    made = fetched.made
    assert made.version != published.version  # the name of a version depends on its inputs
    files, expected_files = (
        {
            n: f
            for n, f in metadata.read_metadata(v.folder)["files"].items()
            if n.startswith(("slices.zarr/t", "pictures/"))
        }
        for v in (made, published)
    )
    assert files == expected_files
    table, expected = (metadata.read_manifest(v.folder) for v in (made, published))
    archive_columns = ["flags", "t1_sha256", "t2_sha256", "t1_gzip_crc32", "t2_gzip_crc32"]
    pd.testing.assert_frame_equal(table.drop(columns=archive_columns), expected.drop(columns=archive_columns))
    used, expected = manifest.used_rows(table), manifest.used_rows(expected)
    assert used["flags"].str.split(",").map(lambda flags: UNCHECKED in flags).all()
    pd.testing.assert_frame_equal(used[archive_columns[1:]], expected[archive_columns[1:]])
    assert not verify.verify(made.folder, deep=True)
    assert "MD5 not checked" in (made.folder / "report.html").read_text()
    record = metadata.read_metadata(made.folder)
    assert record["inputs"]["members_of_ixi"] == []
    assert {source["md5_is_published"] for source in record["sources"].values()} == {False}


def test_members_are_fetched_from_an_insecure_host(host: Host, tmp_path: Path) -> None:
    with serve(Host(b"", host.answer), served_as(trustme.CA(), "localhost"), "localhost") as insecure:
        config = members_of(insecure, tmp_path)
        with pytest.raises(DownloadError, match="certificate is not valid"):
            acquire_members(config)
        inputs = acquire_members(config.model_copy(update={"insecure_hosts": ("localhost",)}))
    assert inputs.surveyed is not None
    assert all(Path(archive.location).stat().st_blocks for archive in inputs.archives.values())


def test_only_members_and_headers_are_transferred(fetched: Fetched, selected: pd.DataFrame, archives: Path) -> None:
    all_members = survey({m: str(archives / f"IXI-{m}.tar") for m in ("T1", "T2")})
    heads = (len(all_members) + 8) * (HEAD_BYTES + 1024)  # much of the small phantoms, but 0.04% of IXI's members
    between_members = len(selected) * 1024
    assert sent(fetched.requests) <= selected["size"].sum() + between_members + heads
    assert sent(fetched.requests) < sum((archives / f"IXI-{m}.tar").stat().st_size for m in ("T1", "T2"))


def test_another_configuration_fetches_only_the_members_that_are_missing(
    host: Host, fetched: Fetched, selected: pd.DataFrame, archives: Path, tmp_path: Path
) -> None:
    first = fetched.made
    shutil.copytree(first.folder.parents[2], tmp_path, dirs_exist_ok=True)
    host.requests.clear()
    again = refresh(members_of(host, tmp_path))
    assert (again.version, again.is_new) == (first.version, False)
    survey_bytes = sent(host.requests)
    assert survey_bytes < selected["size"].sum() / 4
    host.requests.clear()
    other = refresh(members_of(host, tmp_path, depth="any", pictures=False))
    used = set(manifest.used_rows(metadata.read_manifest(other.folder))["subject_id"]) - set(selected["subject_id"])
    assert used
    members = survey({m: str(archives / f"IXI-{m}.tar") for m in ("T1", "T2")}).set_index("subject_id")
    assert sent(host.requests) <= survey_bytes + members.loc[sorted(used), "size"].sum() * 1.5


def test_adjacent_members_share_a_request(fetched: Fetched, selected: pd.DataFrame) -> None:
    large = [r for r in fetched.requests if r.sent > 2 * (HEAD_BYTES + 1024)]
    assert len(large) < len(selected) / 2


def test_archive_that_changes_during_the_fetch_is_a_one_line_error(host: Host, tmp_path: Path) -> None:
    def answer(call: Call) -> None:
        if call.headers.get("if-range"):
            call.plain(200, b"another file", etag='"another"')
        else:
            host.answer(call)

    with serve(Host(b"", answer)) as changing, pytest.raises(DownloadError, match="changed while its members were"):
        refresh(members_of(changing, tmp_path))
    assert not list(tmp_path.glob("datasets/*/latest.json"))


def test_server_that_ignores_the_ranges_of_members_is_a_one_line_error(host: Host, tmp_path: Path) -> None:
    def answer(call: Call) -> None:
        if call.headers.get("if-range"):
            call.logged.range = None
        host.answer(call)

    with (
        serve(Host(host.body, answer, files=host.files)) as ignoring,
        pytest.raises(DownloadError, match="ignores byte ranges, so members cannot be fetched alone"),
    ):
        refresh(members_of(ignoring, tmp_path))


def test_server_without_etag_and_date_is_refused(archives: Path, tmp_path: Path) -> None:
    bodies = {f"/IXI-{m}.tar": (archives / f"IXI-{m}.tar").read_bytes() for m in ("T1", "T2")}
    sums = "".join(f"{hashlib.md5(body).hexdigest()}  {name[1:]}\n" for name, body in bodies.items())
    with serve(Host(b"", etag=None, files=bodies | {"/MD5SUMS": sums.encode()})) as host:
        with pytest.raises(DownloadError, match="serves no byte ranges with an ETag or date; fetch the whole"):
            refresh(members_of(host, tmp_path))
        config = config_for(tmp_path, host.url.rpartition("/")[0])
        assert acquire_inputs(config).locations.keys() == {"T1", "T2"}


def test_server_without_ranges_and_local_folder_are_refused(archives: Path, tmp_path: Path) -> None:
    body, message = (
        (archives / "IXI-T1.tar").read_bytes(),
        "serves no byte ranges with an ETag or date; fetch the whole",
    )
    sums = b"".join(f"{'0' * 32}  IXI-{m}.tar\n".encode() for m in ("T1", "T2"))
    host = Host(body, ranges=False, files={"/MD5SUMS": sums})
    with serve(host), pytest.raises((ConfigError, DownloadError), match=message):
        refresh(members_of(host, tmp_path))
    config = config_for(tmp_path, archives).model_copy(update={"fetch": "members"})
    with pytest.raises((ConfigError, DownloadError), match="is read in place; omit --fetch members"):
        refresh(config)
    with pytest.raises(ValueError, match="needs the network to find the members; leave out offline"):
        RefreshConfig(fetch="members", offline=True)
