"""The generator, to be used elsewhere: as safetensors or as ONNX, with a config.json that says what it takes and gives.

What was written is read back and compared with the original before it gets its name.
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
from ixi_etl.errors import IxiError
from ixi_etl.extras import require_extra
from ixi_etl.files import to_json, write_atomic
from model import checkpoint, planes
from model.config import TrainConfig
from model.evaluate import load_generator
from model.networks import UNetGenerator
from model.planes import Planes
from model.train import GENERATOR

Format = Literal["safetensors", "onnx"]
ONNX = "generator.onnx"
NORMALISATION = "percentiles 0.1 and 99.9 of the subject's slab become -1 and 1; clipped"
TOLERANCE = 1e-4
"""Of outputs in [-1, 1]: torch and ONNX Runtime add up in another order, and differ by some 1e-6."""


class ExportError(IxiError):
    """A generator cannot be exported, or what was exported is not the generator."""


def export(generator: Path, form: Format, out: Path) -> tuple[Path, float]:
    """Write the generator of the file `generator` and config.json into the folder `out`.

    Returns:
        The file, and the largest difference to the original's output, over batches of 1 and 3 slices of noise.

    Raises:
        ExportError: something is missing, or what was written differs by more than `TOLERANCE`.
    """
    if form == "onnx":
        require_extra("export")
    network, config, step = load_generator(generator)
    facts = checkpoint.read_facts(generator)
    trained_on = planes.of(generator, facts)
    shape = trained_on.shape if trained_on else (network.side, network.side)
    out.mkdir(parents=True, exist_ok=True)
    path, write = (out / GENERATOR, _write_safetensors) if form == "safetensors" else (out / ONNX, _write_onnx)
    if path.resolve() == generator.resolve():
        raise ExportError(f"{path} is the generator itself; give another -o")
    part = path.with_name(f".part-{path.name}")
    said = _describe(config, step, trained_on, shape) | {k: facts[k] for k in ("licence", "credit") if k in facts}
    try:
        generate = write(generator, network, shape, said, part)
        difference = _difference(network, generate, shape)
        if not difference <= TOLERANCE:
            raise ExportError(f"{path} would give other slices than {generator}, by up to {difference:g}: not written")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    write_atomic(out / "config.json", to_json(said))
    return path, difference


def _describe(config: TrainConfig, step: int, trained_on: Planes | None, shape: tuple[int, int]) -> dict[str, Any]:
    """What somebody who has only the exported file must know to use it."""
    return {
        "config": config.model_dump(mode="json"),
        "step": step,
        "planes": trained_on.model_dump(mode="json") if trained_on else None,
        "input": {
            "name": "source",
            "dtype": "float32",
            "shape": ["batch", 1, *shape],
            "range": [-1, 1],
            "normalisation": NORMALISATION,
        },
        "output": {"name": "generated", "dtype": "float32", "shape": ["batch", 1, *shape], "range": [-1, 1]},
    }


def _metadata(said: Mapping[str, Any]) -> dict[str, str]:
    """The same as ONNX holds it: names and texts. What is no text is JSON."""
    config = said["config"]
    source, target = said["input"], said["output"]
    texts = {
        "direction": config["direction"],
        "dataset": config["dataset"],
        "step": said["step"],
        "input_range": source["range"],
        "output_range": target["range"],
        "axes": "[batch, 1, y, x]; y to the Anterior, x to the Right" if said["planes"] else "[batch, 1, y, x]",
        "normalisation": source["normalisation"],
        "planes": said["planes"],
        "licence": said.get("licence", f"not recorded; that of {config['dataset']}"),
        "credit": said.get("credit", f"not recorded; that of {config['dataset']}"),
        "config": config,
    }
    return {name: text if isinstance(text, str) else json.dumps(text, sort_keys=True) for name, text in texts.items()}


def _doc(metadata: Mapping[str, str]) -> str:
    return (
        f"pix2pix generator, {metadata['direction']}, trained on {metadata['dataset']}. Takes and gives float32 slices "
        f"{metadata['axes']}, in {metadata['input_range']}: {metadata['normalisation']}. "
        f"Licence: {metadata['licence']}. Credit: {metadata['credit']}. "
        "Its output is drawn by a network: no measurement, and nothing to diagnose from."
    )


def _write_safetensors(
    generator: Path, _network: UNetGenerator, _shape: tuple[int, int], _said: Mapping[str, Any], path: Path
) -> Callable[[Tensor], Tensor]:
    checkpoint.save(path, *checkpoint.load(generator))
    return load_generator(path)[0].whole


class _Whole(nn.Module):
    """The generator as it is used in synthesis: on whole slices."""

    def __init__(self, generator: UNetGenerator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, source: Tensor) -> Tensor:
        return self.generator.whole(source)


def _write_onnx(
    _generator: Path, network: UNetGenerator, shape: tuple[int, int], said: Mapping[str, Any], path: Path
) -> Callable[[Tensor], Tensor]:
    import onnx
    import onnxruntime

    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():  # torch's exporter warns of itself
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Whole(network).eval(),
            (torch.zeros(2, 1, *shape),),  # two, since a one would be taken for a constant
            dynamo=True,
            input_names=["source"],
            output_names=["generated"],
            dynamic_shapes={"source": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    assert program is not None
    metadata = _metadata(said)
    program.model.metadata_props.update(metadata)
    program.model.doc_string = _doc(metadata)
    program.model.producer_name, program.model.producer_version = "ixi-etl", __version__
    program.save(path)
    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda source: torch.from_numpy(session.run(None, {"source": source.numpy()})[0])


@torch.no_grad()
def _difference(network: UNetGenerator, generate: Callable[[Tensor], Tensor], shape: tuple[int, int]) -> float:
    noise = torch.Generator().manual_seed(0)
    furthest = 0.0
    for batch in (1, 3):
        source = torch.rand((batch, 1, *shape), generator=noise) * 2 - 1
        furthest = max(furthest, float((generate(source) - network.whole(source)).abs().max()))
    return furthest
