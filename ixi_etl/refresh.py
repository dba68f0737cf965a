"""The main job as plain functions: archives in, a published version out. The flow runs the same stages as tasks."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ixi_etl import catalog, credit, dataset, manifest, pictures, publish, report, store
from ixi_etl.catalog import MODALITIES
from ixi_etl.config import RefreshConfig
from ixi_etl.cut import (
    Job,
    Part,
    archive_changed,
    cut_subject,
    picture_path,
    read_part,
    record_path,
    shard_path,
)
from ixi_etl.demographics import read_demographics
from ixi_etl.download import Acquired, acquire, fetch_members, find_remote, own_sources
from ixi_etl.errors import DatasetError
from ixi_etl.files import Progress, disk_errors_in_a_line, lock_root, silent, write_atomic
from ixi_etl.places import check_reachable, expanded, fingerprint, naming
from ixi_etl.publish import Refreshed
from ixi_etl.schema import CANDIDATE, IXI
from ixi_etl.spread import spread
from ixi_etl.survey import depth_histogram, modal_depths, modal_planes, passed_over, site_records, survey

log = logging.getLogger(__name__)

OFFICIAL, DEMOGRAPHICS = "official", "IXI.xls"

ALWAYS_ALLOWED_UNREADABLE = 10
SHOWN = 5  # subjects in a warning
UNREADABLE = ("unreadable", "corrupt_voxels")

VOXEL_LIBRARIES = ("nibabel", "numpy", "simpleitk", "zarr", "zarrs")
"""Their versions are part of a version's name: another one may compute other voxels or other bytes."""


UNCHECKED = "archive_unchecked"
"""The flag of subjects whose members were fetched alone: nobody has held their archive against its MD5."""


@dataclass(frozen=True)
class People:
    """A file of age and sex: where it is, and what was read of it, once, so that what is hashed is what is used."""

    path: Path
    data: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class Inputs:
    """What a version is made of.

    Attributes:
        archives: modality -> archive.
        demographics: the file of age and sex, if any.
        surveyed: where members were fetched alone, the survey of the whole archives that they were chosen by.
    """

    archives: Mapping[str, Acquired]
    demographics: People | None
    surveyed: pd.DataFrame | None = None

    @property
    def locations(self) -> dict[str, str]:
        return {m: a.location for m, a in self.archives.items()}

    @property
    def origins(self) -> dict[str, Any]:
        return publish.origins_of(self.archives)


def refresh(config: RefreshConfig, progress: Progress = silent) -> Refreshed:
    """Make sure that the version of `config` and its archives is published; make it if it is not.

    Raises:
        IxiError: one line that says what to do; what was done so far is kept, and the next call goes on from there.
    """
    with lock_root(config.places.local):
        inputs = acquire_members(config, progress) if config.fetch == "members" else acquire_inputs(config, progress)
        version, facts = name_version(config, inputs)
        done = find_published(config, version, inputs)
        if done:
            return done
        table = survey_archives(inputs, progress)
        candidates = select_subjects(config, table, inputs)
        settled, records = cut_subjects(config, version, table, candidates, inputs, progress)
        return publish_version(config, version, facts, table, settled, records, inputs, progress)


# -- the stages -------------------------------------------------------------------------------------------------------


def find_sources(config: RefreshConfig) -> dict[str, catalog.Source]:
    """Modality -> where its archive is to come from, and the same of `IXI.xls` if the official one is wanted.

    Raises:
        IxiError: the demographics file, or the bucket to publish in, is not there; better said before hours of
            download.
    """
    check_reachable(config.root)
    if config.demographics not in (None, OFFICIAL) and not expanded(str(config.demographics)).is_file():
        raise DatasetError(f"{config.demographics} is not there; give IXI.xls, '{OFFICIAL}', or leave it out")
    people = {DEMOGRAPHICS: catalog.official(DEMOGRAPHICS)} if config.demographics == OFFICIAL else {}
    if config.source is not None:
        return own_sources(config.source, offline=config.offline, insecure_hosts=config.insecure_hosts) | people
    return {m: catalog.official(catalog.archive_name(m)) for m in MODALITIES} | people


def acquire_file(config: RefreshConfig, source: catalog.Source, progress: Progress = silent) -> Acquired:
    """Fetch and verify one file into the root's archives."""
    return acquire(
        source,
        config.places.archives,
        connections=config.connections,
        offline=config.offline,
        insecure_hosts=config.insecure_hosts,
        progress=progress,
    )


