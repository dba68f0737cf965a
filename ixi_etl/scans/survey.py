"""Survey archives: a table of all members, read from their headers alone, and the histogram of depths."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pandas as pd

from ixi_etl.core.http_options import DEFAULT_HTTP, HttpOptions
from ixi_etl.core.progress import Progress, no_progress
from ixi_etl.core.storage import is_url
from ixi_etl.core.text import quantity
from ixi_etl.errors import BadVolumeError
from ixi_etl.modalities import archive_name
from ixi_etl.scans.gunzip import inflate_head
from ixi_etl.scans.names import Namer, VolumeName, ixi_name, namer
from ixi_etl.scans.nifti import Header, parse_header, read_head
from ixi_etl.scans.site_tables import count_by_site
from ixi_etl.scans.tar import MAX_MEMBER_BYTES, Member, index_archive

SIMULATION_MARKS = ("SIMULATED", "SYNTHETIC")
"""Beginnings of the NIfTI field `descrip` of volumes made by `testing.phantom` and by `synthesize`."""


def is_simulated(description: str) -> bool:
    """Whether a volume's description marks it as simulated or generated."""
    return description.startswith(SIMULATION_MARKS)


PLANES = ("sagittal", "coronal", "axial")  # perpendicular to R-L, A-P, S-I
# Memory bounds, far above real scans. IXI has 256 x 256 x 150 voxels; protocols of 208 x 300 x 320 (0.8 mm) and of
# 512 x 512 x 200 to 400 are common elsewhere. Measured peak memory of one worker, registration included: 0.9 GiB for a
# pair of 512 x 512 x 256 int16, 1.5 GiB for a pair of 512 x 512 x 512, the largest accepted.
MAX_SIDE, MAX_VOXELS, MAX_VOXEL_BYTES = 1024, 128 << 20, 256 << 20
MAX_NAME_SHOWN = 80  # characters of a member's name in a message
HEAD_BYTES = 2048  # compressed, of each member: contains the whole header, whatever the compressor

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
    "location",
    "offset",
    "size",
]


@dataclass(frozen=True)
class VolumeFile:
    """A NIfTI file in a folder of the user.

    Attributes:
        location: its path.
        name: relative to the folder.
        volume: what the name says.
    """

    location: str
    name: str
    volume: VolumeName


def survey(
    archives: Mapping[str, str | Sequence[VolumeFile]],
    progress: Progress = no_progress,
    http: HttpOptions = DEFAULT_HTTP,
    patterns: Sequence[str] = (),
) -> pd.DataFrame:
    """Read one row per member of `archives`, in archive order. A file of a folder counts as a member.

    The columns (`COLUMNS`) are:

    - subject_id, site: from the member's name; empty if it is not a volume of a subject.
    - shape, spacing_mm, affine: JSON. Voxels along I, J, K as stored, mm, and 4 x 4 (voxel to RAS mm); depth is
      shape[2]. Spacing, orientation and affine are those of the form in `space`, a code of `affines.SPACES`.
    - sform_code, qform_code: as stored.
    - forms: all forms that are set, as JSON: code -> affine, spacing_mm, orientation, note.
    - note: what is unusual about the forms.
    - reason, problem: what is wrong with the header, as a manifest reason and in words.
    - simulated: whether the description marks the volume as simulated or generated.
    - location, offset, size: the archive (or the file), and the position of the member's bytes in it.

    Args:
        archives: modality -> path or URL of a tar, or files of a folder.
        http: only its `insecure_hosts` and `timeout_s` apply.
        patterns: templates for the names of members of tars; without any they are IXI's.

    Raises:
        ArchiveError: an archive does not exist, or is not a tar.
        ConfigError: a template is invalid.
    """
    read_name = namer(patterns, ixi_name)
    expected = " or ".join(patterns)

    def rows_of(modality: str) -> list[dict[str, object]]:
        archive, reported = archives[modality], -1

        def on_member(fraction: float) -> None:
            nonlocal reported
            if int(100 * fraction) > reported:
                reported = int(100 * fraction)
                progress(f"survey {modality}", reported, 100, "%")

        if not isinstance(archive, str):
            rows = []
            for done, file in enumerate(archive, 1):
                rows.append(_row(modality, _read_start(file), file.volume) | {"location": file.location})
                on_member(done / len(archive))
            return rows
        members = index_archive(archive, HEAD_BYTES, on_member, http)
        wanted = expected or f"SUBJECT-SITE-NUMBER-{modality}.nii.gz"
        return [_member_row(modality, member, read_name, wanted) | {"location": archive} for member in members]

    is_remote = any(isinstance(archive, str) and is_url(archive) for archive in archives.values())
    # Waiting for servers is concurrent. Parsing headers is not: two threads take longer for it than one.
    with ThreadPoolExecutor(len(archives) if is_remote else 1) as pool:
        rows = [row for of_one in pool.map(rows_of, archives) for row in of_one]
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.astype({"depth": "Int64", "readable": bool, "simulated": bool})


