"""Measure any ONNX model of one channel in and one out on a dataset version, as a trained generator is measured::

    <root>/evaluations/<file>-<its SHA-256>-<version>-<hash>/evaluation-test.csv, evaluation-test.json

Both hashes are of eight digits; the last one is of direction, orientation and ranges.

The model gets slices of this project's version: its orientation and range are translated, nothing else.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ixi_etl.core.files import os_errors_as_user_errors, sha256_file, to_json
from ixi_etl.core.progress import Progress, no_progress
from ixi_etl.core.storage import DataRoot
from ixi_etl.dataset import metadata, versions
from ixi_etl.dataset.direction import parse_direction
from ixi_etl.dataset.store import open_arrays
from ixi_etl.errors import CheckpointError, ConfigError
from model import data
from model.evaluate import Evaluation, measure_and_write
from model.generator import Predictor

OWN_ORIENTATION = "AR"  # of the slices of a version: rows to the anterior, columns to the right
ORIENTATIONS = ("AR", "AL", "PR", "PL", "RA", "LA", "RP", "LP")
FLOAT = "tensor(float)"  # ONNX Runtime's name of float32


@dataclass(frozen=True)
class ForeignGenerator:
    """An ONNX model, and what its slices are like.

    Attributes:
        path: of the file.
        input_range, output_range: the values that black and white have.
        orientation: the directions in which its rows and its columns increase, of A, P, L and R. `AR` is this
            project's, `PL` the upright radiological picture.

    Raises:
        ConfigError: a range is empty or not finite, or the orientation does not name two axes.
    """

    path: Path
    input_range: tuple[float, float]
    output_range: tuple[float, float]
    orientation: str = OWN_ORIENTATION

    def __post_init__(self) -> None:
        for option, (low, high) in (("--input-range", self.input_range), ("--output-range", self.output_range)):
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ConfigError(f"{option} {low:g} {high:g}: give a lower and a higher number, for example -1 1")
        if self.orientation not in ORIENTATIONS:
            problem = f"--orientation {self.orientation}: give the directions of rows and columns"
            raise ConfigError(f"{problem}, which are {', '.join(ORIENTATIONS)}; AR is ours")

    @property
    def is_transposed(self) -> bool:
        """Whether its rows are our columns."""
        return self.orientation[0] in "LR"

    @property
    def flipped(self) -> list[int]:
        """Which dimensions of (B, 1, H, W) increase the other way than ours."""
        return [dimension for dimension, axis in zip((2, 3), self.orientation, strict=True) if axis in "PL"]

    def from_ours(self, images: Tensor) -> Tensor:
        """Our slices (B, 1, H, W), turned as the model takes them."""
        turned = images.transpose(2, 3) if self.is_transposed else images
        return turned.flip(self.flipped)

    def to_ours(self, images: Tensor) -> Tensor:
        """The inverse of `from_ours`."""
        turned = images.flip(self.flipped)
        return turned.transpose(2, 3) if self.is_transposed else turned


def load_predictor(generator: ForeignGenerator, height: int, width: int) -> Predictor:
    """The model on our slices of `height` x `width`, in [-1, 1].

    Raises:
        CheckpointError: the file is missing, or is not an ONNX model that takes and gives one such slice, of finite
            values.
    """
    import onnxruntime

    path = generator.path
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}; --generator takes an ONNX model")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised too
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of many types, without a common base
        problem = str(error).splitlines()[0]
        raise CheckpointError(f"{path} is not an ONNX model that can be loaded ({problem})") from error
    shape = (width, height) if generator.is_transposed else (height, width)
    batch = _check_interface(path, session, shape)
    name = session.get_inputs()[0].name
    (low, high), (output_low, output_high) = generator.input_range, generator.output_range

    def run(images: Tensor) -> Tensor:
        """Images (B, 1, H, W); a model of a fixed batch gets the last one as often as there are images missing."""
        size = batch or len(images)
        generated = []
        for part in images.split(size):
            filled = torch.cat([part, part[-1:].expand(size - len(part), -1, -1, -1)])
            try:
                (output,) = session.run(None, {name: filled.contiguous().numpy()})
            except Exception as error:
                problem = str(error).splitlines()[0]
                raise CheckpointError(f"{path} fails on slices of {shape[0]} x {shape[1]} ({problem})") from error
            if output.shape != filled.shape:
                problem = f"{path} makes {list(output.shape)} of {list(filled.shape)}"
                raise CheckpointError(f"{problem}; it must give one channel of the same size")
            if not np.isfinite(output).all():
                raise CheckpointError(f"{path} gives values that are not finite; it cannot be measured")
            generated.append(torch.from_numpy(output)[: len(part)])
        return torch.cat(generated)

    def predict(source: Tensor, _position: Tensor) -> Tensor:
        given = generator.from_ours((source.cpu() + 1) / 2 * (high - low) + low)
        made = generator.to_ours(run(given)).to(source.device)
        return (made - output_low) / (output_high - output_low) * 2 - 1

    run(torch.full((1, 1, *shape), float(low)))  # before hours of work, as a dynamic model shows its output only so
    return predict


def _check_interface(path: Path, session: Any, shape: tuple[int, int]) -> int | None:
    """The fixed batch of the model, or None. `shape` is that of its slices.

    Raises:
        CheckpointError: it has several inputs or outputs, other channels, sizes or types.
    """
    for kind, tensors in (("input", session.get_inputs()), ("output", session.get_outputs())):
        if len(tensors) != 1:
            names = ", ".join(tensor.name for tensor in tensors)
            raise CheckpointError(f"{path} has {len(tensors)} {kind}s ({names}); it must have one")
        (tensor,) = tensors
        if tensor.type != FLOAT:
            problem = f"the {kind} of {path} must be float32 (it is {tensor.type})"
            raise CheckpointError(f"{problem}; export the model in float32")
        expected = (1, *shape)
        is_other = [isinstance(n, int) and n != e for n, e in zip(tensor.shape[1:], expected, strict=False)]
        if tensor.shape and (len(tensor.shape) != 4 or any(is_other)):  # nothing is declared where it is empty
            found = " x ".join(str(n) for n in tensor.shape)
            wanted = f"batch x 1 x {shape[0]} x {shape[1]}"
            raise CheckpointError(f"the {kind} of {path} is {found}; the slices of the version need {wanted}")
    batch = next(iter(session.get_inputs()[0].shape), None)
    return batch if isinstance(batch, int) else None


@os_errors_as_user_errors()
def evaluate_foreign(
    root: str | Path,
    generator: ForeignGenerator,
    dataset: str,
    *,
    direction: str | None = None,
    split: str = "test",
    out: Path | None = None,
    scratch: Path | None = None,
    protocols: Sequence[str] | None = None,
    progress: Progress = no_progress,
) -> tuple[Path, Evaluation]:
    """Measure the model and the baselines on a split of `dataset`; return the folder of the files.

    `root` and `scratch` are as in `DataRoot`.

    Raises:
        CheckpointError: the file is missing, does not fit the slices of the version, or gives values that are not
            finite.
        ConfigError: the direction does not fit, or the version does not say where its slices point.
        DatasetError: the version does not exist or is damaged, or the split has no subjects.
    """
    name, wanted = versions.parse_version(dataset)
    data_root = DataRoot(root, name, scratch)
    version = versions.resolve_version(data_root, wanted)
    folder = data_root.version(version)
    described = metadata.read_metadata(folder)
    parsed = parse_direction(direction, described)
    if len(parsed.sources) != 1:
        raise ConfigError(f"--direction {parsed}: a foreign generator takes one source")
    is_anatomical = described["inputs"]["config"].get("pairing") == "anatomical"
    if generator.orientation != OWN_ORIENTATION and not is_anatomical:
        raise ConfigError(f"--orientation {generator.orientation}: slices of {name}@{version} have no known directions")
    load = partial(data.load_pairs, folder, direction=str(parsed))
    predict = load_predictor(generator, *open_arrays(folder)[parsed.target].shape[-2:])
    digest = sha256_file(generator.path)
    settings = {
        "input_range": [float(value) for value in generator.input_range],
        "output_range": [float(value) for value in generator.output_range],
        "orientation": generator.orientation,
        "direction": str(parsed),
    }
    settings_hash = hashlib.sha256(to_json(settings).encode()).hexdigest()
    folder_name = f"{generator.path.stem}-{digest[:8]}-{version}-{settings_hash[:8]}"
    out = out or data_root.local / "evaluations" / folder_name
    record = {
        "weights": generator.path.name,
        "weights_sha256": digest,
        "dataset": f"{name}@{version}",
        **settings,
    }
    path = out / f"evaluation-{split}"
    return out, measure_and_write(path, folder, load, split, predict, record, protocols, progress)
