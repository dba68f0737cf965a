"""The modalities that a dataset can have, their archives, and the names of datasets.

A dataset has a reference modality, whose slices are cut and never resampled; each other modality is interpolated onto
them. Its name lists the modalities, the reference last: `ixi-t1-t2`, `ixi-t1-pd-t2`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import chain, combinations
from types import MappingProxyType

MODALITIES = ("T1", "T2", "PD", "MRA")
"""All modalities, in the order of columns, arrays and checks. IXI's diffusion images are many volumes each."""

DEFAULT_MODALITIES, DEFAULT_REFERENCE = ("T1", "T2"), "T2"

ECHOES = frozenset({"T2", "PD"})
"""Two echoes of one acquisition: their voxels are at the same places, and the head cannot move between them."""

# PD and MRA only as whole words: a name such as UPDRS-T1.tar has the letters PD too.
_IN_A_NAME = re.compile(r"T1|T2|(?<![A-Za-z0-9])(?:PD|MRA)(?![A-Za-z0-9])")


def archive_name(modality: str) -> str:
    return f"IXI-{modality}.tar"


def modality_of(tar_name: str) -> str | None:
    """The one of `MODALITIES` that the name of an archive contains; None if it contains none or several."""
    names = set(_IN_A_NAME.findall(tar_name))
    return names.pop() if len(names) == 1 else None


def renamed(tar_name: str, modality: str) -> str:
    """The name of the archive of another modality, beside the archive `tar_name`."""
    return _IN_A_NAME.sub(modality, tar_name)


def in_order(modalities: Iterable[str]) -> tuple[str, ...]:
    """The modalities in the order of `MODALITIES`."""
    return tuple(sorted(modalities, key=MODALITIES.index))


def moving(modalities: Iterable[str], reference: str) -> tuple[str, ...]:
    """The modalities that are interpolated onto the slices of the reference."""
    return tuple(m for m in modalities if m != reference)


def dataset_name(modalities: Iterable[str], reference: str) -> str:
    """The name of the dataset with these modalities: `ixi-t1-t2`, the reference last."""
    return "-".join(("ixi", *(m.lower() for m in (*moving(in_order(modalities), reference), reference))))


def _all_datasets() -> Iterable[tuple[str, tuple[tuple[str, ...], str]]]:
    chosen = chain.from_iterable(combinations(MODALITIES, n) for n in range(2, len(MODALITIES) + 1))
    return ((dataset_name(m, reference), (m, reference)) for m in chosen for reference in m)


DATASETS: Mapping[str, tuple[tuple[str, ...], str]] = MappingProxyType(dict(_all_datasets()))
"""Name of each possible dataset -> its modalities, and the reference."""
