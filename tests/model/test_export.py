"""An exported generator computes the output of the original, for batches of any size, or is not written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from flows.cli import main
from ixi_etl.errors import ExportError
from model import checkpoint, export
from model.config import TrainConfig
from model.generator import build_generator, load_generator
from model.networks import UNetGenerator
from model.planes import BINS
from model.synthesize import find_generator


def write_generator(folder: Path, upsampling: str, **recorded: str) -> Path:
    """A small generator of side 32, with metadata of training planes of 48 x 32, not a multiple of the side."""
    config = TrainConfig.model_validate(
        {"side": 32, "width": 4, "upsampling": upsampling, "dataset": "ixi-t1-t2@0123", "direction": "t1->t2"}
    )
    torch.manual_seed(0)
    planes = {
        "shape": [48, 32],
        "spacing_mm": [1.0, 1.0],
        "slab_mm": 80.0,
        "slab_offset_mm": 0.0,
        "source_spacing_mm": [1.0, 1.0, 1.0],
        "target_low_high": [0.0, 900.0],
        "source_histogram": [0.0] * BINS,
        "target_histogram": [0.0] * BINS,
    }
    metadata = {"step": 7, "config": config.model_dump(mode="json"), "validation": {}, "planes": planes, **recorded}
    path = folder / "run" / "generator.safetensors"
    checkpoint.save(path, build_generator(config).state_dict(), metadata)
    return path


LICENCE = {"licence": "a licence", "credit": "its authors"}


@pytest.fixture
def generator(tmp_path: Path) -> Path:
    return write_generator(tmp_path, "transpose", **LICENCE)


class Exported(NamedTuple):
    original: Path
    path: Path
    difference: float
    recorded: bool
    """Whether the original records licence and credit; files of older versions do not."""


# The second export takes seconds, so it is left to `make test-stack`.
@pytest.fixture(
    scope="module",
    params=[("transpose", True), pytest.param(("nearest", False), marks=pytest.mark.stack)],
    ids=["transpose", "nearest-older"],
)
def exported(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A generator with each kind of upsampling, as ONNX; tests only read it."""
    pytest.importorskip("onnxruntime", reason="pip install -c constraints.txt -e '.[export]'")
    upsampling, recorded = request.param
    folder = tmp_path_factory.mktemp("exported")
    original = write_generator(folder, upsampling, **(LICENCE if recorded else {}))
    return Exported(original, *export.export(original, "onnx", folder / "out"), recorded)


def slices(batch: int) -> Any:
    return torch.rand((batch, 1, 48, 32), generator=torch.Generator().manual_seed(batch)) * 2 - 1


@pytest.mark.parametrize("upsampling", ["transpose", "nearest"])
def test_safetensors_have_equal_weights_and_metadata(upsampling: str, tmp_path: Path) -> None:
    generator = write_generator(tmp_path, upsampling, **LICENCE)
    path, difference = export.export(generator, "safetensors", tmp_path / "out")
    assert difference == 0
    assert checkpoint.read_metadata(path) == checkpoint.read_metadata(generator)
    wanted, got = (load_generator(p)[0].state_dict() for p in (generator, path))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert find_generator(tmp_path / "no root", str(tmp_path / "out")) == path
    description = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (description["step"], description["config"]["width"], description["inputs"][0]["shape"]) == (
        7,
        4,
        ["batch", 1, 48, 32],
    )


def test_onnx_generates_equal_slices_for_any_batch_size(exported: Exported) -> None:
    import onnxruntime

    path = exported.path
    assert exported.difference <= export.TOLERANCE
    session = onnxruntime.InferenceSession(path)
    (model_input,) = session.get_inputs()
    assert (model_input.name, model_input.type, model_input.shape[1:]) == ("source", "tensor(float)", [1, 48, 32])
    original = load_generator(exported.original)[0]
    for batch in (1, 2, 5):
        (got,) = session.run(["generated"], {"source": slices(batch).numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(got, original.forward_padded(slices(batch)).numpy(), atol=1e-5)


def test_an_onnx_file_describes_its_input_licence_and_credit(exported: Exported, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="pip install -c constraints.txt -e '.[export]'")
    path, recorded = exported.path, exported.recorded
    model = onnx.load(path)
    properties = {prop.key: prop.value for prop in model.metadata_props}
    assert properties["direction"] == "t1->t2"
    assert properties["dataset"] == "ixi-t1-t2@0123"
    assert json.loads(properties["input_range"]) == json.loads(properties["output_range"]) == [-1, 1]
    assert "percentiles 0.1 and 99.9" in properties["normalisation"]
    assert json.loads(properties["planes"])["spacing_mm"] == [1, 1]
    assert json.loads(properties["config"])["width"] == 4
    assert properties["licence"] == ("a licence" if recorded else "not recorded; that of ixi-t1-t2@0123")
    assert properties["credit"] == ("its authors" if recorded else "not recorded; that of ixi-t1-t2@0123")
    for text in (
        properties["direction"],
        properties["dataset"],
        properties["normalisation"],
        properties["licence"],
        properties["credit"],
    ):
        assert text in model.doc_string
    assert model.producer_name == "ixi-etl"
    config = json.loads((path.parent / "config.json").read_text())
    assert ("licence" in config) is recorded
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_an_export_with_different_output_is_not_written(
    generator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_other_weights(
        source: Path, network: UNetGenerator, shape: tuple[int, int], description: Any, path: Path
    ) -> Any:
        path.write_bytes(b"other weights")
        return lambda source: network.forward_padded(source) + 0.01

    monkeypatch.setattr(export, "_write_onnx", write_other_weights)
    with pytest.raises(ExportError, match=r"its output differs from that of .* by up to 0.01"):
        export.export(generator, "onnx", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_command_reports_difference_and_errors(
    generator: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*arguments: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main(["export", *arguments])
        return int(ended.value.code or 0)

    assert command(str(generator), "--format", "safetensors", "-o", str(tmp_path / "out")) == 0
    assert "slices differ from the original by at most 0.0e+00" in capsys.readouterr().out
    assert command(str(generator), "--format", "safetensors", "-o", str(generator.parent)) == 1
    assert "is the generator itself; give another -o" in capsys.readouterr().err
    assert command("zz", "-o", str(tmp_path), "--root", str(tmp_path)) == 1
    assert "there is no run zz" in capsys.readouterr().err
