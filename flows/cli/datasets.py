"""Commands that look at archives and make datasets: survey, check-official, refresh, digits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flows.cli.app import app
from flows.cli.options import options_from
from flows.cli.output import Json, Output, Quiet
from flows.cli.show import show_run, show_version
from flows.presets import Preset
from ixi_etl.config import DatasetConfig, DigitsConfig, DigitsDataset, RefreshConfig, chosen_modalities
from ixi_etl.core.extras import require_extra
from ixi_etl.core.text import quantity
from ixi_etl.errors import ArchiveError, DatasetError
from ixi_etl.modalities import DEFAULT_MODALITIES
from ixi_etl.preparations import configure

if TYPE_CHECKING:
    from ixi_etl.dataset.publish import PublishedVersion
    from ixi_etl.scans.survey import VolumeFile


@app.command()
@options_from(
    only=("root", "source", "modalities", "pattern", "insecure_hosts"), config=RefreshConfig, dataset=DatasetConfig
)
def survey(
    config: dict[str, Any],
    dataset: dict[str, Any],
    out: Annotated[
        Path | None,
        typer.Option(help=r"Folder for survey.csv and depths.svg.  \[default: ROOT/survey]", show_default=False),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Count the volumes by number of slices, from the headers alone; nothing is unpacked.

    Prints the depths by modality and site, and writes survey.csv (one row per member) and depths.svg.
    """
    from flows.progress import show_progress
    from ixi_etl.dataset.schema import without_formulas
    from ixi_etl.report.depth_chart import depths_svg
    from ixi_etl.scans.site_tables import flatten, site_table_to_records
    from ixi_etl.scans.survey import depth_histogram, describe_skipped_members, modal_depths
    from ixi_etl.scans.survey import survey as survey_archives

    output = Output(quiet, as_json)
    survey_config = RefreshConfig.model_validate(config)
    archives = _archives_to_survey(survey_config, chosen_modalities(dataset.get("modalities", DEFAULT_MODALITIES)))
    with show_progress() as progress:
        table = survey_archives(archives, progress, survey_config.http, survey_config.pattern)
    out = out or survey_config.data_root.local / "survey"
    out.mkdir(parents=True, exist_ok=True)
    without_formulas(table).to_csv(out / "survey.csv", index=False)
    histogram, modal = depth_histogram(table), modal_depths(table)
    if histogram.empty:
        skipped = describe_skipped_members(table, archives, survey_config.pattern)
        reasons = [*skipped, f"{out / 'survey.csv'} has the reason for each member"]
        read = [
            found if isinstance(found, str) else f"{quantity(len(found), 'file')} of {m}"
            for m, found in archives.items()
        ]
        raise ArchiveError(f"no volume can be read in {', '.join(read)}: {'; '.join(reasons)}")
    counts = site_table_to_records(histogram)
    (out / "depths.svg").write_text(depths_svg(counts, modal), encoding="utf-8")
    shown = flatten(histogram)
    shown["depth"] = [f"{depth} (modal)" if modal[m] == depth else f"{depth}" for m, depth in histogram.index]
    output.table("depths", shown, "Volumes by depth (slices as stored)", counts)
    broken = table[table["problem"] != ""]
    if len(broken):
        output.table("broken", broken[["modality", "member", "reason", "problem"]], "Unusable members")
    noted = table[table["note"] != ""]
    if len(noted):
        output.table("noted", noted[["modality", "member", "note"]], "Headers with contradictions")
    output.fields({"members": len(table), "survey": out / "survey.csv", "picture": out / "depths.svg"})
    output.end()


@app.command("check-official")
@options_from(only=("root", "source", "demographics", "insecure_hosts"), config=RefreshConfig)
def check_official(config: dict[str, Any], quiet: Quiet = False, as_json: Json = False) -> None:
    """Compare the official archives with what is published about IXI: counts, depths, orientations, spacings.

    Reads the headers of the archives of an earlier refresh, or of --source, in about a minute. Prints one line per
    published fact, and fails if one differs. Nobody on this project has read the archives: please report differences.
    """
    import pandas as pd

    from flows.progress import show_progress
    from ixi_etl.recipes.ixi_official import check_archives, differences_message

    output = Output(quiet, as_json)
    check_config = RefreshConfig.model_validate(config)
    with show_progress() as progress:
        findings = check_archives(check_config, _find_archives(check_config), progress)
    words = {True: "agrees", False: "DIFFERS", None: "not compared"}
    rows = [asdict(finding) | {"result": words[finding.agrees]} for finding in findings]
    shown = pd.DataFrame(rows)[["result", "fact", "published", "found"]]
    problem = differences_message(findings)
    if problem:
        shown["affects"] = [finding.matters if finding.agrees is False else "" for finding in findings]
    output.table("findings", shown, "Published facts of IXI and what these archives contain", rows)
    if problem:
        raise DatasetError(problem)
    output.end()


