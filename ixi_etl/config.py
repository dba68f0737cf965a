"""What a job is told to do, as validated objects; unknown keys are refused."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from ixi_etl.errors import IxiError, redacted
from ixi_etl.places import Places, expanded, printable, refuse_secret, refuse_unusable
from ixi_etl.spread import usable_cores

SPLITS = ("train", "val", "test")

NEAR = 0.6  # of 1: how alike two names must be

MIN_NMI = 0.08
"""Real pairs that are registered well have 0.090 to 0.209, two different people at most 0.058: docs/registration.md."""


class Strict(BaseModel):
    """A configuration: an unknown field is refused, with the nearest known one."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, given: Any) -> Any:
        if isinstance(given, dict):
            unknown = [str(name) for name in given if name not in cls.model_fields]
            if unknown:
                raise ValueError("; ".join(_unknown_field(name, list(cls.model_fields)) for name in unknown))
        return given


def _unknown_field(name: str, fields: Sequence[str]) -> str:
    near = nearest(name, fields)
    return f"there is no field {name}; " + (f"did you mean {near}?" if near else f"the fields are {', '.join(fields)}")


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The known name that somebody who typed `name` most probably meant, if any is near.

    Near is a slip of the keys (`batch_sise`), a part (`batch`, `lambda`) or the initials (`learning_rate` for `lr`).
    """

    def likeness(field: str) -> float:
        words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
        typed, there = "".join(words), field.lower().replace("_", "")
        if typed == there or (len(words) > 1 and "".join(word[0] for word in words) == there):
            return 1.0
        whole_word = len(typed) > 1 and typed in field.lower().split("_")
        return max(SequenceMatcher(None, typed, there).ratio(), 0.9 if whole_word else 0.0)

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best) >= NEAR else None


def in_a_line(error: ValidationError) -> str:
    """What is wrong with which field. What was given is repeated only where a message does, never a URL's secret."""
    wrong = (
        f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}".lstrip(": ") for e in error.errors()
    )
    return redacted("; ".join(wrong))


def _no_password(place: str) -> str:
    """`place`, unless it is a URL with a password."""
    try:
        refuse_secret(place)
    except IxiError as error:
        raise ValueError(str(error)) from None
    return place


def _usable(place: Any) -> str:
    """`place`, unless no store can be opened there."""
    try:
        refuse_unusable(place)
    except IxiError as error:
        raise ValueError(str(error)) from None
    return str(place)


def _text(place: Any) -> Any:
    """`place`, unless pydantic cannot hold it; its own message would not name the path."""
    try:
        str(place).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{printable(str(place))} is not UTF-8; give another name") from None
    return place


Given = Annotated[str, BeforeValidator(_text), AfterValidator(_no_password)]
Place = Annotated[Given, Field(min_length=1)]


