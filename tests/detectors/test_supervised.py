"""The supervised detector: log-odds of a logistic regression on both views."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from defense.detectors.density import halves
from defense.detectors.supervised import SupervisedRecipe, both_views
from defense.errors import DataError
from defense.types import FitData, Routed
from tests.synthetic import LAYOUT, clean_runs, fit_data, shifted_runs


def test_its_score_is_the_decision_function_of_the_judge() -> None:
    data = fit_data()
    assert data.attacked is not None
    detector = SupervisedRecipe().fit(data, LAYOUT, seed=4)
    _, judge = halves(data, 4)
    runs = (judge.clean, data.attacked, shifted_runs(20, seed=9))
    clean, attacked, new = (
        detector.standardise(both_views(detector.density, detector.trajectory, run)).double()
        for run in runs
    )
    labels = torch.cat([torch.zeros(len(clean)), torch.ones(len(attacked))])
    model = LogisticRegression(C=0.1, class_weight="balanced", max_iter=2000)
    model.fit(torch.cat([clean, attacked]).numpy(), labels.numpy())
    expected = torch.tensor(model.decision_function(new.numpy()))
    torch.testing.assert_close(detector.score(runs[2]), expected, rtol=1e-3, atol=1e-3)


def test_it_tells_the_attacks_that_it_was_shown_from_clean_runs() -> None:
    detector = SupervisedRecipe().fit(fit_data(), LAYOUT, seed=0)
    assert float((detector.score(shifted_runs(100, seed=30)) > 0).double().mean()) > 0.95
    assert float((detector.score(clean_runs(100, seed=30)[0]) < 0).double().mean()) > 0.95


def test_no_successful_attack_is_an_error_and_not_an_empty_judge() -> None:
    clean, labels = clean_runs(50, seed=1)
    nothing = clean.take(torch.zeros(50, dtype=torch.bool))
    with pytest.raises(
        DataError, match="there are none; name some with --attacks, or use the density"
    ):
        SupervisedRecipe().fit(FitData(clean, labels, nothing), LAYOUT, seed=0)


def test_both_views_lie_side_by_side() -> None:
    detector = SupervisedRecipe().fit(fit_data(), LAYOUT, seed=0)
    run: Routed = clean_runs(3, seed=1)[0]
    views = both_views(detector.density, detector.trajectory, run)
    assert torch.equal(views[:, :6], detector.density.features(run))
    assert torch.equal(views[:, 6:], detector.trajectory.features(run))
