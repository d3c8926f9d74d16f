"""Detectors score a path; larger = more suspicious. One file per detector, one row in the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from defense.detectors.density import Density, DensityRecipe
from defense.detectors.fused import Fused, FusedRecipe
from defense.detectors.overlap import Overlap, OverlapRecipe
from defense.detectors.supervised import Supervised, SupervisedRecipe
from defense.detectors.trajectory import Trajectory, TrajectoryRecipe
from defense.errors import ConfigError, nearest
from defense.types import FitData, PathLayout, Routed


class Detector(Protocol):
    """A fitted detector: a frozen dataclass whose fields are all that it learnt."""

    name: ClassVar[str]

    def score(self, routed: Routed) -> Tensor:
        """Return (N,) float64 scores, each row by itself; larger = more suspicious."""
        ...


class Recipe(Protocol):
    """A detector's hyper-parameters; `fit` returns the fitted value."""

    def fit(self, data: FitData, layout: PathLayout, *, seed: int) -> Detector:
        """Fit on the CPU; the same data and seed give the same detector."""
        ...


@dataclass(frozen=True)
class DetectorKind:
    """How to fit a detector, how to load one, and what fitting it does with attacks."""

    recipe: type[Recipe]
    fitted: type[Detector]
    attacks: Literal["ignored", "welcome", "needed"] = "ignored"


DETECTORS: dict[str, DetectorKind] = {
    "fused": DetectorKind(FusedRecipe, Fused, attacks="welcome"),
    "density": DetectorKind(DensityRecipe, Density),
    "trajectory": DetectorKind(TrajectoryRecipe, Trajectory),
    "overlap": DetectorKind(OverlapRecipe, Overlap),
    "supervised": DetectorKind(SupervisedRecipe, Supervised, attacks="needed"),
}


def detector_named(name: str) -> DetectorKind:
    """Return the table's row `name`; ConfigError names the nearest one otherwise."""
    if name not in DETECTORS:
        raise ConfigError(f"no detector '{name}'{nearest(name, DETECTORS)}")
    return DETECTORS[name]
