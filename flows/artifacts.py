"""What a flow run shows on a Prefect server's page: summaries, tables, pictures, links, and how far its stages are.

They are made of the files of a version or a run, which stay the record: a server that takes none of it costs a warning.
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

from ixi_etl import dataset, manifest
from ixi_etl.files import Progress, read_json
from ixi_etl.publish import Refreshed
from ixi_etl.schema import EXCLUDED
from ixi_etl.survey import draw_histogram, flat, table_of_sites

log = logging.getLogger("ixi_etl.artifacts")

EVERY_S = 3.0  # seconds from one look at the progress to the next
LARGEST = 200_000  # bytes of a picture; the server stores it twice, in base64
LISTED = 1000  # rows of a table


def show_version(refreshed: Refreshed) -> None:
    """The funnel, the depths, the exclusions and the pairs least alike of a version, and where its report lies."""
    with _taken():
        facts, table = dataset.read_facts(refreshed.folder), dataset.read_manifest(refreshed.folder)
        name, report = facts["name"], refreshed.folder / dataset.REPORT
        out = table[table["status"] == EXCLUDED][["subject_id", "site", "reason", "detail"]]
        create_markdown_artifact(_version_summary(refreshed, facts, table), f"{name}-summary")
        create_table_artifact(
            manifest.records(out.head(LISTED)), f"{name}-exclusions", "Subjects that are out, and why"
        )
        create_image_artifact(_data_uri(_histogram(facts)), f"{name}-depths", "Volumes by depth")
        create_link_artifact(_link(report), str(report), f"{name}-report", "The version's report")
        worst = refreshed.folder / dataset.PICTURES / dataset.WORST
        if worst.exists():
            create_image_artifact(_data_uri(worst.read_bytes()), f"{name}-pairs", "T1, T2, edges: the ten least alike")


def show_run(run: Path, split: str = "test") -> None:
    """The measures of a run beside the baselines, its last sample sheet, and where its report lies."""
    with _taken():
        config, facts = read_json(run / "config.json")["config"], read_json(run / f"evaluation-{split}.json")
        create_markdown_artifact(_run_summary(run, config, facts), "pix2pix-summary")
        if facts:
            create_table_artifact(facts["summary"], "pix2pix-evaluation", f"By method and mask, on {split}")
        sheets = sorted((run / "samples").glob("*-gray.png"))
        if sheets:
            create_image_artifact(
                _data_uri(sheets[-1].read_bytes()), "pix2pix-samples", "Source, target, generated, error"
            )
        create_link_artifact(_link(run / "report.html"), str(run / "report.html"), "pix2pix-report", "The run's report")


def show_written(paths: Sequence[Path]) -> None:
    """The volumes that were written."""
    with _taken():
        rows = [{"volume": str(path)} for path in paths[:LISTED]]
        create_table_artifact(rows, "synthesized-volumes", f"{len(paths)} volumes")


@contextmanager
def progress_artifacts(show: Progress) -> Iterator[Progress]:
    """`show`, and a progress artifact of each stage, kept up to date by a thread, so that no stage waits for it."""
    latest: dict[str, float] = {}  # stage -> percent
    ended = threading.Event()

    def told(what: str, done: int, total: int, unit: str) -> None:
        show(what, done, total, unit)
        latest[what] = 100 * done / max(total, 1)

    def keep() -> None:
        posted: dict[str, tuple[Any, float]] = {}
        with _taken():
            while not ended.wait(EVERY_S):
                _post(latest, posted)
            _post(latest, posted)

    # The context says which flow run the artifacts belong to.
    keeper = threading.Thread(target=contextvars.copy_context().run, args=(keep,), daemon=True)
    keeper.start()
    try:
        yield told
    finally:
        ended.set()
        keeper.join()


def _post(latest: Mapping[str, float], posted: dict[str, tuple[Any, float]]) -> None:
    """`posted`: stage -> id of its artifact, and the percent that the server knows."""
    for what, percent in list(latest.items()):
        if what not in posted:
            posted[what] = create_progress_artifact(percent, description=what), percent
        elif posted[what][1] != percent:
            update_progress_artifact(posted[what][0], percent, what)
            posted[what] = posted[what][0], percent


@contextmanager
def _taken() -> Iterator[None]:
    """Whatever goes wrong on the way to the server is no reason to lose what was computed."""
    try:
        yield
    except Exception as error:
        log.warning("the Prefect server was not told all (%s: %s)", type(error).__name__, error)


def _version_summary(refreshed: Refreshed, facts: Mapping[str, Any], table: pd.DataFrame) -> str:
    config = facts["inputs"]["config"]
    told = {
        "state": "new" if refreshed.is_new else "published before",
        "folder": f"`{refreshed.folder}`",
        "subjects": facts["subjects"],
        "splits": ", ".join(f"{n} {split}" for split, n in facts["splits"].items()),
        "modal depth": ", ".join(f"{m} {depth}" for m, depth in facts["modal_depth"].items()),
        "pairing": config["pairing"],
        **{name: facts[name] for name in ("credit", "licence") if name in facts},
    }
    parts = [f"# {facts['name']}@{refreshed.version}", _facts(told)]
    parts += ["## Subjects left after each step", _markdown(flat(manifest.funnel(table)))]
    reasons = flat(manifest.exclusions(table))
    if len(reasons):
        parts += ["## Why the others are out", _markdown(reasons)]
    return "\n\n".join(parts)


def _run_summary(run: Path, config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    told = {"folder": f"`{run}`"} | {k: config[k] for k in ("dataset", "direction", "steps", "batch_size", "width")}
    told |= read_json(run / "config.json").get("data") or {}
    parts = [f"# {run.name}", _facts(told)]
    if facts:
        rows = pd.DataFrame(facts["summary"])
        shown = rows[["mask", "method", "psnr_mean", "ssim_mean", "mae_mean"]].round(4)
        title = f"## {facts['split']}: means over {rows['subjects'].iloc[0]} subjects"
        parts += [title, _markdown(shown), f"{facts['normalisation']}; data range 1"]
    return "\n\n".join(parts)


def _facts(told: Mapping[str, Any]) -> str:
    return "\n".join(f"- **{name}**: {value}" for name, value in told.items())


def _markdown(table: pd.DataFrame) -> str:
    """A table of GitHub's Markdown."""
    rows: list[list[Any]] = [list(table), ["---"] * table.shape[1], *table.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows)


def _histogram(facts: Mapping[str, Any]) -> bytes:
    drawn = io.BytesIO()
    histogram = table_of_sites(facts["histogram"], ["modality", "depth"])
    draw_histogram(histogram, facts["modal_depth"], drawn)
    return drawn.getvalue()


def _link(path: Path) -> str:
    return path.resolve().as_uri() if "://" not in str(path) else str(path)


def _data_uri(picture: bytes) -> str:
    """The picture as a data URI in JPEG, made smaller until it is no larger than `LARGEST`."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    while True:
        packed = io.BytesIO()
        image.save(packed, "JPEG", quality=85)
        if packed.tell() <= LARGEST:
            return f"data:image/jpeg;base64,{base64.b64encode(packed.getvalue()).decode()}"
        image = image.resize((image.width * 3 // 4, image.height * 3 // 4))
