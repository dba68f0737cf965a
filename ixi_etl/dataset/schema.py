"""The schema of each dataset's manifest: columns, reasons for exclusion, allowed values and rules.

The rules are checked on every write and read. The checks that exclude a subject are elsewhere: those of headers in
`selection`, others in `scans` and `pairing` (CONTRIBUTING.md, "Add an exclusion reason").

All manifests begin with the same columns and have percentiles of both slabs of a pair, named after the arrays.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import pandas_dtype

from ixi_etl.config import SPLITS
from ixi_etl.errors import DatasetError
from ixi_etl.modalities import DATASETS, DEFAULT_MODALITIES, DEFAULT_REFERENCE, MODALITIES, moving

USED, EXCLUDED, CANDIDATE = "used", "excluded", "candidate"
MIXED = "mixed"
"""The `split` of a subject whose slices are in several, which `slice_splits` lists."""
BEYOND_LIMIT = "beyond_limit"

REASONS = {
    **{f"missing_{m.lower()}": f"the archive has no {m} of this subject" for m in MODALITIES},
    "duplicate_member": "the archive has several members with this subject's name",
    "unreadable": "the member is not a NIfTI file, or its header is invalid",
    "not_3d": "the volume does not have three dimensions",
    "unsupported_dtype": "the voxels are complex, RGB, or wider than 64 bits",
    "bad_affine": "sform, qform or spacing are unusable or contradictory, {scans} share no space, or one is mirrored",
    "depth_not_modal": "the number of slices is not the most common one of the modality",
    "grid_not_modal": "size or spacing is not the most common one, the window does not fit, or the volume is too large",
    "corrupt_voxels": "the voxels are truncated, damaged, or not finite",
    "outside_fov": "more than 5% of the {reference} slab's foreground is outside the {owners} grid",
    "empty_image": "percentiles 0.1 and 99.9 of a slab are equal: it has a single value, or almost no other",
    "intensity_range": "the range of values is too wide for 16 bits, or they cannot be interpolated in float32",
    "mean_not_positive": "the mean of a slab is not above 0, so that nothing can be divided by it",
    "registration_uncertain": "the estimated error of the registration is above the maximum, or it failed",
    "low_similarity": "the similarity (NMI) of the pair is below the minimum, or far below the pairs of its site",
    BEYOND_LIMIT: "beyond the limit of --subjects or --split-counts",
}
"""Reasons for exclusion. Of all failed checks the earliest here counts; within one reason, T1 before T2 before others.

