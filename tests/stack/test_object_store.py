"""A root on S3 without a shared folder: Dask workers that see none of the refresh's files, and two machines.

A worker runs in a mount namespace of its own, in which the folder of the refresh is empty (`unshare`, of Linux). Tests
with such workers are skipped where that is refused.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from conftest import config_for, s3_environment
from services import IN_NAMESPACE, PROJECT, Stack, free_port, responds, skip_unless_mounts, wait_for

from ixi_etl.config import RefreshConfig
from ixi_etl.core.lease import LEASE, lock_shared
from ixi_etl.core.progress import Progress, no_progress
from ixi_etl.core.storage import file_sizes, read_bytes, to_path, upload_folder
from ixi_etl.dataset import metadata, verify, versions
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.errors import IxiError, LockedError
from ixi_etl.recipes.ixi import refresh
from ixi_etl.testing.phantom import write_phantom

pytestmark = pytest.mark.stack

BUCKET = "ixi"
SOURCE = f"s3://{BUCKET}/archives"
WORKERS = ("worker-1", "worker-2")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """S3. The refresh works in the folder `refresh`."""
    with Stack(tmp_path_factory.mktemp("stack"), {"IXI_ROOT": f"s3://{BUCKET}/root"}) as stack:
        (stack.folder / "refresh").mkdir()
        stack.start_s3(BUCKET)
        with s3_environment({name: value for name, value in stack.values.items() if name.startswith("AWS_")}):
            yield stack


@pytest.fixture(scope="module")
def cluster(stack: Stack) -> Stack:
    """The same, with a Dask scheduler and two workers, which cannot see the folder `refresh`."""
    skip_unless_mounts()
    stack.start("dask-scheduler")
    for name in WORKERS:
        start_worker(stack, name)
    return stack


def start_worker(stack: Stack, name: str, changes: Mapping[str, str | None] = {}) -> None:
    """Start a worker in a folder of its own; `changes` are to its environment, None removes a variable."""
    home = stack.folder / name
    home.mkdir(exist_ok=True)
    environment = {n: v for n, v in stack.values.items() if n.startswith("AWS_")} | {"PATH": os.environ["PATH"]}
    environment |= {"HOME": str(home), "TMPDIR": str(home), "PYTHONPATH": str(PROJECT)}
    environment |= {n: v for n, v in changes.items() if v is not None}
    hide = [*IN_NAMESPACE, "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"']
    worker = [sys.executable, "-m", "dask", "worker", stack.localize("tcp://dask-scheduler:8786")]
    options = ["--no-nanny", "--nthreads", "1", "--no-dashboard", "--local-directory", str(home)]
    command = [*hide, str(stack.folder / "refresh"), *worker, *options]
    stack.spawn(name, command, {n: v for n, v in environment.items() if n not in changes or changes[n]}, cwd=home)


@pytest.fixture(scope="module")
def archives_folder(stack: Stack) -> Path:
    """Archives of this machine, which are on S3, too."""
    folder = stack.folder / "refresh/archives"
    write_phantom(folder, subjects=8, seed=3, shrink=4)
    upload_folder(folder, to_path(SOURCE), last="MD5SUMS", progress=no_progress)
    return folder


@pytest.fixture(scope="module")
def local_version(archives_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PublishedVersion:
    """The version of a refresh on threads, with registration, so that the cut takes long enough to be interrupted."""
    return refresh(config_for(tmp_path_factory.mktemp("local"), archives_folder, registration="rigid"))


def configure(stack: Stack, name: str, source: str | Path = SOURCE, root: str | None = None) -> RefreshConfig:
    """A refresh on the cluster into a root of this name, with a scratch folder of this name."""
    scratch = stack.folder / "refresh" / name
    config = config_for(root or f"s3://{BUCKET}/{name}", source, scratch, registration="rigid")
    return config.model_copy(update={"dask": stack.localize("tcp://dask-scheduler:8786")})


def assert_same_version(config: RefreshConfig, local_version: PublishedVersion) -> None:
    """The latest version has the same files as the local one, verifies, and nothing else is left in the root."""
    data_root = config.data_root
    assert versions.resolve_version(data_root) == local_version.version
    folder = data_root.version(local_version.version)
    assert metadata.read_metadata(folder) == metadata.read_metadata(local_version.folder)
    assert verify.verify(folder, deep=True) == []
    assert {path.name for path in data_root.datasets.iterdir()} == {local_version.version, metadata.POINTER}
    assert {path.name for path in to_path(config.root).iterdir()} == {"datasets", LEASE}
    assert not data_root.unfinished.exists()


def staged(config: RefreshConfig) -> set[str]:
    """The names of the files that workers have put on S3."""
    assert config.data_root.remote_unfinished
    return {name.rpartition("/")[2] for name in file_sizes(config.data_root.remote_unfinished)}


def command_of(config: RefreshConfig) -> list[str]:
    """The command of a refresh, without Dask if the configuration has none."""
    options = {"--root": config.root, "--scratch": config.scratch, "--source": config.source, "--dask": config.dask}
    options |= {"--slices": config.dataset.slices}
    given = [str(part) for option, value in options.items() if value is not None for part in (option, value)]
    return [sys.executable, "-m", "ixi_etl", "refresh", "--workers", "1", *given]


# -- workers that share no folder -------------------------------------------------------------------------------------


def test_workers_in_separate_folders_give_the_same_version(cluster: Stack, local_version: PublishedVersion) -> None:
    config, seen = configure(cluster, "separate"), set[str]()

    def progress(stage: str, done: int, total: int, unit: str) -> None:
        if stage == "hash files" and not seen:
            seen.update(staged(config))

    assert refresh(config, progress).is_new
    assert_same_version(config, local_version)
    used = metadata.read_manifest(local_version.folder).query("status == 'used'")["subject_id"]
    assert {f"{subject}{ending}" for subject in used for ending in (".t1.shard", ".t2.shard", ".jpg", ".json")} <= seen
    assert not [path for name in WORKERS for path in (cluster.folder / name).rglob("ixi-cut-*")]
    assert not refresh(config).is_new


def killing(stack: Stack, name: str) -> Progress:
    """Kill a worker as soon as a first subject is cut."""

    def progress(stage: str, done: int, total: int, unit: str) -> None:
        if stage == "cut" and name in stack.running:
            stack.kill(name)

    return progress


def test_a_killed_worker_costs_time_only(cluster: Stack, local_version: PublishedVersion) -> None:
    config = configure(cluster, "worker-killed")
    assert refresh(config, killing(cluster, "worker-2")).is_new
    assert_same_version(config, local_version)
    start_worker(cluster, "worker-2")


def test_a_killed_refresh_finds_what_workers_finished(cluster: Stack, local_version: PublishedVersion) -> None:
    config = configure(cluster, "refresh-killed")
    cluster.spawn("refresh", command_of(config), os.environ)
    finished = wait_for(
        "a first subject on S3", lambda: {name for name in staged(config) if name.endswith(".json")}, every_s=0.02
    )
    cluster.kill("refresh")
    assert len(finished) < 8
    refresh(config)  # at once: the lock was that of a process of this machine
    assert_same_version(config, local_version)
    uploads = re.findall(r'"PUT \S+/refresh-killed/\S+/(\S+\.json) ', (cluster.folder / "s3.log").read_text())
    assert {name: uploads.count(name) for name in finished} == dict.fromkeys(finished, 1)


def test_workers_that_cannot_read_or_return_anything_say_so(cluster: Stack, archives_folder: Path) -> None:
    host, scratch = re.escape(socket.gethostname()), cluster.folder / "refresh"
    local = configure(cluster, "local", root=str(scratch / "local"))
    with pytest.raises(
        IxiError, match=rf"the Dask worker {host} does not see the folder {scratch}/local/\S+ of the re"
    ):
        refresh(local)
    hidden = configure(cluster, "hidden", source=archives_folder)
    with pytest.raises(
        IxiError, match=rf"the Dask worker {host} does not see {archives_folder}/IXI-T\d\.tar; .*--source"
    ):
        refresh(hidden)


def test_a_worker_that_cannot_reach_the_bucket_says_so(cluster: Stack, archives_folder: Path) -> None:
    for name in WORKERS:
        cluster.stop(name)
    port = free_port()
    cluster.spawn("other-s3", [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port], os.environ)
    empty = f"http://127.0.0.1:{port}"  # a server without the bucket
    wait_for("another S3", lambda: responds("GET", empty))
    for changes, message in (
        ({"AWS_ACCESS_KEY_ID": None, "AWS_EC2_METADATA_DISABLED": "true"}, "Unable to locate credentials"),
        ({"AWS_ENDPOINT_URL": empty}, "does not exist"),
    ):
        start_worker(cluster, "wrong", changes)
        config = configure(cluster, "wrong")
        expected = rf"the Dask worker \S+: cannot reach the bucket ixi of s3://.*{message}.*AWS_ENDPOINT_URL"
        with pytest.raises(IxiError, match=expected) as raised:
            refresh(config)
        assert "\n" not in str(raised.value)
        assert versions.published_versions(config.data_root) == []
        cluster.stop("wrong")


# -- two machines -----------------------------------------------------------------------------------------------------


def test_of_two_machines_one_refreshes(stack: Stack, local_version: PublishedVersion) -> None:
    first, second = (
        configure(stack, name, root=f"s3://{BUCKET}/two").model_copy(update={"dask": None}) for name in ("a", "b")
    )
    stack.spawn("first", command_of(first), os.environ)
    process = stack.running["first"]
    lease = to_path(first.root) / LEASE
    wait_for("the first machine's lock", lease.exists, every_s=0.02)
    process.send_signal(signal.SIGSTOP)  # so that it does not finish meanwhile
    done = subprocess.run(command_of(second), capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 4, done.stderr
    holder = f"{first.root} is in use by process {process.pid} on {socket.gethostname()} since 20"
    [line] = [line for line in done.stderr.splitlines() if holder in line]
    assert re.search(r"if that was killed, its lock expires at 20\S+; wait, or choose another --root$", line)
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    del stack.running["first"]
    assert json.loads(lease.read_bytes())["released"]
    assert refresh(second).is_new
    assert_same_version(second, local_version)


def test_the_lock_of_a_machine_that_died_expires(stack: Stack, tmp_path: Path) -> None:
    root = f"s3://{BUCKET}/died"
    code = (
        "import sys\nfrom pathlib import Path\nfrom ixi_etl.core.lease import LeaseTimes, lock_shared\n"
        "with lock_shared(Path(sys.argv[1]), sys.argv[2], times=LeaseTimes(lasts_s=1, renew_s=0.2)):\n input()"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a"), root], stdin=subprocess.PIPE) as child:
        lease = to_path(root) / LEASE
        wait_for("a renewal", lambda: lease.exists() and json.loads(read_bytes(lease))["renewals"] > 1)
        child.kill()

    def lock() -> bool:
        try:
            with lock_shared(tmp_path / "b", root):
                return True
        except LockedError as error:
            assert f"process {child.pid} on" in str(error)
            return False

    assert not lock()
    wait_for("the end of the lease", lock)
