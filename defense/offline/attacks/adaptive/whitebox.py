"""A guard as an attacker sees it who knows everything: one differentiable look at an image.

Backbone, router, witness, echoes and detector, from pixels to the score, with the graph. For testing
one's own guard: whoever holds its artefact and the backbone's weights can do the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from defense.errors import ConfigError, nearest
from defense.guard import Guard, check_backbone
from defense.offline.attacks.adaptive.straight import straight_through
from defense.offline.pixels import PixelSpace
from defense.routers.gating import observed
from defense.sites import check_settled, device_of, first_tensor
from defense.state import to_device
from defense.types import LOOKS, Routed


@dataclass(frozen=True)
class Glance:
    """What a white box shows of N images, all of it with the graph back to their pixels.

    logits: (N, K). path: (N, D). score: (N,), larger = more suspicious. witness: (N, K), where the
    guard has one. activations: what every site returned, (N, C, ...) or (N, ..., C), in the order of
    the path; empty where the white box does not show them.
    """

    logits: Tensor
    path: Tensor
    score: Tensor
    witness: Tensor | None = None
    activations: tuple[Tensor, ...] = ()


class WhiteBox(Protocol):
    """Everything that an attacker who knows all differentiates through."""

    def __call__(self, pixels: Tensor) -> Glance:
        """Look at pixels (N, C, H, W) in [0, 1]."""
        ...


@dataclass(frozen=True)
class OpenGuard:
    """The real guard on the real backbone; `open_guard` makes one."""

    guard: Guard
    model: nn.Module
    space: PixelSpace
    look: str
    temperature: float | None

    def __call__(self, pixels: Tensor) -> Glance:
        """Look at pixels (N, C, H, W) in [0, 1]: scores are those that the guard would give."""
        with straight_through(self.temperature):
            inputs = self.space.to_input(pixels.to(device_of(self.model)))
            logits, activations = self._run(inputs)
            router = self.guard.router
            sites = zip(activations, router.layout.sites, strict=True)
            reduced = torch.cat([router.reduce(output, site) for output, site in sites], dim=1)
            path = router.finish(reduced, logits)
            routed = self.guard.extras.show(self.look, Routed(logits, path), self.model, inputs)
            score = self.guard.detector.score(routed)
            return Glance(logits, path, score, routed.witness, activations)

    def _run(self, inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        sites = self.guard.router.layout.sites
        with observed(self.model, sites) as seen:
            logits = first_tensor(self.model(inputs))
        assert logits is not None  # the guard was fitted to this backbone's logits
        activations = tuple(seen[site] for site in sites)
        for output in activations:
            if output.requires_grad:
                output.register_hook(_finite)
        return logits, activations


def open_guard(
    guard: Guard,
    model: nn.Module,
    space: PixelSpace,
    *,
    look: str | None = None,
    temperature: float | None = 1.0,
) -> OpenGuard:
    """Open a guard, on the device of the backbone that it was fitted for, to an attacker.

    look: one that the guard is calibrated for; None is the fullest, with witness and echoes if it has
    them. temperature: that of the slope that hard gates get, see `straight_through`; None leaves them
    without one. Raises ArtifactError for any other backbone, SiteError for one in training mode and
    ConfigError for a look that the guard does not take.
    """
    check_backbone(guard, model)
    check_settled(model)
    looks = [known for known in LOOKS if known in guard.calibrations]
    if look is not None and look not in looks:
        raise ConfigError(f"the guard has no look '{look}'{nearest(look, looks)}")
    if temperature is not None and temperature <= 0:
        raise ConfigError(
            f"the temperature of hard gates is {temperature}; give one above 0, or None for no slope"
        )
    opened = to_device(guard, device_of(model))
    return OpenGuard(opened, model, space, look or looks[-1], temperature)


def _finite(gradient: Tensor) -> Tensor:
    """Drop what is no number: a channel that is the same everywhere has no slope of its deviation."""
    return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
