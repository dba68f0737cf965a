"""Versions of a dataset: named by what goes in, listed, read, verified, compared. `publish` makes them.

::

    <root>/datasets/<name>/<version>/{slices.zarr, manifest.csv, dataset.json, software.json, report.html, pictures}
    <root>/datasets/<name>/latest.json        the pointer, replaced last of all; the only file that knows a time
    <root>/datasets/<name>/.staging/<version> what is still being made

`dataset.json` names the arrays that are source and target, and lists every other file with size and SHA-256, but
`software.json`, which says what code made the version. Both hold the SHA-256 of all their other fields; `latest.json`
has the SHA-256 of each `dataset.json` that was published.
People write `NAME@VERSION`, for example `ixi-t1-t2@latest`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import BaseModel

from ixi_etl import PIPELINE_VERSION, manifest
from ixi_etl.errors import DatasetError
from ixi_etl.files import Progress, parse_json, read_json, sha256_file, silent, to_json
from ixi_etl.intensity import percentiles
from ixi_etl.places import (
    NAME,
    Places,
    check_reachable,
    expanded,
    file_sizes,
    is_url,
    naming,
    place,
    printable,
    refuse_secret,
)
from ixi_etl.schema import DIGITS, IXI
from ixi_etl.store import open_arrays

log = logging.getLogger(__name__)

COMMANDS = {"ixi-t1-t2": "ixi-etl refresh", "digits": "ixi-etl digits"}
"""Every dataset that there is, with the command that makes a version of it."""

SCHEMAS = {"ixi-t1-t2": IXI, "digits": DIGITS}

MANIFEST, FACTS, REPORT, PICTURES, POINTER = "manifest.csv", "dataset.json", "report.html", "pictures", "latest.json"
SOFTWARE = "software.json"
"""Which code made a version. Not in the list of hashes: other code can make equal bytes. It has a digest."""

DECIDING = (MANIFEST, "zarr.json")  # small files that say what all others mean
WORST = "worst.jpg"  # among the pictures
DIGEST, DIGEST_SINCE = "self_sha256", 6
"""In `dataset.json`, the key of the SHA-256 of all its others; and the first pipeline version that writes it."""
FILE_DIGEST = "dataset_json_sha256"
"""In the history of `latest.json`, the key of the SHA-256 of a published `dataset.json`."""


def parse(text: str) -> tuple[str, str]:
    """Dataset and version of `NAME@VERSION`; a version alone, or `latest`, is one of `ixi-t1-t2`.

    `VERSION` is what `resolve` takes.

    Raises:
        DatasetError: there is no such dataset, or no version after the @.
    """
    name, _, version = text.rpartition("@")
    name = name or NAME
    if name not in COMMANDS:
        raise DatasetError(f"there is no dataset {name}; give one of {', '.join(f'{n}@{version}' for n in COMMANDS)}")
    if not version:
        raise DatasetError(f"{text} names no version; give {name}@latest, or the beginning of one")
    return name, version


def find(root: str | Path, text: str) -> Path:
    """The folder of a version: `NAME@VERSION` below `root`, or the folder itself, wherever it was copied.

    A path has a slash, or leads to a `dataset.json`.

    Raises:
        DatasetError: there is no such version, or the folder holds no version.
    """
    folder = folder_of(text)
    if folder is None:
        name, wanted = parse(text)
        places = Places(root, name)
        return places.version(resolve(places, wanted))
    if not folder.is_dir():
        raise DatasetError(f"{folder} is not a folder; give the folder of a version, or NAME@VERSION")
    if not (folder / FACTS).is_file():
        raise DatasetError(f"{folder} has no {FACTS}; give the folder of a version, or NAME@VERSION")
    return folder


def dataset_of(text: str) -> str:
    """The dataset of a version that is given as for `find`.

    Raises:
        DatasetError: there is no such dataset, or the folder is no version's.
    """
    folder = folder_of(text)
    return parse(text)[0] if folder is None else str(read_facts(folder)["name"])


def folder_of(text: str) -> Path | None:
    """The folder that `text` is the path or URL of; None where it is NAME@VERSION."""
    if is_url(text):
        refuse_secret(text)
        check_reachable(text)
        return place(text.rstrip("/"))
    path = expanded(text)
    is_path = os.sep in text or text in (os.curdir, os.pardir) or (path / FACTS).is_file()
    return path.resolve() if is_path else None


def inputs_of(md5s: Mapping[str, str], config: BaseModel, libraries: Iterable[str], **others: Any) -> dict[str, Any]:
    """All that decides the bytes of a version: contents, configuration and code, never a path, URL, count or time.

    `libraries` are those whose version may change a byte; `others` are hashes of what else goes in.
    """
    return {
        "archives_md5": dict(md5s),
        "config": config.model_dump(mode="json"),
        "pipeline_version": PIPELINE_VERSION,
        "libraries": {name: installed(name) for name in libraries},
        **others,
    }


def version_name(inputs: Mapping[str, Any]) -> str:
    """12 hex digits: the SHA-256 of the inputs, cut."""
    return hashlib.sha256(to_json(inputs).encode()).hexdigest()[:12]


def resolve(places: Places, version: str = "latest") -> str:
    """The name of a published version: `latest`, a whole name, or the unique beginning of one.

    Raises:
        DatasetError: there is none, or several begin so.
    """
    if version == "latest":
        return _latest(places)
    names = published(places)
    found = [name for name in names if name.startswith(version)]
    if version in found:
        return version
    if len(found) != 1:
        which = f"{len(found)} versions begin with {version}" if found else f"there is no version {version}"
        raise DatasetError(f"{which} in {places.datasets}; there are: {', '.join(names) or 'none'}")
    return found[0]


def _latest(places: Places) -> str:
    check_reachable(places.root)
    path, command = places.datasets / POINTER, COMMANDS[places.name]
    while True:
        pointer, there = read_pointer(places), path.exists()
        if pointer is not None and pointer["version"] in _names(places):  # listed later: by then it is there
            return str(pointer["version"])
        if read_pointer(places) == pointer:
            break  # else another was published meanwhile, and the one that was named may have been pruned
    if pointer is not None:
        raise DatasetError(f"{POINTER} names version {pointer['version']}, which is not there; run `{command}`")
    if there:
        raise DatasetError(f"{path} is damaged; `{command}` writes it anew")
    raise DatasetError(f"{places.datasets} has no published version; run `{command}` first")


def published(places: Places) -> list[str]:
    """Names of the published versions, oldest first by the pointer's history.

    Raises:
        IxiError: the bucket is not there or does not answer.
    """
    check_reachable(places.root)
    names = _names(places)
    pointer = read_pointer(places) or {"history": []}
    dated = list(dict.fromkeys(e["version"] for e in pointer["history"] if e["version"] in names))
    return [*sorted(names - set(dated)), *dated]


def _names(places: Places) -> set[str]:
    if not places.datasets.is_dir():
        return set()
    return {p.name for p in places.datasets.iterdir() if not p.name.startswith(".") and _is_version(p)}


def _is_version(folder: Path) -> bool:
    try:
        return (folder / FACTS).is_file()
    except PermissionError:  # a folder of somebody else's, such as lost+found
        return False


def read_pointer(places: Places) -> dict[str, Any] | None:
    """What `latest.json` says; None where it is missing or damaged."""
    return _pointer_in(places.datasets)


def _pointer_in(folder: Path) -> dict[str, Any] | None:
    pointer = read_json(folder / POINTER)
    try:
        if isinstance(pointer["version"], str) and all(isinstance(e["version"], str) for e in pointer["history"]):
            return dict(pointer)
    except (TypeError, KeyError):
        pass
    return None


def with_digest(facts: Mapping[str, Any]) -> dict[str, Any]:
    """`facts` with the SHA-256 of all the others, in the form in which `to_json` writes them."""
    rest: dict[str, Any] = json.loads(to_json({key: value for key, value in facts.items() if key != DIGEST}))
    return rest | {DIGEST: hashlib.sha256(to_json(rest).encode()).hexdigest()}


def _has_own_digest(data: bytes) -> bool:
    """Whether these are exactly the bytes that `with_digest` and `to_json` give."""
    value = parse_json(data)
    return isinstance(value, dict) and data == to_json(with_digest(value)).encode()


def read_facts(folder: Path) -> dict[str, Any]:
    """What `dataset.json` of a version's folder says.

    Raises:
        DatasetError: it is missing or damaged: it has not the digest that it holds, or has another form.
    """
    path = folder / FACTS
    try:
        with naming(path):
            data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        data = b""
    facts: dict[str, Any] = parse_json(data)
    if not _are_facts(facts):
        raise DatasetError(f"{path} is missing, damaged or of an older ixi-etl; make the version again")
    made_by = facts["inputs"].get("pipeline_version")  # it goes into the version's name, which is checked too
    is_older = DIGEST not in facts and isinstance(made_by, int) and made_by < DIGEST_SINCE
    if not is_older and not _has_own_digest(data):
        raise DatasetError(f"{path} is damaged: it does not have the SHA-256 that it holds; make the version again")
    return facts


def list_versions(places: Places) -> list[tuple[str, dict[str, Any] | None]]:
    """Each published version, oldest first, with its facts; None for one whose facts are damaged, after a warning."""
    found: list[tuple[str, dict[str, Any] | None]] = []
    for name in published(places):
        try:
            found.append((name, read_facts(places.version(name))))
        except (DatasetError, OSError) as error:
            log.warning("%s", error)
            found.append((name, None))
    return found


def find_latest(places: Places) -> str | None:
    """The version that `latest` means; None, after a warning, where that cannot be said."""
    try:
        return resolve(places)
    except DatasetError as error:
        log.warning("%s", error)
        return None


def _are_facts(facts: Any) -> bool:
    kinds = {"inputs": dict, "files": dict, "funnel": dict, "splits": dict, "subjects": int}
    kinds |= dict.fromkeys(("name", "version", "source", "target"), str)
    if not isinstance(facts, dict) or not all(isinstance(facts.get(key), kind) for key, kind in kinds.items()):
        return False
    if not isinstance(facts["inputs"].get("config"), dict):
        return False
    said = [(f.get("size"), f.get("sha256")) if isinstance(f, dict) else (None, None) for f in facts["files"].values()]
    return facts["name"] in COMMANDS and all(isinstance(a, int) and isinstance(b, str) for a, b in said)


def licence_of(folder: Path) -> dict[str, Any]:
    """The `licence` and `credit` that a version records, under which what is made of it may be passed on."""
    facts = read_facts(folder)
    return {name: facts[name] for name in ("licence", "credit") if name in facts}


def read_manifest(folder: Path) -> pd.DataFrame:
    """The manifest of a version's folder, checked.

    Raises:
        DatasetError: it is missing, or breaks its schema.
    """
    path, schema = folder / MANIFEST, SCHEMAS[read_facts(folder)["name"]]
    try:
        text = path.read_bytes().decode()  # not as text: that would turn \r into \n
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read ({error})") from error
    return schema.from_csv(text, str(path))


def verify(folder: Path, *, version: str | None = None, deep: bool = False, progress: Progress = silent) -> list[str]:
    """What is wrong with a version, a line each; nothing if it is sound. `version`: its name, if not the folder's.

    Cheap: every file is there with its size, the manifest and the store's metadata have their SHA-256, the manifest
    keeps its schema, and counts agree. `deep`: every file's SHA-256, every chunk decoded (its CRC-32C checked), and
    every slab's percentiles as the manifest has them. The arrays are those that `dataset.json` calls source and target.
    `dataset.json` is held against its own SHA-256, and against that in the pointer beside the version, if there is one.

    Files that do not belong to the version, such as those of a file manager, are no damage; a warning names them.
    """
    return _verify(folder, version or folder.name, deep, progress)[0]


def read_sound(folder: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """The facts and the manifest of a version's folder in which `verify` finds nothing wrong.

    Raises:
        DatasetError: what it finds first, and what mends it.
    """
    facts = read_facts(folder)
    problems, table = _verify(folder, folder.name)
    if problems or table is None:
        raise DatasetError(f"{problems[0]}; `{COMMANDS[facts['name']]}` makes the version again")
    return facts, table


def _verify(
    folder: Path, version: str, deep: bool = False, progress: Progress = silent
) -> tuple[list[str], pd.DataFrame | None]:
    """The problems, and the manifest if it could be read."""
    try:
        facts = read_facts(folder)
    except DatasetError as error:
        return [str(error)], None
    problems = []
    there = file_sizes(folder)
    for done, (name, known) in enumerate(facts["files"].items(), 1):
        if name not in there:
            problems.append(f"{folder / name} is missing")
        elif there[name] != known["size"]:
            problems.append(f"{folder / name} has {there[name]} bytes, not {known['size']}")
        elif (deep or name.endswith(DECIDING)) and sha256_file(folder / name) != known["sha256"]:
            problems.append(f"{folder / name} is damaged: its SHA-256 is not the one in {FACTS}")
        progress("verify files", done, len(facts["files"]), "files")
    _warn_of_strays(folder, there.keys() - facts["files"].keys() - {FACTS, SOFTWARE})
    if SOFTWARE in there and not _has_own_digest((folder / SOFTWARE).read_bytes()):
        problems.append(f"{folder / SOFTWARE} is damaged: it does not have the SHA-256 that it holds")
    known_digest = published_digest(folder)
    if known_digest and known_digest != sha256_file(folder / FACTS):
        problems.append(f"{folder / FACTS} is not the file that was published: {POINTER} has another SHA-256 of it")
    if not version_name(facts["inputs"]) == facts["version"] == version:
        problems.append(
            f"{folder / FACTS} is damaged: its version is not its folder's name, or not the hash of its inputs"
        )
    names, schema = (facts["source"], facts["target"]), SCHEMAS[facts["name"]]
    if set(names) != set(schema.arrays):
        problems.append(f"{folder / FACTS} is damaged: {names[0]} and {names[1]} are not arrays of {facts['name']}")
        return problems, None
    table = None
    try:
        table = read_manifest(folder)
        problems += _verify_store(folder, names, manifest.used(table), deep, progress)
        if not manifest.counts(table, schema).items() <= facts.items():
            problems.append(f"{folder / MANIFEST} does not give the counts in {FACTS}")
    except DatasetError as error:
        problems.append(str(error))
    return problems, table


def _warn_of_strays(folder: Path, names: Iterable[str]) -> None:
    found = sorted(map(printable, names))
    if found:
        shown = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        log.warning("%s: ignored what does not belong to the version: %s", folder, shown)


def published_digest(folder: Path) -> str | None:
    """SHA-256 of the `dataset.json` that was published as this version, by the pointer beside it, if that knows."""
    history = (_pointer_in(folder.parent) or {"history": []})["history"]
    digests = [e.get(FILE_DIGEST) for e in history if e["version"] == folder.name]
    return digests[-1] if digests and isinstance(digests[-1], str) else None


def _verify_store(
    folder: Path, names: tuple[str, str], used: pd.DataFrame, deep: bool, progress: Progress
) -> list[str]:
    problems = []
    arrays = open_arrays(folder)
    for column in (f"{name}_{which}" for name in names for which in ("scale", "offset") if f"{name}_{which}" in used):
        array = arrays.get(column)
        if array is None or not np.array_equal(np.asarray(array), used[column].to_numpy("float64")):
            problems.append(f"{folder}: array {column} is not the manifest's column")
    for name in names:
        array = arrays.get(name)
        if array is None or len(array.shape) != 4 or array.shape[0] != len(used):
            problems.append(f"{folder}: array {name} does not hold the {len(used)} used subjects of the manifest")
            continue
        shards = range(0, array.shape[0], (array.shards or array.chunks)[0]) if deep else range(0)
        for start in shards:
            rows = used.iloc[start : start + shards.step]
            done = start + len(rows)
            subjects = rows["subject_id"].tolist()
            try:
                low_high = percentiles(np.asarray(array[start:done]))
            except Exception as error:  # whatever a codec raises on damaged bytes
                said = subjects[0] if len(rows) == 1 else f"{subjects[0]} to {subjects[-1]}"
                problems.append(f"{folder}: {name} of {said} cannot be decoded ({error})")
                continue
            differs = (low_high != rows[[f"{name}_p_low", f"{name}_p_high"]].to_numpy("float64")).any(axis=1)
            wrong = [subject for subject, differ in zip(subjects, differs, strict=True) if differ]
            problems += [f"{folder}: {name} of {s} has not the percentiles of the manifest" for s in wrong]
            progress(f"verify {name}", done, array.shape[0], "subjects")
    return problems


def compare_inputs(old: Path, new: Path) -> pd.DataFrame:
    """In what two versions' inputs, configuration, libraries and software differ: columns what, old, new.

    Nothing of `software.json` decides the bytes of a version.
    """
    said = [
        _flat({"inputs": read_facts(folder)["inputs"], "software": read_json(folder / SOFTWARE) or {}})
        for folder in (old, new)
    ]
    names = sorted({*said[0], *said[1]})
    rows = [(name, *(values.get(name, "-") for values in said)) for name in names]
    return pd.DataFrame([row for row in rows if row[1] != row[2]], columns=["what", "old", "new"])


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """`{"config": {"slices": 20}}` -> `{"config.slices": "20"}`."""
    if isinstance(value, Mapping):
        below = [_flat(item, f"{name}.{key}" if name else str(key)) for key, item in value.items()]
        return {key: text for part in below for key, text in part.items()}
    return {name.removeprefix("inputs."): value if isinstance(value, str) else json.dumps(value)}


def compare(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """What changed between two manifests, a row per subject: columns subject_id, old, new (in words)."""

    def words(table: pd.DataFrame) -> pd.Series:
        said = table["status"] + table["reason"].map(lambda r: f" ({r})" if r else "")
        said += table["split"].map(lambda s: f", {s}" if s else "")
        return pd.Series(said.to_numpy(), index=table["subject_id"])

    def contents(table: pd.DataFrame) -> pd.DataFrame:
        return table.set_index("subject_id").drop(columns="store_row").astype("object")

    both = pd.DataFrame({"old": words(old), "new": words(new)}).sort_index()
    a, b = contents(old).reindex(both.index), contents(new).reindex(both.index)
    differs = ((a != b) & ~(a.isna() & b.isna())).fillna(True)
    both = both[differs.any(axis=1)].fillna("absent")
    both["changed"] = [", ".join(c for c in differs.columns if differs.at[s, c]) for s in both.index]
    both.loc[(both["old"] == "absent") | (both["new"] == "absent"), "changed"] = ""
    return both.reset_index(names="subject_id")
