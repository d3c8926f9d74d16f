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
        channel = site.axis
        if output.dim() == 2:
            output, channel = output.unsqueeze(2), 1
        positions = [axis for axis in range(1, output.dim()) if axis != channel % output.dim()]
        pooled = [_pool(output, positions, name) for name in self.layout.statistics]
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)


def _pool(output: Tensor, positions: list[int], statistic: str) -> Tensor:
    """Reduce the axes `positions` of an output: (N, C) in a tensor of its own."""
    if statistic == "mean":
        return output.mean(positions, dtype=torch.float32)
    if statistic == "max":
        return output.amax(positions).float()
    # Tensor.std takes 20 times as long on a CPU; E[x^2] - E[x]^2 would cancel.
    offset = output.float() - output.mean(positions, keepdim=True, dtype=torch.float32)
    return offset.square().mean(positions).sqrt()
