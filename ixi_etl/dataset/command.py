"""The command that makes a version again, from what its `dataset.json` records."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ixi_etl.config import DatasetConfig, DigitsDataset, StrictModel
from ixi_etl.core.option import Option
from ixi_etl.dataset.credit import IXI, UNVERIFIED
from ixi_etl.errors import DatasetError
from ixi_etl.modalities import DATASETS, DEFAULT_MODALITIES, DEFAULT_REFERENCE
from ixi_etl.preparations import configure

FILES, TABLE = "FILES", "TABLE"
"""What stands for the user's own files, and own table of age and sex, whose place no version records."""


def _refresh_command(modalities: tuple[str, ...], reference: str) -> str:
    options = "" if modalities == DEFAULT_MODALITIES else f" --modalities {','.join(modalities)}"
    return f"ixi-etl refresh{options}" + ("" if reference == DEFAULT_REFERENCE else f" --reference {reference}")


COMMANDS = {name: _refresh_command(*chosen) for name, chosen in DATASETS.items()} | {"digits": "ixi-etl digits"}
"""All datasets that can be made, each with the command that makes a version of it."""


def command_of(version: Mapping[str, Any]) -> str:
    """The exact command that makes the version of this `dataset.json`, without `--root`.

    `FILES` and `TABLE` stand for the user's own scans and table.

    Raises:
        DatasetError: this code does not know the version's configuration.
    """
    wanted = read_config(version)
    if isinstance(wanted, DigitsDataset):
        return shlex.join(["ixi-etl", "digits", *_options(wanted, DigitsDataset())])
    presets = [wanted.preparation] if wanted.preparation != "none" else ["paired", "paper"]
    commands = []
    for preset in presets:
        default = configure(preset, {})
        given = {field: getattr(wanted, field) for field in _differing(wanted, default)}
        if configure(preset, given) == wanted:
            commands.append([*([] if preset == "paired" else ["--preset", preset]), *_options(wanted, default)])
    if not commands:
        raise DatasetError("no preset and options give this configuration")
    return shlex.join(["ixi-etl", "refresh", *min(commands, key=len), *_source_options(version)])


def read_config(version: Mapping[str, Any]) -> DatasetConfig | DigitsDataset:
    """The configuration of a version.

    Raises:
        DatasetError: it has fields or values that this code does not know.
    """
    model = DatasetConfig if version["name"] in DATASETS else DigitsDataset
    try:
        return model.model_validate(version["inputs"]["config"])
    except ValidationError as error:
        raise DatasetError(
            f"this ixi-etl does not know the configuration of {version['name']}@{version.get('version')}, which "
            f"pipeline version {version['inputs'].get('pipeline_version')} made; install the one in its software.json"
        ) from error


def how_to_make(version: Mapping[str, Any]) -> str:
    """The command in backticks, for a message; of an older configuration, where its options are."""
    try:
        return f"`{command_of(version)}`"
    except DatasetError:
        return f"`{COMMANDS[version['name']]}` with the options in inputs.config of dataset.json"


def has_own_demographics(version: Mapping[str, Any]) -> bool:
    """Whether age and sex came from a table of the user's own."""
    source = version.get("sources", {}).get("demographics")
    return source is not None and source["source"] != IXI


def has_own_scans(version: Mapping[str, Any]) -> bool:
    """Whether scans came from files other than those of IXI: the user's own, or simulated ones."""
    sources = version.get("sources", {})
    return any(source["source"] not in (IXI, UNVERIFIED) for name, source in sources.items() if name != "demographics")


def needs_source(version: Mapping[str, Any]) -> bool:
    """Whether the command has `--source`: for scans other than IXI's, and for names that templates describe."""
    return has_own_scans(version) or bool(version["inputs"].get("pattern"))


def _source_options(version: Mapping[str, Any]) -> list[str]:
    """The options for the inputs that decide a version's name beside its configuration."""
    inputs = version["inputs"]
    options = ["--fetch", "members"] if "members_sha256" in inputs else []
    options += ["--source", FILES] if needs_source(version) else []
    for pattern in inputs.get("pattern", []):
        options += ["--pattern", pattern]
    if inputs.get("demographics_sha256"):
        options += ["--demographics", TABLE if has_own_demographics(version) else "official"]
    return options


def _differing(config: StrictModel, default: StrictModel) -> list[str]:
    return [name for name in type(config).model_fields if getattr(config, name) != getattr(default, name)]


def _options(config: StrictModel, default: StrictModel) -> list[str]:
    """The command-line options of the fields in which `config` differs from `default`."""
    options = []
    for name in _differing(config, default):
        value, flag = getattr(config, name), name.replace("_", "-")
        is_text = any(
            isinstance(item, Option) and item.type is str for item in type(config).model_fields[name].metadata
        )
        if isinstance(value, bool):
            options += [f"--{flag}" if value else f"--no-{flag}"]
        elif isinstance(value, tuple):
            options += [f"--{flag}", *([",".join(value)] if is_text else map(str, value))]
        elif value is not None:
            options += [f"--{flag}", str(value)]
    return options
