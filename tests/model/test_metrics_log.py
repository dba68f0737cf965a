"""The logs of a training; a damaged file is replaced."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from conftest import TRAINED

from model.config import TrainConfig
from model.metrics_log import MetricsLog
from model.trainer import LOSSES, Trainer


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return Trainer(TrainConfig.model_validate(TRAINED), torch.device("cpu"))


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ["metrics.csv", "validation.csv"])
@pytest.mark.parametrize("damaged", [b"", b"step,lo", b"step,mae\n\0\0\0\n", b"\xff\xfe\n1,2\n"])
def test_a_log_damaged_by_a_full_disk_is_replaced(
    name: str, damaged: bytes, trainer: Trainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / name).write_bytes(damaged)
    metrics_log = MetricsLog(tmp_path, trainer.config, trainer, start=6, images_per_step=2)
    assert f"{tmp_path / name} is damaged and is replaced by a new file" in caplog.text
    assert not (tmp_path / name).exists()
    metrics_log.record(torch.ones(len(LOSSES)))
    metrics_log.log_metrics(7)
    metrics_log.log_validation(7, {"mae": 0.5, "psnr": 1.0, "ssim": 0.5})
    metrics_log.close()
    assert [row["step"] for row in read_rows(tmp_path / name)] == ["7"]
