"""What each consumer reads from an export is what the store holds: pairs, order, values, sizes and orientation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import consumers
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples
from selections import affine, expected, numbers, selection_of

from ixi_etl.core.progress import no_progress
from ixi_etl.errors import ConfigError, DatasetError, EmptySplitError
from ixi_etl.exports.nifti import Nifti
from ixi_etl.exports.pix2pix import Pix2pix
from ixi_etl.exports.selection import Selection
from ixi_etl.exports.selfrdb import SelfRDB, foreground
from ixi_etl.exports.syndiff import SynDiff

SPLITS = ("train", "val", "test")
SUBJECT_SPLITS = ("val", "train", "test", "train")
DECATHLON = {"training": (1, 3), "validation": (0,), "test": (2,)}
"""Key of MONAI's list -> the rows that it lists, given `SUBJECT_SPLITS`."""


def pair(depth: int = 2, height: int = 8, width: int = 6) -> dict[str, Any]:
    return {name: numbers(4, depth, height, width, seed) for seed, name in enumerate(("t1", "t2"))}


def of_split(images: np.ndarray, split: str) -> np.ndarray:
    """Images [subject, z, ...] of the subjects in a split: [pair, ...]."""
    chosen = images[[n for n, each in enumerate(SUBJECT_SPLITS) if each == split]]
    return chosen.reshape(-1, *chosen.shape[2:])


