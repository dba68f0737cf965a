"""Commands of a training run and its generator: train, synthesize, export."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flows.cli.app import DEFAULT_ROOT, Root, Scratch, app
from flows.cli.options import options_from
from flows.cli.output import Json, Output, Quiet
from flows.cli.show import show_run
from flows.presets import Preset
from ixi_etl.core.extras import require_extra
from ixi_etl.errors import ConfigError, EmptySplitError
from model.config import TrainConfig

COMMON_FIELDS = ("dataset", "direction", "steps", "batch_size", "lr", "width", "seed", "device", "precision", "log")
"""Fields of `TrainConfig` that have an option of their own; `--set` takes all of them."""


@app.command()
@options_from(only=COMMON_FIELDS, config=TrainConfig)
def train(
    config: dict[str, Any],
    preset: Annotated[
        Preset,
        typer.Option(
            help="paper: as published. digits: MNIST. smoke: a minute on a CPU. gpu: large batches. moschetto: the "
            "pix2pix of arXiv 2507.14575."
        ),
    ] = "paper",
    root: Root = DEFAULT_ROOT,
    scratch: Scratch = None,
    # Not --run: torchrun would read that as an abbreviation of an option of its own.
    run_id: Annotated[
        str | None, typer.Option(help=r"Name of the run.  \[default: from version and settings]", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the newest valid checkpoint, if any.")] = False,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other field of the configuration; may be repeated."),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train pix2pix on a dataset version, and measure it on the test split.

    Options that are not given have the values of the preset; the defaults shown are those of paper. SIGTERM and Ctrl-C
    save and stop. For several GPUs: torchrun --nproc-per-node N $(which ixi-etl) train ...
    """
    output = Output(quiet, as_json)
    require_extra("train")
    settings = _settings(setting or []) | config
    folder = run_training(preset, settings, root, scratch, run_id, resume=resume)
    if folder is not None:
        show_run(output, folder)
        output.end()


def run_training(
    preset: Preset,
    settings: dict[str, Any],
    root: str,
    scratch: Path | None,
    run_id: str | None = None,
    *,
    resume: bool,
) -> Path | None:
    """Train and evaluate: as a flow if a Prefect server is configured, otherwise as functions.

    Always as functions in several processes of torchrun: each would be a flow run of its own.

    Returns the folder of the run, or None in every process of torchrun but the first.
    """
    from flows.server import is_configured, run_flow
    from model.devices import keep_freed_memory, torchrun_rank

    rank = torchrun_rank()
    if rank is None and is_configured():
        given = {"preset": preset, "settings": settings, "root": root, "scratch": scratch, "run": run_id}
        kept: Path = run_flow("train_pix2pix", **given, resume=resume)
        return kept
    from flows.progress import show_progress
    from model import jobs
    from model.config import preset as preset_of

    prepared = jobs.prepare_run(root, preset_of(preset, **settings), run_id, scratch)
    log = logging.getLogger("model")
    log.info("run %s on %s", prepared.folder, prepared.config.dataset)
    if prepared.config.device == "cpu":
        keep_freed_memory()
    with show_progress() as progress:
        jobs.train_run(prepared, resume=resume, progress=progress)
        if rank is not None and rank.rank > 0:
            return None
        try:
            jobs.evaluate_run(prepared, progress=progress)
        except EmptySplitError as error:
            log.warning("not evaluated: %s", error)
    return prepared.folder


def _settings(given: list[str]) -> dict[str, Any]:
    """`["steps=20", "side=null"]` -> {"steps": 20, "side": None}: values are JSON, otherwise text."""
    settings: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: give NAME=VALUE, for example --set steps=1000")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    return settings


@app.command()
def synthesize(
    run: Annotated[str, typer.Argument(help="Name of a run, a unique prefix of it, or latest; or a generator file.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="A .nii or .nii.gz file for one output, else a folder.")],
    inputs: Annotated[
        list[Path] | None, typer.Argument(help="NIfTI volumes (.nii, .nii.gz), or folders of them.", show_default=False)
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            help="A volume of each source, if the generator takes several; the output is on the grid of the first.",
        ),
    ] = None,
    root: Root = DEFAULT_ROOT,
    scratch: Scratch = None,
    device: Annotated[
        str, typer.Option(help="auto: the GPU if there is one; otherwise a torch device such as cpu or cuda:1.")
    ] = "auto",
    dropout: Annotated[bool, typer.Option("--dropout", help="Keep dropout on, as published.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the dropout noise.")] = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Generate a whole volume of another modality from each input, on the grid of the input.

    A generator that takes several sources gets a volume of each: --source pd=a.nii.gz --source t1=b.nii.gz.

    Writes a JSON file next to each output that records how it was made.
    """
    output = Output(quiet, as_json)
    require_extra("train")
    from flows.server import is_configured, run_flow

    if is_configured():
        chosen = {"root": root, "scratch": scratch, "device": device, "dropout": dropout, "seed": seed}
        written: list[Path] = run_flow("synthesize", run, inputs or [], out, sources=source, **chosen)
    else:
        from flows.progress import show_progress
        from model import outputs, volumes
        from model import synthesize as synthesis
        from model.devices import pick_device

        generator = synthesis.find_generator(root, run, scratch)
        trained = synthesis.load_trained(generator, pick_device(device), dropout=dropout, seed=seed)
        jobs = outputs.plan_outputs(inputs or [], out, trained.direction, source or [])
        with show_progress() as progress:
            written = volumes.synthesize(trained, jobs, progress)
    output.items("written", written)
    output.end()


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="Name of a run, a unique prefix of it, or latest; or a generator file.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the generator and its config.json.")],
    file_format: Annotated[Literal["safetensors", "onnx"], typer.Option("--format", help="File format.")] = "onnx",
    root: Root = DEFAULT_ROOT,
    scratch: Scratch = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Export the generator for use elsewhere; the exported file is read back and compared with the original."""
    output = Output(quiet, as_json)
    require_extra("train")
    if file_format == "onnx":
        require_extra("export")
    from model.export import export as export_generator
    from model.synthesize import find_generator

    path, difference = export_generator(find_generator(root, run, scratch), file_format, out)
    sentence = f"{path}\nread back: slices differ from the original by at most {difference:.1e} of [-1, 1]"
    output.text(sentence, written=path, difference=difference)
    output.end()
