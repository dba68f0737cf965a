"""Shared fixtures: small phantom archives, and a version refreshed from them."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import profiles  # noqa: F401 - loads the profile of `make test`
import pytest
import trustme
from faults_table import pytest_terminal_summary, row  # noqa: F401 - a hook and a fixture
from processes import fork_server  # noqa: F401 - a fixture

from ixi_etl.config import DatasetConfig, RefreshConfig
from ixi_etl.core.storage import to_path
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.recipes.ixi import refresh
from ixi_etl.testing.phantom import write_phantom

pytest_plugins = ["running"]  # the services that modules of tests/stack share

# With networks of a few channels, threads cost more than they save. Child processes inherit the variable.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHRINK = 4  # the phantom has IXI's shapes with a quarter of the voxels along each axis
SLICES = 12  # of the 33 slices of a shrunk T2

SMALL_NETWORKS: dict[str, Any] = {
    "side": 32,
    "width": 4,
    "discriminator_width": 4,
    "discriminator_layers": 1,
    "precision": "fp32",
    "device": "cpu",
}
"""Training settings with which a step takes milliseconds."""

TRAINED = SMALL_NETWORKS | {
    "batch_size": 2,
    "steps": 6,
    "checkpoint_every": 2,
    "log_every": 2,
    "samples": 0,
    "ema": 0.9,
}
"""Settings of the run of the fixture `trained`."""


TORCH_MISSING = (
    "needs torch, which a base install does not have; test_extras covers the messages without it; to run this: "
    "pip install -c constraints.txt -e '.[train]'"
)

INSTALL_CHROMIUM = "Debian and Ubuntu: `apt-get install chromium`; elsewhere: `.venv/bin/playwright install chromium`"

GROUPS = {
    "stack": "stack drill secrets",
    "notifications": "notifications",
    "images": "images",
    "distribution": "distribution",
    "trained": (
        "train evaluate synthesize synthesize_files export run_report docs examples digits trainer networks data "
        "neighbours several_sources split_by_file normalisations published_training foreign quality cards hub trackers "
        "open_version"
    ),
    "s3": "s3 export_on_s3 open_version_on_s3 remote_cut remote_runs strays odd_filesystems security prune",
}
"""Test files that share slow fixtures (services, images, trained runs, S3). One worker runs a whole group."""


def group_of(test: str) -> str:
    """The group of a test, given its id or the path of its file."""
    stem = Path(test.partition("::")[0]).stem.removeprefix("test_")
    return next((group for group, stems in GROUPS.items() if stem in stems.split()), stem)


FAULTS_WITH_TORCH = ("test_damage", "test_disk", "test_kill", "test_together", "test_training")
"""Modules of `tests/faults` that import torch, as all of `tests/model` do."""


class SkippedModule(pytest.Module):
    """A test module that is reported as skipped, and not imported."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        pytest.skip(TORCH_MISSING, allow_module_level=True)


def pytest_configure() -> None:
    """Undo `nohup` and a shell's `&`: programs started by tests would inherit that these signals are ignored."""
    for number, default in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, default)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Skip modules that import torch if it is missing, as in a base install."""
    needs_torch = module_path.parent.name == "model" or module_path.stem in FAULTS_WITH_TORCH
    if needs_torch and not find_spec("torch"):
        return SkippedModule.from_parent(parent, path=module_path)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slow groups first, so that the workers finish together. Files keep their order within a group."""
    order = list(GROUPS)

    def rank(item: pytest.Item) -> int:
        group = group_of(item.path.name)
        return order.index(group) if group in order else len(order)

    items.sort(key=rank)


