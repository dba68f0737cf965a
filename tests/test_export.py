"""What is exported gives the slices that the original gives, on batches of any size, or is not written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed; pip install -c constraints.txt -e '.[train]'")

from flows.cli import main  # noqa: E402
from model import checkpoint, export  # noqa: E402
from model.config import TrainConfig  # noqa: E402
from model.evaluate import load_generator  # noqa: E402
from model.export import ExportError  # noqa: E402
from model.learner import build_generator  # noqa: E402
from model.networks import UNetGenerator  # noqa: E402
from model.planes import BINS  # noqa: E402
from model.synthesize import find_generator  # noqa: E402


def write_generator(folder: Path, upsampling: str, **recorded: str) -> Path:
    """A small generator, trained (so it says) on planes of 48 x 32, which its side of 32 does not divide."""
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
    facts = {"step": 7, "config": config.model_dump(mode="json"), "validation": {}, "planes": planes, **recorded}
    path = folder / "run" / "generator.safetensors"
    checkpoint.save(path, build_generator(config).state_dict(), facts)
    return path


LICENCE = {"licence": "a licence", "credit": "somebody"}


@pytest.fixture
def generator(tmp_path: Path) -> Path:
    return write_generator(tmp_path, "transpose", **LICENCE)


class Exported(NamedTuple):
    original: Path
    path: Path
    difference: float
    recorded: bool
    """Whether the original has a licence and a credit; the file of an older version has none."""


# A second export takes seconds.
@pytest.fixture(
    scope="module",
    params=[("transpose", True), pytest.param(("nearest", False), marks=pytest.mark.stack)],
    ids=["transpose", "nearest-older"],
)
def exported(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A generator of each kind, as ONNX; tests only read it."""
    pytest.importorskip("onnxruntime", reason="pip install -c constraints.txt -e '.[export]'")
    upsampling, recorded = request.param
    folder = tmp_path_factory.mktemp("exported")
    original = write_generator(folder, upsampling, **(LICENCE if recorded else {}))
    return Exported(original, *export.export(original, "onnx", folder / "out"), recorded)


def slices(batch: int) -> Any:
    return torch.rand((batch, 1, 48, 32), generator=torch.Generator().manual_seed(batch)) * 2 - 1


@pytest.mark.parametrize("upsampling", ["transpose", "nearest"])
def test_safetensors_are_the_same_weights_and_say_the_same(upsampling: str, tmp_path: Path) -> None:
    generator = write_generator(tmp_path, upsampling, **LICENCE)
    path, difference = export.export(generator, "safetensors", tmp_path / "out")
    assert difference == 0
    assert checkpoint.read_facts(path) == checkpoint.read_facts(generator)
    wanted, got = (load_generator(p)[0].state_dict() for p in (generator, path))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert find_generator(tmp_path / "no root", str(tmp_path / "out")) == path
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (said["step"], said["config"]["width"], said["input"]["shape"]) == (7, 4, ["batch", 1, 48, 32])


def test_onnx_gives_the_same_slices_for_any_batch(exported: Exported) -> None:
    import onnxruntime

    path = exported.path
    assert exported.difference <= export.TOLERANCE
    session = onnxruntime.InferenceSession(path)
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape[1:]) == ("source", "tensor(float)", [1, 48, 32])
    original = load_generator(exported.original)[0]
    for batch in (1, 2, 5):
        (got,) = session.run(["generated"], {"source": slices(batch).numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(got, original.whole(slices(batch)).numpy(), atol=1e-5)


def test_an_onnx_file_says_what_it_takes_and_whose_it_is(exported: Exported, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="pip install -c constraints.txt -e '.[export]'")
    path, recorded = exported.path, exported.recorded
    model = onnx.load(path)
    said = {prop.key: prop.value for prop in model.metadata_props}
    assert said["direction"] == "t1->t2"
    assert said["dataset"] == "ixi-t1-t2@0123"
    assert json.loads(said["input_range"]) == json.loads(said["output_range"]) == [-1, 1]
    assert "percentiles 0.1 and 99.9" in said["normalisation"]
    assert json.loads(said["planes"])["spacing_mm"] == [1, 1]
    assert json.loads(said["config"])["width"] == 4
    assert said["licence"] == ("a licence" if recorded else "not recorded; that of ixi-t1-t2@0123")
    assert said["credit"] == ("somebody" if recorded else "not recorded; that of ixi-t1-t2@0123")
    for part in (said["direction"], said["dataset"], said["normalisation"], said["licence"], said["credit"]):
        assert part in model.doc_string
    assert model.producer_name == "ixi-etl"
    config = json.loads((path.parent / "config.json").read_text())
    assert ("licence" in config) is recorded
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_what_gives_other_slices_is_not_written(
    generator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrongly(source: Path, network: UNetGenerator, shape: tuple[int, int], said: Any, path: Path) -> Any:
        path.write_bytes(b"weights of another")
        return lambda source: network.whole(source) + 0.01

    monkeypatch.setattr(export, "_write_onnx", wrongly)
    with pytest.raises(ExportError, match=r"would give other slices than .*, by up to 0.01"):
        export.export(generator, "onnx", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_command_says_what_it_wrote(generator: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*arguments: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main(["export", *arguments])
        return int(ended.value.code or 0)

    assert command(str(generator), "--format", "safetensors", "-o", str(tmp_path / "out")) == 0
    assert "its slices differ from the original's by 0.0e+00" in capsys.readouterr().out
    assert command(str(generator), "--format", "safetensors", "-o", str(generator.parent)) == 1
    assert "is the generator itself; give another -o" in capsys.readouterr().err
    assert command("zz", "-o", str(tmp_path), "--root", str(tmp_path)) == 1
    assert "there is no run zz" in capsys.readouterr().err
