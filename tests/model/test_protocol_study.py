"""The protocol study (`make protocols`): its data, its scores and its tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import protocols
from benchmarks.protocol_data import BY_FILE, BY_SUBJECT, Dataset, direction_of, displace, make_dataset
from benchmarks.protocol_study import HEAD, OWN_TEST, SAME_SLICES, SEEDS, WHOLE, Budget, centre_crop, score_regions
from model.data import Pairs
from model.evaluate import GENERATED, measure

TINY = Budget(subjects=4, slices=6, shrink=8, side=32, width=2, steps=1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("study"), TINY.subjects, TINY.slices, TINY.shrink, workers=2)


@pytest.mark.stack  # simulating and cutting takes seconds
class TestData:
    def test_splits_are_of_equal_size_and_only_one_shares_subjects(self, dataset: Dataset) -> None:
        half = TINY.subjects * TINY.slices // 2
        for split_by in (BY_SUBJECT, BY_FILE):
            assert [len(pairs) for pairs in dataset.load(split_by)] == [half, half]
        train, test = dataset.load(BY_SUBJECT)
        assert not set(train.subjects) & set(test.subjects)
        leaky, _ = dataset.load(BY_FILE)
        assert set(leaky.subjects) & set(test.subjects)

    def test_same_slices_are_in_both_test_splits(self, dataset: Dataset) -> None:
        def slices(pairs: Pairs) -> set[tuple[int, int]]:
            numbers = [int(subject[3:6]) for subject in pairs.subjects]
            return {(numbers[s], p) for s, p in zip(pairs.subject.tolist(), pairs.position.tolist(), strict=True)}

        both = [slices(dataset.load(split_by)[1]) for split_by in (BY_SUBJECT, BY_FILE)]
        assert slices(dataset.load_same_slices()) == both[0] & both[1] != set()

    def test_without_an_error_the_sources_are_those_of_the_version(self, dataset: Dataset) -> None:
        version = dataset.versions[BY_SUBJECT]
        pairs, _ = dataset.load(BY_SUBJECT)
        again = displace(pairs, version, dataset.archives, 0)
        assert torch.equal(again.sources[0].stored, pairs.sources[0].stored)
        assert torch.equal(again.sources[0].low_high, pairs.sources[0].low_high)

    def test_larger_errors_change_the_sources_more_and_the_targets_never(self, dataset: Dataset) -> None:
        exact, _ = dataset.load(BY_SUBJECT)
        changes = []
        for error_mm in (1, 4, 16):
            displaced, _ = dataset.load(BY_SUBJECT, error_mm)
            assert displaced.target is not exact.target
            assert torch.equal(displaced.target.stored, exact.target.stored)
            changes.append(float((displaced.sources[0].stored - exact.sources[0].stored).float().abs().mean()))
        assert 0 < changes[0] < changes[1] < changes[2]

    def test_whole_and_head_are_measured_as_by_our_protocol(self, dataset: Dataset) -> None:
        _, test = dataset.load(BY_SUBJECT)
        own = score_regions(test, lambda source, _: source).set_index(["region", "subject_id"])
        official = measure(test, {GENERATED: lambda source, _: source}, protocols=("ours",))
        for _, row in official.iterrows():
            for name in ("psnr", "ssim"):
                assert own.loc[(row["mask"], row["subject_id"]), name] == pytest.approx(row[name], abs=1e-6)

    def test_whole_study_writes_its_files(self, tmp_path: Path) -> None:
        tables = protocols.run(tmp_path, TINY, workers=1)
        record = json.loads((tmp_path / "protocols.json").read_text())
        assert record["simulated"] is True
        assert set(tables) == set(protocols.TITLES)
        page = (tmp_path / "protocols.md").read_text()
        assert all(title in page for title in protocols.TITLES.values())
        assert (tmp_path / "protocols.png").read_bytes()[:4] == b"\x89PNG"
        assert (tmp_path / "protocols.svg").read_text().startswith("<?xml")
        doses = tables["registration"].set_index(["region", "error_mm"])
        assert list(doses.loc[WHOLE].index) == [0, 0.5, 1, 2, 4]
        assert set(tables["metric"]["protocol"]) == {"ours", "syndiff", "selfrdb", "moschetto"}
        for table in tables.values():
            assert np.isfinite(table["psnr" if "psnr" in table else "psnr_gain"].dropna()).all()


def test_direction_is_a_unit_vector_of_the_subject() -> None:
    assert np.linalg.norm(direction_of("IXI002-Guys-0774")) == pytest.approx(1)
    assert (direction_of("IXI002-Guys-0774") == direction_of("IXI002-Guys-0774")).all()
    assert not (direction_of("IXI002-Guys-0774") == direction_of("IXI003-Guys-0811")).any()


def test_crops_are_centred() -> None:
    mask = centre_crop((256, 256), 1, 152 / 256)
    assert mask.sum() == 256 * 152
    assert mask[:, 52:204].all()
    assert centre_crop((8, 8), 0.5, 0.5).nonzero().tolist() == [[y, x] for y in range(2, 6) for x in range(2, 6)]


def regions(values: dict[tuple[str, str, float, str], tuple[float, float]]) -> pd.DataFrame:
    """A row per subject and seed, from (split_by, test_on, error_mm, region) and the PSNR with each seed."""
    rows = []
    for (split_by, test_on, error_mm, region), by_seed in values.items():
        for seed, psnr in zip(SEEDS, by_seed, strict=True):
            for subject, offset in (("a", -1.0), ("b", 1.0)):
                row = {"subject_id": subject, "psnr": psnr + offset, "ssim": psnr / 100, "share": 0.5, "seed": seed}
                row |= {"split_by": split_by, "test_on": test_on, "error_mm": error_mm, "region": region}
                rows.append(row)
    return pd.DataFrame(rows)


def test_gain_of_the_split_is_by_seed() -> None:
    values = {
        (split_by, test_on, 0.0, region): psnr
        for test_on in (OWN_TEST, SAME_SLICES)
        for region in (WHOLE, HEAD)
        for split_by, psnr in ((BY_SUBJECT, (20.0, 21.0)), (BY_FILE, (23.0, 22.0)))
    }
    row = protocols.split_table(regions(values)).iloc[0]
    assert (row["psnr_by_subject"], row["psnr_by_file"], row["psnr_gain"]) == (20.5, 22.5, 2.0)
    assert (row["psnr_gain_seed_0"], row["psnr_gain_seed_1"]) == (3.0, 1.0)


def test_changes_are_from_no_error_and_from_the_whole_slice() -> None:
    plain = {
        (BY_SUBJECT, OWN_TEST, error_mm, region): psnr
        for region, whole in ((WHOLE, 30.0), (HEAD, 20.0))
        for error_mm, psnr in ((0.0, (whole, whole + 1)), (4.0, (whole - 5, whole - 5)))
    }
    other = {(BY_FILE, OWN_TEST, 0.0, WHOLE): (99.0, 99.0), (BY_SUBJECT, SAME_SLICES, 0.0, WHOLE): (99.0, 99.0)}
    doses = protocols.registration_table(regions(plain | other)).set_index(["region", "error_mm"])
    assert doses["psnr_change"].to_dict() == {(WHOLE, 0): 0, (WHOLE, 4): -5.5, (HEAD, 0): 0, (HEAD, 4): -5.5}
    assert doses.loc[(WHOLE, 0), "psnr_spread"] == 1
    by_region = protocols.region_table(regions(plain | other)).set_index("region")
    assert by_region["psnr_change"].to_dict() == {WHOLE: 0, HEAD: -10}


def test_numbers_are_rounded_and_changes_signed() -> None:
    table = pd.DataFrame({"region": ["head"], "psnr": [20.126], "ssim": [0.98765], "psnr_change": [0.5]})
    assert protocols.markdown(table).splitlines()[-1] == "| head | 20.13 | 0.988 | +0.50 |"
