"""Who is in, who is out and why: one row per subject of the union of both archives.

The table is pure data: `select` decides what headers alone can decide, `settle` adds what the cut found. What its
columns may hold stands in `schema`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import pandas as pd

from ixi_etl.catalog import MODALITIES
from ixi_etl.config import SPLITS, DatasetConfig
from ixi_etl.demographics import canonical_person
from ixi_etl.nifti import ALIGNED, Form, choose_spaces, space_name
from ixi_etl.schema import CANDIDATE, EXCLUDED, IXI, REASONS, USED, Schema
from ixi_etl.survey import by_site, count_by_site, modal_depths, site_records

T = TypeVar("T")

DUPLICATE = "duplicate_scan"
FLAGS = {
    "unlike_spaces": "the T1's affine is in scanner space and the T2's is aligned to something, or the reverse",
    "template_space": "both affines are in a template's space, and voxels have the size that they have there",
    "affine_not_pixdim": "an affine has other voxel sizes or angles than the pixdim; the affine's are used",
    DUPLICATE: "the same voxels are in the archives more than once; persons who share them are in one split",
}
"""What headers and the comparison of scans can flag; the cut has flags of its own."""

SPACING_TOLERANCE = 0.1
"""Of the modal spacing. IXI's T2s have slices of 1.20 to 1.28 mm, 4% from the commonest 1.25, and its T1s pixels of
0.9375 or 0.9766 mm, 4% apart; the next that occurs, IXI014's 4.98 mm, makes no slab of 25 mm."""


def select(
    table: pd.DataFrame, config: DatasetConfig, demographics: Mapping[str, Mapping[str, Any]] | None = None
) -> pd.DataFrame:
    """One row per subject of the survey `table`: `excluded` by what its headers say, or a `candidate` to be cut.

    `demographics` is person (`IXI002`) -> {"age", "sex"}; a person without an entry gets none.
    """
    volumes = table[table["subject_id"] != ""]
    subjects: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for record in records(volumes):
        subjects.setdefault(record["subject_id"], {m: [] for m in MODALITIES})[record["modality"]].append(record)
    flags = {subject: _share_space(of) for subject, of in subjects.items()}
    rules = _Rules(
        modal_depths(volumes), [r for of in subjects.values() for found in of.values() for r in found], config
    )
    rows = []
    for subject, of in sorted(subjects.items()):
        findings = rules.check(of)
        reason, detail = min(findings, key=lambda f: list(REASONS).index(f[0]), default=("", ""))
        row: dict[str, Any] = {
            "subject_id": subject,
            "site": next(record["site"] for found in of.values() for record in found),
            "status": EXCLUDED if reason else CANDIDATE,
            "reason": reason,
            "detail": detail,
            "flags": ",".join(flags[subject]),
            **((demographics or {}).get(canonical_person(person_of(subject)), {})),
        }
        for modality, found in of.items():
            if found:
                columns = ("member", "depth", "shape", "spacing_mm", "orientation")
                row |= {f"{modality.lower()}_{c}": found[0][c] for c in columns}
        rows.append(row)
    return IXI.typed(pd.DataFrame(rows, columns=IXI.columns))


