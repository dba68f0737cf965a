"""The manifest: one row per subject of the union of all archives, used or excluded with a reason.

`selection.screen_headers` makes the rows from headers alone; `finalise` adds the results of the cut. `schema` defines
the columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ixi_etl.config import SPLITS, DatasetConfig
from ixi_etl.core.text import quantity
from ixi_etl.dataset.alignment import DISSIMILAR, UNCERTAIN, Judgement, judge_alignments
from ixi_etl.dataset.normalisation import add_mean_ranges
from ixi_etl.dataset.schema import BEYOND_LIMIT, CANDIDATE, EXCLUDED, MIXED, REASONS, SCHEMAS, USED, Schema
from ixi_etl.dataset.splits import assign_splits, leaking_subjects, person_of, split_files, split_in_order
from ixi_etl.scans.site_tables import count_by_site, site_table, site_table_to_records

DUPLICATE, GRID_DIFFERS = "duplicate_scan", "grid_differs"
FLAGS = {
    "forms_differ": "the sform and the qform of a scan describe two spaces; the space that the scans share is used",
    "unlike_spaces": "one scan's affine is in scanner space and another's is aligned to something",
    "template_space": "the affines are in a template space, so voxel sizes are those of the template",
    "affine_not_pixdim": "an affine has other voxel sizes or angles than the pixdim; the affine's are used",
    GRID_DIFFERS: "the T2 and the PD, two echoes of one scan, have different grids; one is registered and interpolated",
    DUPLICATE: "the same voxels are in the archives more than once; persons who share them are in one split",
}
"""Flags set from headers and from the comparison of scans. The cut has further flags."""


def finalise(
    manifest: pd.DataFrame, records: Mapping[str, Mapping[str, Any]], dataset_config: DatasetConfig
) -> pd.DataFrame:
    """The final manifest, with the cut's `records` (subject_id -> record), splits, and dense store rows.

    Of more usable subjects than `subject_limit`, the first in the order of `subject_id` are used. A candidate beyond
    them needs no more in its record than the hashes of its members.
    """
    rows: list[dict[str, Any]] = []
    used: list[dict[str, Any]] = []
    schema = SCHEMAS[dataset_config.name]
    judged = _judge(manifest, records, dataset_config)
    for row in to_records(manifest):
        record = records[row["subject_id"]]
        flags = join_flags(row["flags"], record.get("flags"))
        row |= {column: value for column, value in record.items() if column in schema.known} | {"flags": flags}
        for judgement in judged.get(row["subject_id"], []):
            row["flags"] = join_flags(row["flags"], judgement.flag)
            if _excludes(judgement, dataset_config) and not row["reason"]:
                row |= {"reason": judgement.reason, "detail": judgement.detail}
        if row["status"] == CANDIDATE and not row["reason"] and len(used) == dataset_config.subject_limit:
            row |= {"reason": BEYOND_LIMIT, "detail": _describe_limit(dataset_config)}
        if row["status"] == CANDIDATE:
            row["status"] = EXCLUDED if row["reason"] else USED
        used += [row] if row["status"] == USED else []
        rows.append(row)
    duplicates = find_equal_scans({row["subject_id"]: records[row["subject_id"]] for row in used})
    duplicated = {subject for group in duplicates for subject, _ in group}
    for store_row, (row, split) in enumerate(zip(used, _splits_of(used, duplicates, dataset_config), strict=True)):
        row |= {"store_row": store_row} | split
        if row["subject_id"] in duplicated:
            row["flags"] = join_flags(row["flags"], DUPLICATE)
    if dataset_config.normalisation == "mean":
        add_mean_ranges(used, records, schema.arrays)
    return schema.typed(pd.DataFrame(rows, columns=[*schema.columns, *_optional_columns(schema, dataset_config)]))


def usable_subjects(
    manifest: pd.DataFrame, records: Mapping[str, Mapping[str, Any]], dataset_config: DatasetConfig
) -> list[str]:
    """The candidates with a record that `finalise` would use if there were no limit."""
    judged = _judge(manifest, records, dataset_config)
    candidates = manifest.loc[manifest["status"] == CANDIDATE, "subject_id"]
    return [
        subject
        for subject in candidates
        if "reason" not in records.get(subject, {"reason": ""})
        and not any(_excludes(judgement, dataset_config) for judgement in judged.get(subject, []))
    ]


def _judge(
    manifest: pd.DataFrame, records: Mapping[str, Mapping[str, Any]], dataset_config: DatasetConfig
) -> dict[str, list[Judgement]]:
    cut = {s: record for s, record in records.items() if "reason" not in record}
    return judge_alignments(cut, dict(zip(manifest["subject_id"], manifest["site"], strict=True)), dataset_config)


def _excludes(judgement: Judgement, dataset_config: DatasetConfig) -> bool:
    rules = {UNCERTAIN: dataset_config.uncertain, DISSIMILAR: dataset_config.low_similarity}
    return rules[judgement.reason] == "exclude"


def _describe_limit(dataset_config: DatasetConfig) -> str:
    counts = f" ({dataset_config.shown_counts})" if dataset_config.split_counts else ""
    return f"used: the first {quantity(dataset_config.subject_limit or 0, 'subject')} that can be used{counts}"


def _splits_of(
    used: Sequence[Mapping[str, Any]], duplicates: list[list[tuple[str, str]]], dataset_config: DatasetConfig
) -> list[dict[str, Any]]:
    """The columns `split` and, by file, `slice_splits` and `leaks` of each used row, in order."""
    if dataset_config.split_by == "order":
        return [{"split": split} for split in split_in_order(len(used), dataset_config.split_counts or ())]
    if dataset_config.split_by == "file":
        by_slice = split_files(len(used), dataset_config.target_slices, dataset_config)
        subjects = [row["subject_id"] for row in used]
        leaking = set(leaking_subjects(dict(zip(subjects, by_slice, strict=True)), duplicates))
        return [
            {
                "split": names[0] if len(set(names)) == 1 else MIXED,
                "slice_splits": ",".join(names),
                "leaks": int(subject in leaking),
            }
            for subject, names in zip(subjects, by_slice, strict=True)
        ]
    splits = assign_splits({person_of(row["subject_id"]) for row in used}, duplicates, dataset_config)
    return [{"split": splits[person_of(row["subject_id"])]} for row in used]


def _optional_columns(schema: Schema, dataset_config: DatasetConfig) -> list[str]:
    """The columns of `schema.optional` that a version of this configuration has."""
    return [
        name
        for name in schema.optional
        if (
            dataset_config.split_by == "file"
            if name in ("slice_splits", "leaks")
            else dataset_config.normalisation != "percentiles"
        )
    ]


def join_flags(*flags: str | None) -> str:
    """Join flags with commas; empty ones and None are left out."""
    return ",".join(flag for flag in flags if flag)


def find_equal_scans(records: Mapping[str, Mapping[str, Any]]) -> list[list[tuple[str, str]]]:
    """Groups of (subject_id, modality) with equal stored voxels, whatever their compression or description."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for subject, record in sorted(records.items()):
        for modality, digest in record.get("voxels_sha256", {}).items():
            groups.setdefault(digest, []).append((subject, modality))
    return sorted(group for group in groups.values() if len(group) > 1)


