"""Measure a generator per subject under each protocol, next to baselines that any generator should beat.

`model.protocols` has the protocols; `ours` is this project's. All get images normalised to [0, 1] as the version says.

Legend: N slices of S subjects with K sources; B, C, H, W are batch, channels of the sources, height, width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from ixi_etl.core.files import to_json, write_atomic
from ixi_etl.core.parallel import usable_cores
from ixi_etl.core.progress import Progress, no_progress
from ixi_etl.dataset import metadata
from ixi_etl.scans.intensity import describe_normalisation
from model import checkpoint, data
from model.baselines import baselines
from model.config import TrainConfig
from model.data import Pairs
from model.generator import BATCH, Predictor, as_predictor, check_same_dataset, load_generator
from model.protocols import MEASURES, PROTOCOLS, Protocol, Subject, protocols_for
from model.scores import score_slices, score_subjects
from model.subjects import generate_subjects

GENERATED = "generated"
KEYS = ["protocol", "mask", "method"]
COMPARED = ["protocol", "mask", "baseline", "measure", "subjects", "better_by", "low_95", "high_95"]
AHEAD = 2  # subjects for each core that may wait to be scored, so that they do not fill the memory


class Evaluation(NamedTuple):
    """The results of `summarise` and `compare`; `name` is that of the files, without suffix."""

    summary: pd.DataFrame
    comparison: pd.DataFrame
    name: str


def measure(
    pairs: Pairs,
    methods: Mapping[str, Predictor],
    progress: Progress = no_progress,
    protocols: Sequence[str] = tuple(PROTOCOLS),
) -> pd.DataFrame:
    """Score each method on `pairs`: a row per protocol, mask, method and subject.

    Columns: subject_id and `KEYS`; each of `MEASURES`, NaN where the protocol has no such measure; `slices` of the
    subject; `<measure>_slices`, how many have a value; and `<measure>_sd`, the population standard deviation over them.
    These two are 0 and NaN for pooled measures. Subjects are scored in parallel, while the next ones are generated.
    """
    chosen = [PROTOCOLS[name] for name in protocols]
    futures: list[Future[list[dict[str, Any]]]] = []
    with _one_core_each() as pool:
        for subject_id, by_method in generate_subjects(pairs, methods, progress):
            futures.append(pool.submit(_score, subject_id, by_method, chosen))
            # Waits for the first subject alone, which imports the libraries, then for one `AHEAD` of this one.
            futures[max(0, len(futures) - AHEAD * usable_cores())].result()
        rows = [row for future in futures for row in future.result()]
    rank = {
        key: n for n, key in enumerate((p.name, mask, method) for p in chosen for mask in p.masks for method in methods)
    }
    rows.sort(key=lambda row: rank[row["protocol"], row["mask"], row["method"]])
    return pd.DataFrame(rows)


@contextmanager
def _one_core_each() -> Iterator[ThreadPoolExecutor]:
    """A pool with a thread for each core, in which torch uses one core."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(usable_cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)  # the number for threads that start later is global


def _score(subject_id: str, by_method: Mapping[str, Subject], protocols: Sequence[Protocol]) -> list[dict[str, Any]]:
    """The rows of one subject, in the table of `measure`."""
    rows = []
    for protocol in protocols:
        for method, subject in by_method.items():
            with np.errstate(divide="ignore", invalid="ignore"):  # of blank and of equal slices
                for mask, scores in protocol.score(subject).items():
                    key = {"subject_id": subject_id, "protocol": protocol.name, "mask": mask, "method": method}
                    rows.append(key | {"slices": len(subject.target)} | _average(scores, protocol.pooled))
    return rows


def _average(scores: Mapping[str, NDArray[np.float64]], pooled: Collection[str]) -> dict[str, float]:
    """The columns of `MEASURES`, `<measure>_slices` and `<measure>_sd` for the scores of a subject under one mask."""
    usable = {measure: values[~np.isnan(values)] for measure, values in scores.items()}
    by_slice = {measure: values for measure, values in usable.items() if measure not in pooled}
    means = {m: float(values.mean()) if len(values) else math.nan for m, values in usable.items()}
    spreads = {m: float(values.std()) if len(values) else math.nan for m, values in by_slice.items()}
    row: dict[str, float] = {m: means.get(m, math.nan) for m in MEASURES}
    row |= {f"{m}_slices": len(by_slice.get(m, ())) for m in MEASURES}
    return row | {f"{m}_sd": spreads.get(m, math.nan) for m in MEASURES}


