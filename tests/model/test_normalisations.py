"""Training and synthesis normalise as the version says: by percentiles, by the range, or by the mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from altered import alter_version
from conftest import SMALL_NETWORKS
from heads import head, identity, t1

from ixi_etl.dataset import manifest, metadata
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.dataset.store import open_arrays
from ixi_etl.errors import CheckpointError, SynthesisError
from ixi_etl.testing.phantom import grid_affine
from model import checkpoint, data, planes
from model.config import TrainConfig
from model.export import export
from model.generator import GENERATOR_FILE
from model.jobs import prepare_run, train_run
from model.planes import PlaneSummary
from model.synthesize import load_trained, synthesize_volume

Ranges = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def by_range(slabs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return slabs.min((1, 2, 3)), slabs.max((1, 2, 3))


def by_mean(slabs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    means = slabs.mean((1, 2, 3))
    return np.zeros(len(slabs)), means * (slabs.max((1, 2, 3)) / means).max()


NORMALISED: dict[str, Ranges] = {"range": by_range, "mean": by_mean}


def slabs_of(folder: Path, name: str) -> np.ndarray:
    return np.asarray(open_arrays(folder)[name]).astype(np.float64)


def with_ranges(folder: Path, ranges: Ranges) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """Add the columns of the ranges to a manifest."""

    def change(table: pd.DataFrame) -> pd.DataFrame:
        rows = manifest.used_rows(table).index
        ends = {f"{name}_{end}": values for name in ("t1", "t2") for end, values in
                zip(("low", "high"), ranges(slabs_of(folder, name)), strict=True)}  # fmt: skip
        return table.assign(**{k: pd.Series(v, rows).reindex(table.index).astype("Float64") for k, v in ends.items()})

    return change


@pytest.fixture(scope="module", params=NORMALISED)
def version(request: pytest.FixtureRequest, published: PublishedVersion, tmp_path_factory: Any) -> tuple[str, Path]:
    kind, root = str(request.param), tmp_path_factory.mktemp(request.param)
    change = with_ranges(published.folder, NORMALISED[kind])
    return kind, alter_version(published.folder, root, change, normalisation=kind)


def test_loaded_slices_are_mapped_by_the_range_of_the_version(version: tuple[str, Path]) -> None:
    kind, folder = version
    pairs = data.load_pairs(folder, "train")
    used = manifest.used_rows(metadata.read_manifest(folder)).set_index("subject_id")
    rows = used.loc[list(pairs.subjects), "store_row"].to_numpy(int)
    for name, images in zip(("t1", "t2"), pairs.normalised(torch.arange(len(pairs))), strict=True):
        slabs = slabs_of(folder, name)
        low, high = (ends[rows, None, None, None] for ends in NORMALISED[kind](slabs))
        wanted = np.clip((slabs[rows] - low) / (high - low), 0, 1) * 2 - 1
        np.testing.assert_allclose(images.numpy(), wanted.reshape(images.shape), atol=1e-5)


def test_a_generator_prepares_new_volumes_as_its_version_did(version: tuple[str, Path], tmp_path: Path) -> None:
    kind, folder = version
    run = prepare_run(folder.parents[2], TrainConfig(**{**SMALL_NETWORKS, "steps": 1, "samples": 0}), "a")
    trained = load_trained(train_run(run))
    assert trained.normalisation == kind
    pairs = data.load_pairs(folder, "train")
    used = manifest.used_rows(metadata.read_manifest(folder)).set_index("subject_id").loc[list(pairs.subjects)]
    for end, value in zip(("low", "high"), trained.planes.target_low_high, strict=True):
        assert value == pytest.approx(used[f"t2_{end}"].median(), abs=0.01)
    slabs, row = slabs_of(folder, "t1"), int(used["store_row"].iloc[0])
    affine = np.asarray(open_arrays(folder)["t1_affine"])[row]
    made = synthesize_volume(trained, t1(slabs[row].astype(np.float32), affine))
    assert made.source_low_high["t1"] == pytest.approx([ends[row] for ends in NORMALISED[kind](slabs)], rel=1e-4)
    assert not any("histogram" in warning or "looks" in warning for warning in made.warnings)
    path, _ = export(run.generator, "safetensors", tmp_path)
    (described,) = json.loads((path.parent / "config.json").read_text())["inputs"]
    wanted = {"range": "the least and the largest value of", "mean": "0 and the mean of"}[kind]
    assert described["normalisation"].startswith(wanted)
    assert described["normalisation"].endswith(" become -1 and 1; clipped")


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("percentiles", lambda slab: np.percentile(slab, (0.1, 99.9))),
        ("range", lambda slab: (slab.min(), slab.max())),
        ("mean", lambda slab: (0, 2.5 * slab.mean())),
    ],
)
def test_a_volume_is_normalised_by_its_own_slab(kind: str, wanted: Callable[[np.ndarray], Any]) -> None:
    affine = grid_affine((24, 24, 20), (2.0, 2.0, 2.0), "RAS")
    values = head((24, 24, 20), affine) + 30
    summary = identity().planes
    (source,) = summary.sources
    summary = summary.model_copy(update={"sources": (source.model_copy(update={"largest_ratio": 2.5}),)})
    trained = replace(identity(), normalisation=kind, planes=summary)
    slab = planes.trained_slab(summary, 20, 2.0)
    made = synthesize_volume(trained, t1(values, affine))
    assert made.source_low_high["t1"] == pytest.approx(wanted(values[slab].astype(np.float64)), rel=1e-5)
    low, high = made.source_low_high["t1"]  # the identity in the target's range of 0 to 1
    np.testing.assert_allclose(made.values[slab], ((values[slab] - low) / (high - low)).clip(0, 1), atol=1e-4)


def test_the_ratio_is_one_of_scanner_units(published: PublishedVersion, tmp_path: Path) -> None:
    """Where 0 in the scanner's units is stored as another value, low is that value."""
    zero, ratio = -700.0, 3.25

    def shifted(slabs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.full(len(slabs), zero), zero + ratio * (slabs.mean((1, 2, 3)) - zero)

    folder = alter_version(published.folder, tmp_path, with_ranges(published.folder, shifted), normalisation="mean")
    summary = planes.summarise(folder, data.load_pairs(folder, "train"))
    assert summary is not None
    assert summary.sources[0].largest_ratio == pytest.approx(ratio)


def test_a_mean_below_zero_is_one_line() -> None:
    summary = identity().planes
    sources = tuple(source.model_copy(update={"largest_ratio": 2.5}) for source in summary.sources)
    trained = replace(identity(), normalisation="mean", planes=summary.model_copy(update={"sources": sources}))
    affine = grid_affine((24, 24, 20), (2.0, 2.0, 2.0), "RAS")
    with pytest.raises(SynthesisError, match="its middle 14 mm have a mean below 0, and are divided by it"):
        synthesize_volume(trained, t1(head((24, 24, 20), affine) - 2000, affine))


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        ({"normalisation": "mean"}, "a source has no largest_ratio for its mean"),
        ({"normalisation": "median"}, "Input should be 'percentiles', 'range' or 'mean'"),
        ({"slice_shape": [32, 1 << 20]}, "less than or equal to 4096"),
    ],
)
def test_a_generator_with_a_normalisation_that_cannot_be_used_is_refused(
    recorded: dict[str, Any], message: str, trained: Path, tmp_path: Path
) -> None:
    tensors, described = checkpoint.load(trained / "runs" / "a" / GENERATOR_FILE)
    checkpoint.save(tmp_path / "g.safetensors", tensors, described | recorded)
    with pytest.raises(CheckpointError, match=message) as error:
        load_trained(tmp_path / "g.safetensors")
    assert "\n" not in str(error.value)


def test_a_file_of_an_older_version_was_normalised_by_percentiles(trained: Path, tmp_path: Path) -> None:
    tensors, described = checkpoint.load(trained / "runs" / "a" / GENERATOR_FILE)
    for source in described["planes"]["sources"]:
        assert source.pop("largest_ratio") is None
    older = {k: v for k, v in described.items() if k not in ("normalisation", "slice_shape")}
    checkpoint.save(tmp_path / "g.safetensors", tensors, older)
    loaded = load_trained(tmp_path / "g.safetensors")
    assert loaded.normalisation == "percentiles"
    assert isinstance(loaded.planes, PlaneSummary)
