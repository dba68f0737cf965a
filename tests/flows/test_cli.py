"""Every command has help and is in the README; user errors print one line; slow imports are deferred."""

from __future__ import annotations

import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import typer
from conftest import SMALL_NETWORKS
from typer.testing import CliRunner

import ixi_etl
from flows.cli import app, import_commands, main
from flows.cli.app import COMMANDS as COMMANDS_OF_MODULES
from flows.presets import Preset
from ixi_etl import __version__
from ixi_etl.config import DatasetConfig
from ixi_etl.core.files import to_json
from ixi_etl.dataset import versions
from ixi_etl.dataset.metadata import with_digest
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.preparations import PRESETS

TOP = Path(__file__).parents[2]
README = (TOP / "README.md").read_text()
import_commands()
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    output = capsys.readouterr()
    return int(ended.value.code or 0), output.out, output.err


def root_of(published: PublishedVersion) -> str:
    return str(published.folder.parents[2])


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help_and_is_in_the_readme(name: str) -> None:
    assert COMMANDS[name].help
    for parameter in COMMANDS[name].params:
        assert getattr(parameter, "help", None) or parameter.name == "help", f"{name} {parameter.name} has no help"
    assert {"--quiet", "--json"} <= {option for parameter in COMMANDS[name].params for option in parameter.opts}
    assert f"ixi-etl {name}" in README
    assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0


def test_every_command_in_the_readme_exists() -> None:
    assert set(re.findall(r"ixi-etl ([a-z]+(?:-[a-z]+)*)", README)) == set(COMMANDS)


