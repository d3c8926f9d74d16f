"""Every figure against scikit-learn, a closed form or a count by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor

from defense.calibration import Calibration
from defense.offline.benchmark.metrics import (
    GRID,
    areas,
    aupr,
    auroc,
    auroc_spread,
    coverage,
    flag_rate,
    flagged,
    fpr_at_tpr,
    guarded_success,
    interval,
    p_values,
    per_class,
    resampled,
    robust_accuracy,
    roc,
    share,
    wilson,
)

values = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=20)


def normal(count: int, *, seed: int, mean: float = 0.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return mean + torch.randn(count, generator=draw, dtype=torch.float64)


def truth_and_scores(negative: Tensor, positive: Tensor) -> tuple[Any, Any]:
    truth = np.repeat([0, 1], [len(negative), len(positive)])
    return truth, torch.cat([negative, positive]).numpy()


@given(values, values)
def test_areas_are_those_of_scikit_learn_ties_included(
    negative: list[float], positive: list[float]
) -> None:
    truth, scores = truth_and_scores(torch.tensor(negative), torch.tensor(positive))
    first, second = torch.tensor(negative), torch.tensor(positive)
    assert auroc(first, second) == pytest.approx(roc_auc_score(truth, scores))
    assert aupr(first, second) == pytest.approx(average_precision_score(truth, scores))


@given(values, values)
def test_the_curve_is_that_of_scikit_learn(negative: list[float], positive: list[float]) -> None:
    first, second = torch.tensor(negative), torch.tensor(positive)
    truth, scores = truth_and_scores(first, second)
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    for rate, found in roc(first, second):
        assert found == pytest.approx(tpr[fpr <= rate + 1e-9].max())
    assert fpr_at_tpr(first, second) == pytest.approx(fpr[tpr >= 0.95 - 1e-9].min())


def test_precision_at_a_prevalence_is_that_of_a_sample_weighted_to_it() -> None:
    negative, positive = normal(80, seed=0), normal(50, seed=1, mean=1)
    truth, scores = truth_and_scores(negative, positive)
    weight = np.where(truth == 1, 0.01 / 50, 0.99 / 80)
    expected = average_precision_score(truth, scores, sample_weight=weight)
    assert aupr(negative, positive, prevalence=0.01) == pytest.approx(expected)
    assert aupr(negative, positive) == pytest.approx(average_precision_score(truth, scores))
    assert expected < average_precision_score(truth, scores)


def test_figures_of_nothing_are_no_numbers() -> None:
    nothing, one = torch.zeros(0), torch.ones(1)
    for figure in (auroc, aupr, fpr_at_tpr):
        assert figure(nothing, one) is None
        assert figure(one, nothing) is None
    assert roc(one, nothing) == roc(nothing, one) == []
    assert share(torch.zeros(0, dtype=torch.bool)) is None
    assert coverage(torch.ones(1, dtype=torch.bool), torch.ones(1, dtype=torch.bool)) == {
        "coverage": 0.0,
        "accuracy": 1.0,
        "accuracy_answered": None,
    }


def test_the_grid_of_a_curve_is_logarithmic_and_ends_where_everything_is_flagged() -> None:
    points = roc(normal(50, seed=0), normal(50, seed=1))
    assert len(points) == len(GRID) == 61
    assert points[0][0] == pytest.approx(1e-3)
    assert points[-1] == [1.0, 1.0]
    ratios = torch.tensor([fpr for fpr, _ in points]).log().diff()
    assert torch.allclose(ratios, ratios[0].expand(60), atol=1e-4)


@given(values, values)
def test_p_values_are_those_of_the_guard(calibration: list[float], score: list[float]) -> None:
    known, new = torch.tensor(calibration), torch.tensor(score)
    ranked = Calibration(known, torch.zeros(len(known))).rank(new, torch.zeros(len(new)))
    assert torch.equal(p_values(known, new), ranked.p_value)


def test_a_row_is_flagged_by_the_rank_among_calibration_scores_alone() -> None:
    calibration = torch.arange(99).double()
    marks = flagged(calibration, torch.tensor([94.0, 95.0, 96.0]), 0.05)
    assert marks is not None
    assert marks.tolist() == [False, True, True]  # 1 + 4 of 100 are at least 95
    assert flagged(calibration, calibration, 0.01) is None
    assert flag_rate(calibration, calibration, 0.01) is None


def test_the_wilson_interval_is_that_of_the_textbook() -> None:
    assert wilson(10, 100) == pytest.approx((0.0552, 0.1744), abs=1e-4)
    assert wilson(0, 100)[0] == 0
    assert wilson(0, 100)[1] == pytest.approx(0.0370, abs=1e-4)
    assert wilson(100, 100)[1] == 1


def test_resampled_areas_are_those_of_scikit_learn_with_weights() -> None:
    clean, attacked = normal(30, seed=0).round(), normal(30, seed=1, mean=1).round()
    won = torch.arange(30) % 3 > 0
    times = resampled(30, 5, seed=2)
    assert times.sum(dim=0).tolist() == [30] * 5
    truth, scores = truth_and_scores(clean, attacked[won])
    for found, column in zip(areas(clean, attacked[won], times, times[won]), times.T, strict=True):
        weight = torch.cat([column, column[won]]).numpy()
        assert float(found) == pytest.approx(roc_auc_score(truth, scores, sample_weight=weight))


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    truth = torch.distributions.Normal(0, 1).cdf(torch.tensor(1 / 2**0.5)).item()
    won = torch.ones(80, dtype=torch.bool)
    hits = 0
    for seed, scores in enumerate(normal(100 * 160, seed=0).view(100, 160)):
        clean, attacked = scores[:80], scores[80:] + 1
        found = auroc_spread(clean, attacked, won, resamples=200, seed=seed)
        assert found is not None
        hits += found.low <= truth <= found.high
    assert 88 <= hits <= 99


def test_twins_are_drawn_together() -> None:
    """Where the attacked score follows the clean one, drawing pairs narrows the interval."""
    image = 10 * normal(200, seed=0)
    won = torch.ones(200, dtype=torch.bool)
    paired = auroc_spread(image, image + 1, won)
    times = [resampled(200, 500, seed=seed) for seed in (1, 2)]
    low, high = interval(areas(image, image + 1, times[0], times[1]))
    assert paired is not None
    assert paired.high - paired.low < (high - low) / 3


def test_a_resample_without_a_success_is_left_out() -> None:
    won = torch.tensor([True, False, False])
    found = auroc_spread(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.5, 0, 0]), won)
    assert found is not None
    assert 0 <= found.low <= found.mean <= found.high <= 1


def marks(text: str) -> Tensor:
    return torch.tensor([letter == "x" for letter in text])


def test_guarded_success_counts_what_is_wrong_and_answered_over_all_attacked_rows() -> None:
    assert guarded_success(won=marks("xxx--"), rejected=marks("x--x-")) == 2 / 5


def test_an_image_is_served_well_only_clean_and_attacked() -> None:
    rejected_clean, won, rejected = marks("x-----"), marks("-xx--x"), marks("--x-x-")
    # rejected clean, fooled, fooled and caught, failed, failed and rejected, fooled
    assert robust_accuracy(rejected_clean, won, rejected) == pytest.approx(3 / 6)
    assert robust_accuracy(rejected_clean, won, rejected, accuracy=0.8) == pytest.approx(0.4)


def test_coverage_and_accuracy_before_and_after_rejection_are_counted() -> None:
    found = coverage(rejected=marks("xx---"), right=marks("x--xx"))
    assert found == {"coverage": 3 / 5, "accuracy": 3 / 5, "accuracy_answered": 2 / 3}


def test_rates_of_a_class_are_of_its_own_rows() -> None:
    found = per_class(marks("x--x"), torch.tensor([0, 0, 0, 1]), ("a", "b", "c"))
    assert found == {"a": pytest.approx(1 / 3), "b": 1.0, "c": None}
