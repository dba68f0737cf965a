"""The command that measures generators: those of runs, and ONNX models from elsewhere."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flows.cli.app import DEFAULT_ROOT, Root, Scratch, app
from flows.cli.output import Json, Output, Quiet
from flows.cli.show import show_evaluation, show_run
from ixi_etl.core.extras import require_extra
from ixi_etl.errors import ConfigError

if TYPE_CHECKING:
    from model.evaluate import Evaluation

FOREIGN = "With --generator: "


@app.command()
def evaluate(
    run: Annotated[
        str | None,
        typer.Argument(help=r"Name of a run, a unique prefix, or latest.  \[default: latest]", show_default=False),
    ] = None,
    root: Root = DEFAULT_ROOT,
    scratch: Scratch = None,
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="Split to evaluate.")] = "test",
    protocol: Annotated[
        str | None,
        typer.Option(
            "--protocol",
            metavar="NAME,...",
            help="Protocols to score under, of ours, syndiff, selfrdb and moschetto (docs/protocols.md).  "
            r"\[default: all; for digits, ours]",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help=r"A checkpoint file.  \[default: the run's best generator]", show_default=False),
    ] = None,
    dropout: Annotated[bool, typer.Option("--dropout", help="Keep dropout on, as published.")] = False,
    generator: Annotated[
        Path | None,
        typer.Option(help="Instead of a run: any ONNX model of one channel in and one out.", show_default=False),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help=FOREIGN + r"NAME@VERSION.  \[default: ixi-t1-t2@latest]", show_default=False)
    ] = None,
    direction: Annotated[
        str | None, typer.Option(help=FOREIGN + "such as t1->t2; by default that of the dataset.", show_default=False)
    ] = None,
    input_range: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="LOW HIGH", help=FOREIGN + "its values of black and white.", show_default=False),
    ] = None,
    output_range: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="LOW HIGH", help=FOREIGN + r"those of its output.  \[default: --input-range]"),
    ] = None,
    orientation: Annotated[
        str | None,
        typer.Option(
            help=FOREIGN + r"where its rows and columns point; PL is the upright radiological picture.  \[default: AR]",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help=FOREIGN + r"folder.  \[default: in ROOT/evaluations]", show_default=False),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure a generator under each protocol, compared with simple baselines.

    Writes evaluation-SPLIT.csv (one row per protocol, mask, method and subject) and evaluation-SPLIT.json into the run.
    With --weights, --dropout or some of the protocols the files have other names. With --generator they are in
    ROOT/evaluations.
    """
    output = Output(quiet, as_json)
    require_extra("train")
    from flows.progress import show_progress
    from model.protocols import parse_protocols

    protocols = None if protocol is None else parse_protocols(protocol)
    foreign: dict[str, Any] = {
        "dataset": dataset,
        "direction": direction,
        "input-range": input_range,
        "output-range": output_range,
    }
    foreign |= {"orientation": orientation, "out": out}
    if generator is not None:
        clash = "RUN" if run else "--weights" if weights else "--dropout" if dropout else None
        if clash:
            raise ConfigError(f"{clash} and --generator exclude each other; give one of them")
        if input_range is None:
            raise ConfigError("--generator needs --input-range LOW HIGH, the values of black and white, such as -1 1")
        require_extra("export")
        from model.foreign import OWN_ORIENTATION, ForeignGenerator, evaluate_foreign

        model = ForeignGenerator(generator, input_range, output_range or input_range, orientation or OWN_ORIENTATION)
        chosen: dict[str, Any] = {"direction": direction, "split": split, "out": out, "scratch": scratch}
        with show_progress() as progress:
            folder, done = evaluate_foreign(
                root, model, dataset or "ixi-t1-t2@latest", **chosen, protocols=protocols, progress=progress
            )
        show_evaluation(output, folder, done.name)
    else:
        given = next((option for option, value in foreign.items() if value is not None), None)
        if given:
            raise ConfigError(f"--{given} is for --generator FILE; the generator of a run needs no --{given}")
        from model.jobs import evaluate_run
        from model.run import open_run

        opened = open_run(root, run or "latest", scratch)
        folder = opened.folder
        with show_progress() as progress:
            done = evaluate_run(
                opened, split=split, weights=weights, dropout=dropout, protocols=protocols, progress=progress
            )
        show_run(output, folder, done.name)
    _show_comparison(output, done, split)
    output.fields({"subjects": folder / f"{done.name}.csv"})
    output.end()


def _show_comparison(output: Output, done: Evaluation, split: str) -> None:
    """Print the differences under the first protocol; the JSON object gets all. No table if no subject has a value."""
    from model.protocols import MAIN_MEASURES

    comparison = done.comparison
    records = json.loads(comparison.to_json(orient="records"))  # which makes null of NaN: JSON has none
    if not records:
        output.text("no comparison: no subject has a value", comparison=records)
        return
    protocol = comparison["protocol"].iloc[0]
    first = comparison[(comparison["protocol"] == protocol) & comparison["measure"].isin(MAIN_MEASURES)]
    intervals = first[["better_by", "low_95", "high_95"]].itertuples(index=False)
    shown = first.assign(better_by=[_with_interval(*row) for row in intervals])
    title = f"{protocol}: generator against each baseline: mean paired difference [95% interval], above 0 is better"
    output.table("comparison", shown[["mask", "baseline", "measure", "better_by"]], title, records)
    if done.summary["subjects"].max() < 2:
        output.text(f"no intervals: they need two subjects, and split {split} has one")
    elif (first["subjects"] < 2).any():
        output.text("a row without an interval has a value for one subject only; an interval needs two")


def _with_interval(mean: float, low: float, high: float) -> str:
    """`+1.0000 [0.5000, 1.5000]`, with a dash for what is not finite, such as the interval of one subject."""
    shown = f"{mean:+.4f}" if math.isfinite(mean) else "-"
    return f"{shown} [{low:.4f}, {high:.4f}]" if math.isfinite(low) and math.isfinite(high) else f"{shown} [-]"
