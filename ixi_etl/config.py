"""The options of every job, as validated models that reject unknown fields.

The command line makes its options from these fields (`flows.cli.options`), and Prefect its parameters.
"""

from __future__ import annotations

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
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from ixi_etl import modalities
from ixi_etl.core.http_options import HttpOptions
from ixi_etl.core.option import Option
from ixi_etl.core.parallel import usable_cores
from ixi_etl.core.storage import (
    NO_URL_CREDENTIALS,
    DataRoot,
    expand_home,
    reject_unusable_path,
    reject_url_credentials,
)
from ixi_etl.core.text import printable, quantity
from ixi_etl.errors import IxiError, redacted
from ixi_etl.modalities import DEFAULT_MODALITIES, MODALITIES

SPLITS = ("train", "val", "test")

MIN_SIMILARITY = 0.6  # of two names, from 0 to 1, so that one is suggested for the other

MIN_NMI = 0.06
"""Scans of two people, registered, have at most 0.058, and well-registered real pairs at least 0.090: measured with
the search before this one (docs/registration.md)."""

MAX_REGISTRATION_ERROR_MM = 1.0
"""Real pairs as they are, or with one fault, have estimates up to 0.66 mm; with all faults at once 0.29 to 2.89 mm
(docs/registration.md)."""


class StrictModel(BaseModel):
    """A configuration that rejects an unknown field and suggests the nearest known one."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _reject_unknown_fields(cls, given: Any) -> Any:
        if isinstance(given, dict):
            unknown = [str(name) for name in given if name not in cls.model_fields]
            if unknown:
                raise ValueError("; ".join(_unknown_field(name, list(cls.model_fields)) for name in unknown))
        return given


def _unknown_field(name: str, fields: Sequence[str]) -> str:
    near = nearest_name(name, fields)
    return f"there is no field {name}; " + (f"did you mean {near}?" if near else f"the fields are {', '.join(fields)}")


def nearest_name(name: str, known: Sequence[str]) -> str | None:
    """The known name that `name` most probably stands for; None if none is similar.

    Similar are a typo (`batch_sise`), a part (`batch`, `lambda`) or the words of initials (`learning_rate` for `lr`).
    """

    def likeness(field: str) -> float:
        words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
        typed, there = "".join(words), field.lower().replace("_", "")
        if typed == there or (len(words) > 1 and "".join(word[0] for word in words) == there):
            return 1.0
        whole_word = len(typed) > 1 and typed in field.lower().split("_")
        return max(SequenceMatcher(None, typed, there).ratio(), 0.9 if whole_word else 0.0)

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best) >= MIN_SIMILARITY else None


def format_validation_error(error: ValidationError) -> str:
    """One line that names each invalid field and what is wrong with it, without the secrets of URLs."""
    problems = (
        f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}".lstrip(": ") for e in error.errors()
    )
    return redacted("; ".join(problems))


def _without_credentials(location: str) -> str:
    """Return `location`; reject a URL with credentials."""
    try:
        reject_url_credentials(location)
    except IxiError as error:
        raise ValueError(str(error)) from None
    return location


def _check_path(location: Any) -> str:
    """Return `location` as text; reject a path at which no store can be opened."""
    try:
        reject_unusable_path(location)
    except IxiError as error:
        raise ValueError(str(error)) from None
    return str(location)


def _check_utf8(location: Any) -> Any:
    """Return `location`; reject text that is not UTF-8, whose path pydantic's own message would not name."""
    try:
        str(location).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{printable(str(location))} is not UTF-8; give another name") from None
    return location


NO_SECRET = Field(json_schema_extra={"pattern": NO_URL_CREDENTIALS})
"""Makes the Prefect server refuse a URL with a password in this parameter of a run, which it would store."""

UserText = Annotated[str, BeforeValidator(_check_utf8), AfterValidator(_without_credentials), NO_SECRET]
UserPath = Annotated[UserText, Field(min_length=1)]


def _upper_case(given: Any) -> Any:
    return given.upper() if isinstance(given, str) else given


def _split_names(given: Any) -> Any:
    """`"T1,t2"` or `["T1", "t2"]` -> `["T1", "T2"]`; what is neither text nor a list stays."""
    names = re.split(r"[,\s]+", given) if isinstance(given, str) else given
    return [_upper_case(name) for name in names if name != ""] if isinstance(names, list | tuple) else names