def _read_start(file: VolumeFile) -> Member:
    """A file as a member: its size and first bytes."""
    try:
        if not stat.S_ISREG(os.stat(file.location).st_mode):  # reading a pipe or a device may never end
            return Member(file.name, 0, 0, "the file is not a regular file")
        with open(file.location, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            head = opened.read(HEAD_BYTES)
    except OSError as error:
        return Member(file.name, 0, 0, f"the file cannot be read ({error.strerror})")
    too_large = size > MAX_MEMBER_BYTES
    return Member(
        file.name, 0, size, f"the file has {size} bytes; the maximum is {MAX_MEMBER_BYTES}" if too_large else "", head
    )


def _member_row(modality: str, member: Member, read_name: Namer, expected: str) -> dict[str, object]:
    volume = read_name(member.name)
    return _row(
        modality,
        member,
        volume if volume and volume.modality == modality else None,
        f"not a volume: the name is not {expected}",
    )


def _row(modality: str, member: Member, volume: VolumeName | None, other_name: str = "") -> dict[str, object]:
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
    if volume is None:
        return row | {"problem": other_name}
    row |= {"subject_id": volume.subject_id, "site": volume.site}
    if member.problem:
        return row | {"reason": "unreadable", "problem": member.problem}
    try:
        head = inflate_head(member.head) if member.name.lower().endswith(".gz") else read_head(member.head)
    except BadVolumeError as error:
        return row | {"reason": error.reason, "problem": error.detail}
    header = parse_header(head, member.size)
    if not header.reason and _exceeds_limits(header):
        header.reason = "grid_not_modal"
        shape = " x ".join(map(str, header.shape))
        limits = f"{MAX_SIDE} voxels a side, {MAX_VOXELS >> 20} Mi voxels and {MAX_VOXEL_BYTES >> 20} MiB"
        header.problem = f"{shape} voxels of {header.voxel_bytes} bytes need too much memory; the maximum is {limits}"
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
        "simulated": is_simulated(header.description),
        "readable": header.reason != "unreadable",
        "reason": header.reason,
        "problem": header.problem,
    }


def describe_skipped_members(table: pd.DataFrame, modalities: Iterable[str], patterns: Sequence[str] = ()) -> list[str]:
    """A sentence for each archive that is empty or has members whose names are not those of volumes.

    Args:
        table: of `survey`, made with the same `patterns`.
    """
    sentences = []
    for modality in modalities:
        members = table.loc[table["modality"] == modality]
        others = members.loc[members["subject_id"] == "", "member"]
        if members.empty:
            sentences.append(f"{archive_name(modality)} has no members")
        elif len(others):
            first = (
                others.iloc[0] if len(others.iloc[0]) <= MAX_NAME_SHOWN else f"...{others.iloc[0][-MAX_NAME_SHOWN:]}"
            )
            expected = f"SUBJECT-SITE-NUMBER-{modality}.nii.gz, such as IXI002-Guys-0828-{modality}.nii.gz"
            sentences.append(
                f"{archive_name(modality)}: skipped {len(others)} of {quantity(len(members), 'member')}, for example "
                f"{first!r}; a volume is called {' or '.join(patterns) or expected}"
            )
    return sentences


def _exceeds_limits(header: Header) -> bool:
    voxels = math.prod(header.shape)
    return max(header.shape) > MAX_SIDE or voxels > MAX_VOXELS or header.voxel_bytes > MAX_VOXEL_BYTES


def depth_histogram(table: pd.DataFrame) -> pd.DataFrame:
    """Number of 3-D volumes: one row per (modality, depth), columns as in `count_by_site`."""
    return count_by_site(_volumes(table), ["modality", "depth"])


def modal_depths(table: pd.DataFrame) -> dict[str, int]:
    """Modality -> the mode of the depths of its 3-D volumes; the largest if several are equally common."""
    volumes = _volumes(table)
    return {str(m): int(depths.mode().max()) for m, depths in volumes.groupby("modality")["depth"]}


def modal_planes(table: pd.DataFrame) -> dict[str, str]:
    """Modality -> the most common plane of its stored slices (sagittal, coronal or axial), given by the last axis."""
    known = table[table["orientation"].str.len() == 3]
    planes = known["orientation"].str[2].map(dict(zip("RLAPSI", [p for p in PLANES for _ in "+-"], strict=True)))
    return {str(m): str(values.mode().iloc[0]) for m, values in planes.groupby(known["modality"])}


def _volumes(table: pd.DataFrame) -> pd.DataFrame:
    is_volume = (table["subject_id"] != "") & table["readable"] & (table["reason"] != "not_3d")
    return table[is_volume & table["depth"].notna()]
