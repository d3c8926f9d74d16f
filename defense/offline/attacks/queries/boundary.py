"""HopSkipJump with refusals as answers: Chen, Jordan, Wainwright 2020, arXiv 1904.02144.

It needs the class alone. Its algorithm 2 for L-infinity: walk to the boundary, estimate the
boundary's direction from random probes, jump along it, and again. Ours are the refusal, which counts
as "not fooled", the start at another class's image that is answered, and what 8 bits ask for:

* The attack's own point is real-valued; what is sent is rounded with thresholds that are drawn once
  per pixel, so that the line between two images has far more than 255 points.
* Probes move every pixel by one level up or down: the published radius is lost in rounding.

For testing one's own models.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from defense.errors import DataError
from defense.offline.attacks.queries.lockstep import Queried, Trail, Walk, attack_together
from defense.offline.attacks.queries.oracle import Answers, Oracle
from defense.offline.pixels import LEVELS

STARTS = 10
"""Images of other classes that are tried as a start."""
SHORTEST_JUMP = 0.1
"""In levels."""


@dataclass(frozen=True)
class HopSkipJump:
    """eps: largest change of a pixel in [0, 1] that counts as success. probes: of the first estimate.

    keep_going: use up the budget to come nearer, success or not; otherwise a success is the end.
    """

    eps: float = 8 / 255
    budget: int = 1000
    probes: int = 100
    keep_going: bool = False

    def run(self, oracle: Oracle, images: Tensor, labels: Tensor, *, seed: int) -> Queried:
        """Attack images (N, C, H, W) in [0, 1] of classes (N,), from images among them.

        Raises DataError for images of one class, which have nowhere to start from.
        """
        if len(labels.unique()) < 2:
            raise DataError(
                "HopSkipJump starts from an image of another class and all images are of one; "
                "give images of two classes or more"
            )
        levels = (images.cpu() * LEVELS).round()

        def walk(trail: Trail, draw: torch.Generator) -> Walk:
            others = levels[labels.cpu() != trail.label]
            chosen = others[torch.randperm(len(others), generator=draw)[:STARTS]]
            return _Hike(self, trail, draw).walk(chosen)

        return attack_together(
            oracle, images, labels, walk, eps=self.eps, budget=self.budget, seed=seed
        )


@dataclass
class _Hike:
    """The attack on one image. Points are real levels (C, H, W), 0 to 255."""

    settings: HopSkipJump
    trail: Trail
    draw: torch.Generator

    def __post_init__(self) -> None:
        self.thresholds = torch.rand(self.trail.image.shape, generator=self.draw)

    def walk(self, starts: Tensor) -> Walk:
        point = yield from self._start(starts)
        if point is None:
            return
        point = yield from self._approach(point)
        for round_ in count(1):
            if self._done():
                return
            direction = yield from self._direction(point, round_)
            jumped = yield from self._jump(point, direction, self._distance(point) / round_**0.5)
            point = yield from self._approach(jumped)

    def _done(self) -> bool:
        met = self.trail.succeeded and not self.settings.keep_going
        return met or self.trail.left == 0

    def _distance(self, point: Tensor) -> float:
        return float((point - self.trail.image).abs().max())

    def _sent(self, point: Tensor) -> Tensor:
        """Round a point: exact for whole levels, nowhere more than one level away."""
        return (point + self.thresholds).floor().clamp(0, LEVELS)

    def _fools(self, point: Tensor) -> Generator[Tensor, Answers, bool]:
        answers = yield from self.trail.ask(self._sent(point)[None])
        return bool(self.trail.fooled(answers)[0])

    def _start(self, starts: Tensor) -> Generator[Tensor, Answers, Tensor | None]:
        for start in starts[: self.trail.left].unbind():
            if (yield from self._fools(start)):
                return start
        return None

    def _approach(self, point: Tensor) -> Generator[Tensor, Answers, Tensor]:
        """Return where, on the way from a point that fools to the image, it last does."""
        near, far = 0.0, self._distance(point)
        # A level is a long way here: all pixels move by it at once, and all in a telling direction.
        tolerance = 1 / math.sqrt(point.numel())
        while far - near > tolerance and not self._done():
            middle = (near + far) / 2
            if (yield from self._fools(self._clipped(point, middle))):
                far = middle
            else:
                near = middle
        return self._clipped(point, far)

    def _clipped(self, point: Tensor, distance: float) -> Tensor:
        return self.trail.image + (point - self.trail.image).clamp(-distance, distance)

    def _direction(self, point: Tensor, round_: int) -> Generator[Tensor, Answers, Tensor]:
        """Estimate the sign (C, H, W) of the boundary's normal: eq. 16, less the mean as in eq. 17."""
        probes = min(int(self.settings.probes * math.sqrt(round_)), self.trail.left)
        if probes == 0:
            return torch.zeros_like(point)
        base = self._sent(point)
        noise = torch.randint(2, (probes, *point.shape), generator=self.draw) * 2.0 - 1
        asked = (base + noise).clamp(0, LEVELS)
        answers = yield from self.trail.ask(asked)
        fooled = self.trail.fooled(answers).float() * 2 - 1
        mixed = 0 < (fooled > 0).sum() < probes
        weights = fooled - fooled.mean() if mixed else fooled
        return torch.einsum("b,bchw->chw", weights, asked - base).sign()

    def _jump(
        self, point: Tensor, direction: Tensor, size: float
    ) -> Generator[Tensor, Answers, Tensor]:
        """Return the farthest point along a direction, by halves, that fools; or where it stands."""
        while size >= SHORTEST_JUMP and not self._done():
            jumped = (point + size * direction).clamp(0, LEVELS)
            if (yield from self._fools(jumped)):
                return jumped
            size /= 2
        return point
