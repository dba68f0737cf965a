"""Commands that share a version or a run: card, push."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.app import DEFAULT_ROOT, Root, Scratch, app
from flows.cli.output import Json, Output, Quiet
from ixi_etl.core.extras import require_extra
from ixi_etl.core.files import os_errors_as_user_errors, read_json, write_atomic
from ixi_etl.errors import CheckpointError, ConfigError

Shared = Annotated[
    str,
    typer.Argument(
        metavar="VERSION|RUN",
        help="NAME@VERSION or the folder of a version; or a run: its name, a prefix of it, latest, or its folder.",
        show_default=False,
    ),
]

CONFIG_FILE = "config.json"  # that of `model.run`, whose import takes seconds
ANY = "USER/NAME"
"""The repository in the instructions of a card, while it is not known."""


@app.command()
def card(
    shared: Shared,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help=r"A file.  \[default: print the card]", show_default=False)
    ] = None,
    root: Root = DEFAULT_ROOT,
    scratch: Scratch = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write the card of a dataset version or of a run, as the Hugging Face Hub shows it.

    Figures are those of the run's evaluations; licence and credit are those of its data.
    """
    output = Output(quiet, as_json)
    folder = _version_folder(root, shared)
    text = _run_card(root, shared, scratch)[0] if folder is None else _version_card(folder)
    if out is None:
        output.text(text.rstrip("\n"), card=text)
    else:
        with os_errors_as_user_errors():
            write_atomic(out, text)
        output.text(str(out), written=out)
    output.end()


@app.command()
def push(
    shared: Shared,
    to: Annotated[str, typer.Option("--to", metavar="hf://USER/NAME", help="Repository on the Hugging Face Hub.")],
    onnx: Annotated[bool, typer.Option("--onnx", help="Of a run: also export the generator to ONNX.")] = False,
    public: Annotated[
        bool, typer.Option("--public/--private", help="Who sees the repository, if it does not exist yet.")
    ] = False,
    i_may_redistribute: Annotated[
        bool, typer.Option("--i-may-redistribute", help="Of a version: its licence lets you pass it on as you do here.")
    ] = False,
    root: Root = DEFAULT_ROOT,
    scratch: Scratch = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Upload the generator of a run to the Hugging Face Hub, with its card and config.json; or a dataset version.

    The token is that of HF_TOKEN or of `hf auth login`.
    """
    output = Output(quiet, as_json)
    require_extra("hub")
    from model import hub

    folder = _version_folder(root, shared)
    repository = hub.parse_target(to, "model" if folder is None else "dataset", private=not public)
    if folder is None:
        text, generator = _run_card(root, shared, scratch, repository.name)
        if onnx:
            require_extra("export")
        files = hub.push_run(repository, generator, text, onnx=onnx)
    else:
        if onnx:
            raise ConfigError("--onnx is for a run; a dataset version has no generator")
        if not i_may_redistribute:
            from ixi_etl.dataset.metadata import licence_of

            licence = licence_of(folder).get("licence", "not recorded")
            raise ConfigError(
                f"the licence of {shared} is: {licence}; it may ask for credit and for the same licence, or forbid "
                "this: if you may pass the data on, add --i-may-redistribute"
            )
        files = hub.push_version(repository, folder, _version_card(folder, repository.name))
    output.items("uploaded", files)
    output.fields({"url": repository.url})
    output.end()


def _version_folder(root: str, shared: str) -> Path | None:
    """The folder of the version that `shared` names; None if it names a run.

    `latest` and names without `@` are runs, because both have such names. The folder of a run may have `@` in its path.
    """
    from ixi_etl.dataset.metadata import METADATA
    from ixi_etl.dataset.versions import find_version, folder_from

    if _is_run(Path(shared)):
        return None
    folder = None if "@" in shared else folder_from(shared)
    is_version = "@" in shared or (folder is not None and (folder / METADATA).is_file())
    return find_version(root, shared) if is_version else None


def _is_run(folder: Path) -> bool:
    """Whether it is the folder of a run, and not that of a generator with the config.json of an export."""
    with os_errors_as_user_errors():
        record = read_json(folder / CONFIG_FILE)
        return isinstance(record, dict) and "config" in record and (folder / "checkpoints").is_dir()


def _version_card(folder: Path, repository: str = ANY) -> str:
    from model.cards_dataset import dataset_card

    return dataset_card(folder, repository)


def _run_card(root: str, shared: str, scratch: Path | None, repository: str = ANY) -> tuple[str, Path]:
    """The card of a run, and the file of its generator."""
    require_extra("train")
    from model.cards import model_card, version_of_run
    from model.checkpoint import read_metadata
    from model.config import TrainConfig
    from model.run import find_run, generator_in

    folder = Path(shared).resolve()  # the name of the folder is that of the run
    if not _is_run(folder):
        is_path = os.sep in shared or shared in (os.curdir, os.pardir)
        if (folder / CONFIG_FILE).is_file() or (is_path and folder.is_dir()):
            raise CheckpointError(f"{shared} is not a run's folder; give a run's name, or NAME@VERSION")
        try:
            folder = find_run(root, shared, scratch)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; a dataset version is named NAME@VERSION") from None
    generator = generator_in(folder)
    config = TrainConfig.model_validate(read_metadata(generator)["config"])
    return model_card(folder, generator, version_of_run(root, config, scratch), repository), generator
