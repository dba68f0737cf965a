"""The command line `ixi-etl`: one module for each group of commands.

Commands import what they need where they use it, because `--help` must not wait for pandas, torch or Prefect.
"""

from flows.cli import datasets, demo, evaluations, runs, versions  # noqa: F401 - registers their commands
from flows.cli.app import app, main

__all__ = ["app", "main"]