def centred(images: np.ndarray, size: int) -> np.ndarray:
    """Even images in the middle of size x size pixels of 0."""
    rows, columns = ((size - n) // 2 for n in images.shape[1:])
    return np.pad(images, ((0, 0), (rows, rows), (columns, columns)))


def padded(images: np.ndarray) -> np.ndarray:
    return np.pad(images, ((0, 0), (0, images.shape[1] % 2), (0, images.shape[2] % 2)))


@settings(max_examples=examples(8))
@given(height=st.integers(1, 11), width=st.integers(1, 11), bits=st.sampled_from([8, 16]))
def test_every_image_format_gives_the_normalised_pairs_of_each_split(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, bits: int
) -> None:
    arrays = pair(2, height, width)
    selection = selection_of(arrays, SUBJECT_SPLITS)
    folders = {}
    for layout in (SynDiff(selection), SelfRDB(selection), Pix2pix(selection, bits)):
        folders[type(layout)] = folder = tmp_path_factory.mktemp("export")
        layout.check()
        layout.write(folder, no_progress)
        assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= layout.size_bytes + 200
    for split in SPLITS:
        wanted = [of_split(expected(arrays[name]), split) for name in ("t1", "t2")]
        read = {
            SynDiff: [(x + 1) / 2 for x in consumers.syndiff(folders[SynDiff], split, "T1", "T2", 12)],
            SelfRDB: consumers.selfrdb(folders[SelfRDB], split, "T1", "T2"),
            Pix2pix: consumers.pix2pix(folders[Pix2pix], split, bits),
        }
        for images, right in zip(read[SynDiff], wanted, strict=True):
            np.testing.assert_allclose(images, centred(padded(right), 12), atol=1e-6)
        for images, right in zip(read[SelfRDB], wanted, strict=True):
            assert images.dtype == np.float32
            np.testing.assert_allclose(images, padded(right), atol=1e-7)
        for images, right in zip(read[Pix2pix], wanted, strict=True):
            np.testing.assert_allclose(images, right, atol=0.5 / (2**bits - 1) + 1e-6)


def test_syndiff_pads_an_odd_size_to_256(tmp_path: Path) -> None:
    SynDiff(selection_of(pair(1, 181, 217), SUBJECT_SPLITS)).write(tmp_path, no_progress)
    assert [images.shape for images in consumers.syndiff(tmp_path, "test", "T1", "T2")] == [(1, 256, 256)] * 2


def test_masks_and_subject_ids_are_those_of_the_test_slices(tmp_path: Path) -> None:
    arrays = pair(height=7)
    selection = selection_of(arrays, ("test", "train", "test", "val"), "t2->t1")
    SelfRDB(selection).write(tmp_path, no_progress)
    files = sorted((tmp_path / "mask/test").iterdir())
    assert [file.name for file in files] == ["slice_0.npy", "slice_1.npy", "slice_2.npy", "slice_3.npy"]
    masks = np.array([np.load(file) for file in files])
    t1 = padded(expected(arrays["t1"])[[0, 2]].reshape(4, 7, 6))
    low, high = (limit(axis=(1, 2), keepdims=True) for limit in (t1.min, t1.max))
    assert masks.dtype == np.uint8
    assert np.array_equal(masks, (t1 - low) / (high - low) > 0.1)
    ids = yaml.safe_load((tmp_path / "subject_ids.yaml").read_text())
    assert ids == ["IXI000-Guys-00"] * 2 + ["IXI002-Guys-02"] * 2


def test_a_slice_of_one_value_has_no_foreground() -> None:
    assert not foreground(np.full((1, 4, 4), 0.5, np.float32)).any()


def test_without_a_t1_masks_are_made_of_the_source(tmp_path: Path) -> None:
    arrays = {name: numbers(4, 1, 8, 8, seed) for seed, name in enumerate(("pd", "t2"))}
    layout = SelfRDB(selection_of(arrays, SUBJECT_SPLITS, name="ixi-pd-t2"))
    layout.write(tmp_path, no_progress)
    assert layout.mask_from == "pd"
    assert "of pd" in layout.describe()["mask"]
    assert (tmp_path / "PD/test/slice_0.npy").exists()


def test_pictures_have_the_bits_asked_for_and_names_that_sort(tmp_path: Path) -> None:
    selection = selection_of(pair(), SUBJECT_SPLITS)
    for bits, mode in ((8, "L"), (16, "I;16")):
        folder = tmp_path / str(bits)
        folder.mkdir()
        rows = Pix2pix(selection, bits).write(folder, no_progress)
        names = sorted(f.name for f in (folder / "train").iterdir())
        assert names == [
            "000000_IXI001-Guys-01_000.png",
            "000001_IXI001-Guys-01_001.png",
            "000002_IXI003-Guys-03_000.png",
            "000003_IXI003-Guys-03_001.png",
        ]
        assert consumers.Image.open(folder / "train" / names[0]).mode == mode
        assert [row["file"] for row in rows if row["role"] == "source" and row["split"] == "train"] == [
            f"train/{name}" for name in names
        ]


@pytest.mark.parametrize("layout", [SynDiff, SelfRDB, Pix2pix])
def test_a_split_by_file_is_kept_slice_by_slice(layout: type, tmp_path: Path) -> None:
    arrays = pair(3)
    lists = ["train,test,train", "test,test,val", "val,train,test", "train,train,train"]
    selection = selection_of(arrays, ("mixed",) * 3 + ("train",), slice_splits=lists)
    layout(selection).write(tmp_path, no_progress)
    wanted = expected(arrays["t2"]).reshape(-1, 8, 6)
    for split in SPLITS:
        right = wanted[[each == split for each in ",".join(lists).split(",")]]
        read = {
            SynDiff: lambda split=split: (consumers.syndiff(tmp_path, split, "T1", "T2", 8)[1][..., 1:-1] + 1) / 2,
            SelfRDB: lambda split=split: consumers.selfrdb(tmp_path, split, "T1", "T2")[1],
            Pix2pix: lambda split=split: consumers.pix2pix(tmp_path, split)[1],
        }[layout]()
        np.testing.assert_allclose(read, right, atol=0.0021)
    assert selection.counts() == {
        "train": {"subjects": 3, "slices": 6},
        "val": {"subjects": 2, "slices": 2},
        "test": {"subjects": 3, "slices": 4},
    }


def test_nifti_refuses_a_split_by_file() -> None:
    selection = selection_of(pair(1), ("train",) * 4, slice_splits=["train"] * 4)
    with pytest.raises(ConfigError, match="slices of one subject in several splits") as caught:
        Nifti(selection).check()
    assert "\n" not in str(caught.value)


def test_margins_are_not_exported(tmp_path: Path) -> None:
    arrays = pair(6)
    selection = selection_of(arrays, SUBJECT_SPLITS, margin=2)
    rows = SelfRDB(selection).write(tmp_path, no_progress)
    assert {row["slice"] for row in rows} == {2, 3}
    for split in SPLITS:
        _, read = consumers.selfrdb(tmp_path, split, "T1", "T2")
        np.testing.assert_allclose(read, of_split(expected(arrays["t2"])[:, 2:4], split), atol=1e-7)
    Nifti(selection).write(tmp_path, no_progress)
    volume = consumers.nib.load(tmp_path / "Dataset902_T2/imagesTr/IXI001-Guys-01_0000.nii.gz")
    assert np.array_equal(volume.get_fdata(), arrays["t2"][1, 2:4].transpose(2, 1, 0))
    np.testing.assert_allclose(volume.affine @ (1, 2, 0, 1), affine() @ (1, 2, 2, 1), atol=1e-4)


def test_other_intensity_ranges_of_the_manifest_are_used(tmp_path: Path) -> None:
    arrays = {name: numbers(1, 1, 4, 4) for name in ("t1", "t2")}
    columns = {"t1_low": [0.0], "t1_high": [50.0], "t2_low": [20.0], "t2_high": [40.0]}
    selection = selection_of(arrays, ["train"], columns=columns)
    (row, *_) = SelfRDB(selection).write(tmp_path, no_progress)
    assert (row["low"], row["high"]) == (0, 50)
    _, t2 = consumers.selfrdb(tmp_path, "train", "T1", "T2")
    np.testing.assert_allclose(t2[0], np.clip((arrays["t2"][0, 0, ::-1] - 20) / 20.0, 0, 1), atol=1e-7)


def test_an_unusable_range_names_the_subject() -> None:
    with pytest.raises(DatasetError, match=r"cannot normalise the t2 of IXI001-Guys-01: .* 5 and 5"):
        selection_of(pair(), SUBJECT_SPLITS, columns={"t2_p_low": 5.0, "t2_p_high": [90.0, 5, 90, 90]})


def test_a_subject_without_one_of_the_arrays_is_left_out(tmp_path: Path) -> None:
    selection = selection_of(pair(), SUBJECT_SPLITS, absent={"t1": [1]})
    assert selection.left_out == {"IXI001-Guys-01": ("t1",)}
    SelfRDB(selection).write(tmp_path, no_progress)
    assert len(consumers.selfrdb(tmp_path, "train", "T1", "T2")[0]) == 2  # of the other subject in train
    with pytest.raises(EmptySplitError, match="no subject of version has all of t1, t2"):
        selection_of(pair(), SUBJECT_SPLITS, absent={"t1": range(4)})


def test_nifti_lists_the_pairs_of_each_split_in_scanner_units(tmp_path: Path) -> None:
    arrays = pair(3)
    columns = {"t1_scale": 0.25, "t1_offset": -3.0}
    Nifti(selection_of(arrays, SUBJECT_SPLITS, columns=columns)).write(tmp_path, no_progress)
    for key, subjects in DECATHLON.items():
        read = consumers.decathlon(tmp_path / "datalist.json", key)
        assert len(read) == len(subjects)
        for (image, label), n in zip(read, subjects, strict=True):
            xyz = {name: array[n].transpose(2, 1, 0).astype(float) for name, array in arrays.items()}
            np.testing.assert_allclose(image.get_fdata(), xyz["t1"] * 0.25 - 3)  # not clipped
            np.testing.assert_array_equal(label.get_fdata(), xyz["t2"])
            for volume in (image, label):
                np.testing.assert_allclose(volume.affine, affine(), atol=1e-5)


@pytest.mark.stack  # importing MONAI takes seconds
def test_monai_reads_the_same_pairs_with_their_affine(tmp_path: Path) -> None:
    from monai.data import load_decathlon_datalist
    from monai.transforms import LoadImaged

    arrays = {name: numbers(4, 2, 8, 6, seed) for seed, name in enumerate(("t1", "pd", "t2"))}
    Nifti(selection_of(arrays, SUBJECT_SPLITS, "t1+pd->t2", name="ixi-t1-pd-t2")).write(tmp_path, no_progress)
    load = LoadImaged(["image", "label"], ensure_channel_first=True)
    for key, subjects in DECATHLON.items():
        items = load_decathlon_datalist(tmp_path / "datalist.json", True, key)
        assert len(items) == len(subjects)
        for item, n in zip(map(load, items), subjects, strict=True):
            for volume, names in ((item["image"], ("t1", "pd")), (item["label"], ("t2",))):
                wanted = [arrays[name][n].transpose(2, 1, 0) for name in names]
                np.testing.assert_array_equal(volume, wanted)
                np.testing.assert_allclose(volume.affine, affine(), atol=1e-5)


def test_nifti_has_a_channel_for_each_source(tmp_path: Path) -> None:
    arrays = {name: numbers(4, 2, 6, 6, seed) for seed, name in enumerate(("t1", "pd", "t2"))}
    selection = selection_of(arrays, SUBJECT_SPLITS, "t1+pd->t2", name="ixi-t1-pd-t2")
    Nifti(selection).write(tmp_path, no_progress)
    channels, _ = consumers.nnunet(tmp_path / "Dataset901_T1_PD")["IXI003-Guys-03"]
    for channel, name in zip(channels, ("t1", "pd"), strict=True):
        np.testing.assert_array_equal(channel, arrays[name][3].transpose(2, 1, 0))
    assert json.loads((tmp_path / "Dataset901_T1_PD/dataset.json").read_text())["channel_names"] == {
        "0": "T1",
        "1": "PD",
    }
    with pytest.raises(ConfigError, match=r"t1\+pd->t2 has several sources.*--direction t1->t2"):
        Pix2pix(selection).check()


def test_nifti_is_a_pair_of_data_sets_for_nnunet(tmp_path: Path) -> None:
    arrays = pair()
    Nifti(selection_of(arrays, SUBJECT_SPLITS)).write(tmp_path, no_progress)
    for dataset, name in (("Dataset901_T1", "t1"), ("Dataset902_T2", "t2")):
        cases = consumers.nnunet(tmp_path / dataset)
        assert list(cases) == ["IXI000-Guys-00", "IXI001-Guys-01", "IXI003-Guys-03"]  # train and val
        for n, ((image,), labels) in zip((0, 1, 3), cases.values(), strict=True):
            np.testing.assert_array_equal(image, arrays[name][n].transpose(2, 1, 0))
            assert (labels == 1).all()
        fold = {"train": ["IXI001-Guys-01", "IXI003-Guys-03"], "val": ["IXI000-Guys-00"]}
        assert json.loads((tmp_path / dataset / "splits_final.json").read_text()) == [fold]
        assert [f.name for f in (tmp_path / dataset / "imagesTs").iterdir()] == ["IXI002-Guys-02_0000.nii.gz"]


def test_no_slab_is_cropped_to_its_voxels_that_are_not_0(tmp_path: Path) -> None:
    arrays = pair()
    arrays["t1"][2] = 0
    arrays["t1"][2, 0, 0, 1] = arrays["t1"][2, 1, -1, -1] = 5
    columns = {"t2_scale": 2.0, "t2_offset": -8.0}  # 4 is stored for 0
    arrays["t2"][2, 0, 0, 0] = 4
    Nifti(selection_of(arrays, SUBJECT_SPLITS, columns=columns)).write(tmp_path, no_progress)
    ((image, label),) = consumers.decathlon(tmp_path / "datalist.json", "test")
    wanted = arrays["t1"][2].copy()
    wanted[0, 0, 0] = 1
    assert np.array_equal(image.get_fdata(), wanted.transpose(2, 1, 0))
    assert label.get_fdata()[0, 0, 0] == 2
    for volume in (image, label):
        corners = [[int(found[end]) for end in (0, -1)] for found in map(np.sort, np.nonzero(volume.get_fdata()))]
        assert corners == [[0, 5], [0, 7], [0, 1]]


def test_the_qform_is_left_out_if_the_affine_has_shear(tmp_path: Path) -> None:
    for shear, code in ((0.0, 2), (0.2, 0)):
        selection = selection_of(pair(), SUBJECT_SPLITS)
        sheared = affine()
        sheared[0, 1] += shear
        selection.arrays["t2_affine"][:] = sheared
        folder = tmp_path / str(code)
        folder.mkdir()
        Nifti(selection).write(folder, no_progress)
        image = consumers.nib.load(folder / "Dataset902_T2/imagesTs/IXI002-Guys-02_0000.nii.gz")
        assert (int(image.header["qform_code"]), int(image.header["sform_code"])) == (code, 2)
        np.testing.assert_allclose(image.affine, sheared, atol=1e-5)


def test_pairs_by_index_are_exported_as_images_only(tmp_path: Path) -> None:
    arrays = pair()
    selection = selection_of(arrays, SUBJECT_SPLITS, pairing="index")
    layout = SelfRDB(selection)
    layout.write(tmp_path, no_progress)
    np.testing.assert_allclose(
        consumers.selfrdb(tmp_path, "val", "T1", "T2")[0], of_split(expected(arrays["t1"]), "val"), atol=1e-7
    )
    assert "the planes of the scans differ" in layout.describe()["orientation"]
    with pytest.raises(ConfigError, match="is not paired in space"):
        Nifti(selection).check()


def test_slices_of_different_sizes_are_refused() -> None:
    arrays = {"t1": numbers(4, 2, 8, 6), "t2": numbers(4, 2, 8, 8)}
    with pytest.raises(ConfigError, match=r"different sizes \(t1 2 x 8 x 6, t2 2 x 8 x 8\)"):
        selection_of(arrays, SUBJECT_SPLITS, pairing="index")


def test_digits_are_exported_as_stored(tmp_path: Path) -> None:
    arrays = {name: numbers(4, 1, 32, 32, seed) for seed, name in enumerate(("sketch", "digit"))}
    selection = selection_of(arrays, SUBJECT_SPLITS, name="digits")
    SelfRDB(selection).write(tmp_path, no_progress)
    wanted = of_split(expected(arrays["digit"])[:, :, ::-1], "train")
    np.testing.assert_allclose(consumers.selfrdb(tmp_path, "train", "SKETCH", "DIGIT")[1], wanted, atol=1e-7)
    assert {subject.person for subject in selection.subjects} == {""}
    with pytest.raises(ConfigError, match="is not paired in space"):
        Nifti(selection).check()


@pytest.mark.parametrize("layout", [SynDiff, SelfRDB])
def test_images_above_256_pixels_are_refused(layout: type) -> None:
    selection = selection_of({name: np.zeros((1, 1, 10, 257), np.int16) for name in ("t1", "t2")}, ["train"])
    with pytest.raises(ConfigError, match="10 x 257 pixels; this format holds at most 256 x 256"):
        layout(selection).check()


def test_rows_say_where_each_slice_is(tmp_path: Path) -> None:
    selection: Selection = selection_of(pair(), SUBJECT_SPLITS, columns={"t2_offset": 7.0})
    rows = SynDiff(selection).write(tmp_path, no_progress)
    assert len(rows) == 16
    last = rows[-1]
    assert last == {
        "subject_id": "IXI003-Guys-03",
        "person": "IXI003",
        "array": "t2",
        "role": "target",
        "store_row": 3,
        "split": "train",
        "slice": 1,
        "slices": 1,
        "index": 3,
        "file": "data_train_T2.mat",
        "low": -10.0,
        "high": 90.0,
        "scale": 1.0,
        "offset": 7.0,
    }
