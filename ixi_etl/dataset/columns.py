"""What each column of a manifest means: type, unit and a sentence, for `columns.csv` and `croissant.json`.

Names, types and order come from the schema, so they cannot differ from those of the manifest.
"""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from ixi_etl.dataset.schema import SCHEMAS, matrix_column, pair_column
from ixi_etl.modalities import DATASETS, moving

TYPES = {"str": "text", "Int64": "integer", "Float64": "number"}
"""dtype of the schema -> word in the dictionary; text that holds JSON is called `JSON` there."""

_HEAD = {
    "subject_id": ("", "name of the subject; all before the first - names the person"),
    "site": ("", "hospital, from the name of the scan; empty if unknown"),
    "status": ("", "used: the subject is in the store; excluded: it is not"),
    "reason": ("", "why the subject is excluded, as a code; empty if it is used"),
    "detail": ("", "why the subject is excluded, in words, with measured and allowed values"),
    "split": ("", "train, val or test; mixed if the slices of the subject are in several; empty if excluded"),
    "store_row": ("", "index of the subject along the first axis of the arrays; empty if excluded"),
    "age": ("years", "age of the person; empty if unknown"),
    "sex": ("", "m or f; empty if unknown"),
    "flags": ("", "comma-separated marks of data that deserve a look; they exclude nobody"),
    "label": ("", "the digit, 0 to 9"),
    "slice_splits": ("", "comma-separated split of each target slice"),
    "leaks": ("", "1 if the person has slices in both train and test, otherwise 0"),
}
_OF_ARRAY = {
    "member": ("", "name of the {scan} in its archive or folder"),
    "sha256": ("", "SHA-256 of the file of the {scan} as found, compressed if it was"),
    "depth": ("slices", "number of slices of the {scan} as stored: the length of its third axis"),
    "shape": ("voxels", "size of the {scan} along its axes i, j, k as stored"),
    "spacing_mm": ("mm", "voxel size of the {scan} along i, j, k"),
    "orientation": ("", "directions of the axes i, j, k of the {scan}, for example PSR: posterior, superior, right"),
    "window_start": (
        "slices",
        "first slice of the {scan} that was cut; empty if the slab is on the slices of another scan",
    ),
    "window_stop": ("slices", "one past the last slice of the {scan} that was cut"),
    "p_low": ("stored values", "percentile 0.1 of the slab {array} of the store"),
    "p_high": ("stored values", "percentile 99.9 of the slab {array} of the store"),
    "gzip_crc32": ("", "CRC-32 of the inflated {scan}, from its gzip file; empty if it is not one"),
    "scale": ("", "stored value of {array} x scale + offset = the scanner's units"),
    "offset": ("", "stored value of {array} x scale + offset = the scanner's units"),
    "low": ("stored values", "stored value of {array} that becomes 0 when the slab is normalised"),
    "high": ("stored values", "stored value of {array} that becomes 1 when the slab is normalised"),
}
_OF_PAIR = {
    "motion_mm": ("mm", "mean displacement between the {scan} and the {reference} that registration removed"),
    "motion_deg": ("degrees", "rotation between the {scan} and the {reference} that registration removed"),
    "registration_error_mm": ("mm", "estimated mean error of the registration; empty if there was none, or it failed"),
    "nmi_before": ("", "similarity (normalised mutual information, 0 to 1) of the pair by the headers alone"),
    "nmi_after": ("", "similarity (normalised mutual information, 0 to 1) of the pair as stored"),
}
_JSON = ("_shape", "_spacing_mm", "_ras_mm")


def describe_columns(dataset: str, columns: Iterable[str]) -> pd.DataFrame:
    """One row per column, in the order of the manifest: column, type, unit, meaning.

    Args:
        dataset: name of the dataset, for example `ixi-t1-t2`.
        columns: those of the manifest.
    """
    meanings = _meanings(dataset)
    rows = [
        {
            "column": name,
            "type": "JSON" if name.endswith(_JSON) else TYPES[dtype],
            "unit": meanings[name][0],
            "meaning": meanings[name][1],
        }
        for name, dtype in SCHEMAS[dataset].dtypes_with(columns).items()
    ]
    return pd.DataFrame(rows)


def _meanings(dataset: str) -> dict[str, tuple[str, str]]:
    """Every column that a manifest of the dataset may have -> unit and meaning."""
    meanings = dict(_HEAD)
    for array in SCHEMAS[dataset].arrays:
        meanings |= {
            f"{array}_{name}": (unit, text.format(array=array, scan=array.upper()))
            for name, (unit, text) in _OF_ARRAY.items()
        }
    if dataset in DATASETS:
        modalities, reference = DATASETS[dataset]
        others = moving(modalities, reference)
        for m in others:
            meanings |= {
                pair_column(others, m, name): (unit, text.format(scan=m, reference=reference))
                for name, (unit, text) in _OF_PAIR.items()
            }
            matrix = (
                f"4 x 4, row by row: maps a point of the {reference}'s world (RAS+) to the same tissue in the {m}'s"
            )
            meanings[matrix_column(reference, m)] = ("mm", matrix)
    return meanings