def _share_space(of: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """Put the two scans of a subject into a space that both have, in their records of the survey; flags of that.

    The cut asks the same `choose_spaces`. Where there is no such space, the T2 is unusable.
    """
    first = [of[m][0] for m in MODALITIES if of[m]]
    if len(first) < len(MODALITIES) or any(record["reason"] for record in first):
        return []
    forms = [{int(code): Form.from_record(f) for code, f in json.loads(r["forms"]).items()} for r in first]
    spaces = choose_spaces(*forms)
    if spaces is None:
        have = [" or ".join(f"{space_name(c)} (code {c})" for c in sorted(of_scan)) for of_scan in forms]
        notes = "".join(f"; {form.note}" for of_scan in forms for form in of_scan.values() if form.note)
        said = f"its affine is in another space than the T1's, {have[1]} instead of {have[0]}{notes}"
        first[1] |= {"reason": "bad_affine", "problem": said}
        return []
    chosen = [of_scan[space] for of_scan, space in zip(forms, spaces, strict=True)]
    for record, form in zip(first, chosen, strict=True):
        record |= {"spacing_mm": json.dumps(form.spacing_mm), "orientation": form.orientation}
    found = {
        "unlike_spaces": spaces[0] != spaces[1],
        "template_space": max(spaces) > ALIGNED,
        "affine_not_pixdim": any(form.note for form in chosen),
    }
    return [flag for flag, is_so in found.items() if is_so]


class _Rules:
    """The checks that need headers only, measured against the commonest depth and grid of all volumes."""

    def __init__(self, depth: Mapping[str, int], volumes: list[dict[str, Any]], config: DatasetConfig) -> None:
        self.config = config
        self.depth = depth
        self.grid: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {}
        for modality in MODALITIES:
            sound = [record for record in volumes if record["modality"] == modality and record["reason"] == ""]
            grids = [self._grid(record) for record in sound]
            # Spacings vote by hundredths of a millimetre: scanners write them with noise in the last digits.
            spacings = [tuple(round(mm, 2) for mm in spacing) for _, spacing in grids]
            self.grid[modality] = (_mode(shape[:2] for shape, _ in grids) or (), _mode(spacings) or ())

    def _grid(self, record: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Shape and spacing (mm) along the axes that the store will have: as stored, or x, y, z."""
        shape, spacing = json.loads(record["shape"]), json.loads(record["spacing_mm"])
        axes = [0, 1, 2]
        if self.config.pairing == "anatomical":
            axes.sort(key=lambda axis: "RLAPSI".index(record["orientation"][axis]))
        return tuple(shape[a] for a in axes), tuple(spacing[a] for a in axes)

    def check(self, of: Mapping[str, list[dict[str, Any]]]) -> list[tuple[str, str]]:
        """(reason, detail) of every check that fails, T1 before T2."""
        found = [(f"missing_{m.lower()}", f"no {m} in IXI-{m}.tar") for m in MODALITIES if not of[m]]
        for modality in MODALITIES:
            if len(of[modality]) > 1:
                names = ", ".join(record["member"] for record in of[modality])
                found.append(("duplicate_member", f"{len(of[modality])} members in IXI-{modality}.tar: {names}"))
            for record in of[modality][:1]:
                if record["reason"] in ("", "grid_not_modal"):  # the survey says the latter of too large a volume
                    found += self._depth(modality, record)
                if record["reason"]:
                    found.append((record["reason"], f"{modality}: {record['problem']}"))
                else:
                    found += self._geometry(modality, record)
        return found

    def _depth(self, modality: str, record: Mapping[str, Any]) -> list[tuple[str, str]]:
        depth, modal = int(record["depth"]), self.depth[modality]
        if depth == modal or self.config.depth != "modal":
            return []
        return [("depth_not_modal", f"{modality} has {depth} slices; the commonest is {modal}")]

    def _geometry(self, modality: str, record: Mapping[str, Any]) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        if modality == "T1" and self.config.pairing == "anatomical":
            return found  # it is resampled, whatever its grid
        plane, spacing = self.grid[modality]
        shape, size_mm = self._grid(record)
        if shape[:2] != plane:
            found.append(
                ("grid_not_modal", f"{modality} slices have {_by(shape[:2])} voxels; the commonest: {_by(plane)}")
            )
        elif any(abs(a - b) > SPACING_TOLERANCE * b for a, b in zip(size_mm, spacing, strict=True)):
            found.append(("grid_not_modal", f"{modality} voxels have {_by(size_mm)} mm; the commonest: {_by(spacing)}"))
        elif self.config.pairing == "index" and plane != self.grid["T1"][0]:
            t1 = _by(self.grid["T1"][0])
            found.append(("grid_not_modal", f"T2 slices have {_by(plane)} voxels, T1 slices {t1}: no pairs by index"))
        if self.config.window_in(shape[2]) is None:
            window = self.config.window
            what = f"the middle {self.config.slices}" if window == "middle" else f"[{window[0]}, {window[1]})"
            found.append(("grid_not_modal", f"{modality} has {shape[2]} slices: {what} cannot be cut"))
        return found


def person_of(subject_id: str) -> str:
    """`IXI002` of `IXI002-Guys-0828`: two scans of one person share it."""
    return subject_id.partition("-")[0]


def settle(manifest: pd.DataFrame, found: Mapping[str, Mapping[str, Any]], config: DatasetConfig) -> pd.DataFrame:
    """The final manifest: what the cut `found` of each subject (by subject_id), splits, and dense store rows."""
    rows = []
    for row in records(manifest):
        record = found[row["subject_id"]]
        flags = join_flags(row["flags"], record.get("flags"))
        row |= {column: value for column, value in record.items() if column in IXI.dtypes} | {"flags": flags}
        if row["status"] == CANDIDATE:
            row["status"] = EXCLUDED if row["reason"] else USED
        rows.append(row)
    used = [row for row in rows if row["status"] == USED]
    twins = equal_scans({row["subject_id"]: found[row["subject_id"]] for row in used})
    splits = _splits({person_of(row["subject_id"]) for row in used}, twins, config)
    twice = {subject for group in twins for subject, _ in group}
    for store_row, row in enumerate(used):
        row |= {"store_row": store_row, "split": splits[person_of(row["subject_id"])]}
        if row["subject_id"] in twice:
            row["flags"] = join_flags(row["flags"], DUPLICATE)
    return IXI.typed(pd.DataFrame(rows, columns=IXI.columns))


def join_flags(*flags: str | None) -> str:
    """Comma-separated flags, those that are given."""
    return ",".join(flag for flag in flags if flag)


def equal_scans(found: Mapping[str, Mapping[str, Any]]) -> list[list[tuple[str, str]]]:
    """Groups of (subject_id, modality) whose voxels are equal as stored, however they are compressed or described."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for subject, record in sorted(found.items()):
        for modality, digest in record.get("voxels_sha256", {}).items():
            groups.setdefault(digest, []).append((subject, modality))
    return sorted(group for group in groups.values() if len(group) > 1)


def _splits(persons: Iterable[str], twins: Iterable[list[tuple[str, str]]], config: DatasetConfig) -> dict[str, str]:
    """Person -> split. Persons who share a scan are one: all are in the first of train, val, test that any falls into.

    So whoever was trained on before a copy turned up is never tested on afterwards.
    """
    groups = {person: {person} for person in persons}
    for group in twins:
        one = set().union(*(groups[person_of(subject)] for subject, _ in group))
        groups |= dict.fromkeys(one, one)
    return {p: min((config.split_of(other) for other in one), key=SPLITS.index) for p, one in groups.items()}


def used(manifest: pd.DataFrame) -> pd.DataFrame:
    """The rows that stand in the store, in store order."""
    return manifest[manifest["status"] == USED].sort_values("store_row")


def funnel(manifest: pd.DataFrame, schema: Schema = IXI) -> pd.DataFrame:
    """How many subjects are left after each step of its schema: a row per step, columns as of `by_site`."""
    left = manifest
    steps = []
    sites = sorted(set(manifest["site"]) - {""})
    for reasons in schema.steps.values():
        left = left[~left["reason"].isin(reasons)]
        steps.append([int((left["site"] == site).sum()) for site in sites] + [len(left)])
    counts = pd.DataFrame(steps, pd.Index(schema.steps, name="step"), [*sites, ""])
    return by_site(counts.iloc[:, :-1], counts.iloc[:, -1])


def counts(manifest: pd.DataFrame, schema: Schema = IXI) -> dict[str, Any]:
    """What `dataset.json` says of a manifest: how many are used, in which split, and the funnel."""
    rows = used(manifest)
    steps = site_records(funnel(manifest, schema))
    return {
        "subjects": len(rows),
        "splits": {str(split): int(n) for split, n in rows["split"].value_counts().sort_index().items()},
        "funnel": {row["step"]: {"all": row["all"], "sites": row["sites"]} for row in steps},
    }


def exclusions(manifest: pd.DataFrame) -> pd.DataFrame:
    """Excluded subjects by reason, in the order of the checks; columns as of `by_site`."""
    out = manifest[manifest["status"] == EXCLUDED]
    return count_by_site(out, ["reason"]).reindex([r for r in REASONS if r in set(out["reason"])])


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as dictionaries."""
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _mode(values: Iterable[T]) -> T | None:
    """The commonest value; of several equally common ones the largest."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value), default=None)


def _by(numbers: Iterable[float]) -> str:
    return " x ".join(f"{n:g}" for n in numbers)
