"""No secret is in a log, the database, an artifact, the bucket, a folder or a command line after refreshes, a training
and a synthesis: a search over all of them.

Run by `make test-stack` as the last module on the shared services, after their failures.
"""

from __future__ import annotations

import base64
import gzip
import json
import secrets
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote, quote_plus

import httpx
import pytest
from running import BUCKET, HOST_PASSWORD, ROOT, SECRETS, named, refresh_config, run_folders, start_run, wait_for_end
from services import Stack, wait_for

from ixi_etl.core.storage import file_sizes, to_path

pytestmark = pytest.mark.stack


def forms(secret: str) -> set[bytes]:
    """`secret` in the notations in which it may be stored: as it is, percent-encoded, JSON, hexadecimal and base64.

    Base64 depends on the position in the encoded text, modulo 3; the digits that also encode neighbours are left out.
    """
    raw = secret.encode()
    found = {raw, raw.hex().encode(), quote(secret, safe="").encode(), quote_plus(secret).encode()}
    found |= {quote(secret).encode(), json.dumps(secret)[1:-1].encode(), secret.replace("/", "\\/").encode()}
    for before in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            digits = encode(bytes(before) + raw)
            found.add(digits[(before * 8 + 5) // 6 : (before + len(raw)) * 8 // 6])
    return found


def unpacked(data: bytes) -> Iterator[bytes]:
    """`data`, and its content if it is compressed by gzip."""
    yield data
    if data.startswith(b"\x1f\x8b"):
        yield gzip.decompress(data)


def leaks(texts: Mapping[str, bytes], wanted: Mapping[str, str] = SECRETS) -> list[str]:
    """`SECRET is in PLACE` for each secret that is in one of the texts, in any form."""
    notations = {name: forms(secret) for name, secret in wanted.items()}
    return [
        f"{name} is in {place}"
        for place, packed in texts.items()
        for text in unpacked(packed)
        for name, several in notations.items()
        if any(notation in text for notation in several)
    ]


def everything(stack: Stack) -> dict[str, bytes]:
    """The database, logs, folders and bucket of the services, and the command lines of their processes."""
    texts = {f"the database, table {table}": rows for table, rows in stack.dump_database().items()}
    texts["command lines"] = "\n".join(stack.commands).encode()
    for path in stack.folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.name != ".netrc":
            texts[str(path.relative_to(stack.folder))] = path.read_bytes()
    bucket = to_path(f"s3://{BUCKET}")
    return texts | {f"s3://{BUCKET}/{name}": (bucket / name).read_bytes() for name in file_sizes(bucket)}


@pytest.fixture(scope="module")
def full_run(stack: Stack, source: str, archives_folder: Path) -> None:
    """A refresh, a training and a synthesis on the services; `test_stack` may have done the first two."""
    if "worker-no-gpu" not in stack.running:
        stack.start("worker-no-gpu")
    refreshed = start_run(stack, "refresh-dataset", config=refresh_config(stack, source, ROOT))
    assert wait_for_end(stack, refreshed) == "COMPLETED"
    by_event = wait_for(
        "a training", lambda: [run for run in stack.runs_of("train-pix2pix") if run["parameters"].get("dataset")]
    )
    assert wait_for_end(stack, by_event[0]["id"]) == "COMPLETED"
    volume = Path(stack.localize("/data/volume.nii.gz"))
    with tarfile.open(archives_folder / "IXI-T1.tar") as archive:
        member = archive.extractfile(next(m for m in archive if m.name.endswith(".nii.gz")))
        assert member is not None
        volume.write_bytes(member.read())
    made = volume.with_name("made.nii.gz")
    trained = next(name for name in run_folders() if name.startswith("ixi-t1-t2"))
    names = {"run": trained, "inputs": [str(volume)], "out": str(made), "root": ROOT}
    names |= {"scratch": stack.localize("/data"), "device": "cpu"}
    assert wait_for_end(stack, start_run(stack, "synthesize", **names)) == "COMPLETED"
    assert made.is_file()


def message_of(stack: Stack, run_id: str) -> str:
    return str(stack.request(f"flow_runs/{run_id}", "GET")["state"]["message"])


@pytest.mark.usefixtures("full_run")
def test_runs_take_the_key_from_the_block_of_the_work_pool(stack: Stack) -> None:
    pools = stack.request("work_pools/filter")
    references = [pool["base_job_template"]["variables"]["properties"]["env"]["default"] for pool in pools]
    assert references == [{"AWS_SECRET_ACCESS_KEY": "{{ prefect.blocks.secret.aws-secret-access-key }}"}] * 2
    keys = {environment["AWS_SECRET_ACCESS_KEY"] for environment in stack.run_environments.values()}
    assert keys == {SECRETS["S3 secret key, in a block"]}


def test_deploying_without_the_block_of_a_variable_prints_one_line(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(stack.values, "IXI_SECRETS", "AWS_SECRET_ACCESS_KEY OTHER_KEY")
    done = stack.run("deploy")
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if "DEBUG" not in line]
    assert line.startswith("error: there is no Secret block other-key for OTHER_KEY of IXI_SECRETS; create it on the")


def test_a_refresh_that_cannot_reach_s3_fails_in_one_line(stack: Stack, source: str) -> None:
    [deployment] = stack.request("deployments/filter", deployments=named("refresh-dataset"))
    started = stack.request(
        f"deployments/{deployment['id']}/create_flow_run",
        parameters={"config": refresh_config(stack, source, ROOT)},
        job_variables={"env": {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}},
    )["id"]
    assert wait_for_end(stack, started) == "FAILED"
    assert f"cannot reach the bucket {BUCKET}" in message_of(stack, started)


def test_a_refresh_that_is_refused_by_the_host_fails_in_one_line(stack: Stack, source: str) -> None:
    other_name = source.replace("127.0.0.1", "localhost")  # not in ~/.netrc
    started = start_run(stack, "refresh-dataset", config=refresh_config(stack, other_name, ROOT))
    assert wait_for_end(stack, started) == "FAILED"
    assert "401" in message_of(stack, started)


def test_the_server_stores_no_run_with_a_password_in_a_parameter(stack: Stack, source: str) -> None:
    with_password = source.replace("http://", f"http://me:{HOST_PASSWORD}@")
    before = stack.request("flow_runs/count")
    for deployment, parameters in (
        ("refresh-dataset", {"config": refresh_config(stack, with_password, ROOT)}),
        ("train-pix2pix", {"root": with_password}),
        ("look-after", {"root": with_password}),
        ("synthesize", {"run": "latest", "inputs": ["a.nii.gz"], "out": "b.nii.gz", "scratch": with_password}),
    ):
        with pytest.raises(httpx.HTTPStatusError, match="409"):
            start_run(stack, deployment, **parameters)
    assert stack.request("flow_runs/count") == before


def test_blocks_are_encrypted_with_the_key_of_the_environment(stack: Stack) -> None:
    tables = stack.dump_database()
    assert b"aws-secret-access-key" in tables["block_document"]
    assert b"ENCRYPTION_KEY" not in tables["configuration"]  # with it, a copy of the database could be decrypted
    path = "block_types/slug/secret/block_documents/name/aws-secret-access-key"
    assert SECRETS["S3 secret key, in a block"] not in str(stack.request(path, "GET"))


@pytest.mark.usefixtures("full_run")
def test_a_search_finds_secrets_that_are_planted(stack: Stack) -> None:
    planted = {name: f"{secrets.token_urlsafe(20)}/+" for name in ("a password", "a key", "a token")}
    header = b"Basic " + base64.b64encode(f"me:{planted['a password']}".encode())
    (stack.folder / "planted.log").write_bytes(gzip.compress(header))
    stack.request("variables/", name="planted", value=f"https://host/?key={quote(planted['a key'], safe='')}")
    to_path(f"s3://{BUCKET}/planted").write_text(json.dumps({"token": planted["a token"]}))
    assert set(leaks(everything(stack), planted)) >= {
        "a password is in planted.log",
        "a key is in the database, table variable",
        f"a token is in s3://{BUCKET}/planted",
    }


@pytest.mark.usefixtures("full_run")
def test_no_secret_is_in_logs_database_artifacts_bucket_folders_or_command_lines(stack: Stack) -> None:
    texts = everything(stack)
    assert {"worker-cpu.log", "server.log", "dask-worker-1.log", "the database, table log"} <= texts.keys()
    assert b"submitted to infrastructure" in texts["worker-cpu.log"]
    assert any(name.endswith("software.json") for name in texts)
    assert any("prefect" in command for command in stack.commands)
    assert leaks(texts) == []
