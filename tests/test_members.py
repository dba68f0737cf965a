"""Fetching members alone makes the dataset that whole archives make, and moves little more than those members."""

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
from servers import Asked, Call, Host, serve, served_as

from ixi_etl import dataset, manifest
from ixi_etl.config import RefreshConfig
from ixi_etl.errors import DownloadError
from ixi_etl.publish import Refreshed
from ixi_etl.refresh import UNCHECKED, acquire_inputs, acquire_members, refresh
from ixi_etl.survey import HEAD_BYTES, survey


@pytest.fixture(scope="module")
def host(archives: Path) -> Iterator[Host]:
    """A server of both archives, and of nothing else, that counts what it sends."""
    bodies = {f"/IXI-{m}.tar": (archives / f"IXI-{m}.tar").read_bytes() for m in ("T1", "T2")}

    def answer(call: Call) -> None:
        body = bodies.get(call.path)
        if body is None:
            call.plain(404)
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", call.asked.range or "")
        start, stop = (int(asked[1]), min(int(asked[2]) + 1, len(body))) if asked else (0, len(body))
        told = {
            "accept_ranges": "bytes",
            "etag": f'"{call.path}"',
            "content_range": f"bytes {start}-{stop - 1}/{len(body)}",
        }
        call.plain(206 if asked else 200, body[start:stop], **told)

    with serve(Host(b"", answer)) as host:
        yield host


@dataclass(frozen=True)
class Fetched:
    """A refresh of members alone, and what the server was asked for it."""

    made: Refreshed
    asked: list[Asked]


