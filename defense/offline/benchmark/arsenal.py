"""The attacks of a study: those of the library, and the transfer attacks with their surrogates."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from defense.offline.attacks import ATTACKS, Attack, make_attack
from defense.offline.attacks.ensemble import ensemble_attack
from defense.offline.attacks.ghost import ghost_attack
from defense.offline.attacks.latent import latent_attack
from defense.offline.cards import load_network
from defense.offline.comparison.backbones import OnPixels
from defense.offline.invertible import InvertibleResNet

SLOW = ("autoattack_8", "cw_10", "deepfool", "pixle")
"""Attacks that go image by image, or for hundreds of passes: made of fewer images."""
LEFT_OUT = ("apgd_dlr_8",)
"""Rows of the library whose images another row's hold: `apgd_8` ends with that loss."""
TRANSFER = ("ghost", "ensemble", "latent")
"""Families that start from other networks."""
LATENT_CONFIDENCE = 3.0
"""Margin in logits of the invertible network: at 0, hardly any image fools another network."""


@dataclass(frozen=True)
class Arsenal:
    """Attacks by name; `slow` ones are made of fewer images."""

    attacks: tuple[Attack, ...]
    slow: frozenset[str] = frozenset(SLOW)
    surrogates: str = ""
    """Which networks the attacks of TRANSFER start from."""

    def __iter__(self) -> Iterator[Attack]:
        return iter(self.attacks)

    def depends(self, attack: Attack) -> dict[str, object]:
        """Return what the images of `attack` depend on beside the network under attack."""
        return {"surrogates": self.surrogates} if attack.family in TRANSFER else {}


def make_arsenal(surrogates: Sequence[Path]) -> Arsenal:
    """Return all attacks; those by transfer where there are networks that the guard never saw.

    surrogates: their cards. An invertible one makes the latent attack, the others are eroded into
    ghosts, and all of them are attacked together.
    """
    rows = [make_attack(name) for name in (*ATTACKS, "cdrp") if name not in LEFT_OUT]
    loaded = [load_network(card) for card in surrogates]
    plain = [OnPixels(net, norm) for net, norm in loaded if not isinstance(net, InvertibleResNet)]
    if plain:
        rows.append(ghost_attack(plain))
    if loaded:
        rows.append(ensemble_attack([OnPixels(net, norm) for net, norm in loaded]))
    rows += [
        latent_attack(net, norm, kappa=LATENT_CONFIDENCE, eps=8 / 255)
        for net, norm in loaded
        if isinstance(net, InvertibleResNet)
    ]
    cards = b"".join(card.read_bytes() for card in surrogates)
    return Arsenal(tuple(rows), surrogates=hashlib.sha256(cards).hexdigest()[:16])


class HalfPrecision(nn.Module):
    """A model for attacks: in bfloat16 on a CPU, which finds the same images in half the time.

    Whether an attack succeeded is always judged in single precision, by the network as it is served.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """Return float32 logits (N, K) of pixels (N, C, H, W) in [0, 1]."""
        with torch.autocast("cpu", torch.bfloat16, enabled=pixels.device.type == "cpu"):
            logits: Tensor = self.model(pixels)
        return logits.float()
