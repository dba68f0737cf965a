"""Read and write checkpoints: one safetensors file each, written atomically, with a digest. Nothing is unpickled.

`<run>/checkpoints/step-00001000.safetensors` holds the state of the trainer (both networks, both optimisers, the moving
average, random states). Its header holds, as JSON, the metadata: step, configuration and validation; and a SHA-256.
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
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ixi_etl.config import Normalisation, format_validation_error
from ixi_etl.core.files import fsync_path
from ixi_etl.errors import CheckpointError
from model.config import TrainConfig

log = logging.getLogger(__name__)

Size = Annotated[int, Field(ge=1, le=4096)]  # pixels; a file from an untrusted source could ask for all memory


class _Metadata(BaseModel):
    """The metadata that every file must have; a generator's file has more.

    `normalisation` is that of the dataset, and `slice_shape` the height and width of its slices. Both are in files of
    generators; those of older versions lack them.
    """

    model_config = ConfigDict(extra="allow", strict=True)

    step: int = Field(ge=0)
    config: dict[str, Any]
    validation: dict[str, float]
    processes: int | None = Field(None, ge=1)
    normalisation: Normalisation = "percentiles"
    slice_shape: tuple[Size, Size] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file and its metadata.

    `validation` is empty if the version has no validation split. `processes` is the number of processes that trained
    together. Files of older versions do not record it; `latest_valid` counts their random states instead.
    """

    path: Path
    step: int
    config: dict[str, Any]
    validation: dict[str, float]
    processes: int | None = None


def checkpoint_path(folder: Path, step: int) -> Path:
    """The file of the checkpoint of a step in `folder`."""
    return folder / f"step-{step:08d}.safetensors"


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write `tensors` and `metadata` to a safetensors file, atomically, and sync it to the disk.

    Raises:
        CheckpointError: the disk is full or fails; an earlier file at `path` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    part = path.with_name(f".{path.name}.part")
    text = json.dumps(metadata)
    try:
        part.unlink(missing_ok=True)
        part.touch()
        mode = part.stat().st_mode  # follows the umask; safetensors makes files readable by their owner only
        save_file(contiguous, part, metadata={"facts": text, "sha256": _digest(contiguous, text)})
        part.chmod(mode)
        fsync_path(part)
    except (SafetensorError, OSError) as error:
        part.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error}; fix that, then continue with --resume") from error
    os.replace(part, path)
    fsync_path(path.parent)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata of a file that `save` wrote.

    Raises:
        CheckpointError: the file is missing, truncated or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        text = header["facts"]
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or not a checkpoint of this project ({error})") from error
    metadata = _parse_metadata(path, text)
    if _digest(tensors, text) != header.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its contents do not match the SHA-256 in its header")
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a file that `save` wrote, read from its header alone.

    Raises:
        CheckpointError: the file is missing, or has no such header.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {})["facts"]
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged or not a checkpoint of this project ({error})") from error
    return _parse_metadata(path, text)


def read_digest(path: Path) -> str:
    """The SHA-256, in hexadecimal, in the header of a file that `save` wrote: of its tensors and metadata."""
    with safe_open(path, framework="pt") as file:
        return str((file.metadata() or {})["sha256"])


def _parse_metadata(path: Path, text: str) -> dict[str, Any]:
    try:
        return _Metadata.model_validate_json(text).model_dump()
    except ValidationError as error:
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint of this project ({format_validation_error(error)})"
        ) from error


def parse_config(path: Path, fields: dict[str, Any]) -> TrainConfig:
    """The resolved configuration from the metadata field `config` of the file `path`.

    Raises:
        CheckpointError: it is invalid or not resolved.
    """
    try:
        config = TrainConfig.model_validate(fields)
    except ValidationError as error:
        raise CheckpointError(
            f"the configuration in {path} cannot be used: {format_validation_error(error)}"
        ) from error
    if not config.is_sized:
        raise CheckpointError(f"the configuration in {path} cannot be used: it has neither side nor levels")
    return config


def require_tensors(path: Path, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` unless the file's tensors have exactly the names, shapes and types of `wanted`.

    The fused optimiser does not check the shapes of its moments: it would read and write past the end of shorter ones.
    """
    for name in sorted(tensors.keys() | wanted.keys()):
        found, expected = (
            "none" if t is None else f"{t.dtype} {list(t.shape)}" for t in (tensors.get(name), wanted.get(name))
        )
        if found != expected:
            raise CheckpointError(
                f"{path} does not fit its configuration: {name} is {found}, expected {expected}; remove the file"
            )


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """The checkpoints with a readable header, oldest first; the others are logged and skipped."""
    readable = []
    for path in sorted(folder.glob("step-*.safetensors")):
        try:
            metadata = read_metadata(path)
        except CheckpointError as error:
            log.warning("%s; skipped", error)
            continue
        fields = (metadata[name] for name in ("step", "config", "validation", "processes"))
        readable.append(Checkpoint(path, *fields))
    return readable


def latest_valid(folder: Path) -> tuple[Checkpoint, dict[str, Tensor]] | None:
    """The newest checkpoint whose digest matches, and its tensors; None without a valid checkpoint."""
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            tensors = load(checkpoint.path)[0]
            processes = sum(name.startswith("random.cpu.") for name in tensors)
            return replace(checkpoint, processes=checkpoint.processes or processes), tensors
        except CheckpointError as error:
            log.warning("%s; trying an older checkpoint", error)
    return None


def best_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint with the lowest validation MAE (the newest of equals); without validation, the newest."""

    def rank(checkpoint: Checkpoint) -> tuple[float, int]:
        mae = checkpoint.validation.get("mae", math.inf)
        return (math.inf if math.isnan(mae) else mae), -checkpoint.step

    existing = list_checkpoints(folder)
    return min([c for c in existing if c.validation] or existing, key=rank, default=None)


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Remove all checkpoints except the newest `keep` and the best."""
    best = best_checkpoint(folder)
    for checkpoint in list_checkpoints(folder)[:-keep]:
        if best is None or checkpoint.step != best.step:
            checkpoint.path.unlink()


def find_resume_point(
    folder: Path, config: TrainConfig, processes: int, resume: bool
) -> tuple[Checkpoint, dict[str, Tensor]] | None:
    """The newest valid checkpoint in `folder` and its tensors, to resume from; None without a valid checkpoint.

    Raises:
        CheckpointError: there is one and `resume` is not set; or it does not fit `config` or `processes`.
    """
    newest = latest_valid(folder)
    if newest is None:
        return None
    if not resume:
        trained = f"{folder.parent} has trained to step {newest[0].step}"
        raise CheckpointError(f"{trained}; continue with --resume, or start a new run with another --run-id")
    check_resumable(newest[0], config, processes)
    return newest


def check_resumable(checkpoint: Checkpoint, config: TrainConfig, processes: int = 1) -> None:
    """Raise `CheckpointError` unless `processes` processes with `config` may resume from `checkpoint`.

    Another number of processes would use other pairs at each step, and other random numbers.
    """
    difference = config.difference(parse_config(checkpoint.path, checkpoint.config))
    if checkpoint.processes != processes:
        count = f"{checkpoint.processes} processes, not {processes} (torchrun --nproc-per-node)"
        difference = ", ".join(filter(None, [difference, count]))
    if difference:
        raise CheckpointError(
            f"{checkpoint.path} has another configuration ({difference}); use the same, or give another --run-id"
        )
