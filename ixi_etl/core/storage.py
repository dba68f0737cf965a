"""Local folders and `s3://bucket/prefix` through the same path type, and the layout of a data root.

S3 holds published versions and runs. Downloads and unfinished work are always local, in the `scratch` folder. The
environment selects the S3 server and the credentials (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

from ixi_etl.core.progress import Progress
from ixi_etl.core.text import printable
from ixi_etl.errors import ConfigError, redacted

DEFAULT_DATASET = "ixi-t1-t2"
DEFAULT_SCRATCH = Path("ixi-data")
NETRC = "put them into ~/.netrc (for S3: environment variables)"


def is_url(text: str) -> bool:
    return "://" in text


@contextmanager
def naming_file(path: str | Path) -> Iterator[None]:
    """Set the file name of an `OSError` that has none (from open files and from S3) to `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def reject_unusable_path(path: str | Path | None) -> None:
    """Refuse a path that Zarr, JSON or a Prefect server cannot represent.

    Raises:
        ConfigError: it contains `::`, control characters, or bytes that are not UTF-8.
    """
    text, shown = str(path), printable(str(path))
    if "::" in text:  # fsspec and Zarr chain URLs with it
        raise ConfigError(f"{shown} contains ::, which Zarr cannot open; choose another folder name")
    if shown != text:
        raise ConfigError(f"{shown} is not UTF-8, or has control characters; choose another folder name")


def reject_url_credentials(location: str | Path | None, advice: str = NETRC) -> None:
    """Refuse a URL with a secret, because locations appear in logs, flow parameters, `latest.json` and error messages.

    Raises:
        ConfigError: it is a URL with a password, a key, a query or a fragment, even if percent-encoded; the message
            does not repeat it, and says where to put the secret, by default `NETRC`.
    """
    text = re.sub(r"[\s'\"<>]", "_", str(location))
    for _ in range(4):  # percent-encoding can be nested
        if redacted(text) != text or re.match(r"(//)?[^/@:]{2,}:(?!/)[^@]*@", text):  # the latter has no scheme
            raise ConfigError(
                f"a URL with a password or a key in it; {advice} "
                "(what follows ? or # counts as a key: leave it out, or download such a link by other means)"
            )
        text = unquote(text)


_SCHEME = "[A-Za-z][A-Za-z0-9+.-]+:/+"
NO_URL_CREDENTIALS = (
    r"^(?:[Ff][Ii][Ll][Ee]:///|(?!"
    rf"[\s\S]*{_SCHEME}(?:[^/]*@|[\s\S]*[?#][^?#])"  # https://user:password@host, https://host?key=...
    r"|[\s\S]*[Ss]3[A-Za-z0-9+.-]*:/+(?![a-z0-9._-]*/)[\s\S]*@"  # s3://key:with/slash@bucket
    rf"|[\s\S]*{_SCHEME}[^/:\[]*:(?![0-9]{{1,5}}/)[^/]*/[\s\S]*@"  # https://user:with/slash@host
    r"|(?://)?[^/@:]{2,}:(?!/)[^@]*@"  # user:password@host
    r"))"
)
"""The JSON Schema pattern of a location: what `reject_url_credentials` accepts, and only few encodings of others.

A server stores the parameters of a run before the run can refuse them, unless their schema does not match.
"""


def expand_home(path: str | Path) -> Path:
    """Replace `~` or `~name` at the start of a path by the home folder.

    Raises:
        ConfigError: this machine has no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path}: no such user; give the full path") from error


def to_path(location: str | Path) -> Path:
    """A `Path`, or for `s3://...` a `UPath`, which has the methods of `Path` but is no subclass of it."""
    if not is_url(str(location)):
        return Path(location)
    from upath import UPath

    return cast(Path, UPath(location, use_listings_cache=False))  # other processes write there too


def is_local(path: Path) -> bool:
    return isinstance(path, Path)


def read_bytes(path: Path) -> bytes:
    """The content of a file, or of an object on S3 that another process may replace meanwhile.

    An object is read in one request: `path.read_bytes()` asks for its ETag first, and fails if that has changed since.

    Raises:
        OSError: as of `Path.read_bytes`, with the file's name.
    """
    with naming_file(path):
        if is_local(path):
            return path.read_bytes()
        filesystem, name = filesystem_of(path)
        return bytes(filesystem.cat_file(name))


