"""Metadata that describes how a configuration field appears on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Option:
    """Metadata of an annotated field: ``root: Annotated[str, Option(envvar="IXI_ROOT")]``.

    Attributes:
        flag: used instead of the field's name with dashes.
        type: of the value, if the field accepts more than a command line can express.
        metavar: placeholder in the help.
        envvar: environment variable that supplies the value if the option is omitted.
        hidden: the field has no option, because a preset sets it.
    """

    flag: str | None = None
    type: Any = None
    metavar: str | None = None
    envvar: str | None = None
    hidden: bool = False
