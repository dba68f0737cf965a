"""Commands for published versions: verify, versions, export-dataset, prune, reproduce."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flows.cli.app import DEFAULT_ROOT, VERSION_HELP, Root, Scratch, app
from flows.cli.output import Json, Output, Quiet
from ixi_etl.core.text import quantity
from ixi_etl.errors import ConfigError, DatasetError


@app.command()
def verify(
    version: Annotated[str, typer.Argument(help=f"Version to check: {VERSION_HELP}; or its folder.")] = "latest",
    root: Root = DEFAULT_ROOT,
    deep: Annotated[bool, typer.Option("--deep", help="Check every hash, chunk and value.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Check a published version: files, schema and counts; with --deep, every byte."""
    from flows.progress import show_progress
    from ixi_etl.core.files import read_json
    from ixi_etl.dataset import command, metadata, verify, versions

    output = Output(quiet, as_json)
    folder = versions.find_version(root, version)
    described = metadata.read_metadata(folder)
    with show_progress() as progress:
        # A copied folder may have any name; in a root the folder's name must be the version's.
        name = described["version"] if versions.folder_from(version) else None
        problems = verify.verify(folder, version=name, deep=deep, progress=progress)
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        output.data(folder=folder, sound=False, problems=problems)
        raise DatasetError(
            f"{folder} is damaged: {quantity(len(problems), 'problem')}; copy it again from an intact copy, "
            f"or remove it and make it again with {command.how_to_make(described)}"
        )
    checked = "every byte" if deep else "files, schema and counts"
    named = f"{described['name']}@{described['version']}"
    output.text(f"{folder} is intact ({checked} checked)", folder=folder, sound=True, checked=checked, version=named)
    if folder.name != described["version"]:
        output.text(f"it is a copy of {named}")
    made_by = read_json(folder / metadata.SOFTWARE) or {}
    if made_by:
        code = f"commit {made_by.get('commit') or 'unknown'}, {made_by.get('python')}, {made_by.get('platform')}"
        output.text(f"{named}, made by ixi-etl {made_by.get('ixi-etl')} ({code})", software=made_by)
    output.end()


