"""`report.html` of a run: losses, validation, samples over time, and the measures beside the baselines.

It is made of the files in the run's folder alone, so it can be made at any time of a training, and without torch.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from ixi_etl import charts, pages
from ixi_etl.config import SPLITS
from ixi_etl.files import read_json, write_atomic

log = logging.getLogger(__name__)

REPORT = "report.html"
SAMPLED = "samples.json"  # in the folder of the samples: the split of which they are
FRAMES = 10  # of the slider; even of noise, with 4 subjects, they take 4 MB
SMALL = 100  # pixels: smaller images are enlarged without smoothing
LISTED = 100  # subjects in the table; all stand in the CSV

MEASURES = {"psnr": ("PSNR, dB", 2), "ssim": ("SSIM", 3), "mae": ("MAE", 4)}
LOSSES = {
    "Generator: reconstruction": {"reconstruction": "loss_g_reconstruction"},
    "Generator: adversarial": {"adversarial": "loss_g_adversarial"},
    "Discriminator": {"all": "loss_d", "on true pairs": "loss_d_real", "on generated pairs": "loss_d_fake"},
}


def write_report(run: Path) -> Path:
    """Write `report.html` of what lies in the run's folder so far; its path. Equal files give equal bytes."""
    write_atomic(run / REPORT, run_report(run))
    return run / REPORT


def run_report(run: Path) -> str:
    """The page of a run's folder."""
    record = read_json(run / "config.json")
    metrics = _table(run / "metrics.csv", "step", "ms_per_step", "images_per_s", "peak_memory_mb")
    validation = _table(run / "validation.csv", "step", *MEASURES)
    steps, samples = _samples(run / "samples")
    return pages.render(
        "run.html",
        "model",
        name=run.name,
        record=record,
        losses={title: charts.lines(_series(metrics, of), f"{title}, by step") for title, of in LOSSES.items()},
        loss_keys={title: list(_series(metrics, of)) for title, of in LOSSES.items()},
        validation={
            title: charts.lines(_series(validation, {title: measure}), f"Validation, {title}, by step")
            for measure, (title, _) in MEASURES.items()
        },
        validated=_validated(validation),
        steps=steps,
        shown=_shown(run / "samples"),
        samples=samples,
        evaluations=[_evaluation(run, split) for split in reversed(SPLITS) if _facts(run, split)],
        speed=_speed(metrics),
        throughput=charts.lines(_series(metrics, {"images": "images_per_s"}), "Images a second, by step"),
    )


def _table(path: Path, *columns: str) -> pd.DataFrame:
    """A CSV of the logbook with at least `columns`; empty where there is none yet, or a full disk left a part of it."""
    try:
        table = pd.read_csv(path)
        table.astype(float)[list(columns)]
    except FileNotFoundError:
        pass
    except (ValueError, KeyError) as error:
        log.warning("%s is damaged, and left out of the report (%s)", path, str(error).splitlines()[0])
    else:
        return table
    return pd.DataFrame({"step": []})


def _series(table: pd.DataFrame, columns: Mapping[str, str]) -> dict[str, charts.Points]:
    """Name -> (step, value) of the columns that say anything; a loss that is off is 0 throughout."""
    told = {name: column for name, column in columns.items() if column in table and table[column].any()}
    return {n: list(zip(table["step"].tolist(), table[c].tolist(), strict=True)) for n, c in told.items()}


def _validated(validation: pd.DataFrame) -> list[dict[str, Any]]:
    """The table of the validation, the least MAE first."""
    rows = validation.sort_values("mae").head(10) if len(validation) else validation
    return [
        {"step": f"{int(row['step']):,}"} | {title: f"{row[m]:.{digits}f}" for m, (title, digits) in MEASURES.items()}
        for row in rows.to_dict("records")
    ]


def _speed(metrics: pd.DataFrame) -> dict[str, str]:
    """Medians over the logged lines, and the time that the steps took."""
    if metrics.empty:
        return {}
    seconds = (metrics["ms_per_step"] * metrics["step"].diff().fillna(metrics["step"])).sum() / 1e3
    return {
        "steps": f"{int(metrics['step'].max()):,}",
        "time in steps": f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min",
        "a step": f"{metrics['ms_per_step'].median():.1f} ms (median)",
        "throughput": f"{metrics['images_per_s'].median():.1f} images/s (median)",
        "peak memory": f"{metrics['peak_memory_mb'].max():,.0f} MB",
    }


# -- samples ----------------------------------------------------------------------------------------------------------