def validation_scores(pairs: Pairs, predict: Predictor) -> pd.DataFrame:
    """Scores of `ours` on whole slices, without its slow measures: a row per subject, with mae, psnr (dB) and ssim."""
    with torch.no_grad():
        batches = []
        for index in torch.arange(len(pairs), device=pairs.device).split(BATCH):
            source, target = pairs.normalised(index)
            generated = predict(source, pairs.position[index]).clamp(-1, 1)
            batches.append({k: v.cpu() for k, v in score_slices((generated + 1) / 2, (target + 1) / 2).items()})
    slices = {k: torch.cat([batch[k] for batch in batches]) for k in batches[0]}
    scores = score_subjects(slices, pairs.subject.cpu(), len(pairs.subjects))
    return pd.DataFrame({"subject_id": list(pairs.subjects)} | {k: v.numpy() for k, v in scores.items()})


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation of each measure of `measure` over its split, as each protocol defines them.

    A row per protocol, mask and method, with `<measure>_mean`, `<measure>_std` and `subjects`.
    """
    measures = [m for m in MEASURES if m in table]
    parts = []
    for name, part in table.groupby("protocol", sort=False):
        protocol, groups = PROTOCOLS[str(name)], part.groupby(KEYS, sort=False)
        if protocol.averaged_over == "subjects":
            means, spreads = groups[measures].mean(), groups[measures].std(ddof=protocol.ddof)
        else:
            means, spreads = _over_slices(part, measures, protocol.ddof)
        columns = {f"{m}_mean": means[m] for m in measures} | {f"{m}_std": spreads[m] for m in measures}
        ordered = pd.DataFrame({f"{m}_{x}": columns[f"{m}_{x}"] for m in measures for x in ("mean", "std")})
        parts.append(ordered.assign(subjects=groups.size()).reset_index())
    return pd.concat(parts, ignore_index=True)


def _over_slices(part: pd.DataFrame, measures: list[str], ddof: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Mean and standard deviation over the slices of all subjects, from the means and deviations of each subject."""
    keys = [part[key] for key in KEYS]
    values = part[measures]
    weight = part[[f"{m}_slices" for m in measures]].set_axis(measures, axis=1)
    count = weight.groupby(keys, sort=False).sum()
    means = (values * weight).groupby(keys, sort=False).sum() / count
    # The variance within subjects, and that between their means.
    within = part[[f"{m}_sd" for m in measures]].to_numpy() ** 2
    between = (values - means.loc[list(zip(*keys, strict=True))].to_numpy()) ** 2
    variance = ((between + within) * weight).groupby(keys, sort=False).sum(min_count=1) / (count - ddof)
    return means, variance**0.5


def compare(table: pd.DataFrame) -> pd.DataFrame:
    """Differences between the generator and each baseline, paired by subject.

    A row per protocol, mask, baseline and measure: the mean difference `better_by`, and its 95% interval by Student's t
    (NaN for a single subject). Above 0 the generator is better, also where a small value is good. Subjects without a
    value are left out, and rows without a subject.
    """
    from scipy.stats import t

    rows = []
    for (protocol, mask), part in table.groupby(["protocol", "mask"], sort=False):
        ours = part[part["method"] == GENERATED].set_index("subject_id")
        for name, theirs in part[part["method"] != GENERATED].groupby("method", sort=False):
            theirs = theirs.set_index("subject_id").reindex(ours.index)
            for measure, (_, _, larger_is_better) in MEASURES.items():
                if measure not in table:
                    continue
                both = pd.DataFrame({"ours": ours[measure], "theirs": theirs[measure]}).dropna()
                n = len(both)
                if not n:
                    continue
                better = (both["ours"] - both["theirs"]).to_numpy() * (1 if larger_is_better else -1)
                with np.errstate(invalid="ignore"):  # of infinite values
                    half = t.ppf(0.975, n - 1) * better.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
                mean = better.mean()
                row = {"protocol": protocol, "mask": mask, "baseline": name, "measure": measure, "subjects": n}
                rows.append(row | {"better_by": mean, "low_95": mean - half, "high_95": mean + half})
    return pd.DataFrame(rows, columns=COMPARED)


