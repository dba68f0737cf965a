"""Export a generator for use elsewhere, as safetensors or ONNX, with a config.json that describes input and output.

Each file is read back and its output compared with the original's before it gets its final name.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ixi_etl import __version__
from ixi_etl.core.extras import require_extra
from ixi_etl.core.files import to_json, write_atomic
from ixi_etl.errors import ExportError
from ixi_etl.scans.intensity import describe_normalisation
from model import checkpoint, planes
from model.config import TrainConfig
from model.generator import GENERATOR_FILE, load_generator
from model.networks import UNetGenerator
from model.planes import PlaneSummary

Format = Literal["safetensors", "onnx"]
ONNX = "generator.onnx"
TOLERANCE = 1e-4
"""Largest difference of outputs in [-1, 1]: torch and ONNX Runtime sum in another order and differ by about 1e-6."""


def export(generator: Path, file_format: Format, out: Path) -> tuple[Path, float]:
    """Write the generator in the file `generator`, and config.json, into the folder `out`.

    Returns:
        The file, and the largest difference from the original's output, over batches of 1 and 3 slices of noise.

    Raises:
        CheckpointError: the generator is missing or damaged.
        ExportError: `out` would overwrite the generator, or the outputs differ by more than `TOLERANCE`.
    """
    if file_format == "onnx":
        require_extra("export")
    network, config, step = load_generator(generator)
    metadata = checkpoint.read_metadata(generator)
    trained_on = planes.parse(generator, metadata)
    shape = trained_on.shape if trained_on else metadata["slice_shape"] or (network.multiple, network.multiple)
    out.mkdir(parents=True, exist_ok=True)
    path = out / (GENERATOR_FILE if file_format == "safetensors" else ONNX)
    write = _write_safetensors if file_format == "safetensors" else _write_onnx
    if path.resolve() == generator.resolve():
        raise ExportError(f"{path} is the generator itself; give another -o")
    part = path.with_name(f".part-{path.name}")
    normalisation = f"{describe_normalisation(metadata['normalisation'])} become -1 and 1; clipped"
    description = _describe(config, step, trained_on, shape, _inputs(config, file_format), normalisation)
    description |= {k: metadata[k] for k in ("licence", "credit") if k in metadata}
    try:
        predict = write(generator, network, shape, description, part)
        difference = _difference(network, predict, shape)
        if not difference <= TOLERANCE:
            raise ExportError(
                f"{path} not written: its output differs from that of {generator} by up to {difference:g}"
            )
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    write_atomic(out / "config.json", to_json(description))
    return path, difference


def _describe(
    config: TrainConfig,
    step: int,
    trained_on: PlaneSummary | None,
    shape: tuple[int, int],
    inputs: Mapping[str, list[dict[str, Any]]],
    normalisation: str,
) -> dict[str, Any]:
    """The contents of config.json: what a user of the exported file needs to know."""
    return {
        "config": config.model_dump(mode="json"),
        "step": step,
        "planes": trained_on.model_dump(mode="json") if trained_on else None,
        "inputs": [
            {
                "name": name,
                "dtype": "float32",
                "shape": ["batch", len(channels), *shape],
                "channels": channels,
                "range": [-1, 1],
                "normalisation": normalisation,
            }
            for name, channels in inputs.items()
        ],
        "output": {"name": "generated", "dtype": "float32", "shape": ["batch", 1, *shape], "range": [-1, 1]},
    }


def _inputs(config: TrainConfig, file_format: Format) -> dict[str, list[dict[str, Any]]]:
    """The inputs of the exported file, and of each its channels: source, and offset in slices to the superior.

    ONNX has one input for each of several sources, named after it; otherwise there is one, `source`.
    """
    channels = [{"source": source, "slice_offset": offset} for source, offset in config.channels]
    names = list(dict.fromkeys(source for source, _ in config.channels))
    if file_format == "safetensors" or len(names) == 1:
        return {"source": channels}
    return {name: [channel for channel in channels if channel["source"] == name] for name in names}


def _onnx_metadata(description: Mapping[str, Any]) -> dict[str, str]:
    """The description as the string properties of an ONNX model; other values than strings become JSON."""
    config = description["config"]
    sources, target = description["inputs"], description["output"]
    orientation = "; x increases to the right, y to anterior (RAS+)" if description["planes"] else ""
    texts = {
        "direction": config["direction"],
        "dataset": config["dataset"],
        "step": description["step"],
        "inputs": [{"name": source["name"], "channels": source["channels"]} for source in sources],
        "input_range": sources[0]["range"],
        "output_range": target["range"],
        "axes": f"[batch, channel, y, x]{orientation}",
        "normalisation": sources[0]["normalisation"],
        "planes": description["planes"],
        "licence": description.get("licence", f"not recorded; that of {config['dataset']}"),
        "credit": description.get("credit", f"not recorded; that of {config['dataset']}"),
        "config": config,
    }
    return {name: text if isinstance(text, str) else json.dumps(text, sort_keys=True) for name, text in texts.items()}


def _onnx_doc(metadata: Mapping[str, str]) -> str:
    """The doc string of the ONNX model."""
    return (
        f"pix2pix generator, {metadata['direction']}, trained on {metadata['dataset']}. Input and output are float32 "
        f"slices {metadata['axes']}, in {metadata['input_range']}: {metadata['normalisation']}. "
        f"Licence: {metadata['licence']}. Credit: {metadata['credit']}. "
        "Its output is generated by a neural network: it is not a measurement and must not be used for diagnosis."
    )


def _write_safetensors(
    generator: Path, _network: UNetGenerator, _shape: tuple[int, int], _description: Mapping[str, Any], path: Path
) -> Callable[[Tensor], Tensor]:
    """Copy the generator's file to `path`; return the function that the copy computes."""
    checkpoint.save(path, *checkpoint.load(generator))
    return load_generator(path)[0].forward_padded


