"""A push sends exactly the files of a run or version, and ends with one clear line where it cannot."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub import TOKEN, Hub, serve_hub
from huggingface_hub import constants

from flows.cli import main
from ixi_etl.core import extras
from ixi_etl.dataset import metadata
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.errors import ConfigError
from model.hub import parse_target
from model.run import Run


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """An empty Hub, to which the environment points, and a token that it accepts."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # read when the library is imported; Git LFS instead
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serve_hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def push(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["push", *map(str, arguments)])
    output = capsys.readouterr()
    assert TOKEN not in output.out + output.err
    return int(ended.value.code or 0), output.out, output.err


def root_of(run: Run) -> Path:
    return run.folder.parents[1]


def test_a_run_arrives_byte_for_byte(hub: Hub, finished_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.read_bytes() for p in finished_run.folder.rglob("*") if p.is_file()}
    code, out, err = push("a", "--to", "hf://me/heads", "--root", root_of(finished_run), capsys=capsys)
    assert (code, err) == (0, "")
    assert out.split() == ["README.md", "config.json", "generator.safetensors", "url", f"{hub.url}/me/heads"]
    received = hub.files["models/me/heads"]
    assert received.keys() == {"README.md", "config.json", "generator.safetensors"}
    assert received["generator.safetensors"] == finished_run.generator.read_bytes()
    assert json.loads(received["config.json"])["config"] == finished_run.config.model_dump(mode="json")
    assert received["README.md"].decode().startswith("---\nlicense: unknown\n")
    assert hub.repositories["models/me/heads"]["visibility"] == "private"
    assert b"hf download me/heads" in received["README.md"]
    assert len(hub.commits) == 1
    assert {p: p.read_bytes() for p in finished_run.folder.rglob("*") if p.is_file()} == before


