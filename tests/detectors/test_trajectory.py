"""The trajectory detector: probes per site against scikit-learn's ridge, and the course they see."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from defense.detectors.trajectory import TrajectoryRecipe, fit_trajectory_view
from defense.types import FitData, Routed
from tests.synthetic import CLASSES, LAYOUT, clean_runs, fit_data, shifted_runs


@pytest.mark.parametrize("count", [8, 300])
def test_a_probe_is_a_ridge_regression_to_the_classes_in_both_spaces(count: int) -> None:
    """Fewer images than columns are solved in sample space, which has to give the same."""
    data = fit_data(count)
    view = fit_trajectory_view(data, LAYOUT, ridge=0.01, temperature=0.1)
    run, _ = clean_runs(20, seed=4)
    target = torch.nn.functional.one_hot(data.labels, CLASSES).double().numpy()
    for index, (probe, where) in enumerate(zip(view.probes, LAYOUT.columns, strict=True)):
        x = probe.standardise(data.clean.path[:, where]).double().numpy()
        ridge = Ridge(alpha=0.01 * count, fit_intercept=False).fit(x, target - target.mean(0))
        new = probe.standardise(run.path[:, where]).double().numpy()
        logits = torch.tensor((ridge.predict(new) + target.mean(0)) / 0.1)
        np.testing.assert_allclose(
            view.evidence(run)[:, index].numpy(),
            logits.log_softmax(1).numpy(),
            rtol=1e-3,
            atol=1e-3,
        )


def test_probes_read_the_class_of_clean_runs() -> None:
    view = fit_trajectory_view(fit_data(), LAYOUT, ridge=0.01, temperature=0.1)
    run, labels = clean_runs(200, seed=4)
    right = (view.evidence(run).argmax(2) == labels[:, None]).double().mean(0)
    assert float(right.amin()) > 0.8


def test_its_features_are_the_evidence_for_the_answer_the_runner_up_and_the_best_other() -> None:
    view = fit_trajectory_view(fit_data(), LAYOUT, ridge=0.01, temperature=0.1)
    run = Routed(torch.tensor([[1.0, 9.0, 3.0, 0.0]]), clean_runs(1, seed=2)[0].path)
    evidence = view.evidence(run)[0]
    others = evidence[:, [0, 2, 3]].amax(dim=1)
    expected = torch.cat([evidence[:, 1], evidence[:, 2], others])
    assert torch.equal(view.features(run)[0], expected)


def test_two_classes_are_enough() -> None:
    clean, labels = clean_runs(300, seed=1)
    kept = labels < 2
    run = Routed(clean.logits[kept][:, :2], clean.path[kept])
    detector = TrajectoryRecipe().fit(FitData(run, labels[kept]), LAYOUT, seed=0)
    assert bool(detector.score(run).isfinite().all())


def test_layers_that_disagree_with_the_answer_are_suspicious() -> None:
    detector = TrajectoryRecipe().fit(fit_data(), LAYOUT, seed=0)
    clean, late = (
        detector.score(clean_runs(50, seed=4)[0]),
        detector.score(shifted_runs(50, seed=5)),
    )
    assert float(late.median()) > float(clean.amax())
