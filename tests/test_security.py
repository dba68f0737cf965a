"""Secrets are not shown or stored, input data is not executed, and no path leads out of a version."""

from __future__ import annotations

import ast
import base64
import json
import logging
import pickle
import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme
from answers import NAME, make_tar
from conftest import S3_SECRET, OnS3
from pydantic import ValidationError
from servers import Call, Host, serve, served_as

from ixi_etl.config import DigitsConfig, RefreshConfig, format_validation_error
from ixi_etl.core.http_options import HttpOptions
from ixi_etl.core.storage import check_reachable, file_sizes, reject_url_credentials, to_path
from ixi_etl.dataset import metadata
from ixi_etl.dataset.store import open_arrays
from ixi_etl.errors import BadVolumeError, DatasetError, DownloadError, IxiError
from ixi_etl.scans.tar import index_archive
from ixi_etl.sources.cache import acquire
from ixi_etl.sources.catalog import Source, mnist
from ixi_etl.sources.retries import UnusableError
from ixi_etl.sources.user_source import find_archives, user_sources

PROJECT = Path(__file__).parent.parent
SOURCES = [p for folder in ("ixi_etl", "model", "flows") for p in sorted((PROJECT / folder).rglob("*.py"))]

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
def test_source_does_not_execute_or_extract_input(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in FORBIDDEN, f"line {node.lineno}"
            assert called.rpartition(".")[2] not in ("extractall", "extract", "create_subprocess_shell")
            assert not any(k.arg == "shell" and ast.unparse(k.value) != "False" for k in node.keywords)
            assert not any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords)


class TouchOnUnpickle:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_zarr_2_store_with_a_pickle_codec_is_refused(tmp_path: Path) -> None:
    array = tmp_path / "version/slices.zarr/t1"
    array.mkdir(parents=True)
    (array.parent / ".zgroup").write_text('{"zarr_format": 2}')
    metadata = {"zarr_format": 2, "shape": [1, 1, 2, 2], "chunks": [1, 1, 2, 2], "dtype": "<i2", "order": "C"}
    metadata |= {"compressor": {"id": "pickle"}, "fill_value": 0, "filters": None}
    (array / ".zarray").write_text(json.dumps(metadata))
    (array / "0.0.0.0").write_bytes(pickle.dumps(TouchOnUnpickle(tmp_path / "executed")))
    with pytest.raises(DatasetError, match="cannot be opened as a Zarr group"):
        np.asarray(open_arrays(tmp_path / "version")["t1"])
    assert not (tmp_path / "executed").exists()


# -- secrets ----------------------------------------------------------------------------------------------------------

SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    "given",
    [
        {"source": f"https://me:{SECRET}@example.org/ixi"},
        {"source": f"s3://{SECRET}@bucket/ixi"},
        {"root": f"s3://key:{SECRET}@bucket/x"},
        {"root": f"s3://AKIA:ab/{SECRET}@bucket"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [RefreshConfig, DigitsConfig])
def test_secret_in_a_url_is_refused_and_not_shown(kind: Any, given: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"put them into ~/\.netrc") as caught:
        kind(**given)
    assert SECRET not in str(caught.value)


def test_command_refuses_a_secret_and_does_not_show_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows", "refresh", f"--source=https://me:{SECRET}@example.org/ixi"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, SECRET in done.stdout + done.stderr) == (2, False)
    assert "~/.netrc" in done.stderr


URL = f"https://me:{SECRET}@example.org/ixi"
URLS = [
    f"HTTPS://me:{SECRET}@example.org/ixi",
    f" https://me:{SECRET}@example.org/ixi",
    f"https:/me:{SECRET}@example.org/ixi",
    f"simplecache::https://me:{SECRET}@example.org/ixi",
    f"s3://key:{SECRET}@bucket/x",
    f"tcp://me:{SECRET}@scheduler:8786",
    f"s3://AKIA:ab/{SECRET}@bucket/x",
    f"https://example.org/ixi?X-Amz-Signature={SECRET}",
]


@pytest.mark.parametrize(
    "command",
    [
        ["survey", "--source", URL],
        ["survey", "--root", URL],
        ["refresh", "--source", URL],
        ["refresh", "--root", URL],
        ["refresh", "--scratch", URL],
        ["refresh", "--demographics", URL],
        ["refresh", "--dask", URL],
        ["refresh", "--insecure-host", URL, "--source", "http://127.0.0.1:9"],
        ["digits", "--source", URL],
        ["digits", "--root", URL],
        ["verify", "--root", URL],
        ["versions", "--root", URL],
        ["prune", "--keep", "1", "--root", URL],
        ["prune", "--keep", "1", "--scratch", URL],
        *(["survey", "--source", url] for url in URLS),
        *(["verify", "--root", url] for url in URLS),
    ],
    ids=" ".join,
)
def test_secret_is_refused_in_every_option(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from flows.cli import main

    with pytest.raises(SystemExit) as ended:
        main(command)
    output = capsys.readouterr()
    assert (ended.value.code, output.out) == (2, "")
    assert re.fullmatch(r"error: .*a URL with a password or a key in it; put them into ~/\.netrc.*\n", output.err)


SECRET_URLS = [
    f"s3://AKIA:ab/{SECRET}@bucket",
    f"s3://AKIA:12/{SECRET}@bucket/x",
    f"s3://AKIAX/{SECRET}@bucket/x",
    f"s3://key:a/b/{SECRET}@bucket",
    f"s3://key:ab%2F{SECRET}@bucket",
    f"https://me:{SECRET}/x@example.org/ixi",
    f"https://me:{SECRET}?x@example.org/ixi",
    f"https://me:a::{SECRET}@example.org/ixi",
    f"https://me:my {SECRET}@example.org/ixi",
    f"https://me:it's{SECRET}@example.org/ixi",
    f"https://{SECRET}@example.org/ixi",
    f"https://me%3A{SECRET}%40example.org/ixi",
    f"https://me%253A{SECRET}%2540example.org/ixi",
    f"https%3A%2F%2Fme%3A{SECRET}%40example.org%2Fixi",
    f"zip://a.zip::https://me:{SECRET}@example.org/ixi",
    f"https:\\\\me:{SECRET}@example.org",
    f"me:{SECRET}@example.org/ixi",
    f"//me:{SECRET}@example.org/ixi",
    f"file://me:{SECRET}@nas/ixi",
    f"https://example.org/ixi?X-Amz-Credential=AKIA&X-Amz-Signature={SECRET}",
    f"https://x.blob.core.windows.net/c/ixi?sv=2024&sig={SECRET}",
    f"https://example.org/IXI-T1.tar?token={SECRET}",
    f"https://example.org/ixi?{SECRET}",
    f"https://example.org/ixi#access_token={SECRET}",
    f"https://example.org/ixi%3Fsig={SECRET}",
    f"s3://bucket/ixi?versionId={SECRET}",
    f"tcp://scheduler:8786?token={SECRET}",
]


@pytest.mark.parametrize("url", SECRET_URLS)
def test_secret_is_refused_in_every_notation(url: str) -> None:
    attempts: list[Any] = [
        lambda: reject_url_credentials(url),
        lambda: find_archives(url),
        lambda: mnist(url),
        lambda: Source(NAME, (url,), None),
        lambda: RefreshConfig(source=url),
        lambda: RefreshConfig(root=url),
        lambda: RefreshConfig(scratch=Path(url)),
        lambda: RefreshConfig(demographics=url),
        lambda: RefreshConfig(dask=url),
        lambda: DigitsConfig(source=url),
    ]
    for attempt in attempts:
        with pytest.raises((IxiError, ValidationError), match="a URL with a password or a key in it") as caught:
            attempt()
        assert SECRET not in str(caught.value)
        if isinstance(caught.value, ValidationError):
            assert SECRET not in format_validation_error(caught.value)


@pytest.mark.parametrize(
    "location",
    [
        "/data/a@b",
        "/data/what?/x#y",
        "https://example.org/ixi@2",
        "https://example.org/a:b@c",
        "http://localhost:8000/a@b",
        "http://[::1]:8000/a@b",
        "s3://bucket/x@y",
        "s3://my.bucket-1/x:y",
        "s3://arn:aws:s3:us-west-2:123456789012:accesspoint/mine",
        "file:///data/a@b",
        "ixi-data",
        "a@b",
        "tcp://h:1",
        "inproc://10.0.0.1/88/1",
        "C:/data/a@b",
    ],
)
def test_harmless_at_signs_and_colons_are_accepted(location: str) -> None:
    reject_url_credentials(location)
    assert str(IxiError(f"cannot read {location}: 403")) == f"cannot read {location}: 403"


def test_messages_of_libraries_are_shown_without_url_secrets() -> None:
    message = (
        f"403, url='https://cdn/x?X-Amz-Signature={SECRET}'; s3://AKIA:ab/{SECRET}@bucket/k: no; "
        f"(https://me:{SECRET}@h:9/x#{SECRET}), http://h/a?b={SECRET}: 404"
    )
    redacted = "403, url='https://cdn/x?***'; s3://***@bucket/k: no; (https://***@h:9/x#***), http://h/a?***: 404"
    for error in (
        IxiError(message),
        DownloadError(message),
        BadVolumeError("unreadable", message),
        UnusableError(message),
    ):
        assert str(error).removeprefix("unreadable: ") == redacted


@pytest.mark.parametrize("over_tls", [False, True])
def test_signature_of_a_redirect_is_not_shown_or_stored(
    over_tls: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tar, authority, single_try = make_tar(tmp_path, 4, 200_000), trustme.CA(), HttpOptions(tries=1)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    caplog.set_level(logging.DEBUG)
    outputs = []
    with serve(Host(tar)) as store:

        def redirect(call: Call) -> None:
            call.plain(302, location=f"{store.url}?X-Amz-Signature={SECRET}")

        tls = served_as(authority, "localhost") if over_tls else None
        with serve(Host(b"", redirect), tls, "localhost" if over_tls else "127.0.0.1") as host:
            source = Source(NAME, (host.url,), None)
            if not over_tls:
                outputs.append(repr(acquire(source, tmp_path / "got")))
            for answer in (lambda call: call.plain(403), lambda call: call.plain(200, b"x" * 600), Call.reset):
                store.answer = answer
                for attempt in (
                    lambda: acquire(source, tmp_path / "other", http=single_try),
                    lambda: index_archive(host.url),
                    lambda: user_sources(host.url, single_try),
                ):
                    with pytest.raises(IxiError) as caught:
                        attempt()
                    outputs.append("".join(traceback.format_exception(caught.value)))
            if not over_tls:
                outputs.append(repr(acquire(source, tmp_path / "got")))  # already downloaded; the server fails now
    assert outputs
    assert SECRET not in "".join(outputs) + caplog.text
    for path in [*(tmp_path / "other").iterdir(), *tmp_path.glob("got/*.json")]:
        assert SECRET.encode() not in path.read_bytes()


def test_password_of_an_s3_endpoint_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://me:{SECRET}@127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(IxiError, match="cannot reach the bucket") as caught:
        check_reachable("s3://bucket/x")
    s3fs.S3FileSystem.clear_instance_cache()
    assert SECRET not in str(caught.value)


def test_netrc_password_is_sent_only_to_its_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tar = make_tar(tmp_path, 4, 200_000)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".netrc").write_text(f"machine 127.0.0.1 login me password {SECRET}\n")
    (tmp_path / ".netrc").chmod(0o600)
    received: list[str | None] = []

    def answer(call: Call) -> None:
        received.append(call.headers.get("authorization"))
        call.correct() if received[-1] else call.plain(401)

    caplog.set_level(logging.DEBUG)
    with serve(Host(tar, answer)) as host, serve(Host(tar, answer), name="localhost") as elsewhere:
        found = acquire(Source(NAME, (host.url,), None), tmp_path / "got")
        assert set(received) == {f"Basic {base64.b64encode(f'me:{SECRET}'.encode()).decode()}"}
        received.clear()
        with pytest.raises(DownloadError, match="401"):
            acquire(Source(NAME, (elsewhere.url,), None), tmp_path / "elsewhere")
        assert set(received) == {None}
    assert Path(found.location).read_bytes() == tar
    written = [p.read_bytes() for p in (tmp_path / "got").iterdir()]
    assert not any(SECRET.encode() in data for data in written)
    assert SECRET not in caplog.text + repr(found)


def test_s3_keys_are_not_logged_or_stored(on_s3: OnS3) -> None:
    config = on_s3.config
    assert config.scratch
    assert len(on_s3.log) > 100
    assert S3_SECRET not in "\n".join(on_s3.log) + repr(config) + repr(on_s3.made) + config.model_dump_json()
    for top in (to_path(config.root), config.scratch):
        for name in file_sizes(top):
            assert S3_SECRET.encode() not in (top / name).read_bytes()


def test_project_files_contain_no_secret() -> None:
    assignment = r"(?i:password|secret|token)\s*[=:]\s*['\"][^'\"$]"
    keys = re.compile(rf"AKIA[0-9A-Z]{{16}}|-----BEGIN [A-Z ]*PRIVATE KEY|{assignment}")
    others = ("docker-compose.yml", "Dockerfile", "prefect.yaml", ".env.example")
    for path in [*SOURCES, *(PROJECT / name for name in others)]:
        assert not keys.search(path.read_text()), path


# -- paths ------------------------------------------------------------------------------------------------------------


def test_manifest_with_a_path_as_subject_id_is_refused(published: Any, tmp_path: Path) -> None:
    """A subject id becomes part of a sample's file name, and a version from elsewhere may contain any text."""
    import shutil

    copy = Path(shutil.copytree(published.folder, tmp_path / published.version))
    path = copy / metadata.MANIFEST
    first = metadata.read_manifest(copy)["subject_id"].iloc[0]
    path.write_text(path.read_text().replace(first, "../../../../evil"))
    with pytest.raises(DatasetError, match="subject_is_a_safe_file_name"):
        metadata.read_manifest(copy)
