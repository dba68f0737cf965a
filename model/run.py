"""Find a run, and keep it on S3 while it is trained in a local folder.

After each checkpoint, `push` uploads all that resuming from it needs. A machine that resumes a run of another calls
`pull` first. A lease on the run's folder on S3 lets one machine at a time train it (`ixi_etl.core.lease`).
"""

from __future__ import annotations

import fnmatch
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ixi_etl.core.files import read_json
from ixi_etl.core.lease import confirm_lease
from ixi_etl.core.storage import DataRoot, check_reachable, file_sizes, filesystem_of, is_local, to_path
from ixi_etl.dataset import versions
from ixi_etl.errors import CheckpointError, LockedError
from model.config import TrainConfig
from model.devices import pick_device
from model.generator import GENERATOR_FILE

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

CHECKPOINTS, SAMPLES = "checkpoints/", "samples/"
IMMUTABLE = (CHECKPOINTS, SAMPLES)
"""Files in these folders are written once: one of equal size is already uploaded."""

RESULTS = (CONFIG_FILE, GENERATOR_FILE, "evaluation-*")
"""What a machine may add to a run without training it."""


@dataclass(frozen=True)
class Run:
    """A training run that is set up.

    Attributes:
        folder: the local folder that it works in.
        config: the resolved configuration.
        version: the folder of the dataset version that it reads.
        remote: the copy of `folder` on S3; None where the data root is local.
    """

    folder: Path
    config: TrainConfig
    version: Path
    remote: Path | None = None

    @property
    def generator(self) -> Path:
        """The file of the best generator, written when training ends."""
        return self.folder / GENERATOR_FILE

    def push(self) -> None:
        """Upload the folder to S3, if the run has a remote.

        Raises:
            LockedError: this process held the run's lock, and lost it.
        """
        if self.remote:
            confirm_lease(self.remote)
            push(self.folder, self.remote)


def new_run(data_root: DataRoot, name: str, config: TrainConfig, version: Path) -> Run:
    """The run `name` of a data root; where the root is on S3, it works in the scratch folder."""
    path = to_path(data_root.root) / "runs" / name
    return Run(path, config, version) if is_local(path) else Run(data_root.local / "runs" / name, config, version, path)


def find_run(root: str | Path, name: str, scratch: Path | None = None) -> Path:
    """The local folder of a run, named by its id, by a unique prefix of it, or `latest`: the last one written to.

    A run on S3 is pulled first.

    Raises:
        CheckpointError: there is no such run, or the prefix is ambiguous.
    """
    check_reachable(root)
    folder = to_path(root) / "runs"
    runs = sorted((p for p in folder.glob("*") if (p / CONFIG_FILE).is_file()), key=_modified)
    named = [p for p in runs if p.name == name] or [p for p in runs if p.name.startswith(name)]
    found = runs[-1:] if name == "latest" else named
    if len(found) != 1:
        problem = f"{len(found)} runs begin with {name}" if found else f"there is no run {name}"
        raise CheckpointError(f"{problem} in {folder}; there are: {', '.join(p.name for p in runs) or 'none'}")
    if is_local(found[0]):
        return found[0]
    local = DataRoot(root, scratch=scratch).local / "runs" / found[0].name
    pull(found[0], local)
    return local


def open_run(root: str | Path, name: str, scratch: Path | None = None) -> Run:
    """A run that was trained before, with the dataset version that it was trained on; see `find_run` for the names.

    Raises:
        CheckpointError: there is no such run, or its configuration is damaged.
        DatasetError: its dataset version does not exist.
    """
    folder = find_run(root, name, scratch)
    record = read_json(folder / CONFIG_FILE)
    if not isinstance(record, dict) or "config" not in record:
        raise CheckpointError(f"{folder / CONFIG_FILE} is damaged; it holds the run's configuration")
    config = TrainConfig.model_validate(record["config"])
    dataset_name, version = versions.parse_version(config.dataset)
    data_root = DataRoot(root, dataset_name, scratch)
    config = config.model_copy(update={"device": pick_device("auto")})
    return new_run(data_root, folder.name, config, data_root.version(versions.resolve_version(data_root, version)))


def generator_in(run: Path) -> Path:
    """The file of the best generator in the folder of a run.

    Raises:
        CheckpointError: it does not exist.
    """
    if not (run / GENERATOR_FILE).is_file():
        raise CheckpointError(f"{run} has no {GENERATOR_FILE} yet; `ixi-etl train --resume` writes it at the end")
    return run / GENERATOR_FILE


def pull(remote: Path, folder: Path) -> None:
    """Download a run from S3 into `folder`, if it has a newer checkpoint than `folder`.

    If both have the same, download what another machine has evaluated since, and the generator if it is not here.
    """
    files, local = _visible_files(remote), _visible_files(folder)
    newest, newest_here = _newest_checkpoint(files), _newest_checkpoint(local)
    if newest > newest_here:
        _download(remote, folder, sorted(files, key=_is_checkpoint))  # checkpoints last: they mark a complete download
        log.info("downloaded %s, trained to %s", remote, newest)
    elif newest == newest_here:
        filesystem, top = filesystem_of(remote)

        def is_current(name: str) -> bool:
            if name not in local or (name == GENERATOR_FILE and local[name] == files[name]):
                return name in local  # no step was trained since: a generator of the same size is the same
            return bool((folder / name).stat().st_mtime >= filesystem.modified(f"{top}/{name}").timestamp())

        results = {name for pattern in RESULTS for name in fnmatch.filter(files, pattern)}
        _download(remote, folder, sorted(name for name in results if not is_current(name)))


def _download(remote: Path, folder: Path, names: Iterable[str]) -> None:
    filesystem, top = filesystem_of(remote)
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        filesystem.get_file(f"{top}/{name}", str(part))
        os.replace(part, target)


def push(folder: Path, remote: Path) -> None:
    """Upload new and changed files to S3, checkpoints first, and delete remote checkpoints that are gone locally."""
    filesystem, top = filesystem_of(remote)
    local, uploaded = _visible_files(folder), _visible_files(remote)
    for name in sorted(local, key=_is_checkpoint, reverse=True):
        if not (name.startswith(IMMUTABLE) and uploaded.get(name) == local[name]):
            filesystem.put_file(str(folder / name), f"{top}/{name}")
    for name in filter(_is_checkpoint, uploaded.keys() - local.keys()):
        filesystem.rm_file(f"{top}/{name}")


def push_if_possible(folder: Path, remote: Path) -> None:
    """`push`, but log errors: the run continues, and the next checkpoint tries again.

    Raises:
        LockedError: another machine trains this run now.
    """
    try:
        confirm_lease(remote)
        push(folder, remote)
    except LockedError:
        raise
    except Exception as error:  # exceptions of botocore, aiohttp and fsspec
        log.warning("cannot upload %s to %s yet (%s)", folder, remote, error)


def _visible_files(folder: Path) -> dict[str, int]:
    """Sizes of the files in a folder, here or on S3, without hidden ones, which are locks and partial files."""
    return {name: size for name, size in file_sizes(folder).items() if "/." not in f"/{name}"}


def _newest_checkpoint(files: dict[str, int]) -> str:
    return max(filter(_is_checkpoint, files), default="")


def _is_checkpoint(name: str) -> bool:
    return name.startswith(CHECKPOINTS)


def _modified(run: Path) -> float:
    """Modification time of a run; on S3, where folders have none, that of its configuration."""
    return (run if is_local(run) else run / CONFIG_FILE).stat().st_mtime
