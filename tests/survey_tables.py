"""Small survey tables and records of cut subjects for tests."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd

from ixi_etl.scans.affines import SCANNER, Form
from ixi_etl.scans.survey import COLUMNS
from ixi_etl.testing.phantom import grid_affine

CUT = {"t1_sha256": "0" * 64, "t2_sha256": "a" * 64, "t1_p_low": 0, "t1_p_high": 9, "t2_p_low": 0, "t2_p_high": 9}
CUT |= {"t2_window_start": 55, "t2_window_stop": 75}
CUT |= {"t1_scale": 1.0, "t1_offset": 0.0, "t2_scale": 0.01, "t2_offset": -3.5}
"""The part of a usable subject's record that the manifest needs."""


def volume(
    subject: str, modality: str, depth: int = 130, plane: int = 256, mm: float = 1.25, **more: Any
) -> dict[str, Any]:
    shape, spacing = (plane, plane, depth), (0.9375, 0.9375, mm)
    affine = more.pop("affine", grid_affine(shape, spacing, "LAS"))
    form = Form(affine, spacing, more.get("orientation", "LAS"))
    return dict.fromkeys(COLUMNS, "") | {
        "subject_id": subject,
        "site": subject.split("-")[1],
        "modality": modality,
        "member": f"{subject}-{modality}.nii.gz",
        "shape": json.dumps(shape),
        "depth": depth,
        "spacing_mm": json.dumps(spacing),
        "orientation": "LAS",
        "affine": json.dumps(affine.tolist()),
        "forms": json.dumps({SCANNER: form.to_record()}),
        "readable": True,
        **more,
    }


def table_of(rows: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=COLUMNS)


def pair(subject: str, **t2: Any) -> list[dict[str, Any]]:
    return [volume(subject, "T1", 150), volume(subject, "T2", **t2)]
