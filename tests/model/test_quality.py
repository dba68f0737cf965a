"""The benchmark row of quality: what counts as reached, and that both sides train on the same pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import quality, reference
from benchmarks.measure import Measured, Settings
from ixi_etl.dataset.publish import PublishedVersion

SMALL = {"side": 32, "width": 4, "steps": 2}


def measured(psnr: float, seconds: float = 1.0) -> Measured:
    by_subject = [psnr - 3, psnr + 3]
    values = {mask: {"psnr": by_subject, "ssim": [x / 100 for x in by_subject]} for mask in quality.MASKS}
    scores = {quality.OFF: values, quality.ON: values}
    counts = {"trained_on": 16, "tested_on": 8, "peak_mb": 300.0}
    return Measured(seconds, 0.0, 0.0, 0.0, {"version": "folder", "scores": scores, **counts})


@pytest.mark.parametrize(
    ("ours", "theirs", "reached"),
    [
        ((20.0, 20.5), (20.0, 20.5), True),
        ((21.0, 21.0), (20.0, 20.0), True),
        ((20.0, 20.0), (20.3, 20.7), False),  # worse by 0.5, and the seeds differ by 0.4
        ((20.0, 20.0), (20.2, 20.8), True),
        ((19.7, 20.3), (20.5, 20.5), False),
        ((14.0, 20.0), (20.0, 20.2), False),  # our own noise does not help
    ],
)
def test_quality_is_reached_if_no_worse_than_the_seeds_of_the_peer_differ(
    ours: tuple[float, ...], theirs: tuple[float, ...], reached: bool
) -> None:
    row = quality.quality_row("q", "psnr", "head", [measured(p) for p in ours], [measured(p) for p in theirs])
    assert row.reached is reached
    assert row.ours == f"{sum(ours) / 2:.2f} dB"
    difference = (sum(ours) - sum(theirs)) / 2
    wins = 2 if difference > 0 else 0
    assert f"by subject {difference:+.2f} dB, ours is better for {wins} of 2;" in row.note


@pytest.mark.parametrize(("seconds", "reached"), [(0.4, True), (0.6, False)])
def test_ours_must_take_less_than_half_of_the_time(
    seconds: float, reached: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    cases: list[tuple[str, Any]] = []

    def alternate(_times: int, *given: tuple[str, dict[str, Any]]) -> list[list[Measured]]:
        cases.extend((case.rpartition(":")[2], arguments.get("seed")) for case, arguments in given)
        return [[measured(20.0, seconds if case.endswith(":ours") else 1.0)] for case, _ in given]

    monkeypatch.setattr(quality, "alternate", alternate)
    monkeypatch.setattr(quality.inputs, "different_heads", lambda *_: tmp_path)
    rows = quality.quality(Settings(quick=True, folder=str(tmp_path)))
    assert cases == [("prepare", None), *((case, seed) for seed in quality.SEEDS for case in ("ours", "theirs"))]
    *scores, training, memory = rows
    assert [row.reached for row in scores] == [True] * 4
    assert training.reached is reached
    assert memory.reached is None


def test_both_sides_train_on_the_same_pairs(every_split: PublishedVersion, monkeypatch: pytest.MonkeyPatch) -> None:
    from model import devices
    from model.trainer import Trainer

    monkeypatch.setattr(devices, "keep_freed_memory", lambda: None)  # it would apply to all later tests
    seen: dict[str, list[torch.Tensor]] = {"ours": [], "theirs": []}

    def recording(kind: type, name: str) -> None:
        step = kind.step
        monkeypatch.setattr(kind, "step", lambda self, *batch: (seen[name].extend(batch[:2]), step(self, *batch))[1])

    recording(Trainer, "ours")
    recording(reference.Trainer, "theirs")
    results = [case(str(every_split.folder), **SMALL, seed=1)() for case in (quality.ours, quality.theirs)]
    assert len(seen["ours"]) == 2 * SMALL["steps"]
    assert all(torch.equal(a, b) for a, b in zip(seen["ours"], seen["theirs"], strict=True))
    for result in results:
        values = [v for masks in result["scores"].values() for scores in masks.values() for v in scores.values()]
        assert len(values) == 2 * 2 * 2
        assert np.isfinite(values).all()
        assert result["seconds"] > 0


def test_reference_generates_an_image_by_its_own_statistics() -> None:
    torch.manual_seed(0)
    trainer = reference.Trainer(side=32, width=4, norm="batch")
    images, positions = torch.randn(2, 1, 32, 32), torch.arange(2)
    off, on = (quality._reference_predictor(trainer, dropout=dropout) for dropout in (False, True))
    together = off(images, positions)
    assert torch.equal(together[1:], off(images[1:], positions))
    assert not torch.equal(on(images, positions), on(images, positions))
    assert torch.equal(together, off(images, positions))
