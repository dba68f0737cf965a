"""Find, fetch and verify the inputs of a refresh, and name the version that they make."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from ixi_etl import modalities
from ixi_etl.config import RefreshConfig
from ixi_etl.core.files import os_errors_as_user_errors
from ixi_etl.core.progress import Progress, no_progress
from ixi_etl.core.storage import check_reachable, expand_home, naming_file
from ixi_etl.dataset import metadata, publish, selection
from ixi_etl.dataset.schema import CANDIDATE
from ixi_etl.errors import ConfigError
from ixi_etl.pairing.cut import CutJob, MemberRef, archive_changed, read_member_checked
from ixi_etl.scans.names import parse_pattern
from ixi_etl.scans.survey import VolumeFile, survey
from ixi_etl.sources import catalog
from ixi_etl.sources.arrivals import Arrival
from ixi_etl.sources.cache import VerifiedFile, acquire
from ixi_etl.sources.folder import FolderSource, acquire_folder
from ixi_etl.sources.members import fetch_members, find_remote
from ixi_etl.sources.user_source import user_sources

OFFICIAL, DEMOGRAPHICS = "official", "IXI.xls"

VOXEL_LIBRARIES = ("nibabel", "numpy", "simpleitk", "zarr", "zarrs")
"""Their versions are part of a version's name, because they may change its voxels or bytes."""


@dataclass(frozen=True)
class DemographicsFile:
    """A file of age and sex, and its content, read once so that the hashed and the used content are the same."""

    path: Path
    data: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class Inputs:
    """The input files of a version.

    Attributes:
        archives: modality -> archive, or files of a folder.
        demographics: the file of age and sex, if any.
        surveyed: the survey of the whole remote archives, if only single members were fetched.
    """

    archives: Mapping[str, VerifiedFile]
    demographics: DemographicsFile | None
    surveyed: pd.DataFrame | None = None

    @property
    def are_members_only(self) -> bool:
        """Whether selected members were fetched (`--fetch members`) instead of whole archives."""
        return self.surveyed is not None

    @property
    def locations(self) -> dict[str, str | tuple[VolumeFile, ...]]:
        """Modality -> archive or files, as `survey` takes them."""
        return {m: a.surveyed_as for m, a in self.archives.items()}

    @property
    def origins(self) -> dict[str, Any]:
        return publish.origins_of(self.archives)


@dataclass(frozen=True)
class RefreshJob:
    """One refresh: the data that its stages share.

    Attributes:
        config: options of the refresh.
        inputs: the verified files that the version is made from.
        version: the name of the version.
        version_inputs: everything that decides the bytes of the version; its name is the hash of them.
        progress: called by the stages as they advance.
    """

    config: RefreshConfig
    inputs: Inputs
    version: str
    version_inputs: Mapping[str, Any]
    progress: Progress = field(default=no_progress, compare=False)

    @property
    def staging(self) -> Path:
        """The folder in which the version is made."""
        return self.config.data_root.staging(self.version)

    @property
    def work(self) -> Path:
        """The folder of the finished subjects."""
        return self.staging / "work"


def create_job(config: RefreshConfig, inputs: Inputs, progress: Progress = no_progress) -> RefreshJob:
    """The job for verified inputs."""
    version, version_inputs = name_version(config, inputs)
    return RefreshJob(config, inputs, version, version_inputs, progress)


def find_sources(config: RefreshConfig) -> dict[str, catalog.Source]:
    """Modality -> source of its archive or files; also `IXI.xls` -> source if the official demographics are requested.

    Raises:
        IxiError: the demographics file, the bucket of the root or a file of `--source` does not exist, or a template is
            invalid; checked before the download.
    """
    check_reachable(config.root)
    for template in config.pattern:
        parse_pattern(template)
    if config.demographics not in (None, OFFICIAL) and not expand_home(str(config.demographics)).is_file():
        raise ConfigError(f"{config.demographics} does not exist; give IXI.xls, '{OFFICIAL}', or omit the option")
    official = {DEMOGRAPHICS: catalog.official(DEMOGRAPHICS)} if config.demographics == OFFICIAL else {}
    if config.source is not None:
        return user_sources(config.source, config.http, config.dataset.modalities, config.pattern) | official
    return {m: catalog.official(modalities.archive_name(m)) for m in config.dataset.modalities} | official


def acquire_file(
    config: RefreshConfig, source: catalog.Source, progress: Progress = no_progress, arrival: Arrival | None = None
) -> VerifiedFile:
    """Fetch and verify one file into the root's archives, followed by `arrival`; or hash the files of a folder."""
    folder = config.data_root.archives
    if isinstance(source, FolderSource):
        return acquire_folder(source, folder, progress)
    verified = acquire(source, folder, http=config.http, progress=progress, arrival=arrival)
    if arrival:
        arrival.finish()
    return verified


def acquire_inputs(
    config: RefreshConfig,
    progress: Progress = no_progress,
    sources: Mapping[str, catalog.Source] | None = None,
    arrivals: Mapping[str, Arrival] | None = None,
) -> Inputs:
    """Fetch and verify all files concurrently.

    Args:
        sources: of `find_sources`, if they are known.
        arrivals: key of a source -> what follows its download.
    """
    files, followed = sources or find_sources(config), arrivals or {}
    with ThreadPoolExecutor(len(files)) as pool:
        downloads = {key: pool.submit(acquire_file, config, s, progress, followed.get(key)) for key, s in files.items()}
        return collect_inputs(config, {key: future.result() for key, future in downloads.items()})


