"""The values that flow from a forward pass to an answer.

Shapes: N requests (rows), D path columns, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


class Verdict(StrEnum):
    """What the guard says of one request."""

    ACCEPT = "accept"
    FLAG = "flag"
    REJECT = "reject"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Site:
    """A place in the backbone whose output channels are observed.

    `call` counts the calls of that module within one forward pass from 0, because a module may be
    used more than once; `axis` is the channel axis: 1 for feature maps (N, C, ...), -1 for tokens
    (N, ..., C) and for vectors (N, C).
    """

    module: str
    call: int
    channels: int
    axis: int

    @property
    def name(self) -> str:
        return f"{self.module}#{self.call}"


@dataclass(frozen=True)
class PathLayout:
    """Maps sites to the columns of a path: site after site, statistic after statistic."""

    sites: tuple[Site, ...]
    statistics: tuple[str, ...]

    @cached_property
    def columns(self) -> tuple[slice, ...]:
        """The columns of every site, in the order of `sites`."""
        stops: list[int] = [0]
        for site in self.sites:
            stops.append(stops[-1] + site.channels * len(self.statistics))
        return tuple(slice(a, b) for a, b in pairwise(stops))

    @property
    def length(self) -> int:
        """D, the number of columns."""
        return self.columns[-1].stop if self.sites else 0


@dataclass(frozen=True)
class Routed:
    """What one forward pass leaves behind: logits (N, K) and path (N, D), on the same device."""

    logits: Tensor
    path: Tensor

    def __len__(self) -> int:
        return self.logits.shape[0]

    @property
    def predicted(self) -> Tensor:
        """(N,) predicted class."""
        return self.logits.argmax(dim=1)

    def take(self, rows: Tensor) -> Routed:
        """Return the given rows (indices or a boolean mask)."""
        return Routed(self.logits[rows], self.path[rows])

    def cpu(self) -> Routed:
        return Routed(self.logits.cpu(), self.path.cpu())

    @staticmethod
    def concat(parts: Sequence[Routed]) -> Routed:
        """Stack batches of the same layout."""
        return Routed(
            torch.cat([part.logits for part in parts]), torch.cat([part.path for part in parts])
        )


@dataclass(frozen=True)
class FitData:
    """Runs to fit a detector on: clean ones, their labels (N,), attacked ones where there are any."""

    clean: Routed
    labels: Tensor
    attacked: Routed | None = None


@dataclass(frozen=True)
class Scored:
    """The detector's opinion of N requests, on the CPU in float64.

    score: (N,), larger = more suspicious. p_value: (N,) rank among all clean calibration scores.
    class_p_value: (N,) rank among those of the predicted class. predicted: (N,) class index.
    """

    score: Tensor
    p_value: Tensor
    class_p_value: Tensor
    predicted: Tensor

    def __len__(self) -> int:
        return self.score.shape[0]
