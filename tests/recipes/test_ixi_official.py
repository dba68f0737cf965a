"""check-official: archives that are as published agree in every fact, and each fact that differs is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ixi_etl.recipes.ixi_official import compare_with_published, differences_message
from ixi_etl.scans.demographics import Demographics, read_demographics
from ixi_etl.scans.survey import survey
from ixi_etl.testing.phantom import grid_affine, pack_nifti, rigid, write_tar

MD5S = {"IXI-T1.tar": True, "IXI-T2.tar": True}


@cache
def empty_volume(depth: int, spacing_mm: tuple[float, ...], orientation: str, slope: float) -> bytes:
    """A gzipped volume of zeros, tilted by 6 degrees."""
    affine = rigid((6, 0, 0), (0, 0, 0)) @ grid_affine((256, 256, depth), spacing_mm, orientation)
    return pack_nifti(np.zeros((depth, 256, 256), "<i2"), affine, slope)


def subjects_as_published() -> Iterator[tuple[str, str, int, int, tuple[float, ...], tuple[float, ...]]]:
    """Subject, modalities, depths and spacings of T1 and T2, in the published numbers."""
    t1_depths = [150] * 503 + [146] * 74 + [140] * 2 + [130] * 2 + [150]  # the last one is for the T2 without a T1
    numbers = [116, 182, 309, 500, 14, 580]
    others = (n for n in range(1, 700) if n not in numbers)
    numbers = [*numbers[:5], *(next(others) for _ in range(576)), 580]
    for place, number in enumerate(numbers):
        modalities = "T1" if place < 4 else "T2" if number == 580 else "T1 T2"
        depth = t1_depths[place]
        site = "IOP" if depth == 146 else "HH" if place % 3 else "Guys"
        t2_depth = (
            28 if number == 14 else 136 if site == "IOP" else (112, 116, 120, 130)[place % 4] if site == "HH" else 130
        )
        in_plane = 0.9766 if 20 <= place < 25 else 0.9375
        thickness = 4.98 if number == 14 else (1.25, 1.2, 1.28)[place % 3]
        name = f"IXI{number:03d}-{site}-{1000 + place}"
        yield name, modalities, depth, t2_depth, (in_plane, in_plane, 1.2), (0.9375, 0.9375, thickness)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    folder = tmp_path_factory.mktemp("official")
    members: dict[str, dict[str, bytes]] = {"T1": {}, "T2": {}}
    for place, (name, modalities, t1_depth, t2_depth, t1_mm, t2_mm) in enumerate(subjects_as_published()):
        slope = 1.5 if place % 2 else 1.0
        if "T1" in modalities:
            members["T1"][f"{name}-T1.nii.gz"] = empty_volume(t1_depth, t1_mm, "PSR", slope)
        if "T2" in modalities:
            members["T2"][f"{name}-T2.nii.gz"] = empty_volume(t2_depth, t2_mm, "LAS", 1.0)
    for modality in members:
        write_tar(folder / f"IXI-{modality}.tar", members[modality])
    return survey({m: str(folder / f"IXI-{m}.tar") for m in members})


@pytest.fixture(scope="module")
def demographics(table: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Demographics:
    """619 rows: 26 ids have two rows, and 15 people with a T1 have none."""
    people = sorted(table.loc[table["modality"] == "T1", "subject_id"].str.partition("-")[0])
    rows = people[15:] + people[15:41] + [f"IXI{n}" for n in range(800, 827)]
    path: Path = tmp_path_factory.mktemp("people") / "IXI.csv"
    path.write_text("IXI_ID,SEX_ID,AGE\n" + "".join(f"{person[3:]},1,40\n" for person in rows))
    return read_demographics(path)


def test_archives_as_published_agree_in_every_fact(table: pd.DataFrame, demographics: Demographics) -> None:
    findings = compare_with_published(table, MD5S, demographics)
    assert [f for f in findings if f.agrees is not True] == []
    assert differences_message(findings) is None


def test_what_is_not_at_hand_is_not_called_a_difference(table: pd.DataFrame) -> None:
    findings = compare_with_published(table, {"IXI-T1.tar": None, "IXI-T2.tar": None}, None)
    assert [f.fact for f in findings if f.agrees is None] == ["MD5 of IXI-T1.tar", "MD5 of IXI-T2.tar", "IXI.xls"]
    assert differences_message(findings) is None


Change = Callable[[pd.DataFrame], pd.DataFrame]


def set_one(modality: str, column: str, value: object) -> Change:
    """Set one column of one volume from Guys."""

    def change(table: pd.DataFrame) -> pd.DataFrame:
        plain = (
            (table["modality"] == modality) & (table["site"] == "Guys") & ~table["subject_id"].str.contains("IXI014")
        )
        table.at[table.index[plain][5], column] = value
        return table

    return change


def set_where(column: str, value: object, where: str) -> Change:
    """Set a column of all volumes that a query selects."""

    def change(table: pd.DataFrame) -> pd.DataFrame:
        table.loc[table.eval(where), column] = value
        return table

    return change


def drop_one(modality: str) -> Change:
    return lambda table: table.drop(table.index[table["modality"] == modality][300])


TILTED = rigid((25, 0, 0), (0, 0, 0)) @ grid_affine((256, 256, 150), (0.9375, 0.9375, 1.2), "PSR")


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (
            drop_one("T1"),
            {
                "T1 volumes",
                "pairs of T1 and T2",
                "people with T2 only",
                "T1 depths (slices: volumes)",
                "T1 spacing, mm (volumes)",
            },
        ),
        (drop_one("T2"), {"T2 volumes", "pairs of T1 and T2", "people with T1 only"}),
        (set_one("T1", "depth", 151), {"T1 depths (slices: volumes)"}),
        (set_one("T1", "problem", "the stream is cut short"), {"members that cannot be used"}),
        (set_one("T1", "member", "IXI/IXI002-Guys-0828-T1.nii.gz"), {"members in folders"}),
        (set_one("T1", "site", "UCL"), {"sites"}),
        (set_one("T1", "orientation", "RAS"), {"T1 orientation as stored"}),
        (set_one("T2", "orientation", "LPS"), {"T2 orientation as stored"}),
        (set_one("T1", "shape", "[256, 240, 150]"), {"T1 voxels in the plane"}),
        (set_one("T2", "shape", "[240, 256, 130]"), {"T2 voxels in the plane"}),
        (set_one("T1", "spacing_mm", "[0.9375, 0.9375, 1.3]"), {"T1 spacing, mm (volumes)"}),
        (set_one("T2", "spacing_mm", "[0.9375, 0.9375, 2.5]"), {"T2 spacing, mm, without thick slices"}),
        (set_where("affine", json.dumps(TILTED.tolist()), "modality == 'T1'"), {"T1 tilt, degrees"}),
        (set_where("affine", json.dumps(TILTED.tolist()), "modality == 'T2'"), {"T2 tilt, degrees"}),
        (set_one("T2", "dtype", "<f4"), {"type of voxels"}),
        (set_one("T2", "qform_code", 2), {"sform/qform codes"}),
        (set_one("T2", "note", "sform and qform differ by 3 mm"), {"headers with contradictions"}),
        (set_where("slope", 1.0, "slope != 1"), {"slope other than 1"}),
        (set_where("depth", 131, "modality == 'T2' and depth == 130"), {"T2 modal depth", "T2 depths of HH"}),
        (set_where("depth", 140, "modality == 'T2' and site == 'IOP'"), {"T2 depths of IOP"}),
        (set_where("depth", 40, "modality == 'T2' and depth == 28"), {"T2 of IXI014"}),
    ],
)
def test_each_fact_that_differs_is_named(
    table: pd.DataFrame, demographics: Demographics, change: Change, facts: set[str]
) -> None:
    findings = compare_with_published(change(table.copy()), MD5S, demographics)
    assert {f.fact for f in findings if f.agrees is False} == facts
    message = differences_message(findings)
    assert message is not None
    assert all(fact in message for fact in facts)


def test_archives_without_volumes_differ(table: pd.DataFrame) -> None:
    """A mistaken archive gets a table, not a traceback."""
    findings = compare_with_published(table[:0], MD5S, None)
    assert {"T1 volumes", "T2 of IXI014", "T1 tilt, degrees"} <= {f.fact for f in findings if f.agrees is False}


def test_long_lists_of_people_are_shortened(table: pd.DataFrame) -> None:
    findings = compare_with_published(table[table["modality"] == "T1"], MD5S, None)
    (only_t1,) = (f.found for f in findings if f.fact == "people with T1 only")
    assert only_t1.count(",") == 10
    assert only_t1.endswith(", 571 more")


def test_another_archive_and_another_table_of_people_are_named(table: pd.DataFrame, demographics: Demographics) -> None:
    fewer = Demographics(demographics.people, dict(list(demographics.rows.items())[1:]), [])
    findings = compare_with_published(table, {"IXI-T1.tar": False, "IXI-T2.tar": True}, fewer)
    differing = {
        "MD5 of IXI-T1.tar",
        "rows of IXI.xls",
        "ids with several rows (their rows)",
        "T1 people without a row",
    }
    assert {f.fact for f in findings if f.agrees is False} == differing
