"""Numbers as they are written down for people."""

from __future__ import annotations

import pytest

from defense.figures import rounded


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0, 0.0), (1234567.0, 1235000.0), (-0.00123456, -0.001235), (1e-9, 1e-9)],
)
def test_numbers_are_written_to_four_significant_digits(value: float, expected: float) -> None:
    assert rounded(value) == pytest.approx(expected)
