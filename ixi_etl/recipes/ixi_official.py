"""Compare a survey of the official archives with what is published about IXI.

Nobody on this project has read the official archives. The published facts come from public readers of IXI and from
issue threads (docs/dataset.md names the sources), so each of them may be wrong. The refresh assumes none of them; it
measures.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ixi_etl.config import RefreshConfig
from ixi_etl.core.progress import Progress, no_progress
from ixi_etl.core.storage import expand_home
from ixi_etl.modalities import DEFAULT_MODALITIES, archive_name
from ixi_etl.recipes.ixi_inputs import DEMOGRAPHICS, OFFICIAL
from ixi_etl.scans.demographics import Demographics, canonical_person, read_demographics
from ixi_etl.scans.survey import survey
from ixi_etl.sources.cache import recorded_md5
from ixi_etl.sources.catalog import is_published

MEMBERS = {"T1": 581, "T2": 578}
PAIRS = 577
ONE_MODALITY = {"T1": {"IXI116", "IXI182", "IXI309", "IXI500"}, "T2": {"IXI580"}}
SITES = {"Guys", "HH", "IOP"}
DEPTHS_T1 = {150: 503, 146: 74, 140: 2, 130: 2}
DEPTHS_T2 = {"IOP": {136}, "HH": {112, 116, 120, 130}}
MODAL_DEPTH_T2 = 130
FEW_SLICES = ("IXI014", (28, 29), 4.98)  # person, slices of the T2, mm between them
ORIENTATION = {"T1": "PSR", "T2": "LAS"}
IN_PLANE = "256 x 256"
SPACING_T1_MM = {(0.9375, 0.9375, 1.2): 576, (0.9766, 0.9766, 1.2): 5}
SPACING_T2_MM = ((0.93, 0.95), (1.20, 1.28))  # ranges in the plane and between slices
TILT_DEG = (4.0, 10.0)
DTYPE, FORM_CODE = "int16", 1
DEMOGRAPHICS_ROWS, REPEATED_IDS, ROWS_OF_REPEATED_IDS, T1_WITHOUT_ROW = 619, 26, 52, 15

MAX_SHOWN = 10  # items of a set
TOLERANCE_MM = 5e-4  # published spacings have four digits


@dataclass(frozen=True)
class Finding:
    """A published fact beside what was found.

    Attributes:
        fact: what is compared, in a few words.
        published, found: both values, as text.
        agrees: whether they are the same; None if it could not be compared.
        matters: what depends on the fact.
    """

    fact: str
    published: str
    found: str
    agrees: bool | None
    matters: str


def check_archives(
    config: RefreshConfig, archives: Mapping[str, str], progress: Progress = no_progress
) -> list[Finding]:
    """Survey `archives` (modality -> path or URL) and compare them with what is published of IXI.

    The MD5s are those that an earlier refresh computed; nothing is downloaded. `IXI.xls` is that of `--demographics`,
    or the one that an earlier refresh fetched.

    Raises:
        ArchiveError, DatasetError: an archive or `IXI.xls` cannot be read.
    """
    folder = config.data_root.archives
    recorded = {archive_name(m): recorded_md5(folder, archive_name(m), location) for m, location in archives.items()}
    md5s = {name: None if md5 is None else is_published(name, md5) for name, md5 in recorded.items()}
    fetched = folder / DEMOGRAPHICS
    given = config.demographics not in (None, OFFICIAL)
    path = expand_home(str(config.demographics)) if given else fetched if fetched.exists() else None
    people = read_demographics(path) if path else None
    return compare_with_published(survey(archives, progress, config.http), md5s, people)


def differences_message(findings: Iterable[Finding]) -> str | None:
    """One line that names the facts that differ; None if none does."""
    compared = [finding for finding in findings if finding.agrees is not None]
    different = [finding.fact for finding in compared if not finding.agrees]
    if not different:
        return None
    count = f"{len(different)} of {len(compared)} published facts {'differ' if len(different) > 1 else 'differs'}"
    return f"{count}: {'; '.join(different)}; please report this table to the project"


def compare_with_published(
    survey_table: pd.DataFrame, md5s: Mapping[str, bool | None], demographics: Demographics | None
) -> list[Finding]:
    """All findings, in the order in which a reader should look at them.

    Args:
        survey_table: a table of `scans.survey.survey`, of both archives.
        md5s: file name -> whether its MD5 is the published one; None if it is unknown.
        demographics: the content of `IXI.xls`; None if it is not at hand.
    """
    volumes = survey_table[(survey_table["subject_id"] != "") & (survey_table["reason"] == "")]
    return [
        *_files(md5s),
        *_members(survey_table, volumes),
        *_depths(volumes),
        *_geometry(volumes),
        *_storage(volumes),
        *_people(volumes, demographics),
    ]


def _files(md5s: Mapping[str, bool | None]) -> Iterator[Finding]:
    for name, as_published in md5s.items():
        found = {True: "the published one", False: "another one", None: "unknown; `ixi-etl refresh` computes it"}
        matters = "these are other files than those that the facts describe"
        yield Finding(f"MD5 of {name}", "the published one", found[as_published], as_published, matters)


def _members(survey_table: pd.DataFrame, volumes: pd.DataFrame) -> Iterator[Finding]:
    keys = {m: set(volumes.loc[volumes["modality"] == m, "subject_id"]) for m in DEFAULT_MODALITIES}
    for modality, count in MEMBERS.items():
        found = int((volumes["modality"] == modality).sum())
        yield _equal(f"{modality} volumes", count, found, "the number of subjects")
    yield _equal("pairs of T1 and T2", PAIRS, len(keys["T1"] & keys["T2"]), "the number of subjects")
    for modality, other in (("T1", "T2"), ("T2", "T1")):
        people = {key.partition("-")[0] for key in keys[modality] - keys[other]}
        yield _equal(
            f"people with {modality} only", ONE_MODALITY[modality], people, f"excluded as missing_{other.lower()}"
        )
    unusable = survey_table[survey_table["problem"] != ""]
    examples = ", ".join(unusable["member"].head(3))
    found_unusable = f"{len(unusable)}" + (f" ({examples})" if examples else "")
    yield Finding("members that cannot be used", "0", found_unusable, unusable.empty, "excluded subjects")
    nested = int(survey_table["member"].str.contains("/", regex=False).sum())
    yield _equal("members in folders", 0, nested, "the names of subjects")
    yield _equal("sites", SITES, set(volumes["site"]), "the tables by site")


def _depths(volumes: pd.DataFrame) -> Iterator[Finding]:
    depths = {m: volumes.loc[volumes["modality"] == m] for m in DEFAULT_MODALITIES}
    t1 = dict(Counter(depths["T1"]["depth"].tolist()))
    yield _equal("T1 depths (slices: volumes)", DEPTHS_T1, t1, "which volumes have the modal depth")
    t2 = depths["T2"]["depth"].dropna()
    modal = int(t2.mode().max()) if len(t2) else 0
    yield _equal("T2 modal depth", MODAL_DEPTH_T2, modal, "which volumes have the modal depth")
    few = depths["T2"][depths["T2"]["subject_id"].str.startswith(f"{FEW_SLICES[0]}-")]
    others = depths["T2"].drop(few.index)
    for site, published in DEPTHS_T2.items():
        found = {int(depth) for depth in others.loc[others["site"] == site, "depth"].dropna()}
        agrees = bool(found) and found <= published
        yield Finding(f"T2 depths of {site}", _text(published), _text(found), agrees, "which sites are kept")
    low, high = FEW_SLICES[1]
    found_few = [
        (depth, round(json.loads(mm)[2], 2)) for depth, mm in zip(few["depth"].tolist(), few["spacing_mm"], strict=True)
    ]
    agrees = len(found_few) == 1 and low <= found_few[0][0] <= high and found_few[0][1] == FEW_SLICES[2]
    yield Finding(
        f"T2 of {FEW_SLICES[0]}",
        f"{low} or {high} slices, {FEW_SLICES[2]} mm apart",
        ", ".join(f"{depth} slices, {mm} mm apart" for depth, mm in found_few) or "absent",
        agrees,
        "a volume of few thick slices must not count as modal",
    )


def _geometry(volumes: pd.DataFrame) -> Iterator[Finding]:
    for modality, orientation in ORIENTATION.items():
        scans = volumes[volumes["modality"] == modality]
        counts = scans["orientation"].value_counts().to_dict()
        agrees = set(counts) == {orientation}
        yield Finding(
            f"{modality} orientation as stored",
            f"{orientation} in all",
            _counted(counts),
            agrees,
            "the planes that are paired",
        )
        grids = scans["shape"].map(lambda shape: "{} x {}".format(*json.loads(shape))).value_counts().to_dict()
        matters = "excluded as grid_not_modal" if modality == "T2" else "the field of view"
        yield Finding(
            f"{modality} voxels in the plane", f"{IN_PLANE} in all", _counted(grids), set(grids) == {IN_PLANE}, matters
        )
        tilts = np.array([_tilt_deg(json.loads(affine)) for affine in scans["affine"] if affine])
        inside = float(((tilts >= TILT_DEG[0]) & (tilts <= TILT_DEG[1])).mean()) if len(tilts) else 0.0
        found = (
            f"{np.percentile(tilts, 5):.1f} to {np.percentile(tilts, 95):.1f} in 90% of scans" if len(tilts) else "-"
        )
        yield Finding(
            f"{modality} tilt, degrees",
            f"{TILT_DEG[0]:g} to {TILT_DEG[1]:g}",
            found,
            inside >= 0.9,
            "whether flipping axes is enough",
        )
    yield from _spacings(volumes)


def _spacings(volumes: pd.DataFrame) -> Iterator[Finding]:
    spacing = {
        m: [tuple(json.loads(s)[:3]) for s in volumes.loc[volumes["modality"] == m, "spacing_mm"] if s]
        for m in DEFAULT_MODALITIES
    }
    found: dict[str, int] = {}
    for mm in spacing["T1"]:
        known = next((k for k in SPACING_T1_MM if np.allclose(k, mm, atol=TOLERANCE_MM)), None)
        label = " x ".join(f"{v:g}" for v in known or np.round(mm, 4))
        found[label] = found.get(label, 0) + 1
    published = {" x ".join(f"{v:g}" for v in mm): n for mm, n in SPACING_T1_MM.items()}
    yield _equal("T1 spacing, mm (volumes)", published, found, "how much finer or coarser than the T2 they are")
    (low, high), (thin, thick) = SPACING_T2_MM
    usual = [mm for mm in spacing["T2"] if mm[2] < 4]
    fits = [
        low <= min(mm[:2]) and max(mm[:2]) <= high and thin - TOLERANCE_MM <= mm[2] <= thick + TOLERANCE_MM
        for mm in usual
    ]
    between = f"{min(mm[2] for mm in usual):.4g} to {max(mm[2] for mm in usual):.4g}" if usual else "-"
    yield Finding(
        "T2 spacing, mm, without thick slices",
        f"{low} to {high} in the plane, {thin:.2f} to {thick:.2f} between slices",
        f"{sum(fits)} of {len(fits)} in both ranges; {between} between slices",
        bool(fits) and all(fits),
        "the height of a slab",
    )


def _storage(volumes: pd.DataFrame) -> Iterator[Finding]:
    counts = volumes["dtype"].map(lambda dtype: np.dtype(dtype).name).value_counts().to_dict()
    yield Finding(
        "type of voxels", f"{DTYPE} in all", _counted(counts), set(counts) == {DTYPE}, "how values are stored"
    )
    codes = [f"{s}/{q}" for s, q in zip(volumes["sform_code"], volumes["qform_code"], strict=True)]
    coded = pd.Series(codes, dtype=object).value_counts().to_dict()
    wanted = f"{FORM_CODE}/{FORM_CODE}"
    yield Finding(
        "sform/qform codes", f"{wanted} in all", _counted(coded), set(coded) == {wanted}, "the space of a pair"
    )
    noted = volumes[volumes["note"] != ""]
    found = f"{len(noted)}" + (f" ({noted['member'].iloc[0]}: {noted['note'].iloc[0]})" if len(noted) else "")
    yield Finding("headers with contradictions", "0", found, noted.empty, "the space of a pair")
    slopes = volumes["slope"].astype(float)
    share = f"{(slopes != 1).mean():.0%} of volumes" if len(slopes) else "-"
    yield Finding(
        "slope other than 1",
        "in some",
        share,
        bool(len(slopes)) and bool((slopes != 1).any()),
        "scaling of intensities",
    )


def _people(volumes: pd.DataFrame, demographics: Demographics | None) -> Iterator[Finding]:
    if demographics is None:
        found = "absent; `ixi-etl refresh --demographics official` fetches it"
        yield Finding("IXI.xls", f"{DEMOGRAPHICS_ROWS} rows", found, None, "age and sex")
        return
    rows = sum(demographics.rows.values()) + len(demographics.unread)
    repeated = [n for n in demographics.rows.values() if n > 1]
    people = {canonical_person(key.partition("-")[0]) for key in volumes.loc[volumes["modality"] == "T1", "subject_id"]}
    without = len(people - set(demographics.rows))
    yield _equal("rows of IXI.xls", DEMOGRAPHICS_ROWS, rows, "age and sex")
    yield _equal(
        "ids with several rows (their rows)",
        (REPEATED_IDS, ROWS_OF_REPEATED_IDS),
        (len(repeated), sum(repeated)),
        "age and sex of these people",
    )
    yield _equal("T1 people without a row", T1_WITHOUT_ROW, without, "empty age and sex")


def _equal(fact: str, published: object, found: object, matters: str) -> Finding:
    return Finding(fact, _text(published), _text(found), published == found, matters)


def _text(value: object) -> str:
    if isinstance(value, set):
        shown = [str(item) for item in sorted(value)[:MAX_SHOWN]]
        return ", ".join(shown + ([f"{len(value) - MAX_SHOWN} more"] if len(value) > MAX_SHOWN else [])) or "none"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}: {n}" for key, n in sorted(value.items(), reverse=True)) or "none"
    return str(value)


def _counted(counts: Mapping[object, int]) -> str:
    """Values and their counts, the most common first."""
    return ", ".join(f"{value} in {n}" for value, n in counts.items()) or "none"


def _tilt_deg(affine: list[list[float]]) -> float:
    """Largest angle (degrees) between an axis of the grid and the nearest axis of the scanner (RAS)."""
    columns = np.array(affine)[:3, :3]
    cosines = np.abs(columns / np.linalg.norm(columns, axis=0)).max(axis=0)
    return float(np.degrees(np.arccos(np.clip(cosines.min(), -1, 1))))
