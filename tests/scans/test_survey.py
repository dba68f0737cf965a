"""The survey agrees with nibabel on every member; errors are one line; the modal depth is the mode."""

from __future__ import annotations

import base64
import gzip
import json
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import trustme
from answers import close, first, half_then, redirect_to_self, status
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples
from servers import Answer, Call, Host, serve, served_as

from ixi_etl.core.http_options import HttpOptions
from ixi_etl.errors import ArchiveError
from ixi_etl.scans.names import NAME
from ixi_etl.scans.survey import (
    COLUMNS,
    HEAD_BYTES,
    depth_histogram,
    describe_skipped_members,
    modal_depths,
    modal_planes,
    survey,
)
from ixi_etl.scans.tar import read_member
from ixi_etl.testing.phantom import grid_affine, pack_nifti, write_tar


@pytest.fixture(scope="module")
def table(archives: Path) -> pd.DataFrame:
    return survey({m: str(archives / f"IXI-{m}.tar") for m in ("T1", "T2")})


def test_the_survey_agrees_with_nibabel(archives: Path, table: pd.DataFrame) -> None:
    valid = table[(table["reason"] == "") & (table["subject_id"] != "")]
    assert len(valid) >= 20
    for row in valid.itertuples():
        packed = read_member(str(archives / f"IXI-{row.modality}.tar"), row.offset, row.size)
        raw = gzip.GzipFile(fileobj=__import__("io").BytesIO(packed)).read(352)
        header = nib.Nifti1Header(raw[:348])
        assert tuple(json.loads(row.shape)) == header.get_data_shape()
        assert row.depth == header.get_data_shape()[2]
        assert (
            row.orientation
            == "".join(nib.aff2axcodes(header.get_best_affine()))
            == {"T1": "PSR", "T2": "LAS"}[row.modality]
        )
        np.testing.assert_allclose(json.loads(row.affine), header.get_best_affine())
        np.testing.assert_allclose(json.loads(row.spacing_mm), header.get_zooms(), rtol=1e-6)
        assert (row.slope, row.intercept) == (float(header["scl_slope"]), float(header["scl_inter"]))
        assert row.subject_id == row.member.rsplit("-", 1)[0]
        assert row.site == row.member.split("-")[1]