def pytest_collection_finish() -> None:
    """Exclude imported modules from later garbage collections, which took a seventh of the run time."""
    gc.collect()
    gc.freeze()


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each worker a group at a time (with `--dist loadgroup`; xdist's own groups do nothing with pytest 9.2)."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByGroup(config, log) if config.getvalue("dist") == "loadgroup" else None


@pytest.fixture(scope="session")
def unrelated_ca(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file of one CA that signed nothing. Every new client reads its trusted CAs, and one is read quickly."""
    path = tmp_path_factory.mktemp("unrelated_ca") / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(path))
    return str(path)


@pytest.fixture(scope="session")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both archives, with irregular members, and MD5SUMS; tests only read it."""
    folder = tmp_path_factory.mktemp("archives")
    write_phantom(folder, subjects=6, seed=3, shrink=SHRINK)
    return folder


def config_for(root: Path | str, source: Path | str, scratch: Path | None = None, **dataset: object) -> RefreshConfig:
    """The configuration of a refresh without registration, which is slow and has its own tests."""
    chosen = DatasetConfig.model_validate({"slices": SLICES, "registration": "none"} | dataset)
    return RefreshConfig(root=str(root), scratch=scratch, source=str(source), dataset=chosen, workers=2)


@pytest.fixture(scope="session")
def published(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PublishedVersion]:
    """A version refreshed from the phantom; tests only read it, or those that follow could fail by chance."""
    root = tmp_path_factory.mktemp("root")
    version = refresh(config_for(root, archives))
    before = times_of(root)
    yield version
    assert times_of(root) == before, "a test wrote to the root of `published`; it should use `refreshed`, a copy"


def times_of(root: Path) -> dict[Path, int]:
    """When each file and folder was changed."""
    return {path: path.stat().st_mtime_ns for path in root.rglob("*")}


@pytest.fixture
def refreshed(published: PublishedVersion, tmp_path: Path) -> PublishedVersion:
    """A copy of `published` in `tmp_path`, the same as `refresh(config_for(tmp_path, archives))` would make."""
    shutil.copytree(published.folder.parents[2], tmp_path, dirs_exist_ok=True)
    return replace(published, folder=tmp_path / published.folder.relative_to(published.folder.parents[2]))


@pytest.fixture(scope="session")
def every_split(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> PublishedVersion:
    """A version with subjects in every split; tests only read it."""
    return refresh(config_for(tmp_path_factory.mktemp("every_split"), archives, split=(0.4, 0.3, 0.3)))


@pytest.fixture(scope="session")
def torch() -> Any:
    """The module torch. Tests that use this fixture are skipped if torch is not installed."""
    return pytest.importorskip("torch", reason=TORCH_MISSING)


@pytest.fixture(scope="session")
def finished_run(torch: Any, every_split: PublishedVersion) -> Any:
    """A `model.run.Run` of 6 steps on `every_split` with samples, validation and evaluation; tests only read it."""
    from model.config import TrainConfig
    from model.jobs import evaluate_run, prepare_run, train_run

    settings = TRAINED | {"samples": 3}
    run = prepare_run(every_split.folder.parents[2], TrainConfig.model_validate(settings), "a")
    train_run(run)
    evaluate_run(run)
    return run


@pytest.fixture(scope="session")
def trained(torch: Any, published: PublishedVersion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the published version and a run `a` of 6 steps (`TRAINED`) on it; tests only read it."""
    from model.config import TrainConfig
    from model.jobs import prepare_run, train_run

    root = tmp_path_factory.mktemp("trained")
    (root / "datasets").symlink_to(published.folder.parents[1])
    train_run(prepare_run(root, TrainConfig.model_validate(TRAINED), "a"))
    return root


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium, for the tests of one module."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; pip install -e '.[test]'")
    with api.sync_playwright() as playwright:
        executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if not executable and not Path(playwright.chromium.executable_path).exists():
            pytest.skip(f"only a browser can show how a page behaves, and no Chromium was found; {INSTALL_CHROMIUM}")
        # The sandbox does not start as root; the browser opens only pages made by these tests.
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def prefect() -> Iterator[None]:
    """A Prefect server for one test module. Other modules need an environment without a server."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=300):  # on a busy machine
        yield


S3_SECRET = "hunter2-of-s3"  # must not appear in any output or file


@contextmanager
def s3_environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set the `AWS_...` variables of an S3-compatible server.

    s3fs caches its file systems by their arguments, not by the environment, so the cache is cleared.
    """
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        yield
    S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def s3() -> Iterator[None]:
    """A local S3-compatible server, to which the environment points."""
    from moto import backends
    from moto.server import ThreadedMotoServer

    services = tuple(backends.list_of_moto_modules())
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    values = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "anything",
        "AWS_SECRET_ACCESS_KEY": S3_SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch, s3_environment(values):
        patch.setattr(backends, "list_of_moto_modules", lambda: services)  # otherwise each request lists moto's folders
        yield
    server.stop()


def new_s3_root() -> str:
    """A prefix in a new bucket."""
    bucket = f"bucket-{uuid.uuid4().hex}"
    to_path(f"s3://{bucket}").mkdir()
    return f"s3://{bucket}/some/prefix"


@pytest.fixture
def s3_root(s3: None) -> str:
    return new_s3_root()


@dataclass(frozen=True)
class OnS3:
    """A refresh to S3: its configuration, the version it made, its log messages and the requests to the server."""

    config: RefreshConfig
    made: PublishedVersion
    log: list[str]
    requests: list[list[str]]  # method, URL and protocol of each


@contextmanager
def capture_logs(level: int = logging.INFO) -> Iterator[list[logging.LogRecord]]:
    """Collect the records that the project, its libraries and the S3 server log in the block."""
    records: list[logging.LogRecord] = []
    handler, root = logging.Handler(), logging.getLogger()
    handler.emit = records.append  # type: ignore[method-assign]
    previous = root.level
    root.addHandler(handler)
    root.setLevel(level)
    try:
        yield records
    finally:
        root.setLevel(previous)
        root.removeHandler(handler)


def requests_in(records: list[logging.LogRecord]) -> list[list[str]]:
    """Method, URL and protocol of each request that the S3 server logged."""
    return [r.getMessage().split('"')[1].split() for r in records if r.name == "werkzeug" and '"' in r.getMessage()]


@pytest.fixture(scope="session")
def on_s3(s3: None, archives: Path, tmp_path_factory: pytest.TempPathFactory) -> OnS3:
    """A refresh to S3 with the same result as `published`; tests only read it."""
    config = config_for(new_s3_root(), archives, tmp_path_factory.mktemp("scratch"))
    with capture_logs(logging.DEBUG) as records:
        made = refresh(config)
    return OnS3(config, made, [record.getMessage() for record in records], requests_in(records))
