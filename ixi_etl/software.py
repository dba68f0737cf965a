"""Which code this is, on what: for the records of versions and runs. It decides no byte of a version's hashed files."""

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

DISTRIBUTION = "ixi-etl"
COMMIT = "IXI_COMMIT"
"""Environment variable that names the commit where neither git nor pip knows it, as in an image."""

TOP = Path(__file__).resolve().parent.parent
PACKAGES = ("ixi_etl", "model", "flows")
GIT_S = 5.0  # seconds to wait for git, whose folder may be on a slow share


def describe(libraries: Iterable[str] = ()) -> dict[str, str | None]:
    """Versions of this project and of `libraries`, its commit, a hash of its code, Python and platform.

    `commit` is None where it is unknown, and ends in `-dirty` where the checkout had changes. `code_sha256` is the same
    for equal code, however it was installed.
    """
    return {name: metadata.version(name) for name in (DISTRIBUTION, *libraries)} | {
        "commit": commit(),
        "code_sha256": code_sha256(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
    }


@cache
def commit() -> str | None:
    """The commit of this code: of its checkout, of the git URL that pip installed it from, or of `IXI_COMMIT`."""
    return _of_checkout() or _of_pip() or os.environ.get(COMMIT) or None


def _of_checkout() -> str | None:
    if not (TOP / ".git").exists():  # nor is a repository meant that this is installed somewhere inside of
        return None
    command = ["git", "-C", str(TOP), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # of another repository
    try:
        # Nothing of it is a user's text.
        done = subprocess.run(  # noqa: S603  # nosec B603
            command, capture_output=True, text=True, timeout=GIT_S, check=True, env=ours
        )
    except (OSError, subprocess.SubprocessError):  # there is no git, or it does not trust the folder
        return None
    return done.stdout.strip() or None


def _of_pip() -> str | None:
    """As PEP 610 has it: `direct_url.json` beside what was installed from a URL of git."""
    try:
        text = metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
        return str(json.loads(text or "{}")["vcs_info"]["commit_id"])
    except (metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        return None


@cache
def code_sha256() -> str:
    """SHA-256 over names and contents of all modules and templates."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((TOP / package).rglob("*")):
            if path.is_file() and path.suffix in (".py", ".html", ".css", ".js"):
                digest.update(f"{path.relative_to(TOP).as_posix()}\0".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