class _PaddedGenerator(nn.Module):
    """The generator on slices of any size, as synthesis uses it, from a tensor of each source."""

    def __init__(self, generator: UNetGenerator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, *sources: Tensor) -> Tensor:
        return self.generator.forward_padded(sources[0] if len(sources) == 1 else torch.cat(sources, 1))


def _write_onnx(
    _generator: Path, network: UNetGenerator, shape: tuple[int, int], description: Mapping[str, Any], path: Path
) -> Callable[[Tensor], Tensor]:
    """Write the ONNX model to `path`; return the function that ONNX Runtime computes from it."""
    import onnx
    import onnxruntime

    channels = {source["name"]: source["shape"][1] for source in description["inputs"]}
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():  # torch.onnx.export warns about its own code
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _PaddedGenerator(network).eval(),
            # A batch of 1 would be exported as a constant.
            tuple(torch.zeros(2, count, *shape) for count in channels.values()),
            dynamo=True,
            input_names=list(channels),
            output_names=["generated"],
            dynamic_shapes={"sources": ({0: torch.export.Dim("batch")},) * len(channels)},
            verbose=False,
        )
    assert program is not None
    metadata = _onnx_metadata(description)
    program.model.metadata_props.update(metadata)
    program.model.doc_string = _onnx_doc(metadata)
    program.model.producer_name, program.model.producer_version = "ixi-etl", __version__
    program.save(path)
    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def predict(source: Tensor) -> Tensor:
        parts = source.split(list(channels.values()), 1)
        return torch.from_numpy(session.run(None, {k: v.numpy() for k, v in zip(channels, parts, strict=True)})[0])

    return predict


@torch.no_grad()
def _difference(network: UNetGenerator, exported: Callable[[Tensor], Tensor], shape: tuple[int, int]) -> float:
    """Largest difference between the outputs of both, over batches of 1 and 3 slices of noise."""
    noise = torch.Generator().manual_seed(0)
    furthest = 0.0
    for batch in (1, 3):
        source = torch.rand((batch, network.in_channels, *shape), generator=noise) * 2 - 1
        furthest = max(furthest, float((exported(source) - network.forward_padded(source)).abs().max()))
    return furthest
