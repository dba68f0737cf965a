"""Assemble, check and publish the version of a refresh: shards, manifest, metadata, reports and pictures."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ixi_etl import modalities
from ixi_etl.config import DatasetConfig, RefreshConfig
from ixi_etl.core.files import os_errors_as_user_errors, write_atomic
from ixi_etl.core.parallel import parallel_map
from ixi_etl.dataset import (
    checks,
    checks_history,
    checks_measures,
    checks_version,
    credit,
    manifest,
    metadata,
    publish,
    store,
)
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.dataset.schema import SCHEMAS
from ixi_etl.pairing import pictures
from ixi_etl.pairing.cut import picture_path, shard_path
from ixi_etl.preparations import deviations
from ixi_etl.recipes.ixi_inputs import DEMOGRAPHICS, Inputs, RefreshJob, is_from_ixi
from ixi_etl.report import dataset_report
from ixi_etl.report.comparison_page import comparison_page
from ixi_etl.scans.site_tables import site_table_to_records
from ixi_etl.scans.survey import depth_histogram, modal_depths, modal_planes

log = logging.getLogger(__name__)


@os_errors_as_user_errors()
def publish_version(
    job: RefreshJob, survey_table: pd.DataFrame, final: pd.DataFrame, records: Mapping[str, Any]
) -> PublishedVersion:
    """Assemble the store, write manifest, report and pictures beside it, and publish the version.

    A failed check does not prevent that; it holds the hand-off to training if the configuration says so.

    Raises:
        DatasetError: the staged version does not verify.
    """
    dataset_config, data_root = job.config.dataset, job.config.data_root
    work, staged, schema = job.work, publish.start_staging(data_root, job.version), SCHEMAS[dataset_config.name]
    subjects = manifest.used_rows(final)["subject_id"].tolist()
    sources = _sources(survey_table, job.inputs)
    summary = {
        "name": data_root.name,
        "version": job.version,
        "source": dataset_config.moving[0].lower(),
        "target": dataset_config.reference.lower(),
        "inputs": job.version_inputs,
        **manifest.counts(final, schema),
        "modal_depth": modal_depths(survey_table),
        "planes": modal_planes(survey_table),
        "histogram": site_table_to_records(depth_histogram(survey_table)),
        "not_volumes": survey_table.loc[survey_table["subject_id"] == "", "member"].tolist(),
        "sources": sources,
        **credit.credit_and_licence(sources),
    }
    if dataset_config.preparation != "none":
        summary["preparation"] = {"name": dataset_config.preparation, "deviations": deviations(dataset_config)}
    cut = {s: records[s]["affines"] for s in subjects}  # subject -> array name -> affine, of the scans that it has
    attributes = {"subject_id": subjects, **{k: summary[k] for k in ("name", "version", "licence", "credit")}}
    store.assemble(
        staged / store.STORE,
        schema.arrays,
        shards=[{name: shard_path(work, s, name) for name in cut[s]} for s in subjects],
        affines=[{name: np.array(matrix) for name, matrix in cut[s].items()} for s in subjects],
        slab_shape=tuple(records[subjects[0]]["slab_shape"]),
        pairing=dataset_config.pairing,
        attributes=attributes | ({"margin": dataset_config.margin} if dataset_config.margin else {}),
        scales=[
            {name: (records[s][f"{name}_scale"], records[s][f"{name}_offset"]) for name in cut[s]} for s in subjects
        ],
        subjects=subjects,
    )
    if dataset_config.pictures:
        _write_pictures(work, staged / metadata.PICTURES, final, dataset_config)
    write_atomic(staged / metadata.MANIFEST, schema.to_csv(final))
    summary["checks"] = _run_checks(summary, final, records)
    config = job.config
    compared = checks_history.compare(data_root, summary, final, config.checks, config.max_change)
    checks_history.write_comparison(staged, compared, comparison_page(summary, compared))
    layers = _middle_layers(staged, final, config) if dataset_config.pictures else {}
    write_atomic(staged / metadata.REPORT, dataset_report.dataset_report(summary, final, layers))
    published = publish.publish(data_root, staged, summary, job.inputs.origins, job.progress)
    _warn_of_failed_checks(published)
    return published


def _run_checks(summary: Mapping[str, Any], final: pd.DataFrame, records: Mapping[str, Any]) -> list[checks.Result]:
    """The results of the checks of a version, from its metadata, manifest and records of `cut_subject`."""
    cut = [records[subject]["at_largest_value"] for subject in manifest.used_rows(final)["subject_id"]]
    saturation = {name: [shares[name] for shares in cut if name in shares] for name in SCHEMAS[summary["name"]].arrays}
    return checks.run_checks(checks_version.CHECKS, checks_measures.VersionFacts(summary, final, saturation))


def _warn_of_failed_checks(published: PublishedVersion) -> None:
    for result in checks.failed_checks(published.folder):
        log.warning("check failed: %s (%s)", checks.describe_failure(result), result["what"].rstrip("."))
    if checks.held_by(published.folder):
        log.warning("the hand-off to training is held: see %s", published.folder / metadata.COMPARED_PAGE)


def _sources(survey_table: pd.DataFrame, inputs: Inputs) -> dict[str, Any]:
    """The source of each input file; see `credit`."""
    volumes = survey_table[(survey_table["subject_id"] != "") & survey_table["readable"]]
    sources = {}
    for modality, archive in inputs.archives.items():
        marked = volumes.loc[volumes["modality"] == modality, "simulated"]
        sources[modality] = credit.describe_source(
            f"files of {modality}" if archive.files_sha256 else modalities.archive_name(modality),
            archive.md5 or None,
            from_ixi=is_from_ixi(modality, archive),
            volumes=len(marked),
            simulated=int(marked.sum()),
            files_sha256=archive.files_sha256,
        )
    if inputs.demographics:
        sources["demographics"] = credit.describe_source(
            DEMOGRAPHICS, hashlib.md5(inputs.demographics.data, usedforsecurity=False).hexdigest()
        )
    return sources


def _write_pictures(work: Path, folder: Path, final: pd.DataFrame, dataset_config: DatasetConfig) -> None:
    """Write one picture per used subject, and a contact sheet of the subjects with the least certain pairs."""
    folder.mkdir()
    for subject in manifest.used_rows(final)["subject_id"]:
        store.link(picture_path(work, subject), folder / f"{subject}.jpg")
    pairs = dataset_report.list_pairs(final, dataset_config.name)
    worst = manifest.to_records(dataset_report.worst_pairs(pairs).drop_duplicates("subject_id"))
    captions = [f"{row['subject_id']}   {dataset_report.describe_alignment(row)}" for row in worst]
    paths = [picture_path(work, row["subject_id"]) for row in worst]
    pictures.save_picture(pictures.contact_sheet(paths, captions), folder / metadata.WORST_PAIRS)


def _middle_layers(
    version: Path, final: pd.DataFrame, config: RefreshConfig
) -> dict[tuple[str, str], pictures.PairLayers]:
    """(subject, moving modality) -> the middle slices of the pairs shown in the report, from the store."""
    arrays, rows, reference = (
        store.open_arrays(version),
        final.set_index("subject_id")["store_row"],
        config.dataset.reference,
    )

    def middle_slice(subject: str, modality: str) -> NDArray[Any]:
        array = arrays[modality.lower()]
        return np.asarray(array[int(rows[subject]), array.shape[1] // 2])

    def layers_of(pair: tuple[str, str]) -> pictures.PairLayers:
        subject, moving = pair
        return pictures.pair_layers(middle_slice(subject, moving), middle_slice(subject, reference))

    drawn = dataset_report.drawn_pairs(dataset_report.list_pairs(final, config.dataset.name))
    return dict(zip(drawn, parallel_map(layers_of, drawn, workers=config.workers), strict=True))
