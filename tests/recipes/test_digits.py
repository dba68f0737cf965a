"""MNIST as a version: files are checked by MD5 and format, and the store holds their images."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlcroissant
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
from ixi_etl import open_version
from ixi_etl.config import DigitsConfig, DigitsDataset
from ixi_etl.core.files import to_json
from ixi_etl.core.storage import DataRoot
from ixi_etl.dataset import manifest, metadata, publish, verify, versions
from ixi_etl.dataset.documents import LEGAL_CODE
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.dataset.schema import DIGITS
from ixi_etl.dataset.store import STORE, open_arrays
from ixi_etl.errors import ArchiveError, ConfigError, DatasetError, DownloadError
from ixi_etl.recipes.digits import FILE_PAIRS, INK, draw_outline, make_digits, pad_images, pair_images, parse_idx
from ixi_etl.recipes.reproduce import reproduce
from ixi_etl.sources import catalog
from ixi_etl.testing.loopback import serve_folder

COUNTS = {"test": 30, "train": 1140}  # together more than a shard: one full shard and a partial one


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def strokes(count: int, seed: int) -> np.ndarray:
    """Images [count, 28, 28] of a few thick strokes each, with gray edges like MNIST."""
    random = np.random.default_rng(seed)
    images = np.zeros((count, 28, 28), np.uint8)
    for image in images:
        for _ in range(3):
            y, x, h, w = (*random.integers(2, 18, 2), *random.integers(3, 8, 2))
            image[y : y + h, x : x + w] = random.integers(90, 256, (h, w))
    return images


def write_mnist(folder: Path, halves: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, str]:
    """Write the four files into `folder`; returns their MD5s."""
    md5s = {}
    for half, values in halves.items():
        for name, array in zip(FILE_PAIRS[half], values, strict=True):
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
    """A folder with small files named like MNIST's, whose MD5s replace the published ones."""
    monkeypatch.setattr(catalog, "MNIST_MD5", mnist[1])
    return mnist[0]


@pytest.fixture(scope="module")
def made_once(mnist: tuple[Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> PublishedVersion:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "MNIST_MD5", mnist[1])
        return make_digits(DigitsConfig(root=tmp_path_factory.mktemp("made") / "root", source=str(mnist[0])))


@pytest.fixture
def made(made_once: PublishedVersion, source: Path, tmp_path: Path) -> PublishedVersion:
    """The version of these files in its own root, as made by `make_digits`."""
    root = made_once.folder.parents[2]
    shutil.copytree(root, tmp_path / "root")
    return replace(made_once, folder=tmp_path / "root" / made_once.folder.relative_to(root))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# -- the format -------------------------------------------------------------------------------------------------------

small = arrays(np.uint8, st.tuples(*[st.integers(1, 4)] * 3))


@given(small)
def test_an_idx_file_reads_back_as_written(values: np.ndarray) -> None:
    np.testing.assert_array_equal(parse_idx(idx(values), 3, "f"), values)


@given(small, st.integers(-60, 60))
def test_an_idx_file_of_wrong_length_is_rejected(values: np.ndarray, change: int) -> None:
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
def test_a_file_that_is_not_idx_is_rejected(data: bytes) -> None:
    with pytest.raises(ArchiveError, match=r"^f (has|is)"):
        parse_idx(data, 3, "f")


# -- the pairs --------------------------------------------------------------------------------------------------------

images = arrays(np.uint8, st.tuples(st.integers(1, 3), st.just(28), st.just(28)), fill=st.sampled_from([0, 255]))


@given(images)
def test_the_sketch_is_the_ink_that_borders_paper(stored: np.ndarray) -> None:
    digit = pad_images(stored)
    outline = draw_outline(digit)
    assert (outline.shape, outline.dtype) == (digit.shape, np.uint8)
    assert set(np.unique(outline)) <= {0, 255}
    assert (digit[outline == 255] > INK).all()
    for n, y, x in np.argwhere(digit[:, 0] > INK):  # the padding keeps the neighbours inside the image
        around = [digit[n, 0, y + dy, x + dx] > INK for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1))]
        assert (outline[n, 0, y, x] == 255) == (not all(around))


def test_ink_at_the_edge_of_an_image_is_outline() -> None:
    full = np.full((1, 1, 5, 5), 255, np.uint8)
    assert draw_outline(full)[0, 0].astype(bool).tolist() == [[1] * 5, *[[1, 0, 0, 0, 1]] * 3, [1] * 5]