def _check_modalities(given: tuple[str, ...]) -> tuple[str, ...]:
    """Return the modalities in their usual order; reject none, repeated and unknown ones."""
    unknown = [name for name in given if name not in MODALITIES]
    if unknown:
        raise ValueError(f"there is no modality {unknown[0]}; the modalities are {', '.join(MODALITIES)}")
    if len(set(given)) < len(given) or not given:
        raise ValueError(f"{', '.join(given) or 'nothing'}: give different ones of {', '.join(MODALITIES)}")
    return modalities.in_order(given)


Modalities = Annotated[tuple[str, ...], BeforeValidator(_split_names), AfterValidator(_check_modalities)]


def chosen_modalities(given: Any) -> tuple[str, ...]:
    """Modalities as the field `modalities` takes them, one or more: for a survey, which makes no pairs.

    Raises:
        pydantic.ValidationError: one is unknown or repeated.
    """
    return TypeAdapter(Modalities).validate_python(given)


Count = Annotated[int, Field(ge=0)]
Normalisation = Literal["percentiles", "range", "mean"]


class DatasetConfig(StrictModel):
    """How a version is made from its archives. Every field changes its bytes, so all are part of its name."""

    modalities: Annotated[Modalities, Option(type=str, metavar="T1,T2,...")] = Field(
        DEFAULT_MODALITIES, description=f"which of {', '.join(MODALITIES)} the dataset has, separated by commas"
    )
    reference: Annotated[
        Literal["T1", "T2", "PD", "MRA"], BeforeValidator(_upper_case), Option(type=str, metavar="T1|T2|...")
    ] = Field("T2", description="modality whose slices are cut and never resampled; the others are moved to it")
    register_echoes: bool = Field(
        False, description="also register PD to T2, or T2 to PD: echoes of one scan, whose voxels agree"
    )
    incomplete: Literal["exclude", "keep"] = Field(
        "exclude", description="exclude, or keep, subjects that have the reference and only some of the others"
    )
    margin: Annotated[int, Field(ge=0, le=64)] = Field(
        0, description="slices on either side of the window that are stored as neighbours, never as targets"
    )
    pairing: Literal["anatomical", "index"] = Field(
        "anatomical",
        description="anatomical: all scans on the reference's planes; index: slice k with slice k as stored",
    )
    window: Annotated[Literal["middle"] | tuple[int, int], Option(type=tuple[int, int], metavar="START STOP")] = Field(
        "middle", description="the middle slices, or an explicit [start, stop) along the slice axis"
    )
    slices: Annotated[int, Field(gt=0)] = Field(20, description="number of slices in the window, unless it is explicit")
    slice_rule: Literal["middle", "area"] = Field(
        "middle",
        description="middle: the middle slices of the volume; area: the adjacent slices with the largest area of head",
    )
    depth: Literal["modal", "any"] = Field(
        "modal",
        description="modal: keep only volumes of the most common depth, as published; any: keep every depth that fits",
    )
    registration: Literal["none", "rigid", "affine"] = Field(
        "rigid",
        description="rigid: correct the motion between the scans; affine: also scale and shear (12 parameters); "
        "none: align by headers only (always none for index)",
    )
    min_nmi: Annotated[float, Field(ge=0, le=1)] = Field(
        MIN_NMI,
        description="minimum normalised mutual information (NMI); pairs below it, or far below those of their site, "
        "have low similarity",
    )
    low_similarity: Literal["flag", "exclude"] = Field("flag", description="flag or exclude low-similarity pairs")
    max_registration_error: Annotated[float, Field(gt=0)] = Field(
        MAX_REGISTRATION_ERROR_MM,
        description="maximum estimated error of the registration (mm); pairs above it are uncertain",
    )
    uncertain: Literal["flag", "exclude"] = Field(
        "flag", description="flag or exclude pairs whose registration is uncertain"
    )
    pictures: bool = Field(True, description="draw a picture of each pair, and a sheet of the ten least similar")
    split_seed: int = Field(0, description="seed of the hash that assigns each person to train, val or test")
    split: tuple[float, float, float] = Field((0.8, 0.1, 0.1), description="shares of train, val and test")
    split_by: Literal["person", "order", "file"] = Field(
        "person",
        description="person: by a hash, so no person is in two splits; order: the first subjects are train, by "
        "--split-counts; file: slices are shuffled, so one person's can be in several splits",
    )
    split_counts: tuple[Count, Count, Count] | None = Field(
        None, description="numbers of subjects in train, val and test, for --split-by order"
    )
    subjects: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="use only the first subjects that can be used, in the order of their ids; --fetch members still "
        "fetches all candidates",
    )
    normalisation: Normalisation = Field(
        "percentiles",
        description="which values become 0 and 1. percentiles: 0.1 and 99.9 of the slab; range: its least and largest; "
        "mean: 0, and the largest over all subjects of value / the slab's mean",
    )
    preparation: Annotated[Literal["none", "syndiff", "selfrdb", "moschetto"], Option(hidden=True)] = Field(
        "none", description="the published preparation that a preset follows; its deviations are recorded"
    )

    @model_validator(mode="before")
    @classmethod
    def _default_split_by(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("split_counts") is not None:
            return {"split_by": "order"} | given
        return given

    @model_validator(mode="before")
    @classmethod
    def _default_index_registration(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("pairing") == "index":
            return {"registration": "none"} | given
        return given

    @model_validator(mode="after")
    def _check(self) -> DatasetConfig:
        if len(self.modalities) < 2:
            raise ValueError(f"{self.modalities[0]} alone makes no pairs; give two or more modalities")
        if self.reference not in self.modalities:
            raise ValueError(f"reference {self.reference} is not one of the modalities {', '.join(self.modalities)}")
        if self.window != "middle" and not 0 <= self.window[0] < self.window[1]:
            raise ValueError(f"window {list(self.window)} must be 0 <= start < stop")
        if self.pairing == "index" and self.registration != "none":
            raise ValueError("index pairing takes slices as stored; --registration must be none")
        if min(self.split) < 0 or abs(sum(self.split) - 1) > 1e-9:
            raise ValueError(f"split shares {list(self.split)} must be >= 0 and add up to 1")
        if self.slice_rule == "area":
            self._check_area()
        self._check_split_counts()
        return self

    def _check_area(self) -> None:
        if self.window != "middle":
            raise ValueError(f"window {list(self.window)} is explicit; give --slice-rule middle")
        if self.pairing == "index":
            raise ValueError("index pairing takes the same slices of all subjects; give --slice-rule middle")

    def _check_split_counts(self) -> None:
        if (self.split_by == "order") != (self.split_counts is not None):
            raise ValueError("--split-by order needs --split-counts, for example 25 5 10, and only order uses them")
        if self.split_counts is None:
            return
        needed = sum(self.split_counts)
        if not needed:
            raise ValueError("--split-counts 0 0 0 uses no subject; give for example 25 5 10")
        if self.subjects not in (None, needed):
            raise ValueError(
                f"--split-counts {self.shown_counts} uses {quantity(needed, 'subject')}, but --subjects is "
                f"{self.subjects}; leave out --subjects, or give --split-counts that add up to {self.subjects}"
            )

    @property
    def shown_counts(self) -> str:
        """`25 + 5 + 10`, of `split_counts`."""
        return " + ".join(map(str, self.split_counts or ()))

    @property
    def subject_limit(self) -> int | None:
        """The largest number of subjects that are used; None if all are."""
        return sum(self.split_counts) if self.split_counts else self.subjects

    @property
    def target_slices(self) -> int:
        """Number of slices of a slab that are targets: without the margin."""
        return self.slices if self.window == "middle" else self.window[1] - self.window[0]

    def window_in(self, depth: int) -> tuple[int, int] | None:
        """The window [start, stop) among `depth` slices, with the margin; None if it does not fit.

        With `slice_rule = area` the window depends on the voxels; this one only shows whether one fits.
        """
        if self.window == "middle":
            start = (depth - self.slices) // 2
            start, stop = start, start + self.slices
        else:
            start, stop = self.window
        start, stop = start - self.margin, stop + self.margin
        return (start, stop) if start >= 0 and stop <= depth else None

    @property
    def window_length(self) -> int:
        """Number of slices of a slab, with the margin."""
        return self.target_slices + 2 * self.margin

    @property
    def name(self) -> str:
        """The name of the dataset, for example `ixi-t1-t2`."""
        return modalities.dataset_name(self.modalities, self.reference)

    @property
    def moving(self) -> tuple[str, ...]:
        """The modalities other than the reference."""
        return modalities.moving(self.modalities, self.reference)

    @model_serializer(mode="wrap")
    def _leave_out_unused(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out `NEWER_FIELDS` at their defaults, so that versions made before these existed keep their name."""
        fields: dict[str, Any] = serialise(self)
        return {
            name: value
            for name, value in fields.items()
            if name not in NEWER_FIELDS or getattr(self, name) != type(self).model_fields[name].default
        }


NEWER_FIELDS = frozenset(
    {
        "modalities",
        "reference",
        "register_echoes",
        "incomplete",
        "margin",
        "slice_rule",
        "split_by",
        "split_counts",
        "subjects",
        "normalisation",
        "preparation",
    }
)
"""Fields of `DatasetConfig` that are newer than pipeline version 8."""


class JobConfig(StrictModel):
    """Fields of every job that makes a dataset version."""

    root: Annotated[str, Option(envvar="IXI_ROOT"), NO_SECRET] = Field(
        "ixi-data", description="folder or s3://bucket/prefix that holds datasets and runs"
    )
    scratch: Annotated[Path | None, Option(envvar="IXI_SCRATCH"), NO_SECRET] = Field(
        None, description="if the root is on S3: folder for archives and unfinished work"
    )
    offline: bool = Field(False, description="use verified files only; make no network request")

    @property
    def http(self) -> HttpOptions:
        return HttpOptions(offline=self.offline)

    @field_validator("root", mode="before")
    @classmethod
    def _normalise_root(cls, root: Any) -> str:
        _without_credentials(str(root))
        _check_path(root)
        if re.match(r"s3://[^/]", str(root)):
            return str(root).rstrip("/")
        if not str(root) or re.match(r"[a-z0-9]+:/", str(root)):
            raise ValueError(f"{str(root)!r} is neither a folder nor s3://bucket/prefix")
        return _check_path(str(expand_home(root).resolve()))  # absolute, for workers in other folders

    @field_validator("scratch", mode="before")
    @classmethod
    def _normalise_scratch(cls, scratch: Any) -> Any:
        _without_credentials(str(scratch))
        return (
            Path(_check_path(expand_home(scratch).resolve())) if scratch else None
        )  # an unset variable of prefect.yaml gives ""


class RefreshConfig(JobConfig):
    """One refresh: its sources, where it writes, how much it works in parallel, and which dataset it makes."""

    source: UserPath | None = Field(
        None,
        description="your own files instead of the official archives: a tar, a folder of tars, an http, https or s3 "
        "URL of tars, or a folder of .nii and .nii.gz files, loose or in BIDS",
    )
    demographics: UserText | None = Field(
        None, description="join age and sex from 'official' (fetches IXI.xls) or your own .xls, .xlsx or .csv"
    )
    dataset: DatasetConfig = DatasetConfig()
    max_unreadable: Annotated[float, Field(ge=0, le=1)] = Field(
        0.05, description="share of paired subjects that may be unreadable (10 always may) before the refresh fails"
    )
    checks: Literal["warn", "block"] = Field(
        "block",
        description="block: publish a version that fails a data check, but hold its hand-off to training; warn: only "
        "log it (docs/checks.md)",
    )
    max_change: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1,
        description="largest change of any funnel step's share of subjects since the last version of the same options",
    )
    fetch: Literal["archives", "members"] = Field(
        "archives",
        description="archives: whole, checked by MD5; members: over HTTP, only usable subjects, MD5 unchecked",
    )
    connections: Annotated[int, Field(ge=1, le=16)] = Field(4, description="parallel requests for each archive")
    workers: Annotated[int, Field(ge=1)] = Field(
        default_factory=usable_cores,
        description="threads that cut subjects on this machine; by default one per available core",
    )
    dask: UserText | None = Field(None, description="Dask scheduler to cut subjects on, tcp://host:port")
    pattern: tuple[UserText, ...] = Field(
        (),
        description="how the files of --source are named, such as '{subject}_{site}_{modality}.nii.gz', or "
        "'T1={subject}/mprage.nii.gz' for one modality; may be repeated",
    )
    insecure_hosts: Annotated[tuple[Annotated[str, NO_SECRET], ...], Option(flag="--insecure-host")] = Field(
        (), description="host whose TLS certificate is not checked; may be repeated"
    )

    @model_validator(mode="after")
    def _pattern_needs_source(self) -> RefreshConfig:
        if self.pattern and self.source is None:
            raise ValueError("pattern says how the files of source are named; give source too")
        return self

    @model_validator(mode="after")
    def _members_need_network(self) -> RefreshConfig:
        if self.fetch == "members" and self.offline:
            raise ValueError("fetch = members needs the network to find the members; leave out offline")
        return self

    @property
    def data_root(self) -> DataRoot:
        return DataRoot(self.root, self.dataset.name, self.scratch)

    @property
    def http(self) -> HttpOptions:
        return HttpOptions(self.connections, self.insecure_hosts, self.offline)


class DigitsDataset(StrictModel):
    """Which digits a version has. Part of the name of the version."""

    limit: Annotated[int, Field(ge=2)] | None = Field(
        None, description="use only the first images of the training file and of the test file"
    )


class DigitsConfig(JobConfig):
    """One run that makes the MNIST dataset."""

    source: UserPath | None = Field(
        None, description="folder or URL of the four original files, instead of the official host"
    )
    dataset: DigitsDataset = DigitsDataset()

    @property
    def data_root(self) -> DataRoot:
        return DataRoot(self.root, "digits", self.scratch)
