"""A table of all members of the archives from their headers alone, and the histogram of depths it gives."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd

from ixi_etl.archive import Member, index_archive
from ixi_etl.catalog import archive_name
from ixi_etl.credit import is_marked
from ixi_etl.errors import BadVolumeError
from ixi_etl.files import Progress, silent
from ixi_etl.nifti import Header, inflate_head, parse_header

PLANES = ("sagittal", "coronal", "axial")  # across R-L, A-P, S-I
# Bounds of memory, not of what a scan can be. IXI has 256 x 256 x 150 voxels; protocols of 208 x 300 x 320 (0.8 mm) and
# of 512 x 512 x 200 to 400 are common elsewhere. Peak memory of one worker, registration included, as measured: 0.9 GiB
# for a pair of 512 x 512 x 256 int16, 1.5 GiB for one of 512 x 512 x 512, which is the largest that is cut.
MAX_SIDE, MAX_VOXELS, MAX_VOXEL_BYTES = 1024, 128 << 20, 256 << 20
SHOWN = 80  # characters of a member's name in a message
HEAD_BYTES = 2048  # of each member, packed: holds a whole header whatever the compressor did

_WORD = "[A-Za-z0-9][A-Za-z0-9_.]{0,39}"  # a subject's id becomes a part of file names
NAME = re.compile(
    rf"(?P<subject_id>(?P<person>{_WORD})-(?P<site>{_WORD})-{_WORD}(-{_WORD}){{0,2}})-(?P<modality>{_WORD}?)\.nii\.gz"
)

COLUMNS = [
    "subject_id",
    "site",
    "modality",
    "member",
    "shape",
    "depth",
    "spacing_mm",
    "orientation",
    "affine",
    "space",
    "sform_code",
    "qform_code",
    "forms",
    "note",
    "dtype",
    "slope",
    "intercept",
    "readable",
    "reason",
    "problem",
    "voxel_offset",
    "simulated",
    "offset",
    "size",
]


def survey(
    archives: Mapping[str, str], progress: Progress = silent, insecure_hosts: Collection[str] = ()
) -> pd.DataFrame:
    """One row per member of `archives` (modality -> path or URL), in archive order; see `COLUMNS`.

    shape (voxels I, J, K as stored), spacing_mm and affine (4 x 4, voxel to RAS mm) are JSON; depth is shape[2].
    They are those of the form in `space`, the code of `nifti.SPACES`; `forms` has all that are set, as JSON: code ->
    affine, spacing_mm, orientation, note. sform_code and qform_code are as stored; `note` says what is unusual.
    A member that is no volume of a subject has an empty subject_id. `reason` and `problem` say what is wrong with a
    header, as a manifest reason and in words. `simulated`: its description says that it is no scan.
    offset, size: where the member's bytes lie in its archive. Of
    `insecure_hosts` the TLS certificates are not looked at.

    Raises:
        ArchiveError: an archive is not there, or is not a tar.
    """

    def members_of(modality: str) -> list[Member]:
        told = -1

        def on_member(passed: float) -> None:
            nonlocal told
            if int(100 * passed) > told:
                told = int(100 * passed)
                progress(f"survey {modality}", told, 100, "%")

        return index_archive(archives[modality], HEAD_BYTES, on_member, insecure_hosts)

    with ThreadPoolExecutor(max(len(archives), 1)) as pool:  # for archives elsewhere, each of which waits for its own
        found = dict(zip(archives, pool.map(members_of, archives), strict=True))
    rows = [_row(modality, member) for modality, members in found.items() for member in members]
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.astype({"depth": "Int64", "readable": bool, "simulated": bool})


def _row(modality: str, member: Member) -> dict[str, object]:
    row: dict[str, object] = dict.fromkeys(COLUMNS, "") | {
        "modality": modality,
        "member": member.name,
        "offset": member.offset,
        "size": member.size,
        "voxel_offset": 0,
        "space": 0,
        "sform_code": 0,
        "qform_code": 0,
        "simulated": False,
        "slope": 1.0,
        "intercept": 0.0,
        "readable": False,
        "depth": None,
    }
    name = NAME.fullmatch(member.name.rpartition("/")[2])
    if name is None or name["modality"] != modality:
        return row | {"problem": f"not a volume: the name is not SUBJECT-SITE-NUMBER-{modality}.nii.gz"}
    row |= {"subject_id": name["subject_id"], "site": name["site"]}
    if member.problem:
        return row | {"reason": "unreadable", "problem": member.problem}
    try:
        head = inflate_head(member.head)
    except BadVolumeError as error:
        return row | {"reason": error.reason, "problem": error.detail}
    header = parse_header(head, member.size)
    if not header.reason and _is_too_large(header):
        header.reason = "grid_not_modal"
        shape = " x ".join(map(str, header.shape))
        most = f"{MAX_SIDE} a side, {MAX_VOXELS >> 20} Mi in all and {MAX_VOXEL_BYTES >> 20} MiB are the most"
        header.problem = f"{shape} voxels in {header.voxel_bytes} bytes would take too much memory to cut: {most}"
    return row | {
        "shape": json.dumps(header.shape) if header.shape else "",
        "depth": header.shape[2] if len(header.shape) > 2 else None,
        "spacing_mm": json.dumps(header.spacing_mm) if header.spacing_mm else "",
        "orientation": header.orientation,
        "affine": "" if header.affine is None else json.dumps(header.affine.tolist()),
        "space": header.space,
        "sform_code": header.sform_code,
        "qform_code": header.qform_code,
        "forms": json.dumps({code: form.to_record() for code, form in header.forms.items()}) if header.forms else "",
        "note": header.note,
        "dtype": header.dtype,
        "slope": header.slope,
        "intercept": header.intercept,
        "voxel_offset": header.voxel_offset,
        "simulated": is_marked(header.description),
        "readable": header.reason != "unreadable",
        "reason": header.reason,
        "problem": header.problem,
    }


def passed_over(table: pd.DataFrame, modalities: Iterable[str]) -> list[str]:
    """A sentence for each archive that has members which are not volumes of a subject by their names, or has none."""
    said = []
    for modality in modalities:
        members = table.loc[table["modality"] == modality]
        others = members.loc[members["subject_id"] == "", "member"]
        if members.empty:
            said.append(f"{archive_name(modality)} has no members")
        elif len(others):
            first = others.iloc[0] if len(others.iloc[0]) <= SHOWN else f"...{others.iloc[0][-SHOWN:]}"
            said.append(
                f"{archive_name(modality)}: {len(others)} of {len(members)} members are passed over, for example "
                f"{first!r}; a volume is called SUBJECT-SITE-NUMBER-{modality}.nii.gz, as "
                f"IXI002-Guys-0828-{modality}.nii.gz"
            )
    return said


def _is_too_large(header: Header) -> bool:
    voxels = math.prod(header.shape)
    return max(header.shape) > MAX_SIDE or voxels > MAX_VOXELS or header.voxel_bytes > MAX_VOXEL_BYTES


def depth_histogram(table: pd.DataFrame) -> pd.DataFrame:
    """Counts of 3-D volumes: one row per (modality, depth), columns as of `count_by_site`."""
    return count_by_site(_volumes(table), ["modality", "depth"])


def count_by_site(rows: pd.DataFrame, labels: list[str]) -> pd.DataFrame:
    """How many `rows` there are of each site: the index holds `labels`, the columns are as of `by_site`."""
    counts = rows.groupby([*labels, "site"]).size().unstack("site", fill_value=0)
    return by_site(counts, counts.sum(axis=1))


def by_site(counts: pd.DataFrame, total: pd.Series) -> pd.DataFrame:
    """A table with two levels of columns: `sites`, with a column per site, and `all`.

    A site may have any name, as it comes from the names of members: beside other columns, one named `all` or `depth`
    would be taken for those.
    """
    columns = [("sites", str(site)) for site in counts.columns] + [("all", "")]
    values = np.column_stack([counts.to_numpy(int), total.to_numpy(int)])
    return pd.DataFrame(values, counts.index, pd.MultiIndex.from_tuples(columns))


def sites_of(table: pd.DataFrame) -> list[str]:
    """The sites of a table of `by_site`."""
    return [str(column[1]) for column in table.columns if column[0] == "sites"]


def site_records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table of `by_site` for JSON: its index by name, then `all` and `sites`."""
    labels = table.index.to_frame(index=False).to_dict("records")
    sites = [dict(zip(sites_of(table), counts, strict=True)) for counts in table.to_numpy(int)[:, :-1].tolist()]
    rows = zip(labels, table["all"].tolist(), sites, strict=True)
    return [{**{str(k): v for k, v in label.items()}, "all": total, "sites": of} for label, total, of in rows]


