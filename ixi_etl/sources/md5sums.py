"""Parse `MD5SUMS` files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from ixi_etl.errors import ArchiveError

_MD5SUM = re.compile(r"(?P<escaped>\\?)(?P<md5>[0-9a-f]{32})\s+\*?(?P<name>\S.*)", re.IGNORECASE)
_BSD = re.compile(r"(?P<escaped>\\?)MD5 ?\((?P<name>.+)\) ?= ?(?P<md5>[0-9a-f]{32})", re.IGNORECASE)


def parse_md5sums(data: bytes) -> list[tuple[str, str]]:
    """(name, MD5) of each line as written by md5sum, BSD md5 or openssl, in UTF-8 or UTF-16; other lines are skipped.

    Names keep their folders; the escapes of md5sum are decoded.
    """
    found = []
    for line in re.split("[\r\n]+", data.decode(json.detect_encoding(data), "replace")):
        match = _MD5SUM.fullmatch(line.strip()) or _BSD.fullmatch(line.strip())
        if match:
            name = match["name"]
            if match["escaped"]:
                name = re.sub(r"\\([\\nr])", lambda char: {"n": "\n", "r": "\r"}.get(char[1], char[1]), name)
            found.append((name, match["md5"].lower()))
    return found


def find_md5(name: str, entries: Iterable[tuple[str, str]]) -> str | None:
    """The MD5 of the file `name` beside the list, or None if it is not listed.

    An exact name takes precedence over one in a folder, and that over one in another case.

    Raises:
        ArchiveError: the list has two MD5s for the file.
    """
    for normalise in (
        lambda text: text.removeprefix("./"),
        lambda text: re.split(r"[/\\]", text)[-1],
        lambda text: re.split(r"[/\\]", text)[-1].casefold(),
    ):
        digests = {md5 for text, md5 in entries if normalise(text) == normalise(name)}
        if len(digests) > 1:
            raise ArchiveError(f"its lines for {name} contradict each other")
        if digests:
            return digests.pop()
    return None
