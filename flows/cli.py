"""The command line `ixi-etl`. What it needs is imported where it is used: `--help` must not wait for Prefect."""

from __future__ import annotations

import atexit
import gc
import io
import json
import logging
import math
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flows.output import LOGGERS, Json, Output, Quiet
from flows.presets import Preset
from ixi_etl import __version__
from ixi_etl.errors import ArchiveError, DatasetError, IxiError, StoppedError
from ixi_etl.extras import require_extra
from ixi_etl.signals import end_on_signals

if TYPE_CHECKING:
    from ixi_etl.config import RefreshConfig
    from ixi_etl.publish import Refreshed

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Root = Annotated[
    str, typer.Option("--root", envvar="IXI_ROOT", help="Folder, or s3://bucket/prefix, that holds datasets.")
]
Scratch = Annotated[
    Path | None,
    typer.Option(envvar="IXI_SCRATCH", help="Where the root is on S3: folder for archives and unfinished work."),
]
OwnSource = Annotated[
    str | None,
    typer.Option("--source", help="Your own archives: a folder, a tar file, or a URL. Else the official ones."),
]
InsecureHosts = Annotated[
    list[str] | None,
    typer.Option("--insecure-host", help="Host whose TLS certificate is not checked; may be repeated."),
]
DEFAULT_ROOT = "ixi-data"
DEMO_SPLIT_SEED = 6  # of the six subjects, one is for validation and one for test
NAMING = "[NAME@]VERSION, the beginning of a version, or latest; NAME is ixi-t1-t2 or digits"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ixi-etl {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Turn the IXI brain MRI archives into a verified, versioned, paired T1/T2 dataset."""


@app.command()
def survey(
    root: Root = DEFAULT_ROOT,
    source: OwnSource = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for survey.csv and depths.png.  [default: ROOT/survey]")
    ] = None,
    insecure_host: InsecureHosts = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Histogram the slice counts from the headers alone; nothing is unpacked.

    Prints depths by modality and site, and writes survey.csv (one row per member) and depths.png.
    """
    from flows.progress import show_progress
    from ixi_etl.catalog import MODALITIES, archive_name, modality_of, own_archives
    from ixi_etl.places import Places
    from ixi_etl.schema import without_formulas
    from ixi_etl.survey import depth_histogram, draw_histogram, flat, modal_depths, passed_over, site_records
    from ixi_etl.survey import survey as survey_archives

    if source is None:
        archives = Places(root).archives
        places = {m: str(archives / archive_name(m)) for m in MODALITIES}
        if not all(Path(place).exists() for place in places.values()):
            raise ArchiveError(f"{archives} has no archives yet; run `ixi-etl refresh`, or give --source")
    else:
        places = own_archives(source)
        if source.endswith(".tar"):
            modality = str(modality_of(Path(source).name))
            places = {modality: places[modality]}
    say = Output(quiet, as_json)
    with show_progress() as progress:
        table = survey_archives(places, progress, tuple(insecure_host or ()))
    out = out or Places(root).local / "survey"
    out.mkdir(parents=True, exist_ok=True)
    without_formulas(table).to_csv(out / "survey.csv", index=False)
    histogram, modal = depth_histogram(table), modal_depths(table)
    if histogram.empty:
        why = "; ".join([*passed_over(table, places), f"{out / 'survey.csv'} says why of each member"])
        raise ArchiveError(f"no volume can be read in {', '.join(places.values())}: {why}")
    draw_histogram(histogram, modal, out / "depths.png")
    shown = flat(histogram)
    shown["depth"] = [f"{d} (modal)" if modal[m] == d else f"{d}" for m, d in histogram.index]
    say.table("depths", shown, "Volumes by depth (slices as stored)", site_records(histogram))
    broken = table[table["problem"] != ""]
    if len(broken):
        say.table("broken", broken[["modality", "member", "reason", "problem"]], "Members that are no volume to use")
    noted = table[table["note"] != ""]
    if len(noted):
        say.table("noted", noted[["modality", "member", "note"]], "Headers that say more than one thing")
    say.lines({"members": len(table), "survey": out / "survey.csv", "picture": out / "depths.png"})
    say.end()


@app.command()
def refresh(
    root: Root = DEFAULT_ROOT,
    scratch: Scratch = None,
    source: OwnSource = None,
    preset: Annotated[
        Literal["paired", "paper"],
        typer.Option(help="paired: T1 resampled onto the T2's planes. paper: slices by index, as published."),
    ] = "paired",
    pairing: Annotated[
        Literal["anatomical", "index"] | None, typer.Option(help="How slices are paired, over the preset's.")
    ] = None,
    window: Annotated[
        tuple[int, int] | None, typer.Option(metavar="START STOP", help="Slices [START, STOP) in place of the middle.")
    ] = None,
    slices: Annotated[int | None, typer.Option(min=1, help="How many middle slices.  [default: 20]")] = None,
    depth: Annotated[
        Literal["modal", "any"] | None, typer.Option(help="Keep the commonest number of slices, or any that fits.")
    ] = None,
    registration: Annotated[
        Literal["none", "rigid"] | None, typer.Option(help="Take up the motion between the scans, or not.")
    ] = None,
    min_nmi: Annotated[float | None, typer.Option(min=0, max=1, help="Less similar pairs are low_similarity.")] = None,
    low_similarity: Annotated[
        Literal["flag", "exclude"] | None, typer.Option(help="What becomes of them.  [default: flag]")
    ] = None,
    pictures: Annotated[bool | None, typer.Option(help="Draw each pair.  [default: yes]")] = None,
    split_seed: Annotated[int | None, typer.Option(help="Seed of train / val / test.  [default: 0]")] = None,
    demographics: Annotated[
        str | None, typer.Option(help="Join age and sex: 'official' fetches IXI.xls; or your own .xls, .xlsx or .csv.")
    ] = None,
    max_unreadable: Annotated[float, typer.Option(min=0, max=1, help="Share of pairs that may be unreadable.")] = 0.05,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that cut.  [default: the cores]")] = None,
    dask: Annotated[str | None, typer.Option(help="Dask scheduler to cut on, tcp://host:port.")] = None,
    fetch: Annotated[
        Literal["archives", "members"],
        typer.Option(
            help="members: over HTTP, only those of subjects that may be used; their archive's MD5 is unchecked."
        ),
    ] = "archives",
    connections: Annotated[int, typer.Option(min=1, max=16, help="Parallel ranges for each archive.")] = 4,
    offline: Annotated[bool, typer.Option("--offline", help="Use verified archives; ask no server anything.")] = False,
    insecure_host: InsecureHosts = None,
    then_train: Annotated[
        Preset | None,
        typer.Option(help="Train pix2pix on the version with this preset; resume a training that was stopped."),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Make a dataset version: download, verify, survey, select, cut, publish.

    What was done before is not done again: a run that was stopped goes on from where it was.
    """
    if then_train:
        require_extra("train")
    from ixi_etl.config import PRESETS, DatasetConfig, RefreshConfig

    given = {
        "pairing": pairing,
        "window": window,
        "slices": slices,
        "depth": depth,
        "registration": registration,
        "min_nmi": min_nmi,
        "low_similarity": low_similarity,
        "pictures": pictures,
        "split_seed": split_seed,
    }
    chosen = PRESETS[preset] | {k: v for k, v in given.items() if v is not None}
    config = RefreshConfig(
        root=root,
        scratch=scratch,
        source=source,
        demographics=demographics,
        dataset=DatasetConfig.model_validate(chosen),
        max_unreadable=max_unreadable,
        fetch=fetch,
        connections=connections,
        **({"workers": workers} if workers else {}),
        dask=dask,
        offline=offline,
        insecure_hosts=tuple(insecure_host or ()),
    )
    say = Output(quiet, as_json)
    refreshed = _refresh(config)
    _tell_version(say, refreshed)
    if then_train:
        settings = {"dataset": f"{config.places.name}@{refreshed.version}"}
        folder = _train(then_train, settings, config.root, config.scratch, resume=True)
        if folder is not None:
            _tell_run(say, folder)
    say.end()


def _refresh(config: RefreshConfig) -> Refreshed:
    """As a flow where a Prefect server is configured, else as the plain function."""
    from flows.server import is_configured, run_flow
    from ixi_etl.places import is_url
    from ixi_etl.refresh import find_sources

    if is_configured():
        if not is_url(config.source or ""):
            find_sources(config)  # a mistake is told at once, and not after Prefect has been imported
        refreshed: Refreshed = run_flow("refresh_dataset", config)
        return refreshed
    from flows.progress import show_progress
    from ixi_etl.refresh import refresh as refresh_plainly

    with show_progress() as progress:
        return refresh_plainly(config, progress)


@app.command()
def train(
    preset: Annotated[
        Preset, typer.Option(help="paper: as published. digits: MNIST. smoke: seconds, on a CPU. gpu: large batches.")
    ] = "paper",
    dataset: Annotated[
        str | None, typer.Option(help="NAME@VERSION.  [default: ixi-t1-t2@latest, digits@latest for digits]")
    ] = None,
    root: Root = DEFAULT_ROOT,
    scratch: Scratch = None,
    # Not --run: torchrun would take that for the beginning of an option of its own.
    run_id: Annotated[str | None, typer.Option(help="Name of the run.  [default: from version and settings]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint, if any.")] = False,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A field of the configuration; may be repeated."),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train pix2pix on a dataset version, and measure it on the test split.

    SIGTERM and Ctrl-C save and stop. For several GPUs: torchrun --nproc-per-node N $(which ixi-etl) train ...
    """
    say = Output(quiet, as_json)
    require_extra("train")
    settings = _settings(setting or []) | ({"dataset": dataset} if dataset else {})
    folder = _train(preset, settings, root, scratch, run_id, resume=resume)
    if folder is not None:
        _tell_run(say, folder)
        say.end()


def _train(
    preset: Preset,
    settings: dict[str, Any],
    root: str,
    scratch: Path | None,
    run_id: str | None = None,
    *,
    resume: bool,
) -> Path | None:
    """Train and evaluate; the run's folder, or None in a process of `torchrun` that is not the first.

    As a flow where a Prefect server is configured, else (and under `torchrun`) as the plain functions.
    """
    from flows.server import is_configured, run_flow

    if "RANK" not in os.environ and is_configured():
        given = {"preset": preset, "settings": settings, "root": root, "scratch": scratch, "run": run_id}
        kept: Path = run_flow("train_pix2pix", **given, resume=resume)
        return kept
    from flows.progress import show_progress
    from model import run as runs
    from model.config import preset as preset_of
    from model.data import EmptySplitError
    from model.train import torchrun_place

    prepared = runs.prepare(root, preset_of(preset, **settings), run_id, scratch)
    log = logging.getLogger("model")
    log.info("run %s on %s", prepared.folder, prepared.config.dataset)
    with show_progress() as progress:
        runs.train_run(prepared, resume=resume, progress=progress)
        place = torchrun_place()
        if place is not None and place.rank > 0:
            return None
        try:
            runs.evaluate_run(prepared, progress=progress)
        except EmptySplitError as error:
            log.warning("not evaluated: %s", error)
    return prepared.folder


def _settings(given: list[str]) -> dict[str, Any]:
    """`["steps=20", "side=null"]` -> {"steps": 20, "side": None}: values are JSON, or else words."""
    settings: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise IxiError(f"--set {text}: give NAME=VALUE, for example --set steps=1000")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    return settings


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help="A run, the beginning of its name, or latest.")] = "latest",
    root: Root = DEFAULT_ROOT,
    scratch: Scratch = None,
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="Which subjects.")] = "test",
    weights: Annotated[
        Path | None, typer.Option(help="A checkpoint's file.  [default: the run's best generator]")
    ] = None,
    dropout: Annotated[bool, typer.Option("--dropout", help="Leave dropout on, as published.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure a trained generator by subject (PSNR, SSIM, MAE) next to three baselines.

    Writes evaluation-SPLIT.csv (a row for each subject, method and mask) and evaluation-SPLIT.json into the run; with
    --weights or --dropout under a name of their own.
    """
    say = Output(quiet, as_json)
    require_extra("train")
    from flows.progress import show_progress
    from model.run import evaluate_run, open_run

    opened = open_run(root, run, scratch)
    with show_progress() as progress:
        done = evaluate_run(opened, split=split, weights=weights, dropout=dropout, progress=progress)
    comparison = done.comparison
    _tell_run(say, opened.folder, done.name)
    intervals = comparison[["better_by", "low_95", "high_95"]].itertuples(index=False)
    shown = comparison.assign(better_by=[_with_interval(*row) for row in intervals])
    say.table(
        "comparison",
        shown[["mask", "baseline", "measure", "better_by"]],
        "The generator against each baseline: mean paired difference [95% interval], above 0 is better",
        json.loads(comparison.to_json(orient="records")),  # which makes null of NaN: JSON has none
    )
    if (comparison["subjects"] < 2).any():
        say.words(f"no intervals: they take two subjects, and split {split} has one")
    say.lines({"subjects": opened.folder / f"{done.name}.csv"})
    say.end()


@app.command()
def synthesize(
    run: Annotated[str, typer.Argument(help="A run, the beginning of its name, or latest; or a generator's file.")],
    inputs: Annotated[list[Path], typer.Argument(help="NIfTI volumes (.nii, .nii.gz), or folders of them.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="A .nii or .nii.gz for one input; else a folder.")],
    root: Root = DEFAULT_ROOT,
    scratch: Scratch = None,
    device: Annotated[str, typer.Option(help="auto: the GPU if there is one; else as torch names it.")] = "auto",
    dropout: Annotated[bool, typer.Option("--dropout", help="Leave dropout on, as published.")] = False,
    seed: Annotated[int, typer.Option(help="Of dropout's noise.")] = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Generate a whole volume of the other modality from each input, on its own grid.

    Beside each output lies a JSON file that says how it came to be.
    """
    say = Output(quiet, as_json)
    require_extra("train")
    from flows.server import is_configured, run_flow

    if is_configured():
        chosen = {"root": root, "scratch": scratch, "device": device, "dropout": dropout, "seed": seed}
        written: list[Path] = run_flow("synthesize", run, inputs, out, **chosen)
    else:
        from flows.progress import show_progress
        from model import synthesize as synthesis
        from model.run import pick_device

        generator = synthesis.find_generator(root, run, scratch)
        trained = synthesis.load(generator, pick_device(device), dropout=dropout, seed=seed)
        jobs = synthesis.plan(inputs, out, trained.direction)
        with show_progress() as progress:
            written = synthesis.synthesize(trained, jobs, progress)
    say.each("written", written)
    say.end()


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run, the beginning of its name, or latest; or a generator's file.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the generator and its config.json.")],
    form: Annotated[Literal["safetensors", "onnx"], typer.Option("--format", help="What to write.")] = "onnx",
    root: Root = DEFAULT_ROOT,
    scratch: Scratch = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write the generator to be used elsewhere; it is read back and compared before this says that it is done."""
    say = Output(quiet, as_json)
    require_extra("train")
    if form == "onnx":
        require_extra("export")
    from model.export import export as export_generator
    from model.synthesize import find_generator

    path, difference = export_generator(find_generator(root, run, scratch), form, out)
    sentence = f"{path}\nread back: its slices differ from the original's by {difference:.1e} of [-1, 1] at most"
    say.words(sentence, written=path, difference=difference)
    say.end()


@app.command()
def digits(
    root: Root = DEFAULT_ROOT,
    scratch: Scratch = None,
    source: Annotated[
        str | None, typer.Option("--source", help="Folder or URL with the four files. Else the official host.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=2, help="Only the first so many of the training and of the test file.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use verified files; ask no server anything.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Make a version of MNIST (outlines and digits), to try the training on: download, verify, publish."""
    from flows.progress import show_progress
    from ixi_etl.config import DigitsConfig, DigitsDataset
    from ixi_etl.digits import make_digits

    say = Output(quiet, as_json)
    config = DigitsConfig(
        root=root, scratch=scratch, source=source, dataset=DigitsDataset(limit=limit), offline=offline
    )
    with show_progress() as progress:
        made = make_digits(config, progress)
    _tell_version(say, made)
    say.end()


@app.command()
def verify(
    version: Annotated[str, typer.Argument(help=f"What to check: {NAMING}; or a version's folder.")] = "latest",
    root: Root = DEFAULT_ROOT,
    deep: Annotated[bool, typer.Option("--deep", help="Every hash, every chunk, every value.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Check a published version: files, schema and counts; with --deep every byte."""
    from flows.progress import show_progress
    from ixi_etl import dataset
    from ixi_etl.files import read_json

    say = Output(quiet, as_json)
    folder = dataset.find(root, version)
    facts = dataset.read_facts(folder)
    with show_progress() as progress:
        name = facts["version"] if dataset.folder_of(version) else None  # a copy may have another name than its version
        problems = dataset.verify(folder, version=name, deep=deep, progress=progress)
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        say.facts(folder=folder, sound=False, problems=problems)
        raise DatasetError(
            f"{folder} is not sound: {len(problems)} problem(s); copy it again from where it is sound, "
            f"or `{dataset.COMMANDS[facts['name']]}` makes it again"
        )
    checked = "every byte" if deep else "files, schema and counts"
    named = f"{facts['name']}@{facts['version']}"
    say.words(f"{folder} is sound ({checked} checked)", folder=folder, sound=True, checked=checked, version=named)
    if folder.name != facts["version"]:
        say.words(f"its folder has another name than the version, {named}")
    made_by = read_json(folder / dataset.SOFTWARE) or {}
    if made_by:
        code = f"commit {made_by.get('commit') or 'unknown'}, {made_by.get('python')}, {made_by.get('platform')}"
        say.words(f"{named}, made by ixi-etl {made_by.get('ixi-etl')} ({code})", software=made_by)
    say.end()


@app.command()
def versions(
    old: Annotated[str | None, typer.Argument(help=f"Compare this version ({NAMING}) ...")] = None,
    new: Annotated[str | None, typer.Argument(help="... with this one, or else with the latest.")] = None,
    root: Root = DEFAULT_ROOT,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """List the published versions, or compare two: inputs, configuration, libraries, software and each subject.

    Two versions to compare may also be given as their folders.
    """
    import pandas as pd

    from ixi_etl import dataset
    from ixi_etl.places import Places

    say = Output(quiet, as_json)
    if old is not None:
        _compare(say, root, old, new)
        return
    every = [Places(root, name) for name in dataset.COMMANDS]
    for places in [p for p in every if dataset.published(p)] or every[:1]:
        listed = dataset.list_versions(places)
        latest = dataset.find_latest(places) if listed else dataset.resolve(places)
        rows: list[dict[str, Any]] = []
        for version, facts in listed:
            row = {"version": f"{places.name}@{version}", "latest": version == latest, "damaged": facts is None}
            if facts is None:
                rows.append(row)
                continue
            config = facts["inputs"]["config"]
            row |= {"subjects": facts["subjects"], "splits": facts["splits"]}
            rows.append(row | {key: config[key] for key in ("pairing", "window", "limit") if key in config})
        shown: list[dict[str, Any]] = [
            row
            | {
                "version": row["version"] + (" (latest)" if row["latest"] else ""),
                "subjects": row.get("subjects", "damaged"),
                "splits": ", ".join(f"{n} {split}" for split, n in row.get("splits", {}).items()),
            }
            | ({"limit": row["limit"] or "all"} if "limit" in row else {})
            for row in rows
        ]
        table = pd.DataFrame(shown).drop(columns=["latest", "damaged"]).fillna("")
        say.table(places.name, table, str(places.datasets), rows)
    say.end()


def _compare(say: Output, root: str, old: str, new: str | None) -> None:
    from ixi_etl import dataset

    if new is None:
        new = f"{dataset.dataset_of(old)}@latest"
    if dataset.dataset_of(old) != dataset.dataset_of(new):
        raise DatasetError(f"{old} and {new} are of two datasets; give two versions of one, both as NAME@VERSION")
    folders = dataset.find(root, old), dataset.find(root, new)
    names = [dataset.read_facts(folder)["version"] for folder in folders]
    inputs = dataset.compare_inputs(*folders)
    if inputs.empty:
        say.words(f"{names[0]} and {names[1]} have the same inputs, configuration and software", inputs=[])
    else:
        title = f"Inputs, configuration and software that differ: {names[0]} (old), {names[1]} (new)"
        say.table("inputs", inputs, title)
    changes = dataset.compare(*(dataset.read_manifest(folder) for folder in folders))
    if changes.empty:
        same = f"{names[0]} and {names[1]} have the same subjects, cut from the same bytes in the same way"
        say.words(same, changes=[])
    else:
        say.table("changes", changes, f"{len(changes)} subjects differ: {names[0]} (old), {names[1]} (new)")
    say.end()


@app.command()
def prune(
    keep: Annotated[int, typer.Option(min=1, help="How many of the newest versions of each dataset to keep.")],
    dataset: Annotated[
        str | None, typer.Option(help="Of this dataset alone, ixi-t1-t2 or digits.  [default: of each]")
    ] = None,
    root: Root = DEFAULT_ROOT,
    scratch: Scratch = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Remove old versions; never the latest, nor one that a run uses.

    Says of each version whether it is kept or removed, and why.
    """
    from ixi_etl.dataset import COMMANDS, parse
    from ixi_etl.places import Places
    from ixi_etl.prune import prune as prune_versions

    say = Output(quiet, as_json)
    removed = "would remove" if dry_run else "removed"
    told = []
    for name in [parse(f"{dataset}@latest")[0]] if dataset else COMMANDS:
        for verdict in prune_versions(Places(root, name, scratch), keep, dry_run=dry_run):
            version = f"{name}@{verdict.version}"
            told.append({"version": version, "removed": verdict.removed, "why": verdict.why, "bytes": verdict.size})
            what = removed if verdict.removed else "kept"
            say.words(f"{what} {version}: {verdict.why} ({verdict.size / 1e6:.1f} MB)")
    say.facts(dry_run=dry_run, versions=told)
    say.end()


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where to work; what lies there is replaced.")] = Path("demo"),
    subjects: Annotated[int, typer.Option(min=4, help="How many sound subjects to simulate.")] = 6,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run the whole job on a small simulated IXI, served over HTTP on this machine: refresh, then a smoke training."""
    say = Output(quiet, as_json)
    require_extra("train")
    from flows.progress import show_progress
    from flows.server import run_flow, start_server
    from ixi_etl.config import DatasetConfig, RefreshConfig
    from ixi_etl.phantom import write_phantom
    from ixi_etl.serve import serve_folder
    from ixi_etl.spread import usable_cores

    if folder.exists() and not (folder / "archives-served").is_dir() and any(folder.iterdir()):
        raise IxiError(f"{folder} is not empty and not of a demo; give another --folder")
    shutil.rmtree(folder, ignore_errors=True)
    with show_progress() as progress:
        write_phantom(folder / "archives-served", subjects, workers=usable_cores(), progress=progress)
    root = str(folder / "ixi-data")
    start_server(folder / "prefect")
    with serve_folder(folder / "archives-served") as url:
        dataset = DatasetConfig(split_seed=DEMO_SPLIT_SEED)
        refreshed = run_flow("refresh_dataset", RefreshConfig(root=root, source=url, dataset=dataset))
    _tell_version(say, refreshed)
    _tell_run(say, run_flow("train_pix2pix", preset="smoke", root=root))
    say.end()


def _with_interval(mean: float, low: float, high: float) -> str:
    """`+1.0000 [0.5000, 1.5000]`; a dash for what is not a finite number, as the interval of one subject."""
    shown = f"{mean:+.4f}" if math.isfinite(mean) else "-"
    return f"{shown} [{low:.4f}, {high:.4f}]" if math.isfinite(low) and math.isfinite(high) else f"{shown} [-]"


def _tell_run(say: Output, folder: Path, evaluation: str = "evaluation-test") -> None:
    """The table against the baselines, and where the run's things lie."""
    import pandas as pd

    from ixi_etl.files import read_json

    facts = read_json(folder / f"{evaluation}.json")
    if facts:
        rows = [
            {
                "mask": row["mask"],
                "method": row["method"],
                "PSNR (dB)": _mean_sd(row, "psnr", 2),
                "SSIM": _mean_sd(row, "ssim", 3),
                "MAE": _mean_sd(row, "mae", 4),
            }
            for row in facts["summary"]
        ]
        subjects = facts["summary"][0]["subjects"]
        title = f"{facts['split']}: {subjects} subjects, mean (sd); {facts['normalisation']}, data range 1"
        say.table("evaluation", pd.DataFrame(rows), title, facts["summary"])
    sheets = sorted((folder / "samples").glob("*-gray.png"))
    say.lines(
        {"run": folder, "generator": folder / "generator.safetensors"}
        | ({"samples": sheets[-1]} if sheets else {})
        | {"report": folder / "report.html"}
    )


def _mean_sd(row: dict[str, Any], measure: str, digits: int) -> str:
    mean, sd = row[f"{measure}_mean"], row[f"{measure}_std"]
    spread = "" if sd is None else f" ({sd:.{digits}f})"  # of a single subject there is none
    return ("-" if mean is None else f"{mean:.{digits}f}") + spread


def _tell_version(say: Output, refreshed: Refreshed) -> None:
    from ixi_etl import dataset, manifest
    from ixi_etl.schema import EXCLUDED
    from ixi_etl.store import STORE
    from ixi_etl.survey import flat, site_records

    table = dataset.read_manifest(refreshed.folder)
    schema = dataset.SCHEMAS[dataset.read_facts(refreshed.folder)["name"]]
    funnel, exclusions = manifest.funnel(table, schema), manifest.exclusions(table)
    say.table("funnel", flat(funnel), "Subjects left after each step", site_records(funnel))
    if (table["status"] == EXCLUDED).any():
        say.table("exclusions", flat(exclusions), "Why the others are out", site_records(exclusions))
    files = {"store": STORE, "manifest": dataset.MANIFEST, "report": dataset.REPORT}
    facts: dict[str, Any] = {"version": refreshed.version}
    facts["state"] = "published" if refreshed.is_new else "published before, nothing to do"
    facts |= {k: refreshed.folder / name for k, name in files.items() if (refreshed.folder / name).exists()}
    say.lines(facts)


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line. A user-correctable error ends in one line and exit status 1."""
    if arguments is None:  # in a process of its own
        end_on_signals()
        _open_missing_streams()
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="surrogateescape")  # file names that are not UTF-8 are printed byte by byte
    atexit.register(gc.freeze)  # else Python looks for garbage once more before it ends: 0.2 s, with pandas in memory
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.handlers, logger.propagate = [handler], False
    streams = sys.stdout, sys.stderr
    status = _run(arguments)
    try:
        sys.stdout.flush()
        if (sys.stdout, sys.stderr) != streams:  # typer takes every broken pipe for one that nobody reads any more
            sys.stdout, sys.stderr = streams
            sys.stdout.flush()
            typer.echo("error: a connection broke off (broken pipe); run the same command again", err=True)
    except BrokenPipeError:  # of `| head -1`: no error, and Python must not try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        typer.echo(f"error: cannot write the result: {error.strerror or error}", err=True)
        status = 1
    sys.exit(status)


def _run(arguments: list[str] | None) -> int:
    """The exit status."""
    from pydantic import ValidationError

    Output.current = None
    try:
        app(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except StoppedError as error:
        return _fail(str(error), 128 + error.number, "")
    except IxiError as error:
        return _fail(str(error))
    except OSError as error:
        with suppress(OSError):
            sys.stdout.flush()  # fails again where stdout is what failed, which `main` tells
            return _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except ValidationError as error:
        from ixi_etl.config import in_a_line

        return _fail(in_a_line(error))
    return 1


def _fail(message: str, status: int = 1, label: str = "error: ") -> int:
    """Print the error on stderr, and into the JSON object of a command that was asked for one; the exit status."""
    typer.echo(label + message, err=True)
    if Output.current is not None:
        with suppress(OSError):  # stdout may be what failed; stderr and the status still tell of the error
            Output.current.fail(message)
    return status


def _open_missing_streams() -> None:
    """A daemon may have closed them (`>&-`); Python then has None, which nothing can be printed to."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