def table_of_sites(records: Iterable[Mapping[str, Any]], labels: list[str]) -> pd.DataFrame:
    """The table that `site_records` was made of."""
    rows = list(records)
    index = pd.MultiIndex.from_tuples([tuple(row[label] for label in labels) for row in rows], names=labels)
    counts = pd.DataFrame([row["sites"] for row in rows], index).fillna(0)
    return by_site(counts, pd.Series([row["all"] for row in rows]))


def flat_row(labels: Mapping[str, Any], sites: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """A row to show: labels, a column per site, and what comes `after`.

    A site that bears the name of another column is shown as `site NAME`, which is no other site: their names have no
    spaces.
    """
    taken = {*labels, *after}
    return {**labels, **{f"site {site}" if site in taken else site: n for site, n in sites.items()}, **after}


def flat(table: pd.DataFrame) -> pd.DataFrame:
    """A table of `by_site` to show, its index as the first columns."""
    names = [str(name) for name in table.index.names]
    rows = [flat_row({n: row[n] for n in names}, row["sites"], {"all": row["all"]}) for row in site_records(table)]
    return pd.DataFrame(rows, columns=list(flat_row(dict.fromkeys(names), dict.fromkeys(sites_of(table)), {"all": 0})))


def modal_depths(table: pd.DataFrame) -> dict[str, int]:
    """Modality -> the commonest depth of its 3-D volumes; of several equally common ones the largest."""
    volumes = _volumes(table)
    return {str(m): int(depths.mode().max()) for m, depths in volumes.groupby("modality")["depth"]}


def modal_planes(table: pd.DataFrame) -> dict[str, str]:
    """Modality -> the plane of most of its slices as stored: sagittal, coronal or axial, by the last axis."""
    known = table[table["orientation"].str.len() == 3]
    planes = known["orientation"].str[2].map(dict(zip("RLAPSI", [p for p in PLANES for _ in "+-"], strict=True)))
    return {str(m): str(of.mode().iloc[0]) for m, of in planes.groupby(known["modality"])}


def _volumes(table: pd.DataFrame) -> pd.DataFrame:
    is_volume = (table["subject_id"] != "") & table["readable"] & (table["reason"] != "not_3d")
    return table[is_volume & table["depth"].notna()]


def draw_histogram(histogram: pd.DataFrame, modal: Mapping[str, int], path: Path | BinaryIO) -> None:
    """Draw `depth_histogram`, a panel per modality, stacked by site, `modal_depths` marked, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sites = sites_of(histogram)
    height = max(3.8, 1.5 + 0.22 * len(sites))  # the legend has a line for each
    figure = Figure(figsize=(5.2 * max(len(modal), 1), height), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (modality, mode) in zip(
        figure.subplots(1, max(len(modal), 1), squeeze=False)[0], modal.items(), strict=False
    ):
        counts = histogram.loc[modality]["sites"]
        ticks = range(len(counts))
        bottom = [0] * len(counts)
        for site in sites:
            axes.bar(ticks, counts[site], bottom=bottom, label=site, width=0.7)
            bottom = [b + n for b, n in zip(bottom, counts[site], strict=True)]
        for tick, total in zip(ticks, bottom, strict=True):
            axes.annotate(str(total), (tick, total), ha="center", va="bottom")
        labels = [f"{depth}\n(modal)" if depth == mode else str(depth) for depth in counts.index]
        axes.set_xticks(ticks, labels)
        axes.set(title=f"{modality}: {sum(bottom)} volumes", xlabel="depth (slices as stored)", ylabel="volumes")
        axes.set_ylim(0, 1.15 * max(bottom))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(title="site", frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})
