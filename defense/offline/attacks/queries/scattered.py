"""An attack that knows of a memory: no question is near an earlier one, as far as eps allows.

Ours, for testing one's own models: what remains of the Square attack (arXiv 1912.00049) for whom
nearly equal questions are refused is its first step, new vertical stripes with every question. It
learns nothing from answers and hopes for luck, a thousand times.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defense.offline.attacks.queries.lockstep import Queried, Trail, Walk, attack_together
from defense.offline.attacks.queries.oracle import Oracle
from defense.offline.attacks.queries.square import stripes


@dataclass(frozen=True)
class Scattered:
    """eps: largest change of a pixel in [0, 1]. budget: questions per image."""

    eps: float = 8 / 255
    budget: int = 1000

    def run(self, oracle: Oracle, images: Tensor, labels: Tensor, *, seed: int) -> Queried:
        """Attack images (N, C, H, W) in [0, 1] of classes (N,); a success ends at its question."""
        return attack_together(
            oracle, images, labels, self._walk, eps=self.eps, budget=self.budget, seed=seed
        )

    def _walk(self, trail: Trail, draw: torch.Generator) -> Walk:
        for _ in range(self.budget):
            yield from trail.ask(stripes(trail, draw)[None])
            if trail.succeeded:
                return
