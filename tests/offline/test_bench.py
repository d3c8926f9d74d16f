"""Comparisons within rounds: what the benchmark's figures mean."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from defense.cli.bench import compare_answers, render
from defense.offline.statistics import bootstrap_interval, ratio_row


def test_a_ratio_is_taken_within_rounds_so_that_a_slowing_machine_does_not_matter() -> None:
    stock = [1.0, 2.0, 4.0, 8.0, 16.0]

    row = ratio_row(stock, [1.1 * s for s in stock], [0.9 * s for s in stock], seed=0)

    assert row["ratio"] == pytest.approx(1.1)
    assert row["control"] == pytest.approx(0.9)
    assert row["interval"] == pytest.approx((1.1, 1.1))
    assert (row["stock"], row["rounds"]) == (4.0, 5)


def test_an_interval_holds_the_median_of_most_samples() -> None:
    draws = np.random.default_rng(0)
    hits = 0
    for seed in range(100):
        low, high = bootstrap_interval(draws.normal(1.0, 0.1, 30).tolist(), seed=seed)
        hits += low <= 1.0 <= high

    assert hits >= 88


def test_an_interval_is_reproducible_and_shrinks_with_more_rounds() -> None:
    values = np.random.default_rng(1).normal(1.0, 0.1, 200).tolist()
    few, many = bootstrap_interval(values[:10], seed=3), bootstrap_interval(values, seed=3)

    assert bootstrap_interval(values[:10], seed=3) == few
    assert many[1] - many[0] < few[1] - few[0]


def test_a_missed_budget_is_said_in_the_table() -> None:
    row = ratio_row([1.0, 1.0], [1.2, 1.2], [1.0, 1.0], seed=0)
    known = {"what": "HTTP: p99", "batch": 8, "unit": "ms", "budget": 1.05, "met": False}
    page = render(
        {
            "rows": [{**known, **row}],
            "answers": {"8": {"compared": 256, "identical": 255}},
            "rounds": 2,
            "seed": 0,
            "command": "pathguard bench --rounds 2",
            "date": "2026-01-01",
            "machine": {"processor": "x", "cores": 2, "threads": 2, "gpu": False},
            "versions": {"torch": "2"},
        }
    )

    assert "| HTTP: p99 | 8 | 1.0 ms | 1.2 ms | **1.200**" in page
    assert "| 1.05 | no |" in page
    assert "255 of 256 at batch 8" in page


def test_an_answer_counts_as_identical_if_the_unguarded_archive_gave_it_for_the_same_image() -> (
    None
):
    seen = {
        "stock": Counter({(0, b"a"): 3, (1, b"b"): 3}),
        "control": Counter({(1, b"b with other rounding"): 1}),
        "guarded": Counter({(0, b"a"): 2, (0, b"b"): 1, (1, b"b with other rounding"): 4}),
    }

    assert compare_answers(seen) == {"compared": 7, "identical": 6}
