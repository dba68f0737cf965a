"""The comparison of neighbours (`benchmarks.neighbours`): its folds, and what the summary says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import SMALL_NETWORKS

from benchmarks import neighbours
from benchmarks.neighbours import BASE, Training
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.errors import ConfigError
from model.config import TrainConfig
from model.data import load_pairs

OTHER = "neighbours 2, nearest"


def scores_of(method: str, seed: int, psnr: dict[str, float]) -> pd.DataFrame:
    rows = [{"subject_id": s, "method": method, "mask": "head", "psnr": value} for s, value in psnr.items()]
    return pd.DataFrame(rows).assign(seed=seed, ssim=0.5, mae=0.1, ms_per_step=10.0 * (1 + seed))


def test_differences_are_paired_by_person_and_shown_by_seed() -> None:
    base = {"a-x-1": 20.0, "a-x-2": 22.0, "b-x-1": 15.0}  # two sessions of one person
    scores = pd.concat(
        [
            scores_of(BASE, 0, base),
            scores_of(BASE, 1, base),
            scores_of(OTHER, 0, {s: value + 1 for s, value in base.items()}),
            scores_of(OTHER, 1, {"a-x-1": 21.0, "a-x-2": 27.0, "b-x-1": 16.0}),
        ]
    )
    table = neighbours.summarise_variants(scores)
    row = table.loc[("head", OTHER)]
    assert row["people"] == 2
    assert table.loc[("head", BASE), "psnr_mean"] == 18.0
    assert row["psnr_mean"] == pytest.approx((23.0 + 16.0) / 2)
    assert row["psnr_better_by"] == pytest.approx(1.5)
    assert row["psnr_seeds"] == "1.0 2.0"
    half = 12.706 * np.std([2.0, 1.0], ddof=1) / np.sqrt(2)  # Student's t with one degree of freedom
    assert row["psnr_high_95"] - row["psnr_better_by"] == pytest.approx(half, rel=1e-4)
    assert row["ms_per_step"] == 15.0
    assert np.isnan(table.loc[("head", BASE), "psnr_better_by"])


def test_variants_are_trained_on_the_same_targets_and_results_are_kept(
    every_split: PublishedVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(**{**SMALL_NETWORKS, "steps": 2, "augment": "flip"})
    chosen = neighbours.trainings(every_split.folder, config, by_person=False, neighbours=(0, 1))
    assert len(chosen) == 2 * 2 * 2
    assert len({training.name for training in chosen}) == len(chosen)
    seen: list[object] = []
    draw = neighbours.draw_batch
    monkeypatch.setattr(neighbours, "draw_batch", lambda *a: seen.append(draw(*a)) or seen[-1])
    monkeypatch.setattr(neighbours, "draw_samples", lambda *_: [])
    pair = [chosen[0], chosen[2]]
    assert [t.variant for t in pair] == ["neighbours 0, transpose", "neighbours 1, transpose"]
    scores = neighbours.run_all(pair, every_split.folder, tmp_path, workers=1)
    plain, wider = seen[:2], seen[2:]
    for (source, target), (sources, same_target) in zip(plain, wider, strict=True):  # type: ignore[misc]
        assert sources.shape[1] == 3
        assert (sources[:, 1:2] == source).all()
        assert (same_target == target).all()
    subjects = load_pairs(every_split.folder, "test").subjects
    assert set(scores["subject_id"]) == set(subjects)
    assert scores.groupby("method").size().to_dict() == dict.fromkeys(
        (
            "neighbours 0, transpose",
            "neighbours 1, transpose",
            "source as it is",
            "mean training target",
            "intensity mapping",
        ),
        2 * len(subjects),
    )
    again = neighbours.run_all(pair, every_split.folder, tmp_path, workers=1)
    assert len(seen) == 4  # nothing was trained again
    pd.testing.assert_frame_equal(scores, again)


def test_each_person_is_left_out_once(every_split: PublishedVersion) -> None:
    chosen = neighbours.trainings(every_split.folder, TrainConfig(**SMALL_NETWORKS), by_person=True, neighbours=(0,))
    people = [training.person for training in chosen]
    assert {people.count(person) for person in people} == {4}  # two seeds, two kinds of upsampling
    train, test = chosen[0].load(every_split.folder)
    assert {subject.split("-")[0] for subject in test.subjects} == {people[0]}
    assert people[0] not in {subject.split("-")[0] for subject in train.subjects}


def test_a_single_person_is_refused(every_split: PublishedVersion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "people_of", lambda _: ["a"])
    with pytest.raises(ConfigError, match="two or more people"):
        neighbours.trainings(every_split.folder, TrainConfig(**SMALL_NETWORKS), by_person=True, neighbours=(0,))


def test_the_first_training_measures_the_baselines() -> None:
    config = TrainConfig(**SMALL_NETWORKS)
    assert Training(config, None).is_first
    assert not Training(config.model_copy(update={"seed": 1}), None).is_first
    assert not Training(config.model_copy(update={"upsampling": "nearest"}), None).is_first
