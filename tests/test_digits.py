"""MNIST as a version: files are held against their MD5 and format, and the store holds what the files hold."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from servers import Host, serve

from flows.cli import main
from ixi_etl import catalog, dataset, manifest, publish
from ixi_etl.config import DigitsConfig, DigitsDataset
from ixi_etl.digits import INK, PARTS, make_digits, pad, pair, parse_idx, sketch
from ixi_etl.errors import ArchiveError, DatasetError, DownloadError
from ixi_etl.files import to_json
from ixi_etl.publish import Refreshed
from ixi_etl.schema import DIGITS
from ixi_etl.serve import serve_folder
from ixi_etl.store import STORE, open_arrays

COUNTS = {"test": 30, "train": 1140}  # more than a shard, so that a shard is full, and one is not


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def strokes(count: int, seed: int) -> np.ndarray:
    """Images [count, 28, 28] of a few thick strokes each, gray at the edges as MNIST's."""
    random = np.random.default_rng(seed)
    images = np.zeros((count, 28, 28), np.uint8)
    for image in images:
        for _ in range(3):
            y, x, h, w = (*random.integers(2, 18, 2), *random.integers(3, 8, 2))
            image[y : y + h, x : x + w] = random.integers(90, 256, (h, w))
    return images


def write_mnist(folder: Path, halves: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, str]:
    """The four files in `folder`, and their MD5s."""
    md5s = {}
    for half, values in halves.items():
        for name, array in zip(PARTS[half], values, strict=True):
            packed = gzip.compress(idx(array), mtime=0)
            (folder / name).write_bytes(packed)
            md5s[name] = hashlib.md5(packed).hexdigest()
    return md5s


@pytest.fixture(scope="module")
def halves() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {h: (strokes(n, n), (np.arange(n) % 10).astype(np.uint8)) for h, n in COUNTS.items()}


@pytest.fixture(scope="module")
def mnist(halves: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("mnist")
    return folder, write_mnist(folder, halves)


@pytest.fixture
def source(mnist: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with small files of MNIST's names, whose MD5s pass for the published ones."""
    monkeypatch.setattr(catalog, "MNIST_MD5", mnist[1])
    return mnist[0]


@pytest.fixture(scope="module")
def made_once(mnist: tuple[Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Refreshed:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "MNIST_MD5", mnist[1])
        return make_digits(DigitsConfig(root=tmp_path_factory.mktemp("made") / "root", source=str(mnist[0])))


@pytest.fixture
def made(made_once: Refreshed, source: Path, tmp_path: Path) -> Refreshed:
    """The version of these files in a root of its own, as `make_digits` leaves it."""
    root = made_once.folder.parents[2]
    shutil.copytree(root, tmp_path / "root")
    return replace(made_once, folder=tmp_path / "root" / made_once.folder.relative_to(root))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# -- the format -------------------------------------------------------------------------------------------------------

small = arrays(np.uint8, st.tuples(*[st.integers(1, 4)] * 3))


@given(small)
def test_an_idx_file_is_read_as_it_was_written(values: np.ndarray) -> None:
    np.testing.assert_array_equal(parse_idx(idx(values), 3, "f"), values)


@given(small, st.integers(-60, 60))
def test_an_idx_file_of_any_other_length_is_refused(values: np.ndarray, change: int) -> None:
    data = idx(values)
    wrong = data + bytes(change) if change > 0 else data[: max(0, len(data) + change)]
    if change:
        with pytest.raises(ArchiveError, match=r"^f (has|is)") as caught:
            parse_idx(wrong, 3, "f")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<!doctype html>",
        idx(np.ones((2, 2), np.uint8)),  # one dimension too few
        bytes([0, 0, 0x0D, 3]) + idx(np.ones((2, 2, 2), np.uint8))[4:],  # floats
        idx(np.ones((0, 28, 28), np.uint8)),
        bytes([0, 0, 8, 3]) + b"\xff" * 12,  # sizes whose product overflows 64 bits
    ],
)
def test_what_is_no_idx_file_of_images_is_refused(data: bytes) -> None:
    with pytest.raises(ArchiveError, match=r"^f (has|is)"):
        parse_idx(data, 3, "f")


# -- the pairs --------------------------------------------------------------------------------------------------------

images = arrays(np.uint8, st.tuples(st.integers(1, 3), st.just(28), st.just(28)), fill=st.sampled_from([0, 255]))


@given(images)
def test_the_sketch_is_the_ink_that_touches_what_is_none(stored: np.ndarray) -> None:
    digit = pad(stored)
    outline = sketch(digit)
    assert (outline.shape, outline.dtype) == (digit.shape, np.uint8)
    assert set(np.unique(outline)) <= {0, 255}
    assert (digit[outline == 255] > INK).all()
    for n, y, x in np.argwhere(digit[:, 0] > INK):  # the paper that pads the image keeps these within it
        around = [digit[n, 0, y + dy, x + dx] > INK for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1))]
        assert (outline[n, 0, y, x] == 255) == (not all(around))


