"""A direction between the arrays of a version: from which ones to which one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ixi_etl.errors import ConfigError

_DIRECTION = re.compile(r"(\w+(?:\+\w+)*)->(\w+)", re.ASCII)


class Direction(NamedTuple):
    """From which arrays of a version to which one: `t1->t2`, `t1+pd->t2`."""

    sources: tuple[str, ...]
    target: str

    def __str__(self) -> str:
        return f"{'+'.join(self.sources)}->{self.target}"

    @classmethod
    def parse(cls, text: str | None) -> Direction:
        """Read the text that `str` writes; spaces are ignored.

        Raises:
            ValueError: it is not SOURCE->TARGET or SOURCE+SOURCE->TARGET, or a name is repeated.
        """
        match = _DIRECTION.fullmatch((text or "").replace(" ", ""))
        if match is None:
            raise ValueError(f"{text!r} is not SOURCE->TARGET or SOURCE+SOURCE->TARGET")
        names = [*match[1].split("+"), match[2]]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated:
            raise ValueError(f"{text!r} names {repeated} twice")
        return cls(tuple(names[:-1]), names[-1])


def parse_direction(direction: str | None, version: Mapping[str, Any]) -> Direction:
    """Parse a direction between arrays of the version with this metadata; None means its default direction.

    Raises:
        ConfigError: the text is not a direction, or names another array.
    """
    from ixi_etl.dataset.schema import SCHEMAS  # with pandas, which the options of a command line do not need

    if direction is None:
        return Direction((version["source"],), version["target"])
    arrays = SCHEMAS[version["name"]].arrays
    try:
        parsed = Direction.parse(direction)
        unknown = [name for name in (*parsed.sources, parsed.target) if name not in arrays]
        if not unknown:
            return parsed
        problem = f"{direction!r} names {unknown[0]}"
    except ValueError as error:
        problem = str(error)
    example = Direction((version["source"],), version["target"])
    raise ConfigError(
        f"direction {problem}; the arrays of {version['name']} are {', '.join(arrays)}: "
        f"use for example {example}, or another dataset"
    )
