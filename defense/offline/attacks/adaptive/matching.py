"""Leave the path of a clean image of another class: the natural attack on a detector of paths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from defense.errors import ConfigError, DataError
from defense.offline.attacks.adaptive.bank import Bank
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

ELSEWHERE = 1e300
"""The value of an image that is answered with another class than the one it imitates."""


@dataclass(frozen=True, kw_only=True)
class PathMatching(AdaptiveAttack):
    """Minimise the distance to a clean path, and the witness's logits to those it goes with.

    Columns count in deviations over the bank. A restart goes for the next likely class, and for the
    clean image of it whose path is nearest. Of the images that fool, the lowest score is kept.
    """

    name: ClassVar[str] = "matching"

    def attempt(self, case: Case, best: Best, restart: int, draw: torch.Generator) -> None:
        """Imitate one clean image for every image."""
        bank = _bank(self.name, case)
        target = case.target(restart + 1)
        with torch.no_grad():
            views = _views(case.whitebox(case.pixels))
        kept = _views(bank)
        scales = [_deviation(view) for view in kept]
        apart = _distances(views, kept, scales)
        pick = _nearest(apart, bank.labels, case.labels, target)
        goal = tuple(view[pick] for view in kept)
        pursuit = _Matching(case.labels, bank.labels[pick], goal, tuple(scales))
        pursue(case, pursuit, best, case.start(restart, draw), self.steps)

    @property
    def passes(self) -> tuple[int, int]:
        """Forward and backward passes per image at most, but for one look before and one after."""
        return self.restarts * (self.steps + 2), self.restarts * self.steps


@dataclass(frozen=True, kw_only=True)
class Mimic(AdaptiveAttack):
    """Ptolemy's adaptive attack: be inside the network what a random clean image is.

    Gan et al., MICRO 2020 (https://arxiv.org/abs/2008.09954), there AT_n: minimise the squared
    distance of the activations of the last n sites to those of a clean image of another class, and
    keep the success with the smallest. Theirs searches an L2 size; this one stays in the ball, so
    that it compares to the others. sites: n.
    """

    name: ClassVar[str] = "mimic"

    sites: int = 3

    def attempt(self, case: Case, best: Best, restart: int, draw: torch.Generator) -> None:
        """Imitate one random clean image for every image."""
        bank = _bank(self.name, case)
        other = (bank.labels != case.labels[:, None]).float().cpu()
        pick = torch.multinomial(other, 1, generator=draw).squeeze(1).to(case.labels.device)
        with torch.no_grad():
            glance = case.whitebox(bank.pixels[pick])
        if not glance.activations:
            raise ConfigError(
                "the attack 'mimic' imitates activations and this white box shows none; make one "
                "with open_guard"
            )
        pursuit = _Mimic(bank.labels[pick], glance.activations[-self.sites :])
        pursue(case, pursuit, best, case.start(restart, draw), self.steps)

    @property
    def passes(self) -> tuple[int, int]:
        """Forward and backward passes per image at most, but for one look before and one after."""
        return self.restarts * (self.steps + 2), self.restarts * self.steps


@dataclass(frozen=True)
class _Matching:
    labels: Tensor
    target: Tensor
    goal: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]

    def uphill(self, glance: Glance, sent: Tensor, rows: Tensor) -> Tensor:
        lead = margin(glance.logits, self.labels[rows], self.target[rows])
        views = zip(_views(glance), self.goal, self.scales, strict=True)
        apart = [((view - goal[rows]) / scale).square().mean(1) for view, goal, scale in views]
        return gradient(-sum(apart, (CONFIDENCE - lead).clamp_min(0)), sent)

    def value(self, glance: Glance, rows: Tensor) -> Tensor:  # noqa: ARG002
        return glance.score


@dataclass(frozen=True)
class _Mimic:
    target: Tensor
    goal: tuple[Tensor, ...]

    def uphill(self, glance: Glance, sent: Tensor, rows: Tensor) -> Tensor:
        return gradient(-self._apart(glance, rows), sent)

    def value(self, glance: Glance, rows: Tensor) -> Tensor:
        there = glance.logits.argmax(1) == self.target[rows]
        return torch.where(there, self._apart(glance, rows).double(), ELSEWHERE)

    def _apart(self, glance: Glance, rows: Tensor) -> Tensor:
        own = zip(glance.activations[-len(self.goal) :], self.goal, strict=True)
        return torch.stack([(a - b[rows]).square().flatten(1).sum(1) for a, b in own]).sum(0)


def _bank(name: str, case: Case) -> Bank:
    if case.bank is None:
        raise DataError(
            f"the attack '{name}' imitates clean images and has none; give it a bank of them"
        )
    return case.bank


def _views(of: Glance | Bank) -> list[Tensor]:
    """Return what is matched: the path (n, D), and the witness's logits (n, K) where there are any."""
    return [of.path] if of.witness is None else [of.path, of.witness]


def _deviation(view: Tensor) -> Tensor:
    """Return the deviation of every column (d,); infinite where it never varies, so that it is left."""
    spread = view.std(0, correction=0)
    return torch.where(spread > 1e-6, spread, torch.inf)


def _distances(views: Sequence[Tensor], kept: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    """Return mean squared distances (N, M) in deviations, added up over the views."""
    columns = zip(views, kept, scales, strict=True)
    each = [torch.cdist(a / s, b / s).square() / a.shape[1] for a, b, s in columns]
    return torch.stack(each).sum(0)


def _nearest(apart: Tensor, owned: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """Return (N,) rows of the bank: the nearest of the target class, else of any other than its own."""
    far = apart.amax() + 1
    other_class = far * (owned != target[:, None])
    same_label = 2 * far * (owned == labels[:, None])
    return (apart + other_class + same_label).argmin(1)