@app.command()
def versions(
    old: Annotated[str | None, typer.Argument(help=f"Compare this version ({VERSION_HELP}) ...")] = None,
    new: Annotated[str | None, typer.Argument(help="... with this one, by default the latest.")] = None,
    root: Root = DEFAULT_ROOT,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """List the published versions, or compare two: inputs, configuration, libraries, software and each subject.

    Versions to compare can also be given as folders.
    """
    import pandas as pd

    from ixi_etl.core.storage import DataRoot
    from ixi_etl.dataset import versions

    output = Output(quiet, as_json)
    if old is not None:
        _compare(output, root, old, new)
        return
    roots = [DataRoot(root, name) for name in versions.datasets_in(root)]
    for data_root in [r for r in roots if versions.published_versions(r)] or roots[:1]:
        listed = versions.list_versions(data_root)
        latest = versions.find_latest(data_root) if listed else versions.resolve_version(data_root)
        rows = [_version_row(data_root.name, name, described, name == latest) for name, described in listed]
        table = pd.DataFrame([_shown_version(row) for row in rows]).fillna("")
        output.table(data_root.name, table, str(data_root.datasets), rows)
    output.end()


def _version_row(dataset: str, version: str, described: Mapping[str, Any] | None, is_latest: bool) -> dict[str, Any]:
    """The JSON row of a version; `described` is None if its metadata are damaged."""
    row: dict[str, Any] = {"version": f"{dataset}@{version}", "latest": is_latest, "damaged": described is None}
    if described is None:
        return row
    config = described["inputs"]["config"]
    row |= {"subjects": described["subjects"], "splits": described["splits"]}
    return row | {key: config[key] for key in ("pairing", "window", "limit") if key in config}


def _shown_version(row: Mapping[str, Any]) -> dict[str, Any]:
    """The same row for people."""
    shown = {key: value for key, value in row.items() if key not in ("latest", "damaged")}
    shown["version"] += " (latest)" if row["latest"] else ""
    shown["subjects"] = row.get("subjects", "damaged")
    shown["splits"] = ", ".join(f"{count} {split}" for split, count in row.get("splits", {}).items())
    if "limit" in row:
        shown["limit"] = row["limit"] or "all"
    return shown


def _compare(output: Output, root: str, old: str, new: str | None) -> None:
    from ixi_etl.dataset import compare, metadata, versions

    if new is None:
        new = f"{versions.dataset_of(old)}@latest"
    if versions.dataset_of(old) != versions.dataset_of(new):
        raise ConfigError(f"{old} and {new} are versions of different datasets; give two versions of one dataset")
    folders = versions.find_version(root, old), versions.find_version(root, new)
    names = [metadata.read_metadata(folder)["version"] for folder in folders]
    inputs = compare.compare_inputs(*folders)
    if inputs.empty:
        output.text(f"{names[0]} and {names[1]} have the same inputs, configuration and software", inputs=[])
    else:
        title = f"Inputs, configuration and software that differ: {names[0]} (old), {names[1]} (new)"
        output.table("inputs", inputs, title)
    changes = compare.compare_manifests(*(metadata.read_manifest(folder) for folder in folders))
    if changes.empty:
        same = f"{names[0]} and {names[1]} have the same subjects, cut from the same bytes in the same way"
        output.text(same, changes=[])
    else:
        output.table(
            "changes",
            changes,
            f"Differences of {quantity(len(changes), 'subject')}: {names[0]} (old), {names[1]} (new)",
        )
    output.end()


@app.command()
def export_dataset(
    file_format: Annotated[
        Literal["selfrdb", "syndiff", "pix2pix", "nifti", "bids", "bids-raw"],
        typer.Option(
            "--format",
            help="Whose files to write; nifti is for nnU-Net and MONAI, bids-raw has the whole scans as published.",
        ),
    ],
    out: Annotated[str, typer.Option("-o", "--out", help="New folder for the files.")],
    version: Annotated[str, typer.Argument(help=f"Version to export: {VERSION_HELP}; or its folder.")] = "latest",
    direction: Annotated[
        str | None,
        typer.Option(help=r"SOURCE->TARGET, for example t2->t1.  \[default: that of the dataset]", show_default=False),
    ] = None,
    bits: Annotated[
        Literal["8", "16"] | None,
        typer.Option(help=r"Bits of the grey levels of pix2pix.  \[default: 8]", show_default=False),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            help=r"Archives or folder of the scans, for bids-raw.  \[default: those of the refresh]", show_default=False
        ),
    ] = None,
    root: Root = DEFAULT_ROOT,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a version as files that other projects read: SelfRDB, SynDiff, pix2pix, nnU-Net, MONAI and BIDS.

    The split is kept, by subject. export.csv lists what went where; LICENSE.txt (in BIDS: LICENSE) says what to
    pass on with the files.
    """
    import pandas as pd

    from flows.progress import show_progress
    from ixi_etl.dataset import metadata, versions
    from ixi_etl.exports import export

    output = Output(quiet, as_json)
    folder = versions.find_version(root, version)
    # A copied folder may have any name.
    name = metadata.read_metadata(folder)["version"] if versions.folder_from(version) else None
    with show_progress() as progress:
        done = export.export_dataset(
            folder,
            file_format,
            out,
            direction=direction,
            bits=int(bits) if bits else None,
            source=source,
            version=name,
            progress=progress,
        )
    table = pd.DataFrame([{"split": split, **counts} for split, counts in done.counts.items()])
    output.table("splits", table, f"{done.version} as {file_format}")
    output.data(version=done.version, left_out=done.left_out)
    output.fields({"folder": done.folder})
    output.end()


@app.command()
def prune(
    keep: Annotated[int, typer.Option(min=1, help="Number of newest versions of each dataset to keep.")],
    dataset: Annotated[
        str | None,
        typer.Option(help=r"Only this dataset, for example ixi-t1-t2 or digits.  \[default: each]", show_default=False),
    ] = None,
    root: Root = DEFAULT_ROOT,
    scratch: Scratch = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be removed; remove nothing.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Remove old versions, except the newest KEEP, the latest, and those that a run uses.

    Prints for each version whether it is kept or removed, and why.
    """
    from ixi_etl.core.storage import DataRoot
    from ixi_etl.dataset.prune import prune_versions
    from ixi_etl.dataset.versions import datasets_in, parse_version

    output = Output(quiet, as_json)
    removed = "would remove" if dry_run else "removed"
    rows = []
    for name in [parse_version(f"{dataset}@latest")[0]] if dataset else datasets_in(root):
        for decision in prune_versions(DataRoot(root, name, scratch), keep, dry_run=dry_run):
            version = f"{name}@{decision.version}"
            rows.append({"version": version, "removed": decision.removed, "why": decision.why, "bytes": decision.size})
            action = removed if decision.removed else "kept"
            output.text(f"{action} {version}: {decision.why} ({decision.size / 1e6:.1f} MB)")
    output.data(dry_run=dry_run, versions=rows)
    output.end()


@app.command()
def reproduce(
    version: Annotated[str, typer.Argument(help=f"Version: {VERSION_HELP}; or its folder.")] = "latest",
    root: Root = DEFAULT_ROOT,
    scratch: Scratch = None,
    source: Annotated[str | None, typer.Option(help="The scans, as --source of refresh or digits.")] = None,
    demographics: Annotated[
        str | None,
        typer.Option(help="The table of age and sex: the maker's own; or IXI.xls, if neither source nor root has it."),
    ] = None,
    pattern: Annotated[list[str] | None, typer.Option(help="As --pattern of refresh; may be repeated.")] = None,
    keep: Annotated[
        Path | None,
        typer.Option(help=r"New folder for the copy.  \[default: a temporary one, removed]", show_default=False),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Print the command and pins that make a version again; with its archives, make it and compare every byte.

    The archives, and IXI.xls, are those of --source, or those that the root has; members that --fetch members took from
    IXI's host are fetched again. Fails if a byte differs, and names files and causes.
    """
    from contextlib import AbstractContextManager, nullcontext
    from tempfile import TemporaryDirectory

    from flows.progress import show_progress
    from ixi_etl.core.storage import DataRoot, expand_home
    from ixi_etl.dataset import command, metadata, versions
    from ixi_etl.recipes import ixi_inputs, reproduce

    output = Output(quiet, as_json)
    folder = versions.find_version(root, version)
    described = metadata.read_metadata(folder)
    name, made_by = f"{described['name']}@{described['version']}", reproduce.compare_software(folder)
    output.table("software", made_by, f"What {name} was made with, and what is installed")
    recorded = dict(zip(made_by["what"], made_by["recorded"], strict=True))
    output.text(f"code:     ixi-etl {recorded['ixi-etl']}, commit {recorded['commit']}")
    output.text(f"pins:     {reproduce.pins(made_by)}", pins=reproduce.pins(made_by))
    output.text(f"command:  {command.command_of(described)}", command=command.command_of(described))
    data_root = DataRoot(root, described["name"], scratch)
    missing = reproduce.missing_inputs(folder, data_root, demographics) if source is None else []
    if missing:
        where = f"{data_root.archives} has no {', '.join(missing)}"
        option = "it as --demographics" if missing == [ixi_inputs.DEMOGRAPHICS] else "--source"
        output.text(f"not made again: {where}; give {option} to compare every byte", made_again=False)
        output.end()
        return
    keep = expand_home(keep).resolve() if keep else None
    if keep is not None and keep.exists():
        raise ConfigError(f"{keep} exists; give a new folder as --keep")
    place: AbstractContextManager[str] = nullcontext(str(keep)) if keep else TemporaryDirectory[str](prefix="ixi-etl-")
    with place as work, show_progress() as progress:
        again = reproduce.reproduce(
            folder,
            data_root,
            Path(work),
            source=source,
            demographics=demographics,
            patterns=tuple(pattern or ()),
            progress=progress,
        )
    problem = reproduce.differences_message(again, made_by, name)
    output.data(made_again=True, same=problem is None)
    if problem:
        if len(again.inputs):
            output.table("inputs", again.inputs, f"Inputs that differ: {name} (old), made again (new)")
        output.table("files", again.files, "Files that differ, and their SHA-256")
        raise DatasetError(problem)
    compared = len(described["files"]) + 1
    output.text(f"{name} was made again: all {compared} files have the same bytes ({metadata.SOFTWARE} not compared)")
    output.end()
