"""`supervised`: a linear judge of both views, fitted with attacks.

Sees what it was shown: attacks of another family may pass (the attack-free detectors do not care
which attack comes). Both views are fitted on clean data, the judge on clean against attacked runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from defense.detectors.density import DensityView, fit_density_view, halves
from defense.detectors.gaussian import Standardiser, fit_standardiser
from defense.detectors.trajectory import TrajectoryView, fit_trajectory_view
from defense.errors import DataError
from defense.types import FitData, PathLayout, Routed


@dataclass(frozen=True)
class Supervised:
    """Fitted supervised detector. weight: (F,); bias: ()."""

    name: ClassVar[str] = "supervised"

    density: DensityView
    trajectory: TrajectoryView
    standardise: Standardiser
    weight: Tensor
    bias: Tensor

    def score(self, routed: Routed) -> Tensor:
        """(N,) float64: log-odds of attacked against clean."""
        features = both_views(self.density, self.trajectory, routed)
        return (self.standardise(features) @ self.weight + self.bias).double()


@dataclass(frozen=True)
class SupervisedRecipe:
    """Hyper-parameters of the views, and the inverse L2 penalty of the judge."""

    rank: int = 32
    ridge: float = 0.01
    temperature: float = 0.1
    inverse_penalty: float = 0.1

    def fit(self, data: FitData, layout: PathLayout, *, seed: int) -> Supervised:
        """Fit to clean and attacked runs; DataError where there are no attacked ones."""
        if data.attacked is None or len(data.attacked) == 0:
            raise DataError(
                "the supervised detector is fitted with attacks and there are none; "
                "name some with --attacks, or use the density detector"
            )
        from sklearn.linear_model import LogisticRegression

        shape, judge = halves(data, seed)
        density = fit_density_view(shape, layout, rank=self.rank)
        trajectory = fit_trajectory_view(
            shape, layout, ridge=self.ridge, temperature=self.temperature
        )
        clean = both_views(density, trajectory, judge.clean)
        attacked = both_views(density, trajectory, data.attacked)
        standardise = fit_standardiser(clean)
        x = standardise(torch.cat([clean, attacked])).double().numpy()
        y = torch.cat([torch.zeros(len(clean)), torch.ones(len(attacked))]).numpy()
        judge_model = LogisticRegression(
            C=self.inverse_penalty, class_weight="balanced", max_iter=2000, random_state=seed
        ).fit(x, y)
        return Supervised(
            density,
            trajectory,
            standardise,
            torch.tensor(judge_model.coef_[0], dtype=torch.float32),
            torch.tensor(judge_model.intercept_[0], dtype=torch.float32),
        )


def both_views(density: DensityView, trajectory: TrajectoryView, routed: Routed) -> Tensor:
    """Return (N, F) features of both views side by side."""
    return torch.cat([density.features(routed), trajectory.features(routed)], dim=1)
