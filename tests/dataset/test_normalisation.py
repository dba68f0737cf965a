"""The stored values that become 0 and 1, with another normalisation than percentiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ixi_etl.config import DatasetConfig
from ixi_etl.dataset.normalisation import add_mean_ranges, mean_ranges, measure_slab, record_slab
from ixi_etl.errors import BadVolumeError

SLABS = arrays(np.int16, (2, 3, 4))
SCALES = st.floats(0.01, 100)


@given(SLABS, SCALES, st.floats(-1000, 1000))
def test_a_slab_is_measured_in_stored_values_and_in_scanner_units(slab: Any, scale: float, offset: float) -> None:
    low, high, mean, largest = measure_slab(slab, scale, offset)
    assert (low, high) == (slab.min(), slab.max())
    units = slab * scale + offset
    assert mean == pytest.approx(units.mean(), rel=1e-9, abs=1e-6 * scale)
    assert largest == pytest.approx(units.max(), rel=1e-12, abs=1e-9)


@given(st.lists(st.tuples(arrays(np.int16, (1, 2, 2), elements=st.integers(0, 999)), SCALES), min_size=1, max_size=5))
def test_a_mean_range_divides_by_the_mean_then_by_the_maximum_over_all(given: list[tuple[Any, float]]) -> None:
    slabs = [(slab, scale, -3.0) for slab, scale in given if (slab * scale - 3.0).mean() > 0]
    if not slabs:
        return
    measured = np.array([measure_slab(*slab) for slab in slabs])
    ranges = mean_ranges(measured[:, 2], measured[:, 3], *np.array([slab[1:] for slab in slabs]).T)
    divided = [(slab * scale + offset) / (slab * scale + offset).mean() for slab, scale, offset in slabs]
    most = max(image.max() for image in divided)
    for (slab, _, _), image, (low, high) in zip(slabs, divided, ranges, strict=True):
        np.testing.assert_allclose((slab - low) / (high - low), image / most, atol=1e-9)


def test_subjects_without_a_modality_have_no_range_of_it() -> None:
    rows: list[dict[str, Any]] = [{"subject_id": "a"}, {"subject_id": "b"}]
    t1 = {"t1_mean": 2.0, "t1_max": 8.0, "t1_scale": 1.0, "t1_offset": 0.0}
    pd = {"pd_mean": 5.0, "pd_max": 5.0, "pd_scale": 0.5, "pd_offset": -1.0}
    add_mean_ranges(rows, {"a": t1 | pd, "b": t1 | {"t1_mean": 4.0}}, ("t1", "pd"))
    assert rows == [
        {"subject_id": "a", "t1_low": 0, "t1_high": 8, "pd_low": 2, "pd_high": 12},
        {"subject_id": "b", "t1_low": 0, "t1_high": 16},
    ]


def test_only_what_a_normalisation_needs_is_recorded() -> None:
    slab = np.array([[[1, 2], [3, 6]]], np.int16)
    for normalisation, expected in (
        ("percentiles", {}),
        ("range", {"t1_low": 1, "t1_high": 6}),
        ("mean", {"t1_mean": 7, "t1_max": 13}),
    ):
        assert record_slab("T1", slab, 2.0, 1.0, DatasetConfig(normalisation=normalisation)) == expected


@pytest.mark.parametrize("offset", [-3.0, -4.0])
def test_a_slab_whose_mean_is_not_above_zero_is_excluded_with_a_reason(offset: float) -> None:
    slab = np.array([[[1, 2], [3, 6]]], np.int16)
    with pytest.raises(BadVolumeError) as error:
        record_slab("T2", slab, 1.0, offset, DatasetConfig(normalisation="mean"))
    assert error.value.reason == "mean_not_positive"
    assert error.value.detail == f"T2: the mean of the slab is {3 + offset:g}; it must be above 0"
