"""Who may get in: no secret comes out, nothing from outside is run, and no path leads out."""

from __future__ import annotations

import ast
import base64
import json
import logging
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers import NAME, make_tar
from conftest import config_for
from servers import Call, Host, serve

from ixi_etl import dataset
from ixi_etl.catalog import Source
from ixi_etl.config import DigitsConfig, RefreshConfig
from ixi_etl.download import acquire
from ixi_etl.errors import DatasetError, DownloadError
from ixi_etl.places import file_sizes, place, refuse_secret
from ixi_etl.refresh import refresh
from ixi_etl.store import open_arrays

PROJECT = Path(__file__).parent.parent
SOURCES = [p for folder in ("ixi_etl", "model", "flows") for p in sorted((PROJECT / folder).glob("*.py"))]

FORBIDDEN = {
    "eval",
    "exec",
    "compile",
    "pickle.load",
    "pickle.loads",
    "marshal.loads",
    "yaml.load",
    "yaml.unsafe_load",
    "os.system",
    "os.popen",
    "torch.load",
    "np.load",
    "pd.read_pickle",
    "joblib.load",
    "extractall",
    "extract",
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PROJECT)))
def test_nothing_from_outside_is_run_or_unpacked(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in FORBIDDEN, f"line {node.lineno}"
            assert called.rpartition(".")[2] not in ("extractall", "extract", "create_subprocess_shell")
            assert not any(k.arg == "shell" and ast.unparse(k.value) != "False" for k in node.keywords)
            assert not any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords)


