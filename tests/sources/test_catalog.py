"""The catalogue of published files."""

from __future__ import annotations

from answers import NAME

from ixi_etl.sources import catalog


def test_official_sources_have_their_md5_and_a_mirror() -> None:
    source = catalog.official(NAME)
    assert source.md5 == "34901a0593b41dd19c1a1f746eac2d58"
    assert source.over_http
    host, *mirrors = source.urls
    assert host.startswith("https://biomedic.doc.ic.ac.uk/")
    assert mirrors
    assert all(m.startswith("https://") and m.endswith(f"/{NAME}") and "biomedic" not in m for m in mirrors)


def test_only_a_known_md5_admits_a_mirror() -> None:
    pd, mra = catalog.official("IXI-PD.tar"), catalog.official("IXI-MRA.tar")
    assert (pd.md5, len(pd.urls)) == ("88ecd9d1fa33cb4a2278183b42ffd749", 2)
    assert mra.md5 is None
    assert mra.urls == (catalog.official(NAME).urls[0].replace("T1", "MRA"),)
