"""The flows give the results of the plain functions; a user error prints one line instead of a traceback."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import SHRINK, SMALL_NETWORKS, config_for

from flows.cli import main
from ixi_etl.dataset.checks import held_by
from ixi_etl.dataset.manifest import funnel
from ixi_etl.dataset.metadata import read_manifest, read_metadata
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.dataset.schema import IXI
from ixi_etl.errors import DownloadError
from ixi_etl.recipes.ixi_inputs import RefreshJob
from ixi_etl.sources.arrivals import Arrival
from ixi_etl.sources.catalog import Source
from ixi_etl.testing.loopback import serve_folder
from ixi_etl.testing.phantom import write_phantom

pytestmark = [pytest.mark.usefixtures("prefect"), pytest.mark.stack]


@dataclass(frozen=True)
class Runs:
    """Two refreshes as flows, the events of both, and the artifacts and progress of the first.

    `searched` are the arguments of tasks in which Prefect looked for results of other tasks.
    """

    root: Path
    source: str
    first: PublishedVersion
    second: PublishedVersion
    events: list[Any]
    artifacts: dict[str, tuple[str, Any]]
    progress: set[tuple[str, float]]
    searched: list[Any]


@pytest.fixture(scope="module")
def runs(prefect: None, archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    from prefect.utilities.collections import visit_collection

    from flows.refresh_dataset import refresh_dataset

    root = tmp_path_factory.mktemp("flow")
    searched: list[Any] = []

    def search(value: Any, *arguments: Any, **options: Any) -> Any:
        searched.append(value)
        return visit_collection(value, *arguments, **options)

    with serve_folder(archives) as url, pytest.MonkeyPatch.context() as patch, events_of_block() as events:
        patch.setattr("prefect.task_engine.visit_collection", search)
        first = refresh_dataset(config_for(root, url))
        artifacts, progress = artifacts_of_last_run()
        second = refresh_dataset(config_for(root, url))
    return Runs(root, url, first, second, events, artifacts, progress, searched)


def test_flow_publishes_the_same_version_from_http(runs: Runs, published: PublishedVersion) -> None:
    assert (runs.first.version, runs.first.is_new) == (published.version, True)
    assert (runs.second.version, runs.second.is_new) == (published.version, False)
    assert (runs.first.folder / "manifest.csv").read_bytes() == (published.folder / "manifest.csv").read_bytes()
    assert not list((runs.root / "archives").glob("*.part*"))


def test_new_version_is_announced_once(runs: Runs) -> None:
    announced = [(event.resource.id, event.payload) for event in runs.events if event.event == "ixi.dataset.published"]
    assert announced == [("ixi.dataset.ixi-t1-t2", {"version": runs.first.version, "root": str(runs.root)})]


def test_a_new_version_materialises_the_asset_of_its_dataset(runs: Runs) -> None:
    made = [event for event in runs.events if event.event == "prefect.asset.materialization.succeeded"]
    [asset] = made  # the second refresh found the version published
    described = read_metadata(runs.first.folder)
    results = [*described["checks"], *json.loads((runs.first.folder / "compared.json").read_text())["checks"]]
    assert asset.resource.id == f"file://{runs.root}/datasets/ixi-t1-t2"
    assert asset.payload == {
        "version": runs.first.version,
        "subjects": described["subjects"],
        "splits": described["splits"],
        "checks_passed": len(results),
        "checks_failed": [],
        "report": (runs.first.folder / "report.html").as_uri(),
    }


def test_artifacts_show_the_checks_and_the_comparison(runs: Runs) -> None:
    rows = json.loads(runs.artifacts["ixi-t1-t2-checks"][1])
    assert {row["check"]: row["result"] for row in rows} | {"nmi": "passed", "funnel_change": "not applied"} == {
        row["check"]: row["result"] for row in rows
    }
    assert json.loads(runs.artifacts["ixi-t1-t2-compared"][1]) == [
        {"what": "The first version: there is nothing to compare with"}
    ]


@pytest.mark.parametrize(("mode", "held"), [("block", True), ("warn", False)])
def test_a_failed_check_is_told_and_holds_the_hand_off_unless_it_only_warns(
    mode: str, held: bool, published: PublishedVersion, tmp_path: Path
) -> None:
    """The second version of a root, from archives of fewer subjects."""
    from flows.refresh_dataset import refresh_dataset

    shutil.copytree(published.folder.parents[2], tmp_path / "root")
    write_phantom(tmp_path / "fewer", subjects=3, seed=3, oddities=False, shrink=SHRINK)
    config = config_for(tmp_path / "root", tmp_path / "fewer").model_copy(update={"checks": mode})
    with events_of_block() as events:
        made = refresh_dataset(config)
    told = {event.event: event for event in events if event.event.startswith("ixi.dataset.")}
    assert told.keys() == {"ixi.dataset.checks_failed"} | ({"ixi.dataset.published"} if not held else set())
    failure = told["ixi.dataset.checks_failed"]
    assert failure.resource.id == "ixi.dataset.ixi-t1-t2"
    line = failure.payload.pop("failed")
    assert failure.payload == {"version": made.version, "root": str(tmp_path / "root"), "held": held}
    assert re.search(r"(^|; )funnel_change: 0\.\d+, limit at most 0\.1($|;)", line)
    assert ("funnel_change" in held_by(made.folder)) == held


@contextmanager
def events_of_block() -> Iterator[list[Any]]:
    """The events that the block emits, when it has ended."""
    from prefect.events.clients import AssertingEventsClient
    from prefect.events.worker import EventsWorker

    EventsWorker.instance().drain()
    AssertingEventsClient.reset()
    EventsWorker.set_client_override(AssertingEventsClient)
    events: list[Any] = []
    try:
        yield events
        EventsWorker.instance().drain()
    finally:
        EventsWorker.set_client_override(None)
    events += [event for client in AssertingEventsClient.all for event in client.events]


def test_prefect_does_not_search_what_grows_with_the_subjects(runs: Runs) -> None:
    """A search takes milliseconds per subject. Prefect does not look into tables by itself."""
    from prefect.utilities.annotations import quote

    assert {Source, RefreshJob, dict} <= {type(v.unwrap()) for v in runs.searched if isinstance(v, quote)}
    assert not [v for v in runs.searched if isinstance(v, (Source, RefreshJob, dict))]


def test_every_download_is_followed_by_its_arrival(runs: Runs) -> None:
    """`acquire_file` reports to the arrival that the file is whole."""
    from prefect.utilities.annotations import quote

    given = [v.unwrap() for v in runs.searched if isinstance(v, quote)]
    arrivals = [value for value in given if isinstance(value, Arrival)]
    assert {arrival.path.name for arrival in arrivals if arrival.whole} == {"IXI-T1.tar", "IXI-T2.tar"}


def test_runs_have_readable_names(runs: Runs) -> None:
    from prefect import get_client

    with get_client(sync_client=True) as client:
        names = {run.name for run in client.read_flow_runs()}
    assert f"refresh anatomical from {runs.source}" in names
    tasks = {event.resource.name for event in runs.events if event.event == "prefect.task-run.Completed"}
    assert {"download IXI-T1.tar", f"cut for {runs.first.version}", f"publish {runs.first.version}"} <= tasks


def test_refresh_creates_artifacts_on_the_server(runs: Runs) -> None:
    version, artifacts = runs.first, runs.artifacts
    assert {name: kind for name, (kind, _) in artifacts.items()} == {
        "ixi-t1-t2-summary": "markdown",
        "ixi-t1-t2-exclusions": "table",
        "ixi-t1-t2-depths": "image",
        "ixi-t1-t2-pairs": "image",
        "ixi-t1-t2-checks": "table",
        "ixi-t1-t2-compared": "table",
        "ixi-t1-t2-report": "markdown",  # Prefect stores a link as markdown
    }
    manifest = read_manifest(version.folder)
    excluded = manifest[manifest["status"] == "excluded"]
    summary, listed = artifacts["ixi-t1-t2-summary"][1], json.loads(artifacts["ixi-t1-t2-exclusions"][1])
    assert f"| found | {' | '.join(str(n) for n in funnel(manifest, IXI).loc['found'])} |" in summary
    assert [row["subject_id"] for row in listed] == excluded["subject_id"].tolist()
    assert all(len(data) < 300_000 for kind, data in artifacts.values() if kind == "image")
    assert f"]({(version.folder / 'report.html').as_uri()})" in artifacts["ixi-t1-t2-report"][1]
    assert runs.progress >= {("verify IXI-T1.tar", 100.0), ("survey T2", 100.0), ("cut", 100.0)}


def artifacts_of_last_run() -> tuple[dict[str, tuple[str, Any]], set[tuple[str, float]]]:
    """The artifacts with a key (key: type, data), and the progress artifacts (description, percent)."""
    from prefect import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        run = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)[0]
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
        )
    artifacts = {a.key: (str(a.type), a.data) for a in found if a.key}
    return artifacts, {(str(a.description), float(a.data)) for a in found if a.type == "progress"}  # type: ignore[arg-type]


def test_refused_artifacts_only_log_a_warning(
    archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from flows.refresh_dataset import refresh_dataset

    def refuse(*_: object, **__: object) -> None:  # a real server cannot fail on demand
        raise ConnectionError("gone")

    monkeypatch.setattr("flows.artifacts.create_markdown_artifact", refuse)
    monkeypatch.setattr("flows.artifacts.create_progress_artifact", refuse)
    assert refresh_dataset(config_for(tmp_path, archives, pictures=False)).is_new
    assert caplog.text.count("did not accept all artifacts (ConnectionError: gone)") == 2


def test_parameters_are_checked_before_the_flow_runs() -> None:
    from flows.refresh_dataset import refresh_dataset

    with pytest.raises(Exception, match="wormhole"):
        refresh_dataset(config={"root": "x", "wormhole": 1})


def test_user_error_is_not_retried(tmp_path: Path) -> None:
    from flows.refresh_dataset import refresh_dataset

    with pytest.raises(DownloadError, match="is not there"):  # three tries would take minutes
        refresh_dataset(config_for(tmp_path, tmp_path / "nowhere"))


def test_command_line_reports_a_user_error_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", api_url())
    with pytest.raises(SystemExit) as ended:
        main(["refresh", "--root", str(tmp_path / "root"), "--source", str(tmp_path / "nowhere")])
    assert ended.value.code == 3
    message = capfd.readouterr().err
    assert message == f"error: {tmp_path}/nowhere/IXI-T1.tar is not there; give a --source that has IXI-T1.tar\n"


def count_runs(flow: str) -> int:
    """The number of runs of a flow on the server."""
    from prefect import get_client
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName

    with get_client(sync_client=True) as client:
        return len(client.read_flow_runs(flow_filter=FlowFilter(name=FlowFilterName(any_=[flow]))))


def test_command_line_runs_the_refresh_as_a_flow_only_if_a_server_is_configured(
    refreshed: PublishedVersion,
    archives: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["refresh", "--root", str(tmp_path), "--source", str(archives)]
    arguments += ["--slices", "12", "--registration", "none"]
    summary = f"version   {refreshed.version}\nstate     published before, nothing to do\n"
    before = count_runs("refresh-dataset")
    monkeypatch.setenv("PREFECT_API_URL", "")
    with pytest.raises(SystemExit):
        main(arguments)
    assert summary in capsys.readouterr().out
    assert count_runs("refresh-dataset") == before
    monkeypatch.setenv("PREFECT_API_URL", api_url())
    monkeypatch.setattr("logging.raiseExceptions", True)
    with pytest.raises(SystemExit):
        main(arguments)
    assert summary in capsys.readouterr().out
    assert count_runs("refresh-dataset") == before + 1


def api_url() -> str:
    from prefect.settings import get_current_settings

    return str(get_current_settings().api.url)


INTERRUPTED_TRAINING = """
import os, signal, sys
from flows import cli
from model.trainer import Trainer
step = Trainer.step
def interrupted_step(*batch):
    os.kill(os.getpid(), signal.SIGINT)
    return step(*batch)