def _find_archives(config: RefreshConfig, modalities: Sequence[str] = DEFAULT_MODALITIES) -> dict[str, str]:
    """Modality -> archive: those of `--source`, or those that an earlier refresh downloaded."""
    from ixi_etl.modalities import archive_name
    from ixi_etl.sources.user_source import find_archives

    if config.source is not None:
        return find_archives(config.source, modalities)
    archives = config.data_root.archives
    locations = {m: str(archives / archive_name(m)) for m in modalities}
    missing = [archive_name(m) for m, location in locations.items() if not Path(location).exists()]
    if missing:
        what = "archives yet" if len(missing) == len(locations) else missing[0]
        raise ArchiveError(f"{archives} has no {what}; run `ixi-etl refresh`, or give --source")
    return locations


def _archives_to_survey(
    config: RefreshConfig, modalities: Sequence[str]
) -> Mapping[str, str] | Mapping[str, Sequence[VolumeFile]]:
    """The archives or files of these modalities, or only the archive that `--source` names."""
    from ixi_etl.modalities import modality_of
    from ixi_etl.sources.user_source import find_archives, find_inputs

    if config.source is None:
        return _find_archives(config, modalities)
    if config.source.endswith(".tar") and not Path(config.source).is_dir():
        named = modality_of(Path(config.source).name)
        return find_archives(config.source, (named,) if named else modalities)
    return find_inputs(config.source, modalities, config.pattern)


@app.command()
@options_from(config=RefreshConfig, dataset=DatasetConfig)
def refresh(
    config: dict[str, Any],
    dataset: dict[str, Any],
    preset: Annotated[
        Literal["paired", "paper", "syndiff", "selfrdb", "moschetto"],
        typer.Option(
            help="paired: all scans on the planes of the reference. paper: slices by index, as published. syndiff, "
            "selfrdb, moschetto: as near to these publications as their texts allow; all deviations are recorded."
        ),
    ] = "paired",
    then_train: Annotated[
        Preset | None,
        typer.Option(help="Train pix2pix on the version with this preset; resume a run that was stopped."),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Make a dataset version: download, verify, survey, select, cut, publish.

    Work that was finished before is not repeated: a run that was stopped resumes.
    """
    if then_train:
        require_extra("train")
    chosen = configure(preset, dataset)
    refresh_config = RefreshConfig.model_validate(config | {"dataset": chosen})
    output = Output(quiet, as_json)
    refreshed = run_refresh(refresh_config)
    show_version(output, refreshed)
    if then_train:
        name = f"{refresh_config.data_root.name}@{refreshed.version}"
        _require_hand_off(output, name, refreshed)
        from flows.cli.runs import run_training

        settings = {"dataset": name}
        root, scratch = refresh_config.root, refresh_config.scratch
        folder = run_training(then_train, settings, root, scratch, resume=True)
        if folder is not None:
            show_run(output, folder)
    output.end()


def _require_hand_off(output: Output, name: str, refreshed: PublishedVersion) -> None:
    """Do not train on a version that a failed check holds, as the flow does not.

    Raises:
        DatasetError: it is held; the version is published and printed.
    """
    from ixi_etl.dataset.checks import describe_failure, failed_checks, held_by
    from ixi_etl.dataset.metadata import COMPARED_PAGE

    if held_by(refreshed.folder):
        output.end()
        failures = "; ".join(map(describe_failure, failed_checks(refreshed.folder)))
        raise DatasetError(
            f"not trained on {name}: {failures}; look at {refreshed.folder / COMPARED_PAGE}, "
            f"then `ixi-etl train --dataset {name}`"
        )


def run_refresh(config: RefreshConfig) -> PublishedVersion:
    """Refresh as a flow if a Prefect server is configured, otherwise as a plain function."""
    from flows.server import is_configured, run_flow
    from ixi_etl.core.storage import is_url
    from ixi_etl.recipes.ixi_inputs import find_sources

    if is_configured():
        if not is_url(config.source or ""):
            find_sources(config)  # report a mistake at once, before Prefect is imported
        refreshed: PublishedVersion = run_flow("refresh_dataset", config)
        return refreshed
    from flows.progress import show_progress
    from ixi_etl.recipes import ixi

    with show_progress() as progress:
        return ixi.refresh(config, progress)


@app.command()
@options_from(config=DigitsConfig, dataset=DigitsDataset)
def digits(config: dict[str, Any], dataset: dict[str, Any], quiet: Quiet = False, as_json: Json = False) -> None:
    """Make a version of MNIST (outlines and digits) to try training on: download, verify, publish."""
    from flows.progress import show_progress
    from ixi_etl.recipes.digits import make_digits

    output = Output(quiet, as_json)
    digits_config = DigitsConfig.model_validate(config | {"dataset": dataset})
    with show_progress() as progress:
        made = make_digits(digits_config, progress)
    show_version(output, made)
    output.end()