def acquire_inputs(config: RefreshConfig, progress: Progress = silent) -> Inputs:
    """All files at once."""
    sources = find_sources(config)
    with ThreadPoolExecutor(len(sources)) as pool:
        jobs = {key: pool.submit(acquire_file, config, source, progress) for key, source in sources.items()}
        return inputs_of(config, {key: job.result() for key, job in jobs.items()})


def acquire_members(config: RefreshConfig, progress: Progress = silent) -> Inputs:
    """Survey the archives where they lie, and fetch the members of those alone whose headers let them be used."""
    sources = find_sources(config)
    remotes = {m: find_remote(sources[m], config.insecure_hosts) for m in MODALITIES}
    table = survey({m: remote.url for m, remote in remotes.items()}, progress, config.insecure_hosts)
    candidates = manifest.select(table, config.dataset)
    wanted = set(candidates.loc[candidates["status"] == CANDIDATE, "subject_id"])

    def fetch(modality: str) -> Acquired:
        of = table[table["modality"] == modality]
        return fetch_members(
            remotes[modality],
            config.places.archives,
            [(offset, offset + size) for offset, size in zip(of["offset"], of["size"], strict=True)],
            [index for index, subject in enumerate(of["subject_id"]) if subject in wanted],
            connections=config.connections,
            insecure_hosts=config.insecure_hosts,
            progress=progress,
        )

    with ThreadPoolExecutor(len(MODALITIES)) as pool:
        acquired = dict(zip(MODALITIES, pool.map(fetch, MODALITIES), strict=True))
    acquired |= {key: acquire_file(config, s, progress) for key, s in sources.items() if key not in MODALITIES}
    return replace(inputs_of(config, acquired), surveyed=table)


@disk_errors_in_a_line()
def inputs_of(config: RefreshConfig, acquired: Mapping[str, Acquired]) -> Inputs:
    """What the version is made of, from the files that `find_sources` asked for.

    Raises:
        DatasetError: the official demographics file is no longer the one that was verified.
    """
    archives = {m: acquired[m] for m in MODALITIES}
    if config.demographics is None:
        return Inputs(archives, None)
    official = acquired[DEMOGRAPHICS] if config.demographics == OFFICIAL else None
    path = Path(official.location) if official else expanded(str(config.demographics))
    with naming(path):
        people = People(path, path.read_bytes())
    if official and hashlib.md5(people.data, usedforsecurity=False).hexdigest() != official.md5:
        raise archive_changed(official.location)
    return Inputs(archives, people)


def name_version(config: RefreshConfig, inputs: Inputs) -> tuple[str, dict[str, Any]]:
    """The version's name, and the inputs that it is the hash of."""
    others = {"demographics_sha256": inputs.demographics.sha256 if inputs.demographics else None}
    if inputs.surveyed is None:
        md5s = {m: a.md5 for m, a in inputs.archives.items()}
    else:
        md5s = {}
        others |= _members_facts(config, inputs)
    facts = dataset.inputs_of(md5s, config.dataset, VOXEL_LIBRARIES, **others)
    return dataset.version_name(facts), facts


def _members_facts(config: RefreshConfig, inputs: Inputs) -> dict[str, Any]:
    """In place of the archives' MD5s: the SHA-256 of the members' sorted SHA-256s, and of the survey, which tells
    of all others.
    """
    assert inputs.surveyed is not None
    jobs = _jobs(inputs.surveyed, manifest.select(inputs.surveyed, config.dataset), inputs)
    parts = [part for job in jobs for part in job.parts.values()]
    members = sorted(hashlib.sha256(read_part(part)[0]).hexdigest() for part in parts)
    surveyed = inputs.surveyed.drop(columns="offset").to_csv(index=False)  # whatever order they lie in
    told = {"members_sha256": "".join(members), "survey_sha256": surveyed}
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in told.items()}
    # Without MD5s, only the host can say whose they are: that decides the credit, and so a byte of the version.
    return hashes | {"members_of_ixi": [m for m, archive in inputs.archives.items() if _is_from_ixi(m, archive)]}