def test_the_store_has_the_padded_images(made: PublishedVersion, halves: Any) -> None:
    table = metadata.read_manifest(made.folder)
    store = open_arrays(made.folder)
    assert store["digit"].shape == store["sketch"].shape == (sum(COUNTS.values()), 1, 32, 32)
    digit = np.asarray(store["digit"][:])
    np.testing.assert_array_equal(store["sketch"][:], draw_outline(digit))
    for row in manifest.to_records(table):
        half, number = row["subject_id"].split("-")
        stored, label = (array[int(number)] for array in halves[half])
        np.testing.assert_array_equal(digit[row["store_row"]][0, 2:30, 2:30], stored)
        assert digit[row["store_row"]].sum() == stored.sum()  # the padding is blank
        assert row["label"] == label


def test_splits_follow_the_files_with_the_last_twelfth_as_val(made: PublishedVersion) -> None:
    table = metadata.read_manifest(made.folder).set_index("subject_id")
    assert (table["split"][[s.startswith("test-") for s in table.index]] == "test").all()
    train = table[[s.startswith("train-") for s in table.index]]["split"].tolist()
    assert train == ["train"] * 1045 + ["val"] * 95
    assert metadata.read_metadata(made.folder)["splits"] == {"test": 30, "train": 1045, "val": 95}


def test_the_manifest_has_the_percentiles_of_each_slab(made: PublishedVersion) -> None:
    table, store = metadata.read_manifest(made.folder), open_arrays(made.folder)
    for row in manifest.to_records(table.iloc[::100]):
        for name in ("sketch", "digit"):
            low_high = np.percentile(np.asarray(store[name][row["store_row"]]), (0.1, 99.9))
            assert (row[f"{name}_p_low"], row[f"{name}_p_high"]) == tuple(low_high)


def test_a_blank_image_is_excluded_with_a_reason() -> None:
    stored = strokes(5, 1)
    stored[2] = 0
    halves = {"test": (stored[:1], np.zeros(1, np.uint8)), "train": (stored[1:], np.zeros(4, np.uint8))}
    table, slabs = pair_images(halves)
    assert table["reason"].tolist() == ["", "", "empty_image", "", ""]
    assert table["store_row"].tolist() == [0, 1, pd.NA, 2, 3]
    np.testing.assert_array_equal(slabs["digit"], pad_images(stored[[0, 1, 3, 4]]))
    assert manifest.funnel(DIGITS.validate(table), DIGITS)["all"].to_dict() == {"found": 5, "used": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.assign(label=pd.array([10] * len(t), "Int64")), "label"),
        (lambda t: t.assign(label=pd.array([None] * len(t), "Int64")), "complete"),
        (lambda t: t.assign(sketch_p_high=-1.0), "complete"),
        (lambda t: t.drop(columns="label"), "label"),
        (lambda t: t.assign(split="dev"), "split"),
    ],
)
def test_an_edited_manifest_is_rejected(change: Any, message: str) -> None:
    table, _ = pair_images({"test": (strokes(3, 2), np.arange(3, dtype=np.uint8))})
    assert DIGITS.from_csv(DIGITS.to_csv(table), "m.csv").equals(table)
    with pytest.raises(DatasetError, match=rf"m\.csv is not a manifest.*{message}"):
        DIGITS.from_csv(change(table).to_csv(index=False), "m.csv")


# -- the version ------------------------------------------------------------------------------------------------------


def test_equal_files_give_equal_bytes_wherever_they_are(made: PublishedVersion, source: Path, tmp_path: Path) -> None:
    with serve_folder(source) as url:
        config = DigitsConfig(root=tmp_path / "other", source=url)
        again = make_digits(config)
        assert not make_digits(config).is_new
    assert again.version == made.version
    assert contents(again.folder) == contents(made.folder)
    for name, data in contents(made.folder).items():
        assert url.encode() not in data, name
        assert str(tmp_path).encode() not in data, name
    assert make_digits(config.model_copy(update={"offline": True})).version == made.version


def test_digits_are_reproduced_and_described(made: PublishedVersion, source: Path, tmp_path: Path) -> None:
    again = reproduce(made.folder, DataRoot(tmp_path, "digits"), tmp_path / "again", source=str(source))
    assert again.files.empty
    text = (made.folder / metadata.README).read_text()
    assert "handwritten digits" in text
    assert "CC BY-SA 3.0" in text
    assert not re.search("Hammersmith|scan|Philips", text)
    assert (made.folder / metadata.LICENCE_TEXT).read_text() == LEGAL_CODE.read_text()
    dataset = mlcroissant.Dataset(str(made.folder / metadata.CROISSANT))
    labels = [record["manifest/label"] for record in dataset.records("manifest")]
    assert labels == metadata.read_manifest(made.folder)["label"].tolist()


def test_only_options_that_affect_data_name_the_version(made: PublishedVersion, source: Path, tmp_path: Path) -> None:
    fewer = make_digits(DigitsConfig(root=tmp_path / "root", source=str(source), dataset=DigitsDataset(limit=24)))
    assert fewer.version != made.version
    assert metadata.read_metadata(fewer.folder)["splits"] == {"test": 24, "train": 22, "val": 2}
    data_root = DataRoot(tmp_path / "root", "digits")
    assert versions.resolve_version(data_root) == fewer.version
    assert versions.published_versions(data_root) == [made.version, fewer.version]


