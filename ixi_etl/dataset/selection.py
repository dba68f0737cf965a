"""Screen subjects by their headers, with the exclusion rules that need no voxels.

`schema.REASONS` lists all reasons, in the order of the checks. Checks that need voxels are in `scans` and `pairing`;
CONTRIBUTING.md says where each kind of check belongs.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import pandas as pd

from ixi_etl.config import DatasetConfig
from ixi_etl.dataset.manifest import to_records
from ixi_etl.dataset.schema import CANDIDATE, EXCLUDED, REASONS, SCHEMAS
from ixi_etl.dataset.splits import person_of
from ixi_etl.modalities import archive_name
from ixi_etl.scans.affines import ALIGNED, Form, choose_spaces, forms_differ, space_name
from ixi_etl.scans.demographics import canonical_person
from ixi_etl.scans.survey import modal_depths

T = TypeVar("T")

SPACING_TOLERANCE = 0.1
"""Relative to the modal spacing. IXI's T2s have slices of 1.20 to 1.28 mm, within 4% of the modal 1.25 mm, and its T1s
pixels of 0.9375 or 0.9766 mm, 4% apart. The next spacing that occurs, 4.98 mm of IXI014, gives no slab of 25 mm."""


def screen_headers(
    survey_table: pd.DataFrame,
    dataset_config: DatasetConfig,
    demographics: Mapping[str, Mapping[str, Any]] | None = None,
) -> pd.DataFrame:
    """One manifest row per subject of the survey: `excluded` by its headers, or a `candidate` to be cut.

    `demographics` is person (`IXI002`) -> {"age", "sex"}; both stay empty for persons without an entry.
    """
    schema, modalities = SCHEMAS[dataset_config.name], dataset_config.modalities
    volumes = survey_table[survey_table["subject_id"] != ""]
    subjects: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for record in to_records(volumes):
        subjects.setdefault(record["subject_id"], {m: [] for m in modalities})[record["modality"]].append(record)
    flags = {subject: _use_common_space(scans) for subject, scans in subjects.items()}
    records = [record for scans in subjects.values() for members in scans.values() for record in members]
    checks = HeaderChecks(modal_depths(volumes), records, dataset_config)
    rows = []
    for subject, scans in sorted(subjects.items()):
        failures = checks.check(scans)
        reason, detail = min(failures, key=lambda failure: list(REASONS).index(failure[0]), default=("", ""))
        row: dict[str, Any] = {
            "subject_id": subject,
            "site": next(record["site"] for members in scans.values() for record in members),
            "status": EXCLUDED if reason else CANDIDATE,
            "reason": reason,
            "detail": detail,
            "flags": ",".join([*flags[subject], *checks.kept_without(scans)]),
            **((demographics or {}).get(canonical_person(person_of(subject)), {})),
        }
        for modality, members in scans.items():
            if members:
                columns = ("member", "depth", "shape", "spacing_mm", "orientation")
                row |= {f"{modality.lower()}_{c}": members[0][c] for c in columns}
        rows.append(row)
    return schema.typed(pd.DataFrame(rows, columns=schema.columns))


def _use_common_space(scans: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """Choose a common space for a subject's scans, set their spacing and orientation in place, and return the flags.

    The cut uses the same `choose_spaces`. Without a common space, one record gets the reason `bad_affine`: the first
    that shares no space with the first scan, or else the last.
    """
    first = [members[0] for members in scans.values() if members]
    if len(first) < 2 or any(record["reason"] for record in first):
        return []
    forms = [{int(code): Form.from_record(f) for code, f in json.loads(r["forms"]).items()} for r in first]
    spaces = choose_spaces(*forms)
    if spaces is None:
        number = next((n for n, other in enumerate(forms) if choose_spaces(forms[0], other) is None), -1)
        names, notes = [], ""
        for of_scan in (forms[0], forms[number]):
            names.append(" or ".join(f"{space_name(c)} (code {c})" for c in sorted(of_scan)))
            notes += "".join(f"; {form.note}" for form in of_scan.values() if form.note)
        other = first[0]["modality"]
        problem = f"no common space with the {other}: the affine is in {names[1]}, the {other}'s in {names[0]}{notes}"
        first[number] |= {"reason": "bad_affine", "problem": problem}
        return []
    chosen = [of_scan[space] for of_scan, space in zip(forms, spaces, strict=True)]
    for record, form in zip(first, chosen, strict=True):
        record |= {"spacing_mm": json.dumps(form.spacing_mm), "orientation": form.orientation}
    conditions = {
        "forms_differ": any(forms_differ(of_scan) for of_scan in forms),
        "unlike_spaces": len(set(spaces)) > 1,
        "template_space": max(spaces) > ALIGNED,
        "affine_not_pixdim": any(form.note for form in chosen),
    }
    return [flag for flag, holds in conditions.items() if holds]


class HeaderChecks:
    """Checks that need headers only, against the modal depth and grid of all volumes."""

    def __init__(self, depth: Mapping[str, int], volumes: list[dict[str, Any]], dataset_config: DatasetConfig) -> None:
        self.dataset_config = dataset_config
        self.modalities = dataset_config.modalities
        self.are_files = any(record["location"].endswith((".nii", ".nii.gz")) for record in volumes)
        self.modal_depth = depth
        self.modal_grid: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {}
        for modality in self.modalities:
            readable = [record for record in volumes if record["modality"] == modality and record["reason"] == ""]
            grids = [self._grid(record) for record in readable]
            # Rounded to hundredths of a millimetre, because scanners write spacings with noise in the last digits.
            spacings = [tuple(round(mm, 2) for mm in spacing) for _, spacing in grids]
            self.modal_grid[modality] = (_mode(shape[:2] for shape, _ in grids) or (), _mode(spacings) or ())

    def _grid(self, record: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Shape and spacing (mm) along the axes of the slab: I, J, K (index pairing) or x, y, z (anatomical)."""
        shape, spacing = json.loads(record["shape"]), json.loads(record["spacing_mm"])
        axes = [0, 1, 2]
        if self.dataset_config.pairing == "anatomical":
            axes.sort(key=lambda axis: "RLAPSI".index(record["orientation"][axis]))
        return tuple(shape[a] for a in axes), tuple(spacing[a] for a in axes)

    def check(self, scans: Mapping[str, list[dict[str, Any]]]) -> list[tuple[str, str]]:
        """(reason, detail) of every failed check, T1 before T2 before others."""
        kept_without = self.kept_without(scans)
        missing = [m for m in self.modalities if not scans[m] and f"missing_{m.lower()}" not in kept_without]
        failures = [(f"missing_{m.lower()}", f"{m}: no {self._count_members(m)}") for m in missing]
        for modality in self.modalities:
            if len(scans[modality]) > 1:
                names = ", ".join(record["member"] for record in scans[modality])
                found = f"{len(scans[modality])} {self._count_members(modality, plural=True)}"
                failures.append(("duplicate_member", f"{modality}: {found}; expected 1: {names}"))
            for record in scans[modality][:1]:
                if record["reason"] in (
                    "",
                    "grid_not_modal",
                ):  # the latter: too large a volume
                    failures += self._check_depth(modality, record)
                if record["reason"]:
                    failures.append((record["reason"], f"{modality}: {record['problem']}"))
                else:
                    failures += self._check_grid(modality, record)
        return failures

    def _count_members(self, modality: str, *, plural: bool = False) -> str:
        """What is counted, after a number: `member in IXI-T1.tar`, or `file` in a folder of volumes."""
        ending = "s" if plural else ""
        return f"file{ending}" if self.are_files else f"member{ending} in {archive_name(modality)}"

    def kept_without(self, scans: Mapping[str, list[dict[str, Any]]]) -> list[str]:
        """`missing_pd` and so on, for the modalities without which `incomplete = keep` keeps the subject."""
        missing = [m for m in self.dataset_config.moving if not scans[m]]
        is_kept = (
            self.dataset_config.incomplete == "keep"
            and bool(scans[self.dataset_config.reference])
            and len(missing) < len(self.dataset_config.moving)
        )
        return [f"missing_{m.lower()}" for m in missing] if is_kept else []

    def _check_depth(self, modality: str, record: Mapping[str, Any]) -> list[tuple[str, str]]:
        depth, modal = int(record["depth"]), self.modal_depth[modality]
        if depth == modal or self.dataset_config.depth != "modal":
            return []
        return [("depth_not_modal", f"{modality}: {depth} slices; the modal depth is {modal}")]

    def _check_grid(self, modality: str, record: Mapping[str, Any]) -> list[tuple[str, str]]:
        failures: list[tuple[str, str]] = []
        if modality != self.dataset_config.reference and self.dataset_config.pairing == "anatomical":
            return failures  # it is resampled, whatever its grid
        plane, spacing = self.modal_grid[modality]
        shape, size_mm = self._grid(record)
        if shape[:2] != plane:
            failures.append(
                (
                    "grid_not_modal",
                    f"{modality}: slices of {_sizes(shape[:2])} voxels; the modal size is {_sizes(plane)}",
                )
            )
        elif any(abs(a - b) > SPACING_TOLERANCE * b for a, b in zip(size_mm, spacing, strict=True)):
            failures.append(
                (
                    "grid_not_modal",
                    f"{modality}: voxels of {_sizes(size_mm)} mm; the modal spacing is {_sizes(spacing)} mm",
                )
            )
        elif self.dataset_config.pairing == "index" and plane != self.modal_grid[self.modalities[0]][0]:
            first, needed = self.modalities[0], _sizes(self.modal_grid[self.modalities[0]][0])
            problem = f"{modality}: slices of {_sizes(plane)} voxels; index pairing needs the {first}'s size, {needed}"
            failures.append(("grid_not_modal", problem))
        if self.dataset_config.window_in(shape[2]) is None:
            window, kind = (
                self.dataset_config.window,
                "middle" if self.dataset_config.slice_rule == "middle" else "largest",
            )
            slices = (
                f"of the {kind} {self.dataset_config.slices}" if window == "middle" else f"[{window[0]}, {window[1]})"
            )
            margin = f" with a margin of {self.dataset_config.margin}" if self.dataset_config.margin else ""
            problem = f"{modality}: {shape[2]} slices; the window {slices}{margin} does not fit"
            failures.append(("grid_not_modal", problem))
        return failures


def _mode(values: Iterable[T]) -> T | None:
    """The most common value; the largest if several are equally common."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value), default=None)


def _sizes(numbers: Iterable[float]) -> str:
    return " x ".join(f"{n:g}" for n in numbers)
