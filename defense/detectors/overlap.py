"""`overlap`: does a path run inside the paths of its class, and outside those of the runner-up?

Source: Qiu et al., "Adversarial Defense Through Network Profiling Based Path Extraction" (CVPR
2019, https://arxiv.org/abs/1904.08089): the union of a class's paths, and per layer the share of a
path that lies in it, for the predicted and for the second class. Two things are our own, so that any
router's columns will do: shares in [0, 1] or activations are fuzzy sets, joined by the maximum and met
by the minimum (for 0/1 columns that is the published ratio); and a Gaussian of clean overlaps stands
in for classifiers that are trained on attacks. Negative columns count as 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from defense.detectors.density import ROWS, halves
from defense.detectors.gaussian import ClassGaussian, Standardiser, fit_class_gaussian
from defense.detectors.stacks import SiteStacks, stack_sites
from defense.errors import DataError
from defense.types import FitData, PathLayout, Routed

TINY = 1e-12


@dataclass(frozen=True)
class OverlapView:
    """Overlaps with class paths, in [0, 1]: (N, 2 S). paths: (K, D) class paths, not negative."""

    layout: PathLayout
    paths: Tensor

    def features(self, routed: Routed) -> Tensor:
        """Return (N, 2 S): at every site the overlap with the predicted class, then the runner-up's.

        A site where the path is empty contradicts nothing: its overlap is 1.
        """
        first, second = routed.logits.topk(2, dim=1).indices.unbind(1)
        path = routed.path.clamp(min=0)
        return torch.cat([self._overlap(path, first), self._overlap(path, second)], dim=1)

    def _overlap(self, path: Tensor, label: Tensor) -> Tensor:
        """Return (N, S): the share of every site's columns of (N, D) that class `label` (N,) covers."""
        rows = zip(path.split(ROWS), label.split(ROWS), strict=True)
        met = [part.minimum(self.paths.index_select(0, to)) for part, to in rows]
        total, shared = self._sums(path), torch.cat([self._sums(part) for part in met])
        return torch.where(total > TINY, shared / total.clamp(min=TINY), 1.0)

    def _sums(self, path: Tensor) -> Tensor:
        """Return the sums over the columns of every site, (N, S)."""
        stacks = self._stacked
        return stacks.maps(stacks.rows(path)).squeeze(2).T

    @cached_property
    def _stacked(self) -> SiteStacks:
        with torch.inference_mode(False):
            ones = [torch.ones_like(self.paths[0, columns]) for columns in self.layout.columns]
            plain = [Standardiser(torch.zeros_like(one), one) for one in ones]
            return stack_sites(self.layout, plain, [one[:, None] for one in ones])


@dataclass(frozen=True)
class Overlap:
    """Fitted overlap detector."""

    name: ClassVar[str] = "overlap"

    view: OverlapView
    usual: ClassGaussian

    def score(self, routed: Routed) -> Tensor:
        """(N,) float64: squared Mahalanobis distance of overlaps to the clean ones, of the wrong side.

        Only less overlap with the predicted class and more with the runner-up count against a run.
        """
        mine, other = self.view.features(routed).chunk(2, dim=1)
        usual_mine, usual_other = self.usual.mean.chunk(2, dim=1)
        worse = torch.cat([mine.minimum(usual_mine), other.maximum(usual_other)], dim=1)
        nothing = torch.zeros(len(worse), dtype=torch.long, device=worse.device)
        return self.usual.distance(worse, nothing).double()


@dataclass(frozen=True)
class OverlapRecipe:
    """Hyper-parameters: how many runs a class path is made of at most, for it grows with each."""

    images_per_class: int = 50

    def fit(self, data: FitData, layout: PathLayout, *, seed: int) -> Overlap:
        """Fit to clean runs; attacked ones are not looked at."""
        shape, judge = halves(data, seed)
        view = fit_overlap_view(shape, layout, images_per_class=self.images_per_class)
        features = view.features(judge.clean)
        nothing = torch.zeros(len(features), dtype=torch.long)
        return Overlap(view, fit_class_gaussian(features, nothing, 1))


def fit_overlap_view(data: FitData, layout: PathLayout, *, images_per_class: int) -> OverlapView:
    """Join the paths of the first `images_per_class` clean runs of every class that are right.

    A class without one gets the mean of the other class paths. DataError where no run is right.
    """
    path, predicted = data.clean.path.clamp(min=0), data.clean.predicted
    right = predicted == data.labels
    if not bool(right.any()):
        raise DataError(
            f"none of the {len(data.clean)} clean runs is classified as its label says, so there are "
            "no class paths; check the labels of the data"
        )
    classes = range(data.clean.logits.shape[1])
    runs = [path[right & (predicted == label)][:images_per_class] for label in classes]
    known = torch.stack([own.amax(0) for own in runs if len(own)])
    joined = [own.amax(0) if len(own) else known.mean(0) for own in runs]
    return OverlapView(layout, torch.stack(joined).float())
