"""SIGKILL at times spread evenly over each stage: the same command then gives the same result and repeats no work."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import stages
import torch
from conftest import SMALL_NETWORKS, config_for
from faults_table import Row
from processes import Job
from reader import checkpoints_of, latest_of, reading
from servers import Call, Host, serve

from ixi_etl.config import RefreshConfig
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.recipes.ixi import refresh
from model import checkpoint

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("fork_server")]

SEGMENT = 1 << 16
FOLLOWING = {"download": "name", "cut": "publish", "publish": "done", "train": "done"}
TRAINING: dict[str, Any] = SMALL_NETWORKS | {
    "batch_size": 2,
    "steps": 60,
    "checkpoint_every": 6,
    "keep": 99,
    "log_every": 6,
    "samples": 0,
    "augment": "jitter",
    "ema": 0.9,
}


def file_digests(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@dataclass
class Scenario:
    """Archives in a folder and on a server, the root before a refresh, and the expected version.

    Attributes:
        initial_root: a root whose latest version is an older one.
        version: the version that the refresh publishes.
        digests: `file_digests` of that version.
    """

    host: Host
    archives: Path
    initial_root: Path
    version: str
    digests: dict[str, str]

    def config(self, root: Path, stage: str) -> RefreshConfig:
        return config_for(root, self.host.url.rpartition("/")[0] if stage == "download" else self.archives)

    def copy_root(self, target: Path) -> Path:
        """Copy the initial root."""
        return Path(shutil.copytree(self.initial_root, target))

    def sent_bytes(self) -> dict[str, int]:
        """Path of an archive -> bytes that the server sent of its segments, without probes and survey."""
        count: Counter[str] = Counter()
        for request in self.host.fetches:
            if request.path.endswith(".tar") and request.range:
                start, stop = map(int, request.range.removeprefix("bytes=").split("-"))
                if start % SEGMENT == 0 and stop + 1 in (start + SEGMENT, len(self.host.files[request.path])):
                    count[request.path] += request.sent
        return count


def answer_slowly(call: Call) -> None:
    """Send the correct response, so slowly that a download takes a second; the survey is not slowed down."""
    data = call.start()
    for at in range(0, len(data), SEGMENT // 4):
        call.send(data[at : at + SEGMENT // 4])
        if len(data) >= SEGMENT // 4 and call.command == "GET":
            call.host.closing.wait(0.025)


@pytest.fixture(scope="module")
def scenario(
    published: PublishedVersion, archives: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scenario]:
    initial_root = tmp_path_factory.mktemp("kill") / "root"
    refresh(config_for(initial_root, archives, split_seed=1, pictures=False))
    undisturbed = refresh(config_for(shutil.copytree(initial_root, initial_root.parent / "undisturbed"), archives))
    assert undisturbed.version == published.version
    files = {f"/{name}": (archives / name).read_bytes() for name in ("IXI-T1.tar", "IXI-T2.tar", "MD5SUMS")}
    with serve(Host(b"", files=files)) as host:
        yield Scenario(host, archives, initial_root, undisturbed.version, file_digests(undisturbed.folder))


@pytest.fixture(scope="module")
def cut_scenario(scenario: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    """The same, with a root in which all subjects are cut and nothing is published."""
    root = scenario.copy_root(tmp_path_factory.mktemp("cut") / "root")
    Job(stages.do_refresh, scenario.config(root, "cut").model_dump_json(), SEGMENT).kill_after("publish", 0)
    return replace(scenario, initial_root=root)


@dataclass
class Totals:
    """Totals over many kills.

    Attributes:
        kills: stage -> number of kills in it.
        reads: number of reads of the latest version or checkpoint meanwhile.
        reused: number of records, shards or checkpoints that the second run reused.
        refetched: the most bytes of one archive that were sent twice.
    """

    kills: Counter[str] = field(default_factory=Counter)
    reads: int = 0
    reused: int = 0
    refetched: int = 0

    def outcome(self, result: str) -> str:
        counts = [f"{self.kills[stage]} in {stage}" for stage in stages.STAGES[:-1] if self.kills[stage]]
        if self.kills["done"]:
            counts.append(f"{self.kills['done']} just after its end")
        return f"killed {', '.join(counts)}; then {result}; {self.reads:,} reads of the newest, all valid"

    @property
    def lost(self) -> str:
        text = f"none; {self.reused} records, shards or checkpoints reused"
        return text + (f"; at most {self.refetched >> 10} KiB of an archive sent twice" if self.refetched else "")


def times_of_finished_subjects(config: RefreshConfig) -> dict[str, int]:
    """Records, and shards of subjects that have one, of unfinished work -> when they were written, in nanoseconds."""
    records = list(config.data_root.unfinished.glob("*/*/IXI*.json"))
    shards = [shard for record in records for shard in record.parent.glob(f"{record.stem}.*.shard")]
    return {path.name: path.stat().st_mtime_ns for path in (*records, *shards)}


def kill_times(stage: str, jobs: list[Job], count: int) -> list[float]:
    """Times in seconds, spread evenly over the shortest duration of the stage in uninterrupted jobs."""
    duration = min(job.duration(stage, FOLLOWING[stage]) for job in jobs)
    return [(n + 0.5) / count * duration for n in range(count)]


def kill_refresh(scenario: Scenario, root: Path, stage: str, after_s: float, totals: Totals, *flow: str) -> None:
    """Kill a refresh once and run it again; assert that the version is the same and nothing was done twice.

    `flow` is empty for the plain function, or has the URL of the Prefect API for the flow.
    """
    config = scenario.config(root, stage)
    target = stages.do_refresh_flow if flow else stages.do_refresh
    arguments = (config.model_dump_json(), SEGMENT, *flow)
    with reading(latest_of(root)) as reader:
        scenario.host.requests.clear()
        scenario.host.answer = answer_slowly
        totals.kills[Job(target, *arguments, fresh=bool(flow)).kill_after(stage, after_s)] += 1
        before = times_of_finished_subjects(config)
        scenario.host.answer = Call.correct
        again = Job(target, *arguments, fresh=bool(flow))
        assert again.result() == scenario.version
    totals.reads += reader.reads
    assert file_digests(config.data_root.version(scenario.version)) == scenario.digests
    if stage == "download":  # the record of a subject that was cut on arrival is written again, but not its shards
        before = {name: time for name, time in before.items() if name.endswith(".shard")}
    after = again.output_of("cut")  # None if the version was published before the kill
    if after:
        assert {name: after.get(name) for name in before} == before, "a finished subject was cut again"
        totals.reused += len(before)
    for path, sent in scenario.sent_bytes().items():
        refetched = sent - len(scenario.host.files[path])
        assert 0 <= refetched <= config.connections * SEGMENT, f"{refetched} bytes of {path} were fetched twice"
        totals.refetched = max(totals.refetched, refetched)


def kill_training(root: Path, after_s: float, totals: Totals, uninterrupted: Path, *flow: str) -> None:
    """Kill a training once and run it again; assert the weights of the run folder `uninterrupted`.

    `flow` is as in `kill_refresh`.
    """
    target = stages.do_training_flow if flow else stages.do_training
    arguments = (str(root), TRAINING, "a", *flow)
    run = root / "runs" / "a"
    with reading(checkpoints_of(run)) as reader:
        totals.kills[Job(target, *arguments, fresh=bool(flow)).kill_after("train", after_s)] += 1
        saved = {p: p.stat().st_mtime_ns for p in (run / "checkpoints").glob("step-*")}
        Job(target, *arguments, fresh=bool(flow)).result()
    totals.reads += reader.reads
    assert {p: p.stat().st_mtime_ns for p in saved} == saved, "a saved checkpoint was trained again"
    totals.reused += len(saved)
    last = f"checkpoints/step-{TRAINING['steps']:08d}.safetensors"
    for name in ("generator.safetensors", last):
        (tensors, metadata), (wanted, wanted_metadata) = (checkpoint.load(r / name) for r in (run, uninterrupted))
        assert metadata == wanted_metadata
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("stage", ["download", "cut", "publish"])
def test_a_killed_refresh_gives_the_same_version_on_the_next_run(
    stage: str, scenario: Scenario, request: pytest.FixtureRequest, tmp_path: Path, row: Row
) -> None:
    scenario = request.getfixturevalue("cut_scenario") if stage == "publish" else scenario
    count, totals, uninterrupted = 50, Totals(), []
    for n in range(3):
        config = scenario.config(scenario.copy_root(tmp_path / f"whole{n}"), stage)
        scenario.host.answer = answer_slowly
        uninterrupted.append(Job(stages.do_refresh, config.model_dump_json(), SEGMENT))
        assert uninterrupted[-1].result() == scenario.version
    for n, after_s in enumerate(kill_times(stage, uninterrupted, count)):
        kill_refresh(scenario, root := scenario.copy_root(tmp_path / f"killed{n}"), stage, after_s, totals)
        shutil.rmtree(root)
    assert totals.reused, "no kill came after a subject was cut"
    row(f"kill in {stage}, plain functions", count, totals.outcome("the same version, byte for byte"), totals.lost)


@pytest.fixture(scope="module")
def uninterrupted(published: PublishedVersion, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Job]]:
    """The run folder of an uninterrupted training, and three jobs that measured it."""
    root = tmp_path_factory.mktemp("trained")
    (root / "datasets").symlink_to(published.folder.parents[1])
    jobs = []
    for n in range(3):
        jobs.append(Job(stages.do_training, str(root), TRAINING, f"whole{n}"))
        jobs[-1].result()
    return root / "runs/whole0", jobs


def test_a_killed_training_gives_the_same_weights_on_the_next_run(
    uninterrupted: tuple[Path, list[Job]], tmp_path: Path, row: Row
) -> None:
    count, totals, (run, jobs) = 50, Totals(), uninterrupted
    for n, after_s in enumerate(kill_times("train", jobs, count)):
        root = tmp_path / f"killed{n}"
        root.mkdir()
        (root / "datasets").symlink_to(run.parents[1] / "datasets")
        kill_training(root, after_s, totals, run)
        shutil.rmtree(root)
    row("kill in training, plain functions", count, totals.outcome("the same weights, bit for bit"), totals.lost)


@pytest.fixture(scope="module")
def api(prefect: None) -> str:
    """The URL of the API of a Prefect server."""
    from prefect.settings import get_current_settings

    return str(get_current_settings().api.url)


@pytest.mark.parametrize("stage", ["download", "cut", "publish", "train"])
def test_a_killed_flow_gives_the_same_bytes_on_the_next_run(
    stage: str,
    scenario: Scenario,
    cut_scenario: Scenario,
    uninterrupted: tuple[Path, list[Job]],
    api: str,
    tmp_path: Path,
    row: Row,
) -> None:
    scenario = cut_scenario if stage == "publish" else scenario
    count, totals, (run, _) = 5, Totals(), uninterrupted
    root = scenario.copy_root(tmp_path / "whole")
    scenario.host.answer = answer_slowly
    if stage == "train":
        whole = Job(stages.do_training_flow, str(run.parents[1]), TRAINING, "flow", api, fresh=True)
    else:
        config = scenario.config(root, stage)
        whole = Job(stages.do_refresh_flow, config.model_dump_json(), SEGMENT, api, fresh=True)
    whole.result()
    for n, after_s in enumerate(kill_times(stage, [whole], count)):
        root = tmp_path / f"killed{n}"
        if stage == "train":
            root.mkdir()
            (root / "datasets").symlink_to(run.parents[1] / "datasets")
            kill_training(root, after_s, totals, run, api)
        else:
            kill_refresh(scenario, scenario.copy_root(root), stage, after_s, totals, api)
        shutil.rmtree(root)
    row(f"kill in {stage}, through the flow", count, totals.outcome("the same bytes"), totals.lost)