def test_ink_at_the_edge_of_an_image_is_outline() -> None:
    full = np.full((1, 1, 5, 5), 255, np.uint8)
    assert sketch(full)[0, 0].astype(bool).tolist() == [[1] * 5, *[[1, 0, 0, 0, 1]] * 3, [1] * 5]


def test_the_store_holds_the_padded_images_of_the_files(made: Refreshed, halves: Any) -> None:
    table = dataset.read_manifest(made.folder)
    store = open_arrays(made.folder)
    assert store["digit"].shape == store["sketch"].shape == (sum(COUNTS.values()), 1, 32, 32)
    digit = np.asarray(store["digit"][:])
    np.testing.assert_array_equal(store["sketch"][:], sketch(digit))
    for row in manifest.records(table):
        half, number = row["subject_id"].split("-")
        stored, labels = (of[int(number)] for of in halves[half])
        np.testing.assert_array_equal(digit[row["store_row"]][0, 2:30, 2:30], stored)
        assert digit[row["store_row"]].sum() == stored.sum()  # and nothing but paper around it
        assert row["label"] == labels


def test_the_test_file_is_test_and_the_last_twelfth_of_the_other_is_val(made: Refreshed) -> None:
    table = dataset.read_manifest(made.folder).set_index("subject_id")
    assert (table["split"][[s.startswith("test-") for s in table.index]] == "test").all()
    train = table[[s.startswith("train-") for s in table.index]]["split"].tolist()
    assert train == ["train"] * 1045 + ["val"] * 95
    assert dataset.read_facts(made.folder)["splits"] == {"test": 30, "train": 1045, "val": 95}


def test_percentiles_are_of_each_slab(made: Refreshed) -> None:
    table, store = dataset.read_manifest(made.folder), open_arrays(made.folder)
    for row in manifest.records(table.iloc[::100]):
        for name in ("sketch", "digit"):
            low_high = np.percentile(np.asarray(store[name][row["store_row"]]), (0.1, 99.9))
            assert (row[f"{name}_p_low"], row[f"{name}_p_high"]) == tuple(low_high)


def test_a_blank_image_is_out_with_its_reason() -> None:
    stored = strokes(5, 1)
    stored[2] = 0
    halves = {"test": (stored[:1], np.zeros(1, np.uint8)), "train": (stored[1:], np.zeros(4, np.uint8))}
    table, slabs = pair(halves)
    assert table["reason"].tolist() == ["", "", "empty_image", "", ""]
    assert table["store_row"].tolist() == [0, 1, pd.NA, 2, 3]
    np.testing.assert_array_equal(slabs["digit"], pad(stored[[0, 1, 3, 4]]))
    assert manifest.funnel(DIGITS.validate(table), DIGITS)["all"].to_dict() == {"found": 5, "used": 4}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.assign(label=pd.array([10] * len(t), "Int64")), "label"),
        (lambda t: t.assign(label=pd.array([None] * len(t), "Int64")), "complete"),
        (lambda t: t.assign(sketch_p_high=-1.0), "complete"),
        (lambda t: t.drop(columns="label"), "label"),
        (lambda t: t.assign(split="dev"), "split"),
    ],
)
def test_a_manifest_that_was_edited_is_refused(change: Any, said: str) -> None:
    table, _ = pair({"test": (strokes(3, 2), np.arange(3, dtype=np.uint8))})
    assert DIGITS.from_csv(DIGITS.to_csv(table), "m.csv").equals(table)
    with pytest.raises(DatasetError, match=rf"m\.csv is not a manifest.*{said}"):
        DIGITS.from_csv(change(table).to_csv(index=False), "m.csv")


# -- the version ------------------------------------------------------------------------------------------------------


def test_the_same_files_give_the_same_bytes_from_wherever(made: Refreshed, source: Path, tmp_path: Path) -> None:
    with serve_folder(source) as url:
        config = DigitsConfig(root=tmp_path / "other", source=url)
        again = make_digits(config)
        assert not make_digits(config).is_new
    assert again.version == made.version
    assert contents(again.folder) == contents(made.folder)
    for name, data in contents(made.folder).items():
        assert b"http://" not in data, name
        assert str(tmp_path).encode() not in data, name
    assert make_digits(config.model_copy(update={"offline": True})).version == made.version


