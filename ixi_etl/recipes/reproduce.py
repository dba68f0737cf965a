"""Make a published version again in another root, to compare it byte by byte: `ixi-etl reproduce`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata as distributions
from pathlib import Path
from typing import Any

import pandas as pd

from ixi_etl import PIPELINE_VERSION
from ixi_etl.config import DatasetConfig, DigitsConfig, RefreshConfig
from ixi_etl.core import software
from ixi_etl.core.files import read_json, to_json, write_atomic
from ixi_etl.core.progress import Progress, no_progress
from ixi_etl.core.storage import DataRoot, is_url
from ixi_etl.dataset.command import has_own_demographics, needs_source, read_config
from ixi_etl.dataset.compare import compare_files, compare_inputs
from ixi_etl.dataset.metadata import DIGEST, SOFTWARE, read_metadata
from ixi_etl.errors import ConfigError, DatasetError
from ixi_etl.recipes import digits, ixi
from ixi_etl.recipes.ixi_inputs import DEMOGRAPHICS, OFFICIAL
from ixi_etl.sources.catalog import normalise_location

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


def missing_inputs(folder: Path, data_root: DataRoot, demographics: str | None = None) -> list[str]:
    """The files of a version's inputs that neither the root's own archives nor the options give.

    Members that were fetched from IXI's own host are fetched there again, so none of their files is missing.
    """
    version = read_metadata(folder)
    if _has_members_only(version) and not needs_source(version):
        return []
    if _has_members_only(version) or "files_sha256" in version["inputs"]:
        return [source["file"] for source in version["sources"].values()]
    given = {DEMOGRAPHICS} if demographics else set()
    return [name for name in _cached_files(version) if name not in given and not (data_root.archives / name).is_file()]


def _has_members_only(version: Mapping[str, Any]) -> bool:
    """Whether a version was made with `--fetch members`."""
    return "members_sha256" in version["inputs"]


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
        IxiError: another pipeline version made it, an input is missing, or the version cannot be made.
    """
    version = read_metadata(folder)
    _check_pipeline(folder, version)
    config = read_config(version)
    if _has_members_only(version):
        _check_server(version, source)
    needs_network = _has_members_only(version) or is_url(source or "")
    table = _demographics(version, demographics, source, data_root.archives, may_fetch=needs_network)
    _link_archives(version, data_root.archives, work / "archives")
    if isinstance(config, DatasetConfig):
        linked = needs_source(version) and not _has_members_only(version)
        refresh_config = RefreshConfig(
            root=str(work),
            source=source or (str(work / "archives") if linked else None),
            demographics=table,
            dataset=config,
            fetch="members" if _has_members_only(version) else "archives",
            pattern=patterns or tuple(version["inputs"].get("pattern", ())),
            offline=not needs_network,
        )
        made = ixi.refresh(refresh_config, progress)
    else:
        made = digits.make_digits(
            DigitsConfig(root=str(work), source=source, dataset=config, offline=not needs_network), progress
        )
    differing = compare_inputs(folder, made.folder)
    of_software = differing["what"].str.startswith("software.")
    return Reproduction(made.folder, compare_files(folder, made.folder, progress), differing[~of_software])


def _check_pipeline(folder: Path, version: Mapping[str, Any]) -> None:
    """Refuse a version of another pipeline version, which always gives other bytes."""
    made_by = version["inputs"].get("pipeline_version")
    if made_by == PIPELINE_VERSION:
        return
    software_record = read_json(folder / SOFTWARE) or {}
    known = [f"ixi-etl {software_record['ixi-etl']}"] if software_record.get("ixi-etl") else []
    known += [f"commit {software_record['commit']}"] if software_record.get("commit") else []
    raise DatasetError(
        f"{version['name']}@{version['version']} was made by pipeline version {made_by}, and this is "
        f"{PIPELINE_VERSION}; install {', '.join(known) or 'the ixi-etl that made it'} first"
    )


def _check_server(version: Mapping[str, Any], source: str | None) -> None:
    """Refuse a `--source` from which no members can be fetched."""
    if source is None and needs_source(version):
        raise ConfigError("this version was made of members from a server; give the URL of its archives as --source")
    if source is not None and not source.startswith(("http://", "https://")):
        advice = "give the URL of its archives" if needs_source(version) else "leave out --source"
        raise ConfigError(f"this version was made of members from a server, and {source} is no URL of one; {advice}")


def _demographics(
    version: Mapping[str, Any], given: str | None, source: str | None, archives: Path, *, may_fetch: bool
) -> str | None:
    """The table of age and sex as `--demographics` of a refresh: given, or the recorded IXI.xls in a local folder.

    Raises:
        ConfigError: it is not there, and must not be fetched.
    """
    expected = version["inputs"].get("demographics_sha256")
    if not expected or given:
        return given if expected else None
    if has_own_demographics(version):
        raise ConfigError("this version has age and sex from a table of its maker; give that table as --demographics")
    location = normalise_location(source) if source else ""
    beside = Path(location) if Path(location).is_dir() else Path(location).parent
    folders = [*([beside] if location and not is_url(location) else []), archives]
    for path in (folder / DEMOGRAPHICS for folder in folders):
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == expected:
            return str(path)
    if may_fetch:
        return OFFICIAL
    raise ConfigError(
        f"this version has age and sex from {DEMOGRAPHICS}, whose right copy is not in "
        f"{' or '.join(map(str, folders))}; give it as --demographics"
    )


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
    differ = "1 file differs from that" if len(files) == 1 else f"{len(files)} files differ from those"
    return f"{differ} of {version}: {shown}; {why}"
