"""One loss for both: be wrong, and do not be noticed, with a weight that is searched per image.

Carlini and Wagner, "Adversarial Examples Are Not Easily Detected" (https://arxiv.org/abs/1705.07263),
with projected steps: minimise relu(confidence - margin) + weight x relu(score - threshold).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from defense.offline.attacks.adaptive.search import (
    CONFIDENCE,
    AdaptiveAttack,
    Best,
    Case,
    gradient,
    margin,
    pursue,
)
from defense.offline.attacks.adaptive.whitebox import Glance

FACTOR = 10.0
"""By which the weight grows or shrinks until it is known from both sides."""


@dataclass(frozen=True, kw_only=True)
class Joint(AdaptiveAttack):
    """Joint loss. rounds: of the search for the weight, each of all `steps`."""

    name: ClassVar[str] = "joint"

    steps: int = 40
    restarts: int = 1
    rounds: int = 5

    @property
    def passes(self) -> tuple[int, int]:
        """Forward and backward passes per image at most, but for one look before and one after."""
        rounds = self.restarts * self.rounds
        return rounds * (self.steps + 1) + self.restarts, rounds * self.steps + 2 * self.restarts

    def attempt(self, case: Case, best: Best, restart: int, draw: torch.Generator) -> None:
        """Search the weight: more of it where the image fools, less where it does not."""
        target, start = case.target(restart), case.start(restart, draw)
        unit = _unit(case, target, start)
        aim = case.threshold if case.limit is None else case.limit
        low, high = torch.zeros_like(unit), torch.full_like(unit, torch.inf)
        weight = torch.ones_like(unit)
        for number in range(self.rounds):
            found = Best(case)
            found.done = best.done.clone()
            pursuit = _Joint(case.labels, target, weight * unit, aim)
            here = start if number == 0 else case.start(restart + number, draw)
            pursue(case, pursuit, found, here, self.steps)
            best.join(found)
            low = torch.where(found.fooled, weight, low)
            high = torch.where(found.fooled, high, weight)
            weight = _between(low, high)


def _between(low: Tensor, high: Tensor) -> Tensor:
    """Return the next weights (N,): the geometric mean, or past the one bound that is known."""
    middle = (low * high).sqrt()
    return torch.where(high.isinf(), low * FACTOR, torch.where(low == 0, high / FACTOR, middle))


def _unit(case: Case, target: Tensor, start: Tensor) -> Tensor:
    """Return (N,) float64: the weight at which both terms pull equally hard at the start.

    Margins and scores share no unit, and scores of two detectors do not either.
    """
    sent = start.detach().clone().requires_grad_()
    glance = case.whitebox(sent)
    wrong = margin(glance.logits, case.labels, target)
    pulls = [gradient(wrong, sent, again=True), gradient(glance.score, sent)]
    first, second = (pull.flatten(1).double().norm(dim=1) for pull in pulls)
    return torch.where((first > 0) & (second > 0), first / second, 1.0)


@dataclass(frozen=True)
class _Joint:
    labels: Tensor
    target: Tensor
    weight: Tensor
    aim: float

    def uphill(self, glance: Glance, sent: Tensor, rows: Tensor) -> Tensor:
        lead = margin(glance.logits, self.labels[rows], self.target[rows])
        noticed = (glance.score - self.aim).clamp_min(0)
        return gradient(-(CONFIDENCE - lead).clamp_min(0) - self.weight[rows] * noticed, sent)

    def value(self, glance: Glance, rows: Tensor) -> Tensor:  # noqa: ARG002
        return glance.score
