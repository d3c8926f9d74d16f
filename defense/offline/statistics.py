"""Paired comparisons: medians of ratios within rounds, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


def bootstrap_interval(values: Sequence[float], *, seed: int) -> tuple[float, float]:
    """Return the percentile bootstrap interval (95 %) of the median."""
    data = np.asarray(values, dtype=float)
    draws = np.random.default_rng(seed).integers(0, len(data), (RESAMPLES, len(data)))
    medians = np.median(data[draws], axis=1)
    low, high = np.quantile(medians, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def ratio_row(
    stock: Sequence[float], other: Sequence[float], control: Sequence[float], *, seed: int
) -> dict[str, Any]:
    """Compare per-round figures: medians, and the ratio to stock within every round.

    `control` is stock measured a second time: how far its ratio strays from 1 is the noise.
    """
    ratios = np.asarray(other, dtype=float) / np.asarray(stock, dtype=float)
    controls = np.asarray(control, dtype=float) / np.asarray(stock, dtype=float)
    return {
        "stock": float(np.median(stock)),
        "guarded": float(np.median(other)),
        "ratio": float(np.median(ratios)),
        "interval": bootstrap_interval(ratios.tolist(), seed=seed),
        "control": float(np.median(controls)),
        "control_interval": bootstrap_interval(controls.tolist(), seed=seed),
        "rounds": len(ratios),
    }
