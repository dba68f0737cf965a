"""Keep a run on S3, while it is trained in a folder of this machine: what a checkpoint needs is there before the next.

A machine that goes on with the run of another fetches it first. That one machine at a time trains a run is for whoever
starts them to see to: on S3 nothing can be locked.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ixi_etl.places import file_sizes, filesystem_of

log = logging.getLogger(__name__)

FIXED = ("checkpoints/", "samples/")
"""What lies here is never written to again: with its size, it is there."""


def fetch(kept: Path, folder: Path) -> None:
    """Bring a run from S3 into `folder`, if it has been trained further than what is in `folder`."""
    filesystem, top = filesystem_of(kept)
    there = file_sizes(kept)
    if _newest(there) <= _newest(_local(folder)):
        return
    for name in sorted(there, key=_is_checkpoint):  # the checkpoints last: they say that all is here
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        filesystem.get_file(f"{top}/{name}", str(part))
        os.replace(part, target)
    log.info("fetched %s, trained to %s", kept, _newest(there))


def keep(folder: Path, kept: Path) -> None:
    """Bring what is new in `folder` to S3, checkpoints first, and remove there the checkpoints that are gone here."""
    filesystem, top = filesystem_of(kept)
    here, there = _local(folder), file_sizes(kept)
    for name in sorted(here, key=_is_checkpoint, reverse=True):
        if not (name.startswith(FIXED) and there.get(name) == here[name]):
            filesystem.put_file(str(folder / name), f"{top}/{name}")
    for name in filter(_is_checkpoint, there.keys() - here.keys()):
        filesystem.rm_file(f"{top}/{name}")


def keep_if_possible(folder: Path, kept: Path) -> None:
    """The same; where S3 does not answer, the next checkpoint is another try, and the training goes on."""
    try:
        keep(folder, kept)
    except Exception as error:  # botocore's, aiohttp's and fsspec's own
        log.warning("%s is not yet in %s (%s)", folder, kept, error)


def _local(folder: Path) -> dict[str, int]:
    """Of the files but hidden ones, which are locks and parts."""
    return {name: size for name, size in file_sizes(folder).items() if "/." not in f"/{name}"}


def _newest(files: dict[str, int]) -> str:
    return max(filter(_is_checkpoint, files), default="")


def _is_checkpoint(name: str) -> bool:
    return name.startswith(FIXED[0])
