"""What a published detector is given, and what it gives back: larger = more suspicious, always.

Shapes: N images, D path columns, K classes, S sites, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from defense.errors import DataError
from defense.types import PathLayout, Routed

Kind = Literal["peer", "baseline", "control"]


@dataclass(frozen=True)
class Sample:
    """N images, all that a peer may look at.

    pixels: (N, C, H, W) in [0, 1]. routed: their logits, and their `activation` path: the mean of
    every channel of every site.
    """

    pixels: Tensor
    routed: Routed

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, rows: Tensor) -> Sample:
        """Return the given rows (indices or a boolean mask)."""
        return Sample(self.pixels[rows], self.routed.take(rows))


Score = Callable[[Sample], Tensor]
"""Samples to scores (N,), every row by itself, on the CPU in float64."""


class Peer(Protocol):
    """A detector that stands beside ours, with its hyper-parameters; `fit` returns the fitted one."""

    @property
    def about(self) -> str:
        """What it does and where it was published, in one line."""
        ...

    @property
    def kind(self) -> Kind:
        """`peer`: a published detector. `baseline`: logits alone. `control`: must be beaten."""
        ...

    @property
    def needs_attacks(self) -> bool:
        """Whether it is fitted with attacked images."""
        ...

    @property
    def slow(self) -> bool:
        """Whether it takes many passes per image, and is judged on fewer images."""
        ...

    def fit(
        self,
        model: nn.Module,
        layout: PathLayout,
        clean: Sample,
        labels: Tensor,
        attacked: Sample | None,
        *,
        seed: int,
    ) -> Score:
        """Fit to clean images, their labels (N,) and successful attacks; same seed, same scores.

        model: of pixels, in eval mode; its sites are those of `layout`. attacked: not looked at
        unless `needs_attacks`. Raises DataError where the data does not do.
        """
        ...


@dataclass(frozen=True)
class Case:
    """All that a peer is fitted to; see `Peer.fit`."""

    model: nn.Module
    layout: PathLayout
    clean: Sample
    labels: Tensor
    attacked: Sample | None
    seed: int

    @property
    def attacks(self) -> Sample:
        """The attacked images, for peers that are fitted with them (`Row.fit` has checked)."""
        assert self.attacked is not None
        return self.attacked

    @property
    def classes(self) -> int:
        return self.clean.routed.logits.shape[1]

    def take(self, rows: Tensor) -> Case:
        """Return the case with these clean images alone."""
        return replace(self, clean=self.clean.take(rows), labels=self.labels[rows])

    def split(self) -> tuple[Case, Case]:
        """Part the clean images at random, two thirds and one third.

        What was shaped by an image finds it more usual than one it has not seen: one part shapes,
        the other judges.
        """
        order = shuffled(len(self.clean), self.seed)
        cut = len(order) - len(order) // 3
        return self.take(order[:cut]), self.take(order[cut:])


@dataclass(frozen=True)
class Row:
    """A peer as a row of the table: `learn` fits it to a case that holds what the row asks for."""

    about: str
    learn: Callable[[Case], Score]
    kind: Kind = "peer"
    needs_attacks: bool = False
    slow: bool = False

    def fit(
        self,
        model: nn.Module,
        layout: PathLayout,
        clean: Sample,
        labels: Tensor,
        attacked: Sample | None,
        *,
        seed: int,
    ) -> Score:
        """Check the data and fit; see `Peer.fit`."""
        if len(clean) < 2 or len(labels) != len(clean):
            raise DataError(
                f"a peer is fitted to {len(clean)} clean images with {len(labels)} labels; give at "
                "least two images with one label each"
            )
        if clean.routed.path.shape[1] != layout.length:
            raise DataError(
                f"the paths have {clean.routed.path.shape[1]} columns and the layout has "
                f"{layout.length}; give the layout of the router that took them"
            )
        if self.needs_attacks and (attacked is None or len(attacked) == 0):
            raise DataError(
                "this peer is fitted with attacks and there are none; give images whose attack "
                "succeeded"
            )
        shown = attacked if self.needs_attacks else None
        score = self.learn(Case(model, layout, clean, labels, shown, seed))
        return lambda sample: _scores(score, sample)


def _scores(score: Score, sample: Sample) -> Tensor:
    """Apply `score`, whatever the number of rows; scikit-learn refuses to judge none."""
    if len(sample) == 0:
        return torch.zeros(0, dtype=torch.float64)
    with torch.no_grad():
        return score(sample).double().cpu().contiguous()


def shuffled(count: int, seed: int) -> Tensor:
    """Return the row numbers 0 to count - 1 in random order."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
