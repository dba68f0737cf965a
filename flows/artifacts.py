"""Artifacts of a flow run on the pages of a Prefect server: summaries, tables, pictures, links and progress.

They are made from the files of a version or a run, which remain the record: if the server does not accept an artifact,
the flow logs a warning and continues.
"""

from __future__ import annotations

import base64
import contextvars
import io
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from flows import summaries
from ixi_etl.core.files import read_json
from ixi_etl.core.progress import Progress
from ixi_etl.core.text import quantity
from ixi_etl.dataset import checks, manifest, metadata
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.dataset.schema import EXCLUDED
from ixi_etl.report.comparison_page import change_rows, check_rows
from ixi_etl.report.depth_chart import depths_svg

log = logging.getLogger("ixi_etl.artifacts")

UPDATE_INTERVAL_S = 3.0  # between two updates of the progress artifacts
MAX_PICTURE_BYTES = 200_000  # the server stores each picture twice, in base64
MAX_ROWS = 1000  # of a table
NAMES = ("protocol", "mask", "method", "subjects")  # first columns of the table of scores


def show_version(published: PublishedVersion) -> None:
    """Create artifacts of a version: funnel, depths, exclusions, checks, the worst pairs, and a link to its report."""
    with _errors_as_warnings():
        described = metadata.read_metadata(published.folder)
        table = metadata.read_manifest(published.folder)
        name, report = described["name"], published.folder / metadata.REPORT
        excluded = table[table["status"] == EXCLUDED][["subject_id", "site", "reason", "detail"]]
        create_markdown_artifact(
            _version_markdown(published, described, table), f"{name}-summary", "Subjects of the version"
        )
        create_table_artifact(
            manifest.to_records(excluded.head(MAX_ROWS)), f"{name}-exclusions", "Excluded subjects, with the reason"
        )
        depths = depths_svg(described["histogram"], described["modal_depth"]).encode()
        if len(depths) <= MAX_PICTURE_BYTES:
            create_image_artifact(_svg_uri(depths), f"{name}-depths", "Volumes by depth")
        _show_checks(published.folder, described)
        create_link_artifact(_link(report), str(report), f"{name}-report", "Report of the version")
        worst = published.folder / metadata.PICTURES / metadata.WORST_PAIRS
        if worst.exists():
            title = "The ten subjects with the least certain alignment: scans, and their edges on the reference"
            create_image_artifact(_data_uri(worst.read_bytes()), f"{name}-pairs", title)


def _show_checks(folder: Path, described: Mapping[str, Any]) -> None:
    """Create a table of the checks of a version, and one of its differences from the version before, if it has them."""
    name, results = described["name"], checks.all_results(folder, described)
    if results:
        failures = len(checks.failed(results))
        title = f"Checks: {failures} of {len(results)} failed" if failures else f"Checks: all {len(results)} passed"
        create_table_artifact(check_rows(results), f"{name}-checks", title)
    compared = read_json(folder / metadata.COMPARED)
    if compared:
        before = compared["before"]
        title = f"Compared with {before}" if before else "The first version: there is nothing to compare with"
        create_table_artifact(change_rows(described, compared) or [{"what": title}], f"{name}-compared", title)


def show_run(run: Path) -> None:
    """Create artifacts of a run: scores compared with the baselines, last sample sheet, and a link to its report."""
    with _errors_as_warnings():
        evaluation = summaries.evaluation_summary(run)
        create_markdown_artifact(_run_markdown(run, evaluation), "pix2pix-summary", "Scores of the run")
        if evaluation is not None:
            title = "By protocol, mask and method, on the test split"
            named = [{name: row[name] for name in NAMES if name in row} | row for row in evaluation.records]
            create_table_artifact(named, "pix2pix-evaluation", title)
        sheet = summaries.last_sample_sheet(run)
        if sheet is not None:
            title = "Source, target, generated, error"
            create_image_artifact(_data_uri(sheet.read_bytes()), "pix2pix-samples", title)
        report = run / "report.html"
        create_link_artifact(_link(report), str(report), "pix2pix-report", "Report of the run")


def show_written(paths: Sequence[Path]) -> None:
    """Create a table of the written volumes."""
    with _errors_as_warnings():
        rows = [{"volume": str(path)} for path in paths[:MAX_ROWS]]
        create_table_artifact(rows, "synthesized-volumes", quantity(len(paths), "volume"))