def test_a_second_push_adds_to_the_repository(hub: Hub, finished_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("a", "--to", "hf://me/heads", "--public", "--root", root_of(finished_run))
    assert [push(*arguments, capsys=capsys)[0] for _ in range(2)] == [0, 0]
    assert hub.repositories["models/me/heads"]["visibility"] == "public"
    assert len(hub.commits) == 2
    assert (
        len([request for request in hub.requests if request.startswith("PUT")]) == 1
    )  # what is there is not sent again


@pytest.mark.stack  # the export takes seconds
def test_a_run_is_pushed_as_onnx_too(hub: Hub, finished_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install -c constraints.txt -e '.[export]'")
    arguments = ("a", "--to", "hf://me/heads", "--onnx", "--root", root_of(finished_run))
    assert push(*arguments, capsys=capsys)[0] == 0
    session = onnxruntime.InferenceSession(hub.files["models/me/heads"]["generator.onnx"])
    assert [put.name for put in session.get_inputs()] == ["source"]


def test_a_version_arrives_whole_and_can_be_verified(
    hub: Hub, refreshed: PublishedVersion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (refreshed.folder / ".DS_Store").write_bytes(b"of a file manager")
    arguments = (refreshed.folder, "--to", "hf://datasets/me/pairs", "--i-may-redistribute")
    code, out, err = push(*arguments, capsys=capsys)
    assert (code, err.count("\n")) == (0, err.count(".DS_Store"))  # a warning names the file that is not part of it
    received = dict(hub.files["datasets/me/pairs"])
    assert hub.commits[0] == ["README.md"]  # the licence before the data
    assert b"Simulated data, not IXI" in received.pop("README.md")
    listed = metadata.read_metadata(refreshed.folder)["files"].keys() | {"dataset.json", *metadata.UNHASHED}
    assert received == {f"{refreshed.version}/{name}": (refreshed.folder / name).read_bytes() for name in listed}
    for name, data in received.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(data)
    with pytest.raises(SystemExit) as ended:
        main(["verify", "--deep", str(tmp_path / "copy" / refreshed.version)])
    assert not ended.value.code
    assert f"{refreshed.version}/manifest.csv" in out


def test_a_version_needs_a_statement_of_the_user(
    hub: Hub, published: PublishedVersion, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = push(published.folder, "--to", "hf://me/pairs", capsys=capsys)
    assert code == 2
    assert "none stated (no scans of people)" in err
    assert "add --i-may-redistribute" in err
    assert hub.requests == []


def test_a_damaged_version_is_not_pushed(
    hub: Hub, refreshed: PublishedVersion, capsys: pytest.CaptureFixture[str]
) -> None:
    (refreshed.folder / "manifest.csv").write_text("damaged")
    code, _, err = push(refreshed.folder, "--to", "hf://me/pairs", "--i-may-redistribute", capsys=capsys)
    assert (code, err.count("\n"), hub.requests) == (1, 1, [])
    assert "manifest.csv" in err


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, 2, "the token may not write to me/heads at {url} (403)"),
        (404, 2, "{url} has no me/heads and cannot make it (404)"),
        (500, 5, "{url} answered 500 (not you)"),
    ],
)
def test_a_refusal_is_one_line(
    status: int, code: int, words: str, hub: Hub, finished_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refuse = status
    ended, out, err = push("a", "--to", "hf://me/heads", "--root", root_of(finished_run), capsys=capsys)
    assert (ended, out, err.count("\n")) == (code, "", 1)
    assert words.format(url=hub.url) in err


def test_a_wrong_token_is_one_line(
    hub: Hub, finished_run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    code, _, err = push("a", "--to", "hf://me/heads", "--root", root_of(finished_run), capsys=capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{hub.url} does not accept the token (401)" in err
    assert "hf_of_another" not in err


def test_without_a_token_nothing_is_sent(
    hub: Hub, finished_run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    code, _, err = push("a", "--to", "hf://me/heads", "--root", root_of(finished_run), capsys=capsys)
    assert (code, err.count("\n"), hub.requests) == (2, 1, [])
    assert "set HF_TOKEN, or run `hf auth login`" in err


def test_a_server_that_is_gone_is_one_line(
    hub: Hub, finished_run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve_hub() as gone:
        monkeypatch.setenv("HF_ENDPOINT", gone.url)
    code, _, err = push("a", "--to", "hf://me/heads", "--root", root_of(finished_run), capsys=capsys)
    assert (code, err.count("\n"), hub.requests) == (5, 1, [])
    assert f"{gone.url} does not answer" in err


def cannot_read(_file: object) -> bytes:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "a file of mine")


def test_a_local_fault_is_not_blamed_on_the_server(
    hub: Hub,
    finished_run: Run,
    refreshed: PublishedVersion,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("huggingface_hub.lfs.sha_fileobj", cannot_read)
    run = push("a", "--to", "hf://me/heads", "--root", root_of(finished_run), capsys=capsys)
    assert hub.requests == []
    version = push(refreshed.folder, "--to", "hf://datasets/me/pairs", "--i-may-redistribute", capsys=capsys)
    for code, _, err in (run, version):
        assert (code, err.count("\n")) == (1, 1)
        assert "cannot read or write a file of mine: Permission denied" in err


def test_a_run_without_a_generator_is_named(
    hub: Hub, finished_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "b"
    run.mkdir(parents=True)
    (run / "config.json").write_bytes((finished_run.folder / "config.json").read_bytes())
    code, _, err = push("b", "--to", "hf://me/heads", "--root", tmp_path, capsys=capsys)
    assert (code, err.count("\n"), hub.requests) == (1, 1, [])
    assert f"{run} has no generator.safetensors yet" in err


@pytest.mark.parametrize(
    "text",
    [
        *("https://huggingface.co/me/heads", "me/heads", "hf://heads", "hf://me/heads/more", "hf://me/..", "hf://-/x"),
        *("", "hf://datasets/pairs", "hf://models/heads", "hf://spaces/demo", "hf://datasets/datasets/pairs"),
    ],
)
def test_other_addresses_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="give hf://USER/NAME"):
        parse_target(text, "model")
    with pytest.raises(ConfigError, match="give hf://datasets/USER/NAME"):
        parse_target(text, "dataset")


def test_the_kind_in_an_address_must_be_that_of_what_is_pushed() -> None:
    assert parse_target("hf://datasets/me/pairs", "dataset").name == "me/pairs"
    assert parse_target("hf://me/pairs", "dataset").url.endswith("/datasets/me/pairs")
    with pytest.raises(ConfigError, match="this is a model; give hf://me/pairs"):
        parse_target("hf://datasets/me/pairs", "model")


def test_a_missing_library_is_named_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    original: Any = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "huggingface_hub" else original(name))
    code, _, err = push("nothing", "--to", "nowhere", capsys=capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert 'pip install "ixi-etl[hub]"' in err