@dataclass(frozen=True)
class DataRoot:
    """The layout of a data root: the paths of archives, and of the versions of the dataset `name`.

    Attributes:
        root: a folder, or `s3://bucket/prefix`.
        scratch: if the root is on S3, the local folder for archives and unfinished work; None for `ixi-data`.

    Raises:
        ConfigError: the root or the scratch folder has a password, `::` or bytes that are not UTF-8.
    """

    root: str | Path
    name: str = DEFAULT_DATASET
    scratch: Path | None = None

    def __post_init__(self) -> None:
        for location in (self.root, self.scratch):
            reject_url_credentials(location)
            reject_unusable_path(location)

    @property
    def local(self) -> Path:
        """The local folder to write to: the root itself, or the scratch folder if the root is on S3."""
        root = to_path(self.root)
        return root if is_local(root) else self.scratch or DEFAULT_SCRATCH

    @property
    def archives(self) -> Path:
        return self.local / "archives"

    @property
    def datasets(self) -> Path:
        return to_path(self.root) / "datasets" / self.name

    def version(self, version: str) -> Path:
        return self.datasets / version

    def staging(self, version: str) -> Path:
        return self.unfinished / version

    @property
    def unfinished(self) -> Path:
        return self.local / "datasets" / self.name / ".staging"

    @property
    def remote_unfinished(self) -> Path | None:
        """Where Dask workers that share no folder with the refresh put finished subjects; None if the root is local."""
        return None if is_local(self.datasets) else self.datasets / ".staging"


def check_reachable(root: str | Path) -> None:
    """Fail before hours of work rather than after. Requests stay within the root's own prefix.

    Raises:
        ConfigError: `root` is on S3, and its bucket does not exist, does not answer, or may not be listed.
    """
    if is_local(to_path(root)):
        return
    filesystem, path = filesystem_of(to_path(root))
    bucket, _, key = path.partition("/")
    try:
        filesystem.call_s3("list_objects_v2", Bucket=bucket, Prefix=f"{key}/" if key else "", MaxKeys=1)
    except PermissionError as error:
        raise ConfigError(
            f"cannot list {root} ({error}); these credentials need s3:ListBucket for that prefix, and s3:GetObject and "
            "s3:PutObject under it"
        ) from error
    except Exception as error:  # botocore, aiohttp and fsspec each have their own
        raise ConfigError(
            f"cannot reach the bucket {bucket} of {root} ({str(error) or type(error).__name__}); create it, or correct "
            "AWS_ENDPOINT_URL and the credentials"
        ) from error


def fingerprint(location: str) -> str:
    """Identity of the current content of a file or object, without reading it; it differs if the content may differ.

    For a file: size, mtime, ctime and inode. Unlike mtime, ctime cannot be set back. For an object: the metadata of
    the store (ETag, size, time), requested each time.

    Raises:
        FileNotFoundError: the file or object does not exist.
    """
    if not is_url(location):
        stat = os.stat(location)
        return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
    filesystem, path = filesystem_of(location)
    with naming_file(location):
        return str(filesystem.ukey(path))


def file_sizes(folder: Path) -> dict[str, int]:
    """Relative path -> size in bytes of every file below a folder, in one listing.

    Excludes the empty objects by which tools mark a folder on S3 (`folder/`).
    """
    filesystem, top = filesystem_of(folder)
    with naming_file(folder):
        found = filesystem.find(top, detail=True)
    sizes = {name[len(top) + 1 :]: int(info["size"]) for name, info in found.items()}
    return {name: size for name, size in sizes.items() if name and not name.endswith("/")}


def upload_folder(
    folder: Path,
    target: Path,
    last: str,
    progress: Progress,
    confirm: Callable[[], None] = lambda: None,
    confirmed: Collection[str] = (),
) -> None:
    """Copy a local folder to S3, with the file `last` after all others: its presence marks the folder as complete.

    Args:
        confirm: called before the files `confirmed` and `last` are written; what it raises ends the upload.
        confirmed: names of files that are written between that call and `last`, if the folder has them.
    """
    from fsspec.callbacks import Callback

    filesystem, top = filesystem_of(target)
    found = file_sizes(folder).keys() - {last}
    names, kept_back = sorted(found.difference(confirmed)), sorted(found.intersection(confirmed))
    callback = Callback(hooks={"progress": lambda size, value: progress("upload", value, size or len(names), "files")})
    with naming_file(target):
        filesystem.put([str(folder / name) for name in names], [f"{top}/{name}" for name in names], callback=callback)
        confirm()
        for name in (*kept_back, last):
            filesystem.put_file(str(folder / name), f"{top}/{name}")


def remove_tree(target: Path, first: str) -> None:
    """Remove everything below a path on S3, its file `first` before all others."""
    filesystem, top = filesystem_of(target)
    with naming_file(target):
        if filesystem.exists(f"{top}/{first}"):
            filesystem.rm_file(f"{top}/{first}")
        if filesystem.exists(top):
            filesystem.rm(top, recursive=True)


def filesystem_of(path: str | Path, **options: Any) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and its path within that; a local path may contain `::`."""
    import fsspec  # imported here, so that `ixi-etl --help` need not wait for it
    from fsspec.implementations.local import LocalFileSystem

    if not is_url(str(path)):
        return LocalFileSystem(), os.path.abspath(path)
    filesystem, top = fsspec.url_to_fs(str(path), use_listings_cache=False, **options)
    return filesystem, str(top).rstrip("/")
