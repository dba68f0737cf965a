"""Write the lock files in this folder and constraints.txt from pyproject.toml: `make lock`.

Versions that are locked already stay, unless they no longer fit; `make lock UPGRADE=name` takes the newest version of
one package, `UPGRADE=all` of all packages. The files have the hashes of all files of a release, so that they serve
every platform.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PROJECT = FOLDER.parent / "pyproject.toml"
CONSTRAINTS = FOLDER.parent / "constraints.txt"
UV = "uv==0.13.9"
LOWEST_PYTHON = "3.11"
LOWEST_PYTHON_OF_DOCS = "3.11.5"  # pymdown-extensions needs it

FILES = ("base", "train", "torch", "test", "tools")
TOOLS = ("audit", "docs")
"""The extras that only `tools.txt` has."""
TORCH = re.compile(r"torch$|triton$|nvidia-|cuda-")
"""torch, and what only PyPI's build for Linux needs. For the CPU build, `install.py` takes torch-cpu.txt instead."""

HEAD = "# Written by `make lock`; do not edit. {}\n"
CONTENTS = {
    "base": "What the pipeline needs, without training.",
    "train": "What training needs besides base.txt and torch.txt or torch-cpu.txt.",
    "torch": "torch as on PyPI, and what only its build for Linux needs.",
    "test": "What the tests, the benchmarks and the optional extras need besides train.txt.",
    "tools": "What `make docs` and `make audit` need besides test.txt.",
}


def locked_packages(text: str) -> dict[str, str]:
    """The block of lines of each package in a lock file, by the package's normalised name."""
    blocks = re.findall(r"^[a-z0-9].*(?:\n    --hash=.*)*\n", text, re.MULTILINE)
    return {block.partition("==")[0]: block for block in blocks}


def constraints_of(locks: Sequence[str]) -> str:
    """The contents of constraints.txt: every version in these lock files, without hashes."""
    pins = [
        block.splitlines()[0].removesuffix("\\").rstrip() for lock in locks for block in locked_packages(lock).values()
    ]
    return (
        HEAD.format('Every locked version: pip install -c constraints.txt -e ".[hub]"') + "\n".join(sorted(pins)) + "\n"
    )


class Compiler:
    """`uv pip compile` in an environment of its own."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        subprocess.run([folder / "venv/bin/pip", "install", "--quiet", UV], check=True)
        self.uv = folder / "venv/bin/uv"
        [self.setuptools] = tomllib.loads(PROJECT.read_text())["build-system"]["requires"]

    def compile(self, *options: str | Path, python: str = LOWEST_PYTHON) -> str:
        command = [self.uv, "pip", "compile", PROJECT, "-", "--universal", "--python-version", python]
        command += ["--no-header", "--no-annotate", "--no-emit-package", "pip", "--quiet", *options]
        # The project itself is built without isolation, so the lock has its setuptools.
        done = subprocess.run(command, input=self.setuptools + "\n", text=True, stdout=subprocess.PIPE, check=False)
        if done.returncode:
            sys.exit(done.returncode)
        return done.stdout


def split_by_set(compiler: Compiler, extras: Sequence[str], lock: Path, docs: Path) -> dict[str, str]:
    """The packages of both lock files, by the file that they go to: the first whose extras need them."""
    of_set = {"base": (), "train": ("train",), "test": tuple(name for name in extras if name not in TOOLS)}
    first = {}
    for name, chosen in reversed(of_set.items()):
        needed = compiler.compile("--constraint", lock, *(f"--extra={extra}" for extra in chosen))
        first |= dict.fromkeys(locked_packages(needed), name)
    files = dict.fromkeys(FILES, "")
    # A package of both has the markers for the lower Python: those of the other may leave out what 3.11.0 needs.
    packages = locked_packages(docs.read_text()) | locked_packages(lock.read_text())
    for package, block in sorted(packages.items()):
        name = "torch" if TORCH.match(package) else first.get(package, "tools")
        files[name] += block
    return files


def main(upgrade: Sequence[str]) -> None:
    extras = list(tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"])
    options = ["--generate-hashes", *(f"--upgrade-package={name}" for name in upgrade if name != "all")]
    options += ["--upgrade"] if "all" in upgrade else []
    with tempfile.TemporaryDirectory() as folder:
        compiler = Compiler(Path(folder))
        lock, docs = Path(folder) / "lock.txt", Path(folder) / "docs.txt"
        for file in (lock, docs):
            file.write_text(CONSTRAINTS.read_text())  # uv keeps the versions of the file that it replaces
        compiler.compile(*options, *(f"--extra={extra}" for extra in extras if extra != "docs"), "--output-file", lock)
        pinned = ("--constraint", lock, "--output-file", docs)
        compiler.compile(*options, "--all-extras", *pinned, python=LOWEST_PYTHON_OF_DOCS)
        files = split_by_set(compiler, extras, lock, docs)
    for name, packages in files.items():
        (FOLDER / f"{name}.txt").write_text(HEAD.format(CONTENTS[name]) + packages)
    CONSTRAINTS.write_text(constraints_of(list(files.values())))
    version = locked_packages(files["torch"])["torch"].split()[0]
    if f"\n{version}+cpu " not in (FOLDER / "torch-cpu.txt").read_text():
        sys.exit(f"torch-cpu.txt is not of {version}: write the hashes of PyTorch's CPU builds into it")


if __name__ == "__main__":
    main(sys.argv[1:])
