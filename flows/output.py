"""The result of a command: tables and lines for a person, or one JSON object for a script.

It goes to stdout; progress, warnings and errors go to stderr. The JSON object has the warnings and the error too.
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
LABEL = 9  # characters of the longest label of `Output.line`

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress: only warnings, errors and the result.")]
Json = Annotated[bool, typer.Option("--json", help="The result as one JSON object, for scripts; an error too.")]


class _Kept(logging.Handler):
    """Keeps the text of each warning."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


class Output:
    """Prints each part of the result at once; with `as_json` it collects them, and `end` or `fail` prints one object.

    Attributes:
        current: that of the command that runs, so that an error can be part of its object.
    """

    current: ClassVar[Output | None] = None

    def __init__(self, quiet: bool = False, as_json: bool = False) -> None:
        self._as_json = as_json
        self._said: dict[str, Any] = {}
        self._warnings = _Kept()
        for name in LOGGERS:
            logger = logging.getLogger(name)
            logger.setLevel(logging.WARNING if quiet else logging.INFO)
            if as_json:
                logger.addHandler(self._warnings)
        Output.current = self

    def table(self, name: str, table: pd.DataFrame, title: str, data: Any = None) -> None:
        """A table under its title; in JSON its rows, or `data` instead of them."""
        if self._as_json:
            self._said[name] = json.loads(table.to_json(orient="records")) if data is None else data
        else:
            _print_table(table, title)

    def lines(self, facts: Mapping[str, Any]) -> None:
        """Labels and what they are, a line each, after an empty one."""
        if self._as_json:
            self._said |= facts
        else:
            typer.echo("\n" + "\n".join(f"{label:<{LABEL}} {value}" for label, value in facts.items()))

    def each(self, name: str, values: Sequence[str | Path]) -> None:
        """A line for each value, and nothing else on it: a list of files is to be piped on."""
        if self._as_json:
            self._said[name] = list(values)
        else:
            for value in values:
                typer.echo(str(value))

    def words(self, sentence: str, **facts: Any) -> None:
        """A sentence for a person; what it says as facts for a script."""
        if not self._as_json:
            typer.echo(sentence)
        self.facts(**facts)

    def facts(self, **facts: Any) -> None:
        """What a script alone is told."""
        self._said |= facts

    def end(self) -> None:
        if self._as_json:
            said = self._said | {"warnings": self._warnings.texts}
            typer.echo(json.dumps(said, indent=2, default=str))

    def fail(self, error: str) -> None:
        """In place of `end`, when an error ends the command: the object has what was known before it."""
        self.facts(error=error)
        self.end()


def _print_table(table: pd.DataFrame, title: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, min_width=len(title))
    for name in table.columns:
        numeric = table[name].dtype.kind in "iuf"
        shown.add_column(str(name), justify="right" if numeric else "left", overflow="fold")
    for row in table.itertuples(index=False):
        shown.add_row(*(str(value) for value in row))
    # What stands in brackets in the name of a member, a folder or a column is no markup.
    Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False).print(shown)
