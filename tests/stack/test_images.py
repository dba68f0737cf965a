"""Both images of the Dockerfile, built by `.ci/images`, and what runs in them: `make images`.

The images and their build logs stay in `build/images`. A later run builds what has changed. There is no Docker: the
commands run in a chroot, as the image's user, with the network of this machine. Processes of an image could write where
its user may; the tests check that they write to /data, /prefect and /tmp alone, as compose makes the rest read-only.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from services import free_port, skip_unless_mounts

from ixi_etl import __version__

TOP = Path(__file__).parents[2]
FOLDER = TOP / "build" / "images"
COMMIT = "0" * 39 + "1"
NEEDED = ("buildah", "mmdebstrap")
pytestmark = pytest.mark.images

SERVER = """
import subprocess, sys, time, urllib.request
port = sys.argv[1]
server = subprocess.Popen(["prefect", "server", "start", "--host", "127.0.0.1", "--port", port])
try:
    while server.poll() is None:
        try:
            print(urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health").read().decode())
            break
        except OSError:
            time.sleep(0.2)
finally:
    server.terminate()
    server.wait()
"""


def buildah(*arguments: str | Path) -> str:
    command = ["buildah", "--root", FOLDER / "storage", "--runroot", FOLDER / "run", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Container:
    """A container of an image, with a folder of this machine as /data."""

    def __init__(self, target: str, data: Path) -> None:
        self.name = buildah("from", "--pull-never", f"ixi-etl:{target}").strip()
        self.root = Path(buildah("mount", self.name).strip())
        self.data = data
        self.started = data.parent / f"{target}.started"
        self.started.touch()

    def run(self, *command: str, **environment: str) -> str:
        given = [f"--env={name}={value}" for name, value in environment.items()]
        volume = f"--volume={self.data}:/data"
        return buildah("run", "--isolation", "chroot", *given, volume, self.name, "--", *command)

    def written(self) -> set[str]:
        """What the image's user has written outside of the folders that are writable under compose."""
        command = ["find", self.root, "-xdev", "-uid", "1000", "-newer", self.started, "-printf", "/%P\n"]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")
        return {path for path in found if path and not path.startswith(("/data", "/prefect", "/tmp"))}

    def files(self) -> Iterator[Path]:
        """All files of the image that are not the base image's."""
        for folder in ("app", "data", "home", "prefect", "root", "tmp", "usr/local"):
            yield from (path.relative_to(self.root) for path in (self.root / folder).rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def images() -> None:
    if os.geteuid() or not all(map(shutil.which, NEEDED)):
        pytest.skip(f"needs root, {' and '.join(NEEDED)}")
    skip_unless_mounts()
    subprocess.run([TOP / ".ci/images", FOLDER], env=os.environ | {"IXI_COMMIT": COMMIT}, check=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "data"
    folder.mkdir()
    os.chown(folder, 1000, 1000)
    return folder


def container(target: str, data: Path) -> Iterator[Container]:
    made = Container(target, data)
    yield made
    buildah("rm", made.name)


@pytest.fixture(scope="module")
def cpu(images: None, data: Path) -> Iterator[Container]:
    yield from container("cpu", data)


@pytest.fixture(scope="module")
def gpu(images: None, data: Path) -> Iterator[Container]:
    yield from container("gpu", data)


def test_commands_of_the_image_run_as_its_user(cpu: Container) -> None:
    assert cpu.run("id", "-u").strip() == "1000"
    assert cpu.run("ixi-etl", "--version").strip().endswith(__version__)
    assert "3.9.1" in cpu.run("prefect", "version")
    assert cpu.run("python", "-c", "from importlib.util import find_spec; print(find_spec('torch'))").strip() == "None"
    assert cpu.run("python", "-m", "pip", "check").strip() == "No broken requirements found."
    assert not cpu.written()


def test_server_of_the_image_answers(cpu: Container) -> None:
    assert cpu.run("python", "-c", SERVER, str(free_port()), PREFECT_HOME="/prefect").splitlines()[-1] == "true"
    assert not cpu.written()


def test_refresh_and_training_write_to_the_volume_alone(cpu: Container, gpu: Container, data: Path) -> None:
    cpu.run("ixi-etl", "simulate", "/data/archives", "--subjects", "6", "--quiet")
    source = ("--root", "/data/ixi", "--source", "/data/archives", "--split-seed", "6")
    cpu.run("ixi-etl", "refresh", *source, "--json", "--quiet")
    assert not cpu.written()
    gpu.run("ixi-etl", "train", "--root", "/data/ixi", "--preset", "smoke", "--steps", "3", "--json", "--quiet")
    assert not gpu.written()
    [software] = data.glob("ixi/datasets/*/*/software.json")
    assert COMMIT in software.read_text()
    [run] = data.glob("ixi/runs/*")
    assert (run / "generator.safetensors").exists()
    assert (run / "report.html").exists()


def test_image_has_the_code_and_nothing_else_of_a_checkout(cpu: Container) -> None:
    app = {path.relative_to("app") for path in cpu.files() if path.parts[0] == "app"}
    listed = [line[1:] for line in (TOP / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert {path.parts[0] for path in app} - {"ixi_etl.egg-info"} == set(listed)
    tracked = subprocess.run(["git", "ls-files", *listed], cwd=TOP, capture_output=True, text=True, check=True).stdout
    code = {path for path in app if path.suffix != ".pyc" and path.parts[0] != "ixi_etl.egg-info"}
    assert code == set(map(Path, tracked.split()))


def test_image_has_no_caches_and_no_settings_of_this_machine(gpu: Container) -> None:
    unwanted = {".cache", ".git", ".env", ".netrc", ".pytest_cache", ".ruff_cache", ".mypy_cache"}
    assert not [path for path in gpu.files() if unwanted & set(path.parts)]
    pip = gpu.root / "etc/pip.conf"
    assert not pip.exists() or not pip.read_text()  # an empty file where the settings were mounted
    [described] = json.loads("[" + buildah("inspect", "--type", "image", "ixi-etl:gpu") + "]")
    config = described["OCIv1"]["config"]
    assert config["User"] == "ixi"
    names = {line.partition("=")[0] for line in config["Env"]}
    assert names == {
        *("PATH", "LANG", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "MPLCONFIGDIR"),
        *("PREFECT_HOME", "PREFECT_PLUGINS_ENABLED", "IXI_COMMIT"),
    }