`Schema.reasons` fills in the names of the modalities.
"""

_HEAD = dict.fromkeys(("subject_id", "site", "status", "reason", "detail", "split"), "str") | {"store_row": "Int64"}


@dataclass(frozen=True)
class Schema:
    """The manifest of one dataset.

    Attributes:
        dtypes: column -> `str`, `Int64` or `Float64`, in the order of the CSV.
        steps: steps of the funnel, each with the reasons that exclude a subject there.
        arrays: names of the arrays of the store; a used row has `_p_low` and `_p_high` of all that it has.
        allowed: column -> allowed values; for a number, minimum and maximum.
        complete: given the manifest, the mask of rows with all further values that a used row must have.
        reasons: reason -> what it means.
        optional: further columns and their dtypes, which some configurations add at the end.
    """

    dtypes: Mapping[str, str]
    steps: Mapping[str, tuple[str, ...]]
    arrays: tuple[str, ...]
    allowed: Mapping[str, tuple[Any, ...]]
    complete: Callable[[pd.DataFrame], Any]
    reasons: Mapping[str, str]
    optional: Mapping[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """The columns that every manifest has."""
        return list(self.dtypes)

    @cached_property
    def known(self) -> frozenset[str]:
        """The columns that a manifest may have."""
        return frozenset({*self.dtypes, *self.optional})

    def dtypes_with(self, given: Iterable[str]) -> dict[str, str]:
        """`dtypes` and, after them, those of the `optional` columns among the `given` ones."""
        present = set(given)
        return {**self.dtypes, **{name: dtype for name, dtype in self.optional.items() if name in present}}

    def to_csv(self, manifest: pd.DataFrame) -> str:
        """Validate a manifest and return its CSV text, in which no cell is a spreadsheet formula."""
        return without_formulas(self.validate(manifest)).to_csv(index=False, lineterminator="\n")

    def from_csv(self, text: str, name: str, *, validate: bool = True) -> pd.DataFrame:
        """Parse a manifest written by `to_csv`, and with `validate` check its rules.

        Raises:
            DatasetError: the text is not a valid manifest; the message calls it `name`.
        """
        try:
            # A member's name may contain a carriage return, which pandas does not quote.
            raw = pd.read_csv(io.StringIO(text), dtype="str", keep_default_na=False, lineterminator="\n")
            expected = list(self.dtypes_with(raw.columns))
            if list(raw.columns) != expected:
                wrong = sorted(set(raw.columns) ^ set(expected)) or "their order"
                raise ValueError(f"the columns differ from those of a manifest: {wrong}")
            table = self.typed(_with_formulas(raw))
            return self.validate(table) if validate else table
        except Exception as error:  # pandas and pandera raise many kinds on damaged text
            raise DatasetError(f"{name} is not a manifest: {' '.join(str(error).split())[:300]}") from error

    def typed(self, table: pd.DataFrame) -> pd.DataFrame:
        """Convert a table to the manifest's dtypes. Empty values become "" in text columns and missing in numbers."""
        columns = {}
        for name, dtype in self.dtypes_with(table.columns).items():
            column = table[name]
            if dtype == "str":
                columns[name] = column.where(column.notna(), "").astype("str")
            else:
                columns[name] = (
                    column.mask(column.astype("object").isin(["", None]), None)
                    .astype("Float64")
                    .astype(pandas_dtype(dtype))
                )
        return pd.DataFrame(columns)

    def validate(self, manifest: pd.DataFrame) -> pd.DataFrame:
        """Return the manifest if it is valid.

        Raises:
            ValueError: names the column or rule that is violated.
        """
        import pandera.errors

        dtypes = [(str(name), str(dtype)) for name, dtype in manifest.dtypes.items()]
        expected = self.dtypes_with(manifest.columns).items()
        if dtypes != list(expected):
            wrong = sorted(dict(set(dtypes) ^ set(expected))) or "their order or number"
            raise ValueError(f"the columns or their types differ from those of a manifest: {wrong}")
        try:
            checked: pd.DataFrame = self._contract.validate(manifest)
            return checked
        except pandera.errors.SchemaError as error:
            raise ValueError(str(error)) from error

    @cached_property
    def _contract(self) -> Any:
        """The allowed values and rules as a pandera schema.

        `validate` compares names and types of columns itself, because pandera takes a millisecond for each. Built on
        first use, because importing pandera takes a second.
        """
        import pandera.pandas as pa

        splits = ("", *SPLITS, MIXED)
        allowed = {"status": (USED, EXCLUDED), "reason": ("", *self.reasons), "split": splits, **self.allowed}
        texts = [name for name, dtype in {**self.dtypes, **self.optional}.items() if dtype == "str"]
        columns = {"subject_id": pa.Column(unique=True)}
        for name, values in allowed.items():
            check = pa.Check.isin(values) if name in texts else pa.Check.in_range(*values)
            columns[name] = pa.Column(checks=check, nullable=True)

        def text_is_never_missing(table: pd.DataFrame) -> Any:
            return table[[name for name in texts if name in table]].notna().all(axis=1)

        def subject_is_a_safe_file_name(table: pd.DataFrame) -> Any:
            return table["subject_id"].str.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # it becomes part of file names

        def used_has_no_reason(table: pd.DataFrame) -> Any:
            return (table["status"] == USED) == (table["reason"] == "")

        def used_has_a_split(table: pd.DataFrame) -> Any:
            return (table["status"] == USED) == (table["split"] != "")

        def rows_are_dense(table: pd.DataFrame) -> bool:
            rows = table.loc[table["status"] == USED, "store_row"]
            return rows.tolist() == list(range(len(rows))) and int(table["store_row"].notna().sum()) == len(rows)

        def sorted_by_subject(table: pd.DataFrame) -> bool:
            return bool(table["subject_id"].is_monotonic_increasing)

        def excluded_has_a_detail(table: pd.DataFrame) -> Any:
            return (table["status"] == EXCLUDED) == (table["detail"] != "")

        def used_is_complete(table: pd.DataFrame) -> Any:
            complete = self.complete(table)
            for name in self.arrays:
                has_range = (table[f"{name}_p_low"] < table[f"{name}_p_high"]).fillna(False)
                complete &= has_range | is_absent(table, name)
            return (table["status"] != USED) | complete

        def used_has_ranges(table: pd.DataFrame) -> Any:
            """Of a version with another normalisation than percentiles."""
            complete = pd.Series(True, table.index)
            for name in [name for name in self.arrays if f"{name}_low" in table or f"{name}_high" in table]:
                has_range = (table[f"{name}_low"] < table[f"{name}_high"]).fillna(False)
                complete &= has_range | is_absent(table, name)
            return (table["status"] != USED) | complete

        def slices_have_splits(table: pd.DataFrame) -> Any:
            """Of a version split by file: as many for each used row, and `split` is theirs, or mixed."""
            if "slice_splits" not in table:
                return pd.Series(True, table.index) & (table["split"] != MIXED)
            names = table["slice_splits"].str.split(",")
            is_used, distinct = table["status"] == USED, names.map(set)
            agrees = distinct.map(lambda found: found <= {*SPLITS}) & (names.map(len) == names[is_used].map(len).max())
            agrees &= table["split"] == distinct.map(lambda found: min(found) if len(found) == 1 else MIXED)
            return agrees.where(is_used, table["slice_splits"] == "")

        rules = (
            text_is_never_missing,
            subject_is_a_safe_file_name,
            used_has_no_reason,
            used_has_a_split,
            rows_are_dense,
            sorted_by_subject,
            excluded_has_a_detail,
            used_is_complete,
            used_has_ranges,
            slices_have_splits,
        )
        return pa.DataFrameSchema(columns, [pa.Check(rule) for rule in rules])


_FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")  # some spreadsheets also accept full-width signs


def without_formulas(table: pd.DataFrame) -> pd.DataFrame:
    """Prefix each text that a spreadsheet would read as a formula with a quote. Member names may be formulas.

    `_with_formulas` removes that quote again, even from texts that began with quotes themselves.
    """
    return _map_texts(table, lambda text: f"'{text}" if _FORMULA.match(text) else text)


def _with_formulas(table: pd.DataFrame) -> pd.DataFrame:
    return _map_texts(table, lambda text: text[1:] if text.startswith("'") and _FORMULA.match(text) else text)


def _map_texts(table: pd.DataFrame, change: Callable[[str], str]) -> pd.DataFrame:
    texts = [name for name in table.columns if pd.api.types.is_string_dtype(table[name])]
    return table.assign(**{name: table[name].map(change, na_action="ignore") for name in texts})


_VOLUME = dict.fromkeys(("member", "sha256"), "str") | {"depth": "Int64"}
_VOLUME |= dict.fromkeys(("shape", "spacing_mm", "orientation"), "str")
_VOLUME |= {"window_start": "Int64", "window_stop": "Int64", "p_low": "Float64", "p_high": "Float64"}
_ALIGNMENT = ("motion_mm", "motion_deg", "registration_error_mm", "nmi_before", "nmi_after")
_STORED = ("scale", "offset")


def pair_column(moving: Sequence[str], modality: str, column: str) -> str:
    """The name of a column of the alignment of one of the `moving` modalities: `motion_mm`.

    With several moving modalities, `t1_motion_mm`; their flags are named in the same way.
    """
    return column if len(moving) == 1 else f"{modality.lower()}_{column}"


def matrix_column(reference: str, modality: str) -> str:
    """`t2_to_t1_ras_mm`: the 4 x 4 matrix from the world of the reference to the same tissue in that of a modality."""
    return f"{reference.lower()}_to_{modality.lower()}_ras_mm"


def is_absent(table: pd.DataFrame, name: str) -> Any:
    """Mask of the rows without a scan of the array `name`: a used subject may lack some with `incomplete = keep`."""
    return table[f"{name}_member"] == "" if f"{name}_member" in table else pd.Series(False, table.index)