class DatasetConfig(Strict):
    """What the data are. Every field changes bytes of a version, so all of them go into its name."""

    pairing: Literal["anatomical", "index"] = Field(
        "anatomical",
        description="anatomical: T1 resampled onto the T2's planes; index: slice k with slice k as stored",
    )
    window: Literal["middle"] | tuple[int, int] = Field(
        "middle", description="the middle slices, or an explicit [start, stop) along the slice axis"
    )
    slices: Annotated[int, Field(gt=0)] = Field(20, description="how many slices the middle window holds")
    depth: Literal["modal", "any"] = Field(
        "modal", description="modal: keep the commonest number of slices, as published; any: whatever fits the grid"
    )
    registration: Literal["none", "rigid"] = Field(
        "rigid", description="rigid: take up the motion between the scans; none: align by headers (index: always none)"
    )
    min_nmi: Annotated[float, Field(ge=0, le=1)] = Field(
        MIN_NMI, description="a pair whose normalised mutual information is lower is flagged low_similarity"
    )
    low_similarity: Literal["flag", "exclude"] = Field("flag", description="what becomes of such a pair")
    pictures: bool = Field(True, description="draw a picture of each pair, and a sheet of the worst ten")
    split_seed: int = Field(0, description="seed of the hash that puts a person into train, val or test")
    split: tuple[float, float, float] = Field((0.8, 0.1, 0.1), description="shares of train, val and test")

    @model_validator(mode="before")
    @classmethod
    def _index_is_not_registered(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("pairing") == "index":
            return {"registration": "none"} | given
        return given

    @model_validator(mode="after")
    def _check(self) -> DatasetConfig:
        if self.window != "middle" and not 0 <= self.window[0] < self.window[1]:
            raise ValueError(f"window {list(self.window)} must be 0 <= start < stop")
        if self.pairing == "index" and self.registration != "none":
            raise ValueError("index pairing takes slices as stored; registration must be none")
        if min(self.split) < 0 or abs(sum(self.split) - 1) > 1e-9:
            raise ValueError(f"split shares {list(self.split)} must be >= 0 and add up to 1")
        return self

    def window_in(self, depth: int) -> tuple[int, int] | None:
        """[start, stop) among `depth` slices, or None where it does not fit."""
        if self.window == "middle":
            start = (depth - self.slices) // 2
            start, stop = start, start + self.slices
        else:
            start, stop = self.window
        return (start, stop) if start >= 0 and stop <= depth else None

    def split_of(self, person: str) -> str:
        """Train, val or test for one person (`IXI002`): a hash, so that nobody ever moves in a refresh."""
        digest = hashlib.sha256(f"{self.split_seed}:{person}".encode()).digest()
        draw = int.from_bytes(digest[:8], "big") / 2**64
        return SPLITS[0] if draw < self.split[0] else SPLITS[1] if draw < self.split[0] + self.split[1] else SPLITS[2]


PRESETS: dict[str, dict[str, Any]] = {"paired": {}, "paper": {"pairing": "index"}}
"""What each sets. `paired`, the defaults, is what we recommend; `paper` is the published recipe."""


class _Job(Strict):
    """What every job that makes a dataset version must know."""

    root: str = Field("ixi-data", description="folder, or s3://bucket/prefix, that holds datasets")
    scratch: Path | None = Field(
        None, description="where root is on S3: folder for archives and what is still being made (else that is root)"
    )
    offline: bool = Field(False, description="use the archives that are already verified; ask no server anything")

    @field_validator("root", mode="before")
    @classmethod
    def _whole_root(cls, root: Any) -> str:
        _no_password(str(root))
        _usable(root)
        if re.match(r"s3://[^/]", str(root)):
            return str(root).rstrip("/")
        if not str(root) or re.match(r"[a-z0-9]+:/", str(root)):
            raise ValueError(f"{str(root)!r} is neither a folder nor s3://bucket/prefix")
        return _usable(str(expanded(root).resolve()))  # workers in other folders must find it

    @field_validator("scratch", mode="before")
    @classmethod
    def _whole_scratch(cls, scratch: Any) -> Any:
        _no_password(str(scratch))
        return (
            Path(_usable(expanded(scratch).resolve())) if scratch else None
        )  # "" is what a variable gives that is not set


class RefreshConfig(_Job):
    """One refresh: where it reads and writes, how hard it works, and which data it makes."""

    source: Place | None = Field(
        None, description="your own archives (folder, tar file, http(s):// or s3:// URL) instead of the official ones"
    )
    demographics: Given | None = Field(
        None, description="'official' to fetch IXI.xls, or your own table (.xls, .xlsx or .csv); omit for none"
    )
    dataset: DatasetConfig = DatasetConfig()
    max_unreadable: Annotated[float, Field(ge=0, le=1)] = Field(
        0.05, description="share of paired subjects that may be unreadable before the refresh fails (10 always may)"
    )
    fetch: Literal["archives", "members"] = Field(
        "archives",
        description="archives: whole, with their MD5s; members: over HTTP, only those of subjects that may be used",
    )
    connections: Annotated[int, Field(ge=1, le=16)] = Field(4, description="parallel ranges for each archive")
    workers: Annotated[int, Field(ge=1)] = Field(
        default_factory=usable_cores,
        description="threads that cut subjects on this machine; by default as many as cores may be used",
    )
    dask: Given | None = Field(None, description="address of a Dask scheduler (tcp://host:port) to cut subjects on")
    insecure_hosts: tuple[str, ...] = Field((), description="hosts whose TLS certificate is not checked")

    @model_validator(mode="after")
    def _members_are_asked_for(self) -> RefreshConfig:
        if self.fetch == "members" and self.offline:
            raise ValueError("offline asks no server, but fetch = members must: which members it needs stands there")
        return self

    @property
    def places(self) -> Places:
        return Places(self.root, scratch=self.scratch)


class DigitsDataset(Strict):
    """Which digits. It goes into the version's name."""

    limit: Annotated[int, Field(ge=2)] | None = Field(
        None, description="take the first so many of the training file and of the test file; omit for all"
    )


class DigitsConfig(_Job):
    """One making of the MNIST dataset."""

    source: Place | None = Field(
        None, description="folder or URL that holds the four original files, instead of the official host"
    )
    dataset: DigitsDataset = DigitsDataset()

    @property
    def places(self) -> Places:
        return Places(self.root, "digits", self.scratch)