def test_a_version_is_plain_zarr_with_many_images_per_shard(made: PublishedVersion) -> None:
    data = xr.open_zarr(made.folder / STORE)
    assert data["sketch"].dims == data["digit"].dims == ("image", "z", "y", "x")
    array = zarr.open_group(made.folder / STORE, mode="r")["digit"]
    assert isinstance(array, zarr.Array)
    assert (array.chunks, array.shards, array.dtype) == ((100, 1, 32, 32), (1000, 1, 32, 32), np.uint8)
    assert "crc32c" in str(array.metadata.to_dict()["codecs"])
    summary = metadata.read_metadata(made.folder)
    assert (summary["source"], summary["target"], summary["funnel"]["used"]["all"]) == ("sketch", "digit", 1170)
    assert "LeCun" in summary["credit"]
    assert all(source["md5_is_published"] for source in summary["sources"].values())
    assert (
        data["image"].to_numpy().tolist()
        == manifest.used_rows(metadata.read_manifest(made.folder))["subject_id"].tolist()
    )


@pytest.mark.usefixtures("torch")
def test_an_opened_version_gives_labelled_images_and_pairs(made: PublishedVersion) -> None:
    version = open_version(made.folder.parents[2], "digits@latest")
    data, pairs = version.xarray(), version.torch("test")
    assert data["digit"].dims == ("image", "z", "y", "x")
    assert data["digit"].chunks[0] == (1000, len(data["image"]) - 1000)
    assert data["image"].to_numpy()[0] == "test-00000"
    np.testing.assert_array_equal(data["digit"], open_arrays(made.folder)["digit"])
    of_test = data.sel(image=data["split"] == "test")
    assert of_test["label"].to_numpy().tolist() == [n % 10 for n in range(COUNTS["test"])]
    assert len(pairs) == COUNTS["test"]
    item = pairs[3]
    assert item["subject_id"] == of_test["image"].to_numpy()[3]
    one = of_test.isel(image=3, z=0)
    scaled = (one["digit"] - one["digit_low"]) / (one["digit_high"] - one["digit_low"])
    np.testing.assert_allclose(item["digit"][0], scaled.clip(0, 1) * 2 - 1, atol=1e-6)
    assert version.xarray(scanner_units=True).identical(data)  # images have no other units
    with pytest.raises(ConfigError, match="are no scans and have no affine"):
        version.nifti("test-00003", "digit")


def test_deep_verification_accepts_an_intact_version(made: PublishedVersion) -> None:
    assert verify.verify(made.folder, deep=True) == []


@pytest.mark.parametrize("share", [0.0, 0.4, 0.7, 0.999])
def test_deep_verification_detects_any_flipped_byte(share: float, made: PublishedVersion) -> None:
    files = [p for p in (made.folder / STORE).rglob("*") if p.is_file()]
    victim = files[int(share * len(files))]
    data = bytearray(victim.read_bytes())
    data[int(share * len(data))] ^= 1
    victim.write_bytes(data)
    assert any(str(victim) in problem for problem in verify.verify(made.folder, deep=True))


def test_swapped_image_shards_are_detected_for_each_subject(made: PublishedVersion) -> None:
    shards = [made.folder / STORE / "digit/c" / n / "0/0/0" for n in "01"]
    one, two = (shard.read_bytes() for shard in shards)
    shards[0].write_bytes(two)
    shards[1].write_bytes(one)
    (made.folder.parent / metadata.POINTER).unlink()  # it records the SHA-256 of the published `dataset.json`
    listed = {"files": publish.list_files(made.folder)}  # as if the list of files was updated too
    version_metadata = metadata.read_metadata(made.folder) | listed
    (made.folder / metadata.METADATA).write_text(to_json(metadata.with_digest(version_metadata)))
    assert verify.verify(made.folder) == []
    problems = verify.verify(made.folder, deep=True)
    assert any("digit of test-00000 does not have the manifest's percentiles" in problem for problem in problems)


def test_metadata_with_wrong_array_names_is_detected(made: PublishedVersion) -> None:
    version_metadata = metadata.read_metadata(made.folder) | {"source": "t1"}
    (made.folder / metadata.METADATA).write_text(to_json(metadata.with_digest(version_metadata)))
    assert any("t1 and digit are not arrays of digits" in problem for problem in verify.verify(made.folder))


