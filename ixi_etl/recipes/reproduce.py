"""Make a published version again in another root, to compare it byte by byte: `ixi-etl reproduce`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata as distributions
from pathlib import Path
from typing import Any

import pandas as pd

from ixi_etl.config import DatasetConfig, DigitsConfig, RefreshConfig
from ixi_etl.core import software
from ixi_etl.core.files import read_json, to_json, write_atomic
from ixi_etl.core.progress import Progress, no_progress
from ixi_etl.core.storage import DataRoot, is_url
from ixi_etl.dataset.command import has_own_demographics, has_own_scans, read_config
from ixi_etl.dataset.compare import compare_files, compare_inputs
from ixi_etl.dataset.metadata import DIGEST, SOFTWARE, read_metadata
from ixi_etl.errors import ConfigError
from ixi_etl.recipes import digits, ixi
from ixi_etl.recipes.ixi_inputs import OFFICIAL

CODE = ("ixi-etl", "commit", "code_sha256", "python", "platform")
"""Entries of `software.json` that are no libraries."""


@dataclass(frozen=True)
class Reproduction:
    """A version that was made again, compared with the published one.

    Attributes:
        folder: of the new version.
        files: those whose bytes differ: columns file, old, new.
        inputs: inputs, configuration and libraries of the name that differ: columns what, old, new.
    """

    folder: Path
    files: pd.DataFrame
    inputs: pd.DataFrame


def compare_software(folder: Path) -> pd.DataFrame:
    """Code, platform and libraries of a version: columns what, recorded, installed. What is not known is `unknown`."""
    recorded = read_metadata(folder)["inputs"]["libraries"] | (read_json(folder / SOFTWARE) or {})
    recorded.pop(DIGEST, None)
    names = [*CODE, *sorted(recorded.keys() - {*CODE})]
    installed = software.describe() | {name: _installed(name) for name in names if name not in CODE}
    rows = [(name, *(str(each.get(name) or "unknown") for each in (recorded, installed))) for name in names]
    return pd.DataFrame(rows, columns=["what", "recorded", "installed"])


def _installed(library: str) -> str | None:
    try:
        return distributions.version(library)
    except distributions.PackageNotFoundError:
        return None


def pins(compared: pd.DataFrame) -> str:
    """The pip command for the recorded libraries of `compare_software`."""
    libraries = compared[~compared["what"].isin(CODE) & (compared["recorded"] != "unknown")]
    pinned = [f"{name}=={version}" for name, version in zip(libraries["what"], libraries["recorded"], strict=True)]
    return " ".join(["pip install", *pinned])


def missing_inputs(folder: Path, data_root: DataRoot) -> list[str]:
    """The files of a version's inputs that the root's own archives lack."""
    version = read_metadata(folder)
    if "members_sha256" in version["inputs"] or "files_sha256" in version["inputs"]:
        return [source["file"] for source in version["sources"].values()]
    return [name for name in _cached_files(version) if not (data_root.archives / name).is_file()]


def _cached_files(version: Mapping[str, Any]) -> list[str]:
    """Names in the root's archives of all inputs, except of the user's own table of age and sex."""
    own = ["demographics"] if has_own_demographics(version) else []
    return [source["file"] for label, source in version["sources"].items() if label not in own]


def reproduce(
    folder: Path,
    data_root: DataRoot,
    work: Path,
    *,
    source: str | None = None,
    demographics: str | None = None,
    patterns: tuple[str, ...] = (),
    progress: Progress = no_progress,
) -> Reproduction:
    """Make the version in `folder` again, and compare every byte.

    Args:
        data_root: whose archives are used where no `source` is given; nothing is written there.
        work: the root of the new version: an empty folder.
        source, demographics, patterns: the options of `ixi-etl refresh`, if they were the user's own.

    Raises:
        IxiError: an input is missing, or the version cannot be made.
    """
    version = read_metadata(folder)
    config = read_config(version)
    _link_archives(version, data_root.archives, work / "archives")
    inputs, is_own = version["inputs"], has_own_scans(version)
    if isinstance(config, DatasetConfig):
        needs_network = "members_sha256" in inputs or is_url(source or "")
        refresh_config = RefreshConfig(
            root=str(work),
            source=source or (str(work / "archives") if is_own else None),
            demographics=_demographics(version, demographics),
            dataset=config,
            fetch="members" if "members_sha256" in inputs else "archives",
            pattern=patterns or tuple(inputs.get("pattern", ())),
            offline=not needs_network,
        )
        made = ixi.refresh(refresh_config, progress)
    else:
        offline = not is_url(source or "")
        made = digits.make_digits(
            DigitsConfig(root=str(work), source=source, dataset=config, offline=offline), progress
        )
    differing = compare_inputs(folder, made.folder)
    of_software = differing["what"].str.startswith("software.")
    return Reproduction(made.folder, compare_files(folder, made.folder, progress), differing[~of_software])


def _demographics(version: Mapping[str, Any], given: str | None) -> str | None:
    if not version["inputs"].get("demographics_sha256"):
        return None
    if given is None and has_own_demographics(version):
        raise ConfigError("this version has age and sex from a table of its maker; give that table as --demographics")
    return given or OFFICIAL


def _link_archives(version: Mapping[str, Any], archives: Path, target: Path) -> None:
    """Link the cached inputs, and copy the records of their verification, so that nothing is written beside them."""
    target.mkdir(parents=True, exist_ok=True)
    for name in _cached_files(version):
        if (archives / name).is_file():
            (target / name).symlink_to((archives / name).resolve())
            record = read_json(archives / f"{name}.json")
            if isinstance(record, dict):  # its fingerprint holds for the link too, or else the file is hashed again
                write_atomic(target / f"{name}.json", to_json(record | {"location": str(target / name)}))


def differences_message(reproduction: Reproduction, compared: pd.DataFrame, version: str) -> str | None:
    """One line that names what differs, and the probable cause; None if every byte is the same."""
    files = reproduction.files["file"].tolist()
    if not files:
        return None
    shown = ", ".join(files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")
    causes = [f"{row['what']} was {row['old']}, is {row['new']}" for row in reproduction.inputs.to_dict("records")]
    changed = compared[~compared["what"].isin(CODE) & (compared["recorded"] != compared["installed"])]
    causes += [
        f"{row['what']} was {row['recorded']}, is {row['installed']}"
        for row in changed.to_dict("records")
        if f"libraries.{row['what']}" not in set(reproduction.inputs["what"])
    ]
    why = "; ".join(causes) or "inputs and libraries are the same, so the code or the published files changed"
    return f"{len(files)} files differ from those of {version}: {shown}; {why}"
