"""Scores become p-values by their rank among clean ones; promises are checked before they are made."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from defense.calibration import Calibration
from defense.errors import CalibrationError

FOUR = Calibration(torch.tensor([1.0, 2.0, 2.0, 4.0]), torch.tensor([0, 0, 1, 1]))


def calibration_of(count: int) -> Calibration:
    return Calibration(torch.arange(count, dtype=torch.float64), torch.zeros(count).long())


@pytest.mark.parametrize(
    ("score", "p_value"),
    [(0.5, 1.0), (1.0, 1.0), (1.5, 4 / 5), (2.0, 4 / 5), (3.0, 2 / 5), (9.0, 1 / 5)],
)
def test_a_p_value_counts_the_calibration_scores_that_are_no_smaller(
    score: float, p_value: float
) -> None:
    scored = FOUR.rank(torch.tensor([score]), torch.tensor([0]))
    assert scored.p_value.item() == p_value
    assert FOUR.implied_fpr(score) == p_value


def test_a_class_p_value_counts_the_scores_of_the_predicted_class_alone() -> None:
    scored = FOUR.rank(torch.tensor([2.0, 2.0, 3.0]), torch.tensor([0, 1, 1]))
    assert scored.class_p_value.tolist() == [2 / 3, 3 / 3, 2 / 3]


def test_a_class_that_calibration_never_saw_has_no_evidence_against_it() -> None:
    assert FOUR.rank(torch.tensor([99.0]), torch.tensor([7])).class_p_value.tolist() == [1.0]
    assert FOUR.class_count(7) == 0


def test_scores_are_compared_in_double_precision() -> None:
    near = 1 + 1e-12
    calibration = Calibration(torch.tensor([near], dtype=torch.float64), torch.tensor([0]))
    assert calibration.rank(torch.tensor([1.0]), torch.tensor([0])).p_value.item() == 1.0
    single = Calibration(torch.tensor([0.1], dtype=torch.float32), torch.tensor([0]))
    assert single.rank(torch.tensor([0.1]), torch.tensor([0])).p_value.item() == 1.0


def test_no_requests_have_no_p_values() -> None:
    scored = FOUR.rank(torch.zeros(0), torch.zeros(0).long())
    assert len(scored) == 0
    assert scored.p_value.shape == scored.class_p_value.shape == (0,)


@pytest.mark.parametrize("target", [0.001, 0.003, 0.01, 0.05, 0.3, 0.9])
def test_a_target_rate_needs_one_over_it_calibration_images(target: float) -> None:
    needed = math.ceil(round(1 / target, 9))
    calibration_of(needed).check_target(target)
    with pytest.raises(
        CalibrationError,
        match=f"of {target:g} needs at least {needed} calibration images; the guard has {needed - 1}",
    ):
        (calibration_of(needed - 1) if needed > 1 else FOUR).check_target(target)


def test_a_target_that_was_accepted_can_be_reached_by_the_most_suspicious_score() -> None:
    for count, target in ((20, 0.05), (100, 0.01), (1000, 0.001)):
        calibration = calibration_of(count)
        calibration.check_target(target)
        assert calibration.implied_fpr(1e9) <= target


def test_a_target_for_one_class_counts_the_images_predicted_as_that_class() -> None:
    FOUR.check_target(0.5, label=1)
    with pytest.raises(
        CalibrationError,
        match=r"needs at least 4 calibration images predicted as class 1; .* has 2",
    ):
        FOUR.check_target(0.25, label=1)


@pytest.mark.parametrize(
    "score", [torch.zeros(0), torch.tensor([1.0, torch.nan]), torch.tensor([torch.inf])]
)
def test_calibration_scores_have_to_be_finite_and_at_least_one(score: Tensor) -> None:
    with pytest.raises(CalibrationError, match="needs at least one score, all of them finite"):
        Calibration(score, torch.zeros(len(score)).long())


@pytest.mark.parametrize(("score", "predicted"), [((3,), (2,)), ((3, 1), (3, 1))])
def test_calibration_scores_have_one_prediction_each(
    score: tuple[int, ...], predicted: tuple[int, ...]
) -> None:
    with pytest.raises(CalibrationError, match=r"has scores of shape \(3.* expected one of each"):
        Calibration(torch.zeros(score), torch.zeros(predicted).long())
