"""The wheel and the source distribution are complete, and run outside the checkout.

The environment is new and has the libraries of the tests, through a .pth file, but not their installation of this
project.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from ixi_etl import __version__

pytestmark = pytest.mark.stack

TOP = Path(__file__).parents[2]
PACKAGES = ("flows", "ixi_etl", "model")
NOT_BUILT = (".git*", ".venv", ".*_cache", "__pycache__", "*.egg-info", "build", "dist", "site")
NOT_BUILT += ("demo", "protocols", "ixi-data", "real-report*")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    checkout = folder / "checkout"
    shutil.copytree(TOP, checkout, ignore=shutil.ignore_patterns(*NOT_BUILT))
    [wanted] = tomllib.loads((TOP / "pyproject.toml").read_text())["build-system"]["requires"]
    is_here = wanted == f"setuptools=={metadata.version('setuptools')}"  # else it is installed for the build
    isolation = ["--no-isolation"] if is_here else []
    subprocess.run([sys.executable, "-m", "build", *isolation, "--outdir", folder, checkout], check=True)
    shutil.rmtree(checkout)
    return folder


@pytest.fixture(scope="module")
def python(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    [packages] = folder.glob("lib/python*/site-packages")
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "libraries.pth").write_text("\n".join(libraries) + "\n")
    [wheel] = dist.glob("*.whl")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True)
    return python


def output_of(*command: str | Path, folder: Path) -> str:
    """What the command prints, with an empty home folder and no settings of this process."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_of(folder: Path) -> set[str]:
    """The files of the three packages, below `folder`."""
    paths = (path for package in PACKAGES for path in (folder / package).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in paths if path.suffix not in (".pyc", ".pyo")}


def test_wheel_has_every_file_of_the_packages_and_no_other(dist: Path) -> None:
    [wheel] = dist.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == files_of(TOP)
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert {"ixi_etl/templates/dataset.html", "model/templates/run.html", "flows/presets.py"} <= names


def test_source_distribution_has_the_tests_the_website_and_the_deployments(dist: Path) -> None:
    [archive] = dist.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    folders = ("benchmarks", "docs", "examples", "tests", "website")
    wanted = {path for folder in folders for path in (TOP / folder).rglob("*") if path.is_file()}
    wanted |= {path for path in TOP.iterdir() if path.suffix in (".md", ".toml", ".yaml", ".yml", ".cff", ".txt")}
    wanted |= {TOP / "LICENSE", TOP / "Makefile", TOP / "Dockerfile", TOP / ".ci" / "run"}
    assert {path.relative_to(TOP).as_posix() for path in wanted if path.suffix != ".pyc"} <= names


def test_installed_package_is_not_the_checkout(python: Path, tmp_path: Path) -> None:
    assert output_of(python.parent / "ixi-etl", "--version", folder=tmp_path) == f"ixi-etl {__version__}\n"
    code = f"from importlib import metadata; print(metadata.version('ixi-etl')); import {', '.join(PACKAGES)}\n"
    code += f"for package in ({', '.join(PACKAGES)}): print(package.__file__)"
    version, *files = output_of(python, "-c", code, folder=tmp_path).splitlines()
    assert version == __version__
    assert all(Path(file).is_relative_to(python.parent.parent) for file in files)


def test_a_refresh_and_a_training_run_without_the_checkout(python: Path, tmp_path: Path) -> None:
    ixi_etl = python.parent / "ixi-etl"
    output_of(ixi_etl, "simulate", "archives", "--subjects", "6", "--quiet", folder=tmp_path)
    output_of(ixi_etl, "refresh", "--source", "archives", "--split-seed", "6", "--quiet", folder=tmp_path)
    output_of(ixi_etl, "train", "--preset", "smoke", "--steps", "3", "--quiet", folder=tmp_path)
    pages = [page.read_text() for page in tmp_path.glob("ixi-data/**/report.html")]
    assert len(pages) == 2  # of the version, and of the run
    assert all("<style>" in page and str(TOP) not in page for page in pages)


def test_type_checkers_see_the_types(python: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from flows.presets import Preset\n"
        "from ixi_etl.core.option import Option\n"
        "from model.source_planes import Scan\n"
        'preset: Preset = "unknown"\n'
        "flag: int = Option().flag\n"
        "def read(scan: Scan) -> None:\n"
        "    affine: str = scan.affine\n"
    )
    check = [python, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", tmp_path / "cache", "mine.py"]
    done = subprocess.run(check, cwd=tmp_path, capture_output=True, text=True)
    errors = [line.partition(" error: ")[2] for line in done.stdout.splitlines() if " error: " in line]
    assert len(errors) == 3, done.stdout + done.stderr
    assert all(error.startswith("Incompatible types in assignment") for error in errors), done.stdout
