"""Write the card of a run, and the parts that all cards have: the README.md of a repository on the Hugging Face Hub.

A card begins with YAML that the Hub reads. Its figures come from the run's evaluations (or the version's
`dataset.json`), and nothing else; the licence and the credit are those of `ixi_etl.dataset.credit`. No package of the
Hub is needed. `model.cards_dataset` has the card of a version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ixi_etl import __version__
from ixi_etl.config import SPLITS
from ixi_etl.core.files import read_json
from ixi_etl.core.text import markdown_table, printable, quantity
from ixi_etl.dataset import metadata
from ixi_etl.dataset.credit import has_simulated, is_all_share_alike
from ixi_etl.errors import CheckpointError, DatasetError
from ixi_etl.sources.catalog import LICENCE
from model.config import TrainConfig

if TYPE_CHECKING:
    from jinja2 import Environment

TASK = "image-to-image"

TERMS = ("licence", "credit", "share_alike")
"""What `metadata.licence_of` gives, and the file of a generator keeps."""


def model_card(run: Path, generator: Path, version: Path | None, repository: str = "USER/NAME") -> str:
    """The card of the run in the folder `run`, whose best generator is in the file `generator`.

    `version` is the dataset version that it was trained on; None if it is not at hand: then the card does not say how
    many subjects there were. An evaluation of other weights than those in `generator` is left out.
    `repository` is where on the Hub the card is, or will be.

    Raises:
        CheckpointError: the run's configuration or the generator is missing or damaged.
    """
    from model import checkpoint, planes

    record, header = read_json(run / "config.json"), checkpoint.read_metadata(generator)
    if not isinstance(record, dict) or "config" not in record:
        raise CheckpointError(f"{run / 'config.json'} is damaged; it holds the run's configuration")
    config = TrainConfig.model_validate(header["config"])
    dataset = metadata.read_metadata(version) if version else None
    data = record.get("data") or {k: header[k] for k in TERMS if k in header} or dataset or {}
    simulated = has_simulated(dataset or data)
    evaluations = _evaluations(run, checkpoint.read_digest(generator))
    head = {
        **licence_head(dataset or data),
        "pipeline_tag": TASK,
        "library_name": "pytorch",
        "tags": tags_of(config.dataset, simulated, "pix2pix", "safetensors"),
    }
    if evaluations:
        head["model-index"] = [{"name": run.name, "results": _results(evaluations, config.dataset, simulated)}]
    trained_on = planes.parse(generator, header)
    return render(
        "model_card.md",
        head=head,
        is_model=True,
        repository=repository,
        name=run.name,
        config=config,
        step=header["step"],
        simulated=simulated,
        is_digits=config.dataset.startswith("digits@"),
        volumes=trained_on is not None,
        planes=trained_on,
        dataset=dataset,
        licence=licence_text(data),
        splits={name: dataset["splits"].get(name, 0) for name in SPLITS} if dataset else {},
        validation={k: f"{v:.4f}" for k, v in header["validation"].items()},
        software=record.get("software", {}),
        hardware=record.get("hardware", {}),
        preset=record.get("preset"),
        settings=markdown_table({"field": k, "value": v} for k, v in _settings(config).items()),
        evaluations=[_shown_evaluation(evaluation) for evaluation in evaluations],
        definitions=_definitions(evaluations),
        channels=config.channels,
    )


def licence_text(data: Mapping[str, Any]) -> dict[str, Any]:
    """What a card says of the licence: its text, the credit, and whether it asks to share alike."""
    text = str(data.get("licence", "not recorded"))
    credit = str(data.get("credit", "not recorded"))
    ixi = "https://brain-development.org/ixi-dataset/" in credit
    return {"text": printable(text), "credit": printable(credit), "share_alike": "CC BY-SA" in text, "ixi": ixi}


def licence_head(data: Mapping[str, Any]) -> dict[str, Any]:
    """The licence for the Hub; `unknown` there is every one but IXI's, also that of simulated data.

    `data` is the metadata of a version, whose sources decide, or what a run keeps of them: see `metadata.licence_of`.
    Older ones have only the text.
    """
    if data.get("sources"):
        share_alike = is_all_share_alike(data["sources"])
    else:
        share_alike = data.get("share_alike", data.get("licence") == LICENCE)
    return {"license": "cc-by-sa-3.0" if share_alike else "unknown"}


def tags_of(dataset: str, simulated: bool, *more: str) -> list[str]:
    name = dataset.partition("@")[0]
    subject = ["mnist"] if name == "digits" else ["mri", "brain", "medical", *name.split("-")[1:]]
    return [*subject, *more, "ixi-etl", *(["simulated"] if simulated else [])]


def _settings(config: TrainConfig) -> dict[str, str]:
    """The fields of a configuration that differ from the published recipe, and the main ones."""
    default = TrainConfig()
    main = ("direction", "steps", "batch_size", "lr", "width", "side", "seed", "precision")
    fields = config.model_dump(mode="json", exclude={"device", "log", "keep", "samples", "log_every", "dataset"})
    changed = {name for name in fields if getattr(config, name) != getattr(default, name)}
    return {name: json.dumps(value).strip('"') for name, value in fields.items() if name in changed or name in main}


def _evaluations(run: Path, digest: str) -> list[dict[str, Any]]:
    """The full evaluations of the generator with this digest, the test split first.

    Older ones have no protocols: they were made by what is now the protocol `ours`.
    """
    found = (read_json(run / f"evaluation-{split}.json") for split in reversed(SPLITS))
    tables = ("summary", "comparison")
    return [
        {"protocols": {}} | each | {part: [{"protocol": "ours"} | row for row in each[part]] for part in tables}
        for each in found
        if isinstance(each, dict) and each.get("weights_sha256") == digest
    ]


def _results(evaluations: Sequence[Mapping[str, Any]], dataset: str, simulated: bool) -> list[dict[str, Any]]:
    """The generator's scores as the Hub's `model-index` has them: a result per split, protocol and mask."""
    from model.protocols import MEASURES

    return [
        {
            "task": {"type": TASK},
            "dataset": {
                "name": f"{dataset}, simulated (not IXI)" if simulated else dataset,
                "type": dataset.partition("@")[0],
                "config": f"protocol {row['protocol']}, mask {row['mask']}",
                "split": evaluation["split"],
            },
            "metrics": [
                {"type": measure, "name": MEASURES[measure].title, "value": row[f"{measure}_mean"]}
                for measure in MEASURES
                if row.get(f"{measure}_mean") is not None
            ],
        }
        for evaluation in evaluations
        for row in evaluation["summary"]
        if row["method"] == "generated"
    ]


def _shown_evaluation(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of one split: every protocol, mask and method; and the paired differences under the first protocol."""
    from model.protocols import MAIN_MEASURES, MEASURES

    rows = evaluation["summary"]
    measures = [m for m in MEASURES if any(row.get(f"{m}_mean") is not None for row in rows)]
    first = evaluation["comparison"][0]["protocol"] if evaluation["comparison"] else None
    return {
        "split": evaluation["split"],
        "subjects": rows[0]["subjects"],
        "normalisation": evaluation["normalisation"],
        "first": first,
        "scores": markdown_table(
            {k: row[k] for k in ("protocol", "mask", "method")}
            | {MEASURES[m].title: _mean_sd(row, m, MEASURES[m].digits) for m in measures}
            for row in rows
        ),
        "differences": markdown_table(
            {
                "mask": row["mask"],
                "baseline": row["baseline"],
                "measure": MEASURES[row["measure"]].title,
                "better by": f"{row['better_by']:+.{MEASURES[row['measure']].digits}f}",
                "95% interval": "needs two subjects"
                if row["low_95"] is None
                else f"{row['low_95']:.{MEASURES[row['measure']].digits}f} to "
                f"{row['high_95']:.{MEASURES[row['measure']].digits}f}",
            }
            for row in evaluation["comparison"]
            if row["protocol"] == first and row["measure"] in MAIN_MEASURES and row["better_by"] is not None
        ),
    }


