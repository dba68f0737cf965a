"""Checkpoints: one safetensors file each, written whole, that carries its own digest. Nothing is ever unpickled.

`<run>/checkpoints/step-00001000.safetensors` holds the tensors of the learner (both networks, both optimisers, the
moving average, random states), and in its header, as JSON: step, configuration, validation and digest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ixi_etl.config import in_a_line
from ixi_etl.errors import IxiError
from ixi_etl.files import sync_path
from model.config import TrainConfig

log = logging.getLogger(__name__)


class CheckpointError(IxiError):
    """A checkpoint is damaged, missing, or of another training."""


class _Facts(BaseModel):
    """What every header must say; a generator's says more."""

    model_config = ConfigDict(extra="allow", strict=True)

    step: int = Field(ge=0)
    config: dict[str, Any]
    validation: dict[str, float]
    processes: int | None = Field(None, ge=1)


@dataclass(frozen=True)
class Checkpoint:
    """What the header says.

    `validation` is empty where there was nothing to validate on. `processes` is how many trained together; a
    checkpoint that does not say so was written before that was recorded: its random states tell (`newest_whole`).
    """

    path: Path
    step: int
    config: dict[str, Any]
    validation: dict[str, float]
    processes: int | None = None


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies among the others in `folder`."""
    return folder / f"step-{step:08d}.safetensors"


def save(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a safetensors file with `facts` and the digest of all in its header, whole or not at all.

    It is on the disk when this returns.

    Raises:
        CheckpointError: the disk is full, or has another fault; what was there before is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    part = path.with_name(f".{path.name}.part")
    said = json.dumps(facts)
    try:
        part.unlink(missing_ok=True)
        part.touch()
        mode = part.stat().st_mode  # by the umask; safetensors would leave it readable to its owner alone
        save_file(plain, part, metadata={"facts": said, "sha256": _digest(plain, said)})
        part.chmod(mode)
        sync_path(part)
    except (SafetensorError, OSError) as error:
        part.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error}; mend that, and --resume goes on from the last") from error
    os.replace(part, path)
    sync_path(path.parent)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file that `save` wrote, and its facts.

    Raises:
        CheckpointError: it is missing, cut short, or not what was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        said = metadata["facts"]
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not there") from None
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint of this project ({error})") from error
    facts = _parsed(path, said)
    if _digest(tensors, said) != metadata.get("sha256"):
        raise CheckpointError(f"{path} is damaged: it has not the SHA-256 in its header")
    return tensors, facts


def read_facts(path: Path) -> dict[str, Any]:
    """The facts of a file that `save` wrote, from its header alone.

    Raises:
        CheckpointError: it is missing, or has no such header.
    """
    try:
        with safe_open(path, framework="pt") as file:
            said = (file.metadata() or {})["facts"]
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not there") from None
    except (SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint of this project ({error})") from error
    return _parsed(path, said)


def digest_of(path: Path) -> str:
    """The SHA-256 in the header of a file that `save` wrote: of its tensors and facts."""
    with safe_open(path, framework="pt") as file:
        return str((file.metadata() or {})["sha256"])


def _parsed(path: Path, said: str) -> dict[str, Any]:
    try:
        return _Facts.model_validate_json(said).model_dump()
    except ValidationError as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint of this project ({in_a_line(error)})") from error


def config_of(path: Path, said: dict[str, Any]) -> TrainConfig:
    """The resolved configuration that a file's facts have as `said`.

    Raises:
        CheckpointError: it is none.
    """
    try:
        config = TrainConfig.model_validate(said)
    except ValidationError as error:
        raise CheckpointError(f"the configuration in {path} cannot be used: {in_a_line(error)}") from error
    if config.side is None:
        raise CheckpointError(f"the configuration in {path} cannot be used: it has no side")
    return config


def require(path: Path, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` unless the file's tensors have the names, shapes and types of `wanted`, and no others.

    The fused optimiser trusts the shapes of its moments: it would read and write beyond the end of shorter ones.
    """
    for name in sorted(tensors.keys() | wanted.keys()):
        there, need = (
            "none" if t is None else f"{t.dtype} {list(t.shape)}" for t in (tensors.get(name), wanted.get(name))
        )
        if there != need:
            raise CheckpointError(
                f"{path} does not fit its configuration: of {name} it has {there}, not {need}; remove it"
            )


def _digest(tensors: Mapping[str, Tensor], facts: str) -> str:
    digest = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# -- which there are --------------------------------------------------------------------------------------------------


def found(folder: Path) -> list[Checkpoint]:
    """The checkpoints whose header can be read, oldest first; of the others a warning says so."""
    good = []
    for path in sorted(folder.glob("step-*.safetensors")):
        try:
            facts = read_facts(path)
            good.append(Checkpoint(path, facts["step"], facts["config"], facts["validation"], facts["processes"]))
        except CheckpointError as error:
            log.warning("%s; it is passed over", error)
    return good


def newest_whole(folder: Path) -> tuple[Checkpoint, dict[str, Tensor]] | None:
    """The newest checkpoint that is whole, and its tensors; None if there is none."""
    for checkpoint in reversed(found(folder)):
        try:
            tensors = load(checkpoint.path)[0]
            processes = sum(name.startswith("random.cpu.") for name in tensors)
            return replace(checkpoint, processes=checkpoint.processes or processes), tensors
        except CheckpointError as error:
            log.warning("%s; an older one is used", error)
    return None


def best(folder: Path) -> Checkpoint | None:
    """The one with the lowest validated MAE (the newer of equals); where nothing was validated, the newest."""

    def rank(checkpoint: Checkpoint) -> tuple[float, int]:
        mae = checkpoint.validation.get("mae", math.inf)
        return (math.inf if math.isnan(mae) else mae), -checkpoint.step

    there = found(folder)
    return min([c for c in there if c.validation] or there, key=rank, default=None)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` and the best."""
    there, good = found(folder), best(folder)
    for checkpoint in there[:-keep]:
        if good is None or checkpoint.step != good.step:
            checkpoint.path.unlink()
