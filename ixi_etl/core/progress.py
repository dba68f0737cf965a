"""The callback by which long stages report progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int, str], None]
"""Called as (what, done, total, unit) while a stage runs; unit is `B` for bytes or a plural noun."""


def no_progress(what: str, done: int, total: int, unit: str) -> None:
    """A `Progress` that shows nothing."""