@disk_errors_in_a_line()
def survey_archives(inputs: Inputs, progress: Progress = silent) -> pd.DataFrame:
    """The table of all members, from their headers, unless it was needed before to fetch some.

    Raises:
        DatasetError: an archive is no longer the one that was hashed.
    """
    if inputs.surveyed is not None:
        return inputs.surveyed
    _check_unchanged(inputs)
    try:
        return survey(inputs.locations, progress)
    finally:  # also where the survey fails: on an archive that is being replaced, it may
        _check_unchanged(inputs)


@disk_errors_in_a_line()
def find_published(config: RefreshConfig, version: str, inputs: Inputs) -> Refreshed | None:
    """The version, if it has been published and is sound; then it is the latest again."""
    return publish.find_published(config.places, version, inputs.origins)


def select_subjects(config: RefreshConfig, table: pd.DataFrame, inputs: Inputs) -> pd.DataFrame:
    """Candidates and exclusions, from headers alone.

    Raises:
        DatasetError: the demographics are of nobody in the archives.
    """
    for sentence in passed_over(table, inputs.archives):
        log.warning("%s", sentence)
    people = _read_people(inputs.demographics, table) if inputs.demographics else None
    planes = modal_planes(table)
    if config.dataset.pairing == "index" and len(set(planes.values())) > 1:
        said = " and ".join(f"{m} slices are {plane}" for m, plane in planes.items())
        log.warning("index pairing: %s, so the two pictures of a pair show different planes of the head", said)
    selected = manifest.select(table, config.dataset, people)
    _warn_of_flags(selected, ("unlike_spaces", "template_space", "affine_not_pixdim"))
    return selected


def _read_people(file: People, table: pd.DataFrame) -> dict[str, dict[str, float | str]]:
    path, found = file.path, read_demographics(file.path, file.data)
    persons = {manifest.person_of(subject) for subject in table["subject_id"] if subject}
    wanted, matched, said = found.match(persons)
    if not matched:
        raise DatasetError(f"{path}: {said}; give the table of these people, or leave --demographics out")
    log.log(logging.INFO if matched == wanted and not found.unread else logging.WARNING, "%s: %s", path, said)
    return found.people


def _warn_of_flags(table: pd.DataFrame, flags: Sequence[str]) -> None:
    for flag in flags:
        bearers = table.loc[table["flags"].str.split(",").map(lambda of, flag=flag: flag in of), "subject_id"].tolist()
        if bearers:
            more = ", ..." if len(bearers) > SHOWN else ""
            which = f"{', '.join(bearers[:SHOWN])}{more}"
            log.warning("%d flagged %s (%s): %s", len(bearers), flag, manifest.FLAGS[flag], which)


