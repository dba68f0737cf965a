"""Read subject, site and modality of a volume from its name: IXI's names, plain ones, or templates (`--pattern`).

A subject's id is SUBJECT-SITE-SESSION as far as these are known. `person_of` takes what precedes the first `-`, so a
`-` in any of the three becomes `_`. Ids become parts of file names; names are never used as paths.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from ixi_etl.errors import ConfigError
from ixi_etl.modalities import MODALITIES

MAX_ID = 120  # characters of a subject's id
MAX_SEGMENT = 255  # bytes of a file's name, on every common file system
MAX_STARS = 3  # in one folder's or file's name; bounds the time of a search

_WORD = "[A-Za-z0-9][A-Za-z0-9_.]{0,39}"
NAME = re.compile(
    rf"(?P<subject_id>(?P<person>{_WORD})-(?P<site>{_WORD})-{_WORD}(-{_WORD}){{0,2}})-(?P<modality>{_WORD}?)\.nii\.gz"
)
"""The name of a member of IXI's archives."""

SUFFIXES = (".nii", ".nii.gz")

_MODALITY_WORDS = {m.lower(): m for m in MODALITIES} | {"t1w": "T1", "t2w": "T2", "pdw": "PD", "angio": "MRA"}
_ANY_MODALITY = "|".join(sorted(_MODALITY_WORDS, key=len, reverse=True))
_PLAIN = re.compile(rf"(?P<subject>.+)[_-](?P<modality>{_ANY_MODALITY})", re.IGNORECASE)

PARTS = ("subject", "site", "session", "modality")
"""Parts of a template."""

EXAMPLE = "'{subject}_{site}_{modality}.nii.gz'"


class VolumeName(NamedTuple):
    """What a name says about a volume; the site may be empty."""

    subject_id: str
    site: str
    modality: str


Namer = Callable[[str], VolumeName | None]
"""Reads a relative name; None if it is not the name of a volume."""