def test_a_damaged_version_is_made_again(made: PublishedVersion, source: Path, tmp_path: Path) -> None:
    before = contents(made.folder)
    (made.folder / STORE / "digit/c/1/0/0/0").unlink()
    again = make_digits(DigitsConfig(root=tmp_path / "root", source=str(source)))
    assert again.is_new
    assert contents(again.folder) == before
    assert not (again.folder.parent / ".staging").exists()


def test_leftovers_of_a_killed_run_are_not_published(made: PublishedVersion, source: Path, tmp_path: Path) -> None:
    staged = DataRoot(tmp_path / "b", "digits").staging(made.version) / "version"
    staged.mkdir(parents=True)
    (staged / metadata.MANIFEST).write_text("incomplete")
    (staged / "scrap").touch()
    again = make_digits(DigitsConfig(root=tmp_path / "b", source=str(source)))
    assert contents(again.folder) == contents(made.folder)


# -- errors -----------------------------------------------------------------------------------------------------------


def test_a_file_with_a_wrong_md5_is_rejected(source: Path, tmp_path: Path) -> None:
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


def test_a_mirror_replaces_a_host_with_a_wrong_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(Host(b"<html>gone</html>" * 99)) as gone, serve_folder(source) as mirror:
        monkeypatch.setattr(catalog, "MNIST_HOSTS", (gone.url.rpartition("/")[0], mirror))
        made = make_digits(DigitsConfig(root=tmp_path))
    assert gone.requests
    pointer = json.loads((made.folder.parent / metadata.POINTER).read_text())
    assert all(origin["from"].startswith(mirror) and origin["checked"] for origin in pointer["origins"].values())


@pytest.mark.parametrize(
    ("half", "values", "message"),
    [
        ("train", (strokes(4, 1)[:, :27], np.zeros(4, np.uint8)), "not 28 x 28"),
        ("train", (strokes(4, 1), np.zeros(5, np.uint8)), "has 4 images, but .* 5 labels"),
        ("test", (strokes(4, 1), np.full(4, 10, np.uint8)), "has the label 10"),
        ("test", (np.zeros(4, np.uint8), np.zeros(4, np.uint8)), "not an IDX file of bytes in 3 dimensions"),
    ],
)
def test_files_that_are_not_mnist_are_a_one_line_error(
    half: str, values: Any, message: str, halves: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "MNIST_MD5", write_mnist(tmp_path, halves | {half: values}))
    with pytest.raises(ArchiveError, match=message) as caught:
        make_digits(DigitsConfig(root=tmp_path / "root", source=str(tmp_path)))
    assert "\n" not in str(caught.value)


# -- the command ------------------------------------------------------------------------------------------------------


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_the_command_makes_verifies_lists_and_compares(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ["--root", str(tmp_path)]
    for text in ("state     published\n", "state     published before, nothing to do\n"):
        code, out, _ = run("digits", "--source", str(source), *root, capsys=capsys)
        assert (code, text in out, "1170" in out) == (0, True, True)
    assert run("digits", "--source", str(source), "--limit", "24", *root, capsys=capsys)[0] == 0
    data_root = DataRoot(tmp_path, "digits")
    first, second = versions.published_versions(data_root)
    code, out, _ = run("verify", "--deep", f"digits@{first[:6]}", *root, capsys=capsys)
    assert (code, f"{data_root.version(first)} is intact (every byte checked)" in out) == (0, True)
    code, out, _ = run("versions", *root, capsys=capsys)
    assert (code, f"digits@{second} (latest)" in out) == (0, True)
    code, out, _ = run("versions", f"digits@{first}", *root, capsys=capsys)
    assert (code, "Differences of 1,124 subjects" in out) == (0, True)  # 1170 - 48, and two moved from train to val


def test_a_folder_without_the_files_is_a_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("digits", "--root", str(tmp_path), "--source", str(tmp_path / "x"), capsys=capsys)
    assert (code, out, err.count("\n")) == (3, "", 1)
    assert "is not there; give a --source that has t" in err


# -- the real files ---------------------------------------------------------------------------------------------------

REAL = Path(__file__).resolve().parents[3] / "shared/data/mnist"


@pytest.mark.standin  # takes half a minute with the verification
@pytest.mark.skipif(
    not REAL.is_dir(),
    reason="needs the real files, which are not in the repository; the tests above check the same with small files",
)
def test_the_published_files_make_the_expected_version(tmp_path: Path) -> None:
    made = make_digits(DigitsConfig(root=tmp_path, source=str(REAL)))
    version_metadata = metadata.read_metadata(made.folder)
    assert version_metadata["splits"] == {"test": 10_000, "train": 55_000, "val": 5_000}
    assert verify.verify(made.folder, deep=True) == []
    table = metadata.read_manifest(made.folder)
    assert table["label"].tolist()[:5] == [7, 2, 1, 0, 4]  # the first labels of the official test set
    assert table["label"].value_counts().loc[1] == 7877  # published counts: 6742 for training, 1135 for test
