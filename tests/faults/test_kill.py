"""SIGKILL at moments spread evenly over each stage, and the same command again: nothing lost, nothing done twice."""

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
from processes import Job, preload
from reader import checkpoints_of, latest_of, reading
from servers import PROBE, Call, Host, serve

from ixi_etl.config import RefreshConfig
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.recipes.ixi import refresh
from model import checkpoint

pytestmark = pytest.mark.faults

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


@pytest.fixture(scope="module", autouse=True)
def _jobs() -> None:
    preload()


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@dataclass
class Site:
    """Where it happens: archives in a folder and on a server, and a root with an older version that is the latest."""

    host: Host
    archives: Path
    before: Path
    version: str
    result: dict[str, str]

    def config(self, root: Path, stage: str) -> RefreshConfig:
        return config_for(root, self.host.url.rpartition("/")[0] if stage == "download" else self.archives)

    def root(self, folder: Path) -> Path:
        """A root of its own, as the one before."""
        return Path(shutil.copytree(self.before, folder))

    def sent(self) -> dict[str, int]:
        """Archive -> bytes of it that were sent, but for the probes."""
        count: Counter[str] = Counter()
        for asked in self.host.requests:
            if asked.method == "GET" and asked.range != PROBE and asked.path.endswith(".tar"):
                count[asked.path] += asked.sent
        return count


