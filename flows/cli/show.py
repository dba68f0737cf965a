"""Print a version or a run: its summary tables, and the paths of its files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import summaries
from flows.cli.output import Output

if TYPE_CHECKING:
    from ixi_etl.dataset.publish import PublishedVersion


def show_version(output: Output, published: PublishedVersion) -> None:
    from ixi_etl.dataset import checks, metadata
    from ixi_etl.dataset.store import STORE

    table = metadata.read_manifest(published.folder, validate=False)  # it was just made or verified
    described = metadata.read_metadata(published.folder)
    name = described["name"]
    funnel, exclusions = summaries.funnel_summary(table, name), summaries.exclusions_summary(table)
    output.table("funnel", funnel.shown, funnel.title, funnel.records)
    if exclusions.records:
        output.table("exclusions", exclusions.shown, exclusions.title, exclusions.records)
    files = {"store": STORE, "manifest": metadata.MANIFEST, "report": metadata.REPORT}
    files |= {"compared": metadata.COMPARED_PAGE}
    fields: dict[str, Any] = {
        "version": published.version,
        "state": "published" if published.is_new else "published before, nothing to do",
    }
    results = checks.all_results(published.folder, described)
    if results:
        fields["checks"] = "; ".join(map(checks.describe_failure, checks.failed(results))) or f"{len(results)} passed"
    fields |= {k: published.folder / name for k, name in files.items() if (published.folder / name).exists()}
    output.fields(fields)


def show_run(output: Output, folder: Path, evaluation: str = "evaluation-test") -> None:
    show_evaluation(output, folder, evaluation)
    sheet = summaries.last_sample_sheet(folder)
    output.fields(
        {"run": folder, "generator": folder / "generator.safetensors"}
        | ({"samples": sheet} if sheet else {})
        | {"report": folder / "report.html"}
    )


def show_evaluation(output: Output, folder: Path, evaluation: str) -> None:
    summary = summaries.evaluation_summary(folder, evaluation)
    if summary is not None:
        output.table("evaluation", summary.shown, summary.title, summary.records)
        links = dict.fromkeys(row["definition"] for row in summary.records if "definition" in row)
        if links:  # evaluations by older code have none
            output.text(f"definitions: {', '.join(links)}")
