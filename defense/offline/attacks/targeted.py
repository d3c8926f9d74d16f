"""The attack that the CDRP detector was published with: targeted, iterative, without a ball.

Wang et al., CVPR 2018, as released: ten steps down the loss towards a target class that is fixed
for every true class. A step is 0.01 in units of normalised pixels, about 0.0025 of full scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

STEPS = 10
STEP = 0.0025
"""Of full scale. Images move by at most STEPS x STEP."""


@dataclass(frozen=True)
class TargetedSteps:
    """Move images towards the class that `targets` names for their own."""

    model: nn.Module

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return images (N, C, H, W) in [0, 1] changed for labels (N,); see `targets`."""
        classes = self.model(images[:1]).shape[1]
        wanted = targets(classes).to(images.device)[labels.to(images.device)]
        changed = images
        for _ in range(STEPS):
            changed = (changed - STEP * gradient_of(self.model, changed, wanted).sign()).clamp(0, 1)
        return changed


def gradient_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient of the cross-entropy to `labels` with respect to every image."""
    with torch.enable_grad():
        x = images.detach().requires_grad_()
        loss = nn.functional.cross_entropy(model(x), labels, reduction="sum")
        return torch.autograd.grad(loss, x)[0]


def targets(classes: int) -> Tensor:
    """Return the target (K,) of every class: the next one.

    The release drew a random map that could send a class to itself; such images are not attacked.
    """
    return (torch.arange(classes) + 1) % classes