@disk_errors_in_a_line()
def cut_subjects(
    config: RefreshConfig,
    version: str,
    table: pd.DataFrame,
    candidates: pd.DataFrame,
    inputs: Inputs,
    progress: Progress = silent,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Cut every candidate and hash every member; the settled manifest, and what was recorded of each subject.

    Raises:
        DatasetError: too many subjects are unreadable, or none is left; an archive was replaced meanwhile; or Dask's
            workers write to another folder.
    """
    places = config.places
    work = places.staging(version) / "work"
    work.mkdir(parents=True, exist_ok=True)
    jobs = _jobs(table, candidates, inputs, version)
    _check_disk(work, candidates, config.dataset.slices)
    results = spread(
        partial(cut_subject, config=config.dataset, work=work.resolve()),
        [_read_elsewhere(job) for job in jobs] if config.dask else jobs,
        workers=config.workers,
        address=config.dask,
        libraries=("ixi-etl", *VOXEL_LIBRARIES),
        on_done=lambda done: progress("cut", done, len(jobs), "subjects"),
    )
    _check_members(jobs, results, work)
    _check_unchanged(inputs)
    records = {job.subject_id: result for job, result in zip(jobs, results, strict=True)}
    if inputs.surveyed is not None:
        for job in jobs:
            if job.cut:
                records[job.subject_id] = _flagged(records[job.subject_id])
    _check_there(work, records)
    settled = manifest.settle(candidates, records, config.dataset)
    _warn_of_flags(settled, (manifest.DUPLICATE,))
    audit = places.staging(version) / dataset.MANIFEST
    write_atomic(audit, IXI.to_csv(settled))
    _check_enough(settled, config.max_unreadable, audit, passed_over(table, inputs.archives))
    return settled, records


def _flagged(record: dict[str, Any]) -> dict[str, Any]:
    return record | {"flags": manifest.join_flags(record.get("flags"), UNCHECKED)}


def _jobs(table: pd.DataFrame, candidates: pd.DataFrame, inputs: Inputs, version: str = "") -> list[Job]:
    """A job for each subject; it reads the members that are here."""
    first = table[table["subject_id"] != ""].drop_duplicates(["subject_id", "modality"])
    parts: dict[str, dict[str, Part]] = {}
    for row in first.to_dict("records"):
        archive = inputs.archives[row["modality"]]
        part = Part(archive.location, row["offset"], row["size"], archive.stamp)
        parts.setdefault(row["subject_id"], {})[row["modality"]] = part
    wanted = set(candidates.loc[candidates["status"] == CANDIDATE, "subject_id"])
    here = set(candidates["subject_id"]) if inputs.surveyed is None else wanted
    return [Job(s, parts[s] if s in here else {}, s in wanted, version) for s in candidates["subject_id"]]


def _read_elsewhere(job: Job) -> Job:
    """The job for a worker that may see the archives through another mount, with other fingerprints."""
    return replace(job, parts={m: replace(part, stamp="") for m, part in job.parts.items()})


def _check_members(jobs: Sequence[Job], records: Sequence[Mapping[str, Any]], work: Path) -> None:
    """What workers elsewhere read must be what was hashed here: the same fingerprint, or else the same SHA-256.

    Raises:
        DatasetError: somebody read other bytes; those records are removed.
    """
    wrong = ""
    for job, record in zip(jobs, records, strict=True):
        for modality, stamp in record["stamps"].items():
            part = job.parts[modality]
            if stamp != part.stamp:
                data, _ = read_part(part)
                if hashlib.sha256(data).hexdigest() != record[f"{modality.lower()}_sha256"]:
                    record_path(work, job.subject_id).unlink(missing_ok=True)
                    wrong = part.archive
    if wrong:
        raise DatasetError(f"Dask's workers read other bytes in {wrong} than there are here; run again when they agree")


def _check_disk(work: Path, candidates: pd.DataFrame, slices: int) -> None:
    """Room for what is still to be cut: two int16 slabs a candidate, as if nothing could be compressed."""
    wanted = candidates[candidates["status"] == CANDIDATE]
    voxels = sum(math.prod(json.loads(shape)[:2]) for shape in wanted["t2_shape"])
    have = sum(path.stat().st_size for path in work.glob("*.shard"))
    need, free = len(MODALITIES) * 2 * slices * voxels - have, shutil.disk_usage(work).free
    if need > free:
        raise DatasetError(f"{work} has {free / 1e9:.2f} GB free, but the slabs need {need / 1e9:.2f} GB; free some")


def _check_unchanged(inputs: Inputs) -> None:
    """The archives must be those that were hashed: the version has its name from them."""
    for archive in inputs.archives.values():
        try:
            same = fingerprint(archive.location) == archive.stamp
        except FileNotFoundError:
            same = False
        if not same:
            raise archive_changed(archive.location)


def _check_there(work: Path, records: Mapping[str, Any]) -> None:
    """What workers elsewhere say they wrote must be in the folder that they share with us."""
    missing = [name for r in records.values() for name in r.get("files", ()) if not (work / name).is_file()]
    if missing:
        raise DatasetError(f"{missing[0]} was cut, but is not in {work}; let Dask's workers have that folder in common")


def _check_enough(settled: pd.DataFrame, max_unreadable: float, audit: Path, others: Sequence[str]) -> None:
    paired = settled[~settled["reason"].isin(IXI.steps["paired"])]
    bad = paired[paired["reason"].isin(UNREADABLE)]
    if len(bad) > max(max_unreadable * len(paired), ALWAYS_ALLOWED_UNREADABLE):
        raise DatasetError(
            f"{len(bad)} of {len(paired)} paired subjects are unreadable ({', '.join(bad['subject_id'])}); "
            f"{audit} says why; fetch the archives again, or raise max_unreadable"
        )
    if manifest.used(settled).empty:
        if settled.empty:
            raise DatasetError(f"the archives hold no subject: {'; '.join(others)}")
        why = ", ".join(f"{n} {reason}" for reason, n in settled["reason"].value_counts().items())
        raise DatasetError("; ".join([f"no subject is left ({why})", *others, f"{audit} says why of each"]))


@disk_errors_in_a_line()
def publish_version(
    config: RefreshConfig,
    version: str,
    facts: Mapping[str, Any],
    table: pd.DataFrame,
    settled: pd.DataFrame,
    records: Mapping[str, Any],
    inputs: Inputs,
    progress: Progress = silent,
) -> Refreshed:
    """Put the shards in their rows, write manifest, facts and report beside them, verify all, publish.

    Raises:
        DatasetError: what was staged does not verify.
    """
    places = config.places
    work, staged = places.staging(version) / "work", publish.start_staging(places, version)
    subjects = manifest.used(settled)["subject_id"].tolist()
    sources = _sources(config, table, inputs)
    summary = {
        "name": places.name,
        "version": version,
        "source": "t1",
        "target": "t2",
        "inputs": facts,
        **manifest.counts(settled),
        "modal_depth": modal_depths(table),
        "planes": modal_planes(table),
        "histogram": site_records(depth_histogram(table)),
        "not_volumes": table.loc[table["subject_id"] == "", "member"].tolist(),
        "sources": sources,
        **credit.credit_and_licence(sources),
    }
    store.assemble(
        staged / store.STORE,
        shards=[{m.lower(): shard_path(work, s, m) for m in MODALITIES} for s in subjects],
        affines=[{name: np.array(matrix) for name, matrix in records[s]["affines"].items()} for s in subjects],
        slab_shape=tuple(records[subjects[0]]["slab_shape"]),
        pairing=config.dataset.pairing,
        attributes={"subject_id": subjects, **{k: summary[k] for k in ("name", "version", "licence", "credit")}},
        scales=[
            {m.lower(): (records[s][f"{m.lower()}_scale"], records[s][f"{m.lower()}_offset"]) for m in MODALITIES}
            for s in subjects
        ],
        subjects=subjects,
    )
    if config.dataset.pictures:
        _put_pictures(work, staged / dataset.PICTURES, settled)
    write_atomic(staged / dataset.MANIFEST, IXI.to_csv(settled))
    layers = _middle_layers(staged, settled) if config.dataset.pictures else {}
    write_atomic(staged / dataset.REPORT, report.dataset_report(summary, settled, layers))
    return publish.publish(places, staged, summary, inputs.origins, progress)


def _sources(config: RefreshConfig, table: pd.DataFrame, inputs: Inputs) -> dict[str, Any]:
    """Whose each file is that the version is made of: see `credit`."""
    volumes = table[(table["subject_id"] != "") & table["readable"]]
    sources = {}
    for modality, archive in inputs.archives.items():
        marked = volumes.loc[volumes["modality"] == modality, "simulated"]
        sources[modality] = credit.source_of(
            catalog.archive_name(modality),
            archive.md5 if inputs.surveyed is None else None,
            from_ixi=_is_from_ixi(modality, archive),
            volumes=len(marked),
            simulated=int(marked.sum()),
        )
    if inputs.demographics:
        sources["demographics"] = credit.source_of(
            DEMOGRAPHICS, hashlib.md5(inputs.demographics.data, usedforsecurity=False).hexdigest()
        )
    return sources


def _is_from_ixi(modality: str, archive: Acquired) -> bool:
    return archive.origin in catalog.official(catalog.archive_name(modality)).urls


def _put_pictures(work: Path, folder: Path, settled: pd.DataFrame) -> None:
    """One picture per used subject, and a sheet of the pairs that are least alike."""
    folder.mkdir()
    for subject in manifest.used(settled)["subject_id"]:
        store.link(picture_path(work, subject), folder / f"{subject}.jpg")
    worst = manifest.records(report.worst(settled))
    captions = [f"{row['subject_id']}   NMI {row['nmi_before']:.3f} -> {row['nmi_after']:.3f}" for row in worst]
    paths = [picture_path(work, row["subject_id"]) for row in worst]
    pictures.save(pictures.sheet(paths, captions), folder / dataset.WORST)


def _middle_layers(version: Path, settled: pd.DataFrame) -> dict[str, pictures.Layers]:
    """The middle slices of the pairs that the report shows, from the store."""
    arrays, rows = store.open_arrays(version), settled.set_index("subject_id")["store_row"]
    pair = [arrays[m.lower()] for m in MODALITIES]
    return {
        subject: pictures.layers(*(np.asarray(array[int(rows[subject]), array.shape[1] // 2]) for array in pair))
        for subject in report.drawn(settled)
    }
