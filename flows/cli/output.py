"""The result of a command: tables and lines for people, or one JSON object for scripts.

Results go to stdout; progress, warnings and errors go to stderr. The JSON object also contains the warnings and, if
the command fails, the error.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

if TYPE_CHECKING:
    import pandas as pd

LOGGERS = ("ixi_etl", "model")
LABEL_WIDTH = 9  # characters of the longest label of `Output.fields`

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress, only warnings, errors and the result.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result, or the error, as one JSON object.")]


class _WarningCollector(logging.Handler):
    """Collects the text of each warning."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


class Output:
    """Prints each part of a result at once; with `as_json`, collects the parts until `end` or `fail` prints them.

    Attributes:
        current: the output of the running command, so that an error can be added to its JSON object.
    """

    current: ClassVar[Output | None] = None

    def __init__(self, quiet: bool = False, as_json: bool = False) -> None:
        self._as_json = as_json
        self._result: dict[str, Any] = {}
        self._warnings = _WarningCollector()
        for name in LOGGERS:
            logger = logging.getLogger(name)
            logger.setLevel(logging.WARNING if quiet else logging.INFO)
            if as_json:
                logger.addHandler(self._warnings)
        Output.current = self

    def table(self, name: str, table: pd.DataFrame, title: str, records: Any = None) -> None:
        """Print a table under its title; the JSON object gets its rows, or `records` instead."""
        if self._as_json:
            self._result[name] = json.loads(table.to_json(orient="records")) if records is None else records
        else:
            _print_table(table, title)

    def fields(self, values: Mapping[str, Any]) -> None:
        """Print an empty line, then one line for each label and value."""
        if self._as_json:
            self._result |= values
        else:
            typer.echo("\n" + "\n".join(f"{label:<{LABEL_WIDTH}} {value}" for label, value in values.items()))

    def items(self, name: str, values: Sequence[str | Path]) -> None:
        """Print each value on a line of its own, so that a list of files can be piped on."""
        if self._as_json:
            self._result[name] = list(values)
        else:
            for value in values:
                typer.echo(str(value))

    def text(self, sentence: str, **data: Any) -> None:
        """Print a sentence; the JSON object gets `data` instead."""
        if not self._as_json:
            typer.echo(sentence)
        self.data(**data)

    def data(self, **data: Any) -> None:
        """Add values to the JSON object only."""
        self._result |= data

    def end(self) -> None:
        """Print the JSON object, if one was asked for."""
        if self._as_json:
            typer.echo(json.dumps(self._result | {"warnings": self._warnings.texts}, indent=2, default=str))

    def fail(self, error: str) -> None:
        """Call instead of `end` when an error ends the command: the JSON object gets the error too."""
        self.data(error=error)
        self.end()


def _print_table(table: pd.DataFrame, title: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, min_width=len(title), padding=(0, 1, 0, 0))
    for name in table.columns:
        numeric = table[name].dtype.kind in "iuf"
        shown.add_column(str(name), justify="right" if numeric else "left", overflow="fold")
    for row in table.itertuples(index=False):
        shown.add_row(*(str(value) for value in row))
    # Brackets in names of members, folders and columns are not markup.
    Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False).print(shown)
