"""A memory of recent requests: an attack by queries asks about one image again and again.

Each question of such an attack is a slight change of one that came before, and so is its path;
paths of different images are far apart. Comparing a request with recent ones is how such attacks
were first noticed (Chen, Carlini & Wagner 2019, arXiv 1907.05587; Li et al. 2022, "Blacklight",
arXiv 2006.14042); that the path serves as what is compared, so that nothing has to be computed for
it, is ours. A request that is asked again exactly as it was is no such question and counts for
nothing: health checks, retries and popular images do that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defense.config import Probing

SAME = 1 / 2000
"""Share of the radius within which two sketches are of the same request, rounded otherwise."""
EXACTLY = "donot_use_mm_for_euclid_dist"
"""Matrix products lose the digits that tell a request from its repetition."""


@dataclass(frozen=True)
class Nearness:
    """When two paths are of nearly the same image.

    projection: (D, S), paths to sketches of S numbers. radius: distance of sketches up to which two
    requests are near, in root-mean-square deviations of a column of clean paths.
    """

    projection: Tensor
    radius: float

    def sketch(self, path: Tensor) -> Tensor:
        """Return sketches (N, S) of paths (N, D), on the CPU."""
        return (path.float() @ self.projection).cpu()


class Memory:
    """The sketches of recent requests, those that were asked again left out. Not for several threads."""

    def __init__(self, nearness: Nearness) -> None:
        self._nearness = nearness
        self._recent = nearness.projection.new_empty(0, nearness.projection.shape[1]).cpu()

    def __len__(self) -> int:
        return len(self._recent)

    @torch.inference_mode()
    def see(self, path: Tensor, probing: Probing) -> Tensor:
        """Say of requests with paths (N, D), in their order, which are questions of an attack.

        (N,) bool: true where at least `after` of the last `remember` different requests were near
        this one and not the same. All of them are remembered.
        """
        sketches = self._nearness.sketch(path)
        known = torch.cat([self._recent[-probing.remember :], sketches])
        apart = torch.cdist(sketches, known, compute_mode=EXACTLY)
        earlier = len(known) - len(sketches) + torch.arange(len(sketches))
        seen = torch.arange(len(known)) < earlier[:, None]
        same = (apart <= self._nearness.radius * SAME) & seen
        near = (apart <= self._nearness.radius) & seen & ~same
        # A repeat within the batch stands in `known` too; it is its first asking that counts.
        fresh = torch.cat([torch.ones(len(known) - len(sketches), dtype=torch.bool), ~same.any(1)])
        self._recent = known[fresh][-probing.remember :]
        return (near & fresh).sum(1) >= probing.after
