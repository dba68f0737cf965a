"""Every change of `dataset.json` is found by the SHA-256 that it contains, or by the one in the pointer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import config_for
from hypothesis import given
from hypothesis import strategies as st

from ixi_etl.core.files import to_json
from ixi_etl.core.storage import DataRoot
from ixi_etl.dataset import metadata, verify
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.errors import DatasetError
from ixi_etl.recipes.ixi import refresh

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@pytest.fixture
def copy(published: PublishedVersion, tmp_path: Path) -> Path:
    """A copy of the version without a pointer."""
    return Path(shutil.copytree(published.folder, tmp_path / published.version))


def test_copy_without_a_pointer_is_verified(copy: Path) -> None:
    assert not (copy.parent / metadata.POINTER).exists()
    assert verify.verify(copy, deep=True) == []


@given(st.dictionaries(st.text(max_size=3) | st.sampled_from(["a", "z"]), json_values, min_size=1))
def test_file_with_its_digest_is_read(content: dict[str, Any]) -> None:
    signed = metadata.with_digest(content)
    assert metadata.parse_with_digest(to_json(signed).encode()) == signed
    assert metadata.parse_with_digest(to_json(content).encode()) is None


def test_any_flipped_bit_is_found(copy: Path) -> None:
    path = copy / metadata.METADATA
    original = path.read_bytes()
    keys = [original.index(f'"{key}"'.encode()) + 1 for key in json.loads(original)]
    for n, position in enumerate([*keys, *range(0, len(original), len(original) // 100)]):
        path.write_bytes(original[:position] + bytes([original[position] ^ (1 << n % 8)]) + original[position + 1 :])
        with pytest.raises(DatasetError, match=r"dataset\.json is (damaged|missing, damaged)"):
            metadata.read_metadata(copy)


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    """An edit of the text of `dataset.json` that applies `change` to its content."""

    def edit(original: str) -> str:
        record = json.loads(original)
        change(record)
        return to_json(record)

    return edit


def move_digest(text: str, key: str) -> str:
    """The text with its digest within the object `key`, on a line as before."""
    line = next(line for line in text.splitlines(keepends=True) if metadata.DIGEST in line)
    return text.replace(line, "").replace(f'\n "{key}": {{\n', f'\n "{key}": {{\n{line}', 1)


EDITS: dict[str, Callable[[str], str]] = {
    "source and target exchanged": edited(lambda r: r.update(source=r["target"], target=r["source"])),
    "another credit": edited(lambda r: r.update(credit="mine")),
    "another histogram": edited(lambda f: f["histogram"].pop()),
    "an added field": edited(lambda r: r.update(extra=1)),
    "a removed field": edited(lambda r: r.pop("not_volumes")),
    "no digest": edited(lambda r: r.pop(metadata.DIGEST)),
    "another digest": edited(lambda r: r.update({metadata.DIGEST: "0" * 64})),
    "an added space": lambda text: text + " ",
    "no final newline": lambda text: text.rstrip("\n"),
    "CRLF line ends": lambda text: text.replace("\n", "\r\n"),
    "another indentation": lambda text: json.dumps(json.loads(text), sort_keys=True),
    "another order": lambda text: json.dumps(dict(reversed(json.loads(text).items())), indent=1) + "\n",
    "a byte order mark": lambda text: "\ufeff" + text,
    "the digest in another object": lambda text: move_digest(text, "inputs"),
    "a duplicate key": lambda text: text.replace('{\n "', '{\n "credit": "mine",\n "', 1),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edit_is_found_without_deep_verification(edit: str, copy: Path) -> None:
    path = copy / metadata.METADATA
    path.write_bytes(EDITS[edit](path.read_text()).encode())
    (problem,) = verify.verify(copy)
    assert str(path) in problem


def test_edit_with_an_updated_digest_is_found_by_the_pointer(published: PublishedVersion, tmp_path: Path) -> None:
    data_root = DataRoot(shutil.copytree(published.folder.parents[2], tmp_path / "root"))
    folder = data_root.version(published.version)
    assert verify.verify(folder) == []
    record = metadata.read_metadata(folder)
    (folder / metadata.METADATA).write_text(to_json(metadata.with_digest(record | {"credit": "mine"})))
    assert verify.verify(folder) == [
        f"{folder / metadata.METADATA} is not the file that was published: latest.json has another SHA-256 of it"
    ]


def test_old_version_without_digests_is_read(copy: Path) -> None:
    """Runs that were trained on such a version need it."""
    record = json.loads((copy / metadata.METADATA).read_text())
    del record[metadata.DIGEST]
    record["inputs"]["pipeline_version"] = metadata.DIGEST_SINCE - 1
    record["version"] = metadata.version_name(record["inputs"])
    old = copy.rename(copy.with_name(record["version"]))
    (old / metadata.METADATA).write_text(to_json(record))
    assert verify.verify(old) == []


def test_remade_version_has_its_new_digest_in_the_pointer(
    archives: Path, published: PublishedVersion, tmp_path: Path
) -> None:
    data_root = DataRoot(shutil.copytree(published.folder.parents[2], tmp_path / "root"))
    folder = data_root.version(published.version)
    pointer = json.loads((data_root.datasets / metadata.POINTER).read_text())
    for entry in (pointer, pointer["history"][-1]):  # as if other code had written other bytes
        entry[metadata.FILE_DIGEST] = "0" * 64
    (data_root.datasets / metadata.POINTER).write_text(to_json(pointer))
    assert verify.verify(folder)
    assert refresh(config_for(data_root.root, archives)).is_new
    assert verify.verify(folder) == []
    assert len(json.loads((data_root.datasets / metadata.POINTER).read_text())["history"]) == 2
