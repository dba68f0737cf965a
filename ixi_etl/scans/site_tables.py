"""Tables with one column per site: built from rows, flattened for display, and converted to and from JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd


def count_by_site(rows: pd.DataFrame, labels: list[str]) -> pd.DataFrame:
    """Count `rows` by `labels` (the index) and site; columns as in `site_table`."""
    counts = rows.groupby([*labels, "site"]).size().unstack("site", fill_value=0)
    return site_table(counts, counts.sum(axis=1))


def site_table(counts: pd.DataFrame, total: pd.Series) -> pd.DataFrame:
    """A table with two levels of columns: `sites`, with one column per site, and `all`.

    Two levels are needed because site names come from member names: a site may be called `all` or `depth`.
    """
    columns = [("sites", str(site)) for site in counts.columns] + [("all", "")]
    values = np.column_stack([counts.to_numpy(int), total.to_numpy(int)])
    return pd.DataFrame(values, counts.index, pd.MultiIndex.from_tuples(columns))


def sites_of(table: pd.DataFrame) -> list[str]:
    """The sites of a `site_table`."""
    return [str(column[1]) for column in table.columns if column[0] == "sites"]


def site_table_to_records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a `site_table` for JSON: its index levels by name, then `all` and `sites`."""
    labels = table.index.to_frame(index=False).to_dict("records")
    sites = [dict(zip(sites_of(table), counts, strict=True)) for counts in table.to_numpy(int)[:, :-1].tolist()]
    rows = zip(labels, table["all"].tolist(), sites, strict=True)
    return [{**{str(k): v for k, v in label.items()}, "all": total, "sites": counts} for label, total, counts in rows]


def flatten_row(labels: Mapping[str, Any], sites: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """One row for display: labels, one column per site, then `after`.

    A site with the name of another column is shown as `site NAME`. This is unique because site names have no spaces.
    """
    taken = {*labels, *after}
    return {**labels, **{f"site {site}" if site in taken else site: n for site, n in sites.items()}, **after}


def flatten(table: pd.DataFrame) -> pd.DataFrame:
    """A `site_table` for display, with its index as the first columns."""
    names = [str(name) for name in table.index.names]
    rows = [
        flatten_row({n: row[n] for n in names}, row["sites"], {"all": row["all"]})
        for row in site_table_to_records(table)
    ]
    return pd.DataFrame(
        rows, columns=list(flatten_row(dict.fromkeys(names), dict.fromkeys(sites_of(table)), {"all": 0}))
    )
