"""The published files: their URLs, MD5s and licence, the sites of IXI; and the location of a user's own files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from ixi_etl.core.storage import expand_home, is_url, reject_url_credentials
from ixi_etl.errors import ConfigError, DownloadError

SCHEMES = ("http", "https", "s3")
"""URL schemes that `--source` accepts."""

LICENCE = "CC BY-SA 3.0 (https://creativecommons.org/licenses/by-sa/3.0/)"
HOMEPAGE = "https://brain-development.org/ixi-dataset/"
CREDIT = (
    f"IXI dataset, {HOMEPAGE}, collected at Hammersmith Hospital, Guy's Hospital and the Institute of Psychiatry, "
    "London (EPSRC GR/S21533/02)"
)


@dataclass(frozen=True)
class Site:
    """A hospital of IXI in London, and its scanner (field strength in tesla)."""

    hospital: str
    manufacturer: str
    tesla: float


SITES = {
    "Guys": Site("Guy's Hospital", "Philips", 1.5),
    "HH": Site("Hammersmith Hospital", "Philips", 3),
    "IOP": Site("Institute of Psychiatry", "GE", 1.5),
}
"""Site in the name of a scan of IXI -> what is published about it."""

_HOST = "https://biomedic.doc.ic.ac.uk/brain-development/downloads/IXI"
_MIRROR = "https://huggingface.co/datasets/Santhosh1884/IXI-Datasets/resolve/main"

# Two public readers of IXI agree on the MD5s of T1 and T2. That of PD has one source; that of MRA is not known.
_MD5 = {
    "IXI-T1.tar": "34901a0593b41dd19c1a1f746eac2d58",
    "IXI-T2.tar": "e3140d78730ecdd32ba92da48c0a9aaa",
    "IXI-PD.tar": "88ecd9d1fa33cb4a2278183b42ffd749",
    "IXI.xls": "066002afe250e4375d132266fcfceac5",
}

MNIST_HOSTS = ("https://ossci-datasets.s3.amazonaws.com/mnist", "http://yann.lecun.com/exdb/mnist")
MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
MNIST_CREDIT = "MNIST handwritten digits, Y. LeCun, C. Cortes and C. J. C. Burges, yann.lecun.com/exdb/mnist"


@dataclass(frozen=True)
class Source:
    """A file to acquire.

    Attributes:
        name: its name on disk, for example `IXI-T1.tar`.
        urls: where to download it, in the order to try; a single path or URL for a user's own file.
        md5: the expected MD5, or None if unknown.

    Raises:
        ConfigError: a URL contains a secret; URLs are logged and recorded.
    """

    name: str
    urls: tuple[str, ...]
    md5: str | None

    def __post_init__(self) -> None:
        for url in self.urls:
            reject_url_credentials(url)

    @property
    def over_http(self) -> bool:
        """Whether it must be downloaded. Anything else (a path, s3://) is read in place."""
        return self.urls[0].startswith(("http://", "https://"))


def official(name: str) -> Source:
    """The published file `name`, at its official host and then at a mirror.

    A file without a known MD5 is fetched from the official host only, because nothing could verify a mirror's.
    """
    mirrors = (f"{_MIRROR}/{name}",) if has_md5(name) else ()
    return Source(name, (f"{_HOST}/{name}", *mirrors), _MD5.get(name))


def is_of_ixi(location: str, name: str) -> bool:
    """Whether `location` is the published file `name` on IXI's own host. A mirror needs an MD5 to prove that it is."""
    return location == f"{_HOST}/{name}"


def has_md5(name: str) -> bool:
    """Whether the MD5 of the published file `name` is known."""
    return name in _MD5


def is_published(name: str, md5: str) -> bool:
    """Whether the published file `name` has this MD5."""
    return _MD5.get(name) == md5


def mnist(folder: str | None = None) -> dict[str, Source]:
    """The four files of MNIST by name, from their hosts or from a user's folder or URL, with the published MD5s."""
    hosts = MNIST_HOSTS if folder is None else (normalise_location(folder),)
    return {name: Source(name, tuple(f"{host}/{name}" for host in hosts), md5) for name, md5 in MNIST_MD5.items()}


def normalise_location(location: str) -> str:
    """An absolute path, or a URL of `SCHEMES`, without trailing slash; `file://` URLs become paths.

    Raises:
        ConfigError: it is neither, or contains a password.
    """
    reject_url_credentials(location)
    local = re.fullmatch("file://(?:localhost)?(/.*)", location)
    if local:
        location = unquote(local[1])
    if not is_url(location):
        path = expand_home(location)
        # Keep the name of a tar that is a symbolic link: content-addressed stores link to files named by hash.
        return str(path.parent.resolve() / path.name if path.suffix == ".tar" else path.resolve()).rstrip("/")
    if location.partition("://")[0] not in SCHEMES or not location.isprintable():
        raise ConfigError(f"cannot read {location!r}: give a folder, or a URL of http, https or s3, as --source")
    try:
        _ = urlsplit(location).port
    except ValueError as error:
        raise ConfigError(f"cannot read {location!r}: it is not a valid URL ({error}); correct --source") from error
    return location.rstrip("/")


def basename(location: str) -> str:
    return (unquote(urlsplit(location).path) if is_url(location) else location).rpartition("/")[2]


def not_found(location: str) -> DownloadError:
    return DownloadError(f"{location} is not there; give a --source that has {basename(location)}")