def assert_same_but_location(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    assert (found["location"] != expected["location"]).all()
    pd.testing.assert_frame_equal(found.drop(columns="location"), expected.drop(columns="location"))


@pytest.mark.parametrize(
    ("shape", "dtype", "fits"),
    [
        ((208, 300, 320), "<i2", True),
        ((512, 512, 256), "<i2", True),
        ((1025, 4, 4), "<i2", False),
        ((4, 4, 1025), "<i2", False),
        ((512, 512, 513), "|u1", False),
        ((512, 512, 129), "<f8", False),
    ],
)
def test_a_volume_too_large_to_cut_is_rejected_with_the_limits(
    shape: tuple[int, int, int], dtype: str, fits: bool, tmp_path: Path
) -> None:
    head = bytearray(
        gzip.decompress(pack_nifti(np.zeros((2, 2, 2), dtype), grid_affine(shape, (1, 1, 1), "LAS")))[:352]
    )
    head[42:48] = np.array(shape, "<i2").tobytes()
    member = gzip.compress(bytes(head)) + bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize // 1000)
    write_tar(tmp_path / "IXI-T1.tar", {"IXI001-Guys-1-T1.nii.gz": member})
    (row,) = survey({"T1": str(tmp_path / "IXI-T1.tar")}).to_dict("records")
    assert (row["reason"], row["readable"]) == ("" if fits else "grid_not_modal", True)
    assert fits or "the maximum is 1024 voxels a side, 128 Mi voxels and 256 MiB" in row["problem"]


def test_every_member_has_a_row_and_every_fault_has_a_reason(table: pd.DataFrame) -> None:
    assert list(table.columns) == COLUMNS
    reasons = table.set_index("member")["reason"]
    assert reasons["IXI905-Guys-9050-T1.nii.gz"] == "unreadable"
    assert reasons["IXI907-Guys-9070-T1.nii.gz"] == "not_3d"
    assert reasons["IXI908-Guys-9080-T1.nii.gz"] == "bad_affine"
    assert reasons["IXI909-Guys-9090-T1.nii.gz"] == "unsupported_dtype"
    readme = table.set_index("member").loc["README.txt"]
    assert (readme["subject_id"], readme["reason"]) == ("", "")
    assert "not a volume" in readme["problem"]


def test_a_remote_survey_requests_each_header_once(archives: Path) -> None:
    tar = archives / "IXI-T1.tar"
    local = survey({"T1": str(tar)})
    with serve(Host(tar.read_bytes())) as host:
        assert_same_but_location(survey({"T1": host.url}), local)
    requests = [r for r in host.requests if r.method == "GET"]
    assert len(requests) <= len(local) + 3  # one for the start, two for the end
    assert sum(r.sent for r in requests) <= len(requests) * (HEAD_BYTES + 2 * 512)


@pytest.mark.parametrize(
    "fault",
    [status(500), status(403), Call.reset, half_then(close), redirect_to_self, status(302, location="http://a..b/")],
    ids=["500", "403", "reset", "truncated", "redirect loop", "redirect to nowhere"],
)
@pytest.mark.parametrize("after", [0, 6])
def test_a_failing_server_is_a_one_line_error_of_the_survey(archives: Path, fault: Answer, after: int) -> None:
    with serve(Host((archives / "IXI-T1.tar").read_bytes(), first(after, Call.correct, fault))) as host:
        with pytest.raises(ArchiveError) as caught:
            survey({"T1": host.url})
        assert host.url in str(caught.value)
        assert str(caught.value).isprintable()


def test_only_insecure_hosts_skip_the_certificate_check(archives: Path) -> None:
    tar, certified = archives / "IXI-T1.tar", served_as(trustme.CA(), "localhost", "127.0.0.1")
    with serve(Host(tar.read_bytes()), certified, "localhost") as named, serve(Host(b""), certified) as numbered:
        found = survey({"T1": named.url}, http=HttpOptions(insecure_hosts=("localhost",)))
        assert_same_but_location(found, survey({"T1": str(tar)}))
        for url, insecure_hosts in ((numbered.url, ("localhost",)), (named.url, ())):
            with pytest.raises(ArchiveError, match="certificate is not valid \\(--insecure-host") as caught:
                survey({"T1": url}, http=HttpOptions(insecure_hosts=insecure_hosts))
            assert url in str(caught.value)
            assert "\n" not in str(caught.value)
    assert numbered.requests == []


def test_the_survey_refuses_a_redirect_from_https_to_http(archives: Path) -> None:
    certified = served_as(trustme.CA(), "localhost")
    with (
        serve(Host((archives / "IXI-T1.tar").read_bytes())) as plain,
        serve(Host(b"", status(302, location=plain.url)), certified, "localhost") as host,
    ):
        with pytest.raises(ArchiveError, match=f"{host.url} redirects from https to http, which"):
            survey({"T1": host.url}, http=HttpOptions(insecure_hosts=("localhost",)))
        assert {r.method for r in plain.requests} <= {"HEAD"}


def test_a_netrc_password_is_sent_only_to_its_host(
    archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = archives / "IXI-T1.tar"
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    authorizations = set()

    def answer(call: Call) -> None:
        authorizations.add(call.headers.get("authorization"))
        call.correct() if call.headers.get("authorization") else call.plain(401)

    with serve(Host(tar.read_bytes(), answer)) as host, serve(Host(b"", answer), name="localhost") as elsewhere:
        assert_same_but_location(survey({"T1": host.url}), survey({"T1": str(tar)}))
        assert authorizations == {f"Basic {base64.b64encode(b'me:secret').decode()}"}
        authorizations.clear()
        with pytest.raises(ArchiveError, match="not there, or cannot be reached"):
            survey({"T1": elsewhere.url})
        assert authorizations == {None}


@settings(max_examples=examples(40))
@given(st.dictionaries(st.sampled_from(["T1", "T2"]), st.lists(st.integers(1, 6), min_size=1), min_size=1))
def test_modal_depth_is_the_mode_or_the_largest_of_several_modes(depths: dict[str, list[int]]) -> None:
    rows = [
        dict.fromkeys(COLUMNS, "")
        | {"subject_id": f"IXI{n}-A-1", "site": "A", "modality": m, "depth": d, "readable": True}
        for m, found in depths.items()
        for n, d in enumerate(found)
    ]
    table = pd.DataFrame(rows, columns=COLUMNS)
    for modality, found in depths.items():
        counts = Counter(found)
        best = max(counts.values())
        assert modal_depths(table)[modality] == max(d for d, n in counts.items() if n == best)
        histogram = depth_histogram(table).loc[modality]["all"]
        assert histogram.to_dict() == dict(sorted(counts.items()))


def test_histogram_counts_each_site_separately(table: pd.DataFrame) -> None:
    histogram = depth_histogram(table)
    assert histogram["sites"].loc[("T1", 37), "IOP"] == 1
    assert (histogram["sites"].sum(axis=1) == histogram["all"]).all()


def test_a_volume_of_the_other_modality_is_not_a_subject(tmp_path: Path) -> None:
    volume = pack_nifti(np.zeros((3, 4, 5), "<i2"), grid_affine((5, 4, 3), (1, 1, 1), "RAS"))
    write_tar(tmp_path / "IXI-T1.tar", {"IXI002-Guys-0828-T2.nii.gz": volume, "sub/IXI003-HH-0001-T1.nii.gz": volume})
    table = survey({"T1": str(tmp_path / "IXI-T1.tar")})
    assert table["subject_id"].tolist() == ["", "IXI003-HH-0001"]


@pytest.mark.parametrize(
    "name",
    [
        "._IXI002-Guys-0828-T1.nii.gz",  # macOS adds one to each file
        "IXI002-T1.nii.gz",
        "IXI002-Guys-0828-T1.nii",
        "IXI002-Züri-0828-T1.nii.gz",
        "IXI002-Guys-..-T1.nii.gz",
        f"IXI002-Guys-{'8' * 300}-T1.nii.gz",
    ],
)
def test_members_without_a_subject_name_are_not_subjects(name: str) -> None:
    assert NAME.fullmatch(name) is None


def test_the_subject_id_is_everything_before_the_last_dash() -> None:
    found = NAME.fullmatch("IXI002-Guys-0828-T1.nii.gz")
    assert found is not None
    assert found.groupdict() == {"subject_id": "IXI002-Guys-0828", "person": "IXI002", "site": "Guys", "modality": "T1"}


def test_members_of_a_tar_are_named_by_templates(tmp_path: Path) -> None:
    volume = pack_nifti(np.zeros((3, 4, 5), "<i2"), grid_affine((5, 4, 3), (1, 1, 1), "RAS"))
    names = ("./HH/7/t1.nii.gz", "HH/7/t1.nii", "HH/7/t2.nii.gz", "IXI002-Guys-0828-T1.nii.gz")
    write_tar(
        tmp_path / "IXI-T1.tar", {name: volume if name.endswith("gz") else gzip.decompress(volume) for name in names}
    )
    patterns = ("{site}/{subject}/{modality}.nii.gz", "T1={site}/{subject}-2/*.nii", "T1={site}/{subject}/t1.nii")
    table = survey({"T1": str(tmp_path / "IXI-T1.tar")}, patterns=patterns).set_index("member")
    assert table.loc[list(names), "subject_id"].tolist() == ["7-HH", "7-HH", "", ""]
    assert table.loc[list(names), "depth"].tolist()[:2] == [3, 3]  # gzipped and plain
    (sentence,) = describe_skipped_members(table.reset_index(), ["T1"], patterns)
    assert "skipped 2 of 4 members" in sentence
    assert all(pattern in sentence for pattern in patterns)


def test_the_modal_plane_is_the_most_common_one(table: pd.DataFrame) -> None:
    assert modal_planes(table) == {"T1": "sagittal", "T2": "axial"}
