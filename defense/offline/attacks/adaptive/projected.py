"""One gradient at a time: the classifier's while it is right, the detector's once it is fooled.

Bryniarski et al., "Evading Adversarial Example Detection Defenses with Orthogonal Projected Gradient
Descent" (https://arxiv.org/abs/2106.15023): Selective PGD, and Orthogonal PGD, which takes from each
gradient what lies along the other so that a step for one does not undo the other. As in the authors'
code a step goes along the sign of what is left; that sign is orthogonal no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from defense.offline.attacks.adaptive.search import (
    ANY,
    CONFIDENCE,
    AdaptiveAttack,
    Best,
    Case,
    gradient,
    margin,
    pursue,
)
from defense.offline.attacks.adaptive.whitebox import Glance


@dataclass(frozen=True, kw_only=True)
class Selective(AdaptiveAttack):
    """Selective PGD."""

    name: ClassVar[str] = "selective"

    def attempt(self, case: Case, best: Best, restart: int, draw: torch.Generator) -> None:
        """Go once through the ball."""
        pursuit = _Selective(case.labels, case.target(restart))
        pursue(case, pursuit, best, case.start(restart, draw), self.steps)


@dataclass(frozen=True, kw_only=True)
class Orthogonal(AdaptiveAttack):
    """Orthogonal PGD, both gradients projected: two backward passes for a step."""

    name: ClassVar[str] = "orthogonal"

    @property
    def passes(self) -> tuple[int, int]:
        """Forward and backward passes per image at most, but for one look before and one after."""
        return self.restarts * (self.steps + 1), 2 * self.restarts * self.steps

    def attempt(self, case: Case, best: Best, restart: int, draw: torch.Generator) -> None:
        """Go once through the ball."""
        pursuit = _Orthogonal(case.labels, case.target(restart))
        pursue(case, pursuit, best, case.start(restart, draw), self.steps)


@dataclass(frozen=True, kw_only=True)
class Bare(AdaptiveAttack):
    """PGD on the classifier alone, for comparison: it does not look at the score.

    Of the images that fool it keeps the one that is most clearly wrong, as who does not know of a
    guard would.
    """

    name: ClassVar[str] = "bare"

    restarts: int = 1

    def attempt(self, case: Case, best: Best, restart: int, draw: torch.Generator) -> None:
        """Go once through the ball."""
        pursue(case, _Bare(case.labels), best, case.start(restart, draw), self.steps)


@dataclass(frozen=True)
class _Selective:
    labels: Tensor
    target: Tensor

    def uphill(self, glance: Glance, sent: Tensor, rows: Tensor) -> Tensor:
        lead = margin(glance.logits, self.labels[rows], self.target[rows])
        return gradient(torch.where(lead > CONFIDENCE, -glance.score, lead.double()), sent)

    def value(self, glance: Glance, rows: Tensor) -> Tensor:  # noqa: ARG002
        return glance.score


@dataclass(frozen=True)
class _Orthogonal:
    labels: Tensor
    target: Tensor

    def uphill(self, glance: Glance, sent: Tensor, rows: Tensor) -> Tensor:
        lead = margin(glance.logits, self.labels[rows], self.target[rows])
        wrong = gradient(lead, sent, again=True).flatten(1)
        calm = gradient(-glance.score, sent).flatten(1)
        fooled = (lead > CONFIDENCE)[:, None]
        return torch.where(fooled, across(calm, wrong), across(wrong, calm)).view_as(sent)

    def value(self, glance: Glance, rows: Tensor) -> Tensor:  # noqa: ARG002
        return glance.score


@dataclass(frozen=True)
class _Bare:
    labels: Tensor

    def uphill(self, glance: Glance, sent: Tensor, rows: Tensor) -> Tensor:
        return gradient(self._lead(glance, rows), sent)

    def value(self, glance: Glance, rows: Tensor) -> Tensor:
        return -self._lead(glance, rows)

    def _lead(self, glance: Glance, rows: Tensor) -> Tensor:
        labels = self.labels[rows]
        return margin(glance.logits, labels, torch.full_like(labels, ANY))


def across(way: Tensor, other: Tensor) -> Tensor:
    """Return what is left of rows (N, d) without their part along the rows of `other`."""
    unit = torch.nn.functional.normalize(other.double(), dim=1)
    way = way.double()
    return (way - (way * unit).sum(1, keepdim=True) * unit).to(other.dtype)
