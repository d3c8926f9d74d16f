"""Attacks as values with one call, for testing one's own models. One row in the table each.

All work on pixels in [0, 1] and end in 8-bit steps, because that is what a client can send.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from defense.errors import ConfigError, nearest
from defense.offline.attacks.targeted import TargetedSteps

LEVELS = 255
BATCH = 128


@dataclass(frozen=True)
class Attack:
    """A named attack. eps: L-infinity bound on the perturbation; None for attacks that minimise it."""

    name: str
    eps: float | None
    build: Callable[[nn.Module], Any]
    """Makes torchattacks' attack for a model that takes pixels in [0, 1]."""

    def run(self, model: nn.Module, images: Tensor, labels: Tensor, *, seed: int) -> Tensor:
        """Return attacked images (N, C, H, W) in [0, 1], rounded to 8 bits."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            attack = self.build(model)
            parts = [
                attack(x.contiguous(), y)
                for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True)
            ]
        attacked = torch.cat([part.detach().cpu() for part in parts])
        return _eight_bit(attacked, images, self.eps)


def _eight_bit(attacked: Tensor, images: Tensor, eps: float | None) -> Tensor:
    """Round to 8 bits without leaving the ball of radius eps."""
    rounded = (attacked * LEVELS).round()
    if eps is not None:
        bound = eps * LEVELS + 1e-4
        centre = images.cpu() * LEVELS
        rounded = rounded.clamp((centre - bound).ceil(), (centre + bound).floor())
    return rounded.clamp(0, LEVELS) / LEVELS


def make_attack(name: str, *, eps: float) -> Attack:
    """Return the attack called `name` with perturbations up to `eps` in [0, 1]."""
    try:
        import torchattacks as ta
    except ImportError as error:
        raise ConfigError(
            "attacks need the extra 'attacks'; pip install 'pathguard[attacks]'"
        ) from error

    step = eps / 8
    table: dict[str, Attack] = {
        "fgsm": Attack("fgsm", eps, lambda m: ta.FGSM(m, eps=eps)),
        "bim": Attack("bim", eps, lambda m: ta.BIM(m, eps=eps, alpha=step, steps=20)),
        "pgd": Attack("pgd", eps, lambda m: ta.PGD(m, eps=eps, alpha=step, steps=20)),
        "cw": Attack("cw", None, lambda m: ta.CW(m, c=1, kappa=0, steps=40, lr=0.02)),
        "deepfool": Attack("deepfool", None, lambda m: ta.DeepFool(m, steps=20)),
        "cdrp": Attack("cdrp", None, TargetedSteps),
    }
    if name not in table:
        raise ConfigError(f"no attack '{name}'{nearest(name, table)}")
    return table[name]


def uniform_noise(images: Tensor, *, eps: float, seed: int) -> Tensor:
    """Return images with uniform noise of the same bound: the false-alarm control of every attack."""
    generator = torch.Generator().manual_seed(seed)
    noise = (torch.rand(images.shape, generator=generator) * 2 - 1) * eps
    return _eight_bit((images.cpu() + noise).clamp(0, 1), images, eps)