def slices_in_split(used: pd.DataFrame, split: str, slices: int) -> NDArray[np.bool_]:
    """Mask (S, `slices`) of the slices in a split, of the S used subjects; `slices` counts those without margins."""
    if "slice_splits" not in used:
        return np.repeat((used["split"] == split).to_numpy(bool)[:, np.newaxis], slices, axis=1)
    names = [row.split(",") for row in used["slice_splits"]]
    mask: NDArray[np.bool_] = np.array(names, dtype=str).reshape(-1, slices) == split
    return mask


def intensity_ranges(used: pd.DataFrame, name: str) -> NDArray[np.float64]:
    """(S, 2) stored values of the array `name` that become 0 and 1 (for a network -1 and 1); NaN where it is absent.

    They are the columns `_low` and `_high` of a version with another normalisation than percentiles, otherwise `_p_low`
    and `_p_high`.
    """
    prefix = name if f"{name}_low" in used else f"{name}_p"
    return used[[f"{prefix}_low", f"{prefix}_high"]].to_numpy(dtype=np.float64, na_value=np.nan)


def used_rows(manifest: pd.DataFrame) -> pd.DataFrame:
    """The rows of the subjects in the store, in store order."""
    return manifest[manifest["status"] == USED].sort_values("store_row")


def funnel(manifest: pd.DataFrame, schema: Schema) -> pd.DataFrame:
    """Number of subjects left after each step of the schema: one row per step, columns as in `site_table`."""
    remaining = manifest
    steps = []
    sites = sorted(set(manifest["site"]) - {""})
    for reasons in schema.steps.values():
        remaining = remaining[~remaining["reason"].isin(reasons)]
        steps.append([int((remaining["site"] == site).sum()) for site in sites] + [len(remaining)])
    counts = pd.DataFrame(steps, pd.Index(schema.steps, name="step"), [*sites, ""])
    return site_table(counts.iloc[:, :-1], counts.iloc[:, -1])


def counts(manifest: pd.DataFrame, schema: Schema) -> dict[str, Any]:
    """The counts in `dataset.json`: used subjects, subjects of each split, and the funnel.

    With a split by file also the slices of each split, and the subjects of persons with slices in both train and test.
    """
    rows = used_rows(manifest)
    steps = site_table_to_records(funnel(manifest, schema))
    by_file: dict[str, Any] = {}
    if "slice_splits" in rows:
        of_slices = [name for text in rows["slice_splits"] for name in text.split(",")]
        slices = {split: of_slices.count(split) for split in SPLITS}
        by_file = {"slices": slices, "leaking_subjects": int(rows["leaks"].sum()) if "leaks" in rows else 0}
    return {
        "subjects": len(rows),
        "splits": {str(split): int(n) for split, n in rows["split"].value_counts().sort_index().items()},
        **by_file,
        "funnel": {row["step"]: {"all": row["all"], "sites": row["sites"]} for row in steps},
    }


def exclusions(manifest: pd.DataFrame) -> pd.DataFrame:
    """Number of excluded subjects by reason, in the order of the checks; columns as in `site_table`."""
    excluded = manifest[manifest["status"] == EXCLUDED]
    return count_by_site(excluded, ["reason"]).reindex([r for r in REASONS if r in set(excluded["reason"])])


def to_records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as dictionaries."""
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]
