"""A command whose optional packages are missing names the extra before any other work."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from flows.cli import main
from ixi_etl.core import extras
from ixi_etl.errors import MissingExtraError
from ixi_etl.exports.syndiff import SynDiff

PROJECT = Path(__file__).parents[2]
COMMANDS = {
    "train": [],
    "evaluate": [],
    "synthesize": ["latest", "x.nii", "-o", "y.nii"],
    "export": ["latest", "-o", "out"],
    "demo": ["--folder", "demo"],
    "refresh": ["--then-train", "smoke", "--source", "nowhere"],
}


def hide_modules(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Simulate that modules are not installed."""
    original = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in modules else original(name, package)

    monkeypatch.setattr(extras, "find_spec", find_spec)


def run_command(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    output = capsys.readouterr()
    return int(ended.value.code or 0), output.out, output.err


@pytest.mark.parametrize("name", COMMANDS)
def test_missing_extra_is_named_before_any_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    hide_modules(monkeypatch, *extras.EXTRAS["train"])
    code, out, err = run_command(name, *COMMANDS[name], capsys=capsys)
    assert (code, out) == (2, "")
    assert err.startswith("error: this needs packages that are not installed (torch, ")
    assert 'pip install "ixi-etl[train]"' in err
    assert 'pip install -c constraints.txt -e ".[train]"' in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("torch")
def test_missing_onnx_names_the_export_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hide_modules(monkeypatch, "onnxscript")
    code, _, err = run_command("export", "latest", "-o", str(tmp_path / "out"), capsys=capsys)
    assert (code, 'not installed (onnxscript); run: pip install "ixi-etl[export]"' in err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_each_export_needs_only_its_own_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not set(extras.EXTRAS["mat"]) & set(extras.EXTRAS["export"])
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "h5py" else object())
    extras.require_extra("export")
    with pytest.raises(MissingExtraError, match=r"\(h5py\).*ixi-etl\[mat\]"):
        extras.require_extra("mat")
    monkeypatch.setattr(extras, "find_spec", lambda name: object() if name == "h5py" else None)
    extras.require_extra("mat")
    assert SynDiff.extra == "mat"


MODULES = ("datasets.py", "runs.py", "evaluations.py", "demo.py")


def test_every_command_that_needs_torch_checks_the_extra() -> None:
    """Every command whose code imports the training calls `require_extra`."""
    source = "\n".join((PROJECT / "flows" / "cli" / name).read_text() for name in MODULES)
    for body in source.split("@app.command()")[1:]:
        name = body.split("def ")[1].split("(")[0]
        if "from model" in body or "train_pix2pix" in body or "run_training(" in body:
            assert "require_extra" in body, name


def test_extras_match_pyproject() -> None:
    declared = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, modules in extras.EXTRAS.items():
        names = {requirement.split(">")[0].split("=")[0] for requirement in declared[extra]}
        assert {"scikit-image" if module == "skimage" else module for module in modules} == names


def test_configuration_is_validated_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import model.config; model.config.preset('smoke')"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("target", "installed"), [("deploy", "base"), ("demo", "train")])
def test_make_installs_only_what_a_target_needs(target: str, installed: str) -> None:
    command = ["make", "--dry-run", target, "VENV=no-environment"]
    output = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    assert f"requirements/install.py {installed}\n" in output