def test_survey_prints_and_writes_a_table_and_a_chart(
    archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run("survey", "--source", str(archives), "--out", str(tmp_path / "s"), capsys=capsys)
    assert code == 0
    assert "38 (modal)" in out
    assert "README.txt" in out
    assert "38 (modal)" in (tmp_path / "s/depths.svg").read_text()
    assert (tmp_path / "s/survey.csv").read_text().count("\n") >= 36


def test_survey_of_one_tar_reads_only_that_tar(
    archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run("survey", "--source", str(archives / "IXI-T2.tar"), "--out", str(tmp_path), capsys=capsys)
    assert code == 0
    assert "T2" in out
    assert "T1 " not in out


def test_check_official_names_the_published_facts_that_differ(
    archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(archives / "IXI-T1.tar")  # the other one is beside it
    code, out, err = run("check-official", "--source", source, "--root", str(tmp_path), "--quiet", capsys=capsys)
    assert code == 1
    assert re.search(r"DIFFERS +T1 volumes +581 +\d+", out)
    assert re.search(r"agrees +T1 orientation as stored +PSR in all", out)
    assert err.startswith("error: ")
    assert re.search(r"\d+ of 25 published facts differ: T1 volumes; T2 volumes", err)
    assert "excluded as missing_t2" in out
    assert err.count("\n") == 1


def test_check_official_needs_archives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run("check-official", "--root", str(tmp_path), capsys=capsys)
    assert (code, "has no archives yet; run `ixi-etl refresh`" in err) == (1, True)


def test_verify_and_versions_report_on_a_published_version(
    published: PublishedVersion, capsys: pytest.CaptureFixture[str]
) -> None:
    root = root_of(published)
    code, out, _ = run("verify", "--deep", "--root", root, capsys=capsys)
    assert (code, "is intact (every byte checked)" in out) == (0, True)
    code, out, _ = run("versions", "--root", root, capsys=capsys)
    assert (code, f"{published.version} (latest)" in out) == (0, True)
    for old_new in ((published.version[:5], "latest"), (f"ixi-t1-t2@{published.version[:5]}",)):
        code, out, _ = run("versions", *old_new, "--root", root, capsys=capsys)
        assert (code, "have the same subjects" in out) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["survey", "--source", "foo://x"], "cannot read 'foo://x': give a folder, or a URL of http, https or s3"),
        (["survey", "--source", "github://a/b"], "cannot read 'github://a/b': give a folder, or a URL of http, https"),
        (["survey", "--source", "~nobody-here/x"], "~nobody-here/x: no such user; give the full path"),
        (["refresh", "--source", "~nobody-here/x"], "~nobody-here/x: no such user; give the full path"),
        (["refresh", "--root", "~nobody-here/x"], "~nobody-here/x: no such user; give the full path"),
        (["refresh", "--scratch", "~nobody-here/x"], "~nobody-here/x: no such user; give the full path"),
        (["refresh", "--demographics", "~nobody-here/x"], "~nobody-here/x: no such user; give the full path"),
        (["digits", "--root", "/tmp/a::b"], "/tmp/a::b contains ::, which Zarr cannot open"),
        (["verify", "--root", "/tmp/a::b"], "/tmp/a::b contains ::, which Zarr cannot open"),
        (["refresh", "--root", "gs://bucket/x"], "neither a folder nor s3://bucket/prefix"),
        (["refresh", "--preset", "paper", "--registration", "rigid"], "registration must be none"),
        (["survey", "--source", "/nowhere"], "/nowhere/IXI-T1.tar is not there"),
        (["survey", "--source", "/nowhere/brains.tar"], "cannot tell T1 from T2"),
        (["survey", "--root", "/nowhere"], "no archives yet"),
        (["verify", "--root", "/nowhere"], "no published version"),
        (["versions", "--root", "/nowhere"], "no published version"),
        (["verify", "abc", "--root", "/nowhere"], "there is no version abc"),
        (["verify", "digits@latest", "--root", "/nowhere"], "run `ixi-etl digits` first"),
        (
            ["verify", "brains@latest"],
            "there is no dataset brains; give ixi-t1-t2@latest, digits@latest",
        ),
        (["verify", "digits@"], "digits@ names no version"),
        (["versions", "digits@3f2a", "latest"], "are versions of different datasets"),
        (["refresh", "--window", "20", "10"], "window"),
        (["refresh", "--window", "-5", "10"], "window"),
    ],
)
def test_user_error_prints_one_line_without_a_traceback(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(*arguments, capsys=capsys)
    assert code in (1, 2, 3)  # test_each_class_of_error_has_its_exit_code checks which one
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("inputs", ["{}", '{"config": 5}', '{"config": {}, "x": NaN}'])
def test_invalid_metadata_prints_one_line(
    inputs: str, published: PublishedVersion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(published.folder.parents[2], tmp_path / "root")
    metadata = tmp_path / "root/datasets/ixi-t1-t2" / published.version / "dataset.json"
    metadata.write_text(metadata.read_text().replace('"inputs": {', f'"inputs": {inputs}, "others": {{'))
    for command, status, lines in (("versions", 0, 1), ("verify", 1, 1)):  # `versions` still lists the other versions
        code, _, err = run(command, "--root", str(tmp_path / "root"), capsys=capsys)
        assert (code, "dataset.json is missing, damaged" in err) == (status, True)
        assert err.count("\n") == lines


def test_verify_accepts_the_folder_of_a_copy(
    published: PublishedVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    same, renamed = tmp_path / "a" / published.version, tmp_path / "copied @home"
    for copy in (same, renamed):
        shutil.copytree(published.folder, copy)
    (tmp_path / "link").symlink_to(same)
    monkeypatch.chdir(tmp_path)
    for given in (str(same), f"a/{published.version}/", "link", "./link"):
        code, out, _ = run("verify", "--deep", given, "--root", "/nowhere", capsys=capsys)
        assert (code, f"{same} is intact" in out, "it is a copy of" in out) == (0, True, False)
        assert f"ixi-t1-t2@{published.version}, made by ixi-etl" in out
    code, out, _ = run("verify", "copied @home", capsys=capsys)
    assert (code, f"it is a copy of ixi-t1-t2@{published.version}" in out) == (0, True)
    code, out, _ = run("versions", str(same), "copied @home", capsys=capsys)
    assert (code, "same inputs, configuration and software" in out) == (0, True)
    (renamed / "manifest.csv").write_text("")
    code, _, err = run("verify", "copied @home", capsys=capsys)
    assert (code, "copy it again from an intact copy" in err) == (1, True)
    for wrong, message in (("./none", "none is not a folder"), ("./a", "a has no dataset.json")):
        code, _, err = run("verify", wrong, capsys=capsys)
        assert (code, message in err, err.count("\n")) == (2, True, 1)


USER_MODULES = {
    "model.py": "raise SystemExit('the user's model')",
    "flows/__init__.py": "raise SystemExit('the user's flows')",
}


@pytest.mark.parametrize("location", ["working directory", "PYTHONPATH"])
@pytest.mark.parametrize(
    "start", [["{bin}/ixi-etl"], ["{python}", "-m", "ixi_etl"]], ids=["ixi-etl", "python -m ixi_etl"]
)
def test_user_modules_do_not_shadow_the_packages(location: str, start: list[str], tmp_path: Path) -> None:
    for name, text in USER_MODULES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    command_line = [word.format(bin=Path(sys.executable).parent, python=sys.executable) for word in start]
    environment = os.environ | ({"PYTHONPATH": str(tmp_path)} if location == "PYTHONPATH" else {})
    environment["PYTHONVERBOSE"] = "1"  # names the imported files
    done = subprocess.run([*command_line, "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"ixi-etl {__version__}\n"), done.stderr
    for package in ("ixi_etl", "model", "flows"):
        assert str(TOP / package / "__init__.py") in done.stderr


def test_error_names_a_user_module_that_shadows_a_package(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("")
    (tmp_path / "mine.py").write_text("import model\nimport flows\n")
    done = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "model.py was imported as `model`, which hides ixi-etl's own" in done.stderr.splitlines()[-1]


def test_then_train_trains_on_the_refreshed_version(
    published: PublishedVersion,
    s3_root: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started = []

    def run_flow(name: str, *arguments: object, **parameters: object) -> object:  # other tests cover the flows
        started.append((name, parameters))
        return published if name == "refresh_dataset" else tmp_path

    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.setattr("flows.server.run_flow", run_flow)
    arguments = ("--root", s3_root, "--scratch", str(tmp_path))
    assert run("refresh", "--then-train", "smoke", *arguments, capsys=capsys)[0] == 0
    settings = {"dataset": f"ixi-t1-t2@{published.version}"}
    expected = {
        "preset": "smoke",
        "settings": settings,
        "root": s3_root,
        "scratch": tmp_path,
        "run": None,
        "resume": True,
    }
    assert started[1:] == [("train_pix2pix", expected)]
    started.clear()
    assert run("refresh", *arguments, capsys=capsys)[0] == 0
    assert [name for name, _ in started] == ["refresh_dataset"]


@pytest.mark.parametrize("mode", ["block", "warn"])
@pytest.mark.parametrize("held", [True, False])
def test_then_train_does_not_train_on_a_version_that_is_held(
    held: bool,
    mode: str,
    published: PublishedVersion,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "datasets" / "ixi-t1-t2" / published.version
    shutil.copytree(published.folder, folder)
    content = json.loads((folder / "compared.json").read_text())
    failure = {"name": "nmi", "value": 0.03, "unit": "NMI", "at_least": 0.06, "at_most": None}
    content |= {"failed": [failure], "held_by": ["nmi"] if held else []}
    (folder / "compared.json").write_text(to_json(with_digest(content)))
    started = []

    def run_flow(name: str, *arguments: object, **parameters: object) -> object:  # other tests cover the flows
        started.append(name)
        return PublishedVersion(published.version, folder, True) if name == "refresh_dataset" else tmp_path

    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.setattr("flows.server.run_flow", run_flow)
    arguments = ("refresh", "--root", str(tmp_path), "--checks", mode)
    code, out, err = run(*arguments, "--then-train", "smoke", capsys=capsys)
    assert f"version   {published.version}" in out
    if not held:  # the version was published under `--checks warn`, whatever is given now
        assert (code, started) == (0, ["refresh_dataset", "train_pix2pix"])
        return
    name = f"ixi-t1-t2@{published.version}"
    assert (code, started) == (1, ["refresh_dataset"])
    assert err == (
        f"error: not trained on {name}: nmi: 0.03, limit at least 0.06; look at {folder / 'compared.html'}, "
        f"then `ixi-etl train --dataset {name}`\n"
    )
    assert run(*arguments, capsys=capsys)[0] == 0  # the version is published


def test_then_train_requires_a_known_preset(capsys: pytest.CaptureFixture[str]) -> None:
    """A default preset would start 49,200 steps by accident."""
    for arguments in (["--then-train"], ["--then-train", "smok"]):
        code, _, err = run("refresh", *arguments, capsys=capsys)
        assert (code, "--then-train" in err) == (2, True)


@pytest.mark.usefixtures("torch")
def test_command_line_offers_every_training_preset() -> None:
    from model.config import PRESETS as TRAINING_PRESETS

    assert set(get_args(Preset)) == TRAINING_PRESETS.keys()


@pytest.mark.stack
@pytest.mark.usefixtures("torch")
def test_without_a_server_commands_run_and_prefect_is_not_imported(
    published: PublishedVersion, archives: Path, tmp_path: Path
) -> None:
    """This holds behind a proxy and with an unusable Prefect home. No module of `model` imports Prefect."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home/.prefect").write_text("not a folder")
    root = tmp_path / "root"
    refresh = ["refresh", "--root", str(root), "--source", str(archives), "--slices", "12", "--registration", "none"]
    small = [f"--set={name}={value}" for name, value in SMALL_NETWORKS.items()]
    train = ["train", "--root", str(root), "--run-id", "b", *small, "--set=steps=1", "--set=samples=0"]
    code = f"""
import importlib, sys
sys.path[:0] = {sys.path!r}
from flows.cli import main
from model import config
config.PRESETS["smoke"] = {SMALL_NETWORKS | {"steps": 1, "samples": 0}!r}
for arguments in {[*refresh, "--then-train", "smoke"]!r}, {train!r}:
    try:
        main(arguments)
    except SystemExit as end:
        assert not end.code, arguments
for path in {sorted(path.stem for path in (TOP / "model").glob("[a-z]*.py"))!r}:
    importlib.import_module(f"model.{{path}}")
assert "prefect" not in sys.modules
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {"HOME": str(tmp_path / "home"), "HTTP_PROXY": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"version   {published.version}\nstate     published\n" in done.stdout
    assert len(list(root.glob("runs/*/generator.safetensors"))) == 2


def test_presets_can_be_overridden() -> None:
    assert DatasetConfig.model_validate(PRESETS["paper"]).registration == "none"
    assert DatasetConfig.model_validate(PRESETS["paper"] | {"pairing": "anatomical"}).registration == "rigid"
    assert DatasetConfig.model_validate(PRESETS["paired"]) == DatasetConfig()


def test_version_option_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version", capsys=capsys)[:2] == (0, f"ixi-etl {__version__}\n")


def test_unknown_preset_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("refresh", "--preset", "best", capsys=capsys)[0] == 2


def test_demo_does_not_clear_a_foreign_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    code, _, err = run("demo", "--folder", str(tmp_path), capsys=capsys)
    assert (code, "is not empty" in err) == (2, True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


SLOW_IMPORTS = {"prefect", "torch", "SimpleITK", "matplotlib", "dask", "distributed", "zarr", "pandera"}


def imported_modules(code: str) -> set[str]:
    """The modules that a process has imported when it has run `code` and written a last line of its own."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(); print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.splitlines()[-1].split())


def imported_packages(code: str) -> set[str]:
    return {name.partition(".")[0] for name in imported_modules(code)}


def run_in_process(*arguments: str) -> str:
    """Code that runs the command line and continues."""
    return f"from flows.cli import main\ntry: main({arguments!r})\nexcept SystemExit as end: assert not end.code\n"


@pytest.mark.parametrize("command", [(), ("refresh",), ("train",)])
def test_help_needs_no_slow_import(command: tuple[str, ...]) -> None:
    imported = imported_packages(run_in_process(*command, "--help"))
    assert not imported & {*SLOW_IMPORTS, "pandas", "numpy", "nibabel", "httpx", "PIL", "jinja2", "fsspec"}


def test_refresh_of_a_published_version_needs_no_slow_import(
    refreshed: PublishedVersion, archives: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes and hashes say that it is intact; the store is not opened, and the rules are not checked again."""
    monkeypatch.setenv("PREFECT_API_URL", "")
    options = ("--root", root_of(refreshed), "--source", str(archives), "--slices", "12", "--registration", "none")
    assert not imported_packages(run_in_process("refresh", *options, "--json")) & SLOW_IMPORTS


def test_only_the_module_of_the_command_is_imported() -> None:
    """Every command is in the table by which it is found."""
    table = [name for names in COMMANDS_OF_MODULES.values() for name in names]
    assert sorted(table) == sorted(COMMANDS)
    for module, names in COMMANDS_OF_MODULES.items():
        assert {COMMANDS[name].callback.__module__ for name in names} == {f"flows.cli.{module}"}
    imported = imported_modules(run_in_process("verify", "--help"))
    assert {f"flows.cli.{module}" for module in COMMANDS_OF_MODULES} & imported == {"flows.cli.versions"}


def test_library_imports_neither_prefect_nor_torch() -> None:
    names = [
        module.name for module in pkgutil.walk_packages(ixi_etl.__path__, "ixi_etl.") if "__main__" not in module.name
    ]
    assert len(names) > 25
    assert not imported_packages(f"import {', '.join(names)}") & {"prefect", "torch", "flows", "model"}


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("latest", ("ixi-t1-t2", "latest")),
        ("3f2a", ("ixi-t1-t2", "3f2a")),
        ("@latest", ("ixi-t1-t2", "latest")),
        ("ixi-t1-t2@3f2a", ("ixi-t1-t2", "3f2a")),
        ("digits@latest", ("digits", "latest")),
    ],
)
def test_parse_version_returns_dataset_and_version(text: str, parsed: tuple[str, str]) -> None:
    assert versions.parse_version(text) == parsed