def slowly(call: Call) -> None:
    """The right answer, at a speed that lets a download last for most of a second."""
    data = call.start()
    for at in range(0, len(data), SEGMENT // 4):
        call.send(data[at : at + SEGMENT // 4])
        if len(data) > 512:
            call.host.closing.wait(0.015)


@pytest.fixture(scope="module")
def site(published: PublishedVersion, archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    before = tmp_path_factory.mktemp("kill") / "root"
    refresh(config_for(before, archives, split_seed=1, pictures=False))
    files = {f"/{name}": (archives / name).read_bytes() for name in ("IXI-T1.tar", "IXI-T2.tar", "MD5SUMS")}
    with serve(Host(b"", files=files)) as host:
        yield Site(host, archives, before, published.version, digests(published.folder))


@pytest.fixture(scope="module")
def cut_site(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The same, with a root in which all is cut."""
    root = site.root(tmp_path_factory.mktemp("cut") / "root")
    Job(stages.do_refresh, site.config(root, "cut").model_dump_json(), SEGMENT).kill_after("publish", 0)
    return replace(site, before=root)


@dataclass
class Toll:
    """What many kills came to."""

    hits: Counter[str] = field(default_factory=Counter)
    looks: int = 0
    kept: int = 0
    twice: int = 0

    def outcome(self, then: str) -> str:
        told = [f"{self.hits[stage]} in {stage}" for stage in stages.STAGES[:-1] if self.hits[stage]]
        where = ", ".join(told + ([f"{self.hits['done']} just after its end"] if self.hits["done"] else []))
        return f"killed {where}; then {then}; {self.looks:,} reads of the newest, all whole"

    @property
    def lost(self) -> str:
        again = f"none; {self.kept} records or checkpoints kept"
        return again + (f"; at most {self.twice >> 10} KiB of an archive sent twice" if self.twice else "")


def measured(stage: str, runs: list[Job]) -> float:
    return min(job.lasted(stage, FOLLOWING[stage]) for job in runs)


def moments(count: int, lasts: float) -> list[float]:
    return [(n + 0.5) / count * lasts for n in range(count)]


def refresh_killed(site: Site, root: Path, stage: str, after_s: float, toll: Toll, *flow: str) -> None:
    """One kill in a refresh, and the same refresh again."""
    config = site.config(root, stage)
    target = stages.do_refresh_flow if flow else stages.do_refresh
    arguments = (config.model_dump_json(), SEGMENT, *flow)
    with reading(latest_of(root)) as reader:
        site.host.requests.clear()
        site.host.answer = slowly
        toll.hits[Job(target, *arguments, fresh=bool(flow)).kill_after(stage, after_s)] += 1
        made = {p.name: p.stat().st_mtime_ns for p in config.data_root.unfinished.glob("*/*/IXI*.json")}
        site.host.answer = Call.correct
        again = Job(target, *arguments, fresh=bool(flow))
        assert again.end() == site.version
    toll.looks += reader.looks
    assert digests(config.data_root.version(site.version)) == site.result
    left = again.left("cut") or {}  # nothing, where the kill came after all was published
    assert {name: left.get(name) for name in made if left} == (made if left else {}), "what was cut was cut again"
    toll.kept += len(made) if left else 0
    for path, sent in site.sent().items():
        twice = sent - len(site.host.files[path])
        assert 0 <= twice <= config.connections * SEGMENT, f"{twice} bytes of {path} were fetched twice"
        toll.twice = max(toll.twice, twice)


def training_killed(site: Site, root: Path, after_s: float, toll: Toll, whole: Path, *flow: str) -> None:
    """One kill in a training, and the same training again."""
    target = stages.do_training_flow if flow else stages.do_training
    arguments = (str(root), TRAINING, "a", *flow)
    run = root / "runs" / "a"
    with reading(checkpoints_of(run)) as reader:
        toll.hits[Job(target, *arguments, fresh=bool(flow)).kill_after("train", after_s)] += 1
        saved = {p: p.stat().st_mtime_ns for p in (run / "checkpoints").glob("step-*")}
        Job(target, *arguments, fresh=bool(flow)).end()
    toll.looks += reader.looks
    assert {p: p.stat().st_mtime_ns for p in saved} == saved, "what was trained and saved was trained again"
    toll.kept += len(saved)
    last = f"checkpoints/step-{TRAINING['steps']:08d}.safetensors"
    for name in ("generator.safetensors", last):
        (tensors, facts), (wanted, said) = checkpoint.load(run / name), checkpoint.load(whole / name)
        assert facts == said
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("stage", ["download", "cut", "publish"])
def test_kill(stage: str, site: Site, request: pytest.FixtureRequest, tmp_path: Path, row: Row) -> None:
    site = request.getfixturevalue("cut_site") if stage == "publish" else site
    count, toll, whole = 50, Toll(), []
    for n in range(3):
        config = site.config(site.root(tmp_path / f"whole{n}"), stage)
        site.host.answer = slowly
        whole.append(Job(stages.do_refresh, config.model_dump_json(), SEGMENT))
        assert whole[-1].end() == site.version
    for n, after_s in enumerate(moments(count, measured(stage, whole))):
        refresh_killed(site, root := site.root(tmp_path / f"killed{n}"), stage, after_s, toll)
        shutil.rmtree(root)
    row(f"kill in {stage}, plain functions", count, toll.outcome("the same version, byte for byte"), toll.lost)


@pytest.fixture(scope="module")
def trained(published: PublishedVersion, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Job]]:
    """A training that nobody disturbed, and how it went."""
    root = tmp_path_factory.mktemp("trained")
    (root / "datasets").symlink_to(published.folder.parents[1])
    jobs = []
    for n in range(3):
        jobs.append(Job(stages.do_training, str(root), TRAINING, f"whole{n}"))
        jobs[-1].end()
    return root / "runs/whole0", jobs


def test_kill_training(site: Site, trained: tuple[Path, list[Job]], tmp_path: Path, row: Row) -> None:
    count, toll = 50, Toll()
    for n, after_s in enumerate(moments(count, measured("train", trained[1]))):
        root = tmp_path / f"killed{n}"
        root.mkdir()
        (root / "datasets").symlink_to(trained[0].parents[1] / "datasets")
        training_killed(site, root, after_s, toll, trained[0])
        shutil.rmtree(root)
    row("kill in training, plain functions", count, toll.outcome("the same weights, bit for bit"), toll.lost)


@pytest.fixture(scope="module")
def api(prefect: None) -> str:
    """The API's address of a Prefect server."""
    from prefect.settings import get_current_settings

    return str(get_current_settings().api.url)


@pytest.mark.parametrize("stage", ["download", "cut", "publish", "train"])
def test_kill_flow(
    stage: str, site: Site, cut_site: Site, trained: tuple[Path, list[Job]], api: str, tmp_path: Path, row: Row
) -> None:
    site = cut_site if stage == "publish" else site
    count, toll = 5, Toll()
    root = site.root(tmp_path / "whole")
    site.host.answer = slowly
    if stage == "train":
        whole = Job(stages.do_training_flow, str(trained[0].parents[1]), TRAINING, "flow", api, fresh=True)
    else:
        config = site.config(root, stage)
        whole = Job(stages.do_refresh_flow, config.model_dump_json(), SEGMENT, api, fresh=True)
    whole.end()
    for n, after_s in enumerate(moments(count, measured(stage, [whole]))):
        root = tmp_path / f"killed{n}"
        if stage == "train":
            root.mkdir()
            (root / "datasets").symlink_to(trained[0].parents[1] / "datasets")
            training_killed(site, root, after_s, toll, trained[0], api)
        else:
            refresh_killed(site, site.root(root), stage, after_s, toll, api)
        shutil.rmtree(root)
    row(f"kill in {stage}, through the flow", count, toll.outcome("the same bytes"), toll.lost)
