"""What a fit makes of clean images: attacked twins, and changes that mean no harm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from defense.backbone import GatedBackbone
from defense.errors import ArchiveError, DataError
from defense.looks import Extras
from defense.offline.attacks import Attack
from defense.offline.collect import Served, backbone_inputs, collect_inputs
from defense.offline.harmless import harmless
from defense.offline.pixels import PixelSpace, find_pixel_space
from defense.offline.progress import Progress
from defense.sites import device_of
from defense.types import FitData, Routed

SHIFTED = 500
"""Images of which harmless changes are made, at most: every one is run several times."""


@dataclass(frozen=True)
class Maker:
    """A served model with its sites observed, and how its pixels become inputs, where that is known."""

    served: Served
    gated: GatedBackbone
    space: PixelSpace | None
    extras: Extras
    progress: Progress
    if_possible: bool = False
    """Whether to go on without attacks where there can be none."""

    def fit_data(
        self,
        clean: FitData,
        judged: Tensor,
        payloads: Sequence[bytes],
        attacks: Sequence[Attack],
        seed: int,
    ) -> tuple[FitData, dict[str, Any]]:
        """Add to clean runs what is made of the `judged` (N,) ones' payloads, and facts about it.

        Raises ArchiveError where there are attacks and no pixels to attack.
        """
        facts: dict[str, Any] = {"attacks": []}
        if self.space is None:
            if attacks and not self.if_possible:
                raise ArchiveError(
                    "the archive's preprocessing is no shift and scale of pixels per channel, so "
                    "attacks on pixels are not defined for it; fit without attacks"
                )
            return clean, facts | {"harmless": "none, for pixels do not simply become inputs"}
        inputs = backbone_inputs(self.served, payloads if attacks else payloads[:SHIFTED])
        pixels = self.space.to_pixels(inputs)
        runs = self._attacked(pixels, clean.labels[judged], attacks, seed) if attacks else None
        attacked = None
        if runs is not None:
            facts["attacks"] = [attack.name for attack in attacks]
            attacked = successes(runs, clean.clean.take(judged), clean.labels[judged])
        changed = harmless(pixels[:SHIFTED], seed)
        shifted = Routed.concat([self._run(images) for images in changed.values()])
        data = FitData(clean.clean, clean.labels, attacked, shifted, judged)
        return data, facts | {"harmless": list(changed)}

    def _attacked(
        self, pixels: Tensor, labels: Tensor, attacks: Sequence[Attack], seed: int
    ) -> Routed | None:
        """Return the runs of every attack, one after the other: A x N; None where there can be none."""
        assert self.space is not None
        model = self.space.model(self.served.backbone)
        if not has_gradient(model, pixels[:1]):
            if self.if_possible:
                return None
            raise ArchiveError(
                "the network cannot be attacked because no gradient reaches its input; give it in a "
                "form that has gradients, or fit without attacks"
            )
        return Routed.concat([self._run(a.run(model, pixels, labels, seed=seed)) for a in attacks])

    def _run(self, pixels: Tensor) -> Routed:
        assert self.space is not None
        inputs = self.space.to_input(pixels)
        runs = collect_inputs(self.served.backbone, self.gated, inputs, self.extras)
        self.progress.advance(len(runs))
        return runs


def has_gradient(model: nn.Module, pixels: Tensor) -> bool:
    """Say whether the logits of `model` for pixels (N, C, H, W) have a gradient at these pixels."""
    with torch.enable_grad():
        pixels = pixels.to(device_of(model)).clone().requires_grad_()
        total = model(pixels).sum()
        if not total.requires_grad:
            return False
        return torch.autograd.grad(total, pixels, allow_unused=True)[0] is not None


def pixel_space(served: Served, example: bytes) -> PixelSpace | None:
    """Return how pixels become inputs of an archive; None where that is no shift and scale."""
    try:
        return find_pixel_space(served, example)
    except (ArchiveError, DataError, OSError):
        return None


def successes(attacked: Routed, clean: Routed, labels: Tensor) -> Routed:
    """Keep the runs (A x N: attack after attack) that turned a right answer into a wrong one."""
    times = len(attacked) // len(clean)
    right = (clean.predicted == labels).repeat(times)
    return attacked.take(right & (attacked.predicted != labels.repeat(times)))
