"""`activation`: pooled channel statistics, the path that costs least.

The control that every routing system has to beat: what pooled activations already tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from defense.errors import ConfigError, nearest
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
        if output.dim() == 2:
            positions = output.unsqueeze(-1)
        elif site.axis == 1:
            positions = output.flatten(2)
        else:
            positions = output.flatten(1, -2).transpose(1, 2)
        return torch.cat([_pool(positions, name) for name in self.layout.statistics], dim=1)


def _pool(positions: Tensor, statistic: str) -> Tensor:
    """(N, C, P) -> (N, C)."""
    if statistic == "mean":
        return positions.mean(dim=-1, dtype=torch.float32)
    if statistic == "max":
        return positions.amax(dim=-1).float()
    return positions.float().std(dim=-1, correction=0)
