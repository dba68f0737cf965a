"""How many dB is a protocol worth? Measured on simulated archives, so no figure is one on IXI::

    make protocols                                     # minutes on two cores
    python -m benchmarks.protocols --out OUT --quick   # a trial with tiny networks

1. The metric: the same generators, measured by every protocol of `model.protocols`.
2. The split: generators trained on as many slices, of other subjects than those of the test, or of the same ones.
3. The registration: the source of each subject is displaced by 0 to 4 mm, to train and to test.
4. The crop and the mask: the same generators, measured over other regions of the slices.

All by the published recipe with smaller networks, with two seeds. OUT receives `protocols.md` (the tables),
`protocols.json` (the same), and `protocols.svg` and `.png` (a figure).
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from benchmarks.protocol_data import BY_SUBJECT, OWN_TEST, SAME_SLICES, SPLITS, make_dataset
from benchmarks.protocol_figure import draw
from benchmarks.protocol_study import HEAD, SEEDS, WHOLE, Budget, Scores, run_all
from ixi_etl.core.files import to_json, write_atomic
from ixi_etl.core.parallel import usable_cores
from model.baselines import MAPPING, MEAN_TARGET, SOURCE
from model.evaluate import GENERATED, summarise

QUICK = Budget(subjects=2, slices=4, shrink=4, side=64, width=4, steps=10)
MEASURES = ("psnr", "ssim")
BASELINES = (SOURCE, MEAN_TARGET, MAPPING)
DIGITS = {"psnr": 2, "ssim": 3}

TITLES = {
    "metric": "1. The same generators under every metric",
    "split": "2. Split by subject or by file",
    "registration": "3. Registration error put in on purpose",
    "region": "4. The same generators over other regions",
}
NOTES = {
    "metric": "Mean of the seeds; `_spread` is the difference between them. The last columns are of the baselines.",
    "split": "All training sets have equally many pairs, and `psnr` is on the same slices, which are in none of them. "
    "`by subject` has no test subject. `by file` has half of the slices of twice as many subjects, the test subjects "
    "among them; `by subject, twice as many` likewise, without the test subjects: the leak is worth the difference "
    "between these two.",
    "registration": "Each subject's T1 is displaced by this distance, in a random direction, in training and in test. "
    "`psnr_change` is from 0 mm.",
    "region": "The definition is that of `ours`; only the pixels that count differ. `share` is that of the pixels.",
}


def over_seeds(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Mean over the seeds of each measure, and `_spread`, the difference between the largest and the smallest.

    `table` has a row for each seed and `keys`.
    """
    groups = table.groupby(keys, sort=False)[list(MEASURES)]
    spread = (groups.max() - groups.min()).add_suffix("_spread")
    columns = [column for measure in MEASURES for column in (measure, f"{measure}_spread")]
    return groups.mean().join(spread)[columns].reset_index()


