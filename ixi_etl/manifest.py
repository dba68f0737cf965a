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
from ixi_etl.config import DatasetConfig
from ixi_etl.schema import CANDIDATE, EXCLUDED, IXI, REASONS, USED, Schema
from ixi_etl.survey import modal_depths

T = TypeVar("T")

SPACING_TOLERANCE = 0.1  # of the modal spacing: 4.98 mm slices make no 25 mm slab


def select(
    table: pd.DataFrame, config: DatasetConfig, demographics: Mapping[str, Mapping[str, Any]] | None = None
) -> pd.DataFrame:
    """One row per subject of the survey `table`: `excluded` by what its headers say, or a `candidate` to be cut.

    `demographics` is person (`IXI002`) -> {"age", "sex"}; a person without an entry gets none.
    """
    volumes = table[table["subject_id"] != ""]
    rules = _Rules(volumes, config)
    subjects: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for record in records(volumes):
        subjects.setdefault(record["subject_id"], {m: [] for m in MODALITIES})[record["modality"]].append(record)
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
            **((demographics or {}).get(person_of(subject), {})),
        }
        for modality, found in of.items():
            if found:
                columns = ("member", "depth", "shape", "spacing_mm", "orientation")
                row |= {f"{modality.lower()}_{c}": found[0][c] for c in columns}
        rows.append(row)
    return IXI.typed(pd.DataFrame(rows, columns=IXI.columns))


class _Rules:
    """The checks that need headers only, measured against the commonest depth and grid of all volumes."""

    def __init__(self, volumes: pd.DataFrame, config: DatasetConfig) -> None:
        self.config = config
        self.depth = modal_depths(volumes)
        self.grid: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {}
        sound = volumes[volumes["reason"] == ""]
        for modality in MODALITIES:
            grids = [self._grid(record) for record in records(sound[sound["modality"] == modality])]
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
                if record["reason"]:
                    found.append((record["reason"], f"{modality}: {record['problem']}"))
                else:
                    found += self._geometry(modality, record)
        return found

    def _geometry(self, modality: str, record: Mapping[str, Any]) -> list[tuple[str, str]]:
        found = []
        depth, modal = int(record["depth"]), self.depth[modality]
        if depth != modal and self.config.depth == "modal":
            found.append(("depth_not_modal", f"{modality} has {depth} slices; the commonest is {modal}"))
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
        row |= {column: value for column, value in record.items() if column in IXI.dtypes}
        if row["status"] == CANDIDATE:
            row["status"] = EXCLUDED if row["reason"] else USED
        rows.append(row)
    used = [row for row in rows if row["status"] == USED]
    for store_row, row in enumerate(used):
        row |= {"store_row": store_row, "split": config.split_of(person_of(row["subject_id"]))}
    return IXI.typed(pd.DataFrame(rows, columns=IXI.columns))


def used(manifest: pd.DataFrame) -> pd.DataFrame:
    """The rows that stand in the store, in store order."""
    return manifest[manifest["status"] == USED].sort_values("store_row")


def funnel(manifest: pd.DataFrame, schema: Schema = IXI) -> pd.DataFrame:
    """How many subjects are left after each step of its schema: a row per step, a column per site, and `all`."""
    left = manifest
    counts = {}
    sites = sorted(set(manifest["site"]) - {""})
    for step, reasons in schema.steps.items():
        left = left[~left["reason"].isin(reasons)]
        counts[step] = {site: int((left["site"] == site).sum()) for site in sites} | {"all": len(left)}
    table = pd.DataFrame.from_dict(counts, orient="index")
    table.index.name = "step"
    return table


def counts(manifest: pd.DataFrame, schema: Schema = IXI) -> dict[str, Any]:
    """What `dataset.json` says of a manifest: how many are used, in which split, and the funnel."""
    rows = used(manifest)
    return {
        "subjects": len(rows),
        "splits": {str(split): int(n) for split, n in rows["split"].value_counts().sort_index().items()},
        "funnel": json.loads(funnel(manifest, schema).to_json(orient="index")),
    }


def exclusions(manifest: pd.DataFrame) -> pd.DataFrame:
    """Excluded subjects by reason, in the order of the checks: a row per reason, a column per site, and `all`."""
    out = manifest[manifest["status"] == EXCLUDED]
    table = pd.crosstab(out["reason"], out["site"]).reindex([r for r in REASONS if r in set(out["reason"])])
    table.columns.name = None
    return table.assign(all=table.sum(axis=1)).astype(int)


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as dictionaries."""
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _mode(values: Iterable[T]) -> T | None:
    """The commonest value; of several equally common ones the largest."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value), default=None)


def _by(numbers: Iterable[float]) -> str:
    return " x ".join(f"{n:g}" for n in numbers)
