"""Scans as the registration compares them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from ixi_etl.pairing import geometry, heads


@given(arrays(bool, array_shapes(min_dims=3, max_dims=3, max_side=7), elements=st.booleans(), fill=st.just(True)))
def test_opening_is_that_of_itk(mask: np.ndarray) -> None:
    sitk = geometry.import_sitk()
    wanted = sitk.BinaryMorphologicalOpening(sitk.GetImageFromArray(mask.astype(np.uint8)), [1, 1, 1])
    np.testing.assert_array_equal(heads.opened(mask), sitk.GetArrayFromImage(wanted).astype(bool))


@given(arrays(bool, array_shapes(min_dims=3, max_dims=3, max_side=7), elements=st.booleans(), fill=st.just(True)))
def test_filling_is_that_of_itk(mask: np.ndarray) -> None:
    sitk = geometry.import_sitk()
    wanted = sitk.BinaryFillhole(sitk.GetImageFromArray(mask.astype(np.uint8)))
    np.testing.assert_array_equal(heads.filled(mask), sitk.GetArrayFromImage(wanted).astype(bool))