def over_subjects(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """The mean over the subjects for each seed and `keys`, as the protocol `ours` averages."""
    return table.groupby([*keys, "seed"], sort=False)[list(MEASURES)].mean().reset_index()


def metric_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """A row per protocol and mask: scores of the generators, and the PSNR of each baseline."""
    summaries = [summarise(part).assign(seed=seed) for seed, part in metrics.groupby("seed")]
    renamed = pd.concat(summaries).rename(columns={f"{measure}_mean": measure for measure in MEASURES})
    table = over_seeds(renamed, ["protocol", "mask", "method"])
    generated = table[table["method"] == GENERATED].drop(columns="method")
    others = table[table["method"] != GENERATED].pivot(index=["protocol", "mask"], columns="method", values="psnr")
    return generated.join(others[list(BASELINES)].add_prefix("psnr, "), on=["protocol", "mask"])


def split_table(regions: pd.DataFrame) -> pd.DataFrame:
    """A row per region and training set: scores on the same slices, and PSNR on the own test split."""
    exact = regions[(regions["error_mm"] == 0) & regions["region"].isin([WHOLE, HEAD])]
    keys = ["region", "split"]
    same, own = (
        over_seeds(over_subjects(exact[exact["test_on"] == test_on], keys), keys) for test_on in (SAME_SLICES, OWN_TEST)
    )
    same.insert(2, "psnr_own_test", same[keys].merge(own, "left", keys)["psnr"])
    order = same["split"].map({split: n for n, split in enumerate(SPLITS)}) + len(SPLITS) * (same["region"] == HEAD)
    return with_changes(same.iloc[order.argsort()].reset_index(drop=True), "region")


def registration_table(regions: pd.DataFrame) -> pd.DataFrame:
    """A row per region and error."""
    chosen = of_plain_splits(regions)
    chosen = chosen[chosen["region"].isin([WHOLE, HEAD])]
    table = over_seeds(over_subjects(chosen, ["region", "error_mm"]), ["region", "error_mm"])
    return with_changes(table.sort_values("region", ascending=False, kind="stable", ignore_index=True), "region")


def region_table(regions: pd.DataFrame) -> pd.DataFrame:
    """A row per region, with the change from the whole slice."""
    chosen = of_plain_splits(regions)
    chosen = chosen[chosen["error_mm"] == 0]
    table = over_seeds(over_subjects(chosen, ["region"]), ["region"])
    shares = chosen.groupby("region")["share"].mean()
    table.insert(1, "share", table["region"].map(shares))
    return with_changes(table)


def of_plain_splits(regions: pd.DataFrame) -> pd.DataFrame:
    """The scores of splits by subject, on their own test split."""
    return regions[(regions["split"] == BY_SUBJECT) & (regions["test_on"] == OWN_TEST)]


def with_changes(table: pd.DataFrame, group: str | None = None) -> pd.DataFrame:
    """The table with the change of each measure from the first row, or from the first row of the `group`."""
    for measure in MEASURES:
        values = table[measure]
        first = values.iloc[0] if group is None else values.groupby(table[group]).transform("first")
        table[f"{measure}_change"] = values - first
    return table


def make_tables(scores: Scores) -> dict[str, pd.DataFrame]:
    return {
        "metric": metric_table(scores.metrics),
        "split": split_table(scores.regions),
        "registration": registration_table(scores.regions),
        "region": region_table(scores.regions),
    }


def markdown(table: pd.DataFrame) -> str:
    """A table with rounded numbers, and `-` for those that do not exist."""

    def shown(column: str, value: object) -> str:
        if not isinstance(value, float):
            return str(value)
        if math.isnan(value):
            return "-"
        digits = next((n for measure, n in DIGITS.items() if column.startswith(measure)), 2)
        is_signed = "_change" in column
        return f"{value:{'+' if is_signed else ''}.{digits}f}"

    lines = [list(map(str, table.columns)), ["---"] * len(table.columns)]
    lines += [[shown(str(c), value) for c, value in row.items()] for row in table.to_dict("records")]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(tables: Mapping[str, pd.DataFrame], budget: Budget) -> str:
    """All tables as Markdown."""
    settings = ", ".join(f"{name} {value}" for name, value in asdict(budget).items())
    parts = [f"Simulated: no figure is one on IXI. T1 to T2; {settings}; seeds {', '.join(map(str, SEEDS))}."]
    parts += [f"## {TITLES[name]}\n\n{NOTES[name]}\n\n{markdown(table)}" for name, table in tables.items()]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("protocols"), help="folder to write into; %(default)s")
    parser.add_argument("--quick", action="store_true", help="tiny networks on small slices; ignore the results")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="trainings at a time; %(default)s")
    given = parser.parse_args()
    start = time.perf_counter()
    run(given.out, QUICK if given.quick else Budget(), given.workers)
    print(f"{given.out}: protocols.md, .json, .svg and .png, in {time.perf_counter() - start:.0f} s")


def run(out: Path, budget: Budget, workers: int) -> dict[str, pd.DataFrame]:
    """Do the whole study, write its files into `out`, and return its tables."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(Path(folder), budget.subjects, budget.slices, budget.shrink, workers)
        tables = make_tables(run_all(dataset, budget, workers))
    out.mkdir(parents=True, exist_ok=True)
    records = {name: json.loads(table.to_json(orient="records")) for name, table in tables.items()}
    write_atomic(out / "protocols.json", to_json({"simulated": True, "budget": asdict(budget), **records}))
    write_atomic(out / "protocols.md", page(tables, budget))
    draw(tables, out)
    return tables


if __name__ == "__main__":
    main()