def _is_matrix(text: str) -> bool:
    """Whether `text` is a 4 x 4 matrix in JSON, or empty, as for index pairing."""
    try:
        return text == "" or np.shape(json.loads(text)) == (4, 4)
    except (ValueError, RecursionError):
        return False


def _has_volume(table: pd.DataFrame, name: str) -> Any:
    complete = (table[f"{name}_member"] != "") & table[f"{name}_sha256"].str.fullmatch("[0-9a-f]{64}")
    scale, offset = (table[f"{name}_{c}"].to_numpy("float64", na_value=np.nan) for c in _STORED)
    return complete & np.isfinite(scale) & (scale > 0) & np.isfinite(offset)


def ixi_schema(modalities: Sequence[str], reference: str) -> Schema:
    """The manifest of an IXI dataset: columns for each modality, and for the alignment of each moving one."""
    names, others = [m.lower() for m in modalities], moving(modalities, reference)
    dtypes = _HEAD | {"age": "Float64", "sex": "str"}
    dtypes |= {f"{name}_{column}": dtype for name in names for column, dtype in _VOLUME.items()}
    alignments = {m: [pair_column(others, m, column) for column in _ALIGNMENT] for m in others}
    for m, columns in alignments.items():
        dtypes |= {matrix_column(reference, m): "str"} | dict.fromkeys(columns, "Float64")
    dtypes |= {"flags": "str"} | {f"{name}_gzip_crc32": "str" for name in names}
    dtypes |= {f"{name}_{column}": "Float64" for name in names for column in _STORED}

    def complete(table: pd.DataFrame) -> Any:
        result = _has_volume(table, reference.lower())
        result &= table[[f"{reference.lower()}_window_{end}" for end in ("start", "stop")]].notna().all(axis=1)
        has_pair = pd.Series(False, table.index)
        for m in others:
            result &= table[matrix_column(reference, m)].map(_is_matrix).astype(bool)
            has_volume = _has_volume(table, m.lower())
            result &= has_volume | is_absent(table, m.lower())
            has_pair |= has_volume
        return result & has_pair

    words = {"scans": " and ".join(modalities), "reference": reference, "owners": " or ".join(f"{m}'s" for m in others)}
    return Schema(
        dtypes=dtypes,
        steps={
            "found": (),
            "paired": (*(f"missing_{name}" for name in names), "duplicate_member"),
            "readable": ("unreadable", "not_3d", "unsupported_dtype", "bad_affine"),
            "modal depth": ("depth_not_modal",),
            "modal grid": ("grid_not_modal",),
            "cut": ("corrupt_voxels", "outside_fov", "empty_image", "intensity_range", "mean_not_positive"),
            "used": ("registration_uncertain", "low_similarity", BEYOND_LIMIT),
        },
        arrays=tuple(names),
        allowed={"sex": ("", "m", "f")}
        | {column: (0, 1) for columns in alignments.values() for column in columns if "nmi_" in column},
        complete=complete,
        reasons={reason: text.format(**words) for reason, text in REASONS.items()},
        optional={"slice_splits": "str", "leaks": "Int64"}
        | {f"{name}_{end}": "Float64" for name in names for end in ("low", "high")},
    )


IXI = ixi_schema(DEFAULT_MODALITIES, DEFAULT_REFERENCE)
"""The manifest of `ixi-t1-t2`."""


def _has_label(table: pd.DataFrame) -> Any:
    return table["label"].notna()


DIGITS = Schema(
    dtypes=_HEAD
    | {"label": "Int64"}
    | {f"{name}_{column}": "Float64" for name in ("sketch", "digit") for column in ("p_low", "p_high")},
    steps={"found": (), "used": ("empty_image",)},
    arrays=("sketch", "digit"),
    allowed={"label": (0, 9)},
    complete=_has_label,
    reasons=REASONS,
)

SCHEMAS = {name: ixi_schema(*chosen) for name, chosen in DATASETS.items()} | {"digits": DIGITS}
"""The schema of each dataset."""
