"""Install the project and all that it needs, with the versions and hashes of the lock files in this folder.

    .venv/bin/python requirements/install.py [base | train | test | tools]

Each set includes those before it. pip refuses a file whose SHA-256 is not in the lock. On a Python or a platform that
the lock files are not for, the last line says so.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SETS = ("base", "train", "test", "tools")
PYTHONS = ((3, 11), (3, 14))
"""The lowest and the highest version for which the locked packages have wheels."""
LOCKED = ("--require-hashes", "--no-deps", "--no-build-isolation")
"""Only what a lock file lists is installed, for builds too: setuptools is in the base set."""
NO_FILE = ("No matching distribution found", "ResolutionImpossible")
"""What pip says about one pinned package of which it finds no file that fits; the latter if it has constraints."""


def pip_install(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)


def installed_torch() -> str:
    """The version of torch that is installed, or empty text."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


def torch_file(version: str) -> Path:
    """The lock file of the build of torch that is installed, or else of the one that pip would choose by itself.

    `version` is that of the installed torch, or empty text. pip prefers 2.13.0+cpu to PyPI's 2.13.0 if its
    configuration names an index with CPU builds. But if a lock file has the hashes of both, it prefers the one whose
    index gives a hash, so each build has a file of its own.
    """
    locked = (FOLDER / "torch.txt").read_text().partition("\ntorch==")[2].split()[0]
    if version.partition("+")[0] != locked:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps", "--ignore-installed"]
        command += ["--report", "-", f"torch=={locked}"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        sys.stderr.write(done.stderr)
        if any(problem in done.stderr for problem in NO_FILE):
            sys.exit(
                f"pip finds no wheel of torch {locked} for {sysconfig.get_platform()}; PyPI has them for Linux (x86-64 "
                "and ARM), Windows (x86-64) and Macs with Apple silicon; elsewhere use the set base, without training"
            )
        if done.returncode:
            sys.exit(done.returncode)
        [chosen] = json.loads(done.stdout)["install"]
        version = chosen["metadata"]["version"]
    return FOLDER / ("torch-cpu.txt" if version.endswith("+cpu") else "torch.txt")


def check_python(version: Sequence[int]) -> None:
    """Exit with one line if the lock files are not for this version of Python."""
    lowest, highest = (".".join(map(str, supported)) for supported in PYTHONS)
    if not PYTHONS[0] <= tuple(version[:2]) <= PYTHONS[1]:
        sys.exit(
            f"the lock files are for Python {lowest} to {highest}, and this is {'.'.join(map(str, version[:3]))}; "
            f"remove .venv and run make with PYTHON=python{highest}"
        )


def main(arguments: list[str], python: Sequence[int] = sys.version_info) -> None:
    [name] = arguments or ["base"]
    if name not in SETS:
        sys.exit(f"{name!r} is not a set of packages; choose one of {', '.join(SETS)}")
    check_python(python)
    pip_install(*LOCKED, "--only-binary=:all:", "--requirement", FOLDER / "base.txt")
    if others := [FOLDER / f"{other}.txt" for other in SETS[1 : SETS.index(name) + 1]]:
        pip_install(*LOCKED, *(f"--requirement={file}" for file in (torch_file(installed_torch()), *others)))
    pip_install("--no-deps", "--no-build-isolation", "--editable", FOLDER.parent)


if __name__ == "__main__":
    main(sys.argv[1:])
