"""The files by which the folder of a version explains itself: `README.md`, `LICENSE.txt` and `columns.csv`.

They depend on `dataset.json` and the manifest alone, like every other file of a version.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ixi_etl.core.files import write_atomic
from ixi_etl.dataset.columns import describe_columns
from ixi_etl.dataset.command import FILES, TABLE, command_of
from ixi_etl.dataset.credit import is_all_share_alike
from ixi_etl.dataset.datasheet import Datasheet
from ixi_etl.dataset.metadata import (
    COLUMNS,
    COMPARED,
    COMPARED_PAGE,
    CROISSANT,
    LICENCE_TEXT,
    MANIFEST,
    METADATA,
    PICTURES,
    README,
    REPORT,
    SOFTWARE,
)
from ixi_etl.dataset.store import STORE, open_arrays
from ixi_etl.modalities import DATASETS
from ixi_etl.sources.catalog import LICENCE

LEGAL_CODE = Path(__file__).parents[1] / "templates" / "CC-BY-SA-3.0.txt"
"""Creative Commons Attribution-ShareAlike 3.0 Unported, the text of the SPDX licence list."""

_FILES = {
    STORE: "the slabs of the used subjects, a Zarr v3 group",
    MANIFEST: "one row per subject: used, or excluded with its reason",
    COLUMNS: "what each column of the manifest means: type, unit, meaning",
    REPORT: "pages with counts, histograms and pictures, for a browser",
    COMPARED_PAGE: "a page with the differences from the version published before this one",
    PICTURES: "a picture of each pair",
    METADATA: "configuration, inputs, counts, checks, licence, and the SHA-256 of every other file",
    SOFTWARE: "the code, libraries and platform that made this version",
    COMPARED: "the same as compared.html, for programs",
    CROISSANT: "the same facts for programs: MLCommons Croissant 1.1",
    LICENCE_TEXT: "the licence",
}


def write_documents(folder: Path, summary: Mapping[str, Any], final: pd.DataFrame, sheet: Datasheet) -> None:
    """Write the three files into a staged version.

    Args:
        folder: of the version, with all its data.
        summary: the content of `dataset.json`.
        final: the final manifest.
        sheet: the datasheet of the version.
    """
    columns = describe_columns(summary["name"], final.columns)
    write_atomic(folder / COLUMNS, columns.to_csv(index=False, lineterminator="\n"))
    write_atomic(folder / LICENCE_TEXT, licence_text(summary))
    names = {path.name for path in folder.iterdir()} | {README, METADATA, SOFTWARE, CROISSANT}
    arrays = [
        {
            "array": f"`{name}`",
            "dimensions": ", ".join(map(str, getattr(array.metadata, "dimension_names", None) or ())),
            "shape": " x ".join(map(str, array.shape)),
            "dtype": str(array.dtype),
        }
        for name, array in sorted(open_arrays(folder).items())
    ]
    files = [name for name in _FILES if name in names]
    write_atomic(folder / README, readme(summary, sheet, files, pd.DataFrame(arrays)))


def licence_text(summary: Mapping[str, Any]) -> str:
    """The legal code if all data are under CC BY-SA 3.0; otherwise what is known, and the code if some are."""
    licence, credit = summary["licence"], summary["credit"]
    code = LEGAL_CODE.read_text()
    if is_all_share_alike(summary["sources"]):
        return code
    known = f"Licence of {summary['name']}@{summary['version']}: {licence}\nCredit: {credit}\n"
    return f"{known}\n{'-' * 80}\n{code}" if LICENCE in licence else known


def readme(summary: Mapping[str, Any], sheet: Datasheet, files: Iterable[str], arrays: pd.DataFrame) -> str:
    """The text of `README.md`. Equal arguments give equal text.

    Args:
        files: names of the files and folders beside it.
        arrays: the arrays of the store, one row each.
    """
    sections = {
        "Files": _table(pd.DataFrame([{"file": f"`{name}`", "what it is": _FILES[name]} for name in files])),
        "How to load it": _loading(summary, arrays),
        "How it was made": _making(summary, sheet),
        "Datasheet": _datasheet(summary, sheet),
        "Licence and credit": (
            f"Licence: {summary['licence']}\n\nCredit: {summary['credit']}\n\n[{LICENCE_TEXT}]({LICENCE_TEXT}) has "
            "what is known of the licence. Pass it and the credit on with every copy, and with everything made from "
            "this version."
        ),
        "Suggested citation": f"```bibtex\n{sheet.citation}\n```",
    }
    head = f"# {summary['name']}@{summary['version']}\n\n{sheet.what}\n"
    return head + "".join(f"\n## {title}\n\n{text}\n" for title, text in sections.items())


def _loading(summary: Mapping[str, Any], arrays: pd.DataFrame) -> str:
    source, target = summary["source"], summary["target"]
    by_percentiles = summary["inputs"]["config"].get("normalisation", "percentiles") == "percentiles"
    prefix = f"{source}_p" if by_percentiles else source
    return f"""{_table(arrays)}

This needs zarr 3 and pandas, and runs in this folder:

```python
import pandas as pd
import zarr

manifest = pd.read_csv("{MANIFEST}")
used = manifest[manifest["status"] == "used"].sort_values("store_row").reset_index()
store = zarr.open_group("{STORE}", mode="r")
source, target = store["{source}"][0], store["{target}"][0]  # of the subject used.loc[0, "subject_id"]
low, high = used.loc[0, ["{prefix}_low", "{prefix}_high"]]
source_0_to_1 = ((source - low) / (high - low)).clip(0, 1)
```

Read `split` in the manifest before you train. `ixi-etl verify --deep .` checks every byte."""


def _making(summary: Mapping[str, Any], sheet: Datasheet) -> str:
    command = command_of(summary)
    names = {FILES: "your copy of the same scans", TABLE: "your copy of the same table of age and sex"}
    hint = "".join(f" {name} stands for {meaning}." for name, meaning in names.items() if name in command.split())
    return f"""{_list(sheet.preparation)}

```sh
{command}
```

makes this version again, with the libraries that `{METADATA}` lists under `inputs`.{hint} `ixi-etl reproduce` does
that, and compares every byte."""


def _datasheet(summary: Mapping[str, Any], sheet: Datasheet) -> str:
    parts = {
        "Collection": sheet.collection,
        "Consent and ethics": sheet.consent,
        "Privacy and de-identification": _list(sheet.privacy),
        "Sites": _table(sheet.sites),
        "Age and sex": _table(sheet.people) or "Not joined: this version has no age and sex.",
        "Missing": sheet.missing,
        "Intended uses": _list(sheet.uses),
        "Not intended": _list(sheet.no_uses),
        "Limits": _list(sheet.limits),
        "Known biases": _list(sheet.biases),
    }
    if sheet.sites.empty:  # the names of the files say no site
        del parts["Sites"]
    if summary["name"] not in DATASETS:
        del parts["Age and sex"]
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in parts.items())


def _list(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _table(table: pd.DataFrame) -> str:
    """A Markdown table; "" if it has no rows."""
    if table.empty:
        return ""
    rows: list[list[str]] = [[*map(str, table.columns)], ["---"] * len(table.columns)]
    rows += table.astype(str).to_numpy().tolist()
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
