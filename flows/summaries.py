"""Tables that summarise a version or a run: printed by the command line, and shown as artifacts on a Prefect server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pandas as pd


class Summary(NamedTuple):
    """A table with its title: `shown` for people, `records` for scripts."""

    title: str
    shown: pd.DataFrame
    records: Any


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
    """Scores of a run's generator and of the baselines, mean and standard deviation over subjects; None if missing."""
    import pandas as pd

    from ixi_etl.core.files import read_json

    result = read_json(folder / f"{evaluation}.json")
    if not result:
        return None
    rows = [
        {
            "mask": row["mask"],
            "method": row["method"],
            "PSNR (dB)": _mean_sd(row, "psnr", 2),
            "SSIM": _mean_sd(row, "ssim", 3),
            "MAE": _mean_sd(row, "mae", 4),
        }
        for row in result["summary"]
    ]
    subjects = result["summary"][0]["subjects"]
    title = f"{result['split']}: {subjects} subjects, mean (sd); {result['normalisation']}, data range 1"
    return Summary(title, pd.DataFrame(rows), result["summary"])


def last_sample_sheet(folder: Path) -> Path | None:
    """The newest sample sheet of a run, in grey."""
    return max((folder / "samples").glob("*-gray.png"), default=None)


def _mean_sd(row: dict[str, Any], measure: str, digits: int) -> str:
    mean, sd = row[f"{measure}_mean"], row[f"{measure}_std"]
    spread = "" if sd is None else f" ({sd:.{digits}f})"  # one subject has no standard deviation
    return ("-" if mean is None else f"{mean:.{digits}f}") + spread
