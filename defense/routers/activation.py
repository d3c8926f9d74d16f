"""`activation`: pooled channel statistics, the path that costs least.

The control that every routing system has to beat: what pooled activations already tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from defense.errors import ConfigError, nearest
from defense.routers.recipes import Observing, Unlearnt
from defense.types import PathLayout, Site

STATISTICS = ("mean", "max", "deviation")


@dataclass(frozen=True)
class ActivationRouter:
    """Mean, maximum and deviation of every channel over positions (pixels or tokens)."""

    name: ClassVar[str] = "activation"
    one_forward: ClassVar[bool] = True

    layout: PathLayout

    def __post_init__(self) -> None:
        for statistic in self.layout.statistics:
            if statistic not in STATISTICS:
                raise ConfigError(f"no statistic '{statistic}'{nearest(statistic, STATISTICS)}")

    def reduce(self, output: Tensor, site: Site) -> Tensor:
        """(N, C, ...) or (N, ..., C) -> (N, C x statistics), float32, without a host sync."""
        # This runs at every site on caches that the layer left cold: every call less counts.
        if output.dim() == 2:
            output = output.unsqueeze(2)
            positions: tuple[int, ...] = (2,)
        elif site.axis == 1:
            positions = tuple(range(2, output.dim()))
        else:
            positions = tuple(range(1, output.dim() - 1))
        names = self.layout.statistics
        if len(names) == 1:
            return _pool(output, positions, names[0])
        return torch.cat([_pool(output, positions, name) for name in names], dim=1)

    def finish(self, path: Tensor, logits: Tensor) -> Tensor:
        """The pooled channels are the path."""
        return path


@dataclass(frozen=True)
class ActivationRecipe(Observing, Unlearnt["ActivationRouter"]):
    """Hyper-parameters: which statistics of a channel stand in the path."""

    statistics: tuple[str, ...] = ("mean",)

    def router(self, sites: tuple[Site, ...]) -> ActivationRouter:
        """Nothing is learnt."""
        return ActivationRouter(PathLayout(sites, self.statistics))


def _pool(output: Tensor, positions: tuple[int, ...], statistic: str) -> Tensor:
    """Reduce the axes `positions` of an output: (N, C) in a tensor of its own."""
    if statistic == "mean":
        return output.mean(positions, dtype=torch.float32)
    if statistic == "max":
        return output.amax(positions).float()
    # Tensor.std takes 20 times as long on a CPU; E[x^2] - E[x]^2 would cancel.
    offset = output.float() - output.mean(positions, keepdim=True, dtype=torch.float32)
    return offset.square().mean(positions).sqrt()
