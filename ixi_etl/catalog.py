"""Which files there are, where they are served, and how each is known to be right."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from ixi_etl.errors import ArchiveError
from ixi_etl.places import expanded, is_url, refuse_secret

MODALITIES = ("T1", "T2")
SCHEMES = ("http", "https", "s3")  # of the URLs that a person's own files may lie at

LICENCE = "CC BY-SA 3.0 (https://creativecommons.org/licenses/by-sa/3.0/)"
CREDIT = (
    "IXI dataset, https://brain-development.org/ixi-dataset/, collected at Hammersmith Hospital, Guy's Hospital and "
    "the Institute of Psychiatry, London (EPSRC GR/S21533/02)"
)

_HOST = "https://biomedic.doc.ic.ac.uk/brain-development/downloads/IXI"
_MIRROR = "https://huggingface.co/datasets/Santhosh1884/IXI-Datasets/resolve/main"

# MD5 of the published files. Two public readers of IXI agree on those of T1 and T2.
_MD5 = {
    "IXI-T1.tar": "34901a0593b41dd19c1a1f746eac2d58",
    "IXI-T2.tar": "e3140d78730ecdd32ba92da48c0a9aaa",
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
    """One file to get.

    Attributes:
        name: the name it gets on disk, for example `IXI-T1.tar`.
        urls: where it is served, in the order to try; a single path or URL for a person's own file. They are logged
            and recorded, so none may hold a secret.
        md5: what its MD5 must be, or None where nobody has said.
    """

    name: str
    urls: tuple[str, ...]
    md5: str | None

    def __post_init__(self) -> None:
        for url in self.urls:
            refuse_secret(url)

    @property
    def over_http(self) -> bool:
        """Whether it must be downloaded; all else (a path, s3://) is read where it lies."""
        return self.urls[0].startswith(("http://", "https://"))


def official(name: str) -> Source:
    """The published file `name` at its official host, then its mirrors."""
    return Source(name, (f"{_HOST}/{name}", f"{_MIRROR}/{name}"), _MD5[name])


def is_published(name: str, md5: str) -> bool:
    """Whether the published file `name` has this MD5."""
    return _MD5.get(name) == md5


def mnist(folder: str | None = None) -> dict[str, Source]:
    """The four files of MNIST by name, from their hosts or from your own folder or URL; always of the published MD5."""
    hosts = MNIST_HOSTS if folder is None else (_absolute(folder),)
    return {name: Source(name, tuple(f"{host}/{name}" for host in hosts), md5) for name, md5 in MNIST_MD5.items()}


def archive_name(modality: str) -> str:
    return f"IXI-{modality}.tar"


def own_archives(source: str) -> dict[str, str]:
    """Modality -> path or URL of a person's own archives.

    `source` is a folder or URL that holds `IXI-T1.tar` and `IXI-T2.tar`, or one such tar: then its sibling of the
    other modality is taken from beside it.
    """
    place = _absolute(source)
    if place.endswith(".tar") and not os.path.isdir(place):
        folder, _, name = place.rpartition("/")
        modality = modality_of(name)
        if modality is None:
            raise ArchiveError(f"{source}: cannot tell T1 from T2 by the name {name}; call it IXI-T1.tar or IXI-T2.tar")
        return {m: f"{folder}/{name.replace(modality, m)}" for m in MODALITIES}
    return {m: f"{place}/{archive_name(m)}" for m in MODALITIES}


def _absolute(place: str) -> str:
    """A file, folder or URL without its last slash; a path, or file:// URL, from the root of the file system.

    Raises:
        IxiError: it is neither, or has a password in it.
    """
    refuse_secret(place)
    local = re.fullmatch("file://(?:localhost)?(/.*)", place)
    if local:
        place = unquote(local[1])
    if not is_url(place):
        path = expanded(place)
        # Stores that keep files by their hash link to them, so the name of a tar is the link's own.
        return str(path.parent.resolve() / path.name if path.suffix == ".tar" else path.resolve()).rstrip("/")
    if place.partition("://")[0] not in SCHEMES or not place.isprintable():
        raise ArchiveError(f"cannot read {place!r}: give a folder, or a URL of http, https or s3, as --source")
    try:
        _ = urlsplit(place).port
    except ValueError as error:
        raise ArchiveError(f"cannot read {place!r}: it is no URL ({error}); mend --source") from error
    return place.rstrip("/")


def modality_of(tar_name: str) -> str | None:
    """`T1` or `T2` as the archive's own name says, or None."""
    found = set(re.findall("T[12]", tar_name))
    return found.pop() if len(found) == 1 else None


def basename(place: str) -> str:
    return (unquote(urlsplit(place).path) if is_url(place) else place).rpartition("/")[2]


_MD5SUM = re.compile(r"(?P<escaped>\\?)(?P<md5>[0-9a-f]{32})\s+\*?(?P<name>\S.*)", re.IGNORECASE)
_BSD = re.compile(r"(?P<escaped>\\?)MD5 ?\((?P<name>.+)\) ?= ?(?P<md5>[0-9a-f]{32})", re.IGNORECASE)


def parse_md5sums(data: bytes) -> list[tuple[str, str]]:
    """(name, MD5) of each line as md5sum, BSD's md5 or openssl write them, in UTF-8 or UTF-16; other lines are skipped.

    Names are as they stand there, with their folders, but for the escapes of md5sum.
    """
    found = []
    for line in re.split("[\r\n]+", data.decode(json.detect_encoding(data), "replace")):
        match = _MD5SUM.fullmatch(line.strip()) or _BSD.fullmatch(line.strip())
        if match:
            name = match["name"]
            if match["escaped"]:
                name = re.sub(r"\\([\\nr])", lambda char: {"n": "\n", "r": "\r"}.get(char[1], char[1]), name)
            found.append((name, match["md5"].lower()))
    return found


def md5_of(name: str, listed: Iterable[tuple[str, str]]) -> str | None:
    """The MD5 that a list says of the file `name` beside it, or None where it does not say.

    A line with just that name counts before those that have a folder before it, and those before another case.

    Raises:
        ArchiveError: lines contradict each other.
    """
    for of in (
        lambda text: text.removeprefix("./"),
        lambda text: re.split(r"[/\\]", text)[-1],
        lambda text: re.split(r"[/\\]", text)[-1].casefold(),
    ):
        digests = {md5 for text, md5 in listed if of(text) == of(name)}
        if len(digests) > 1:
            raise ArchiveError(f"its lines for {name} contradict each other")
        if digests:
            return digests.pop()
    return None