def _mean_sd(row: Mapping[str, Any], measure: str, digits: int) -> str:
    mean, sd = row.get(f"{measure}_mean"), row.get(f"{measure}_std")
    return "-" if mean is None else f"{mean:.{digits}f}" + ("" if sd is None else f" ({sd:.{digits}f})")


def _definitions(evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each protocol of the evaluations once, with its name, definition, source and masks."""
    protocols = {name: each for evaluation in evaluations for name, each in evaluation["protocols"].items()}
    return [{"name": name, **protocol} for name, protocol in protocols.items()]


def render(template: str, *, head: Mapping[str, Any], **values: Any) -> str:
    front = yaml.safe_dump(dict(head), sort_keys=False, allow_unicode=True, width=1000)
    text = _environment().get_template(template).render(code_version=__version__, **values)
    return f"---\n{front}---\n\n{text.strip()}\n"


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("model"),
        # For HTML only, as Flask does: in Markdown, `markdown_table` and `printable` escape what is not ours.
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["quantity"] = quantity
    return environment


def version_of_run(root: str | Path, config: TrainConfig, scratch: Path | None = None) -> Path | None:
    """The folder of the version that a run was trained on; None if it is gone."""
    from ixi_etl.core.storage import DataRoot
    from ixi_etl.dataset.versions import parse_version, resolve_version

    name, version = parse_version(config.dataset)
    data_root = DataRoot(root, name, scratch)
    try:
        return data_root.version(resolve_version(data_root, version))
    except DatasetError:
        return None
