"""Where things lie: in a folder, or under `s3://bucket/prefix`, which is read and written by the same paths.

On S3 are published versions and runs. What is downloaded or still being made lies on this machine, in `scratch`. Which
S3, and with what credentials, stands in the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote

import fsspec
from fsspec.callbacks import Callback
from fsspec.implementations.local import LocalFileSystem

from ixi_etl.errors import IxiError, redacted

if TYPE_CHECKING:
    from ixi_etl.files import Progress

NAME = "ixi-t1-t2"  # the dataset that a version is of, where nobody says
SCRATCH = Path("ixi-data")


def is_url(text: str) -> bool:
    return "://" in text


def printable(text: str | Path) -> str:
    """`text` with escapes for control characters and for bytes of a file name that are not UTF-8."""
    plain = str(text).encode("utf-8", "backslashreplace").decode()
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", plain)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Give an `OSError` that names no file (reads, writes and syncs of open files, S3) this path."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def refuse_unusable(where: str | Path | None) -> None:
    """A place that Zarr, JSON or a Prefect server cannot name.

    Raises:
        IxiError: it has `::` in it, or bytes that are not UTF-8.
    """
    text, shown = str(where), printable(str(where))
    if "::" in text:  # fsspec and Zarr take what follows for another URL
        raise IxiError(f"{shown} has :: in it, which no store can be opened by; give a folder of another name")
    if shown != text:
        raise IxiError(f"{shown} is not UTF-8, or has control characters; give a folder of another name")


def refuse_secret(where: str | Path | None) -> None:
    """What a person gives stands in logs, parameters and `latest.json`, and in what is said of a mistake in it.

    Raises:
        IxiError: it is a URL with a password, a key, a query or a fragment, however it is written; the message does
            not repeat it.
    """
    text = re.sub(r"[\s'\"<>]", "_", str(where))
    for _ in range(4):  # it may be percent-encoded, even more than once
        if redacted(text) != text or re.match(r"(//)?[^/@:]{2,}:(?!/)[^@]*@", text):  # the latter without a scheme
            raise IxiError(
                "a URL with a password or a key in it; put those into ~/.netrc, or of S3 into the environment "
                "(what follows ? or # counts as a key: leave it out, or download such a link by other means)"
            )
        text = unquote(text)


def expanded(where: str | Path) -> Path:
    """The path with `~` and `~name` as the home folders that they mean.

    Raises:
        IxiError: there is no such person here.
    """
    try:
        return Path(where).expanduser()
    except RuntimeError as error:
        raise IxiError(f"{where}: this machine knows no home folder of that name; write the path out") from error


def place(where: str | Path) -> Path:
    """The path of a folder, or of `s3://...`: then an object that does what `Path` does (UPath, no subclass of it)."""
    if not is_url(str(where)):
        return Path(where)
    from upath import UPath

    return cast(Path, UPath(where, use_listings_cache=False))  # others write there too, so no listing is remembered


def is_local(path: Path) -> bool:
    return isinstance(path, Path)


@dataclass(frozen=True)
class Places:
    """Where the archives, and the versions of the dataset `name`, lie.

    Attributes:
        root: a folder, or `s3://bucket/prefix`.
        scratch: where the root is on S3, the folder for archives and what is still being made; None for `ixi-data`.
    """

    root: str | Path
    name: str = NAME
    scratch: Path | None = None

    def __post_init__(self) -> None:
        """Raises `IxiError`: the root or the scratch folder has a password in it, `::`, or bytes that are not UTF-8."""
        for given in (self.root, self.scratch):
            refuse_secret(given)
            refuse_unusable(given)

    @property
    def local(self) -> Path:
        """The folder of this machine that is written to: the root itself, unless that is on S3."""
        root = place(self.root)
        return root if is_local(root) else self.scratch or SCRATCH

    @property
    def archives(self) -> Path:
        return self.local / "archives"

    @property
    def datasets(self) -> Path:
        return place(self.root) / "datasets" / self.name

    def version(self, version: str) -> Path:
        return self.datasets / version

    def staging(self, version: str) -> Path:
        return self.unfinished / version

    @property
    def unfinished(self) -> Path:
        return self.local / "datasets" / self.name / ".staging"


def check_reachable(root: str | Path) -> None:
    """Better said before hours of work than after. Nothing outside the root's own prefix is asked for.

    Raises:
        IxiError: `root` is on S3, and its bucket is not there, does not answer, or may not be listed under the prefix.
    """
    if is_local(place(root)):
        return
    filesystem, path = filesystem_of(place(root))
    bucket, _, key = path.partition("/")
    try:
        filesystem.call_s3("list_objects_v2", Bucket=bucket, Prefix=f"{key}/" if key else "", MaxKeys=1)
    except PermissionError as error:
        raise IxiError(
            f"cannot list {root} ({error}); these credentials need s3:ListBucket for that prefix, and s3:GetObject and "
            "s3:PutObject under it"
        ) from error
    except Exception as error:  # botocore's, aiohttp's and fsspec's own
        raise IxiError(
            f"cannot reach the bucket {bucket} of {root} ({str(error) or type(error).__name__}); make it, or mend "
            "AWS_ENDPOINT_URL and the credentials"
        ) from error


def fingerprint(location: str) -> str:
    """Identity of the present content of a file or object, without reading it: another one means other content.

    Of a file: size, times and inode. The time of its last change cannot be set back, as that of its last writing can.
    Of an object: what the store says of it (ETag, size, time), asked anew.

    Raises:
        FileNotFoundError: there is no such file or object.
    """
    if not is_url(location):
        found = os.stat(location)
        return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"
    filesystem, path = filesystem_of(location)
    with naming(location):
        return str(filesystem.ukey(path))


def file_sizes(folder: Path) -> dict[str, int]:
    """Relative path -> size in bytes of every file below a folder, in one listing.

    The empty objects by which tools mark a folder on S3 (`folder/`) are no files.
    """
    filesystem, top = filesystem_of(folder)
    with naming(folder):
        found = filesystem.find(top, detail=True)
    sizes = {name[len(top) + 1 :]: int(info["size"]) for name, info in found.items()}
    return {name: size for name, size in sizes.items() if name and not name.endswith("/")}


def upload(folder: Path, target: Path, last: str, progress: Progress) -> None:
    """Copy a folder of this machine to S3, its file `last` when all others are there."""
    filesystem, top = filesystem_of(target)
    names = sorted(file_sizes(folder).keys() - {last})
    told = Callback(hooks={"progress": lambda size, value: progress("upload", value, size or len(names), "files")})
    with naming(target):
        filesystem.put([str(folder / name) for name in names], [f"{top}/{name}" for name in names], callback=told)
        filesystem.put_file(str(folder / last), f"{top}/{last}")


def remove(target: Path, first: str) -> None:
    """Remove all that lies under a path of S3, its file `first` before all others."""
    filesystem, top = filesystem_of(target)
    with naming(target):
        if filesystem.exists(f"{top}/{first}"):
            filesystem.rm_file(f"{top}/{first}")
        if filesystem.exists(top):
            filesystem.rm(top, recursive=True)


def filesystem_of(path: str | Path, **options: Any) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and what it calls it; a path may have any characters, `::` too."""
    if not is_url(str(path)):
        return LocalFileSystem(), os.path.abspath(path)
    filesystem, top = fsspec.url_to_fs(str(path), use_listings_cache=False, **options)
    return filesystem, str(top).rstrip("/")
