"""The command line `ixi-etl`: one module for each group of commands (`app.COMMANDS`).

Only the module of the command that is called is imported. Commands import what they need where they use it, because
`--help` must not wait for pandas, torch or Prefect.
"""

from flows.cli.app import app, import_commands, main

__all__ = ["app", "import_commands", "main"]
