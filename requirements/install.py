"""Install the project and all that it needs, with the versions and hashes of the lock files in this folder.

    .venv/bin/python requirements/install.py [base | train | test | tools]

Each set includes those before it. pip refuses a file whose SHA-256 is not in the lock.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SETS = ("base", "train", "test", "tools")
LOCKED = ("--require-hashes", "--no-deps", "--no-build-isolation")
"""Only what a lock file lists is installed, for builds too: setuptools is in the base set."""


def pip_install(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)


def torch_file() -> Path:
    """The lock file of the build of torch that is installed, or else of the one that pip would choose by itself.

    pip prefers 2.13.0+cpu to PyPI's 2.13.0 if its configuration names an index with CPU builds. But if a lock file has
    the hashes of both, it prefers the one whose index gives a hash, so each build has a file of its own.
    """
    locked = (FOLDER / "torch.txt").read_text().partition("\ntorch==")[2].split()[0]
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        version = ""
    if version.partition("+")[0] != locked:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps", "--ignore-installed"]
        command += ["--report", "-", f"torch=={locked}"]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.returncode)
        [chosen] = json.loads(done.stdout)["install"]
        version = chosen["metadata"]["version"]
    return FOLDER / ("torch-cpu.txt" if version.endswith("+cpu") else "torch.txt")


def main(arguments: list[str]) -> None:
    [name] = arguments or ["base"]
    if name not in SETS:
        sys.exit(f"{name!r} is not a set of packages; choose one of {', '.join(SETS)}")
    pip_install(*LOCKED, "--only-binary=:all:", "--requirement", FOLDER / "base.txt")
    if others := [FOLDER / f"{other}.txt" for other in SETS[1 : SETS.index(name) + 1]]:
        pip_install(*LOCKED, *(f"--requirement={file}" for file in (torch_file(), *others)))
    pip_install("--no-deps", "--no-build-isolation", "--editable", FOLDER.parent)


if __name__ == "__main__":
    main(sys.argv[1:])