def test_what_touches_data_names_the_version(made: Refreshed, source: Path, tmp_path: Path) -> None:
    fewer = make_digits(DigitsConfig(root=tmp_path / "root", source=str(source), dataset=DigitsDataset(limit=24)))
    assert fewer.version != made.version
    assert dataset.read_facts(fewer.folder)["splits"] == {"test": 24, "train": 22, "val": 2}
    places = dataset.Places(tmp_path / "root", "digits")
    assert dataset.resolve(places) == fewer.version
    assert dataset.published(places) == [made.version, fewer.version]


def test_it_is_plain_zarr_of_many_images_a_shard(made: Refreshed) -> None:
    data = xr.open_zarr(made.folder / STORE)
    assert data["sketch"].dims == data["digit"].dims == ("image", "z", "y", "x")
    array = zarr.open_group(made.folder / STORE, mode="r")["digit"]
    assert isinstance(array, zarr.Array)
    assert (array.chunks, array.shards, array.dtype) == ((100, 1, 32, 32), (1000, 1, 32, 32), np.uint8)
    assert "crc32c" in str(array.metadata.to_dict()["codecs"])
    facts = dataset.read_facts(made.folder)
    assert (facts["source"], facts["target"], facts["funnel"]["used"]["all"]) == ("sketch", "digit", 1170)
    assert "LeCun" in facts["credit"]
    assert all(source["md5_is_published"] for source in facts["sources"].values())
    assert data["image"].to_numpy().tolist() == manifest.used(dataset.read_manifest(made.folder))["subject_id"].tolist()


def test_deep_verification_finds_nothing_in_a_sound_version(made: Refreshed) -> None:
    assert dataset.verify(made.folder, deep=True) == []


@pytest.mark.parametrize("share", [0.0, 0.4, 0.7, 0.999])
def test_deep_verification_finds_any_flipped_byte(share: float, made: Refreshed) -> None:
    files = [p for p in (made.folder / STORE).rglob("*") if p.is_file()]
    victim = files[int(share * len(files))]
    data = bytearray(victim.read_bytes())
    data[int(share * len(data))] ^= 1
    victim.write_bytes(data)
    assert any(str(victim) in problem for problem in dataset.verify(made.folder, deep=True))


def test_shards_that_changed_places_are_found_subject_by_subject(made: Refreshed) -> None:
    shards = [made.folder / STORE / "digit/c" / n / "0/0/0" for n in "01"]
    one, two = (shard.read_bytes() for shard in shards)
    shards[0].write_bytes(two)
    shards[1].write_bytes(one)
    (made.folder.parent / dataset.POINTER).unlink()  # it has the SHA-256 of what was published
    listed = {"files": publish.list_files(made.folder)}  # whoever did it also mended the list
    facts = dataset.read_facts(made.folder) | listed
    (made.folder / dataset.FACTS).write_text(to_json(dataset.with_digest(facts)))
    assert dataset.verify(made.folder) == []
    problems = dataset.verify(made.folder, deep=True)
    assert any("digit of test-00000 has not the percentiles of the manifest" in problem for problem in problems)


def test_facts_that_name_other_arrays_are_found(made: Refreshed) -> None:
    facts = dataset.read_facts(made.folder) | {"source": "t1"}
    (made.folder / dataset.FACTS).write_text(to_json(dataset.with_digest(facts)))
    assert any("t1 and digit are not arrays of digits" in problem for problem in dataset.verify(made.folder))


def test_a_damaged_version_is_made_again(made: Refreshed, source: Path, tmp_path: Path) -> None:
    before = contents(made.folder)
    (made.folder / STORE / "digit/c/1/0/0/0").unlink()
    again = make_digits(DigitsConfig(root=tmp_path / "root", source=str(source)))
    assert again.is_new
    assert contents(again.folder) == before
    assert not (again.folder.parent / ".staging").exists()


