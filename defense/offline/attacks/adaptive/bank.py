"""Clean images that an attacker owns, to imitate what they leave behind."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defense.errors import DataError
from defense.offline.attacks.adaptive.whitebox import WhiteBox
from defense.state import to_device

BATCH = 100


@dataclass(frozen=True)
class Bank:
    """M clean images that the backbone gets right, and what a white box shows of them.

    pixels: (M, C, H, W) in [0, 1]. labels: (M,). path: (M, D). witness: (M, K), where there is one.
    """

    pixels: Tensor
    labels: Tensor
    path: Tensor
    witness: Tensor | None

    def to(self, device: torch.device) -> Bank:
        moved: Bank = to_device(self, device)
        return moved


@torch.no_grad()
def make_bank(whitebox: WhiteBox, pixels: Tensor, labels: Tensor) -> Bank:
    """Look at clean images (M, C, H, W) of labels (M,) and keep those that are answered rightly.

    Raises DataError where these are not of two classes at least: nothing could be imitated.
    """
    looks = [whitebox(part) for part in pixels.split(BATCH)]
    predicted = torch.cat([look.logits for look in looks]).argmax(1)
    right = predicted == labels.to(predicted.device)
    if len(predicted[right].unique()) < 2:
        raise DataError(
            f"of the {len(pixels)} clean images of the bank {int(right.sum())} are answered rightly, "
            "of fewer than two classes; give images of every class that the backbone knows"
        )
    witness = [look.witness for look in looks if look.witness is not None]
    return Bank(
        pixels.to(right.device)[right],
        predicted[right],
        torch.cat([look.path for look in looks])[right],
        torch.cat(witness)[right] if witness else None,
    )
