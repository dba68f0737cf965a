"""Splits of single slices, and the range of values that a network sees."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ixi_etl.dataset.manifest import intensity_ranges, slices_in_split


def test_all_slices_of_a_subject_are_in_its_split() -> None:
    used = pd.DataFrame({"split": ["train", "test"]})
    assert slices_in_split(used, "test", 3).tolist() == [[False] * 3, [True] * 3]


def test_slices_of_one_subject_can_be_in_several_splits() -> None:
    used = pd.DataFrame({"split": ["mixed", "train"], "slice_splits": ["train,test,val", "train,train,train"]})
    assert slices_in_split(used, "train", 3).tolist() == [[True, False, False], [True] * 3]
    assert slices_in_split(used, "test", 3).tolist() == [[False, True, False], [False] * 3]
    assert slices_in_split(used[:0], "test", 3).shape == (0, 3)


def test_the_range_is_that_of_the_percentiles_unless_the_version_has_another() -> None:
    used = pd.DataFrame({"t1_p_low": [1.0, 2.0], "t1_p_high": [10.0, None]})
    np.testing.assert_array_equal(intensity_ranges(used, "t1"), [[1, 10], [2, np.nan]])
    other = used.assign(t1_low=[0.0, 0.0], t1_high=[20.0, 30.0])
    np.testing.assert_array_equal(intensity_ranges(other, "t1"), [[0, 20], [0, 30]])
