"""Write `report.html` of a run: losses, validation, samples over time, and scores next to the baselines.

It uses only the files in the run's folder, so it can be written at any time during training, and without torch.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup
from PIL import Image

from ixi_etl.config import SPLITS
from ixi_etl.core.files import read_json, write_atomic
from ixi_etl.report import charts, page
from model.protocols import MAIN_MEASURES, MEASURES

log = logging.getLogger(__name__)

REPORT = "report.html"
SAMPLED = "samples.json"  # in the folder of the samples: which split they show
FRAMES = 10  # of the slider; images of noise, of 4 subjects, take 4 MB
SMALL = 100  # pixels; smaller images are enlarged without smoothing
LISTED = 100  # subjects in the table; the CSV has all

DETAILED = {name: (MEASURES[name].title, MEASURES[name].digits) for name in MAIN_MEASURES}
LOSSES = {
    "Generator: reconstruction": {"reconstruction": "loss_g_reconstruction"},
    "Generator: adversarial": {"adversarial": "loss_g_adversarial"},
    "Discriminator": {"all": "loss_d", "on true pairs": "loss_d_real", "on generated pairs": "loss_d_fake"},
}


def write_report(run: Path) -> Path:
    """Write `report.html` from the files in the run's folder so far; return its path. Equal files give equal bytes."""
    write_atomic(run / REPORT, run_report(run))
    return run / REPORT


def run_report(run: Path) -> str:
    """The HTML of the report of a run's folder."""
    record = read_json(run / "config.json")
    metrics = _table(run / "metrics.csv", "step", "ms_per_step", "images_per_s", "peak_memory_mb")
    validation = _table(run / "validation.csv", "step", *DETAILED)
    kinds = source_kinds(record["config"]["direction"].partition("->")[0].split("+"))
    steps, samples = _samples(run / "samples", kinds)
    evaluations = [_evaluation(run, split) for split in reversed(SPLITS) if _read_evaluation(run, split)]
    return page.render_page(
        "run.html",
        "model",
        name=run.name,
        record=record,
        losses={title: charts.lines(_series(metrics, parts), f"{title}, by step") for title, parts in LOSSES.items()},
        loss_keys={title: list(_series(metrics, parts)) for title, parts in LOSSES.items()},
        validation={
            title: charts.lines(_series(validation, {title: measure}), f"Validation, {title}, by step")
            for measure, (title, _) in DETAILED.items()
        },
        validated=_validation_rows(validation),
        steps=steps,
        shown=_sampled_split(run / "samples"),
        samples=samples,
        evaluations=evaluations,
        protocols=_definitions([evaluation["result"] for evaluation in evaluations]),
        speed=_speed(metrics),
        throughput=charts.lines(_series(metrics, {"images": "images_per_s"}), "Images per second, by step"),
    )


def _table(path: Path, *columns: str) -> pd.DataFrame:
    """A CSV file of numbers with at least `columns`; empty if it is missing or damaged."""
    try:
        table = pd.read_csv(path)
        table.astype(float)[list(columns)]
    except FileNotFoundError:
        pass
    except (ValueError, KeyError) as error:
        log.warning("%s is damaged and left out of the report (%s)", path, str(error).splitlines()[0])
    else:
        return table
    return pd.DataFrame({"step": []})


def _series(table: pd.DataFrame, columns: Mapping[str, str]) -> dict[str, charts.Points]:
    """Name -> (step, value) of the given columns, without those that are 0 throughout, as disabled losses are."""
    used = {name: column for name, column in columns.items() if column in table and table[column].any()}
    return {n: list(zip(table["step"].tolist(), table[c].tolist(), strict=True)) for n, c in used.items()}


def _validation_rows(validation: pd.DataFrame) -> list[dict[str, Any]]:
    """The ten validations with the lowest MAE, best first."""
    rows = validation.sort_values("mae").head(10) if len(validation) else validation
    return [
        {"step": f"{int(row['step']):,}"} | {title: f"{row[m]:.{digits}f}" for m, (title, digits) in DETAILED.items()}
        for row in rows.to_dict("records")
    ]


def _speed(metrics: pd.DataFrame) -> dict[str, str]:
    """Medians over the logged lines, and the total time of all steps."""
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


def source_kinds(sources: Sequence[str]) -> list[str]:
    """The names of the images of the sources in a sample: `source`, or if there are several, `source-t1` and so on."""
    return ["source"] if len(sources) == 1 else [f"source-{name}" for name in sources]