def _samples(folder: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """What the frames are called, and of each sample its pictures: source and target once, the rest for each frame."""
    drawn = sorted(p for p in folder.glob("step-*") if p.is_dir())
    last = len(drawn) - 1
    drawn = [drawn[round(k * last / (FRAMES - 1))] for k in range(FRAMES)] if last >= FRAMES else drawn
    names = sorted(p.name.removesuffix("-source.png") for p in drawn[-1].glob("*-source.png")) if drawn else []
    samples = []
    for name in names:
        subject, _, position = name.rpartition("-")
        samples.append(
            {
                "label": f"{subject}, slice {position}",
                "small": Image.open(drawn[-1] / f"{name}-source.png").width < SMALL,
                **{what: _uri(drawn[-1] / f"{name}-{what}.png") for what in ("source", "target")},
                **{what: [_uri(step / f"{name}-{what}.png") for step in drawn] for what in ("generated", "error")},
            }
        )
    return [f"step {int(p.name.removeprefix('step-')):,}" for p in drawn], samples


def _shown(folder: Path) -> str:
    """Whose samples they are: validation or training subjects; of a run that does not record it, fixed ones."""
    recorded = read_json(folder / SAMPLED)
    split = recorded.get("split") if isinstance(recorded, dict) else None
    return {"train": "training", "val": "validation", "test": "test"}.get(str(split), "the same")


def _uri(path: Path) -> str:
    return pages.jpeg_uri(Image.open(io.BytesIO(path.read_bytes())))


# -- evaluation -------------------------------------------------------------------------------------------------------


def _facts(run: Path, split: str) -> Any:
    return read_json(run / f"evaluation-{split}.json")


def _evaluation(run: Path, split: str) -> dict[str, Any]:
    """What the page says of one split: by mask two tables, by mask and measure a distribution, and the subjects."""
    facts, table = _facts(run, split), pd.read_csv(run / f"evaluation-{split}.csv")
    methods = list(dict.fromkeys(table["method"]))
    distributions = {}
    for mask in facts["masks"]:
        for measure, (title, _) in MEASURES.items():
            of = table[table["mask"] == mask].groupby("method")[measure]
            rows = {m.removesuffix(" target"): of.get_group(m).tolist() for m in methods}
            distributions[f"{title}, {mask}"] = charts.strips(rows, f"{split}: {title}, mask {mask}")
    ours = table[table["method"] == methods[0]]
    wide = ours.pivot_table(index="subject_id", columns="mask", values=list(MEASURES)).sort_values([("psnr", "head")])
    return {
        "facts": facts,
        "summary": {mask: _summary(facts["summary"], mask) for mask in facts["masks"]},
        "comparison": {mask: _comparison(facts["comparison"], mask) for mask in facts["masks"]},
        "distributions": distributions,
        "subjects": [
            {"subject": subject}
            | {
                f"{title}, {mask}": f"{row[m, mask]:.{d}f}"
                for mask in facts["masks"]
                for m, (title, d) in MEASURES.items()
            }
            for subject, row in wide.head(LISTED).iterrows()
        ],
        "measured": len(wide),
    }


def _summary(rows: Sequence[Mapping[str, Any]], mask: str) -> list[dict[str, str]]:
    """A row for each method: mean and standard deviation of each measure."""
    return [
        {"method": row["method"]} | {title: _mean_sd(row, m, digits) for m, (title, digits) in MEASURES.items()}
        for row in rows
        if row["mask"] == mask
    ]


def _mean_sd(row: Mapping[str, Any], measure: str, digits: int) -> str:
    mean, sd = row[f"{measure}_mean"], row[f"{measure}_std"]
    return ("-" if mean is None else f"{mean:.{digits}f}") + ("" if sd is None else f" ({sd:.{digits}f})")


def _comparison(rows: Sequence[Mapping[str, Any]], mask: str) -> list[dict[str, str]]:
    """A row for each baseline and measure: by how much the generator is better, the 95% interval, what that tells."""
    told = []
    for row in rows:
        if row["mask"] == mask and row["better_by"] is not None:
            title, digits = MEASURES[row["measure"]]
            low, high = row["low_95"], row["high_95"]
            single = low is None  # subject: there is no interval
            told.append(
                {
                    "baseline": row["baseline"],
                    "measure": title,
                    "better by": f"{row['better_by']:+.{digits}f}",
                    "95% interval": "-"
                    if single
                    else f"{low:.{digits}f}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{high:.{digits}f}",
                    "verdict": "open" if single or low <= 0 <= high else "better" if low > 0 else "worse",
                }
            )
    return told
