"""Make text from outside safe to print."""

from __future__ import annotations

import re
from pathlib import Path


def printable(text: str | Path) -> str:
    """Escape control characters, and bytes of a file name that are not UTF-8.

    Otherwise, a name or a server's message could send control sequences to a terminal.
    """
    plain = str(text).encode("utf-8", "backslashreplace").decode()
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", plain)