def test_what_a_killed_run_left_is_not_published(made: Refreshed, source: Path, tmp_path: Path) -> None:
    staged = dataset.Places(tmp_path / "b", "digits").staging(made.version) / "version"
    staged.mkdir(parents=True)
    (staged / dataset.MANIFEST).write_text("half of")
    (staged / "scrap").touch()
    again = make_digits(DigitsConfig(root=tmp_path / "b", source=str(source)))
    assert contents(again.folder) == contents(made.folder)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_file_of_another_md5_is_refused(source: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in catalog.MNIST_MD5:
        (damaged / name).write_bytes((source / name).read_bytes())
    with open(damaged / "train-images-idx3-ubyte.gz", "r+b") as file:
        file.seek(5000)
        file.write(b"\0\1\2")
    with pytest.raises(DownloadError, match=r"train-images-idx3-ubyte\.gz: MD5 is \w+, not"):
        make_digits(DigitsConfig(root=tmp_path / "a", source=str(damaged)))
    with serve_folder(damaged) as url, pytest.raises(DownloadError, match=r"train-images-idx3-ubyte\.gz"):
        make_digits(DigitsConfig(root=tmp_path / "b", source=url))
    assert not list(tmp_path.glob("*/datasets/digits/*/dataset.json"))


def test_a_mirror_takes_over_from_a_host_that_has_another_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(Host(b"<html>gone</html>" * 99)) as gone, serve_folder(source) as mirror:
        monkeypatch.setattr(catalog, "MNIST_HOSTS", (gone.url.rpartition("/")[0], mirror))
        made = make_digits(DigitsConfig(root=tmp_path))
    assert gone.asked
    pointer = json.loads((made.folder.parent / dataset.POINTER).read_text())
    assert all(origin["from"].startswith(mirror) and origin["checked"] for origin in pointer["origins"].values())


@pytest.mark.parametrize(
    ("half", "values", "said"),
    [
        ("train", (strokes(4, 1)[:, :27], np.zeros(4, np.uint8)), "not 28 x 28"),
        ("train", (strokes(4, 1), np.zeros(5, np.uint8)), "has 4 images, but .* 5 labels"),
        ("test", (strokes(4, 1), np.full(4, 10, np.uint8)), "has the label 10"),
        ("test", (np.zeros(4, np.uint8), np.zeros(4, np.uint8)), "no IDX file of bytes in 3 dimensions"),
    ],
)
def test_files_that_are_not_mnist_are_one_clear_line(
    half: str, values: Any, said: str, halves: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "MNIST_MD5", write_mnist(tmp_path, halves | {half: values}))
    with pytest.raises(ArchiveError, match=said) as caught:
        make_digits(DigitsConfig(root=tmp_path / "root", source=str(tmp_path)))
    assert "\n" not in str(caught.value)


# -- the command ------------------------------------------------------------------------------------------------------


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def test_the_command_makes_verifies_lists_and_compares(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ["--root", str(tmp_path)]
    for said in ("state     published\n", "state     published before, nothing to do\n"):
        code, out, _ = run("digits", "--source", str(source), *root, capsys=capsys)
        assert (code, said in out, "1170" in out) == (0, True, True)
    assert run("digits", "--source", str(source), "--limit", "24", *root, capsys=capsys)[0] == 0
    places = dataset.Places(tmp_path, "digits")
    first, second = dataset.published(places)
    code, out, _ = run("verify", "--deep", f"digits@{first[:6]}", *root, capsys=capsys)
    assert (code, f"{places.version(first)} is sound (every byte checked)" in out) == (0, True)
    code, out, _ = run("versions", *root, capsys=capsys)
    assert (code, f"digits@{second} (latest)" in out) == (0, True)
    code, out, _ = run("versions", f"digits@{first}", *root, capsys=capsys)
    assert (code, "1124 subjects differ" in out) == (0, True)  # 1170 - 48, and two that were train are val now


def test_a_folder_without_the_files_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("digits", "--root", str(tmp_path), "--source", str(tmp_path / "x"), capsys=capsys)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "is not there; give a --source that has t" in err


# -- the real files ---------------------------------------------------------------------------------------------------

REAL = Path(__file__).resolve().parents[2] / "shared/data/mnist"


@pytest.mark.standin  # half a minute with the verification
@pytest.mark.skipif(
    not REAL.is_dir(),
    reason="needs the real files, which no checkout has; the tests above pin the same on files of their own",
)
def test_the_published_files(tmp_path: Path) -> None:
    made = make_digits(DigitsConfig(root=tmp_path, source=str(REAL)))
    facts = dataset.read_facts(made.folder)
    assert facts["splits"] == {"test": 10_000, "train": 55_000, "val": 5_000}
    assert dataset.verify(made.folder, deep=True) == []
    table = dataset.read_manifest(made.folder)
    assert table["label"].tolist()[:5] == [7, 2, 1, 0, 4]  # as the official test set begins
    assert table["label"].value_counts().loc[1] == 7877  # as published: 6742 of training, 1135 of test