Trainer.step = interrupted_step
sys.argv = ["ixi-etl", *sys.argv[1:]]
cli.main()
"""


@pytest.mark.usefixtures("torch")
def test_interrupted_training_flow_saves_and_ends_in_one_line(published: PublishedVersion, tmp_path: Path) -> None:
    (tmp_path / "datasets").symlink_to(published.folder.parents[1])
    settings = [f"--set={name}={value}" for name, value in SMALL.items()]
    arguments = ["train", "--preset", "smoke", "--root", str(tmp_path), "--run-id", "a", "--quiet", *settings]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_TRAINING, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PREFECT_API_URL": api_url()},
        check=False,
    )
    assert done.returncode == 130, done.stderr
    *_, saving, stopped = done.stderr.splitlines()
    assert saving == "SIGINT: saving after this step"
    assert stopped.startswith("stopped at step 1 of 2 and saved in")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.glob("runs/a/checkpoints/step-00000001.safetensors"))


SMALL = SMALL_NETWORKS | {"steps": 2, "samples": 1}


@pytest.mark.usefixtures("torch")
def test_training_flow_trains_and_evaluates_once(published: PublishedVersion, tmp_path: Path) -> None:
    from flows.assets import asset_key
    from flows.train_pix2pix import train_pix2pix

    (tmp_path / "datasets").symlink_to(published.folder.parents[1])
    with events_of_block() as events:
        folder = train_pix2pix(preset="smoke", root=tmp_path, settings=SMALL)
    [asset] = [event for event in events if event.event == "prefect.asset.materialization.succeeded"]
    upstream = [each.id for each in asset.related if each.role == "asset"]
    assert (asset.resource.id, upstream) == (f"file://{folder}", [asset_key(tmp_path / "datasets" / "ixi-t1-t2")])
    assert folder.parent == tmp_path / "runs"
    assert published.version in folder.name  # the default `latest` is resolved
    assert (folder / "generator.safetensors").exists()
    splits = read_metadata(published.folder)["splits"]
    assert (folder / "evaluation-test.csv").exists() == ("test" in splits)
    artifacts, progress = artifacts_of_last_run()
    assert artifacts.keys() >= {"pix2pix-summary", "pix2pix-report", "pix2pix-samples"}
    assert ("train", 100.0) in progress
    before = (folder / "checkpoints" / "step-00000002.safetensors").stat().st_mtime_ns
    assert train_pix2pix(preset="smoke", root=tmp_path, settings=SMALL) == folder
    assert (folder / "checkpoints" / "step-00000002.safetensors").stat().st_mtime_ns == before


@pytest.mark.usefixtures("torch")
def test_synthesis_flow_writes_the_file_of_the_plain_function(published: PublishedVersion, tmp_path: Path) -> None:
    import numpy as np

    from flows.synthesize import synthesize
    from ixi_etl.dataset.store import open_arrays
    from ixi_etl.testing.phantom import pack_nifti
    from model import synthesize as synthesis
    from model import volumes
    from model.config import TrainConfig
    from model.jobs import prepare_run, train_run

    (tmp_path / "datasets").symlink_to(published.folder.parents[1])
    generator = train_run(prepare_run(tmp_path, TrainConfig.model_validate(SMALL | {"samples": 0}), "a"))
    arrays = open_arrays(published.folder)
    source = tmp_path / "slab-T1.nii.gz"
    source.write_bytes(pack_nifti(np.asarray(arrays["t1"][0]), np.asarray(arrays["t1_affine"][0])))
    (written,) = synthesize("latest", [source], tmp_path / "out", root=tmp_path)
    assert written == tmp_path / "out" / "slab-T2.nii.gz"
    plain = volumes.synthesize_file(synthesis.load_trained(generator), source, tmp_path / "plain.nii.gz")
    assert written.read_bytes() == plain.read_bytes()
    assert json.loads(artifacts_of_last_run()[0]["synthesized-volumes"][1]) == [{"volume": str(written)}]


README = Path(__file__).parents[2] / "README.md"


@pytest.mark.usefixtures("torch")
def test_readme_python_runs_from_top_to_bottom(archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from ixi_etl.pairing.register import Registration
    from ixi_etl.scans.tar import index_archive, read_member
    from model.config import PRESETS

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "smoke", SMALL | {"steps": 1, "samples": 0})  # fits the small phantom
    unmoved = Registration(np.eye(4), np.eye(4))
    monkeypatch.setattr("ixi_etl.pairing.register.register", lambda t1, t2, is_affine: unmoved)
    text = README.read_text().replace("/data/ixi", str(archives))
    names: dict[str, Any] = {}
    t1 = str(archives / "IXI-T1.tar")
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if "synthesize(" in block:
            (tmp_path / "scans").mkdir()
            member = next(m for m in index_archive(t1) if m.name.startswith("IXI002"))
            (tmp_path / "scans" / member.name).write_bytes(read_member(t1, member.offset, member.size))
        version = names["refreshed"].version if "refreshed" in names else ""
        exec(
            compile(
                block.replace("<version>", version).replace("IXI002-Guys-0828", "IXI002-HH-0774"), "README.md", "exec"
            ),
            names,
        )
    assert names["folder"].parent == Path("ixi-data/runs")
    assert [path.name for path in names["written"]] == [member.name.replace("-T1", "-T2")]
    assert names["data"]["t1"].dims == ("subject", "z", "y", "x")
