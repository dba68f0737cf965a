"""Commands that simulate archives: demo, simulate."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.app import app
from flows.cli.output import Json, Output, Quiet
from flows.cli.show import show_run, show_version
from ixi_etl.core.extras import require_extra
from ixi_etl.errors import ConfigError

SPLIT_SEED = 6  # puts one of the six subjects into validation and one into test


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Folder to work in; an earlier demo in it is replaced.")] = Path("demo"),
    subjects: Annotated[int, typer.Option(min=4, help="Number of valid subjects to simulate.")] = 6,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run the whole pipeline on a small simulated IXI, served over HTTP on this machine: refresh, then a smoke run."""
    output = Output(quiet, as_json)
    require_extra("train")
    from flows.progress import show_progress
    from flows.server import run_flow, start_server
    from ixi_etl.config import DatasetConfig, RefreshConfig
    from ixi_etl.core.parallel import usable_cores
    from ixi_etl.testing.loopback import serve_folder
    from ixi_etl.testing.phantom import write_phantom

    if folder.exists() and not (folder / "archives-served").is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and not an earlier demo; give another --folder")
    shutil.rmtree(folder, ignore_errors=True)
    with show_progress() as progress:
        write_phantom(folder / "archives-served", subjects, workers=usable_cores(), progress=progress)
    root = str(folder / "ixi-data")
    start_server(folder / "prefect")
    with serve_folder(folder / "archives-served") as url:
        dataset = DatasetConfig(split_seed=SPLIT_SEED)
        refreshed = run_flow("refresh_dataset", RefreshConfig(root=root, source=url, dataset=dataset))
    show_version(output, refreshed)
    show_run(output, run_flow("train_pix2pix", preset="smoke", root=root))
    output.end()


@app.command()
def simulate(
    folder: Annotated[Path, typer.Argument(help="Folder for the archives; existing ones in it are replaced.")],
    bases: Annotated[
        Path | None,
        typer.Option(help="Folder of real heads, NAME_T1.nii.gz and NAME_T2.nii.gz, to warp; otherwise ellipsoids."),
    ] = None,
    person: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN",
            help="With --bases: regular expression of the person in NAME; by default what precedes the first _.",
        ),
    ] = None,
    modalities: Annotated[
        str | None,
        typer.Option(
            metavar="T1,T2,...",
            help="Which of T1, T2, PD, MRA to simulate; by default T1 and T2, and the PD of --bases.",
        ),
    ] = None,
    subjects: Annotated[int, typer.Option(min=1, help="Number of subjects.")] = 12,
    seed: Annotated[int, typer.Option(min=0, help="Seed of anatomies, poses, motions and noise.")] = 1,
    oddities: Annotated[bool, typer.Option(help="Add unusual depths, missing scans and damaged members.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Simulate archives like IXI's, with the true motion of each subject in truth.json.

    With --bases, no person's heads are in two splits of a refresh with the default split, if there are three people.
    """
    output = Output(quiet, as_json)
    from flows.progress import show_progress
    from ixi_etl.config import chosen_modalities
    from ixi_etl.core.parallel import usable_cores
    from ixi_etl.testing.anatomies import PERSON
    from ixi_etl.testing.phantom import write_phantom

    wanted = chosen_modalities(modalities) if modalities is not None else None
    if wanted is not None and len(wanted) < 2:
        raise ConfigError(f"--modalities {wanted[0]}: a subject has two scans or more; give two or more modalities")
    if person is not None and bases is None:
        raise ConfigError("--person says how the files of --bases are named; give --bases too")
    with show_progress() as progress:
        write_phantom(
            folder,
            subjects,
            seed,
            modalities=wanted,
            oddities=oddities,
            bases=bases,
            person=PERSON if person is None else person,
            workers=usable_cores(),
            progress=progress,
        )
    output.text(f"{folder} has archives of {subjects} simulated subjects", folder=folder, subjects=subjects)
    output.end()