def is_nifti_name(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def modality_named(word: str) -> str | None:
    """The modality that a word stands for, in any case: `T1`, `t1w`, and BIDS's `angio` for MRA."""
    return _MODALITY_WORDS.get(word.lower())


def ixi_name(name: str) -> VolumeName | None:
    """Read a name such as `IXI002-Guys-0828-T1.nii.gz`, in any folder."""
    found = NAME.fullmatch(name.rpartition("/")[2])
    return VolumeName(found["subject_id"], found["site"], found["modality"]) if found else None


def plain_name(name: str) -> VolumeName | None:
    """Read the name of a loose file: IXI's, or `NAME_T1.nii.gz`, `NAME-T1w.nii`, in any case, with or without .gz."""
    stem = re.sub(r"\.nii(\.gz)?$", "", name.rpartition("/")[2], flags=re.IGNORECASE)
    like_ixi = ixi_name(f"{stem}.nii.gz")
    modality = like_ixi and modality_named(like_ixi.modality)
    if like_ixi and modality:
        return like_ixi._replace(modality=modality)
    found = _PLAIN.fullmatch(stem)
    return volume_name(found["subject"], "", "", found["modality"]) if found else None


def volume_name(subject: str, site: str, session: str, modality: str) -> VolumeName | None:
    """The name made of these parts, with characters that an id may not have replaced by `_`.

    None if nothing of the subject is left, the id is too long, or there is no such modality.
    """
    known = modality_named(modality)
    parts = [re.sub(r"[^A-Za-z0-9._]", "_", part).lstrip("._") for part in (subject, site, session)]
    subject_id = "-".join(filter(None, parts))
    return VolumeName(subject_id, parts[1], known) if known and parts[0] and len(subject_id) <= MAX_ID else None


@dataclass(frozen=True)
class NamePattern:
    """A template for names (`--pattern`); see `parse_pattern`.

    Attributes:
        template: as given.
        has_folders: whether it is compared with the name in its folders, or with the name alone.
        modality: of all names that fit; "" if the names contain it.
    """

    template: str
    has_folders: bool
    modality: str
    regex: re.Pattern[str]

    def read(self, name: str) -> VolumeName | None:
        """What a relative name says; None if it does not fit the template."""
        path = name.removeprefix("./") if self.has_folders else name.rpartition("/")[2]
        if max(map(len, path.split("/"))) > MAX_SEGMENT:
            return None
        found = self.regex.fullmatch(path)
        if found is None:
            return None
        parts = {"site": "", "session": "", "modality": self.modality} | found.groupdict()
        return volume_name(parts["subject"], parts["site"], parts["session"], parts["modality"])


def parse_pattern(template: str) -> NamePattern:
    """Compile a template such as `{subject}_{site}_{modality}.nii.gz` or `T1={subject}/mprage.nii.gz`.

    `{subject}`, `{site}` and `{session}` stand for letters, digits and dots; one that is alone in the name of a folder
    or file may also contain `_` and `-`. `{modality}` stands for T1, T2, PD or MRA in any case, with or without `w`, or
    `angio`. `*` stands for anything but `/`. A part that is repeated must have the same text again. A template without
    `/` is compared with names alone, in any folder.

    Raises:
        ConfigError: the template is invalid.
    """
    prefix, equals, rest = template.partition("=")
    modality = (modality_named(prefix) if equals else None) or ""
    path = (rest if modality else template).removeprefix("./")
    pieces = re.findall(r"\{[^{}/]*\}|\*|[^{}*]+|[{}]", path)
    names = [piece[1:-1] for piece in pieces if len(piece) > 1 and piece[0] == "{"]
    problem = _problem(path, pieces, names, modality)
    if problem:
        raise ConfigError(f"--pattern {template!r} {problem}; an example is {EXAMPLE}")
    seen: set[str] = set()
    regex = "/".join(_segment_regex(segment, seen) for segment in path.split("/"))
    return NamePattern(template, "/" in path, modality, re.compile(regex))


def _problem(path: str, pieces: Sequence[str], names: Sequence[str], modality: str) -> str:
    """What is wrong with a template, in words; "" if nothing."""
    unknown = [name for name in names if name not in PARTS]
    known = ", ".join(f"{{{part}}}" for part in PARTS)
    if "{" in pieces or "}" in pieces:
        return "has a brace without its partner"
    if unknown:
        return f"has the part {{{unknown[0]}}}; the parts are {known}"
    if "subject" not in names:
        return "has no {subject}"
    if not modality and "modality" not in names:
        return "names no modality: add {modality}, or begin with one, as in 'T1={subject}/mprage.nii.gz'"
    if modality and "modality" in names:
        return f"names the modality twice: leave out {modality}= or {{modality}}"
    if not path.isprintable() or any(segment in ("", ".", "..") for segment in path.split("/")):
        return "is not a name relative to --source"
    if any(a[-1] in "}*" and b[0] in "{*" and (a == "*" or b != "*") for a, b in pairwise(pieces)):
        return "has two parts with nothing between them"
    if any(segment.count("*") > MAX_STARS for segment in path.split("/")):
        return f"has more than {MAX_STARS} * in one name"
    return ""


def _segment_regex(segment: str, seen: set[str]) -> str:
    """The regular expression of one folder's or file's name; adds the names of its parts to `seen`."""
    pieces = re.findall(r"\{\w+\}|\*|[^{}*]+", segment)
    free = [piece for piece in dict.fromkeys(pieces) if piece == "*" or piece[0] == "{"]
    free = [piece for piece in free if piece != "{modality}" and piece[1:-1] not in seen]
    characters = "A-Za-z0-9._-" if len(free) == 1 else "A-Za-z0-9."
    regex = ""
    for piece in pieces:
        name = piece[1:-1] if piece[0] == "{" else ""
        if piece == "*":
            regex += "[^/]*"
        elif not name:
            regex += re.escape(piece)
        elif name in seen:
            regex += f"(?P={name})"
        else:
            seen.add(name)
            text = f"(?i:{_ANY_MODALITY})" if name == "modality" else f"[A-Za-z0-9][{characters}]*"
            regex += f"(?P<{name}>{text})"
    return regex


def namer(patterns: Sequence[str], otherwise: Namer) -> Namer:
    """Reads names by the first of the templates that fits, or by `otherwise` if none is given.

    Raises:
        ConfigError: a template is invalid.
    """
    if not patterns:
        return otherwise
    parsed = [parse_pattern(template) for template in patterns]
    return lambda name: next(filter(None, (pattern.read(name) for pattern in parsed)), None)
