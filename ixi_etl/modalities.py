"""The modalities of a pair, and the names of their archives."""

from __future__ import annotations

import re

MODALITIES = ("T1", "T2")


def archive_name(modality: str) -> str:
    return f"IXI-{modality}.tar"


def modality_of(tar_name: str) -> str | None:
    """The modality, `T1` or `T2`, in the name of an archive; None if it has neither or both."""
    names = set(re.findall("T[12]", tar_name))
    return names.pop() if len(names) == 1 else None