@contextmanager
def progress_artifacts(show: Progress) -> Iterator[Progress]:
    """Yield a `Progress` that calls `show` and keeps one progress artifact per stage up to date.

    A thread sends the updates, so that no stage waits for the server.
    """
    latest: dict[str, float] = {}  # stage -> percent
    ended = threading.Event()

    def report(what: str, done: int, total: int, unit: str) -> None:
        show(what, done, total, unit)
        latest[what] = 100 * done / max(total, 1)

    def update() -> None:
        posted: dict[str, tuple[Any, float]] = {}
        with _errors_as_warnings():
            while not ended.wait(UPDATE_INTERVAL_S):
                _post(latest, posted)
            _post(latest, posted)

    # The context tells Prefect which flow run the artifacts belong to.
    updater = threading.Thread(target=contextvars.copy_context().run, args=(update,), daemon=True)
    updater.start()
    try:
        yield report
    finally:
        ended.set()
        updater.join()


def _post(latest: Mapping[str, float], posted: dict[str, tuple[Any, float]]) -> None:
    """Send what changed. `posted`: stage -> id of its artifact, and the percent that the server has."""
    for what, percent in list(latest.items()):
        if what not in posted:
            posted[what] = create_progress_artifact(percent, description=what), percent
        elif posted[what][1] != percent:
            update_progress_artifact(posted[what][0], percent, what)
            posted[what] = posted[what][0], percent


@contextmanager
def _errors_as_warnings() -> Iterator[None]:
    """Log any error as a warning: no failure of the server may lose what was computed."""
    try:
        yield
    except Exception as error:
        log.warning("the Prefect server did not accept all artifacts (%s: %s)", type(error).__name__, error)


def _version_markdown(published: PublishedVersion, described: Mapping[str, Any], table: pd.DataFrame) -> str:
    items = {
        "state": "new" if published.is_new else "published before",
        "folder": f"`{published.folder}`",
        "subjects": described["subjects"],
        "splits": ", ".join(f"{count} {split}" for split, count in described["splits"].items()),
        "modal depth": ", ".join(f"{m} {depth}" for m, depth in described["modal_depth"].items()),
        "pairing": described["inputs"]["config"]["pairing"],
        **{name: described[name] for name in ("credit", "licence") if name in described},
    }
    parts = [f"# {described['name']}@{published.version}", _markdown_list(items)]
    for summary in (summaries.funnel_summary(table, described["name"]), summaries.exclusions_summary(table)):
        if len(summary.shown):
            parts += [f"## {summary.title}", _markdown_table(summary.shown)]
    return "\n\n".join(parts)


def _run_markdown(run: Path, evaluation: summaries.Summary | None) -> str:
    record = read_json(run / "config.json")
    config = record["config"]
    items = {"folder": f"`{run}`"} | {k: config[k] for k in ("dataset", "direction", "steps", "batch_size", "width")}
    parts = [f"# {run.name}", _markdown_list(items | (record.get("data") or {}))]
    if evaluation is not None:
        parts += [f"## {evaluation.title}", _markdown_table(evaluation.shown), _markdown_list(evaluation.terms)]
    return "\n\n".join(parts)


def _markdown_list(items: Mapping[str, Any]) -> str:
    return "\n".join(f"- **{name}**: {value}" for name, value in items.items())


def _markdown_table(table: pd.DataFrame) -> str:
    """A table in GitHub's Markdown."""
    rows: list[list[Any]] = [list(table), ["---"] * table.shape[1], *table.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows)


def _link(path: Path) -> str:
    return path.resolve().as_uri() if "://" not in str(path) else str(path)


def _data_uri(picture: bytes) -> str:
    """The picture as a JPEG data URI, scaled down until it has at most `MAX_PICTURE_BYTES`."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    while True:
        packed = io.BytesIO()
        image.save(packed, "JPEG", quality=85)
        if packed.tell() <= MAX_PICTURE_BYTES:
            return f"data:image/jpeg;base64,{base64.b64encode(packed.getvalue()).decode()}"
        image = image.resize((image.width * 3 // 4, image.height * 3 // 4))


def _svg_uri(drawing: bytes) -> str:
    """An SVG file as a data URI; Prefect's page shows an image artifact in an `img` element, which draws it."""
    return f"data:image/svg+xml;base64,{base64.b64encode(drawing).decode()}"
