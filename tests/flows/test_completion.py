"""The shell completes commands, options and choices, through the protocol that `--install-completion` sets up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli.app import COMMANDS

PROGRAM = Path(sys.executable).parent / "ixi-etl"


@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("", {name for names in COMMANDS.values() for name in names}),
        ("ver", {"verify", "versions"}),
        ("refresh --max", {"--max-unreadable", "--max-change", "--max-registration-error"}),
        ("train --preset s", {"smoke"}),
    ],
    ids=["all commands", "commands", "options", "choices"],
)
def test_bash_completes(line: str, completions: set[str]) -> None:
    words = f"ixi-etl {line}"
    environment = {"_IXI_ETL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run([PROGRAM], env=os.environ | environment, capture_output=True, text=True)
    assert (set(done.stdout.split()), done.stderr) == (completions, "")


@pytest.mark.skipif(
    not shutil.which("bash"), reason="only bash can load its script; the test above pins what is completed"
)
def test_script_for_bash_completes_in_bash(tmp_path: Path) -> None:
    """Install the script into an empty home folder, load it as a new shell does, and complete a word with it."""
    script = """
        ixi-etl --install-completion > /dev/null
        source ~/.bashrc
        complete -p ixi-etl
        COMP_WORDS=(ixi-etl ver) COMP_CWORD=1
        _ixi_etl_completion ixi-etl
        echo ${COMPREPLY[*]}
    """
    environment = os.environ | {"HOME": str(tmp_path), "PATH": f"{PROGRAM.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["complete -o default -F _ixi_etl_completion ixi-etl", "verify versions"], done
