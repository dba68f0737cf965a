"""`dataset.json` is held against its own SHA-256, and against the one in the pointer: no change passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import config_for

from ixi_etl import dataset
from ixi_etl.errors import DatasetError
from ixi_etl.files import to_json
from ixi_etl.places import Places
from ixi_etl.publish import Refreshed
from ixi_etl.refresh import refresh


@pytest.fixture
def copy(published: Refreshed, tmp_path: Path) -> Path:
    """The version in a folder of its own, without a pointer."""
    return Path(shutil.copytree(published.folder, tmp_path / published.version))


def test_a_copy_without_a_pointer_can_be_verified(copy: Path) -> None:
    assert not (copy.parent / dataset.POINTER).exists()
    assert dataset.verify(copy, deep=True) == []


def test_any_flipped_bit_is_found(copy: Path) -> None:
    path = copy / dataset.FACTS
    whole = path.read_bytes()
    keys = [whole.index(f'"{key}"'.encode()) + 1 for key in json.loads(whole)]
    for n, at in enumerate([*keys, *range(0, len(whole), len(whole) // 100)]):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << n % 8)]) + whole[at + 1 :])
        with pytest.raises(DatasetError, match=r"dataset\.json is (damaged|missing, damaged)"):
            dataset.read_facts(copy)


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    def text(whole: str) -> str:
        facts = json.loads(whole)
        change(facts)
        return to_json(facts)

    return text


EDITS: dict[str, Callable[[str], str]] = {
    "source and target exchanged": edited(lambda f: f.update(source=f["target"], target=f["source"])),
    "another credit": edited(lambda f: f.update(credit="mine")),
    "another histogram": edited(lambda f: f["histogram"].pop()),
    "a field more": edited(lambda f: f.update(more=1)),
    "a field less": edited(lambda f: f.pop("not_volumes")),
    "no digest": edited(lambda f: f.pop(dataset.DIGEST)),
    "another digest": edited(lambda f: f.update({dataset.DIGEST: "0" * 64})),
    "a space more": lambda whole: whole + " ",
    "a line less": lambda whole: whole.rstrip("\n"),
    "other line ends": lambda whole: whole.replace("\n", "\r\n"),
    "other indentation": lambda whole: json.dumps(json.loads(whole), sort_keys=True),
    "other order": lambda whole: json.dumps(dict(reversed(json.loads(whole).items())), indent=1) + "\n",
    "a byte order mark": lambda whole: "\ufeff" + whole,
    "a key twice": lambda whole: whole.replace('{\n "', '{\n "credit": "mine",\n "', 1),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_found_by_the_cheap_verification(edit: str, copy: Path) -> None:
    path = copy / dataset.FACTS
    path.write_bytes(EDITS[edit](path.read_text()).encode())
    (problem,) = dataset.verify(copy)
    assert str(path) in problem


def test_an_edit_with_a_digest_of_its_own_is_found_by_the_pointer(published: Refreshed, tmp_path: Path) -> None:
    places = Places(shutil.copytree(published.folder.parents[2], tmp_path / "root"))
    folder = places.version(published.version)
    assert dataset.verify(folder) == []
    facts = dataset.read_facts(folder)
    (folder / dataset.FACTS).write_text(to_json(dataset.with_digest(facts | {"credit": "mine"})))
    assert dataset.verify(folder) == [
        f"{folder / dataset.FACTS} is not the file that was published: latest.json has another SHA-256 of it"
    ]


def test_a_version_of_before_there_were_digests_is_read_as_it_was(copy: Path) -> None:
    """Runs that were trained on it need it."""
    facts = json.loads((copy / dataset.FACTS).read_text())
    del facts[dataset.DIGEST]
    facts["inputs"]["pipeline_version"] = dataset.DIGEST_SINCE - 1
    facts["version"] = dataset.version_name(facts["inputs"])
    old = copy.rename(copy.with_name(facts["version"]))
    (old / dataset.FACTS).write_text(to_json(facts))
    assert dataset.verify(old) == []


def test_a_version_made_again_has_its_new_digest_in_the_pointer(
    archives: Path, published: Refreshed, tmp_path: Path
) -> None:
    places = Places(shutil.copytree(published.folder.parents[2], tmp_path / "root"))
    folder = places.version(published.version)
    pointer = json.loads((places.datasets / dataset.POINTER).read_text())
    for entry in (pointer, pointer["history"][-1]):  # as if it had been made where other bytes come out
        entry[dataset.FILE_DIGEST] = "0" * 64
    (places.datasets / dataset.POINTER).write_text(to_json(pointer))
    assert dataset.verify(folder)
    assert refresh(config_for(places.root, archives)).is_new
    assert dataset.verify(folder) == []
    assert len(json.loads((places.datasets / dataset.POINTER).read_text())["history"]) == 2