def acquire_members(config: RefreshConfig, progress: Progress = no_progress) -> Inputs:
    """Survey the remote archives, and fetch only the members of subjects whose headers pass the screening."""
    sources = find_sources(config)
    remotes = {m: find_remote(sources[m], config.http) for m in config.dataset.modalities}
    survey_table = survey({m: remote.url for m, remote in remotes.items()}, progress, config.http, config.pattern)
    screened = selection.screen_headers(survey_table, config.dataset)
    wanted = set(screened.loc[screened["status"] == CANDIDATE, "subject_id"])

    def fetch(modality: str) -> VerifiedFile:
        members = survey_table[survey_table["modality"] == modality]
        return fetch_members(
            remotes[modality],
            config.data_root.archives,
            [(offset, offset + size) for offset, size in zip(members["offset"], members["size"], strict=True)],
            [index for index, subject in enumerate(members["subject_id"]) if subject in wanted],
            http=config.http,
            progress=progress,
        )

    with ThreadPoolExecutor(len(remotes)) as pool:
        acquired = dict(zip(remotes, pool.map(fetch, remotes), strict=True))
    survey_table["location"] = survey_table["modality"].map({m: file.location for m, file in acquired.items()})
    acquired |= {key: acquire_file(config, s, progress) for key, s in sources.items() if key not in remotes}
    return replace(collect_inputs(config, acquired), surveyed=survey_table)


@os_errors_as_user_errors()
def collect_inputs(config: RefreshConfig, acquired: Mapping[str, VerifiedFile]) -> Inputs:
    """The inputs of the version, from the files that `find_sources` requested.

    Raises:
        DatasetError: the official demographics file changed after it was verified.
    """
    archives = {m: acquired[m] for m in config.dataset.modalities}
    if config.demographics is None:
        return Inputs(archives, None)
    official = acquired[DEMOGRAPHICS] if config.demographics == OFFICIAL else None
    path = Path(official.location) if official else expand_home(str(config.demographics))
    with naming_file(path):
        demographics = DemographicsFile(path, path.read_bytes())
    if official and hashlib.md5(demographics.data, usedforsecurity=False).hexdigest() != official.md5:
        raise archive_changed(official.location)
    return Inputs(archives, demographics)


def name_version(config: RefreshConfig, inputs: Inputs) -> tuple[str, dict[str, Any]]:
    """The version's name, and the inputs whose hash it is."""
    others: dict[str, Any] = {"demographics_sha256": inputs.demographics.sha256 if inputs.demographics else None}
    md5s: dict[str, str] = {}
    files = {m: a.files_sha256 for m, a in inputs.archives.items() if a.files_sha256}
    if files:  # with the subjects that the templates found in the names
        others["files_sha256"] = files
    elif config.pattern:
        others["pattern"] = list(config.pattern)
    if inputs.surveyed is not None:
        others |= _members_inputs(config, inputs)
    elif not files:
        md5s = {m: a.md5 for m, a in inputs.archives.items()}
        unverified = [m for m, a in inputs.archives.items() if is_unverified_ixi(m, a)]
        others |= {"archives_of_ixi": unverified} if unverified else {}  # decides the credit
    version_inputs = metadata.version_inputs(md5s, config.dataset, VOXEL_LIBRARIES, **others)
    return metadata.version_name(version_inputs), version_inputs


def _members_inputs(config: RefreshConfig, inputs: Inputs) -> dict[str, Any]:
    """Replacements for the MD5s of archives: hashes of the fetched members, and of the survey for all other members."""
    assert inputs.surveyed is not None
    jobs = create_cut_jobs(inputs.surveyed, selection.screen_headers(inputs.surveyed, config.dataset), inputs)
    members = [member for job in jobs for member in job.members.values()]
    digests = sorted(hashlib.sha256(read_member_checked(member)[0]).hexdigest() for member in members)
    surveyed = inputs.surveyed.drop(columns=["location", "offset"])  # independent of the order in the archive
    texts = {"members_sha256": "".join(digests), "survey_sha256": surveyed.to_csv(index=False)}
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    # Without MD5s, the host decides the credit, and so a byte of the version.
    return hashes | {"members_of_ixi": [m for m, archive in inputs.archives.items() if is_from_ixi(m, archive)]}


def create_cut_jobs(
    survey_table: pd.DataFrame, screened: pd.DataFrame, inputs: Inputs, version: str = ""
) -> list[CutJob]:
    """A job for each screened subject, with the members that are available locally."""
    first = survey_table[survey_table["subject_id"] != ""].drop_duplicates(["subject_id", "modality"])
    members: dict[str, dict[str, MemberRef]] = {}
    for row in first.to_dict("records"):
        location = row["location"]
        expected = inputs.archives[row["modality"]].fingerprint_of(location)
        member = MemberRef(location, row["offset"], row["size"], expected)
        members.setdefault(row["subject_id"], {})[row["modality"]] = member
    wanted = set(screened.loc[screened["status"] == CANDIDATE, "subject_id"])
    available = set(screened["subject_id"]) if inputs.surveyed is None else wanted
    return [CutJob(s, members[s] if s in available else {}, s in wanted, version) for s in screened["subject_id"]]


def is_from_ixi(modality: str, archive: VerifiedFile) -> bool:
    """Whether an archive, or members of it, came from IXI's own host."""
    return catalog.is_of_ixi(archive.origin, modalities.archive_name(modality))


def is_unverified_ixi(modality: str, archive: VerifiedFile) -> bool:
    """Whether a whole archive came from IXI's own host without a published MD5 to check it by."""
    return is_from_ixi(modality, archive) and not catalog.has_md5(modalities.archive_name(modality))
