"""Attacks on many images at once: each asks its next question when all have been answered.

The questions of a round go to the oracle together, so that a server can batch them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from defense.errors import ConfigError, DataError
from defense.offline.attacks.queries.oracle import Answers, Oracle
from defense.offline.pixels import LEVELS

Walk = Generator[Tensor, Answers, None]
"""The attack on one image: yields pixels (B, C, H, W) to ask about, is sent their answers."""
Question = Generator[Tensor, Answers, Answers]
POINTS = 10
"""Of a curve over the budget."""
_PRIME = 1_000_003


@dataclass(frozen=True)
class Queried:
    """What attacks on N images came to.

    pixels: (N, C, H, W) in 8-bit steps of [0, 1], the nearest image that fools, else the last
    state. success: (N,) bool, wrong and answered within eps. queries: (N,) until success, else in
    all. distance: (N,) L-infinity distance of the nearest image that fools, inf for none.
    curve: (POINTS, N, 2) that distance, and the L2 distance of the same image, after each tenth of
    the budget.
    """

    pixels: Tensor
    success: Tensor
    queries: Tensor
    distance: Tensor
    curve: Tensor


class QueryAttack(Protocol):
    """An attack by queries with everything but its images and the oracle."""

    @property
    def budget(self) -> int:
        """Queries per image at most."""
        ...

    def run(self, oracle: Oracle, images: Tensor, labels: Tensor, *, seed: int) -> Queried:
        """Attack images (N, C, H, W) in [0, 1] of classes (N,)."""
        ...


@dataclass
class Trail:
    """What the attack on one image has asked and found. All pixels here are levels, 0 to 255."""

    image: Tensor
    label: int
    budget: int
    bound: int
    """Levels that a pixel may move by."""
    spent: int = 0
    finds: list[tuple[int, float, float]] = field(default_factory=list)
    """Images that fool, each nearer than the last: queries so far, L-infinity and L2 distance."""

    def __post_init__(self) -> None:
        self.standing = self.image
        """Where the attack has got to."""
        self.nearest: Tensor | None = None

    @property
    def left(self) -> int:
        return self.budget - self.spent

    @property
    def succeeded(self) -> bool:
        return bool(self.finds) and self.finds[-1][1] <= self.bound

    def ask(self, proposals: Tensor) -> Question:
        """Ask about whole levels (B, C, H, W), B <= what is left."""
        answers = yield proposals / LEVELS
        for proposal, fooled in zip(proposals, self.fooled(answers).tolist(), strict=True):
            self.spent += 1
            if fooled:
                self._note(proposal)
        return answers

    def fooled(self, answers: Answers) -> Tensor:
        """(B,) bool: answered, and wrongly. A refusal fools nobody."""
        return ~answers.refused & (answers.labels != self.label)

    def _note(self, proposal: Tensor) -> None:
        change = proposal - self.image
        linf, l2 = float(change.abs().max()), float(change.norm())
        if not self.finds or (linf, l2) < self.finds[-1][1:]:
            self.finds.append((self.spent, linf, l2))
            self.nearest = proposal

    def spent_until_success(self) -> int:
        within = [spent for spent, linf, _ in self.finds if linf <= self.bound]
        return within[0] if within else self.spent

    def distances_at(self, spent: int) -> tuple[float, float]:
        """Return the L-infinity and L2 distance, in [0, 1] pixels, of the best by then."""
        known = [find[1:] for find in self.finds if find[0] <= spent]
        linf, l2 = known[-1] if known else (torch.inf, torch.inf)
        return linf / LEVELS, l2 / LEVELS


def attack_together(
    oracle: Oracle,
    images: Tensor,
    labels: Tensor,
    walk: Callable[[Trail, torch.Generator], Walk],
    *,
    eps: float,
    budget: int,
    seed: int,
) -> Queried:
    """Attack every image by its own `walk`, which draws from its own generator."""
    bound = int(eps * LEVELS + 1e-4)
    if bound < 1 or budget < 1:
        raise ConfigError(
            f"an attack by queries was given eps {eps:g} and a budget of {budget}; give an eps of "
            "at least 1/255, for less is lost in 8 bits, and at least one query"
        )
    if len(images) == 0 or len(images) != len(labels):
        raise DataError(
            f"an attack by queries was given {len(images)} images and {len(labels)} labels; give "
            "at least one image, and a label for each"
        )
    levels = (images.cpu() * LEVELS).round().clamp(0, LEVELS)
    trails = [
        Trail(image, int(label), budget, bound) for image, label in zip(levels, labels, strict=True)
    ]
    draws = [torch.Generator().manual_seed(seed * _PRIME + n) for n in range(len(trails))]
    _ask_in_rounds(oracle, [walk(*pair) for pair in zip(trails, draws, strict=True)])
    return _queried(trails)


def _ask_in_rounds(oracle: Oracle, walks: Sequence[Walk]) -> None:
    waiting = [(walk, question) for walk in walks if (question := next(walk, None)) is not None]
    while waiting:
        answers = oracle.ask(torch.cat([question for _, question in waiting]))
        parts = answers.split([len(question) for _, question in waiting])
        told = [(walk, _told(walk, part)) for (walk, _), part in zip(waiting, parts, strict=True)]
        waiting = [(walk, question) for walk, question in told if question is not None]


def _told(walk: Walk, answers: Answers) -> Tensor | None:
    """Give a walk its answers; return what it asks next, None where it has ended."""
    try:
        return walk.send(answers)
    except StopIteration:
        return None


def _queried(trails: Sequence[Trail]) -> Queried:
    last = [t.standing if t.nearest is None else t.nearest for t in trails]
    budget = trails[0].budget
    grid = [budget * (point + 1) // POINTS for point in range(POINTS)]
    curve = torch.tensor([[t.distances_at(spent) for t in trails] for spent in grid])
    return Queried(
        pixels=torch.stack(last) / LEVELS,
        success=torch.tensor([t.succeeded for t in trails]),
        queries=torch.tensor([t.spent_until_success() for t in trails]),
        distance=curve[-1, :, 0],
        curve=curve,
    )
