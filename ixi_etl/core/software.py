"""Describe the software that made a version or a run. No byte of a version's hashed files depends on it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path

from ixi_etl import __version__

DISTRIBUTION = "ixi-etl"
COMMIT = "IXI_COMMIT"
"""Environment variable with the commit, for a container image, in which neither git nor pip knows it."""

TOP = Path(__file__).resolve().parents[2]
PACKAGES = ("ixi_etl", "model", "flows")
GIT_S = 5.0  # seconds to wait for git, whose folder may be on a slow share


def describe(libraries: Iterable[str] = ()) -> dict[str, str | None]:
    """Versions of this project and of `libraries`, its commit, a hash of its code, Python and platform.

    `commit` is None if unknown, and ends in `-dirty` if the checkout had changes. `code_sha256` is the same for equal
    code, however it was installed.
    """
    return (
        {DISTRIBUTION: __version__}
        | {name: metadata.version(name) for name in libraries}
        | {
            "commit": commit(),
            "code_sha256": code_sha256(),
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "platform": platform.platform(),
        }
    )


@cache
def commit() -> str | None:
    """The commit of this code, from its checkout, from the git URL that pip installed, or from `IXI_COMMIT`."""
    return _commit_of_checkout() or _commit_from_pip() or os.environ.get(COMMIT) or None


def _commit_of_checkout() -> str | None:
    if not (TOP / ".git").exists():  # never the commit of a repository that contains the installed package
        return None
    command = ["git", "-C", str(TOP), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    # GIT_DIR and others may point to another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        # The command contains no user input.
        done = subprocess.run(  # noqa: S603  # nosec B603
            command, capture_output=True, text=True, timeout=GIT_S, check=True, env=environment
        )
    except (OSError, subprocess.SubprocessError):  # git is missing, or does not trust the folder
        return None
    return done.stdout.strip() or None


def _commit_from_pip() -> str | None:
    """The commit in `direct_url.json` (PEP 610), which pip writes when it installs from a git URL."""
    try:
        text = metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
        return str(json.loads(text or "{}")["vcs_info"]["commit_id"])
    except (metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        return None


@cache
def code_sha256() -> str:
    """SHA-256 over the names and contents of all modules, and of all files in folders of templates."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((TOP / package).rglob("*")):
            if path.is_file() and (path.suffix == ".py" or path.parent.name == "templates"):
                digest.update(f"{path.relative_to(TOP).as_posix()}\0".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
