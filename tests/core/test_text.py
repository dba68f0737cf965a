"""Counts with their nouns."""

from __future__ import annotations

import pytest

from ixi_etl.core.text import quantity


@pytest.mark.parametrize(
    ("number", "shown"), [(0, "0 subjects"), (1, "1 subject"), (2, "2 subjects"), (49200, "49,200 subjects")]
)
def test_noun_of_one_is_singular(number: int, shown: str) -> None:
    assert quantity(number, "subject") == shown
