"""The protocol study (`make protocols`): its data, its scores and its tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import protocols
from benchmarks.protocol_data import (
    BY_FILE,
    BY_SUBJECT,
    OTHERS,
    OWN_TEST,
    SAME_SLICES,
    SPLITS,
    Dataset,
    direction_of,
    displace,
    make_dataset,
)
from benchmarks.protocol_study import HEAD, SEEDS, WHOLE, Budget, centre_crop, score_regions
from model.data import Pairs
from model.evaluate import GENERATED, measure

TINY = Budget(subjects=2, slices=6, shrink=8, side=32, width=2, steps=1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("study"), TINY.subjects, TINY.slices, TINY.shrink, workers=2)


@pytest.mark.stack  # simulating and cutting takes seconds
class TestData:
    def test_training_sets_are_of_equal_size_and_only_that_by_file_has_test_subjects(self, dataset: Dataset) -> None:
        tested = set(dataset.test_sets(BY_SUBJECT)[OWN_TEST].subjects)
        assert len(tested) == TINY.subjects
        trained = {split: dataset.training_set(split) for split in SPLITS}
        assert len({len(pairs) for pairs in trained.values()}) == 1
        assert len(trained[BY_SUBJECT]) > TINY.subjects * TINY.slices / 2
        assert len(set(trained[BY_SUBJECT].subjects)) == TINY.subjects
        for split in (BY_FILE, OTHERS):
            assert set(trained[BY_SUBJECT].subjects) <= set(trained[split].subjects)
            assert len(set(trained[split].subjects)) == 2 * TINY.subjects
        assert tested <= set(trained[BY_FILE].subjects)
        assert not tested & {*trained[BY_SUBJECT].subjects, *trained[OTHERS].subjects}

    def test_no_set_trains_on_the_slices_that_all_are_tested_on(self, dataset: Dataset) -> None:
        def slices(pairs: Pairs) -> set[tuple[str, int]]:
            names = pairs.subjects
            return {(names[s], p) for s, p in zip(pairs.subject.tolist(), pairs.position.tolist(), strict=True)}

        sets = [dataset.test_sets(split) for split in SPLITS]
        assert [set(by_name) for by_name in sets] == [{OWN_TEST, SAME_SLICES}, {SAME_SLICES}, {OWN_TEST, SAME_SLICES}]
        (same,) = {frozenset(slices(by_name[SAME_SLICES])) for by_name in sets}
        assert same
        assert all(same <= slices(by_name[OWN_TEST]) for by_name in sets if OWN_TEST in by_name)
        assert not any(same & slices(dataset.training_set(split)) for split in SPLITS)
        assert set(dataset.test_sets(BY_SUBJECT, 1.0)) == {OWN_TEST}

    def test_without_an_error_the_sources_are_those_of_the_version(self, dataset: Dataset) -> None:
        pairs = dataset.training_set(BY_SUBJECT)
        again = displace(pairs, dataset.by_subject, dataset.archives, 0)
        assert torch.equal(again.sources[0].stored, pairs.sources[0].stored)
        assert torch.equal(again.sources[0].low_high, pairs.sources[0].low_high)

    def test_larger_errors_change_the_sources_more_and_the_targets_never(self, dataset: Dataset) -> None:
        exact = dataset.training_set(BY_SUBJECT)
        changes = []
        for error_mm in (1, 4, 16):
            displaced = dataset.training_set(BY_SUBJECT, error_mm)
            assert displaced.target is not exact.target
            assert torch.equal(displaced.target.stored, exact.target.stored)
            changes.append(float((displaced.sources[0].stored - exact.sources[0].stored).float().abs().mean()))
        assert 0 < changes[0] < changes[1] < changes[2]

    def test_whole_and_head_are_measured_as_by_our_protocol(self, dataset: Dataset) -> None:
        test = dataset.test_sets(BY_SUBJECT)[OWN_TEST]
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
            assert np.isfinite(table["psnr"].dropna()).all()


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
    """A row per subject and seed, from (split, test_on, error_mm, region) and the PSNR with each seed."""
    rows = []
    for (split, test_on, error_mm, region), by_seed in values.items():
        for seed, psnr in zip(SEEDS, by_seed, strict=True):
            for subject, offset in (("a", -1.0), ("b", 1.0)):
                row = {"subject_id": subject, "psnr": psnr + offset, "ssim": psnr / 100, "share": 0.5, "seed": seed}
                rows.append(row | {"split": split, "test_on": test_on, "error_mm": error_mm, "region": region})
    return pd.DataFrame(rows)


def test_training_sets_are_compared_on_the_same_slices() -> None:
    psnr = {BY_FILE: (23.0, 22.0), BY_SUBJECT: (20.0, 21.0), OTHERS: (22.0, 22.0)}
    values = {(split, SAME_SLICES, 0.0, region): psnr[split] for region in (HEAD, WHOLE) for split in psnr}
    values |= {(split, OWN_TEST, 0.0, WHOLE): (30.0, 31.0) for split in (BY_SUBJECT, BY_FILE)}
    values |= {(BY_SUBJECT, SAME_SLICES, 4.0, WHOLE): (1.0, 1.0)}  # of another part
    table = protocols.split_table(regions(values))
    assert list(zip(table["region"], table["split"], strict=True)) == [(r, s) for r in (WHOLE, HEAD) for s in SPLITS]
    whole = table[table["region"] == WHOLE].set_index("split")
    assert whole["psnr"].to_dict() == {BY_SUBJECT: 20.5, OTHERS: 22.0, BY_FILE: 22.5}
    assert whole["psnr_change"].to_dict() == {BY_SUBJECT: 0, OTHERS: 1.5, BY_FILE: 2.0}
    assert whole["psnr_spread"].to_dict() == {BY_SUBJECT: 1, OTHERS: 0, BY_FILE: 1}
    assert whole["psnr_own_test"].dropna().to_dict() == {BY_SUBJECT: 30.5, BY_FILE: 30.5}


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
    table = pd.DataFrame({"region": ["head"], "psnr": [20.126], "ssim": [np.nan], "psnr_change": [0.5]})
    assert protocols.markdown(table).splitlines()[-1] == "| head | 20.13 | - | +0.50 |"
