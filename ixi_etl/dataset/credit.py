"""Determine the source, credit and licence of the data in a version.

The MD5 of an archive and the descriptions of its volumes decide, never a file name or URL. So the same inputs give the
same result, which can be part of the version:

====================  =========================================================================================
``ixi``               the archive has the published MD5 of IXI's archive
``ixi_unverified``    single members were fetched from IXI's own host, so the archive's MD5 is unknown; or the whole
                      archive was, but no MD5 of it is published (MRA). A mirror is not IXI's host
``simulated``         descriptions of volumes mark them as simulated or generated (`SIMULATION_MARKS`)
``own``               everything else: the user's own files; an `MD5SUMS` beside them proves only integrity
``mnist``             the published files of MNIST, the only ones that `digits` are made from
====================  =========================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ixi_etl.sources.catalog import CREDIT, LICENCE, has_md5, is_published

IXI, UNVERIFIED, SIMULATED, OWN, MNIST = "ixi", "ixi_unverified", "simulated", "own", "mnist"

UNPUBLISHED = "ixi_unpublished_md5"
"""The words for a whole archive of the kind `UNVERIFIED`."""

SOURCE_LABELS = {
    IXI: "IXI, published MD5",
    UNVERIFIED: "IXI's server, not verified",
    SIMULATED: "simulated",
    OWN: "the user's own files",
}

_CREDIT_AND_LICENCE = {
    IXI: (CREDIT, LICENCE),
    UNVERIFIED: (f"{CREDIT}; not verified: single members were fetched, so no MD5 was checked", LICENCE),
    SIMULATED: ("simulated or generated volumes, no scans of people", "none stated (no scans of people)"),
    UNPUBLISHED: (f"{CREDIT}; not verified: no MD5 of this archive is published", LICENCE),
    OWN: ("the user's own files, not the published archives of IXI", "unknown; ask the provider of the files"),
}


def describe_source(
    name: str,
    md5: str | None,
    *,
    from_ixi: bool = False,
    volumes: int = 0,
    simulated: int = 0,
    files_sha256: str = "",
) -> dict[str, Any]:
    """The entry in `dataset.json` for one source file of a version.

    Args:
        name: of the corresponding published file, for example `IXI-T1.tar`.
        md5: of the file; None if single members were fetched, or for a folder of files.
        from_ixi: whether the file, or single members of it, came from IXI's own host.
        volumes, simulated: number of readable volumes, and of those marked as simulated or generated.
        files_sha256: what stands for the MD5 of a folder of files.
    """
    published = md5 is not None and is_published(name, md5)
    unverified = from_ixi and (md5 is None or not has_md5(name))
    kind = IXI if published else SIMULATED if simulated else UNVERIFIED if unverified else OWN
    source: dict[str, Any] = {"file": name, "source": kind, "md5": md5, "md5_is_published": published}
    source |= {"files_sha256": files_sha256} if files_sha256 else {}
    return source | ({"simulated_volumes": f"{simulated} of {volumes}"} if kind == SIMULATED else {})


def credit_and_licence(sources: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """`credit` and `licence` of a version made from `sources` (label -> result of `describe_source`)."""
    groups: dict[tuple[str, str], list[str]] = {}
    for label, source in sources.items():
        whole_archive = source["source"] == UNVERIFIED and source["md5"] is not None
        credit, licence = _CREDIT_AND_LICENCE[UNPUBLISHED if whole_archive else source["source"]]
        simulated = source.get("simulated_volumes", "")  # "2 of 5"
        if simulated and len(set(simulated.split(" of "))) > 1:
            credit, licence = (
                f"the user's own files; {simulated} volumes are simulated or generated",
                _CREDIT_AND_LICENCE[OWN][1],
            )
        groups.setdefault((credit, licence), []).append(label)
    if len(groups) == 1:
        return dict(zip(("credit", "licence"), next(iter(groups)), strict=True))
    return {
        key: "; ".join(f"{' and '.join(labels)}: {words[n]}" for words, labels in groups.items())
        for n, key in enumerate(("credit", "licence"))
    }


def origin_of(sources: Mapping[str, Mapping[str, Any]]) -> str:
    """What a whole version is made from: `IXI` (verified or not), `SIMULATED`, `MNIST`, or else `OWN`.

    A mix, and an archive of which only some volumes are simulated, are `OWN`. Demographics do not count.
    """
    scans = [source for label, source in sources.items() if label != "demographics"]
    kinds = {source["source"] for source in scans}
    partly = any(len(set(source.get("simulated_volumes", "").split(" of "))) > 1 for source in scans)
    if kinds <= {IXI, UNVERIFIED}:
        return IXI
    return kinds.pop() if len(kinds) == 1 and not partly else OWN


def has_simulated(version: Mapping[str, Any]) -> bool:
    """Whether any volume is marked as simulated: by a version's `sources`, or if it has none, by its `credit`."""
    kinds = [source["source"] for source in version.get("sources", {}).values()]
    return SIMULATED in kinds or (not kinds and "simulated" in str(version.get("credit", "")))


def is_all_share_alike(sources: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether all inputs of a version, demographics included, are under `catalog.LICENCE`."""
    return all(source["source"] in (IXI, UNVERIFIED, MNIST) for source in sources.values())
