"""The checks of a version that hold its hand-off to training."""

from __future__ import annotations

from pathlib import Path

from ixi_etl.core.files import read_json

COMPARED = "compared.json"


def held_by(folder: Path) -> list[str]:
    """Names of the failed checks that hold the hand-off of a version to training; empty if none does."""
    compared = read_json(folder / COMPARED)
    return [str(name) for name in compared.get("held_by", [])] if isinstance(compared, dict) else []
