"""Whose data a version is made of, and what may be done with it.

What decides is the MD5 of an archive and what its volumes say of themselves, never its name or its address. So the
same inputs give the same answer, and the answer can be a part of the version:

====================  =========================================================================================
``ixi``               the archive's MD5 is the one that IXI's archive is known by
``ixi_unverified``    members fetched alone from a host of IXI: nobody can compare the archive's MD5
``simulated``         volumes bear the mark of a simulation, or of a generator (`MARKS` begins their description)
``own``               all else: the user's own files; an `MD5SUMS` beside them finds damage, and says nothing of IXI
====================  =========================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ixi_etl.catalog import CREDIT, LICENCE, is_published

IXI, UNVERIFIED, SIMULATED, OWN = "ixi", "ixi_unverified", "simulated", "own"

WHOSE = {
    IXI: "IXI, MD5 as published",
    UNVERIFIED: "IXI's host, not verified",
    SIMULATED: "simulated",
    OWN: "own source",
}

MARKS = ("SIMULATED", "SYNTHETIC")
"""How the NIfTI field `descrip` begins of what `phantom` simulates, and of what `synthesize` generates."""

_WORDS = {
    IXI: (CREDIT, LICENCE),
    UNVERIFIED: (f"{CREDIT}; not verified: members were fetched alone, so no MD5 was checked", LICENCE),
    SIMULATED: ("simulated or generated volumes, no scans of people", "none stated (no scans)"),
    OWN: ("own source, not the published archives of IXI", "unknown; ask whoever the files came from"),
}


def is_marked(description: str) -> bool:
    """Whether a volume's description says that it is no scan."""
    return description.startswith(MARKS)


def source_of(
    name: str, md5: str | None, *, from_ixi: bool = False, volumes: int = 0, simulated: int = 0
) -> dict[str, Any]:
    """What `dataset.json` says of one file that a version is made of.

    Args:
        name: of the published file that it stands for, for example `IXI-T1.tar`.
        md5: None where members were fetched alone.
        from_ixi: whether those came from a host of IXI.
        volumes, simulated: how many readable volumes it has, and how many of them bear a mark.
    """
    published = md5 is not None and is_published(name, md5)
    kind = IXI if published else SIMULATED if simulated else UNVERIFIED if md5 is None and from_ixi else OWN
    found: dict[str, Any] = {"file": name, "source": kind, "md5": md5, "md5_is_published": published}
    return found | ({"simulated_volumes": f"{simulated} of {volumes}"} if kind == SIMULATED else {})


def credit_and_licence(sources: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """`credit` and `licence` of what is made of `sources` (what it is -> `source_of`), a sentence part each."""
    groups: dict[tuple[str, str], list[str]] = {}
    for what, source in sources.items():
        credit, licence = _WORDS[source["source"]]
        some = source.get("simulated_volumes", "")
        if some and len(set(some.split(" of "))) > 1:
            credit, licence = f"own source, {some} volumes simulated or generated", _WORDS[OWN][1]
        groups.setdefault((credit, licence), []).append(what)
    if len(groups) == 1:
        return dict(zip(("credit", "licence"), next(iter(groups)), strict=True))
    return {
        key: "; ".join(f"{' and '.join(of)}: {words[n]}" for words, of in groups.items())
        for n, key in enumerate(("credit", "licence"))
    }
