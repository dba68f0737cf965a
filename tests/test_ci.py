"""What CI runs, and `.ci/images` with a stand-in for buildah."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from services import skip_unless_mounts

TOP = Path(__file__).parents[1]


def executable(path: Path, script: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_container_of_ci_may_mount_folders() -> None:
    [job] = yaml.safe_load((TOP / ".github/workflows/ci.yml").read_text())["jobs"].values()
    assert job["container"]["options"] == "--privileged"


def test_tests_that_mount_folders_are_skipped_where_that_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable(tmp_path / "bin/unshare", "echo 'unshare failed: Operation not permitted' >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(pytest.skip.Exception, match=r"--privileged\): unshare failed: Operation not permitted$"):
        skip_unless_mounts()


def test_tests_of_the_images_start_no_process_when_they_are_collected() -> None:
    code = (
        "import subprocess, sys\n"
        "def refuse(*_, **__):\n raise AssertionError\n"
        "subprocess.Popen.__init__ = refuse\n"
        "import test_images, test_object_store"
    )
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=True)


@pytest.mark.parametrize("status", [0, 1])
def test_build_of_images_keeps_the_settings_of_pip_from_others_and_removes_them(status: int, tmp_path: Path) -> None:
    """They may hold the password of an index. `inspect` finds the base image; `build` copies what it could read."""
    seen = tmp_path / "seen"
    executable(
        tmp_path / "bin/buildah",
        f'case "$*" in *" build "*) cp -p {tmp_path}/out/pip.conf {seen}; exit {status};; esac',
    )
    path = os.pathsep.join((str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = os.environ | {"PATH": path, "PIP_INDEX_URL": "https://someone:hunter2@example.org/simple"}
    command = ["sh", "-c", 'umask 022 && exec "$@"', "sh", TOP / ".ci/images", tmp_path / "out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert "hunter2" in seen.read_text()
    assert stat.S_IMODE(seen.stat().st_mode) == 0o600
    assert {file.name for file in (tmp_path / "out").iterdir()} <= {"cpu.log", "gpu.log"}
