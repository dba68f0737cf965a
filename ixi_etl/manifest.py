"""Who is in, who is out and why: one row per subject of the union of both archives.

The table is pure data: `select` decides what headers alone can decide, `settle` adds what the cut found. The CSV is
the audit copy, and is checked against `SCHEMA` whenever it is written or read.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import nibabel as nib
import numpy as np
import pandas as pd
from pandas.api.types import pandas_dtype

from ixi_etl.catalog import MODALITIES
from ixi_etl.config import SPLITS, DatasetConfig
from ixi_etl.errors import DatasetError
from ixi_etl.survey import modal_depths

T = TypeVar("T")

REASONS = {
    "missing_t1": "no T1 of this subject in the archive",
    "missing_t2": "no T2 of this subject in the archive",
    "duplicate_member": "several members of the archive bear this subject's name",
    "unreadable": "the member is no NIfTI file, or its header makes no sense",
    "not_3d": "the volume has not three dimensions",
    "unsupported_dtype": "voxels are complex, colours, or wider than 64 bits",
    "bad_affine": "no usable sform or qform, or no usable spacing: where the voxels lie is unknown",
    "depth_not_modal": "the number of slices is not the commonest of its modality",
    "grid_not_modal": "the slices have not the commonest size and spacing, or the window does not fit",
    "corrupt_voxels": "the voxels are cut short, damaged, or not finite",
    "outside_fov": "over 5% of the T2's foreground lies outside the T1's grid",
    "empty_image": "the cut slices hold one single value",
    "intensity_range": "values do not fit 16 bits, or keep fewer than 256 levels in them",
    "low_similarity": "the pair's similarity is under the threshold",
}
"""Why a subject can be out. The checks run in this order, T1 before T2; the first to fail gives the reason."""

FUNNEL = {
    "found": (),
    "paired": ("missing_t1", "missing_t2", "duplicate_member"),
    "readable": ("unreadable", "not_3d", "unsupported_dtype", "bad_affine"),
    "modal depth": ("depth_not_modal",),
    "modal grid": ("grid_not_modal",),
    "cut": ("corrupt_voxels", "outside_fov", "empty_image", "intensity_range"),
    "used": ("low_similarity",),
}
"""The steps that a subject passes, each with the reasons that end it there."""

SPACING_TOLERANCE = 0.1  # of the modal spacing: 4.98 mm slices make no 25 mm slab

_HEAD = ["subject_id", "site", "status", "reason", "detail", "split", "store_row", "age", "sex"]
_VOLUME = ["member", "sha256", "depth", "shape", "spacing_mm", "orientation"]
_VOLUME += ["window_start", "window_stop", "p_low", "p_high"]
_TAIL = ["t2_to_t1_ras_mm", "motion_mm", "motion_deg", "nmi_before", "nmi_after", "flags"]
COLUMNS = [*_HEAD, *(f"{m.lower()}_{c}" for m in MODALITIES for c in _VOLUME), *_TAIL]

_INTEGER = {"store_row", *(f"{m}_{c}" for m in ("t1", "t2") for c in ("depth", "window_start", "window_stop"))}
_NUMBER = {"age", "motion_mm", "motion_deg", "nmi_before", "nmi_after"}
_NUMBER |= {f"{m}_{c}" for m in ("t1", "t2") for c in ("p_low", "p_high")}
DTYPES = {c: "Int64" if c in _INTEGER else "Float64" if c in _NUMBER else "str" for c in COLUMNS}

USED, EXCLUDED, CANDIDATE = "used", "excluded", "candidate"


def select(
    table: pd.DataFrame, config: DatasetConfig, demographics: Mapping[str, Mapping[str, Any]] | None = None
) -> pd.DataFrame:
    """One row per subject of the survey `table`: `excluded` by what its headers say, or a `candidate` to be cut.

    `demographics` is person (`IXI002`) -> {"age", "sex"}; a person without an entry gets none.
    """
    volumes = table[table["subject_id"] != ""]
    rules = _Rules(volumes, config)
    rows = []
    for subject, members in sorted(volumes.groupby("subject_id"), key=lambda item: str(item[0])):
        of = {m: records(members[members["modality"] == m]) for m in MODALITIES}
        findings = rules.check(of)
        reason, detail = min(findings, key=lambda f: list(REASONS).index(f[0]), default=("", ""))
        row: dict[str, Any] = {
            "subject_id": subject,
            "site": members["site"].iloc[0],
            "status": EXCLUDED if reason else CANDIDATE,
            "reason": reason,
            "detail": detail,
            **((demographics or {}).get(person_of(str(subject)), {})),
        }
        for modality, found in of.items():
            if found:
                columns = ("member", "depth", "shape", "spacing_mm", "orientation")
                row |= {f"{modality.lower()}_{c}": found[0][c] for c in columns}
        rows.append(row)
    return _typed(pd.DataFrame(rows, columns=COLUMNS))


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
            axes = np.argsort(nib.io_orientation(np.array(json.loads(record["affine"])))[:, 0]).tolist()
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
        row |= {column: value for column, value in record.items() if column in DTYPES}
        if row["status"] == CANDIDATE:
            row["status"] = EXCLUDED if row["reason"] else USED
        rows.append(row)
    used = [row for row in rows if row["status"] == USED]
    for store_row, row in enumerate(used):
        row |= {"store_row": store_row, "split": config.split_of(person_of(row["subject_id"]))}
    return _typed(pd.DataFrame(rows, columns=COLUMNS))


def used(manifest: pd.DataFrame) -> pd.DataFrame:
    """The rows that stand in the store, in store order."""
    return manifest[manifest["status"] == USED].sort_values("store_row")


def funnel(manifest: pd.DataFrame) -> pd.DataFrame:
    """How many subjects are left after each step of `FUNNEL`: a row per step, a column per site, and `all`."""
    left = manifest
    steps = {}
    for step, reasons in FUNNEL.items():
        left = left[~left["reason"].isin(reasons)]
        steps[step] = left["site"].value_counts()
    sites = sorted(manifest["site"].unique())
    table = pd.DataFrame(steps, index=sites).fillna(0).astype(int).T
    table.index.name = "step"
    return table.assign(all=table.sum(axis=1))


def exclusions(manifest: pd.DataFrame) -> pd.DataFrame:
    """Excluded subjects by reason, in the order of the checks: a row per reason, a column per site, and `all`."""
    out = manifest[manifest["status"] == EXCLUDED]
    table = pd.crosstab(out["reason"], out["site"]).reindex([r for r in REASONS if r in set(out["reason"])])
    table.columns.name = None
    return table.assign(all=table.sum(axis=1)).astype(int)


def to_csv(manifest: pd.DataFrame) -> str:
    """The CSV text of a manifest, checked first."""
    return validate(manifest).to_csv(index=False, lineterminator="\n")


def from_csv(text: str, name: str) -> pd.DataFrame:
    """The manifest that `to_csv` wrote.

    Raises:
        DatasetError: it is not one; `name` is what the message calls it.
    """
    try:
        raw = pd.read_csv(io.StringIO(text), dtype="str", keep_default_na=False)
        if list(raw.columns) != COLUMNS:
            wrong = sorted(set(raw.columns) ^ set(COLUMNS)) or "their order"
            raise ValueError(f"its columns are not those of a manifest: {wrong}")
        return validate(_typed(raw))
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{name} is not a manifest: {' '.join(str(error).split())[:300]}") from error


def validate(manifest: pd.DataFrame) -> pd.DataFrame:
    """The manifest itself, if it keeps the contract.

    Raises:
        ValueError: which column or rule it breaks.
    """
    import pandera.errors
    import pandera.pandas as pa

    text = {c: pa.Column("str") for c in COLUMNS if DTYPES[c] == "str"}
    other = {c: pa.Column(DTYPES[c], nullable=True) for c in COLUMNS if DTYPES[c] != "str"}
    columns = text | other
    columns["subject_id"] = pa.Column("str", unique=True)
    columns["status"] = pa.Column("str", pa.Check.isin([USED, EXCLUDED]))
    columns["reason"] = pa.Column("str", pa.Check.isin(["", *REASONS]))
    columns["split"] = pa.Column("str", pa.Check.isin(["", *SPLITS]))
    columns["sex"] = pa.Column("str", pa.Check.isin(["", "m", "f"]))

    def used_has_no_reason(table: pd.DataFrame) -> Any:
        return (table["status"] == USED) == (table["reason"] == "")

    def used_has_a_split(table: pd.DataFrame) -> Any:
        return (table["status"] == USED) == (table["split"] != "")

    def rows_are_dense(table: pd.DataFrame) -> bool:
        rows = table.loc[table["status"] == USED, "store_row"]
        return rows.tolist() == list(range(len(rows))) and int(table["store_row"].notna().sum()) == len(rows)

    def sorted_by_subject(table: pd.DataFrame) -> bool:
        return bool(table["subject_id"].is_monotonic_increasing)

    def out_has_a_detail(table: pd.DataFrame) -> Any:
        return (table["status"] == EXCLUDED) == (table["detail"] != "")

    def used_is_complete(table: pd.DataFrame) -> Any:
        complete = table["t2_to_t1_ras_mm"].map(_is_matrix)
        for name in ("t1", "t2"):
            complete &= table[f"{name}_member"] != ""
            complete &= table[f"{name}_sha256"].str.fullmatch("[0-9a-f]{64}")
            complete &= (table[f"{name}_p_low"] <= table[f"{name}_p_high"]).fillna(False)
        complete &= table["t2_window_start"].notna() & table["t2_window_stop"].notna()
        return (table["status"] != USED) | complete

    rules = (
        used_has_no_reason,
        used_has_a_split,
        rows_are_dense,
        sorted_by_subject,
        out_has_a_detail,
        used_is_complete,
    )
    checks = [pa.Check(rule) for rule in rules]
    for name in ("nmi_before", "nmi_after"):
        columns[name] = pa.Column("Float64", pa.Check.in_range(0, 1), nullable=True)
    schema = pa.DataFrameSchema({c: columns[c] for c in COLUMNS}, checks, strict=True, ordered=True)
    try:
        return schema.validate(manifest)
    except pandera.errors.SchemaError as error:
        raise ValueError(str(error)) from error


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as dictionaries."""
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _is_matrix(text: str) -> bool:
    """Whether it is a 4 x 4 matrix in JSON, or empty, as for pairs by index."""
    try:
        return text == "" or np.shape(json.loads(text)) == (4, 4)
    except ValueError:
        return False


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    columns = {}
    for name in COLUMNS:
        column = table[name]
        if DTYPES[name] == "str":
            columns[name] = column.where(column.notna(), "").astype("str")
        else:
            columns[name] = (
                column.mask(column.astype("object").isin(["", None]), None)
                .astype("Float64")
                .astype(pandas_dtype(DTYPES[name]))
            )
    return pd.DataFrame(columns)


def _mode(values: Iterable[T]) -> T | None:
    """The commonest value; of several equally common ones the largest."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value), default=None)


def _by(numbers: Iterable[float]) -> str:
    return " x ".join(f"{n:g}" for n in numbers)
