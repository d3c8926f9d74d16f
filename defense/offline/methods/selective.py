"""Training that assigns every unit a class (https://arxiv.org/abs/2108.05312, the assigning loss).

The paper assigns units of depth estimators a range of depths; with classes in the place of ranges
this is a reconstruction for classifiers, pooled activations in the place of sums over pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from defense.offline.training import logits
from defense.offline.units import class_means, contrast
from defense.routers.gating import channels_first, observed
from defense.types import Site


@dataclass(frozen=True)
class SelectiveObjective:
    """Cross-entropy, less `weight` times the mean selectivity of units for their classes.

    modules: those whose output channels are the units, each (B, U, H, W); their selectivities add
    up. `stages` returns what the last block does.
    """

    weight: float = 0.1
    modules: tuple[str, ...] = ("stages",)
    label_smoothing: float = 0.1

    def loss(self, network: nn.Module, x: Tensor, labels: Tensor, epoch: int) -> Tensor:
        """Return the mean loss; SiteError names a module that the network does not have."""
        # How many channels a site has is read off what it returns.
        sites = [Site(name, call=0, channels=0, axis=1) for name in self.modules]
        with observed(network, sites) as outputs:
            answers = logits(network, x)
        loss = functional.cross_entropy(answers, labels, label_smoothing=self.label_smoothing)
        for site in sites:
            pooled = channels_first(outputs[site], site).abs().mean(2, dtype=torch.float32)
            selectivity = assigned_selectivity(pooled, labels, answers.shape[1])
            loss = loss - self.weight * selectivity.mean()
        return loss

    def settle(self, network: nn.Module, epoch: int) -> None:
        """Any weights will do."""


def assigned_selectivity(pooled: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return in [-1, 1] how selective each of U units is for its class, floor(u C / U): `(U,)`.

    pooled: `(B, U)`, at least 0. A unit whose class, or any other class, the batch lacks scores 0.
    """
    means, present = class_means(pooled, labels, classes)
    units = torch.arange(pooled.shape[1], device=pooled.device)
    assigned = units * classes // len(units)
    own = means[assigned, units]
    rest = (means.sum(0) - own) / (present.sum() - 1).clamp(min=1)
    comparable = present[assigned] & (present.sum() > 1)
    return torch.where(comparable, contrast(own, rest), 0.0)
