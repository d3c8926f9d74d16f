"""Numbers as they are written down for people."""

from __future__ import annotations

import math

DIGITS = 4
"""Significant digits."""


def rounded(value: float) -> float:
    """Return `value` to four significant digits, for people to read."""
    if value == 0 or not math.isfinite(value):
        return value
    return round(value, DIGITS - 1 - math.floor(math.log10(abs(value))))
