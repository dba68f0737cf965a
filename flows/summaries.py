"""Tables that summarise a version or a run: printed by the command line, and shown as artifacts on a Prefect server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pandas as pd

from ixi_etl.core.text import quantity


class Summary(NamedTuple):
    """A table with its title: `shown` for people, `records` for scripts; `terms` explains words in it."""

    title: str
    shown: pd.DataFrame
    records: Any
    terms: Mapping[str, str] = {}


def funnel_summary(table: pd.DataFrame, name: str) -> Summary:
    """How many subjects of a version of dataset `name` are left after each step, by site, given its manifest."""
    from ixi_etl.dataset import manifest
    from ixi_etl.dataset.schema import SCHEMAS
    from ixi_etl.scans.site_tables import flatten, site_table_to_records

    funnel = manifest.funnel(table, SCHEMAS[name])
    return Summary("Subjects left after each step", flatten(funnel), site_table_to_records(funnel))


def exclusions_summary(table: pd.DataFrame) -> Summary:
    """Excluded subjects of a manifest by reason and site; an empty table if every subject is used."""
    from ixi_etl.dataset import manifest
    from ixi_etl.scans.site_tables import flatten, site_table_to_records

    exclusions = manifest.exclusions(table)
    return Summary("Excluded subjects by reason", flatten(exclusions), site_table_to_records(exclusions))


def evaluation_summary(folder: Path, evaluation: str = "evaluation-test") -> Summary | None:
    """Scores of a generator and of the baselines under each protocol; None if the evaluation is missing.

    The standard deviation is shown where there is room for it; the records have it for every measure.
    """
    import pandas as pd

    from ixi_etl.core.files import read_json
    from model.protocols import DOCS, MEASURES

    result = read_json(folder / f"{evaluation}.json")
    if not result:
        return None
    summary = result["summary"]
    measures = [m for m in MEASURES if any(row.get(f"{m}_mean") is not None for row in summary)]
    rows, last = [], None
    for row in summary:
        key = row.get("protocol", "ours"), row["mask"]  # evaluations by older code have one protocol
        rows.append(dict(zip(("protocol", "mask"), ("", "") if key == last else key, strict=True)))
        rows[-1] |= {"method": row["method"]} | {MEASURES[m].title: _shown(row, m) for m in measures}
        last = key
    subjects = quantity(summary[0]["subjects"], "subject")
    title = f"{result['split']}: {subjects}, mean (sd); {result['normalisation']}; see {DOCS}"
    terms = {name: f"{p['definition']} {p['link']}" for name, p in result.get("protocols", {}).items()}
    return Summary(title, pd.DataFrame(rows), summary, terms)


def last_sample_sheet(folder: Path) -> Path | None:
    """The newest sample sheet of a run, in grey."""
    return max((folder / "samples").glob("*-gray.png"), default=None)


def _shown(row: Mapping[str, Any], measure: str) -> str:
    """The mean, for measures of all protocols with the standard deviation; a dash for what is not finite."""
    from model.protocols import MEASURES

    mean, sd, digits = row.get(f"{measure}_mean"), row.get(f"{measure}_std"), MEASURES[measure].digits
    is_common = measure in ("psnr", "ssim")
    spread = f" ({sd:.{digits}f})" if is_common and sd is not None else ""  # one subject has none
    return ("-" if mean is None else f"{mean:.{digits}f}") + spread
