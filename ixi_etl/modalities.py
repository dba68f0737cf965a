"""The modalities of a pair, and the names of their archives."""

from __future__ import annotations

import re

MODALITIES = ("T1", "T2")


def archive_name(modality: str) -> str:
    return f"IXI-{modality}.tar"


def modality_of(tar_name: str) -> str | None:
    """The one of `MODALITIES` that the name of an archive contains; None if it contains none or several."""
    names = set(re.findall("|".join(MODALITIES), tar_name))
    return names.pop() if len(names) == 1 else None