def evaluation_name(split: str, weights: Path | None, dropout: bool) -> str:
    """The name of the files of an evaluation of all protocols; `weights` is None for the run's own generator.

    For other weights it contains their digest, so that evaluations of different weights never overwrite each other.
    """
    parts = ["evaluation", split]
    if weights is not None:
        parts += [weights.stem, checkpoint.read_digest(weights)[:8]]
    return "-".join(parts + (["dropout"] if dropout else []))


def evaluate(
    run: Path,
    version: Path,
    config: TrainConfig,
    generator: Path,
    *,
    weights: Path | None = None,
    split: str = "test",
    device: str = "cpu",
    dropout: bool = False,
    protocols: Sequence[str] | None = None,
    progress: Progress = no_progress,
) -> Evaluation:
    """Measure `generator`, or the one in `weights`, on a split; write `<name>.csv` and `.json` into `run`.

    The CSV has a row per protocol, mask, method and subject; the JSON has means, standard deviations and paired
    differences. `config` is the run's. `evaluation_name` gives the name. `protocols` are by default `protocols_for` the
    dataset.

    Raises:
        CheckpointError: the weights are missing or damaged, or were trained on other data than the run.
        EmptySplitError: the split has no subjects.
        DatasetError: the version is damaged.
    """
    if weights is not None and weights.resolve() == generator.resolve():
        weights = None
    measured = weights or generator
    network, trained, step = load_generator(measured, device)
    check_same_dataset(measured, trained, config)
    record = {
        "weights": measured.name,
        "weights_sha256": checkpoint.read_digest(measured),
        "step": step,
        "dropout": dropout,
        "dataset": config.dataset,
        "direction": config.direction,
        "neighbours": config.neighbours,
    }
    load = partial(data.load_pairs, version, direction=config.direction, device=device, neighbours=config.neighbours)
    predict = as_predictor(network, dropout=dropout)
    name = evaluation_name(split, weights, dropout)
    return measure_and_write(run / name, version, load, split, predict, record, protocols, progress)


def measure_and_write(
    path: Path,
    version: Path,
    load: Callable[[str], Pairs],
    split: str,
    predict: Predictor,
    record: Mapping[str, Any],
    protocols: Sequence[str] | None,
    progress: Progress,
) -> Evaluation:
    """Measure a generator and the baselines on a split of `version`; write `<path>.csv` and `<path>.json`.

    Their name ends with the protocols unless these are all that fit the dataset, so that an evaluation under some never
    overwrites the full one. `load` loads a split; `record` is what the JSON says of the generator.
    """
    fitting = protocols_for(metadata.read_metadata(version)["name"])
    chosen = [name for name in PROTOCOLS if name in (protocols or fitting)]
    if set(chosen) != set(fitting):
        path = path.with_name("-".join([path.name, *chosen]))
    normalisation = f"{describe_normalisation(metadata.normalisation_of(version))} to [0, 1], clipped"
    pairs = load(split)
    table = measure(pairs, {GENERATED: predict} | baselines(load("train")), progress, chosen)
    table.insert(1, "split", split)
    summary, comparison = summarise(table), compare(table)
    ranges = {name: PROTOCOLS[name].data_range for name in chosen}
    listed = table.assign(normalisation=normalisation, data_range=table["protocol"].map(ranges))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path.with_name(f"{path.name}.csv"), _with_links(listed).to_csv(index=False))
    described = {
        name: {
            "title": protocol.title,
            "definition": protocol.definition,
            "source": protocol.source,
            "masks": dict(protocol.masks),
            "data_range": protocol.data_range,
            "averaged_over": protocol.averaged_over,
            "link": protocol.link,
        }
        for name, protocol in PROTOCOLS.items()
        if name in chosen
    }
    tables = {"summary": _to_json(summary), "comparison": _to_json(comparison)}
    masks = {"masks": described["ours"]["masks"]} if "ours" in described else {}
    whole = {"split": split, **record, "normalisation": normalisation, **masks, "protocols": described, **tables}
    write_atomic(path.with_name(f"{path.name}.json"), to_json(whole))
    return Evaluation(summary, comparison, path.name)


def _with_links(table: pd.DataFrame) -> pd.DataFrame:
    """A table with the column `definition`, the link of each row's protocol."""
    return table.assign(definition=table["protocol"].map({name: p.link for name, p in PROTOCOLS.items()}))


def _to_json(table: pd.DataFrame) -> Any:
    """The rows of a table with links to definitions; null for what is not finite, which JSON lacks."""
    return json.loads(_with_links(table).to_json(orient="records"))
