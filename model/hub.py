"""Upload a generator, or a dataset version, to the Hugging Face Hub.

The token is the one that `huggingface_hub` finds: `HF_TOKEN`, or that of ``hf auth login``. It is never an option, and
never printed or stored. `HF_ENDPOINT` names another server than https://huggingface.co.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

from ixi_etl.core.files import os_errors_as_user_errors
from ixi_etl.core.storage import is_local
from ixi_etl.dataset import metadata, verify
from ixi_etl.errors import ConfigError, DatasetError, ServerError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger(__name__)

Kind = Literal["model", "dataset"]
CARD = "README.md"
DEFAULT_ENDPOINT = "https://huggingface.co"
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_TARGET = re.compile(rf"hf://(?P<kind>datasets/|models/)?(?P<name>(?P<user>{_PART})/{_PART})/?")
_KINDS = ("datasets", "models", "spaces")
"""First parts of addresses on the Hub, so the names of no users."""


@dataclass(frozen=True)
class Repository:
    """A repository on the Hub.

    Attributes:
        name: `USER/NAME`.
        endpoint: address of the server.
        private: whether it is made private if it does not exist yet; that of an existing one is not changed.
    """

    name: str
    kind: Kind
    endpoint: str = DEFAULT_ENDPOINT
    private: bool = True

    @property
    def url(self) -> str:
        return f"{self.endpoint}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"


def parse_target(text: str, kind: Kind, *, private: bool = True) -> Repository:
    """The repository in `hf://USER/NAME`, or `hf://datasets/USER/NAME` for a dataset.

    Raises:
        ConfigError: it is no such address, or one of the other kind.
    """
    match = _TARGET.fullmatch(text)
    if match is None or match["user"].lower() in _KINDS or any(bad in match["name"] for bad in ("--", "..")):
        example = "hf://datasets/USER/NAME" if kind == "dataset" else "hf://USER/NAME"
        raise ConfigError(f"--to {text}: give {example}, a repository on the Hugging Face Hub")
    if match["kind"] and match["kind"] != f"{kind}s/":
        raise ConfigError(f"--to {text}: this is a {kind}; give hf://{match['name']}")
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or DEFAULT_ENDPOINT
    return Repository(match["name"], kind, endpoint, private)


@os_errors_as_user_errors()
def push_run(repository: Repository, generator: Path, card: str, *, onnx: bool = False) -> list[str]:
    """Upload the generator, its config.json, the card, and with `onnx` the generator as ONNX, in one commit.

    The generator is exported first, which compares what the exported files compute with the original. Returns the
    names of the files in the repository.

    Raises:
        ConfigError: there is no token, or it may not write there.
        ServerError: the Hub does not answer as it should.
        ExportError: an exported file computes something else.
        IxiError: a file cannot be read or written.
    """
    from huggingface_hub import CommitOperationAdd

    from model.export import ONNX, export
    from model.generator import GENERATOR_FILE

    api = _api(repository)
    with TemporaryDirectory() as folder:
        files = {GENERATOR_FILE: generator}
        if onnx:
            files[ONNX] = export(generator, "onnx", Path(folder) / "onnx")[0]
        files["config.json"] = export(generator, "safetensors", Path(folder) / "safetensors")[0].with_name(
            "config.json"
        )
        operations = [CommitOperationAdd(name, str(path)) for name, path in sorted(files.items())]
        for operation in operations:
            _ = operation.upload_info.sha256  # computed now: a file that cannot be read is no fault of the Hub
        operations.append(CommitOperationAdd(CARD, card.encode()))
        with _user_errors(repository):
            _create(api, repository)
            api.create_commit(repository.name, operations, commit_message="Upload a generator made by IXI ETL")
    return sorted([CARD, *files])


@os_errors_as_user_errors()
def push_version(repository: Repository, folder: Path, card: str) -> list[str]:
    """Upload the version in `folder` as the folder of its name, and the card above it.

    The card comes first: licence and credit are there before the data are. The version stays as it was published, so
    a downloaded copy can be verified. Files that are not part of it are left out. Returns the names of the files in
    the repository.

    Raises:
        DatasetError: the version is damaged.
        ConfigError: there is no token, it may not write there, or the version is not on this machine.
        ServerError: the Hub does not answer as it should.
        IxiError: a file cannot be read.
    """
    if not is_local(folder):
        raise ConfigError(f"{folder} is not on this machine; copy it to a folder, and push that")
    api = _api(repository)
    problems = verify.verify_files(folder)
    if problems:
        raise DatasetError(f"{problems[0]}; `ixi-etl verify` lists everything that is wrong")
    version = metadata.read_metadata(folder)
    names = [*version["files"], metadata.METADATA]
    names += [name for name in metadata.UNHASHED if (folder / name).is_file()]
    with _user_errors(repository), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warnings while validating metadata")  # of the version's own README
        _create(api, repository)
        api.upload_file(
            path_or_fileobj=card.encode(),
            path_in_repo=CARD,
            repo_id=repository.name,
            repo_type="dataset",
            commit_message="Describe the dataset",
        )
        api.upload_folder(
            folder_path=folder,
            path_in_repo=version["version"],
            repo_id=repository.name,
            repo_type="dataset",
            allow_patterns=names,
            ignore_patterns=[],
            commit_message=f"Upload version {version['version']}, made by IXI ETL",
        )
    return [CARD, *sorted(f"{version['version']}/{name}" for name in names)]


def _api(repository: Repository) -> HfApi:
    """The client of the Hub, which sends the user's token.

    Raises:
        ConfigError: there is no token.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]
    from huggingface_hub.utils import logging as hub_logging

    disable_progress_bars()
    hub_logging.set_verbosity_error()
    if get_token() is None:
        raise ConfigError(
            f"no token for {repository.endpoint}: set HF_TOKEN, or run `hf auth login`, with a token that may write"
        )
    return HfApi(repository.endpoint, library_name="ixi-etl")


def _create(api: HfApi, repository: Repository) -> None:
    api.create_repo(repository.name, repo_type=repository.kind, private=repository.private, exist_ok=True)


@contextmanager
def _user_errors(repository: Repository) -> Iterator[None]:
    """Translate the errors of a push to one line each. No message of the Hub or of its client contains the token.

    An `OSError` of a local file is raised as it is.
    """
    import httpx2  # of huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    where = repository.endpoint
    refusals = {
        401: f"{where} does not accept the token (401): make a new one that may write, and set HF_TOKEN",
        403: f"the token may not write to {repository.name} at {where} (403): use one that may, or another --to",
        404: f"{where} has no {repository.name} and cannot make it (404): check --to and HF_ENDPOINT",
    }
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in refusals:
            raise ConfigError(refusals[status]) from error
        said = " ".join((error.server_message or str(error)).split())
        raise ServerError(f"{where} answered {status} ({said}); nothing or a part was uploaded: push again") from error
    except OfflineModeIsEnabled as error:
        raise ConfigError("HF_HUB_OFFLINE is set, which forbids requests to the Hub; unset it to push") from error
    except (httpx2.HTTPError, ConnectionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ServerError(f"{where} does not answer ({reason}); check the connection and HF_ENDPOINT") from error
    except (ValueError, RuntimeError) as error:  # a rejected card, or a broken upload of a large file
        raise ServerError(f"{where} did not take the files ({' '.join(str(error).split())})") from error
