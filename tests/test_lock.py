"""The lock files in requirements/, which `make` and the images install from, with hashes."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TOP = Path(__file__).parent.parent
FOLDER = TOP / "requirements"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LOCK, INSTALL = script("lock"), script("install")
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
FILES = {path.stem: path.read_text() for path in FOLDER.glob("*.txt")}
PACKAGES = {name: LOCK.locked_packages(text) for name, text in FILES.items()}


def pins(*files: str) -> dict[str, Requirement]:
    """The requirements of these files that apply to this platform, by name."""
    blocks = [block for file in files for block in PACKAGES[file].values()]
    pinned = [Requirement(block.splitlines()[0].removesuffix("\\")) for block in blocks]
    return {pin.name: pin for pin in pinned if pin.marker is None or pin.marker.evaluate()}


def version_of(pin: Requirement) -> str:
    [specifier] = pin.specifier
    assert specifier.operator == "=="
    return str(specifier.version)


def test_constraints_are_the_locked_versions() -> None:
    assert (TOP / "constraints.txt").read_text() == LOCK.constraints_of([FILES[name] for name in LOCK.FILES])


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_pin_has_hashes_and_no_file_names_an_index(name: str) -> None:
    text = FILES[name]
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert lines == "".join(PACKAGES[name].values()).splitlines()  # nothing else, such as options of pip
    assert "://" not in text
    for block in PACKAGES[name].values():
        head, *hashes = block.replace(" \\\n", "\n").splitlines()
        assert re.match(r"[a-z0-9-]+==[\w.+]+( ; .+)?$", head)
        assert hashes
        assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}", line) for line in hashes)


def test_lock_is_for_every_python_that_the_project_allows() -> None:
    assert PROJECT["project"]["requires-python"] == f">={LOCK.LOWEST_PYTHON}"
    lowest, (major, minor) = INSTALL.PYTHONS
    assert ".".join(map(str, lowest)) == LOCK.LOWEST_PYTHON
    assert f"python_full_version < '{major}.{minor + 1}'" in PACKAGES["torch"]["cuda-bindings"]  # torch's own limit
    assert "python_full_version < '3.11.3'" in PACKAGES["base"]["async-timeout"]  # redis needs it on Debian 12


def test_no_package_is_locked_twice() -> None:
    names = [name for file in LOCK.FILES for name in PACKAGES[file]]
    assert len(names) == len(set(names))
    assert set(FILES) == {*LOCK.FILES, "torch-cpu"}
    assert set(INSTALL.SETS) | {"torch"} == set(LOCK.FILES)


def test_both_files_of_torch_have_the_pinned_version() -> None:
    assert list(PACKAGES["torch-cpu"]) == ["torch"]
    version = version_of(pins("torch")["torch"])
    assert version_of(pins("torch-cpu")["torch"]) == f"{version}+cpu"
    assert f"torch=={version}" in EXTRAS["train"]


@pytest.mark.parametrize("name", INSTALL.SETS)
def test_set_has_what_its_extras_ask_for(name: str) -> None:
    extras = {"base": [], "train": ["train"], "test": [e for e in EXTRAS if e not in LOCK.TOOLS], "tools": list(EXTRAS)}
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    wanted += [line for extra in extras[name] for line in EXTRAS[extra]]
    files = INSTALL.SETS[: INSTALL.SETS.index(name) + 1]
    locked = pins(*files, *(["torch"] if name != "base" else []))
    for line in wanted:
        requirement = Requirement(line)
        assert requirement.specifier.contains(version_of(locked[canonicalize_name(requirement.name)])), line


@pytest.mark.parametrize("name", ["base", "train", "test"])
def test_set_has_every_dependency_of_its_packages(name: str) -> None:
    """pip installs nothing else: `--no-deps`. Checked for this platform, with the metadata of what is installed."""
    build = "torch-cpu" if metadata.version("torch").endswith("+cpu") else "torch"
    files = INSTALL.SETS[: INSTALL.SETS.index(name) + 1]
    locked = pins(*files, *([build] if name != "base" else []))
    missing = set()
    for package in locked:
        for line in metadata.requires(package) or ():
            needed = Requirement(line)
            applies = needed.marker is None or needed.marker.evaluate({**default_environment(), "extra": ""})
            if applies and canonicalize_name(needed.name) not in locked:
                missing.add(f"{package}: {line}")
    assert not missing


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """The smallest wheel."""
    path = tmp_path / "small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("small.py", "")
        archive.writestr("small-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: small\nVersion: 1.0\n")
        archive.writestr("small-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("small-1.0.dist-info/RECORD", "")
    return path


def test_wrong_hash_stops_the_installation(wheel: Path, tmp_path: Path) -> None:
    lock, target = tmp_path / "lock.txt", tmp_path / "target"
    command = [sys.executable, "-m", "pip", "install", *INSTALL.LOCKED, "--requirement", lock, "--target", target]
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    lock.write_text(f"small @ {wheel.as_uri()} --hash=sha256:{digest[::-1]}\n")
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in refused.stderr
    assert not target.exists()
    lock.write_text(f"small @ {wheel.as_uri()} --hash=sha256:{digest}\n")
    subprocess.run(command, check=True, capture_output=True)
    assert (target / "small.py").exists()


def test_install_names_its_sets() -> None:
    done = subprocess.run([sys.executable, FOLDER / "install.py", "all"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "'all' is not a set of packages; choose one of base, train, test, tools\n"


@pytest.mark.parametrize("version", [(3, 10, 12), (3, 15, 0)])
def test_install_names_the_pythons_that_the_lock_files_are_for(version: tuple[int, ...]) -> None:
    with pytest.raises(SystemExit) as ended:
        INSTALL.main(["base"], version)
    shown = ".".join(map(str, version))
    assert ended.value.code == (
        f"the lock files are for Python 3.11 to 3.14, and this is {shown}; "
        "remove .venv and run make with PYTHON=python3.14"
    )


def test_install_says_that_torch_has_no_wheel_for_the_platform(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))  # an index without files of torch
    with pytest.raises(SystemExit) as ended:
        INSTALL.torch_file("")
    assert re.match(r"pip finds no wheel of torch 2\.\S+ for \S+; .* use the set base", str(ended.value.code))
    assert "ERROR: " in capfd.readouterr().err
