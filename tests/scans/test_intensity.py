"""Percentiles and thresholds computed from histograms equal those of sorted values."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from profiles import examples

from ixi_etl.config import DatasetConfig
from ixi_etl.pairing.geometry import import_sitk
from ixi_etl.scans import intensity
from ixi_etl.scans.intensity import PERCENTILES, clip_spikes, describe_normalisation, otsu_threshold, percentiles


def test_otsu_separates_two_populations() -> None:
    rng = np.random.default_rng(0)
    image = np.concatenate([rng.normal(100, 10, 5000), rng.normal(900, 40, 3000)]).reshape(10, 20, 40).astype(np.int16)
    above = image.ravel() > otsu_threshold(image)
    assert above[:5000].mean() < 0.01
    assert above[5000:].all()


@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<f4", "<i4"])
def test_a_few_extreme_voxels_do_not_move_the_threshold(dtype: str) -> None:
    rng = np.random.default_rng(0)
    image = (rng.normal(100, 10, (16, 40, 40)) + 800 * (rng.random((16, 40, 40)) < 0.4)).astype(dtype)
    low, high = np.percentile(image, PERCENTILES)
    assert clip_spikes(image, low, high) is image
    for spike in (32767, -32768):
        with_spikes = image.copy()
        with_spikes[0, 0, :3] = spike
        clipped = clip_spikes(with_spikes, *np.percentile(with_spikes, PERCENTILES))
        assert (clipped.dtype.kind, clipped.shape) == (image.dtype.kind, image.shape)
        np.testing.assert_array_equal(clipped[1:], image[1:])
        assert abs(otsu_threshold(clipped) - otsu_threshold(image)) < 100
    assert clip_spikes(flat := np.array([[0] * 9 + [5]], dtype), 0, 0) is flat  # no range to clip to


@given(st.integers(0, 2**32 - 1), st.floats(0.2, 0.8), st.floats(150, 2000))
def test_otsu_separates_as_well_as_simpleitk(seed: int, share: float, distance: float) -> None:
    rng = np.random.default_rng(seed)
    image = (rng.normal(100, 30, 4000) + distance * (rng.random(4000) < share)).astype(np.int16).reshape(10, 20, 20)
    sitk = import_sitk()
    library = sitk.OtsuThresholdImageFilter()
    library.SetNumberOfHistogramBins(256)
    library.Execute(sitk.GetImageFromArray(image))
    ours, theirs = (_between_class_variance(image, t) for t in (otsu_threshold(image), library.GetThreshold()))
    assert ours >= 0.995 * theirs  # the maximum may be flat over several bins


def _between_class_variance(image: NDArray[np.int16], threshold: float) -> float:
    """The variance between the classes above and below the threshold, which Otsu's threshold maximises."""
    above = image > threshold
    share = above.mean()
    return float(share * (1 - share) * (image[above].mean() - image[~above].mean()) ** 2)


@settings(max_examples=examples(30))
@given(st.sampled_from(["i1", "u1", "<i2", "<u2", ">i2"]), st.integers(0, 2**32 - 1), st.sampled_from([0.5, 30, 5000]))
def test_histogram_by_counting_equals_numpy(dtype: str, seed: int, spread: float) -> None:
    rng, limits = np.random.default_rng(seed), np.iinfo(dtype)
    centre = rng.uniform(limits.min, limits.max)
    values = np.clip(rng.normal(centre, spread, (256, 300)).round(), limits.min, limits.max).astype(dtype)
    counts, edges = intensity._histogram(values)
    expected, expected_edges = np.histogram(values, 256)
    np.testing.assert_array_equal(counts, expected)
    np.testing.assert_array_equal(edges, expected_edges)


@settings(max_examples=examples(30))
@given(st.sampled_from(["i1", "u1", "<i2", "<u2", ">i2"]), st.integers(0, 2**32 - 1), st.sampled_from([0.5, 30, 5000]))
def test_percentiles_by_counting_equal_numpy(dtype: str, seed: int, spread: float) -> None:
    rng, limits = np.random.default_rng(seed), np.iinfo(dtype)
    centre = rng.uniform(limits.min, limits.max)
    values = np.clip(rng.normal(centre, spread, (2, 1, 256, 300)).round(), limits.min, limits.max).astype(dtype)
    np.testing.assert_array_equal(
        percentiles(values), np.percentile(values.astype("f8"), PERCENTILES, axis=(1, 2, 3)).T
    )


def test_every_normalisation_is_described_in_its_own_words() -> None:
    kinds = get_args(DatasetConfig.model_fields["normalisation"].annotation)
    assert len({describe_normalisation(kind) for kind in kinds}) == len(kinds) == 3
