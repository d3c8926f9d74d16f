"""Linear maps of all sites at once: a detector's small steps cost more in calls than in arithmetic.

Sites of equal width are multiplied together. Shapes: S sites, s of them in one group, d columns of
a site, k outputs of its map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from defense.detectors.gaussian import Standardiser
from defense.types import PathLayout


@dataclass(frozen=True)
class SiteStacks:
    """Standardise paths and map every site's columns by a matrix of its own.

    columns: (D,) path columns, group after group. weights: one (s, d, k) per group. order: (S,)
    where every site of the layout lies among the groups. Both are None where nothing moves.
    """

    columns: Tensor | None
    standardise: Standardiser
    weights: tuple[Tensor, ...]
    order: Tensor | None

    def rows(self, path: Tensor) -> list[Tensor]:
        """Return the standardised paths (N, D) by group, each (s, N, d)."""
        if self.columns is not None:
            path = path.index_select(1, self.columns)
        widths = [weight.shape[0] * weight.shape[1] for weight in self.weights]
        parts = self.standardise(path).split(widths, dim=1)
        return [
            part.view(len(part), *weight.shape[:2]).transpose(0, 1)
            for part, weight in zip(parts, self.weights, strict=True)
        ]

    def maps(self, rows: Sequence[Tensor]) -> Tensor:
        """Return the maps of `rows`, (S, N, k) in the order of the layout."""
        return self._ordered(
            [torch.bmm(row, weight) for row, weight in zip(rows, self.weights, strict=True)]
        )

    def energies(self, rows: Sequence[Tensor]) -> Tensor:
        """Return the squared norms of `rows`, (S, N) in the order of the layout."""
        return self._ordered([(row * row).sum(2) for row in rows])

    def _ordered(self, groups: list[Tensor]) -> Tensor:
        together = torch.cat(groups)
        return together if self.order is None else together.index_select(0, self.order)


def stack_sites(
    layout: PathLayout, standardisers: Sequence[Standardiser], weights: Sequence[Tensor]
) -> SiteStacks:
    """Group the sites of `layout` by width. weights: (d, k) of every site, of any k."""
    groups: dict[int, list[int]] = {}
    for index, weight in enumerate(weights):
        groups.setdefault(weight.shape[0], []).append(index)
    sites = [index for group in groups.values() for index in group]
    padded = pad(weights)
    device = padded[0].device
    columns = [torch.arange(c.start, c.stop, device=device) for c in layout.columns]
    moved = sites != sorted(sites)
    return SiteStacks(
        torch.cat([columns[index] for index in sites]) if moved else None,
        Standardiser(
            torch.cat([standardisers[index].center for index in sites]),
            torch.cat([standardisers[index].scale for index in sites]),
        ),
        tuple(torch.stack([padded[index] for index in group]) for group in groups.values()),
        torch.tensor(sites, device=device).argsort() if moved else None,
    )


def pad(tensors: Sequence[Tensor], axes: int = 1) -> list[Tensor]:
    """Add zeros behind the last axes, so that all tensors are as long there as the longest."""
    longest = max(tensor.shape[-1] for tensor in tensors)
    return [
        torch.nn.functional.pad(tensor, (0, longest - tensor.shape[-1]) * axes)
        for tensor in tensors
    ]