@pytest.fixture(scope="module")
def fetched(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Fetched:
    """Tests only read it, or copy its root."""
    host.asked.clear()
    made = refresh(members_of(host, tmp_path_factory.mktemp("members")))
    return Fetched(made, list(host.asked))


def members_of(host: Host, root: Path, **dataset: object) -> RefreshConfig:
    source = host.url.rpartition("/")[0]
    return config_for(root, source, **dataset).model_copy(update={"fetch": "members"})


def sent(asked: list[Asked]) -> int:
    return sum(a.sent for a in asked)


@pytest.fixture(scope="module")
def selected(published: Refreshed, archives: Path) -> pd.DataFrame:
    """The members of those who are not out by their headers."""
    by_voxels = ("", "corrupt_voxels", "empty_image")
    table = dataset.read_manifest(published.folder)
    wanted = table.loc[table["reason"].isin(by_voxels), "subject_id"]
    members = survey({m: str(archives / f"IXI-{m}.tar") for m in ("T1", "T2")})
    return members[members["subject_id"].isin(wanted)]


def test_members_alone_make_the_same_store_and_the_same_decisions(fetched: Fetched, published: Refreshed) -> None:
    made = fetched.made
    assert made.version != published.version  # whoever names a version says what stands behind it
    files, whole = (
        {n: f for n, f in dataset.read_facts(v.folder)["files"].items() if n.startswith(("slices.zarr/t", "pictures/"))}
        for v in (made, published)
    )
    assert files == whole
    table, expected = (dataset.read_manifest(v.folder) for v in (made, published))
    of_the_archive = ["flags", "t1_sha256", "t2_sha256", "t1_gzip_crc32", "t2_gzip_crc32"]
    pd.testing.assert_frame_equal(table.drop(columns=of_the_archive), expected.drop(columns=of_the_archive))
    used, expected = manifest.used(table), manifest.used(expected)
    assert used["flags"].str.split(",").map(lambda flags: UNCHECKED in flags).all()
    pd.testing.assert_frame_equal(used[of_the_archive[1:]], expected[of_the_archive[1:]])
    assert not dataset.verify(made.folder, deep=True)
    assert "MD5s were not checked" in (made.folder / "report.html").read_text()
    facts = dataset.read_facts(made.folder)
    assert facts["inputs"]["members_of_ixi"] == []
    assert {source["md5_is_published"] for source in facts["sources"].values()} == {False}


def test_a_host_named_as_insecure_is_surveyed_and_fetched_from(host: Host, tmp_path: Path) -> None:
    with serve(Host(b"", host.answer), served_as(trustme.CA(), "localhost"), "localhost") as strange:
        config = members_of(strange, tmp_path)
        with pytest.raises(DownloadError, match="certificate is not valid"):
            acquire_members(config)
        inputs = acquire_members(config.model_copy(update={"insecure_hosts": ("localhost",)}))
    assert inputs.surveyed is not None
    assert all(Path(a.location).stat().st_blocks for a in inputs.archives.values())


def test_no_more_moves_than_the_members_and_the_heads_of_the_others(
    fetched: Fetched, selected: pd.DataFrame, archives: Path
) -> None:
    every = survey({m: str(archives / f"IXI-{m}.tar") for m in ("T1", "T2")})
    heads = (len(every) + 8) * (HEAD_BYTES + 1024)  # the phantoms are small: of IXI's members they are 0.04%
    gaps = len(selected) * 1024
    assert sent(fetched.asked) <= selected["size"].sum() + gaps + heads
    assert sent(fetched.asked) < sum((archives / f"IXI-{m}.tar").stat().st_size for m in ("T1", "T2"))


def test_members_that_are_here_are_not_fetched_again_whatever_is_chosen_next(
    host: Host, fetched: Fetched, selected: pd.DataFrame, archives: Path, tmp_path: Path
) -> None:
    first = fetched.made
    shutil.copytree(first.folder.parents[2], tmp_path, dirs_exist_ok=True)
    host.asked.clear()
    again = refresh(members_of(host, tmp_path))
    assert (again.version, again.is_new) == (first.version, False)
    survey_alone = sent(host.asked)
    assert survey_alone < selected["size"].sum() / 4
    host.asked.clear()
    more = refresh(members_of(host, tmp_path, depth="any", pictures=False))
    used = set(manifest.used(dataset.read_manifest(more.folder))["subject_id"]) - set(selected["subject_id"])
    assert used
    members = survey({m: str(archives / f"IXI-{m}.tar") for m in ("T1", "T2")}).set_index("subject_id")
    assert sent(host.asked) <= survey_alone + members.loc[sorted(used), "size"].sum() * 1.5


def test_neighbours_are_asked_for_together(fetched: Fetched, selected: pd.DataFrame) -> None:
    large = [a for a in fetched.asked if a.sent > 2 * (HEAD_BYTES + 1024)]
    assert len(large) < len(selected) / 2


def test_an_archive_that_changes_meanwhile_is_one_line(host: Host, tmp_path: Path) -> None:
    def answer(call: Call) -> None:
        if call.headers.get("if-range"):
            call.plain(200, b"another file", etag='"another"')
        else:
            host.answer(call)

    with serve(Host(b"", answer)) as changing, pytest.raises(DownloadError, match="changed while its members were"):
        refresh(members_of(changing, tmp_path))
    assert not list(tmp_path.glob("datasets/*/latest.json"))


def test_members_of_a_server_that_cannot_tell_one_archive_from_another_are_refused(
    archives: Path, tmp_path: Path
) -> None:
    bodies = {f"/IXI-{m}.tar": (archives / f"IXI-{m}.tar").read_bytes() for m in ("T1", "T2")}
    sums = "".join(f"{hashlib.md5(body).hexdigest()}  {name[1:]}\n" for name, body in bodies.items())
    with serve(Host(b"", etag=None, files=bodies | {"/MD5SUMS": sums.encode()})) as host:
        with pytest.raises(DownloadError, match="gives no byte ranges that can be trusted; fetch the whole"):
            refresh(members_of(host, tmp_path))
        config = config_for(tmp_path, host.url.rpartition("/")[0])
        assert acquire_inputs(config).locations.keys() == {"T1", "T2"}


def test_a_server_without_ranges_and_a_folder_are_one_line_each(archives: Path, tmp_path: Path) -> None:
    body, said = (archives / "IXI-T1.tar").read_bytes(), "gives no byte ranges that can be trusted; fetch the whole"
    sums = b"".join(f"{'0' * 32}  IXI-{m}.tar\n".encode() for m in ("T1", "T2"))
    host = Host(body, ranges=False, files={"/MD5SUMS": sums})
    with serve(host), pytest.raises(DownloadError, match=said):
        refresh(members_of(host, tmp_path))
    config = config_for(tmp_path, archives).model_copy(update={"fetch": "members"})
    with pytest.raises(DownloadError, match="is read where it lies; leave out --fetch members"):
        refresh(config)
    with pytest.raises(ValueError, match="offline asks no server"):
        RefreshConfig(fetch="members", offline=True)