def _samples(folder: Path, kinds: Sequence[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """The titles of the frames; and for each sample its images: sources and target once, the others for each frame."""
    drawn = sorted(p for p in folder.glob("step-*") if p.is_dir())
    last = len(drawn) - 1
    drawn = [drawn[round(k * last / (FRAMES - 1))] for k in range(FRAMES)] if last >= FRAMES else drawn
    names = sorted(p.name.removesuffix("-target.png") for p in drawn[-1].glob("*-target.png")) if drawn else []
    samples = []
    for name in names:
        subject, _, position = name.rpartition("-")
        samples.append(
            {
                "label": f"{subject}, slice {position}",
                "small": Image.open(drawn[-1] / f"{name}-target.png").width < SMALL,
                "fixed": {
                    kind.replace("-", " "): _uri(drawn[-1] / f"{name}-{kind}.png") for kind in (*kinds, "target")
                },
                **{kind: [_uri(step / f"{name}-{kind}.png") for step in drawn] for kind in ("generated", "error")},
            }
        )
    return [f"step {int(p.name.removeprefix('step-')):,}" for p in drawn], samples


def _sampled_split(folder: Path) -> str:
    """The split of the sampled subjects in words; "the same" for a run that does not record it."""
    recorded = read_json(folder / SAMPLED)
    split = recorded.get("split") if isinstance(recorded, dict) else None
    return {"train": "training", "val": "validation", "test": "test"}.get(str(split), "the same")


def _uri(path: Path) -> str:
    return page.jpeg_uri(Image.open(io.BytesIO(path.read_bytes())))


def _read_evaluation(run: Path, split: str) -> Any:
    """The JSON of the run's own evaluation on a split; None if the run was not evaluated on it."""
    return read_json(run / f"evaluation-{split}.json")


def _evaluation(run: Path, split: str) -> dict[str, Any]:
    """The section of one split: a table of all protocols; in detail for `ours`, if it is among them.

    In detail: two tables per mask, a distribution per mask and measure, a table of the subjects. Evaluations by older
    code have `ours` only, and do not name it.
    """
    result, table = _read_evaluation(run, split), pd.read_csv(run / f"evaluation-{split}.csv")
    measured = table["subject_id"].nunique()
    ours = table[table["protocol"] == "ours"] if "protocol" in table else table
    masks = result["masks"] if len(ours) else {}
    rows = {part: [row for row in result[part] if _protocol(row) == "ours"] for part in ("summary", "comparison")}
    methods = list(dict.fromkeys(ours["method"]))
    distributions = {}
    for mask in masks:
        for measure, (title, _) in DETAILED.items():
            by_method = ours[ours["mask"] == mask].groupby("method")[measure]
            values = {m.removesuffix(" target"): by_method.get_group(m).tolist() for m in methods}
            distributions[f"{title}, {mask}"] = charts.strips(values, f"{split}: {title}, mask {mask}")
    return {
        "result": result,
        "masks": masks,
        "protocols": _protocol_rows(result["summary"]) if "protocols" in result else [],
        "summary": {mask: _summary(rows["summary"], mask) for mask in masks},
        "comparison": {mask: _comparison(rows["comparison"], mask) for mask in masks},
        "distributions": distributions,
        "subjects": _subjects(ours[ours["method"] == methods[0]], masks) if masks else [],
        "measured": measured,
    }


def _protocol(row: Mapping[str, Any]) -> str:
    return str(row.get("protocol", "ours"))


def _definitions(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Name -> definition of each protocol, in the order of the tables."""
    defined = {name: protocol for result in results for name, protocol in result.get("protocols", {}).items()}
    names = dict.fromkeys(_protocol(row) for result in results for row in result["summary"])
    return {name: defined[name] for name in names if name in defined}


def _protocol_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A row per protocol, mask and method: a link to the definition on this page, and each measure that was taken."""
    measures = [m for m in MEASURES if any(row.get(f"{m}_mean") is not None for row in rows)]
    link = Markup('<a href="#protocol-{0}">{0}</a>')
    return [
        {
            "protocol": link.format(row["protocol"]),
            "mask": row["mask"],
            "method": row["method"].replace(" ", "\N{NO-BREAK SPACE}"),
        }
        | {MEASURES[m].title: _mean_sd(row, m, MEASURES[m].digits) for m in measures}
        for row in rows
    ]


def _subjects(generator: pd.DataFrame, masks: Iterable[str]) -> list[dict[str, str]]:
    """A row per subject with the scores of the generator, worst first."""
    wide = generator.pivot_table(index="subject_id", columns="mask", values=list(DETAILED))
    wide = wide.loc[wide["psnr"]["head"].sort_values().index]
    return [
        {"subject": str(subject)}
        | {f"{title}, {mask}": f"{row[m, mask]:.{d}f}" for mask in masks for m, (title, d) in DETAILED.items()}
        for subject, row in wide.head(LISTED).iterrows()
    ]


def _summary(rows: Sequence[Mapping[str, Any]], mask: str) -> list[dict[str, str]]:
    """A row per method: mean and standard deviation of each measure."""
    return [
        {"method": row["method"]} | {title: _mean_sd(row, m, digits) for m, (title, digits) in DETAILED.items()}
        for row in rows
        if row["mask"] == mask
    ]


def _mean_sd(row: Mapping[str, Any], measure: str, digits: int) -> str:
    mean, sd = row.get(f"{measure}_mean"), row.get(f"{measure}_std")  # older evaluations lack newer measures
    return ("-" if mean is None else f"{mean:.{digits}f}") + ("" if sd is None else f" ({sd:.{digits}f})")


def _comparison(rows: Sequence[Mapping[str, Any]], mask: str) -> list[dict[str, str]]:
    """A row per baseline and measure: how much better the generator is, the 95% interval, and the verdict."""
    shown = []
    for row in rows:
        if row["mask"] == mask and row["measure"] in DETAILED and row["better_by"] is not None:
            title, digits = DETAILED[row["measure"]]
            low, high = row["low_95"], row["high_95"]
            single = low is None  # a single subject has no interval
            shown.append(
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
    return shown
