"""The Square attack with refusals as answers: Andriushchenko et al. 2020, arXiv 1912.00049.

L-infinity, as its algorithms 1 and 2 have it: vertical stripes, then squares of one random colour,
each kept where it brings the wrong class nearer. It climbs on what clients are told, the
probabilities. What is ours is the refusal, a query that improved nothing: where the stripes are
refused the attack starts from the image itself. For testing one's own models.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from defense.errors import ConfigError
from defense.offline.attacks.queries.lockstep import Queried, Trail, Walk, attack_together
from defense.offline.attacks.queries.oracle import Answers, Oracle
from defense.offline.pixels import LEVELS

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""After which of 10,000 proposals the area is halved; other budgets rescale this."""


@dataclass(frozen=True)
class Square:
    """eps: largest change of a pixel in [0, 1]. p_init: share of the image that squares begin with."""

    eps: float = 8 / 255
    budget: int = 1000
    p_init: float = 0.05

    def run(self, oracle: Oracle, images: Tensor, labels: Tensor, *, seed: int) -> Queried:
        """Attack images (N, C, H, W) in [0, 1] of classes (N,); a success ends at its query.

        Raises ConfigError where the model answers without probabilities.
        """
        return attack_together(
            oracle, images, labels, self._walk, eps=self.eps, budget=self.budget, seed=seed
        )

    def share(self, number: int) -> float:
        """Return the share of the image that the proposal after `number` others changes."""
        rescaled = int(number / self.budget * 10_000)
        return self.p_init / 2.0 ** bisect_left(HALVINGS, rescaled)

    def _walk(self, trail: Trail, draw: torch.Generator) -> Walk:
        proposal, least = stripes(trail, draw), math.inf
        for number in range(self.budget):
            answers = yield from trail.ask(proposal[None])
            if trail.succeeded:
                return
            margin = _margin(answers, trail.label)
            if margin < least:
                trail.standing, least = proposal, margin
            proposal = _square(trail, self.share(number), draw)


def _margin(answers: Answers, label: int) -> float:
    """Return by how much the logit of `label` leads the next one; inf for a refusal."""
    if bool(answers.refused[0]):
        return math.inf
    if answers.probabilities is None:
        raise ConfigError(
            "the Square attack climbs on probabilities and the model answers with a class alone; "
            "use the attack that needs no more, HopSkipJump"
        )
    logs = answers.probabilities[0].clamp(min=1e-30).log()
    others = torch.cat([logs[:label], logs[label + 1 :]])
    return float(logs[label] - others.max())


def stripes(trail: Trail, draw: torch.Generator) -> Tensor:
    """Return the attacked image with every column moved up or down by all that eps allows."""
    channels, _, width = trail.image.shape
    return _moved(trail, _signs((channels, 1, width), draw))


def _square(trail: Trail, share: float, draw: torch.Generator) -> Tensor:
    """Return the standing image with one square recoloured; never that image itself."""
    channels, height, width = trail.image.shape
    side = max(1, min(round(math.sqrt(share * height * width)), height, width))
    while True:
        top = int(torch.randint(height - side + 1, (), generator=draw))
        left = int(torch.randint(width - side + 1, (), generator=draw))
        window = (slice(None), slice(top, top + side), slice(left, left + side))
        proposal = trail.standing.clone()
        proposal[window] = _moved(trail, _signs((channels, 1, 1), draw))[window]
        if not torch.equal(proposal, trail.standing):
            return proposal


def _signs(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    return torch.randint(2, shape, generator=draw) * 2.0 - 1


def _moved(trail: Trail, signs: Tensor) -> Tensor:
    return (trail.image + trail.bound * signs).clamp(0, LEVELS)
