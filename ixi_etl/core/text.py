"""Make text from outside safe to print, also in a Markdown table; counts with their nouns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def printable(text: str | Path) -> str:
    """Escape control characters, and bytes of a file name that are not UTF-8.

    Otherwise, a name or a server's message could send control sequences to a terminal.
    """
    plain = str(text).encode("utf-8", "backslashreplace").decode()
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", plain)


def quantity(number: int, noun: str) -> str:
    """A count with its noun: `1 subject`, `2 subjects`, `49,200 steps`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def markdown_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table; empty text if there are no rows. No cell can end a cell, a row or the table."""
    listed = list(rows)
    if not listed:
        return ""
    columns = list(dict.fromkeys(key for row in listed for key in row))
    lines = [columns, ["---"] * len(columns), *([row.get(key, "") for key in columns] for row in listed)]
    return "\n".join(f"| {' | '.join(map(_cell, cells))} |" for cells in lines)


def _cell(value: Any) -> str:
    return printable(str(value)).replace("|", "\\|").replace("<", "&lt;")