class Owned:
    """Unpickled, it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_store_of_zarr_2_whose_codecs_include_pickle_is_not_opened(tmp_path: Path) -> None:
    array = tmp_path / "version/slices.zarr/t1"
    array.mkdir(parents=True)
    (array.parent / ".zgroup").write_text('{"zarr_format": 2}')
    metadata = {"zarr_format": 2, "shape": [1, 1, 2, 2], "chunks": [1, 1, 2, 2], "dtype": "<i2", "order": "C"}
    metadata |= {"compressor": {"id": "pickle"}, "fill_value": 0, "filters": None}
    (array / ".zarray").write_text(json.dumps(metadata))
    (array / "0.0.0.0").write_bytes(pickle.dumps(Owned(tmp_path / "owned")))
    with pytest.raises(DatasetError, match="cannot be opened as a Zarr group"):
        np.asarray(open_arrays(tmp_path / "version")["t1"])
    assert not (tmp_path / "owned").exists()


# -- secrets ----------------------------------------------------------------------------------------------------------

SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    "given",
    [
        {"source": f"https://me:{SECRET}@example.org/ixi"},
        {"source": f"s3://{SECRET}@bucket/ixi"},
        {"root": f"s3://key:{SECRET}@bucket/x"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [RefreshConfig, DigitsConfig])
def test_a_secret_in_a_url_is_refused_and_not_repeated(kind: Any, given: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"put those into ~/\.netrc") as caught:
        kind(**given)
    assert SECRET not in str(caught.value)
    done = subprocess.run(
        [sys.executable, "-m", "flows", "refresh", *(f"--{k}={v}" for k, v in given.items())],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, SECRET in done.stdout + done.stderr) == (1, False)
    assert "~/.netrc" in done.stderr


@pytest.mark.parametrize(
    "url",
    [
        f"https://me:{SECRET}@example.org/ixi",
        f"HTTPS://me:{SECRET}@example.org/ixi",
        f" https://me:{SECRET}@example.org/ixi",
        f"https:/me:{SECRET}@example.org/ixi",
        f"simplecache::https://me:{SECRET}@example.org/ixi",
        f"s3://key:{SECRET}@bucket/x",
        f"tcp://me:{SECRET}@scheduler:8786",
    ],
)
def test_a_secret_is_refused_wherever_a_person_can_give_it(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    from flows.cli import main

    commands = [
        ["survey", "--source", url],
        ["survey", "--root", url],
        ["refresh", "--source", url],
        ["refresh", "--root", url],
        ["refresh", "--scratch", url],
        ["refresh", "--demographics", url],
        ["refresh", "--dask", url],
        ["digits", "--source", url],
        ["digits", "--root", url],
        ["verify", "--root", url],
        ["versions", "--root", url],
        ["prune", "--keep", "1", "--root", url],
        ["prune", "--keep", "1", "--scratch", url],
    ]
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            main(command)
        said = capsys.readouterr()
        assert (ended.value.code, said.out) == (1, ""), command
        assert re.fullmatch(r"error: .*a URL with a password or a key in it; put those into ~/\.netrc.*\n", said.err)


@pytest.mark.parametrize(
    "place", ["/data/a@b", "https://example.org/ixi@2", "s3://bucket/x@y", "ixi-data", "tcp://h:1"]
)
def test_an_at_sign_in_a_path_is_no_secret(place: str) -> None:
    refuse_secret(place)


def test_a_password_in_netrc_is_used_and_told_to_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tar = make_tar(tmp_path, 4, 200_000)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".netrc").write_text(f"machine 127.0.0.1 login me password {SECRET}\n")
    (tmp_path / ".netrc").chmod(0o600)
    said: list[str | None] = []

    def answer(call: Call) -> None:
        said.append(call.headers.get("authorization"))
        call.honest() if said[-1] else call.plain(401)

    caplog.set_level(logging.DEBUG)
    with serve(Host(tar, answer)) as host, serve(Host(tar, answer), name="localhost") as elsewhere:
        found = acquire(Source(NAME, (host.url,), None), tmp_path / "got")
        assert set(said) == {f"Basic {base64.b64encode(f'me:{SECRET}'.encode()).decode()}"}
        said.clear()
        with pytest.raises(DownloadError, match="401"):
            acquire(Source(NAME, (elsewhere.url,), None), tmp_path / "elsewhere")
        assert set(said) == {None}
    assert Path(found.location).read_bytes() == tar
    written = [p.read_bytes() for p in (tmp_path / "got").iterdir()]
    assert not any(SECRET.encode() in data for data in written)
    assert SECRET not in caplog.text + repr(found)


def test_s3_keys_come_out_nowhere(
    s3_root: str, archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import s3fs

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    s3fs.S3FileSystem.clear_instance_cache()
    caplog.set_level(logging.DEBUG)
    config = config_for(s3_root, archives, tmp_path)
    made = refresh(config)
    s3fs.S3FileSystem.clear_instance_cache()
    assert SECRET not in caplog.text + repr(config) + repr(made) + config.model_dump_json()
    for top in (place(s3_root), tmp_path):
        for name in file_sizes(top):
            assert SECRET.encode() not in (top / name).read_bytes()


def test_no_file_of_the_project_has_a_secret() -> None:
    said = r"(?i:password|secret|token)\s*[=:]\s*['\"][^'\"$]"
    keys = re.compile(rf"AKIA[0-9A-Z]{{16}}|-----BEGIN [A-Z ]*PRIVATE KEY|{said}")
    others = ("docker-compose.yml", "Dockerfile", "prefect.yaml", ".env.example")
    for path in [*SOURCES, *(PROJECT / name for name in others)]:
        assert not keys.search(path.read_text()), path


# -- paths ------------------------------------------------------------------------------------------------------------


def test_a_manifest_cannot_lead_out_of_its_run(published: Any, tmp_path: Path) -> None:
    """A subject's id becomes part of the name of a sample; a version that somebody else made may say anything."""
    import shutil

    copy = Path(shutil.copytree(published.folder, tmp_path / published.version))
    path = copy / dataset.MANIFEST
    first = dataset.read_manifest(copy)["subject_id"].iloc[0]
    path.write_text(path.read_text().replace(first, "../../../../evil"))
    with pytest.raises(DatasetError, match="subject_leads_nowhere"):
        dataset.read_manifest(copy)
